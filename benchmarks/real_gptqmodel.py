"""GPTQModel for quality_real.py: FOEM with GPTAQ, its newest variant of GPTQ, dequantized to a dense checkpoint.

python benchmarks/real_gptqmodel.py [--bits 4] [--group-size 64] MODEL TOKENS.safetensors OUT
"""

import argparse
import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters.reading import little_endian_fields
from mspc.storage.checkpoint import Checkpoint

BATCH = 4


def dequantized(tensors: dict[str, Any], bits: int, offset: int) -> torch.Tensor:
    """The weight (O, I) float32 of a matrix in GPTQ's layout, whose zero points are stored less `offset`."""
    groups, scales = tensors["g_idx"].numpy(), tensors["scales"].float().numpy()
    codes = little_endian_fields(np.ascontiguousarray(tensors["qweight"].numpy().T), bits, len(groups))
    zeros = little_endian_fields(tensors["qzeros"].numpy(), bits, scales.shape[1]).astype(np.int64) + offset
    zeros &= 2**bits - 1
    weight = (codes.T.astype(np.float32) - zeros[groups].astype(np.float32)) * scales[groups]
    return torch.from_numpy(np.ascontiguousarray(weight.T))


def read(folder: Path, reference: str, bits: int) -> Any:
    """The model of a GPTQ folder in float32, without its layers."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    offset = 0 if config["checkpoint_format"] == "gptq_v2" else 1
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, trust_remote_code=False)
    stored = dict(Checkpoint(folder).read(Checkpoint(folder).keys()))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
            module.weight.data = dequantized(parts, bits, offset)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=lambda text: str(Path(text).resolve()))
    args = parser.parse_args()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read by the import; it refuses to work with one
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig

    foem = FOEMConfig(alpha=0.25, beta=0.2)
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, foem=foem, device="cpu")
    model = GPTQModel.load(args.model, config, trust_remote_code=False)
    ids = load_file(args.tokens)["ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it writes logs where it runs
        model.quantize(rows, batch_size=BATCH)
        model.save("gptq")
        read(Path("gptq"), args.model, args.bits).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model, trust_remote_code=False).save_pretrained(args.out)


if __name__ == "__main__":
    main()
