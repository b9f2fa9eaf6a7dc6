"""The two matrices outside of the blocks that can be quantized: the embeddings and the output head."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mspc.errors import InputError
from mspc.model.matrices import is_plain
from mspc.model.streamed import StreamedModel
from mspc.types import EMBEDDINGS, HEAD, Matrix

SCALE = "scalar_embed_scale"
"""The attribute of an embedding by which its rows are multiplied, in the families of Gemma."""


@dataclass(frozen=True, slots=True)
class OuterMatrix:
    """The embeddings or the head. Its `role` is EMBEDDINGS where it is both, and `tied` the parameter of the head."""

    matrix: Matrix
    role: str
    tied: str | None = None


def outer_matrices(model: StreamedModel) -> dict[str, OuterMatrix]:
    """The matrices by role, which are one object where head and embeddings are tied.

    Raises InputError for a model without one of them, and for one that computes something else with it.
    """
    embeddings, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    kind = type(model.model).__name__
    if not isinstance(embeddings, nn.Embedding) or not is_lookup(embeddings):
        raise _refused("embedding_bits", f"the embeddings of {kind} are a {type(embeddings).__name__}")
    if type(head) is not nn.Linear or not is_plain(head):
        raise _refused("head_bits", f"the head of {kind} is a {type(head).__name__}")
    names: dict[int, list[str]] = {}
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    of_embeddings, of_head = names[id(embeddings.weight)], names[id(head.weight)]
    first, last = _own_name(model.model, embeddings, of_embeddings), _own_name(model.model, head, of_head)
    if embeddings.weight is head.weight:
        both = OuterMatrix(_matrix(model, first, embeddings.weight), EMBEDDINGS, last)
        return {EMBEDDINGS: both, HEAD: both}
    if len(of_embeddings) + len(of_head) > 2:
        raise _refused("head_bits and embedding_bits", f"{kind} shares a matrix with another layer")
    return {
        EMBEDDINGS: OuterMatrix(_matrix(model, first, embeddings.weight), EMBEDDINGS),
        HEAD: OuterMatrix(_matrix(model, last, head.weight), HEAD),
    }


def is_lookup(layer: nn.Embedding) -> bool:
    """Tell if an embedding gives the rows of its weight, or those multiplied by its `SCALE`."""
    return type(layer).forward is nn.Embedding.forward or isinstance(getattr(layer, SCALE, None), int | float)


def _own_name(model: nn.Module, layer: nn.Module, names: list[str]) -> str:
    return next(name for name in names if model.get_submodule(name.rpartition(".")[0]) is layer)


def _matrix(model: StreamedModel, name: str, parameter: Any) -> Matrix:
    origin = model.source_tensors[name]
    if origin.converter is not None or not name.endswith(origin.keys[0]):
        raise _refused("head_bits and embedding_bits", f"the checkpoint stores {name} as {origin.keys[0]}")
    return Matrix(name, (parameter.shape[0], parameter.shape[1]))


def _refused(option: str, reason: str) -> InputError:
    return InputError(f"{option}: {reason}, which mspc does not quantize. Leave the option out.")
