"""Experts that stay compressed: the module keeps its code, and each of its matrices becomes a `SparseLinear`.

`mspc.model.experts.experts_forward` runs them, grouped by expert. Only the matrices of experts that tokens choose are
read.
"""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from mspc.errors import InputError
from mspc.formats.description import StoredMatrix
from mspc.model.experts import IMPLEMENTATION, expert_matrices, layer_name, projections
from mspc.model.own_experts import adopt_experts
from mspc.runtime.linear import SparseLinear

Slices = Mapping[int, tuple[str, StoredMatrix]]
"""The name and the description of each slice of a parameter."""


def replace_experts(model: PreTrainedModel, parameters: Mapping[str, Slices]) -> None:
    """Replace parameters of experts, by name, by one SparseLinear for each slice.

    Raises InputError, naming a matrix, if the model has no such parameter, or one with other slices.
    """
    if parameters:
        adopt_experts(model)
    for parameter, slices in parameters.items():
        _check(model, parameter, slices)
    for parameter, slices in parameters.items():
        owner_name, _, leaf = parameter.rpartition(".")
        owner = model.get_submodule(owner_name)
        _take_out(owner, leaf)
        if leaf == projections(owner)[-1]:  # the first parameter may have slices that no expert has
            owner.num_layers = len(slices)
        for index in range(len(slices)):
            owner.add_module(layer_name(leaf, index), SparseLinear(slices[index][1]))
    if parameters:
        model.set_experts_implementation(IMPLEMENTATION)


def _take_out(owner: nn.Module, leaf: str) -> None:
    """Leave a tensor without content in place of a parameter: transformers fills those that no file holds."""
    empty = owner.get_parameter(leaf).detach().to("meta")
    delattr(owner, leaf)
    setattr(owner, leaf, empty)


def _check(model: PreTrainedModel, parameter: str, slices: Slices) -> None:
    """Raises InputError, naming a matrix, if a parameter does not have these slices."""
    name, matrix = slices[min(slices)]
    owner_name, _, leaf = parameter.rpartition(".")
    try:
        owner: nn.Module = model.get_submodule(owner_name)
    except AttributeError:
        owner = nn.Identity()
    expected = expert_matrices(parameter, leaf, owner)
    if not expected:
        raise InputError(
            f"{name}: the model has no parameter {parameter} of experts that mspc knows how to run. Export the "
            "artifact dense."
        )
    if len(slices) != len(expected):
        raise InputError(
            f"{name}: config.json describes {len(slices)} slices of {parameter}, which has {len(expected)}. Export the "
            "artifact again."
        )
    for index, address in enumerate(expected):
        name, matrix = slices[index]
        if matrix.shape != address.shape:  # whether it is transposed matters to those who read its tensor
            raise InputError(
                f"{name}: it is described as {matrix.shape}, but the model's slice is {address.shape}. Export the "
                "artifact again; config.json does not fit the weights."
            )
