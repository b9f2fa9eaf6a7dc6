"""Memory of the process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def resident() -> int:
    """Bytes that the system counts, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


SCRIPT = """
import torch
from test_memory import resident
from mspc import memory
torch.ones(2**22)  # once such a size is freed, smaller ones are kept
tensors, small = [], []
for _ in range(64):
    tensors.append(torch.ones(2**19))
    small.append(torch.ones(2**14))  # too large for holes that are there already
tensors.clear()
before = resident()
memory._of_host = lambda: memory.LITTLE
memory.give_back()
kept = before - resident()
memory._of_host = lambda: memory.LITTLE - 1
memory.give_back()
print(kept, before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory and can give it back")
def test_memory_between_small_objects_is_given_back_if_little_is_free():
    """Oracle: the system's own count of what a process has, which does nothing else."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kept, given_back = map(int, done.stdout.split())
    assert kept < 64 * 2**18
    assert given_back > 64 * 2**20
