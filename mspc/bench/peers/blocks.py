"""The formats of other engines that matrices fit."""

from mspc.bench.decoder import Shape

ONNX_BLOCKS = (128, 64, 32, 16)
"""Weights that share a scale in MatMulNBits: the longest that fits is taken."""
GGUF_BLOCKS = {"Q4_0": 32, "Q8_0": 32, "Q4_K": 256, "Q3_K": 256}
"""Weights in a block of a type of llama.cpp."""


def rows_of(shape: Shape) -> set[int]:
    """The lengths of the rows of all matrices."""
    return {size[1] for size in shape.linears().values()}


def block_of(shape: Shape) -> int:
    """The block of MatMulNBits that fits all matrices, or 0 if none does."""
    return next((block for block in ONNX_BLOCKS if not any(length % block for length in rows_of(shape))), 0)


def misfit(shape: Shape, name: str) -> str | None:
    """The reason in words if a format of another engine does not fit."""
    if name in GGUF_BLOCKS:
        block, odd = GGUF_BLOCKS[name], {length for length in rows_of(shape) if length % GGUF_BLOCKS[name]}
    else:
        block, odd = ONNX_BLOCKS[-1], set() if block_of(shape) else rows_of(shape)
    return f"rows of {min(odd)} weights are no multiple of {block}" if odd else None
