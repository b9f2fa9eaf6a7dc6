"""The sizes that a run works with, and its work so far: amounts by stage and kind (see `mspc.pipeline.rates`)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from mspc.memory import free_memory
from mspc.model.config_checks import setting_of
from mspc.model.experts import projections
from mspc.model.matrices import EXPERTS
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import TOKENS_PER_BATCH
from mspc.passes.inputs import Groups
from mspc.pipeline.calibration import CALIBRATION_PER_VALIDATION, TEST_WINDOWS
from mspc.pipeline.rates import LARGEST_KEPT, Rates
from mspc.ranks import CHUNKS
from mspc.settings import ALL, Settings
from mspc.storage.sizes import tensor_bytes
from mspc.types import MatricesByBlock, Matrix, PlannedMatrix, flatten

NEAR = 2**22
"""Bytes of a tensor up to which operations on it stay in the caches of a core."""
BYTES_AN_OPERATION = 12
"""Bytes that an operation moves for each float32 number of its result, with two numbers read."""


@dataclass(frozen=True)
class Workload:
    """One run as numbers. `model` may be on meta; `groups` are those of `mspc.passes.inputs`."""

    model: StreamedModel
    matrices: MatricesByBlock
    groups: Sequence[Groups]
    settings: Settings
    plan: Sequence[PlannedMatrix]
    """A plan as the run might make it; under a size budget one of that size."""
    device: torch.device
    """The device that is forecast, which need not be there."""
    dtype: torch.dtype
    """The dtype of the passes."""
    threads: int = 1
    spill: Path | None = None
    free: int | None = None
    """Free bytes of the device. None: those that are free now."""
    ranks: int = 1
    """Processes that share the run."""

    @property
    def free_bytes(self) -> int:
        return free_memory(self.device) if self.free is None else self.free

    @cached_property
    def flat(self) -> list[Matrix]:
        return flatten(self.matrices)

    @property
    def parts(self) -> int:
        """Different parts of the text that ranks have."""
        return min(self.ranks, CHUNKS)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return int(self.settings.sequence_length or 0)

    @property
    def tokens(self) -> int:
        """Tokens of calibration text."""
        return self.settings.num_sequences * self.length

    @property
    def measured_tokens(self) -> int:
        """Tokens of gradients, loss curves and sensitivities."""
        return min(self.settings.sensitivity_sequences, self.settings.num_sequences) * self.length

    @property
    def validation_tokens(self) -> int:
        wanted = -(-self.settings.num_sequences // CALIBRATION_PER_VALIDATION)
        return wanted * self.length if self.settings.needs_validation else 0

    @property
    def test_tokens(self) -> int:
        return TEST_WINDOWS * self.length if self.settings.eval else 0

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch of a pass."""
        return max(1, TOKENS_PER_BATCH // self.length) * self.length

    @property
    def blocks(self) -> int:
        return len(self.matrices)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in a pass."""
        return self.dtype.itemsize

    @cached_property
    def hidden(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @cached_property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @cached_property
    def block_numel(self) -> list[int]:
        """Weights of every block."""
        return [sum(parameter.numel() for parameter in block.parameters()) for block in self.model.blocks]

    @cached_property
    def numel(self) -> int:
        """Weights of the model, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.model.parameters())

    @property
    def outer_numel(self) -> int:
        return self.numel - sum(self.block_numel)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        sizes = (tensor_bytes((name, shape)) for name, shape in self.model.source.types().values())
        return int(sum(sizes))

    @property
    def stored_itemsize(self) -> float:
        """Mean bytes of a stored weight."""
        return self.source_bytes / max(self.numel, 1)

    @cached_property
    def routed_share(self) -> float:
        """The mean share of the tokens that an expert is given; 1 without experts."""
        config = self.model.config
        experts = next((n for name in EXPERTS if isinstance(n := setting_of(config, name), int) and n), 1)
        routed = setting_of(config, "num_experts_per_tok")
        return min(routed / experts, 1.0) if isinstance(routed, int) and experts > 1 else 1.0

    def is_last(self, matrix: Matrix) -> bool:
        """Tell if a matrix is an expert's last one, whose inputs are the expert's own."""
        owner, _, leaf = matrix.parameter.rpartition(".")
        return matrix.index is not None and leaf == projections(self.model.model.get_submodule(owner))[-1]

    @cached_property
    def shown_numel(self) -> list[int]:
        """Weights of every block that all tokens are multiplied by only for the Grams of experts (`--route all`)."""
        shown = self.settings.route == ALL
        of_blocks = ([m for m in block if m.index is not None and not self.is_last(m)] for block in self.matrices)
        return [sum(matrix.numel for matrix in of_block) if shown else 0 for of_block in of_blocks]

    @cached_property
    def shown_width(self) -> int:
        """Numbers that all experts of a block hold for each token that they are shown, at most."""
        shown = self.settings.route == ALL
        widths = (sum(matrix.shape[1] for matrix in block if self.is_last(matrix)) for block in self.matrices)
        return max(widths, default=0) if shown else 0

    def gram_inputs(self, tokens: float) -> Iterator[tuple[int, float]]:
        """The inputs of every Gram, and its tokens. Experts share the Gram of what all of them are shown."""
        for group in (group for groups in self.groups for group in groups):
            first, width = group[0], group[0].shape[1]
            if first.index is None:
                yield width, tokens
            elif self.settings.route != ALL:
                yield width, tokens * self.routed_share
            elif self.is_last(first) or first.index == 0:
                yield width, tokens

    @cached_property
    def active_numel(self) -> list[int]:
        """Weights of every block that a token is multiplied by: of fused experts, the share that it is routed to."""
        share = self.routed_share
        return [
            int(
                sum(
                    p.numel() * (share if _is_expert(name) else 1) for name, p in block.named_parameters() if p.ndim > 1
                )
            )
            for block in self.model.blocks
        ]

    @cached_property
    def attention_width(self) -> int:
        """Numbers of all queries of a token; 0 for a model without attention heads."""
        heads = setting_of(self.model.config, "num_attention_heads")
        width = setting_of(self.model.config, "head_dim")
        if not isinstance(heads, int):
            return 0
        return heads * width if isinstance(width, int) else self.hidden

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the matrices as they are stored."""
        types = self.model.source.types()
        return getattr(torch, types[self.model.tensor_key(self.flat[0])][0])

    @property
    def quantizing(self) -> bool:
        """True if the plan has codes."""
        return any(matrix.target.grid is not None for matrix in self.plan)


def _is_expert(name: str) -> bool:
    return "experts" in name.split(".") and "shared" not in name


@dataclass
class Work:
    """Amounts of work of one stage, by kind and number of threads that can share it."""

    amounts: dict[tuple[str, float], float] = field(default_factory=lambda: defaultdict(float))
    ranks: float = 1
    """Ranks that share what is added now. Amounts are those of one rank."""

    @contextmanager
    def shared(self, ranks: float) -> Iterator[None]:
        """Let a number of ranks share all that is added inside; with 1, each of them does all of it."""
        before, self.ranks = self.ranks, ranks
        yield
        self.ranks = before

    def add(self, kind: str, amount: float, ways: float = 1) -> None:
        self.amounts[kind, ways] += amount / self.ranks

    def operations(self, numbers: float, count: float, ways: float = 1, *, near: bool = False) -> None:
        """`count` operations on tensors of `numbers` float32 each."""
        kind = "near" if near or 4 * numbers <= NEAR else "middle" if 4 * numbers < LARGEST_KEPT else "far"
        self.add(kind, count * numbers * BYTES_AN_OPERATION, ways)

    def seconds(self, rates: Rates) -> float:
        return sum(rates.seconds(kind, amount, ways) for (kind, ways), amount in self.amounts.items())
