"""Recovery of a model in memory: its kept weights are trained towards a dense one's predictions. Zeros stay zero."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mspc.errors import InputError
from mspc.memory import free_memory
from mspc.model.hub import choose_sequence_length
from mspc.model.streamed import find_blocks
from mspc.model.vocabulary import check_range, tokenizer_for
from mspc.passes.distillation import (
    BETAS,
    LARGEST_NORM,
    POSITIONS,
    Validations,
    added,
    head_gradients,
    is_checked,
    orders,
    progress_line,
    rates,
)
from mspc.passes.perplexity import divergence, evaluating
from mspc.passes.route import EarlyExit, replaced_forwards
from mspc.progress import Event, Progress, as_progress, log
from mspc.runtime.keep_zeros import KeepZeros, masks
from mspc.runtime.linear import SparseLinear
from mspc.runtime.loading import load
from mspc.sizes import in_words
from mspc.text.given import check_given, check_ids
from mspc.text.reading import Reading
from mspc.text.tokens import calibration_tokens

SEQUENCES_PER_VALIDATION_SEQUENCE = 8
COPIES = 4
"""Tensors as large as the trained weights that training needs: gradients, two moments, and the best weights so far."""


@dataclass(frozen=True)
class Recovery:
    """The KL divergence from the dense model on validation text, in nats per token, before and after."""

    before: float
    after: float
    """The divergence of the weights that the model has now. Never above `before`."""
    step: int
    """The step whose weights were kept; 0 for those that came in."""
    steps: int
    """The steps that were made."""
    divergences: dict[int, float] = field(default_factory=dict)
    """The divergence of each validation, by step."""


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel | str | Path,
    calibration: str | Path | Sequence[str] | Tensor = "builtin",
    *,
    artifact: Any = None,
    tokenizer: Any = None,
    steps: int = 100,
    learning_rate: float = 1e-4,
    batch_size: int = 4,
    num_sequences: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    progress: bool | Callable[[Event], object] | Progress = True,
) -> Recovery:
    """Train the kept weights, norms and biases of a sparse model in memory towards the predictions of a dense model.

    The optimizer is AdamW with a short warm-up and a cosine. The best weights on validation text are kept, and a model
    is never worse there than it came in. What `masks(model, artifact)` removes stays exactly zero. On a CPU the
    result is the same for the same inputs, versions and number of torch's threads.

    Args:
        model: Sparse transformers model in float32, not as `mspc.load` gives it but as its dense export. Changed.
        teacher: Dense model of the same vocabulary, in memory or as a folder, which `mspc.load` then loads.
        calibration: Name of a text source, a list of documents, or token ids (N, T). One in nine sequences validates.
        artifact: Artifact or sparse export that the model is from, whose masks are exact. None: `weight != 0`.
        tokenizer: Tokenizer of the text; None: the one in the folder of the model.
        steps: Steps of `batch_size` sequences each. Fewer are made if validation shows no progress.
        learning_rate: Highest learning rate.
        batch_size: Sequences of a step.
        num_sequences: Sequences to train on.
        sequence_length: Tokens of a sequence; None: 512, or the model's maximum if that is less.
        seed: Seed of the choice and the order of the text.
        progress: As for `mspc.compress`. If a function returns False, `Stopped` is raised, with the best weights kept.

    Raises InputError for models that do not fit each other, and for less memory than training needs.
    """
    if steps < 1 or batch_size < 1 or num_sequences < 1 or not 0 < learning_rate < math.inf:
        raise InputError("recover: steps, batch_size, num_sequences and learning_rate must be above 0.")
    found = masks(model, artifact)
    trained = _trained(model, found)
    _check_memory(trained, next(model.parameters()).device)
    training, validation = _text(model, calibration, tokenizer, num_sequences, sequence_length, seed)
    dense = _dense(model, teacher)
    shown, schedule = as_progress(progress), rates(steps, learning_rate)
    batches = (training[numbers] for numbers in orders(len(training), batch_size, steps, seed))
    with evaluating(model), evaluating(dense), _only_trained(model, trained):
        run = _Training(_Halves(model), _Halves(dense), trained, KeepZeros(found), validation, batch_size)
        try:
            with shown.stage("Recovering", steps) as step:
                run.validate(0)
                for number, (batch, rate) in enumerate(zip(batches, schedule, strict=True), 1):
                    run.step(batch, rate)
                    if is_checked(number, steps) and not run.validate(number):
                        break
                    step()
        finally:
            run.restore()
    return run.result()


def _dense(model: PreTrainedModel, teacher: PreTrainedModel | str | Path) -> PreTrainedModel:
    """The dense model in memory. Raises InputError for one that the sparse model cannot be compared with."""
    dense = teacher if isinstance(teacher, nn.Module) else load(teacher, device=str(next(model.parameters()).device))
    configs: list[Any] = [model.config, dense.config]
    sizes = [config.get_text_config().vocab_size for config in configs]
    if sizes[0] != sizes[1] or dense is model:
        raise InputError(
            f"recover: the dense model must be another one of the same vocabulary, but they have {sizes[0]} and "
            f"{sizes[1]} tokens. Give the model before it was pruned."
        )
    return dense


class _Captured(EarlyExit):
    """Raised to leave a model after its last block."""


class _Halves:
    """A model as its blocks, and its final norm and head, so that these can take some positions at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.blocks = find_blocks(model)[1]
        config: Any = model.config
        self.some_id = int(config.get_text_config().pad_token_id == 0)
        """The id of a token, other than padding, which transformers warns of."""
        self.others: tuple[Any, ...] | None = None
        """The further outputs of the last block; None if it returns hidden states alone."""

    def hidden(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> the output (B, T, D) of the last block."""
        seen: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output)
            raise _Captured

        handle = self.blocks[-1].register_forward_hook(keep)
        try:
            with suppress(_Captured):
                self.model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            handle.remove()
        self.others = seen[0][1:] if isinstance(seen[0], tuple) else None
        hidden: Tensor = seen[0] if self.others is None else seen[0][0]
        if hidden.shape[:2] != ids.shape:
            raise InputError(
                f"recover: blocks of {type(self.model).__name__} pass hidden states {tuple(hidden.shape)} on for "
                f"tokens {tuple(ids.shape)}, and training knows one for each token. Leave recovery out."
            )
        return hidden

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function of outputs (N, D) of the last block: log-probabilities (N, V) float32."""
        given: list[Tensor] = []

        def through(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return given[-1] if self.others is None else (given[-1], *self.others)

        def log_probabilities(hidden: Tensor) -> Tensor:
            given[:] = [hidden[None]]
            ids = torch.full((1, len(hidden)), self.some_id, device=self.device)  # their embeddings are not used
            return torch.log_softmax(self.model(input_ids=ids, use_cache=False).logits[0].float(), -1)

        with replaced_forwards(self.blocks, through):
            yield log_probabilities


@dataclass
class _Training:
    """The state of a run."""

    student: _Halves
    teacher: _Halves
    trained: dict[str, nn.Parameter]
    zeros: KeepZeros
    validation: Tensor
    batch_size: int
    best: dict[str, Tensor] = field(default_factory=dict)
    validations: Validations = field(default_factory=Validations)
    made: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(list(self.trained.values()), lr=0.0, betas=BETAS, weight_decay=0.0)

    def step(self, ids: Tensor, rate: float) -> None:
        """One step on sequences (B, T)."""
        self.optimizer.zero_grad()
        parameters = list(self.trained.values())
        with torch.enable_grad():
            hidden = self.student.hidden(ids)
        with torch.no_grad():
            wanted = self.teacher.hidden(ids).flatten(0, 1)
        size = min(POSITIONS, ids.shape[1])  # as many as the model has positions, or less
        with self.teacher.head() as expected, self.student.head() as actual:
            states = hidden.flatten(0, 1)
            towards, found = head_gradients(expected, actual, wanted, states, parameters, ids.numel(), size)
        hidden.backward(towards.view_as(hidden))
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = added(parameter.grad, gradient)
        for name, mask in self.zeros.masks.items():
            gradient = self.trained[name].grad
            if gradient is not None:  # of a matrix that no text passes, such as one for images
                gradient.mul_(mask.to(gradient.device))
        nn.utils.clip_grad_norm_(self.trained.values(), LARGEST_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.zeros.apply(self.student.model)
        self.made += 1

    def predictions(self, ids: Tensor, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities (N, V) of the dense and the sparse model, some positions at a time.

        `states` (B T, D) are the outputs of the sparse model's last block.
        """
        wanted = self.teacher.hidden(ids).flatten(0, 1)
        size = min(POSITIONS, ids.shape[1])
        with self.teacher.head() as expected, self.student.head() as actual:
            for some, others in zip(wanted.split(size), states.split(size), strict=True):
                yield expected(some).to(states.device), actual(others)

    def validate(self, number: int) -> bool:
        """Measure the divergence, and keep weights that are the best so far. False if no progress is made any more."""
        total = 0.0
        with torch.no_grad():
            for ids in self.validation.split(self.batch_size):
                states = self.student.hidden(ids).flatten(0, 1)
                total += sum(divergence(p, q) for p, q in self.predictions(ids, states))
        found = total / self.validation.numel()
        if self.validations.add(number, found):
            self.best = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        log.info(progress_line(number, found))
        return self.validations.goes_on()

    def restore(self) -> None:
        """Give the model the best weights."""
        with torch.no_grad():
            for name, weight in self.best.items():
                self.trained[name].copy_(weight)
        self.optimizer.zero_grad()

    def result(self) -> Recovery:
        best, divergences = self.validations.best_step(), self.validations.divergences
        return Recovery(divergences[0], divergences[best], best, self.made, divergences)


def _trained(model: PreTrainedModel, found: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters to train: matrices with a mask, norms and biases. Raises InputError if they cannot be."""
    if any(isinstance(layer, SparseLinear) for layer in model.modules()):
        raise InputError(
            "recover: the matrices of this model are compressed. Export the artifact as dense, and load that in "
            "transformers with dtype=torch.float32."
        )
    if not found:
        raise InputError("recover: no matrix of this model has 1% zeros. Give a sparse model, or its artifact.")
    own = dict(model.named_parameters())
    vectors = {name for name, parameter in own.items() if sum(size != 1 for size in parameter.shape) < 2}
    trained = {name: own[name] for name in own if name in found or name in vectors}
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise InputError(
                f"recover: {name} is {parameter.dtype}, and small steps need float32. Load the model with "
                "dtype=torch.float32, and cast it afterwards."
            )
        if name in found and bool(parameter[~found[name].to(parameter.device)].any()):
            raise InputError(f"recover: {name} has weights that its mask removes. Give the artifact that it is from.")
    return trained


def _check_memory(trained: Mapping[str, nn.Parameter], device: torch.device) -> None:
    needed, free = COPIES * sum(p.nbytes for p in trained.values()), free_memory(device)
    if needed > free:
        raise InputError(
            f"recover: training needs {in_words(needed)} for gradients, the optimizer and the best weights, and "
            f"{in_words(free)} are free. Use another device or a smaller model."
        )


def _text(
    model: PreTrainedModel, calibration: Any, tokenizer: Any, num_sequences: int, length: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Ids (N, T) to train on, and others to validate on."""
    check_given(calibration, "calibration")
    config: Any = model.config
    if isinstance(calibration, Tensor):
        ids = check_ids(calibration, config.get_text_config().vocab_size)
        num_sequences = min(num_sequences, len(ids) - -(-len(ids) // (SEQUENCES_PER_VALIDATION_SEQUENCE + 1)))
    else:
        if tokenizer is None and not Path(config.name_or_path or "?").is_dir():
            raise InputError("recover: a model that is not from a folder needs tokenizer=, or token ids.")
        own = tokenizer_for(config, Path(config.name_or_path), tokenizer)
        length = choose_sequence_length(config, length) if length else min(512, choose_sequence_length(config, None))
        source = str(calibration) if isinstance(calibration, Path) else calibration
        more = -(-num_sequences // SEQUENCES_PER_VALIDATION_SEQUENCE)
        tokens = calibration_tokens(own, source, num_sequences, length, seed, Reading(), more)
        check_range(tokens.ids, config.get_text_config().vocab_size, tokens.source)
        ids = tokens.ids[: num_sequences + more]
    if not 0 < num_sequences < len(ids):
        raise InputError(
            f"recover: no text is left to validate on, of {len(ids)} sequences. Give more, or a smaller num_sequences."
        )
    return ids[:num_sequences], ids[num_sequences:]


@contextmanager
def _only_trained(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; afterwards the model asks for those that it asked for before."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with ExitStack() as stack:
        for name, parameter in model.named_parameters():
            stack.callback(parameter.requires_grad_, before[name])
            parameter.requires_grad_(name in trained)
        yield
