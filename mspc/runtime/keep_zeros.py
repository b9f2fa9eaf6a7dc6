"""Training a sparse model on: the masks of a model, and a callback of the `Trainer` that keeps its zeros zero.

masks = mspc.masks(model, "out/small")
Trainer(model, ..., callbacks=[mspc.KeepZeros(masks)]).train()
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback

from mspc.errors import InputError
from mspc.formats.decoding import decode_mask
from mspc.model.hub import resolve
from mspc.model.matrices import LINEAR
from mspc.model.open import open_model
from mspc.numerics.zeros import FEW
from mspc.runtime.linear import SparseLinear
from mspc.storage.artifact import read_matrix
from mspc.storage.manifest import MANIFEST, is_artifact, read_entries, read_manifest
from mspc.storage.sparse_export import is_sparse_export, read_sparse


def masks(model: PreTrainedModel | str | Path, artifact: Any = None) -> dict[str, Tensor]:
    """The masks of the sparse matrices of a model, by parameter: bool, True = kept, in the parameter's shape.

    `artifact` is the artifact or the sparse export that the model was loaded or exported from. Its masks are exact.
    `model` may be a folder, too, and the masks of an artifact or of a sparse export are exact then.

    Of any other model or folder the masks are `weight != 0`, for linear layers with at least 1% zeros, but not for the
    output head. Kept weights that are zero, as after rounding to few bits, then count as pruned, and stay zero in
    training. With 4 bits these may be a tenth of the kept weights; give `artifact` to let them move.

    Raises InputError for a model that does not belong to the artifact, and for one with adapters.
    """
    if isinstance(model, nn.Module):
        found = _of_module(model) if artifact is None else dict(_stored(artifact))
        for name, mask in found.items():
            _parameter(model, name, mask)
        return found
    if artifact is not None:
        raise InputError(f"masks: {model} and {artifact} are two folders. Give one of them, or a model in memory.")
    folder = resolve(str(getattr(model, "path", model)))
    exact = is_artifact(folder) or is_sparse_export(folder)
    return dict(_stored(folder) if exact else _of_folder(folder))


class KeepZeros(TrainerCallback):
    """A callback of the transformers `Trainer`: what `masks` removes is zero after every step, exactly.

    The gradients there are zero too, so that they count neither in the gradient norm nor in the optimizer.
    An adapter (PEFT) is trained without it. Merge it, then call `apply`: what it added to removed weights is lost.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        self._hooks: list[RemovableHandle] = []

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the removed weights of a model to zero. Raises InputError for a model without these parameters."""
        for name, mask in self.masks.items():
            parameter = _parameter(model, name, mask)
            parameter.masked_fill_(~mask.to(parameter.device), 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.apply(given["model"])
        for name, mask in self.masks.items():
            parameter = _parameter(given["model"], name, mask)
            if parameter.requires_grad:
                kept = mask.to(parameter.device)
                self._hooks.append(parameter.register_hook(lambda gradient, kept=kept: gradient * kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.apply(given["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _of_module(model: nn.Module) -> dict[str, Tensor]:
    """By the weights in memory; of layers that `mspc.load` made, by what they hold."""
    if hasattr(model, "peft_config"):
        raise InputError(
            "masks: the model has adapters. Take its masks before they are added, or once they are merged."
        )
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear) and layer.matrix.pattern.sparsity:
            mask = decode_mask(layer.stored(), layer.matrix, 0, layer.out_features)
            found[f"{name}.weight"] = mask.T if layer.matrix.transposed else mask
        elif isinstance(layer, LINEAR) and layer is not head and _has_zeros(mask := layer.weight.detach() != 0):
            found[f"{name}.weight"] = mask
    return found


def _of_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    model = open_model(folder, device=torch.device("cpu"))
    for block in model.sorted_blocks((), include=("",)):
        for matrix in block.matrices:
            if _has_zeros(mask := model.read_parameter(matrix.parameter) != 0):
                yield matrix.parameter, mask


def _has_zeros(mask: Tensor) -> bool:
    return int(torch.count_nonzero(mask)) <= (1 - FEW) * mask.numel()


def _stored(artifact: Any) -> Iterator[tuple[str, Tensor]]:
    """`(parameter, mask)` of an artifact or a sparse export. Raises InputError for any other folder."""
    folder = Path(getattr(artifact, "path", artifact))
    if is_sparse_export(folder):
        for name, row, stored in read_sparse(folder):
            if stored.target.pattern.sparsity:
                if row.get("index") is not None:
                    raise _slice_error(folder, name)
                yield row["parameter"], stored.mask.T if row["transposed"] else stored.mask
        return
    for entry in read_entries(read_manifest(folder), folder / MANIFEST):
        if not entry.target.pattern.sparsity:
            continue
        if entry.address.index is not None:
            raise _slice_error(folder, entry.name)
        mask = read_matrix(folder, entry).mask
        yield entry.address.parameter, mask.T if entry.address.transposed else mask


def _slice_error(folder: Path, name: str) -> InputError:
    return InputError(
        f"{folder}: {name} is a slice of a parameter, and masks are of whole parameters. Give a model whose experts "
        "are dense (--skip experts)."
    )


def _parameter(model: nn.Module, name: str, mask: Tensor) -> Tensor:
    """The parameter of a mask. Raises InputError if the model has none of that name and shape."""
    try:
        parameter = model.get_submodule(name.rpartition(".")[0]).weight
    except AttributeError:
        parameter = torch.empty(0)
    assert isinstance(parameter, Tensor)
    if parameter.shape != mask.shape:
        raise InputError(
            f"{name}: the model has no such parameter of shape {tuple(mask.shape)}. Give the masks of this model, or "
            "the artifact that it is from."
        )
    return parameter
