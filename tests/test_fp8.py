"""Products of many tokens in 8-bit floats: the twin against float64, and what asks for it.

Oracle of the rounding: all 256 numbers of e4m3, from their bits, and the nearest of them. Oracle of products: float64,
within half a unit of e4m3 for each factor. Of models: the same, by dense layers of transformers.
"""

from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BF16, FP16, Case, inputs
from oracles import few
from torch import Tensor, nn

import mspc
from mspc.errors import InputError
from mspc.kernels import cusparselt, dispatch, fp8
from mspc.kernels.dispatch import ANY_NUMBER, measure, schedule, with_copies
from mspc.kernels.timings import Row
from mspc.model.hub import load_tokenizer
from mspc.progress import Silent
from mspc.runtime.linear import SparseLinear
from mspc.text.tokens import windows_of_test_text
from mspc.types import NM, Grid

VALUES = Case("sparse24", NM(2, 4), None, (64, 256), BF16)
CODES = Case("sparse24", NM(2, 4), Grid(4, 64, False), (32, 192), BF16)
HALVES = Case("sparse24", NM(2, 4), None, (32, 160), FP16)
ALL = [VALUES, CODES, HALVES]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def e4m3_numbers() -> Tensor:
    """Of the bits s eeee mmm: (-1)^s 2^(e - 7) (1 + m / 8), without the 1 and one exponent up where e = 0; no NaN."""
    found = []
    for bits in range(256):
        sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
        if (exponent, mantissa) != (15, 7):
            size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
            found.append(-size if sign else size)
    return torch.tensor(sorted(set(found)), dtype=torch.float64)


def nearest(x: Tensor) -> Tensor:
    """In float64: each row scaled so that its largest is 448, in float32, and each number's neighbour in e4m3, of two
    as near the one with even bits; scaled back."""
    numbers, largest = e4m3_numbers(), x.float().abs().amax(1, keepdim=True)
    scaled, middles = (x.float() * (448 / largest.double()).float()).double(), (numbers[1:] + numbers[:-1]) / 2
    places = torch.bucketize(scaled, middles)
    up = (scaled == middles[places.clamp(max=len(middles) - 1)]) & (places % 2 == 1)
    return numbers[places + up] * (largest.double() / 448).float().double()


def half_units(x: Tensor) -> Tensor:
    """By how much rounding moves each at most: 2^-4 of it, or 2^-10 of the scale where e4m3 has no exponent for it."""
    scale = x.abs().amax(1, keepdim=True).double() / 448
    # And the rounding of the scale and of its inverse, in float32.
    return (2.0**-4 + 2.0**-21) * x.abs().double() + 2.0**-10 * scale


def greatest_error(x: Tensor, weight: Tensor) -> Tensor:
    """Of every product of x (T, I) and W (O, I), both rounded, summed in float32 and rounded to the dtype of x."""
    a, b, of_a, of_b = x.abs().double(), weight.abs().double(), half_units(x), half_units(weight)
    rounding = of_a @ b.T + a @ of_b.T + of_a @ of_b.T
    return rounding + (a @ b.T + rounding) * (torch.finfo(x.dtype).eps / 2 + 2.0**-18)


def test_numbers_of_e4m3():
    """That the oracle has those of torch."""
    of_torch = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(e4m3_numbers(), of_torch[~of_torch.isnan()].unique())
    assert e4m3_numbers().abs().max() == fp8.LARGEST


@few
@given(st.integers(1, 5), st.integers(1, 40), st.floats(-8, 8), st.integers(0, 1000))
def test_rounding_is_to_the_nearest(num_rows, num_columns, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (spread * torch.randn(num_rows, num_columns, generator=generator)).exp()
    x = (sizes * torch.randn(num_rows, num_columns, generator=generator)).bfloat16()
    codes, scales = fp8.rounded(x)
    assert codes.double().abs().max() == fp8.LARGEST  # never NaN
    assert torch.equal(codes.double() * scales.double()[:, None], nearest(x))
    assert bool(((nearest(x) - x.double()).abs() <= half_units(x)).all())


def test_rows_of_zeros_and_of_next_to_nothing():
    x = torch.tensor([[0.0, -0.0], [1e-38, -1e-38], [3e38, 1.0]])
    codes, scales = fp8.rounded(x)
    assert bool(codes.double().isfinite().all())
    assert bool((scales > 0).all())
    assert torch.equal(codes[0].float(), torch.zeros(2))
    assert codes[2].tolist() == [448, 0]


@pytest.mark.parametrize("num_tokens", [1, 33, 100])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_twin_is_near_float64(case, num_tokens):
    x, weight = inputs(case, num_tokens), case.weight().to(case.dtype)
    expected = x.double() @ weight.double().T
    error = (fp8.twin(x, weight).double() - expected).abs()
    assert bool((error <= greatest_error(x, weight)).all())
    # Each factor is off by 2.6% in the mean, so that a product that nothing was rounded for would be seen too.
    assert 0.02 < float(error.norm() / expected.norm()) < 0.06
    exact = nearest(x) @ nearest(weight).T
    torch.testing.assert_close(fp8.twin(x.float(), weight.float()).double(), exact, rtol=1e-5, atol=1e-5)


def test_no_token_depends_on_another():
    x, weight = inputs(VALUES, 40), VALUES.weight()
    beside = x.clone()
    beside[1:] *= 1000
    assert torch.equal(fp8.twin(beside, weight)[0], fp8.twin(x, weight)[0])


# What asks for it


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_layer_rounds_many_tokens_only_when_asked(case):
    layer = SparseLinear.of(case.stored(), case.description)
    few_tokens, many = inputs(case, fp8.FEW_TOKENS), inputs(case, fp8.FEW_TOKENS + 1)
    with torch.no_grad():
        before = layer(few_tokens), layer(many)
        layer.prefill_by("fp8")
        after = layer(few_tokens), layer(many)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], fp8.twin(many, layer.weight), rtol=0, atol=0)
    assert not torch.equal(after[1], before[1])
    assert layer.copied_bytes() == 0


@pytest.mark.parametrize("case", ALL, ids=str)
def test_what_is_prepared_takes_it_above_few_tokens(case, monkeypatch):
    """On a CPU the twin computes. Oracle: that of the dense weight; and of few tokens the kernel's own."""
    monkeypatch.setattr(torch, "_cslt_compress", lambda codes: codes)
    monkeypatch.setattr(fp8, "algorithms", lambda shape, device: ((64, 3), (4096, 5)))
    layer = SparseLinear.of(case.stored(), case.description)
    layer.prepare(case.dtype)
    stored, exact = layer.state_dict(), layer(inputs(case, 8))
    layer.prefill_by("fp8")
    assert layer.rows[2:] == (Row(64, "fp8", 3), Row(ANY_NUMBER, "fp8", 5))
    assert torch.equal(layer(inputs(case, 8)), exact)
    x = inputs(case, fp8.FEW_TOKENS + 1)
    assert torch.equal(layer(x), fp8.twin(x, layer.weight.to(case.dtype)))
    assert layer.fp8.dtype == torch.float8_e4m3fn
    assert layer.copied_bytes() == layer.fp8.nbytes + 4 * case.shape[0]
    assert layer.bfloat16().fp8.dtype == torch.float8_e4m3fn  # casting the model casts no code
    after = layer.state_dict()
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[part], stored[part]) for part in stored)


def test_it_is_never_taken_unasked(monkeypatch):
    """Not by `with_copies`, nor by `measure` where the copy is there."""
    monkeypatch.setattr(torch, "_cslt_compress", lambda codes: codes)
    monkeypatch.setattr(dispatch.timings, "device_key", lambda device: "a GPU")
    monkeypatch.setattr(dispatch.timings, "write", lambda *args: None)
    arranged = VALUES.kernel.arrange(VALUES.stored(), VALUES.description)
    assert "fp8" not in with_copies(arranged, VALUES.description, BF16)
    with_fp8 = with_copies(arranged, VALUES.description, BF16, ("fp8",))
    assert {"fp8", "fp8_scales"} <= with_fp8.keys()
    rows = measure(with_fp8, VALUES.description, BF16, lambda call: {"_fp8": 0.0}.get(call.func.__name__, 1.0))
    assert "fp8" not in {row.method for row in rows}
    assert "fp8" not in {row.method for row in schedule(arranged, VALUES.description, BF16)}


def test_what_fits():
    assert fp8.fits(VALUES.description)
    assert fp8.fits(CODES.description)
    assert not fp8.fits(Case("sparse24", NM(2, 4), None, (48, 256), BF16).description)
    assert not fp8.fits(Case("nm", NM(4, 8), None, (32, 256), BF16).description)


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((8, 0), 801, "the compute capability of cuda is 8.0, and 8.9 is needed"),
        ((8, 9), 701, "cuSPARSELt is version 701, and 800 is needed on cuda"),
        ((8, 9), 800, None),
        ((9, 0), 502, "cuSPARSELt is version 502, and 602 is needed on cuda"),
        ((9, 0), 602, None),
        ((10, 0), None, "cuSPARSELt is version 0, and 602 is needed on cuda"),
    ],
)
def test_what_a_device_lacks(capability, version, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    assert fp8.missing(CUDA) == reason
    assert fp8.missing(CPU) == "cpu is no CUDA device"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert fp8.missing(CUDA) == "this torch has no cuSPARSELt"


def test_algorithms_are_searched_as_the_library_wants(monkeypatch):
    """Inputs of a column-major layout, multiples of 16 tokens, and a weight of which two of four are zero."""
    seen = []

    def search(compressed, x, *, transpose_result, out_dtype):
        assert (compressed.dtype, x.dtype, out_dtype, transpose_result) == (fp8.E4M3, fp8.E4M3, BF16, True)
        assert not x.is_contiguous()
        assert x.shape[1] % 16 == 0
        assert int((compressed.float().view(-1, 4) != 0).sum(1).max()) <= 2
        seen.append(x.shape[1])
        return len(seen)

    monkeypatch.setattr(torch, "_cslt_compress", lambda codes: codes)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    fp8.algorithms.cache_clear()
    found = fp8.algorithms((32, 64), CPU)
    assert found == tuple((n, i + 1) for i, n in enumerate(cusparselt.SEARCHED_TOKENS))
    assert fp8.algorithms((32, 64), CPU) == found
    assert seen == list(cusparselt.SEARCHED_TOKENS)
    fp8.algorithms.cache_clear()


# Whole models


@pytest.fixture(scope="module")
def artifact(calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    source = tiny.build(folder / "source", "llama", dtype=BF16)
    recipe = mspc.Recipe(
        pattern="2:4", solver="mask", criterion="magnitude", allocator="uniform", sensitivity="gram",
        calibration=str(calibration), num_sequences=2, sequence_length=32,
    )  # fmt: skip
    return mspc.compress(source, recipe, out=folder / "artifact", reporter=Silent())


class Rounded(nn.Module):
    """A dense layer in float64 that rounds its weight and its inputs with the oracle."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nearest(layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return (nearest(x.flatten(0, -2)) @ self.weight.T).view(*x.shape[:-1], -1).float()


def test_logits_of_a_model_are_those_of_rounded_layers(artifact, tmp_path):
    model, ids = mspc.load(artifact.path, device="cpu"), tiny.ids(2)
    dense = tiny.reference(artifact.export("dense", tmp_path / "dense", verified=False, reporter=Silent()))
    with torch.no_grad():
        unrounded = model(ids).logits
        for name, layer in layers_of(model).items():
            layer.prefill_by("fp8")
            if not fp8.fits(layer.matrix):
                continue
            owner, _, leaf = name.rpartition(".")
            setattr(dense.get_submodule(owner), leaf, Rounded(dense.get_submodule(name)))
        rounded, expected = model(ids).logits, dense(ids).logits
        few_tokens = model(ids[:1, : fp8.FEW_TOKENS]).logits
    # What is nearly in the middle of two numbers may go either way, after sums in float32.
    assert float((rounded - expected).norm() / expected.norm()) < 0.001
    assert 0.01 < float((rounded - unrounded).norm() / unrounded.norm()) < 0.2
    torch.testing.assert_close(few_tokens, unrounded[:1, : fp8.FEW_TOKENS])


def test_what_it_costs_the_bundled_model(tmp_path):
    """Oracle: the same 2:4 model without it. LOG.md has 0.0025 nats of KL and 0.0030 of cross entropy, of 25,600 tokens
    and weights from the default of `mspc compress`."""
    source = Path(__file__).parents[1] / "examples" / "tiny_llama"
    recipe = mspc.Recipe(
        pattern="2:4", solver="obs", allocator="uniform", sensitivity="gram", num_sequences=8, sequence_length=128
    )
    path = mspc.compress(source, recipe, out=tmp_path / "artifact", reporter=Silent()).path
    ids = windows_of_test_text(load_tokenizer(source), "builtin", 256, 8).ids
    model = mspc.load(path, device="cpu")
    found = []
    for asked in (False, True):
        if asked:
            for layer in layers_of(model).values():
                layer.prefill_by("fp8")
        with torch.no_grad():
            found.append(model(ids).logits.log_softmax(-1))
    exact, rounded = found
    divergence = (exact.exp() * (exact - rounded)).sum(-1).mean()
    entropies = [-p[:, :-1].gather(-1, ids[:, 1:, None]).mean() for p in found]
    assert 0.001 < float(divergence) < 0.005
    assert 0 < abs(float(entropies[1] - entropies[0])) < 0.01


def test_loading_says_what_is_missing(artifact, calibration, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="Unknown prefill 'fp9': did you mean 'fp8'?"):
        mspc.load(artifact.path, prefill="fp9")
    with pytest.raises(InputError, match="'fp8' needs a CUDA device .* and cpu is no CUDA device;"):
        mspc.load(artifact.path, device="cpu", prefill="fp8")
    monkeypatch.setattr(fp8, "missing", lambda device: None)
    with pytest.raises(InputError, match="'cusparselt' needs a CUDA device .* and cpu is no CUDA device;"):
        mspc.load(artifact.path, device="cpu", prefill="cusparselt")
    with pytest.raises(InputError, match="prefill='fp8' is for matrices of 2:4,.* in float32 has none; leave it"):
        mspc.load(artifact.path, device="cpu", prefill="fp8")


def test_loading_rounds_what_fits(artifact, monkeypatch):
    """Prepared on a CPU as on a GPU. k and v have 16 rows, which do not fit."""
    monkeypatch.setattr(fp8, "missing", lambda device: None)
    monkeypatch.setattr(fp8, "algorithms", lambda shape, device: ((4096, 0),))
    monkeypatch.setattr(torch, "_cslt_compress", lambda codes: codes)
    prepare = lambda model, dtype: [layer.prepare(dtype) for layer in layers_of(model).values()]  # noqa: E731
    monkeypatch.setattr("mspc.runtime.loading.prepare", prepare)
    load = partial(mspc.load, artifact.path, device="cpu", dtype=BF16)
    model, unasked = load(prefill="fp8"), load()
    rounding = {name.rpartition(".")[2] for name, layer in layers_of(model).items() if "fp8" in layer.arranged()}
    assert rounding == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("fp8" in layer.arranged() for layer in layers_of(unasked).values())
    ids = tiny.ids(2)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, unasked(ids).logits)
        assert torch.equal(model(ids[:1]).logits, unasked(ids[:1]).logits)  # 32 tokens


def layers_of(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
