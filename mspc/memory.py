"""Free memory of a device, within the limits of the cgroups of the process."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from mspc import cgroups, ranks

FREE_UNKNOWN = 4 * 2**30
ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""
LITTLE = 4 * 2**30
"""Free bytes below which memory that the C library keeps for later goes back to the system."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or for this process on the CPU. 4 GiB if the system does not say.

    The ranks on a machine share its memory, while they work together.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _of_host() // (ranks.place().local_size if ranks.size() > 1 else 1)


def _of_host() -> int:
    return max(0, min([_of_machine(), *_of_cgroups()]))


def give_back() -> None:
    """Give memory that was freed back to the system, if little of it is free there; only glibc can.

    Small objects that outlive a block of a model lie between its tensors, so glibc keeps most of what the block took.
    """
    if _of_host() < LITTLE:
        with suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)


def share() -> None:
    """Let new threads take what others freed; else each keeps an arena of its own with it. Only glibc can."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)


def _of_machine() -> int:
    with suppress(OSError, StopIteration), open("/proc/meminfo") as lines:  # includes the page cache
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return FREE_UNKNOWN


def _of_cgroups() -> Iterator[int]:
    """Bytes that are free in each cgroup of this process. Cached files count as free, as in MemAvailable."""
    for folder, version_2 in cgroups.folders("memory"):
        limit, usage = ("max", "current") if version_2 else ("limit_in_bytes", "usage_in_bytes")
        with suppress(OSError, ValueError):  # a limit may be "max"
            yield _number(folder / f"memory.{limit}") - _number(folder / f"memory.{usage}") + _cached(folder, version_2)


def _number(file: Path) -> int:
    return int(file.read_text())


def _cached(folder: Path, version_2: bool) -> int:
    """Bytes of files in memory, which the system drops when memory is short."""
    names = [f"{'' if version_2 else 'total_'}{kind}_file" for kind in ("active", "inactive")]
    with suppress(OSError):
        rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        return sum(int(value) for name, value in rows if name in names)
    return 0
