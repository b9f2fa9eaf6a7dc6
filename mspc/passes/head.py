"""The input of the output head: hidden states after the last norm, as a Gram matrix."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import Batch, without_blocks
from mspc.passes.route import EarlyExit
from mspc.types import GramStats


def gram_of_head(model: StreamedModel, batches: Sequence[Batch]) -> GramStats:
    """The Gram (I, I) of what the head of a model multiplies, for batches that have passed the last block."""
    total: list[Tensor] = []

    def add(head: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        total[:] = [x.T @ x if not total else total[0].addmm_(x.T, x)]
        raise EarlyExit  # the logits are not needed

    with torch.no_grad(), without_blocks(model) as logits_of:
        head = model.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(add)
        try:
            for batch in batches:
                with suppress(EarlyExit):
                    logits_of(batch)
        finally:
            handle.remove()
    return GramStats(total[0], sum(batch.ids.numel() for batch in batches))
