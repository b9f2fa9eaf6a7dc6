"""Sizes of the programs that multiply through `fragments`, chosen without timing."""

from mspc.kernels import launch

WARPS_IN_FLIGHT = 16
"""Warps that keep the memory of a multiprocessor busy. Each has 2 KiB under way, 32 KiB together; 4.3 TB/s with a
latency of 0.7 microseconds need 23 KiB."""
MULTIPROCESSORS = 132
"""Number of multiprocessors of a Hopper; an A100 has 108."""


def tiles_of(group_size: int) -> dict[str, int]:
    """Blocks of 128 columns in a group, and words of a quarter of a block that share a group."""
    return {"GROUP_BLOCKS": max(1, group_size // 128), "WORDS": min(group_size, 128) // 32}


def fragment_options(num_tokens: int, num_tiles: int, num_blocks: int) -> dict[str, int | bool]:
    """Tokens of an operand, and warps, one for each of the S blocks of a step. Few tiles of rows get more warps."""
    wanted = WARPS_IN_FLIGHT * MULTIPROCESSORS // num_tiles
    warps = 16 if wanted >= 16 else 8 if wanted >= 8 else 4
    while warps > 1 and warps >= 2 * num_blocks:
        warps //= 2
    return {
        "TOKENS": 8 if num_tokens <= 8 else 16 if num_tokens <= 16 else 32,
        "S": warps,
        "num_warps": warps,
        "num_stages": 1,
        "enable_fp_fusion": True,  # newer versions of Triton want it stated
        "PTX": launch.has_ptx(),
        "WIDE": launch.interpreted(),
    }
