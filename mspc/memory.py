"""How much memory a device has left."""

import os
from contextlib import suppress

import torch

FREE_UNKNOWN = 4 * 2**30


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or in the machine for the CPU, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration), open("/proc/meminfo") as lines:  # counts in what files are cached in
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return FREE_UNKNOWN
