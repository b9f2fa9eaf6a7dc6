"""Sorting of the weights of a block: matrices to compress, and others, which no matrix product of their own reads."""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from mspc.errors import InputError
from mspc.model.config_checks import setting_of
from mspc.model.experts import expert_matrices
from mspc.types import Matrix

LINEAR = (nn.Linear, Conv1D)
SMALL_SHARE = 0.25
"""Share of a block that may stay dense. With more, a user would wonder why the model stays large."""
LEAST_INPUTS = 8
"""Inputs of a matrix below which it stays dense: a code needs a scale, and scales of fewer weights save nothing."""
SELECTORS = ("router", "indexer", "selector", "expert_gate", "experts_gate")
"""Parts of the names of layers, or of their classes, that decide which experts or tokens are used."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class BlockMatrices:
    """The parameters of one block, sorted. `others` are numbers of weights by name in the block."""

    index: int
    matrices: list[Matrix] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    """No linear layers, as many weights as matrices have: convolutions, state matrices, fused experts, routers."""
    selectors: dict[str, int] = field(default_factory=dict)
    """Linear layers that stay dense unless they are asked for: routers, indexers and gates of experts."""
    unread: dict[str, int] = field(default_factory=dict)
    """Linear layers that text never uses, such as those of attention to an encoder."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    vectors: int = 0
    """Number of weights in biases, norms and the like."""
    numel: int = 0
    """Number of weights of the block."""

    def refused(self) -> list[str]:
        """The large ones among the others, if together they are too much to stay dense."""
        if sum(self.others.values()) <= SMALL_SHARE * self.numel:
            return []
        return [name for name, numel in self.others.items() if 10 * numel > max(self.others.values())]


@dataclass(frozen=True)
class Selection:
    """The names that a user takes: those that match `only`, if there is any, and that do not match `skip`.

    Selectors must match `include` as well.
    """

    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    include: Sequence[str] = ()

    def takes(self, parameter: str, matrix: str | None = None) -> bool:
        """Tell if a parameter is taken, or one matrix of it, by the patterns for either name."""
        names = [parameter.removesuffix(".weight"), *([] if matrix is None else [matrix])]
        wanted = not self.only or any(re.search(pattern, name) for pattern in self.only for name in names)
        return wanted and not any(re.search(pattern, name) for pattern in self.skip for name in names)

    def includes(self, parameter: str) -> bool:
        return any(re.search(pattern, parameter.removesuffix(".weight")) for pattern in self.include)


def sort_block(
    index: int, prefix: str, block: nn.Module, config: PreTrainedConfig, selection: Selection,
    unreached: Collection[str], unread: Collection[str] = (),
) -> BlockMatrices:  # fmt: skip
    """Sort the parameters of a block by what mspc can do with them. Those not in the selection appear nowhere.

    `prefix` comes before the names in the block; `unreached` are full names of weights of layers that are never
    called, or that are no tensor of the checkpoint, and `unread` those of layers that text does not use at all.
    """
    found = BlockMatrices(index)
    for name, parameter in block.named_parameters():
        full, owner = prefix + name, block.get_submodule(name.rpartition(".")[0])
        found.numel += parameter.numel()
        is_linear = isinstance(owner, LINEAR) and parameter.ndim == 2
        if not is_linear and sum(size != 1 for size in parameter.shape) < 2:
            found.vectors += parameter.numel()
        elif full not in unreached and (experts := expert_matrices(full, name.rpartition(".")[2], owner)):
            found.matrices += taken_experts(full, experts, selection)
        elif not selection.takes(full):
            continue
        elif is_linear and full in unread:
            found.unread[name] = parameter.numel()
        elif not is_linear or full in unreached or not is_plain(owner):
            found.others[name], found.shapes[name] = parameter.numel(), tuple(parameter.shape)
        elif is_selector(name, block, parameter.shape[0], config) and not selection.includes(full):
            found.selectors[name] = parameter.numel()
        else:
            transposed = isinstance(owner, Conv1D)
            num_out, num_in = reversed(parameter.shape) if transposed else parameter.shape
            if num_in < LEAST_INPUTS:
                found.others[name], found.shapes[name] = parameter.numel(), tuple(parameter.shape)
            else:
                found.matrices.append(Matrix(full, (num_out, num_in), transposed=transposed))
    return found


def taken_experts(parameter: str, experts: Sequence[Matrix], selection: Selection) -> list[Matrix]:
    """The matrices of a parameter that are in the selection: all or none.

    Raises InputError for some of them, as a parameter is stored whole.
    """
    taken = [matrix for matrix in experts if selection.takes(parameter, matrix.name)]
    if taken and len(taken) < len(experts):
        left = next(matrix for matrix in experts if matrix not in taken)
        raise InputError(
            f"{left.name} is not selected, but {taken[0].name} is, and both are parts of one parameter. Select all of "
            "them or none; a --plan with sparsity 0 and bits 16 leaves single experts dense."
        )
    return taken


def is_selector(name: str, block: nn.Module, num_out: int, config: PreTrainedConfig) -> bool:
    """Tell if a layer decides which experts or tokens are used; it is small and sensitive."""
    path = name.split(".")[:-1]
    owners = [block.get_submodule(".".join(path[:end])) for end in range(1, len(path) + 1)]
    words = [*path, *(type(owner).__name__ for owner in owners)]
    if any(part in word.lower() for word in words for part in SELECTORS):
        return True
    return "gate" in path[-2:] and num_out in {setting_of(config, key) for key in EXPERTS}


def is_plain(layer: nn.Module) -> bool:
    """Tell if a linear layer computes x W^T + b, by trying it on random numbers where its class has another forward.

    Grouped, block-diagonal and scaled layers have the weight of a linear layer, but not its input or its output. Of
    layers of one class, with the same shapes and settings, one is tried.
    """
    known = next(cls for cls in LINEAR if isinstance(layer, cls))
    if type(layer).forward is known.forward:
        return True
    settings = {name: value for name, value in vars(layer).items() if isinstance(value, int | float | str | None)}
    shapes = [(name, parameter.shape) for name, parameter in layer.named_parameters()]
    kind = (type(layer), repr((settings, shapes)))
    if kind not in _tried:
        _tried[kind] = _computes_linear(layer, known)
    return _tried[kind]


_tried: dict[tuple[type, str], bool] = {}


def _computes_linear(layer: nn.Module, known: type[nn.Module]) -> bool:
    """The trial of a layer, which may be on meta, with weights and inputs that are random float32 on the CPU."""
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        tried = copy.copy(layer)
        # The table of the copy is its own, so that the layer keeps its parameters.
        tried._parameters = {
            name: None if p is None else nn.Parameter(torch.randn(p.shape, generator=generator), requires_grad=False)
            for name, p in layer._parameters.items()
        }
        weight, bias = cast(torch.Tensor, tried.weight), tried._parameters.get("bias")
        weight = weight.T if known is Conv1D else weight
        inputs = torch.randn(2, 3, weight.shape[1], generator=generator)
        expected = nn.functional.linear(inputs, weight, bias)
        try:
            found = tried.forward(inputs)
        except Exception:  # it takes other inputs
            return False
        return (
            isinstance(found, torch.Tensor)
            and found.shape == expected.shape
            and torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        )


def check_reached(blocks: Sequence[BlockMatrices]) -> None:
    """Raises InputError for a block with too much that is no linear layer, such as fused experts."""
    refused = {block.index: names for block in blocks if (names := block.refused())}
    if not refused:
        return
    first = next(block for block in blocks if block.index in refused)
    shown = ", ".join(f"{name} {first.shapes[name]}" for name in refused[first.index])
    share = sum(first.others[name] for name in refused[first.index]) / first.numel
    to_skip = [name for of_block in refused.values() for name in of_block]
    raise InputError(
        f"Block {first.index} has weights that mspc cannot compress yet, {share:.0%} of it: {shown}. Leave them dense "
        f"with {skip_option(to_skip)}."
    )


def check_patterns(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises InputError for a pattern of `--skip`, `--only` or `--include` that matches none of its names."""
    kind = "matrix of a block"
    why = "Embeddings and head have --embedding-bits and --head-bits, and routers and the like need --include"
    if option == "--include":
        kind = "linear layer of a router, indexer or gate of experts"
        why = "It compresses what would stay dense otherwise, and --skip and --only win over it"
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            example = f", such as {names[0]}" if names else ""
            raise InputError(f"{option} {pattern} matches no {kind}{example}. {why}: correct it, or leave it out.")


def skip_option(names: Iterable[str]) -> str:
    """The option that leaves these parameters of blocks dense."""
    shown = list(dict.fromkeys(name.removesuffix(".weight") for name in names))
    if all("experts" in name.split(".") for name in shown):
        return "--skip experts"
    return " ".join(f"--skip '{re.escape(name)}$'" for name in shown)


def dense_notes(blocks: Sequence[BlockMatrices]) -> Iterator[str]:
    """Notes about small weights that stay dense, with their share."""
    numel = sum(block.numel for block in blocks)
    if others := _names(name for block in blocks for name in block.others):
        dense = sum(block.vectors + sum(block.others.values()) for block in blocks)
        yield (
            f"Note: {', '.join(others)}, biases and norms are no layers that mspc compresses. They stay dense, "
            f"{dense / numel:.1%} of the weights of the blocks."
        )
    if selectors := _names(name.removesuffix(".weight") for block in blocks for name in block.selectors):
        dense = sum(sum(block.selectors.values()) for block in blocks)
        yield (
            f"Note: layers that choose experts or tokens stay dense, {dense / numel:.2%} of the weights of the blocks: "
            f"{', '.join(selectors)}. --include compresses them."
        )
    yield from unread_note(blocks)


def unread_note(blocks: Sequence[BlockMatrices]) -> Iterator[str]:
    """A note about linear layers that text does not use, with their share."""
    if names := _names(name.removesuffix(".weight") for block in blocks for name in block.unread):
        share = sum(sum(block.unread.values()) for block in blocks) / sum(block.numel for block in blocks)
        yield (
            f"Note: text alone does not use {', '.join(names)}. They stay dense, {share:.1%} of the weights of the "
            "blocks."
        )


def outside_note(names: Sequence[str], numel: int, whole: int) -> str:
    """A note about linear layers outside of the blocks, which have `numel` of the `whole` weights of the model."""
    return (
        f"Note: linear layers outside of the blocks stay dense, {numel / whole:.1%} of the weights of the model: "
        f"{', '.join(_names(names))}."
    )


def _names(names: Iterable[str]) -> list[str]:
    """Names without the numbers of layers and experts, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
