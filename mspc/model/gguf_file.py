"""A GGUF file as a checkpoint folder: transformers makes its weights dense, once, in a cache."""

import hashlib
import importlib.metadata
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch

from mspc.errors import InputError, in_brief
from mspc.memory import free_memory
from mspc.model.gguf_config import FACTORS, read_config
from mspc.progress import log
from mspc.storage.dequantized import ORIGIN
from mspc.storage.files import cache_folder

VERSION = 1
"""To be raised when what is made of a file changes."""

EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are dense already. All others become bfloat16."""


def is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".gguf"


def as_folder(path: Path) -> Path:
    """The folder of a GGUF file in the cache, made if it is not there. The name of the folder is that of the file.

    The cache is `mspc/gguf` in XDG_CACHE_HOME, or else in `~/.cache`. Raises InputError for a file that transformers
    cannot read, and for one that does not fit in memory.
    """
    state = path.stat()
    known_by = (path.resolve(), state.st_size, state.st_mtime_ns, VERSION, importlib.metadata.version("transformers"))
    key = hashlib.sha256(" ".join(map(str, known_by)).encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / key / path.stem
    if not (folder / "config.json").is_file():
        _convert(path, folder)
    return folder


@dataclass(frozen=True)
class Header:
    """The part of a GGUF file before its weights."""

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]
    factors: torch.Tensor | None

    @property
    def origin(self) -> str:
        """The type of most weights in blocks."""
        in_blocks = Counter[str]()
        for name, shape in self.shapes.items():
            in_blocks[self.types[name]] += math.prod(shape) if name.startswith("blk.") else 0
        return in_blocks.most_common(1)[0][0]


def outline_of(path: Path) -> tuple[Any, torch.dtype]:
    """The config of a GGUF file, and the dtype that its weights would get. Raises InputError as `as_folder` does."""
    header = _read_header(path)
    config = _config_of(path, header)
    if config is None:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        except Exception as error:  # an architecture that transformers does not know
            raise InputError(
                f"{path}: transformers cannot read it ({in_brief(error)}). Give the checkpoint that it was made from."
            ) from error
    return config, EXACT.get(header.origin, torch.bfloat16)


def _read_header(path: Path) -> Header:
    """Raises InputError for a file that is damaged, a part of one, or no language model."""
    if find_spec("gguf") is None:
        raise InputError(f"{path}: reading GGUF files needs mspc[gguf]. Run: pip install 'mspc[gguf]'.")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        header = Header(
            {name: field.contents() for name, field in reader.fields.items() if not name.endswith(ARRAYS)},
            {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors},
            {tensor.name: tensor.tensor_type.name for tensor in reader.tensors},
            next((torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == FACTORS), None),
        )
    except Exception as error:  # damaged or cut off: the reader checks little
        raise InputError(f"{path} is no whole GGUF file ({in_brief(error)}). Get it again.") from error
    if header.fields.get("split.count", 1) > 1:
        count = header.fields["split.count"]
        raise InputError(f"{path} is one part of {count}. Join them first: llama-gguf-split --merge.")
    if not any(math.prod(shape) for name, shape in header.shapes.items() if name.startswith("blk.")):
        raise InputError(f"{path} has no tensors of decoder layers. Give a GGUF file of a whole language model.")
    return header


def _config_of(path: Path, header: Header) -> Any:
    try:
        return read_config(header.fields, header.shapes, header.factors)
    except (InputError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:  # a key that is missing or wrong
        raise InputError(
            f"{path} cannot be read as a model ({in_brief(error)}). Give the checkpoint that it was made from."
        ) from error


def _convert(path: Path, folder: Path) -> None:
    header = _read_header(path)
    fields, shapes, origin = header.fields, header.shapes, header.origin
    sizes = Counter[str]()
    for name, shape in shapes.items():
        sizes[header.types[name]] += math.prod(shape)
    total = sum(sizes.values())
    dtype = EXACT.get(origin, torch.bfloat16)
    # Each parameter twice, as it is read and in the model, and the largest tensor and its copy as they are made dense.
    largest = max(map(math.prod, shapes.values()))
    _check_memory(path, 2 * (total * dtype.itemsize + largest * torch.float32.itemsize))
    config = _config_of(path, header)
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in sizes.most_common() if count / total >= 0.005)
    log.info(f"{path.name} holds {shares}. Making it dense in {str(dtype)[6:]}, in {folder}.")
    if config is None:
        log.warning(
            f"{path.name}: of {fields.get('general.architecture')!r} models transformers may leave settings of the "
            "file out, such as windows and scaled rotary embeddings. Compare its perplexity with that of llama.cpp."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(mkdtemp(dir=folder.parent))
    try:
        _write(path, new, dtype, fields, origin, config, total - math.prod(shapes.get(FACTORS, (0,))))
        new.chmod(0o755)
        try:
            new.rename(folder)
        except OSError:  # another process was faster, and may read its folder already
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


ARRAYS = ("tokens", "scores", "token_type", "merges")
"""Endings of keys whose values are long and read by transformers."""


def _check_memory(path: Path, needed: int) -> None:
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"{path}: making it dense takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free. "
            "Free some, or give the checkpoint in safetensors, which is read block by block."
        )


def _write(
    path: Path, new: Path, dtype: torch.dtype, fields: dict[str, Any], origin: str, config: Any, num_elements: int
) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if hasattr(transformers, "GgufConfig"):  # since 5.2x, which leave the weights packed without it
        dense: dict[str, Any] = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    else:
        dense = {}
    known = {} if config is None else {"config": config}
    try:
        # A folder of its own, since a tokenizer next to the file would be taken for that of the file.
        with TemporaryDirectory() as alone:
            (Path(alone) / path.name).symlink_to(path.resolve())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=path.name, dtype=dtype, trust_remote_code=False, **dense, **known
            )
    except Exception as error:  # an architecture or tokenizer that transformers does not know
        raise InputError(
            f"{path}: transformers cannot read it ({in_brief(error)}). Give the checkpoint that it was made from."
        ) from error
    if num_elements != (expected := model.num_parameters()):  # transformers makes up what is missing
        raise InputError(
            f"{path} has {num_elements:,} weights, and the {model.config.model_type} model that it describes has "
            f"{expected:,}. Give the whole file, or the checkpoint that it was made from."
        )
    if origin not in EXACT:
        setattr(model.config, ORIGIN, origin)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = ""
    _name_special_ids(model, fields)
    _add_bos(tokenizer, fields)
    tokenizer.save_pretrained(new)
    model.save_pretrained(new)


def _name_special_ids(model: Any, fields: dict[str, Any]) -> None:
    """Write the special ids of the file into the config and the generation config."""
    for name, key in (("bos", "bos"), ("pad", "padding")):
        _set_id(model, f"{name}_token_id", fields.get(f"tokenizer.ggml.{key}_token_id"))
    ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    _set_id(model, "eos_token_id", ends[0] if len(ends) == 1 else ends or None)


def _set_id(model: Any, name: str, value: Any) -> None:
    setattr(model.config, name, value)
    setattr(model.generation_config, name, value)


def _add_bos(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Let the tokenizer begin texts with BOS if and only if the file says so.

    Where it says nothing, the rule of llama.cpp holds: SentencePiece vocabularies and Llama 3 begin with BOS.
    """
    of_kind = fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    wanted = bool(fields.get("tokenizer.ggml.add_bos_token", of_kind)) and tokenizer.bos_token_id is not None
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if wanted == begins:
        return
    from tokenizers.processors import TemplateProcessing

    template = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A" if wanted else "$A",
        pair=f"{tokenizer.bos_token} $A {tokenizer.bos_token} $B" if wanted else "$A $B",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)] if wanted else [],
    )
    tokenizer.backend_tokenizer.post_processor = template
