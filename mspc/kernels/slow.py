"""A note about compressed matrices that are slower than dense ones on a device, by the predictions of docs/speed.md."""

from collections.abc import Sequence

import torch

from mspc.formats.description import StoredMatrix
from mspc.kernels import kernel_for
from mspc.kernels.cpu.library import may_be_had


def slow_note(matrices: Sequence[StoredMatrix], device: str) -> str | None:
    """A line that names what is slower than a dense layer on this type of device, and what avoids it, or None."""
    compressed = [matrix for matrix in matrices if matrix.grid or matrix.has_mask or matrix.has_indices]
    if not compressed:
        return None
    if device == "cpu" and may_be_had():
        return None
    if device != "cuda":
        return (
            "Speed: in plain torch compressed layers are slower than dense ones. --export dense avoids that, at full "
            "size."
        )
    kernels = [(matrix, kernel_for(matrix, _dtype_on_gpu(matrix))) for matrix in compressed]
    masked = sum(name == "bitmap" and matrix.grid is not None for matrix, name in kernels)
    without = sum(name is None for _, name in kernels)
    if not masked + without:
        return None
    which = [f"{masked} with masks and codes"] * (masked > 0) + [f"{without} without a kernel"] * (without > 0)
    return (
        f"Speed: of {len(matrices)} matrices, {' and '.join(which)} are predicted to be slower than dense ones on a "
        "GPU. --sparsity 0 --bits 4 avoids that."
    )


def _dtype_on_gpu(matrix: StoredMatrix) -> torch.dtype:
    """The type of inputs that a kernel may take: that of the weight, or bfloat16 for a weight of float32."""
    return torch.bfloat16 if matrix.dtype == torch.float32 else matrix.dtype
