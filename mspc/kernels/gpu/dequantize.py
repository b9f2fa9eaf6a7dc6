"""Turns words of eight 4-bit codes into pairs of float16 or bfloat16 without conversions, as Marlin (arXiv 2408.11743).

A code ORed into the mantissa of 1024 (float16) or 128 (bfloat16) is that number plus the code. One exact subtraction
removes the number and the zero point. float16 has room for a second code four bits higher, which is worth 16 times as
much. A word therefore takes 1 shift, 4 `lop3` and 4 additions, 9 / 8 instructions a code; bfloat16 takes 3 shifts, 4
and 4, 11 / 8.

Code c of pair p of a word has the bits from 4 p + 16 c. Codes of eight bits are two of four, and take one more `fma` a
pair. The branches without PTX compute the same numbers with plain operations.
"""

import triton
import triton.language as tl

from mspc.kernels.gpu.fragments import both, half

DEQUANTIZE_FP16 = tl.constexpr("""{
    .reg .b32 upper, sixteenth;
    mov.b32 sixteenth, 0x2c002c00;
    shr.u32 upper, $4, 8;
    lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
    lop3.b32 $2, upper, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $3, upper, 0x00f000f0, 0x64006400, 0xea;
    add.rn.f16x2 $0, $0, $5;
    fma.rn.f16x2 $1, $1, sixteenth, $6;
    add.rn.f16x2 $2, $2, $5;
    fma.rn.f16x2 $3, $3, sixteenth, $6;
}""")

DEQUANTIZE_BF16 = tl.constexpr("""{
    .reg .b32 word, one;
    mov.b32 one, 0x3f803f80;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, $0, one, $5;
    shr.u32 word, $4, 4;
    lop3.b32 $1, word, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, $1, one, $5;
    shr.u32 word, $4, 8;
    lop3.b32 $2, word, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $2, $2, one, $5;
    shr.u32 word, $4, 12;
    lop3.b32 $3, word, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $3, $3, one, $5;
}""")


SIXTEENFOLD_FP16 = tl.constexpr("""{
    .reg .b32 sixteen;
    mov.b32 sixteen, 0x4c004c00;
    fma.rn.f16x2 $0, $2, sixteen, $1;
}""")
SIXTEENFOLD_BF16 = tl.constexpr("""{
    .reg .b32 sixteen;
    mov.b32 sixteen, 0x41804180;
    fma.rn.bf16x2 $0, $2, sixteen, $1;
}""")


@triton.jit
def dequantize(words, zeros, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """int32 words and zero points, of one shape -> four int32 of that shape, each the pair (code - zero) in DTYPE."""
    if PTX and DTYPE == tl.float16:
        # -(1024 + zero) and -(64 + zero), twice each.
        less = zeros * 0x10001 - 0x1BFF1C00
        less_sixteenth = zeros * 0x100010 - 0x2BFF2C00
        return tl.inline_asm_elementwise(
            DEQUANTIZE_FP16,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, less, less_sixteenth],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    elif PTX:
        less = zeros * 0x10001 - 0x3CFF3D00  # -(128 + zero), twice
        return tl.inline_asm_elementwise(
            DEQUANTIZE_BF16,
            "=&r,=&r,=&r,=&r,r,r",
            [words, less],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            code_pair(words, zeros, 0, DTYPE),
            code_pair(words, zeros, 1, DTYPE),
            code_pair(words, zeros, 2, DTYPE),
            code_pair(words, zeros, 3, DTYPE),
        )


@triton.jit
def code_pair(words, zeros, p: tl.constexpr, DTYPE: tl.constexpr):
    low = ((words >> (4 * p)) & 15) - zeros
    high = ((words >> (4 * p + 16)) & 15) - zeros
    return both(low.to(tl.float32).to(DTYPE), high.to(tl.float32).to(DTYPE))


@triton.jit
def add_sixteenfold(low, high, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The four pairs low + 16 high: exact, because the results are integers of at most eight bits and a sign."""
    return (
        sixteenfold(low[0], high[0], DTYPE, PTX),
        sixteenfold(low[1], high[1], DTYPE, PTX),
        sixteenfold(low[2], high[2], DTYPE, PTX),
        sixteenfold(low[3], high[3], DTYPE, PTX),
    )


@triton.jit
def sixteenfold(low, high, DTYPE: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        ASSEMBLY: tl.constexpr = SIXTEENFOLD_FP16 if DTYPE == tl.float16 else SIXTEENFOLD_BF16
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        first = half(low, 0, DTYPE).to(tl.float32) + 16 * half(high, 0, DTYPE).to(tl.float32)
        second = half(low, 1, DTYPE).to(tl.float32) + 16 * half(high, 1, DTYPE).to(tl.float32)
        return both(first.to(DTYPE), second.to(DTYPE))
