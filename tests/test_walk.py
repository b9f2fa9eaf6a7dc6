"""The walk against hooks on the whole transformers model: every matrix once, with the Gram of exactly its input."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from mspc import threads
from mspc.errors import ActivationError, InputError
from mspc.model.open import open_model
from mspc.model.streamed import StreamedModel
from mspc.passes import perplexity
from mspc.passes import walk as walking
from mspc.passes.blocks import batches_of, own_batches, pass_bytes
from mspc.passes.together import Visit
from mspc.passes.walk import DenseWalk, install, matrix_of, walk
from mspc.types import Matrix

CPU = torch.device("cpu")


def opened(folder: Path, dtype: str = "float32") -> StreamedModel:
    return open_model(folder, device=CPU, dtype=dtype)


def names(matrices: Iterable[Iterable[Matrix]]) -> list[str]:
    return [matrix.name for of_block in matrices for matrix in of_block]


def assert_gram(visit: Visit, inputs: Tensor) -> None:
    """Oracle: the Gram in float64."""
    expected = inputs.double().T @ inputs.double()
    assert visit.stats.num_tokens == len(inputs)
    error = (visit.stats.gram.double() - expected).abs().max()
    assert float(error) < 1e-5 * float(expected.diagonal().max()), visit.matrix.name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_grams_of_the_dense_model(family, folder_of):
    """Oracle: forward hooks on the transformers model."""
    model, ids = opened(folder_of(family)), tiny.ids(5)
    matrices = model.matrices(())
    expected = tiny.inputs_of(tiny.reference(folder_of(family)), ids, names(matrices))
    visits = list(walk(model, batches_of(model, ids, batch_size=2), matrices))
    assert [visit.matrix.name for visit in visits] == list(expected)
    for visit in visits:
        assert_gram(visit, expected[visit.matrix.name])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_matrices_with_the_same_input_share_one_gram(family, folder_of):
    """Oracle: the table of each architecture's layers in `tiny.GROUPS`."""
    model = opened(folder_of(family))
    matrices = model.matrices(())
    groups: dict[int, list[str]] = {}
    visits = list(walk(model, batches_of(model, tiny.ids(2)), matrices))
    for visit in visits:
        prefix = f"{tiny.blocks_name(family)}.{visit.block}."
        groups.setdefault(id(visit.stats), []).append(visit.matrix.name.removeprefix(prefix))
    assert list(map(tuple, groups.values())) == list(tiny.GROUPS[family]) * len(matrices)


@pytest.mark.parametrize("memory", [2**40, 0])
def test_a_dense_walk_is_the_same_each_time_and_keeps_statistics_if_memory_allows(memory, llama):
    """Oracle: `walk`. A second pass through the model would make new statistics."""
    model, ids = opened(llama), tiny.ids(3)
    matrices, seen = model.matrices(()), []
    expected = [
        (v.matrix, v.weight.clone(), v.stats.gram, v.block, v.is_last_of_block)
        for v in walk(model, own_batches(model, ids), matrices)
    ]
    dense = DenseWalk(model, ids, matrices, memory)
    for _ in range(2):
        for visit, (matrix, weight, gram, block, is_last) in zip(dense, expected, strict=True):
            assert (visit.matrix, visit.block, visit.is_last_of_block) == (matrix, block, is_last)
            assert torch.equal(visit.weight, weight)
            assert torch.equal(visit.stats.gram, gram)
            seen.append(visit.stats)
    assert all((first is second) == bool(memory) for first, second in zip(seen, seen[len(expected) :], strict=False))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "gpt_neox"])
def test_later_grams_see_what_was_installed_before(family, folder_of):
    """Oracle: hooks on a transformers model in which the matrices before were replaced."""
    model, ids = opened(folder_of(family)), tiny.ids(3)
    whole = tiny.reference(folder_of(family))
    generator = torch.Generator().manual_seed(0)
    for visit in walk(model, batches_of(model, ids, batch_size=2), model.matrices(())):
        inputs = tiny.inputs_of(whole, ids, [visit.matrix.name])[visit.matrix.name]
        assert_gram(visit, inputs)
        replacement = visit.weight * (torch.rand(visit.weight.shape, generator=generator) < 0.5)
        install(visit.weight, replacement)
        module = whole.get_submodule(visit.matrix.name)
        module.weight.copy_(replacement.T if isinstance(module, Conv1D) else replacement)


def test_weights_that_change_at_the_end_of_a_block_are_those_that_its_batches_pass(llama):
    """Oracle: the same changes made by known blocks, which are installed before anything passes."""
    model, ids = opened(llama), tiny.ids(3)
    matrices = model.matrices(())
    solved = {matrix.name: torch.full(matrix.shape, 0.01) for of_block in matrices for matrix in of_block}
    streams = [batches_of(model, ids, batch_size=2) for _ in range(4)]
    ended = []

    def finish(index: int, block: nn.Module, dense_block: nn.Module) -> None:
        ended.append(index)
        assert not any(module._forward_pre_hooks for module in block.modules())
        for matrix in matrices[index]:
            install(matrix_of(model, block, index, matrix), solved[matrix.name])
            assert not torch.equal(matrix_of(model, dense_block, index, matrix), solved[matrix.name])

    blocks = [visit.block for visit in walk(model, streams[0], matrices, dense=streams[1], finish=finish)]
    assert blocks == [0] * 7 + [1] * 7
    assert ended == [0, 1]
    list(walk(model, streams[2], matrices, lambda index: solved, dense=streams[3]))
    for changed, expected in ((streams[0], streams[2]), (streams[1], streams[3])):
        assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(changed, expected, strict=True))


def assert_untouched(model: StreamedModel) -> None:
    assert tiny.parts_in_memory(model) == []
    for name, module in model.model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert "forward" not in vars(module), name


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_an_abandoned_walk_leaves_no_trace(steps, llama):
    """No hooks, no replaced forward, no weights; and a new walk sees the model as it was."""
    model, ids = opened(llama), tiny.ids(2)
    matrices = model.matrices(())
    expected = [visit.stats.gram for visit in walk(model, batches_of(model, ids), matrices)]
    visits = walk(model, batches_of(model, ids), matrices)
    for _ in range(steps):
        install(next(visits).weight, torch.zeros(()))
    visits.close()
    assert_untouched(model)
    again = [visit.stats.gram for visit in walk(model, batches_of(model, ids), matrices)]
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_one_block_is_in_memory_at_a_time(family, folder_of):
    """At a visit its block and nothing else has weights; afterwards nothing has. Tied weights stay tied."""
    model = opened(folder_of(family))
    tied = family != "llama"
    for visit in walk(model, batches_of(model, tiny.ids(2)), model.matrices(())):
        assert tiny.parts_in_memory(model) == [model.block_name(visit.block)]
    assert_untouched(model)
    with model.loaded_outer() as outer:
        assert tiny.parts_in_memory(model) == [""]
        embedding, head = outer.get_input_embeddings().weight, outer.get_output_embeddings().weight
        assert (embedding is head) == tied
    assert_untouched(model)
    assert (model.model.get_input_embeddings().weight is model.model.get_output_embeddings().weight) == tied


def test_perplexity_holds_one_block_at_a_time(llama):
    model = opened(llama)
    results = perplexity.measure(model, tiny.ids(4))
    for _ in model.blocks:
        assert next(results) is None
        assert_untouched(model)
    assert next(results).windows == 4
    results.close()
    assert_untouched(model)


def test_spilled_activations_give_the_same_and_leave_no_file(llama, tmp_path):
    """Oracle: activations in memory. The files vanish with the tensors, and are gone from the folder at once."""
    model, ids, folder = opened(llama), tiny.ids(4), tmp_path / "spill"
    matrices = model.matrices(())
    expected = [visit.stats.gram for visit in walk(model, batches_of(model, ids, batch_size=2), matrices)]
    batches = batches_of(model, ids, folder, batch_size=2)
    assert folder.is_dir()
    for visit, gram in zip(walk(model, batches, matrices), expected, strict=True):
        assert torch.equal(visit.stats.gram, gram)
        assert list(folder.iterdir()) == []
    addresses = Path("/proc/self/maps")
    if addresses.exists():
        assert addresses.read_text().count(str(folder)) > 0  # they were on disk
        del batches
        assert str(folder) not in addresses.read_text()


@pytest.mark.parametrize("memory", [0, 3 * 4 * 48 * 32 * 3])
def test_passes_that_are_run_again_give_the_same(memory, llama):
    """Oracle: passes that are all suspended. 48 is the widest input; the second number has room for one or two."""
    model, ids = opened(llama), tiny.ids(5)
    matrices, results = model.matrices(()), []
    for limit in (None, memory):
        batches, dense = batches_of(model, ids, batch_size=1), batches_of(model, ids, batch_size=1)
        stats = []
        for visit in walk(model, batches, matrices, dense=dense, memory=limit):
            stats.append(visit.stats)
            install(visit.weight, visit.weight * 0.9)
        results.append((stats, batches))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one.gram, other.gram)
        assert torch.equal(one.input_shift, other.input_shift)
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("eager", [False, True])
def test_memory_of_a_pass_by_hand(eager, llama):
    """Six activations of the widest matrix, 64; with eager attention three times the scores of four heads."""
    model = open_model(llama, device=CPU, eager=eager)
    with model.loaded(0) as block:
        found = pass_bytes(model, block, batches_of(model, tiny.ids(5), batch_size=2))
    assert found == 4 * (6 * 64 * 2 * 32 + (3 * 4 * 2 * 32 * 32 if eager else 0))


@pytest.mark.parametrize("passes", [0, 3, 20])
def test_passes_that_run_and_that_wait_share_half_of_the_free_memory(passes, llama, monkeypatch):
    """There is memory for 20 passes at most; a waiting one has three activations of the widest input, and scores."""
    model, found = open_model(llama, device=CPU, eager=True), []
    running, waiting = 4 * (6 * 64 * 32 + 3 * 4 * 32 * 32), 4 * (3 * 64 * 32 + 4 * 32 * 32)
    for module in (walking, threads):
        monkeypatch.setattr(module, "free_memory", lambda _: 2 * passes * running)

    def visits(self, batches, dense, kept):
        found.append((self.at_once, kept))
        yield from ()

    monkeypatch.setattr(walking._Block, "visits", visits)
    with threads.using(8, CPU):
        assert list(walk(model, batches_of(model, tiny.ids(2), batch_size=1), model.matrices(()))) == []
    assert found == [found[0]] * 2
    at_once, kept = found[0]
    assert at_once == {0: 1, 3: 1, 20: 8}[passes]
    assert kept * waiting + (at_once if at_once > 1 else 0) * running <= passes * running


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_input_shift_is_the_difference_of_dense_and_actual_inputs(family, folder_of):
    """Oracle: hooks on two transformers models, one of them compressed so far."""
    model, ids = opened(folder_of(family)), tiny.ids(3)
    dense, actual = tiny.reference(folder_of(family)), tiny.reference(folder_of(family))
    streams = [batches_of(model, ids, batch_size=2) for _ in range(2)]
    for visit in walk(model, streams[0], model.matrices(()), dense=streams[1]):
        name = visit.matrix.name
        was, now = (tiny.inputs_of(whole, ids, [name])[name].double() for whole in (dense, actual))
        expected = (was - now).T @ now
        error = (visit.stats.input_shift.double() - expected).abs().max()
        assert float(error) < 1e-5 * float((now.T @ now).diagonal().max()), name
        install(visit.weight, visit.weight * 0.8)
        actual.get_submodule(name).weight.mul_(0.8)
    assert not torch.equal(streams[0][0].hidden, streams[1][0].hidden)


def overflowing(folder: Path, parameter: str) -> StreamedModel:
    """A float16 model that leaves the range of float16 (65504) at the output of one matrix of its second block."""
    model = tiny.make("llama")
    with torch.no_grad():
        model.get_parameter(parameter).mul_(1e4)
    return opened(tiny.save(model.half(), folder), "float16")


def test_overflow_before_a_matrix_names_the_matrix(tmp_path):
    model = overflowing(tmp_path, "model.layers.1.mlp.up_proj.weight")
    message = (
        r"model\.layers\.1\.mlp\.down_proj: its inputs contain NaN or infinity .Gram of 64 tokens.*--dtype float32"
    )
    with pytest.raises(ActivationError, match=message):
        list(walk(model, batches_of(model, tiny.ids(2)), model.matrices(())))
    assert_untouched(model)


def test_overflow_after_a_block_names_the_block(tmp_path):
    model = overflowing(tmp_path, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(ActivationError, match=r"model\.layers\.1: its output contains NaN .* torch\.float16"):
        list(walk(model, batches_of(model, tiny.ids(2)), model.matrices(())))
    with pytest.raises(ActivationError, match=r"model\.layers\.1: its output"):
        list(perplexity.measure(model, tiny.ids(2)))
    assert_untouched(model)


def test_matrices_that_are_never_called_are_an_error(llama, monkeypatch):
    """A Llama whose MLPs leave out their gate."""
    model = opened(llama)
    batches = batches_of(model, tiny.ids(2))
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.mlp\.gate_proj: never called .* --skip 'mlp\\\.gate_proj\$'"
    ):
        list(walk(model, batches, model.matrices(())))
    assert_untouched(model)
    assert len(list(walk(model, batches_of(model, tiny.ids(2)), model.matrices(("gate_proj",))))) == 12


def test_a_matrix_that_is_called_twice_is_an_error(llama, monkeypatch):
    model = opened(llama)
    batches = batches_of(model, tiny.ids(2))
    twice = lambda self, x: self.down_proj(self.up_proj(x) * self.gate_proj(x) * self.gate_proj(x + 1))  # noqa: E731
    monkeypatch.setattr(LlamaMLP, "forward", twice)
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.mlp\.gate_proj: used more than once.*--skip 'mlp\\\.gate_proj\$'"
    ):
        list(walk(model, batches, model.matrices(())))


def test_a_weight_that_blocks_share_is_an_error(llama):
    model = opened(llama)
    model.blocks[1].mlp.up_proj = model.blocks[0].mlp.up_proj
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj and model\.layers\.0\.mlp\.up_proj are one weight"):
        model.matrices(())
    assert len([matrix for of_block in model.matrices(("up_proj",)) for matrix in of_block]) == 12
