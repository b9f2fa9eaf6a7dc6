"""A model whose files are larger than the memory of each process, which two ranks compress."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import mspc
from mspc.storage.sizes import bytes_in

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from memory import write_model

MEMORY = 1_200_000_000
"""Bytes that a process may have, pages of files included."""
LAYERS = 256
CONFIG = LlamaConfig(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=8,
    vocab_size=4096, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    dtype="bfloat16",
)  # fmt: skip
OPTIONS = {"sparsity": 0.5, "num_sequences": 16, "sequence_length": 128, "only": (r"layers\.\d*[07]\.",)}
"""A fifth of the blocks, so that it takes minutes; every pass goes through all of them."""
CGROUPS = Path("/sys/fs/cgroup/memory")
ROOT = Path(__file__).parents[1]
SITE = """
import atexit, os, pathlib, resource
if "LOCAL_RANK" in os.environ:
    rank = os.environ["LOCAL_RANK"]
    pathlib.Path(f"{cgroup}-{{rank}}/cgroup.procs").write_text(str(os.getpid()))
    peak = lambda: str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    atexit.register(lambda: pathlib.Path(f"{out}/peak-{{rank}}").write_text(peak()))
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """The beginning of the names of two cgroups with a limit of memory, one for each rank."""
    base = CGROUPS / f"mspc-{os.getpid()}"
    try:
        for rank in range(2):
            folder = base.with_name(f"{base.name}-{rank}")
            folder.mkdir()
            (folder / "memory.limit_in_bytes").write_text(str(MEMORY))
    except OSError as error:
        pytest.skip(f"no cgroup with a limit of memory can be made here ({error})")
    yield base
    for rank in range(2):
        base.with_name(f"{base.name}-{rank}").rmdir()


@pytest.mark.slow
def test_a_model_larger_than_the_memory_of_each_rank_is_compressed(cgroup, tmp_path):
    """Oracles: the limit of the kernel, which kills what takes more; and the forecast of the memory."""
    model = tmp_path / "model"
    model.mkdir()
    write_model(model, CONFIG)
    assert bytes_in(model) > 1.2 * MEMORY
    (tmp_path / "sitecustomize.py").write_text(SITE.format(cgroup=cgroup, out=tmp_path))
    found = mspc.forecast(model, mspc.Recipe(**OPTIONS), device="cpu", threads=1, ranks=2, spill=tmp_path)
    assert found.demand.host_need < MEMORY
    arguments = [
        *("compress", model, "--out", tmp_path / "out", "--ranks", 2, "--device", "cpu", "--spill", tmp_path / "spill"),
        *("--sparsity", OPTIONS["sparsity"], "--num-sequences", 16, "--sequence-length", 128, "--only"),
        *OPTIONS["only"],
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mspc", *map(str, arguments)], capture_output=True, text=True, timeout=7200, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "out" / "mspc.json").read_text())
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)
    for rank in range(2):
        peak = int((tmp_path / f"peak-{rank}").read_text())
        print(f"rank {rank}: {peak / 1e6:,.0f} MB, forecast {found.demand.host_peak / 1e6:,.0f} MB")
        assert peak < found.demand.host_peak
    assert torch.isfinite(torch.tensor(manifest["evaluation"]["perplexity"]["mean"]))
