"""Products in C++ on a CPU: every format, on every instruction set that the machine has, against float64.

Oracle of weights: `layout.unpack`, which the library does not go through. Each input is off by half a step of its chunk
at most, which bounds the error of a product exactly; sums in float32 add 2^-20 of the sum of sizes.
"""

import copy
import os
import shutil
import signal
from itertools import product

import pytest
import tiny
import torch
from kernel_cases import BF16, DENSE, FP16, HALF, stored
from torch import Tensor, nn

import mspc
from mspc.errors import InputError, MspcError
from mspc.formats import layout
from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu import building, kernel, library
from mspc.runtime.linear import SparseLinear, prepare
from mspc.types import NM, Grid, Unstructured

FP32 = torch.float32
PATTERNS = [DENSE, HALF, Unstructured(0.9), Unstructured(1.0), NM(2, 4), NM(8, 16), NM(5, 16), NM(3, 7)]
GRIDS = [Grid(*grid) for grid in product((8, 4, 3, 2), (32, 64, 128, None), (True, False))]
GRIDS += [Grid(4, 16, False), Grid(3, 24), Grid(4, 6)]  # groups that are no whole units; of 2:4, no whole fours


def all_matrices() -> list[StoredMatrix]:
    """Rows and inputs with tails, and without. Each pattern has half of the grids, its neighbour the others."""
    grids = [(None, dtype) for dtype in (BF16, FP16, FP32)] + [(grid, BF16) for grid in GRIDS]
    found = []
    for number, (pattern, (grid, dtype)) in enumerate(product(PATTERNS, grids)):
        if grid is not None and (number + number // len(grids)) % 2:
            continue
        of = pattern.of if isinstance(pattern, NM) else 1
        group = 1 if grid is None or grid.group_size is None else grid.group_size
        unit = torch.tensor([of, group]).unique().prod().item() if of % group and group % of else max(of, group)
        columns = unit * max(1, (75, 384, 200)[number % 3] // unit)
        found.append(StoredMatrix(((37, 16, 5)[number % 3], columns), pattern, grid, dtype))
    return found


MATRICES = all_matrices()


@pytest.fixture(params=library.ISAS)
def isa(request, monkeypatch) -> str:
    found = library.available()
    if not found:
        pytest.skip("there is no C++ compiler")
    if request.param not in found:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("MSPC_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def built() -> None:
    if not library.available():
        pytest.skip("there is no C++ compiler")


def repacked_both_ways(tensors: dict[str, Tensor], matrix: StoredMatrix) -> list[dict[str, Tensor]]:
    """Dense and behind a bitmap, whichever is faster, if the matrix can be either."""
    ways = [True, False] if kernel.has_zeros(matrix) else [None]
    found = []
    for is_dense in ways:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "is_faster_dense", lambda *_, given=is_dense: given)
            found.append(kernel.repack(tensors, matrix))
        assert is_dense is None or ("starts" in found[-1]) != is_dense
    return found


def weight_of(tensors: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    dtype = matrix.dtype if matrix.grid is None else FP32
    return layout.unpack(tensors, matrix.shape, matrix.target, dtype).weight


def inputs(num_tokens: int, num_columns: int, dtype: torch.dtype = FP32) -> Tensor:
    """Random, with an outlier of 30 in every token; behind them in memory are NaN, which nothing may read."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, num_columns, generator=generator)
    x[:, num_columns // 3] *= 30
    memory = torch.full((x.numel() + 1024,), torch.nan, dtype=dtype)
    memory[: x.numel()] = x.flatten()
    return memory[: x.numel()].view(x.shape)


def bound(x: Tensor, weight: Tensor, matrix: StoredMatrix, planes: int) -> Tensor:
    """The largest possible error of x Wᵀ."""
    sizes, found = x.double().abs() @ weight.double().abs().T, 0
    if matrix.grid is not None:
        for of_x, of_w in zip(chunks(x, matrix), chunks(weight, matrix), strict=True):
            step = of_x.double().abs().amax(1, keepdim=True) / (32639 if planes == 2 else 127)
            found = found + step / 2 * of_w.double().abs().sum(1)
    return found + 2.0**-20 * sizes + 1e-30


def chunks(tensor: Tensor, matrix: StoredMatrix) -> list[Tensor]:
    return [chunk for group in tensor.split(kernel.group_of(matrix), 1) for chunk in group.split(128, 1)]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_unrepacked_is_what_was_stored(matrix, built):
    """Kept weights that are zero, too: their codes are random, so some are the zero point."""
    tensors = stored(matrix)
    for repacked in repacked_both_ways(tensors, matrix):
        found = kernel.unrepack(repacked, matrix)
        assert found.keys() == tensors.keys()
        assert all(found[part].dtype == tensors[part].dtype for part in tensors)
        assert all(torch.equal(found[part], tensors[part]) for part in tensors)
        out = torch.full(matrix.shape, torch.nan)
        kernel.expand(repacked, matrix, out)
        assert torch.equal(out, weight_of(tensors, matrix).float())


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_products_are_those_of_float64(matrix, isa):
    tensors = stored(matrix)
    ways, weight = repacked_both_ways(tensors, matrix), weight_of(tensors, matrix)
    for num_tokens, planes in [(1, 2), (2, 2), (3, 2), (4, 2), (8, 2), (1, 1), (3, 1), (4, 1)]:
        x = inputs(num_tokens, matrix.shape[1])
        expected, limit = x.double() @ weight.double().T, bound(x, weight, matrix, planes)
        for repacked in ways:
            assert bool(((kernel.product(x, repacked, matrix, planes).double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(3, 64), Grid(3, 64, False), Grid(2, None, False)], ids=repr)
def test_dense_codes_and_bitmaps_give_the_same_bits(grid, isa):
    """Integers are the same, and so are the sums of floats."""
    matrix = StoredMatrix((40, 384), Unstructured(0.7), grid, BF16)
    dense, bitmap = repacked_both_ways(stored(matrix), matrix)
    for num_tokens in (1, 3):
        x = inputs(num_tokens, 384)
        assert torch.equal(kernel.product(x, dense, matrix), kernel.product(x, bitmap, matrix))


@pytest.mark.parametrize("grid", [None, Grid(8), Grid(4), Grid(3), Grid(2)], ids=repr)
@pytest.mark.parametrize("sparsity", [1 / 32, 0.4, 0.75, 0.95])
def test_the_faster_layout_is_chosen(grid, sparsity, isa):
    """Oracle: the rule of docs/cpu-kernels.md, by the share of bytes in random masks: 1 - s^2 for two codes a byte."""
    matrix = StoredMatrix((64, 1024), Unstructured(sparsity), grid, BF16)
    share = 1 - sparsity if grid == Grid(8) else 1 - sparsity**2
    limit = 0.0 if grid is None or isa != "avx512" else {8: 0.7, 4: 0.7, 3: 0.5, 2: 0.0}[grid.bits]
    assert ("starts" in kernel.repack(stored(matrix), matrix)) == (grid is None or share < limit)


def test_gaps_give_back_their_places():
    """Oracle: by hand, and round trips of random places."""
    assert kernel.gaps_of(torch.tensor([0, 2, 257, 767]), 768).tolist() == [0, 1, 254, 255, 254, 0]
    assert kernel.gaps_of(torch.tensor([255]), 1000).tolist() == [255, 0, 255, 255, 234]
    for seed, share in enumerate((0.0, 0.001, 0.1, 1.0)):
        drawn = torch.rand(9000, generator=torch.Generator().manual_seed(seed))
        places = (drawn < share).nonzero()[:, 0]
        assert kernel.places_of(kernel.gaps_of(places, 9000)).tolist() == [*places.tolist(), 9000]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("matrix", MATRICES[::9], ids=str)
def test_a_layer_multiplies_any_number_of_tokens(matrix, dtype, isa):
    """Above some number of tokens inputs are not rounded, and the weight is that of the checkpoint's dtype."""
    tensors = stored(matrix)
    layer = SparseLinear.of(tensors, matrix, nn.Parameter(torch.arange(matrix.shape[0]).to(dtype)))
    prepare(layer, dtype, on_cpu=True)
    assert layer.kernel is kernel
    assert torch.equal(layer.weight, weight_of(tensors, matrix).to(matrix.dtype))
    eps = float(torch.finfo(dtype).eps)
    few = kernel.fused_up_to()
    for num_tokens in (1, few, few + 1, 16, 17):
        x = inputs(num_tokens, matrix.shape[1], dtype)
        weight = weight_of(tensors, matrix) if num_tokens <= few else layer.weight
        expected = x.double() @ weight.double().T
        limit = bound(x, weight, matrix, 2) + 2 * eps * (expected.abs() + layer.bias.double())
        limit = limit + (num_tokens > few) * eps * (x.double().abs() @ weight.double().abs().T)
        with torch.no_grad():
            assert bool(((layer(x).double() - expected - layer.bias.double()).abs() <= limit).all())


@pytest.mark.parametrize("grid", [Grid(8, 128), Grid(4, 128), Grid(3, 128), Grid(2, None, False)], ids=repr)
@pytest.mark.parametrize("pattern", [DENSE, HALF, NM(2, 4)], ids=repr)
def test_inputs_of_16_bits_are_exact_to_one_in_ten_thousand(pattern, grid, isa):
    """With an outlier of 30 in every token; inputs of 8 bits are asked for, and are a hundred times worse."""
    matrix = StoredMatrix((256, 1024), pattern, grid, BF16)
    tensors = stored(matrix)
    repacked, x = kernel.repack(tensors, matrix), inputs(4, 1024)
    expected = x.double() @ weight_of(tensors, matrix).double().T
    errors = [float((kernel.product(x, repacked, matrix, planes) - expected).norm()) for planes in (2, 1)]
    assert errors[0] < 1e-4 * expected.norm()
    assert errors[0] * 20 < errors[1] < 5e-2 * expected.norm()


@pytest.mark.parametrize("matrix", [StoredMatrix((723, 1024), p, Grid(4), BF16) for p in (DENSE, HALF)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(matrix, isa):
    repacked, x = kernel.repack(stored(matrix), matrix), inputs(3, 1024)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            found += [kernel.product(x, repacked, matrix) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    """Those of torch's OpenMP do not outlive a fork, and waiting for them would never end."""
    matrix = StoredMatrix((723, 1024), DENSE, Grid(4), BF16)
    repacked, x = kernel.repack(stored(matrix), matrix), inputs(3, 1024)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = kernel.product(x, repacked, matrix)
        if not (child := os.fork()):
            signal.alarm(20)
            os._exit(not torch.equal(kernel.product(x, repacked, matrix), expected))
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_inputs_that_are_not_finite_give_nan_in_their_token_only(isa):
    matrix = StoredMatrix((16, 256), DENSE, Grid(4, 128), BF16)
    repacked, x = kernel.repack(stored(matrix), matrix), inputs(3, 256)
    x[1, 7] = torch.inf
    y = kernel.product(x, repacked, matrix)
    assert bool(y[1].isnan().all())
    x[1] = 0
    assert torch.equal(kernel.product(x, repacked, matrix)[[0, 2]], y[[0, 2]])
    assert not bool(kernel.product(x, repacked, matrix)[1].any())


def spoil(tensor: Tensor, seed: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    choice = seed % 5
    if choice == 0:
        return None
    if choice == 1:
        return tensor.flatten()[:-1].clone()
    if choice == 2:
        return tensor.to(torch.int16)
    if choice == 3:
        return torch.stack([tensor, tensor], -1)[..., 0]  # not contiguous
    return tensor.roll(1, 0) if len(tensor) < 2 else tensor[torch.randperm(len(tensor) - 1, generator=generator)]


@pytest.mark.parametrize("matrix", [m for m in MATRICES if m.shape[0] == 37][::4], ids=str)
def test_tensors_that_do_not_fit_are_refused_before_the_call(matrix, built):
    repacked = kernel.repack(stored(matrix), matrix)
    for seed, part in product(range(5), repacked):
        other = spoil(repacked[part], seed)
        wrong = {name: tensor for name, tensor in (repacked | {part: other}).items() if tensor is not None}
        with pytest.raises(MspcError, match="do not fit"):
            kernel.product(inputs(1, matrix.shape[1]), wrong, matrix)
    if "starts" in repacked:
        for part, value in (("starts", 2**40), ("marks", 255)):
            wrong = repacked | {part: torch.full_like(repacked[part], value)}
            with pytest.raises(MspcError, match="do not fit"):
                kernel.product(inputs(1, matrix.shape[1]), wrong, matrix)
    for x in (inputs(1, matrix.shape[1] + 1), inputs(1, matrix.shape[1]).double()):
        with pytest.raises(MspcError, match="cannot take them"):
            kernel.product(x, repacked, matrix)


def test_a_layer_is_copied_cast_and_gives_gradients_to_its_inputs(built):
    """Oracle: the layer before it was prepared; the product without gradients, bit for bit."""
    matrix = StoredMatrix((20, 128), HALF, Grid(4, 64), BF16)
    plain, layer = (SparseLinear.of(stored(matrix), matrix) for _ in range(2))
    prepare(layer, FP32, on_cpu=True)
    x = inputs(2, 128).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, plain.weight.float().sum(0).expand_as(x))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert layer.to(BF16).prepared_for == BF16
        assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("recipe", [{"pattern": "2:4", "bits": 4}, {"sparsity": 0.6, "bits": 3}], ids=str)
def test_a_loaded_model_runs_in_it(recipe, built, artifact_of, tmp_path):
    """Oracle: the same model in plain torch, whose weights are rounded to the same dtype, float32."""
    artifact = artifact_of("llama", solver="mask", **recipe)
    model = mspc.load(artifact.path, "cpu")
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    assert layers
    assert all(layer.kernel is kernel for layer in layers)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("MSPC_CPU_ISA", "torch")
        plain = mspc.load(artifact.path, "cpu")
        assert not any(layer.prepared_for for layer in plain.modules() if isinstance(layer, SparseLinear))
        ids = tiny.ids(1)[:, :6]
        expected = plain(ids).logits
    with torch.no_grad():
        assert (model(ids).logits - expected).norm() < 1e-3 * expected.norm()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_inputs_of_8_bits_are_asked_for(built, artifact_of, isa):
    """Oracle: the products of each layer with one plane; for any number of tokens, and after casts and copies."""
    artifact = artifact_of("llama", solver="mask", pattern="2:4", bits=4)
    model = mspc.load(artifact.path, "cpu", inputs="int8")
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    assert all(layer.has_int8_inputs for layer in layers)
    for dtype, layer in ((FP32, layers[0]), (BF16, copy.deepcopy(layers[1]).to(BF16))):
        for num_tokens in (1, 4, 9, 33):
            x = inputs(num_tokens, layer.in_features, dtype)
            with torch.no_grad():
                assert torch.equal(layer(x), kernel.product(x, layer.repacked(), layer.matrix, 1))
    usual = mspc.load(artifact.path, "cpu")
    ids = tiny.ids(1)
    with torch.no_grad():
        error = (model(ids).logits - usual(ids).logits).norm() / usual(ids).logits.norm()
    assert 1e-4 < error < 0.1
    with pytest.raises(InputError, match="Unknown inputs 'int4'"):
        mspc.load(artifact.path, "cpu", inputs="int4")
    with pytest.raises(InputError, match="inputs='int8' is for matrices with codes, but .* in float32 has none"):
        mspc.load(artifact_of("llama", solver="mask", pattern="2:4", bits=16).path, "cpu", inputs="int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSPC_CPU_ISA", "torch")
        with pytest.raises(InputError, match="inputs='int8' is for products in C"):
            mspc.load(artifact.path, "cpu", inputs="int8")


def test_an_instruction_set_that_is_not_there_is_refused(built, monkeypatch):
    monkeypatch.setenv("MSPC_CPU_ISA", "avx1024")
    with pytest.raises(InputError, match="Unknown MSPC_CPU_ISA 'avx1024'"):
        library.isa()


def test_without_a_compiler_one_line_says_what_is_missing(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(building, "NAME", "nothing.so")
    library._loaded.cache_clear()
    try:
        matrix = StoredMatrix((16, 128), HALF, Grid(4), BF16)
        assert not kernel.supports(matrix, FP32)
        layer = SparseLinear.of(stored(matrix), matrix)
        prepare(layer, FP32, on_cpu=True)
        assert layer.prepared_for is None
        assert [record.message for record in caplog.records] == [
            "Compressed layers run in plain torch on this CPU, many times slower than in C++: there is no C++ "
            "compiler. Install g++ 11 or newer, or a wheel of mspc that holds libmspc_cpu.so."
        ]
    finally:
        library._loaded.cache_clear()
