"""A compressed model that is trained towards the dense one: one gradient, or one validation, of some sequences.

Backward, each block is run again from its input, so that the activations of one block are in memory. Each sequence is a
piece of work for a thread, and the gradients of a block are summed in the order of the sequences.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import (
    Batch,
    Logits,
    embedded,
    handed_through,
    logits_bytes,
    pass_bytes,
    run_block,
)
from mspc.passes.distillation import POSITIONS, added, head_gradients
from mspc.passes.perplexity import divergence
from mspc.threads import run

Gradients = dict[str, Tensor]
"""By the name of the parameter in the model."""


class Student:
    """A model that is whole in memory, and the head of the dense one. `trained` names the parameters with gradients."""

    def __init__(self, model: StreamedModel, dense: Logits, trained: Sequence[str]) -> None:
        self.model, self.dense, self.device = model, dense, model.device
        inside = model.blocks_name + "."
        self.of_block: list[dict[str, nn.Parameter]] = [{} for _ in model.blocks]
        self.outer: dict[str, nn.Parameter] = {}
        for name in trained:
            parameter = model.model.get_parameter(name).requires_grad_()
            if name.startswith(inside):
                self.of_block[int(name.removeprefix(inside).partition(".")[0])][name] = parameter
            else:
                self.outer[name] = parameter
        self.half = has_fast_bfloat16(self.device)
        """True if products have bfloat16 inputs while gradients are computed."""

    def gradients(self, ids: Sequence[Tensor], wanted: Sequence[Tensor]) -> Gradients:
        """The gradients of the mean divergence over sequences (T,). `wanted` (T, D) are the dense model's outputs."""
        batches = embedded(self.model, [one[None] for one in ids])
        inputs: list[list[Tensor]] = []
        with torch.no_grad():
            for index in range(len(self.of_block)):
                inputs.append([batch.hidden for batch in batches])
                self.advance(batches, index, half=self.half)
        towards, found = self.through_head(batches, wanted)
        for index in reversed(range(len(self.of_block))):
            towards, of_block = self.through_block(batches, inputs.pop(), index, towards)
            found |= of_block
        return found

    def advance(self, batches: Sequence[Batch], index: int, *, half: bool) -> None:
        """Pass batches through a block, without changing the tensors that they hold."""

        def pass_on(batch: Batch) -> Tensor:
            with self.autocast(half):
                return run_block(self.model, self.model.blocks[index], batch, index)

        passed = run(pass_on, batches, pass_bytes(self.model, self.model.blocks[index], batches))
        for batch, hidden in zip(batches, passed, strict=True):
            batch.hidden = hidden.to(batch.hidden.dtype)

    def through_head(self, batches: Sequence[Batch], wanted: Sequence[Tensor]) -> tuple[list[Tensor], Gradients]:
        """The gradients (T, D) of the last block's outputs, and those of parameters after the blocks."""
        parameters, count = list(self.outer.values()), sum(batch.ids.numel() for batch in batches)
        with handed_through(self.model) as logits:

            def of_sequence(number: int) -> tuple[Tensor, list[Tensor | None]]:
                batch = batches[number]
                with self.autocast(self.half):
                    heads = [partial(log_probabilities, one, batch) for one in (self.dense, logits)]
                    given = wanted[number].to(batch.hidden)
                    return head_gradients(heads[0], heads[1], given, batch.hidden[0], parameters, count)

            found = list(run(of_sequence, range(len(batches)), self.head_bytes(batches)))
        return [at_states for at_states, _ in found], _sums(self.outer, [of_outer for _, of_outer in found])

    def through_block(
        self, batches: Sequence[Batch], inputs: Sequence[Tensor], index: int, towards: Sequence[Tensor]
    ) -> tuple[list[Tensor], Gradients]:
        """The gradients of the inputs of a block, and of its parameters, by those of its outputs."""
        block, parameters = self.model.blocks[index], self.of_block[index]

        def of_sequence(number: int) -> tuple[Tensor, list[Tensor | None]]:
            batch, hidden = batches[number], inputs[number].detach().requires_grad_()
            with torch.enable_grad(), self.autocast(self.half):
                output = run_block(self.model, block, Batch(batch.ids, hidden, batch.calls), index)
            found = torch.autograd.grad(
                output, [hidden, *parameters.values()], towards[number].view_as(output).to(output), allow_unused=True
            )
            return found[0], list(found[1:])

        memory = 4 * pass_bytes(self.model, block, batches) + sum(p.nbytes for p in parameters.values())
        found = list(run(of_sequence, range(len(batches)), memory))
        return [at_input for at_input, _ in found], _sums(parameters, [of_block for _, of_block in found])

    def divergence(self, ids: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """The mean divergence of sequences (T,) in nats, in the precision of the model."""
        batches = embedded(self.model, [one[None] for one in ids])
        with torch.no_grad():
            for index in range(len(self.of_block)):
                self.advance(batches, index, half=False)
            with handed_through(self.model) as logits:

                def of_sequence(number: int) -> float:
                    batch = batches[number]
                    given = wanted[number].to(batch.hidden).split(POSITIONS)
                    return sum(
                        divergence(log_probabilities(self.dense, batch, one), log_probabilities(logits, batch, other))
                        for one, other in zip(given, batch.hidden[0].split(POSITIONS), strict=True)
                    )

                total = sum(run(of_sequence, range(len(batches)), self.head_bytes(batches)))
        return total / sum(batch.ids.numel() for batch in batches)

    def head_bytes(self, batches: Sequence[Batch]) -> int:
        return 2 * logits_bytes(self.model, batches[0].ids[:, :POSITIONS])

    def autocast(self, half: bool) -> torch.autocast:
        # Its cache would outlive a step within an outer autocast, and hold the weights of an earlier step.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def log_probabilities(logits: Logits, batch: Batch, hidden: Tensor) -> Tensor:
    """Log-probabilities (N, V) float32 of outputs (N, D) of the last block."""
    ids = batch.ids[:, : len(hidden)]  # their embeddings are not used
    return torch.log_softmax(logits(Batch(ids, hidden[None], batch.calls))[0].float(), -1)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell if products of bfloat16 are faster than those of float32: on GPUs, and CPUs with instructions for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _sums(parameters: Mapping[str, nn.Parameter], found: Sequence[Sequence[Tensor | None]]) -> Gradients:
    """The sums of gradients over sequences, without parameters that none has used."""
    sums: list[Tensor | None] = [None] * len(parameters)
    for of_sequence in found:
        sums = [added(a, b) for a, b in zip(sums, of_sequence, strict=True)]
    return {name: total for name, total in zip(parameters, sums, strict=True) if total is not None}
