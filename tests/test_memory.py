"""Memory of the process."""

import platform
from pathlib import Path

import pytest
import torch

from mspc import memory


def resident() -> int:
    """Bytes that the system counts, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory and can give it back")
def test_memory_between_small_objects_is_given_back_if_little_is_free(monkeypatch):
    """Oracle: the system's own count of what the process has."""
    torch.ones(2**22)  # once such a size is freed, smaller ones are kept
    tensors, small = [], []
    for _ in range(64):
        tensors.append(torch.ones(2**19))
        small.append(torch.ones(2))
    tensors.clear()
    before = resident()
    monkeypatch.setattr(memory, "free_memory", lambda device: memory.LITTLE)
    memory.give_back()
    assert before - resident() < 64 * 2**18
    monkeypatch.setattr(memory, "free_memory", lambda device: memory.LITTLE - 1)
    memory.give_back()
    assert before - resident() > 64 * 2**20
