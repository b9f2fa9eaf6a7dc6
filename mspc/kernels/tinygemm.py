"""int4 products by torch's own kernel (`aten::_weight_int4pack_mm`).

It needs a copy of the codes in its own order and rounds the scales to bfloat16, so its products are not those of the
stored matrix to the last bit: an error of up to 2^-9 of every scale.
"""

import torch
from torch import Tensor

from mspc.formats.bits import unpack_rows
from mspc.formats.description import StoredMatrix

INNER_TILES = 8
GROUP_SIZES = (32, 64, 128, 256)


def usable(description: StoredMatrix, dtype: torch.dtype) -> bool:
    (num_rows, num_columns), target = description.shape, description.target
    return (
        target.pattern.sparsity == 0
        and target.grid is not None
        and target.grid.bits == 4
        and target.grid.group_size in GROUP_SIZES
        and dtype == torch.bfloat16
        and num_rows % 8 == 0
        and num_columns % (16 * INNER_TILES) == 0
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def pack(stored: dict[str, Tensor], description: StoredMatrix, device: torch.device) -> tuple[Tensor, Tensor]:
    """The codes in the order of the kernel, and bfloat16 (G, O, 2): scale and weight of code 8."""
    codes = unpack_rows(stored["codes"], 4, description.shape[1]).to(device)
    scales = stored["scales"].to(device).float()
    middle = torch.full_like(scales, 8)
    if "zeros" in stored:
        middle = unpack_rows(stored["zeros"], 4, scales.shape[1]).to(device).float()
    of_code_8 = (8 - middle) * scales
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], INNER_TILES)
    return packed, torch.stack([scales, of_code_8], -1).transpose(0, 1).bfloat16().contiguous()


def matmul(x: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """x (T, I) -> (T, O)."""
    return torch._weight_int4pack_mm(x.contiguous(), packed, group_size, scales)
