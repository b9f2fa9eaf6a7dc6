"""transformers on the CPU, in float32 where the format allows it."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoConfig, CompressedTensorsConfig, GenerationConfig

from exporters.manifest import ExportManifest
from exporters.reference import last_logits
from exporters.runtimes import FLOAT32, HALF, Runner, Unsupported
from mspc.model.auto_class import auto_class
from mspc.model.hub import without_progress
from mspc.progress import log
from mspc.storage.manifest import MatrixEntry

GGUF = "model.gguf"
NOT_READ = (
    "head_dim", "rope_parameters", "layer_types", "query_pre_attn_scalar", "sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
"""Settings that transformers does not read from the metadata of every family, but leaves at their defaults."""


def load(folder: Path, manifest: ExportManifest) -> Runner:
    # None is the default of the model. The config may name kernels of the hub, which are code too.
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": None}
    quantized = [entry for entry in manifest.entries if entry.target.grid]
    grids = {entry.target.grid for entry in quantized if entry.target.grid}
    if manifest.format == "gptq":
        _check_gptq([entry for entry in quantized if not entry.role])
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its kernels are compiled when they load
        settings["dtype"] = torch.float16
    elif manifest.format == "sparse":
        import mspc.hf  # noqa: F401  makes transformers know the format
    elif manifest.format == "compressed-tensors":
        import compressed_tensors  # noqa: F401  transformers would say it is missing in other words

        if not all(grid.symmetric for grid in grids):  # their packed zero points have no meta shape otherwise
            settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    elif manifest.format == "gguf":
        import accelerate  # noqa: F401  for the same reason
        import gguf  # noqa: F401

        settings |= {"gguf_file": GGUF} | _config_beside(folder)
    with without_progress():  # `verify` shows its own
        found = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        model = found.from_pretrained(folder, trust_remote_code=False, **settings).eval()
    return runner_of(model, transformers.__version__, HALF if manifest.format == "gptq" else FLOAT32)


def _config_beside(folder: Path) -> dict[str, Any]:
    """`config=` with the config.json of an export, if transformers would read another model from its GGUF file."""
    own = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    read = AutoConfig.from_pretrained(folder, gguf_file=GGUF, trust_remote_code=False)
    differ = [key for key in NOT_READ if getattr(own, key, None) != getattr(read, key, None)]
    if (read.pad_token_id or 0) >= own.vocab_size:  # it cannot make such an embedding
        differ.append("pad_token_id")
    if not differ:
        return {}
    log.info(
        f"transformers does not read {', '.join(differ)} from GGUF files of this family: there, give from_pretrained "
        "the config of this folder as well (config=AutoConfig.from_pretrained(DIR))."
    )
    values = {key: value for key, value in own.to_dict().items() if key != "model_type"}
    return {"config": type(read)(**values)}  # of the file: a Mistral is a Llama there


def _check_gptq(quantized: list[MatrixEntry]) -> None:
    """Raises Unsupported for folders that the loader of transformers (optimum and GPTQModel) is known not to read."""
    import gptqmodel  # noqa: F401
    import optimum  # noqa: F401

    if any(entry.address.transposed for entry in quantized):
        raise Unsupported("its GPTQ loader fails for GPT-2's Conv1D: the packed layer has no `weight` to initialize")
    if len({entry.target.grid for entry in quantized}) > 1:
        raise Unsupported("its GPTQ loader knows one bit width and group size for all matrices")


def runner_of(model: Any, version: str, tolerance: float) -> Runner:
    """Any model with the interface of transformers."""

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()
        return found

    def generate(prompt: Sequence[int], count: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        # The model's own would stop at its end-of-text token.
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
        with torch.no_grad():
            try:
                found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
            except ValueError as error:
                if "get_seq_length" not in str(error):
                    raise
                # It asks the cache for its length, which it does not know when no layer is attention.
                found = ids
                for _ in range(count):
                    best = model(input_ids=found, use_cache=False).logits[:, -1:].argmax(-1)
                    found = torch.cat([found, best], 1)
        return list(found[0, len(prompt) :].tolist())

    def last(ids: NDArray[np.int64], decoded: int, count: int) -> NDArray[np.float32]:
        tokens, split = torch.from_numpy(ids), ids.shape[1] - decoded
        accepted = inspect.signature(model.forward).parameters  # versions of transformers differ in the name
        cache = "cache" if "cache" in accepted else "past_key_values"
        with torch.no_grad():
            out = last_logits(model, tokens[:, :split], count - decoded, use_cache=decoded > 0)
            parts = [out.logits]
            for at in range(split, ids.shape[1]):
                out = model(input_ids=tokens[:, at : at + 1], use_cache=True, **{cache: out[cache]})
                parts.append(out.logits)
            found: NDArray[np.float32] = torch.cat(parts, 1).float().numpy()
        return found

    return Runner(version, tolerance, logits, generate, last)
