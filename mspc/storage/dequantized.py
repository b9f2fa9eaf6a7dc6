"""Checkpoints as they are released, whose weights others quantized, read as if they were dense."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mspc.errors import InputError, in_brief, is_out_of_memory
from mspc.formats.dequantize import AWQ, FP8, GPTQ, MXFP4, PACKED, SCALED, Layout, Scheme
from mspc.formats.gptq import V1, V2
from mspc.storage.checkpoint import STORABLE, Checkpoint
from mspc.storage.sizes import file_bytes

ORIGIN = "dequantized_from"
"""The key of config.json that says what the weights were before."""
KEYS = ("quantization_config", "compression_config")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
"""Formats of compressed-tensors."""
LAYOUTS = {"fp8": (FP8,), "mxfp4": (MXFP4,), "gptq": (GPTQ,), "awq": (AWQ,), "compressed-tensors": (PACKED, SCALED)}
"""Methods of `quantization_config`, with the layouts of their tensors."""
OF_INPUTS = (".activation_scale", ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale")
"""Endings of what belongs to products with quantized inputs. A dense model has no use for them."""
REMEDY = "Give a checkpoint that is not quantized, an mspc artifact, or an export of the formats dense or sparse."


class Quantized(NamedTuple):
    """A quantized parameter: its layout, and its tensors by their endings."""

    layout: Layout
    tensors: dict[str, str]


class Dequantized(Checkpoint):
    """A folder of safetensors whose quantized parameters are made dense when they are read, one at a time.

    A parameter belongs to the file that holds its codes. Other tensors are as they are.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], scheme: Scheme) -> None:
        super().__init__(folder)
        self._stored, self._scheme = Checkpoint(folder), scheme
        dtype = _dtype_of(config)
        self._dtype = getattr(torch, dtype)
        self._quantized = self._find(LAYOUTS[scheme.name])
        if not self._quantized:
            marks = " or ".join(layout.mark for layout in LAYOUTS[scheme.name])
            raise InputError(
                f"{folder} is quantized already by its config.json (quant_method {scheme.name!r}), but holds no tensor "
                f"whose name ends in {marks}. Give the config.json that belongs to the weights, or a checkpoint that "
                "is not quantized."
            )
        self._types = self._types | {name: (dtype, self._shape(name)) for name in self._quantized}
        hidden = {key for found in self._quantized.values() for key in found.tensors.values()} - self._quantized.keys()
        codes = {found.tensors[found.layout.needed[0]]: name for name, found in self._quantized.items()}
        self._shards = {
            shard: [codes.get(key, key) for key in keys if key in codes or not (key in hidden or _of_inputs(key))]
            for shard, keys in self._stored.shards().items()
        }
        self._shard_of = {key: shard for shard, keys in self._shards.items() for key in keys}
        self._types = {key: self._types[key] for key in self._shard_of}

    def _find(self, layouts: Iterable[Layout]) -> dict[str, Quantized]:
        """The quantized parameters by name. Raises InputError for one of whose tensors some are missing."""
        found: dict[str, Quantized] = {}
        for layout in layouts:
            for key in self._types:
                base = key.removesuffix(layout.mark)
                name = base + layout.parameter
                if base == key or name in found:
                    continue
                endings = [end for end in (*layout.needed, *layout.optional) if base + end in self._types]
                if missing := set(layout.needed) - set(endings):
                    raise InputError(
                        f"{self.folder} holds {key}, but no {base}{min(missing)}, without which {name} cannot be "
                        "made dense. Get the checkpoint again."
                    )
                found[name] = Quantized(layout, {end: base + end for end in endings})
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        layout, tensors = self._quantized[name]
        try:
            return layout.shape({end: self._stored.types()[key] for end, key in tensors.items()}, self._scheme)
        except ValueError as error:  # another number of dimensions
            raise self._does_not_fit(name, error) from error

    def _does_not_fit(self, name: str, error: Exception) -> InputError:
        return InputError(
            f"{self.folder}: {name} cannot be made dense from its {self._scheme.name} tensors ({in_brief(error)}). "
            "Give the config.json that belongs to the weights."
        )

    def dense_bytes(self) -> int:
        return sum(file_bytes({key: self._types[key] for key in keys}) for keys in self._shards.values())

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        keys = list(keys)
        yield from self._stored.read([key for key in keys if key not in self._quantized])
        for name in keys:
            if name in self._quantized:
                yield name, self._dense(name)

    def _dense(self, name: str) -> Tensor:
        layout, tensors = self._quantized[name]
        end_of = {key: end for end, key in tensors.items()}
        parts = {end_of[key]: tensor for key, tensor in self._stored.read(tensors.values())}
        try:
            weight = layout.decode(parts, self._scheme).to(self._dtype)
        except (ValueError, RuntimeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise self._does_not_fit(name, error) from error
        if tuple(weight.shape) != self._types[name][1]:
            raise self._does_not_fit(name, ValueError(f"{tuple(weight.shape)} instead of {self._types[name][1]}"))
        return weight


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose weights are dense, or made dense when they are read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # load_config says it, of a folder that is meant as a model
        return Checkpoint(folder)
    scheme = scheme_of(config, folder)
    return Checkpoint(folder) if scheme is None else Dequantized(folder, config, scheme)


def dense_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config.json of the same model with dense weights, which says what they were. Raises as `scheme_of`."""
    scheme = scheme_of(config, folder)
    if scheme is None:
        return dict(config)
    kept = {key: value for key, value in config.items() if key not in KEYS}
    return kept | {ORIGIN: scheme.name, "torch_dtype" if "torch_dtype" in kept else "dtype": _dtype_of(config)}


def origin_note(config: Any) -> str | None:
    """The line under results of a model whose weights were quantized before."""
    origin = getattr(config, ORIGIN, None)
    return origin and f"The reference was dequantized from {origin}; a 4-bit method on that grid can look lossless."


def scheme_of(config: Mapping[str, Any], folder: Path) -> Scheme | None:
    """The quantization of a config.json; None without one.

    Raises InputError, naming the method, for one that cannot be made dense.
    """
    for where, part in (("", config), *((f"{name}.", part) for name, part in config.items() if isinstance(part, dict))):
        for key in KEYS:
            found = part.get(key)
            if found is None:
                continue
            method = found.get("quant_method") if isinstance(found, dict) else None
            if method is None:
                raise InputError(
                    f"{folder / 'config.json'} has a {where}{key} that names no quant_method ({str(found)[:80]}). "
                    "Give a checkpoint that is not quantized. Delete the entry if its weights are not."
                )
            if where or method not in LAYOUTS:
                raise InputError(f"{folder} is quantized already (quant_method {method!r}). {REMEDY}")
            try:
                return _scheme(method, found)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(
                    f"{folder} is quantized already (quant_method {method!r}), in a way that mspc cannot read "
                    f"({in_brief(error)}). {REMEDY}"
                ) from error
    return None


def _scheme(method: str, config: Mapping[str, Any]) -> Scheme:
    """Raises ValueError, KeyError and the like, in words, for what no layout holds."""
    if method == "fp8":
        block = config.get("weight_block_size")
        return Scheme(method, block=None if block is None else (int(block[0]), int(block[1])))
    if method == "gptq":
        if config.get("dynamic"):
            raise ValueError("dynamic, a choice of bits for each module")
        checkpoint_format = config.get("checkpoint_format", V1)
        if checkpoint_format not in (V1, V2):
            raise ValueError(f"checkpoint_format {checkpoint_format}")
        return Scheme(method, _bits(config["bits"]), zero_offset=int(checkpoint_format == V1))
    if method == "awq":
        if (version := str(config.get("version", "gemm")).lower()) != "gemm" or config.get("bits", 4) != 4:
            raise ValueError(f"version {version}, {config.get('bits')} bits")
        return Scheme(method, 4)
    return _scheme_of_groups(method, config) if method == "compressed-tensors" else Scheme(method)


def _scheme_of_groups(method: str, config: Mapping[str, Any]) -> Scheme:
    """Compressed-tensors describe groups of modules. All must have one number of bits and one block."""
    if config.get("sparsity_config"):
        raise ValueError("sparsity_config, of a version that packed zeros")
    if config.get("transform_config"):
        raise ValueError("transform_config, of rotated weights")
    schemes = set()
    for group in config["config_groups"].values():
        layout = group.get("format") or config["format"]
        if layout not in FORMATS:
            raise ValueError(f"format {layout}")
        weights = group["weights"]
        block = weights.get("block_structure")
        schemes.add(Scheme(method, _bits(weights["num_bits"]), None if block is None else (block[0], block[1])))
    if len(schemes) != 1:
        raise ValueError(f"{len(schemes)} grids in one model")
    return schemes.pop()


def _bits(value: Any) -> int:
    if value not in (2, 3, 4, 8):
        raise ValueError(f"{value} bits")
    return int(value)


def _dtype_of(config: Mapping[str, Any]) -> str:
    """The dtype of the dense weights: that of config.json if artifacts hold it, else bfloat16, as they are released."""
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in STORABLE else "bfloat16"


def _of_inputs(key: str) -> bool:
    return key.endswith(OF_INPUTS)
