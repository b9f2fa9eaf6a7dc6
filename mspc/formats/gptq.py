"""The tensors of GPTQ and of compressed-tensors' pack-quantized format.

Both hold the same little-endian streams of codes in int32 words, down the inputs in the one, along them in the other.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mspc.formats.bits import pack_rows
from mspc.types import Codes

V1, V2 = "gptq", "gptq_v2"


def pack_words(values: Tensor, bits: int) -> Tensor:
    """uint8 (R, K) -> int32 (R, ceil(K * bits / 32)): a little-endian stream of words for every row."""
    stream = pack_rows(values, bits)
    return pad(stream, (0, -stream.shape[1] % 4)).flatten().view(torch.int32).view(len(values), -1)


def pack_gptq(codes: Codes, bits: int, checkpoint_format: str) -> dict[str, Tensor]:
    """qweight int32 (I b / 32, O), qzeros int32 (G, O b / 32), scales float16 (G, O), g_idx int32 (I,).

    The first version of the format stores zero points minus 1, so that 0 and 2^b look the same; the second stores them
    unchanged.
    """
    num_columns, num_groups = codes.values.shape[1], codes.scales.shape[1]
    zeros = codes.zeros if checkpoint_format == V2 else (codes.zeros - 1) & (2**bits - 1)
    return {
        "qweight": pack_words(codes.values, bits).T.contiguous(),
        "qzeros": pack_words(zeros.T.contiguous(), bits),
        "scales": codes.scales.T.contiguous(),
        "g_idx": (torch.arange(num_columns) // (num_columns // num_groups)).to(torch.int32),
    }


def pack_quantized(codes: Codes, bits: int, *, symmetric: bool) -> dict[str, Tensor]:
    """weight_packed int32 (O, ceil(I b / 32)), weight_scale float16 (O, G), weight_shape int64 (2,); asymmetric grids
    add weight_zero_point int32 (ceil(O b / 32), G), a stream along the outputs.
    """
    tensors = {
        "weight_packed": pack_words(codes.values, bits),
        "weight_scale": codes.scales.contiguous(),
        "weight_shape": torch.tensor(codes.values.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_words(codes.zeros.T.contiguous(), bits).T.contiguous()
    return tensors
