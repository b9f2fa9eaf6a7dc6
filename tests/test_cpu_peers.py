"""The contenders of benchmarks/cpu_peers.py have the weights that they are said to have."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from cpu_decoders import mixture_of, random_step
from random_gguf import SCALES, random_blocks, write

from mspc.bench.decoder import Shape
from mspc.types import Grid, Target, Unstructured

SHAPE = Shape("small", 256, 512, 3, 4, 2, 64, 320, tied=True)
WEIGHTS = SHAPE.blocks * SHAPE.block_weights + SHAPE.hidden * SHAPE.vocabulary


@pytest.mark.parametrize("kind", SCALES)
def test_random_blocks_are_ordinary_numbers(kind):
    """Oracle: the decoders of the package gguf."""
    blocks = random_blocks((16, 512), kind, np.random.default_rng(0))
    weight = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert weight.shape == (16, 512)
    assert np.isfinite(weight).all()
    assert 0 < np.abs(weight).max() < 5
    assert len(np.unique(weight)) > 1000


def test_a_file_holds_the_tensors_of_its_shape(tmp_path):
    num_bytes = write(tmp_path / "random.gguf", SHAPE, "Q4_0")
    assert num_bytes == WEIGHTS * 18 // 32
    tensors = gguf.GGUFReader(tmp_path / "random.gguf").tensors
    assert sum(tensor.n_bytes for tensor in tensors if len(tensor.shape) == 2) == num_bytes
    assert write(tmp_path / "random.gguf", SHAPE, "Q4_0") == num_bytes


@pytest.mark.parametrize(("name", "bits"), [("torch", 16), ("dense", 16), ("int4", 4.125), ("2:4+int4", 3.125)])
def test_a_step_reads_the_bytes_of_its_format(name, bits):
    step, num_bytes = random_step(SHAPE, name, 4, 8)
    head = SHAPE.hidden * SHAPE.vocabulary * (16 if bits == 16 else 4.125) / 8
    norms = (2 * SHAPE.blocks + 1) * SHAPE.hidden * (2 if name == "torch" else 4)
    assert num_bytes == SHAPE.blocks * SHAPE.block_weights * bits / 8 + head + norms
    with torch.inference_mode():
        assert 0 <= int(step()) < SHAPE.vocabulary


def test_a_mixture_has_the_formats_of_an_artifact(artifact_of):
    """Oracle: the rows of its manifest, at the same relative depth."""
    artifact = artifact_of("llama", sparsity=0.5)
    rows = {row["name"]: row for row in artifact.manifest["matrices"]}
    mixture = mixture_of(artifact.path, 3)
    depth = 1 + max(int(name.split(".")[2]) for name in rows)
    for number, of_block in enumerate(mixture):
        assert len(of_block) == 7
        for part, target in of_block.items():
            row = rows[f"model.layers.{round(number * (depth - 1) / 2)}.{part}"]
            assert target == Target(Unstructured(row["sparsity"]), Grid(row["bits"], 128))
    step, num_bytes = random_step(SHAPE, mixture, 4, 8)
    assert num_bytes < WEIGHTS * 4.5 / 8
    with torch.inference_mode():
        step()


def test_other_patterns_make_no_mixture(artifact_of):
    artifact = artifact_of("llama", pattern="2:4")
    with pytest.raises(SystemExit, match="2:4"):
        mixture_of(artifact.path, 3)
