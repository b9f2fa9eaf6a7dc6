"""Memory for repacked weights in pages of 2 MB: a product that reads it misses the TLB hundreds of times less often."""

import ctypes
import sys
from threading import Lock

import torch
from torch import Tensor

PAGE, BLOCK, ALIGNMENT = 2**21, 2**25, 64
_MADV_HUGEPAGE = 14

_lock = Lock()
_block = torch.empty(0, dtype=torch.uint8)
"""The rest of the last block. Matrices share blocks, because most are no whole pages."""


def zeros(num_bytes: int) -> Tensor:
    """uint8 (num_bytes,), aligned to 64 bytes. Blocks live as long as one of their tensors, and the last one longer."""
    global _block
    size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
    with _lock:
        if len(_block) < size:
            _block = _huge(max(BLOCK, -(-size // PAGE) * PAGE))
        taken, _block = _block[:num_bytes], _block[size:]
    return taken.zero_()


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor on the CPU in such memory."""
    copy = zeros(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _huge(num_bytes: int) -> Tensor:
    """uint8 (num_bytes,) of whole pages that nothing has touched. Linux gives them at the first touch, if it can."""
    memory = torch.empty(num_bytes + PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % PAGE :][:num_bytes]
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(num_bytes), _MADV_HUGEPAGE)
    return memory
