"""Files that other engines run as they are: GGUF files and ONNX exports that are named as a PATH."""

import json
from collections.abc import Iterable
from pathlib import Path

from mspc.errors import InputError

GGUF, ONNX = "gguf", "onnx"
RUN_BY = {GGUF: ("llama.cpp",), ONNX: ("onnxruntime", "openvino")}
"""The engines that run a kind of file."""


def kind_of(path: str) -> str | None:
    """`gguf`, `onnx` or neither. An ONNX export is a folder that ONNX Runtime GenAI generates from."""
    if path.endswith(".gguf") and Path(path).is_file():
        return GGUF
    return ONNX if all((Path(path) / name).is_file() for name in ("genai_config.json", "model.onnx")) else None


def is_sparse(folder: Path) -> bool:
    """Tell if an ONNX export needs mspc's C++ library."""
    manifest = folder / "mspc_export.json"
    if not manifest.is_file():
        return False
    found = json.loads(manifest.read_text(encoding="utf-8"))
    return isinstance(found, dict) and found.get("options", {}).get("weights") == "sparse"


def prepared(path: Path, engine: str, work: Path) -> tuple[Path, dict[str, int]]:
    """The file or folder that an engine takes, and the bytes of weights that a step reads.

    Only libraries of this mspc run. Raises InputError for an export that asks for another one.
    """
    if kind_of(str(path)) == GGUF:
        from gguf import GGUFReader

        sizes = [(tensor.name, int(tensor.n_bytes)) for tensor in GGUFReader(path).tensors]
        return path, counted(sizes, "blk.", ("output.weight", "token_embd."))
    import onnx_ir as ir

    graph = ir.load(path / "model.onnx").graph
    sizes = [(name, value.const_value.nbytes) for name, value in graph.initializers.items() if value.const_value]
    found = counted(sizes, "model.layers.", ("lm_head.", "model.embed_tokens."))
    if engine == "onnxruntime":
        from exporters.runtimes.onnxruntime_genai import check_libraries, link_with_library

        check_libraries(path, is_sparse(path))
        if is_sparse(path):
            link_with_library(path, work)
            return work, found
    elif is_sparse(path):
        raise InputError(
            f"{path} needs mspc's operator, which {engine} does not know. Leave {engine} out with --peers."
        )
    return path, found


def counted(sizes: Iterable[tuple[str, int]], of_block: str, heads: tuple[str, str]) -> dict[str, int]:
    """Bytes of linear layers, norms and the head: that of its own if there is one, or else the embeddings."""
    sizes = list(sizes)
    head = next((head for head in heads if any(name.startswith(head) for name, _ in sizes)), "")
    found = {"linears": 0, "norms": 0, "head": 0}
    for name, size in sizes:
        if "norm" in name:
            found["norms"] += size
        elif name.startswith(of_block):
            found["linears"] += size
        elif head and name.startswith(head):
            found["head"] += size
    return found
