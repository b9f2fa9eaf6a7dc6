"""Inputs that matrices share, found without weights, by a run on the meta device, where tensors have only shapes."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mspc.model.streamed import StreamedModel
from mspc.types import MatricesByBlock, Matrix

TOKENS = 8
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names of layers that share an input in models that cannot run on meta."""

Groups = list[list[Matrix]]
"""The matrices of a block in the order of execution; those of one list have one input, and so one Gram."""


def shared_inputs(model: StreamedModel, matrices: MatricesByBlock) -> list[Groups]:
    """The groups of every block of a model on meta. Where it cannot run there, names tell which inputs are the same."""
    seen: dict[Matrix, Tensor] = {}
    handles = []

    def keep(matrix: Matrix) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[matrix] = args[0]

        return hook

    # Experts do not run on meta: which tokens they have depends on values.
    for matrix in (matrix for of_block in matrices for matrix in of_block if matrix.index is None):
        module = model.model.get_submodule(matrix.parameter.rpartition(".")[0])
        handles.append(module.register_forward_pre_hook(keep(matrix)))
    try:
        with suppress(Exception), torch.no_grad():  # whatever needs the value of a tensor
            model.model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    places = {matrix: place for place, matrix in enumerate(seen)}
    found = []
    for of_block in matrices:
        ran = [matrix for matrix in of_block if matrix in seen]
        if len(ran) < len(of_block):
            found.append(by_name(of_block))
        else:
            found.append(_by_input(sorted(ran, key=places.__getitem__), seen))
    return found


def _by_input(ordered: list[Matrix], inputs: dict[Matrix, Tensor]) -> Groups:
    groups: Groups = []
    previous = None
    for matrix in ordered:
        tensor = inputs[matrix]
        place = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape[-1]
        if groups and place == previous:
            groups[-1].append(matrix)
        else:
            groups.append([matrix])
        previous = place
    return groups


def by_name(matrices: Sequence[Matrix]) -> Groups:
    """The groups of a block by the names of its layers."""
    groups: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        owner, _, name = matrix.name.rpartition(".")
        kind = next((kind for kind in TOGETHER if name in kind), name)
        groups.setdefault((owner, kind, matrix.shape[1]), []).append(matrix)
    return list(groups.values())
