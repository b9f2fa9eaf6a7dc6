"""Sorting of the weights of a block: matrices to compress, and others, which no matrix product of their own reads."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from mspc.errors import InputError
from mspc.model.config_checks import setting_of
from mspc.types import Matrix

LINEAR = (nn.Linear, Conv1D)
SMALL_SHARE = 0.25
"""Share of a block that may stay dense. With more, a user would wonder why the model stays large."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass
class BlockMatrices:
    """The parameters of one block, sorted. `others` are numbers of weights by name in the block."""

    index: int
    matrices: list[Matrix] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    """No linear layers, as many weights as matrices have: convolutions, state matrices, fused experts, routers."""
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
    """The names that a user takes: those that match `only`, if there is any, and that do not match `skip`."""

    skip: Sequence[str] = ()
    only: Sequence[str] = ()

    def takes(self, parameter: str) -> bool:
        name = parameter.removesuffix(".weight")
        wanted = not self.only or any(re.search(pattern, name) for pattern in self.only)
        return wanted and not any(re.search(pattern, name) for pattern in self.skip)


def sort_block(
    index: int, prefix: str, block: nn.Module, config: PreTrainedConfig, selection: Selection,
    unreached: Collection[str],
) -> BlockMatrices:  # fmt: skip
    """Sort the parameters of a block by what mspc can do with them. Those not in the selection appear nowhere.

    `prefix` comes before the names in the block; `unreached` are full names of weights of layers that are never
    called, or that are no tensor of the checkpoint.
    """
    found = BlockMatrices(index)
    for name, parameter in block.named_parameters():
        full, owner = prefix + name, block.get_submodule(name.rpartition(".")[0])
        found.numel += parameter.numel()
        is_linear = isinstance(owner, LINEAR) and parameter.ndim == 2
        if not is_linear and sum(size != 1 for size in parameter.shape) < 2:
            found.vectors += parameter.numel()
        elif not selection.takes(full):
            continue
        elif not is_linear or full in unreached or _is_router(name, owner, parameter.shape[0], config):
            found.others[name], found.shapes[name] = parameter.numel(), tuple(parameter.shape)
        else:
            transposed = isinstance(owner, Conv1D)
            num_out, num_in = reversed(parameter.shape) if transposed else parameter.shape
            found.matrices.append(Matrix(full, (num_out, num_in), transposed=transposed))
    return found


def _is_router(name: str, owner: nn.Module, num_out: int, config: PreTrainedConfig) -> bool:
    """Tell if a layer sends tokens to experts; it is small and sensitive."""
    leaf = name.split(".")[-2]
    if "router" in type(owner).__name__.lower() or "router" in leaf:
        return True
    return leaf == "gate" and num_out in {setting_of(config, key) for key in EXPERTS}


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


def skip_option(names: Iterable[str]) -> str:
    """The option that leaves these parameters of blocks dense."""
    shown = list(dict.fromkeys(name.removesuffix(".weight") for name in names))
    if all("experts" in name.split(".") for name in shown):
        return "--skip experts"
    return " ".join(f"--skip '{re.escape(name)}$'" for name in shown)


def dense_notes(blocks: Sequence[BlockMatrices]) -> Iterator[str]:
    """A note about small weights that stay dense, with their share."""
    others = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for block in blocks for name in block.others)
    if others:
        dense = sum(block.vectors + sum(block.others.values()) for block in blocks)
        share = dense / sum(block.numel for block in blocks)
        yield (
            f"Note: {', '.join(others)}, biases and norms are no layers that mspc compresses. They stay dense, "
            f"{share:.1%} of the weights of the blocks."
        )
