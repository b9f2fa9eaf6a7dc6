"""Free memory of a device."""

import os
from contextlib import suppress

import torch

FREE_UNKNOWN = 4 * 2**30


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or in the machine for the CPU. 4 GiB if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration), open("/proc/meminfo") as lines:  # includes the page cache
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return FREE_UNKNOWN
