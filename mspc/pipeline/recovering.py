"""Training of latents: steps, validations, and the state from which an interrupted training goes on.

The best latents on validation text are kept, judged by what would be stored of them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mspc.passes.distillation import BETAS, LARGEST_NORM, Validations, is_checked, progress_line, rates
from mspc.pipeline.latents import QuantizedWeights, Vector, Weights
from mspc.pipeline.student import Student
from mspc.progress import Progress, log
from mspc.settings import Settings
from mspc.storage.checkpoint import map_file
from mspc.storage.files import write_tensors
from mspc.threads import run_all
from mspc.types import Matrix

SECONDS_BETWEEN_STATES = 60.0


@dataclass(frozen=True)
class Tuned:
    """A parameter of the model, or one matrix in it, and its latents."""

    parameter: str
    matrix: Matrix | None
    latents: Vector | Weights | QuantizedWeights

    @property
    def name(self) -> str:
        return self.parameter if self.matrix is None else self.matrix.name

    def of(self, parameter: Tensor) -> Tensor:
        """The part of the parameter, or of its gradient, that this is."""
        return parameter if self.matrix is None else self.matrix.read(parameter)

    def install(self, parameter: Tensor) -> None:
        stored = self.latents.stored()
        self.of(parameter).copy_(stored if isinstance(stored, Tensor) else stored.weight)


class Training:
    """The state of a recovery: latents, the optimizer, validations, and the best latents so far."""

    def __init__(self, student: Student, tuned: Sequence[Tuned], settings: Settings, file: Path) -> None:
        self.student, self.tuned, self.settings, self.file = student, tuned, settings, file
        self.latents = {f"{one.name}.{part}": latent for one in tuned for part, latent in one.latents.latents().items()}
        groups = [{"params": [latent], "times": times} for latent, times in self.latents.values()]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0)
        self.validations, self.made = Validations(), 0
        self.best: dict[str, Tensor] = {}
        self.updating = False
        """True while latents and moments do not belong to the same step."""
        self.written = time.monotonic()

    def step(self, ids: Sequence[Tensor], wanted: Sequence[Tensor], rate: float) -> None:
        """One step on sequences (T,)."""
        found = self.student.gradients(ids, wanted)
        for one in self.tuned:
            gradient = found.get(one.parameter)
            if gradient is not None:
                for part, of_part in one.latents.gradients(one.of(gradient).float()).items():
                    self.latents[f"{one.name}.{part}"][0].grad = of_part
        found.clear()
        nn.utils.clip_grad_norm_([latent for latent, _ in self.latents.values()], LARGEST_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        self.updating = True
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.install()
        self.made += 1
        self.updating = False

    def install(self) -> None:
        """Give the student what would be stored."""
        parameters = {one.parameter: self.student.model.model.get_parameter(one.parameter) for one in self.tuned}
        with torch.no_grad():
            run_all(lambda one: one.install(parameters[one.parameter]), self.tuned)

    def validate(self, ids: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        divergence = self.student.divergence(ids, wanted)
        self.updating = True  # the best latents and their divergence belong together
        if self.validations.add(self.made, divergence):
            self.best = {name: latent.clone() for name, (latent, _) in self.latents.items()}
        self.updating = False
        log.info(progress_line(self.made, divergence))

    def restore(self) -> None:
        """Go back to the best latents."""
        for name, latent in self.best.items():
            self.latents[name][0].copy_(latent)

    def save(self) -> None:
        """Write the state to the file."""
        validations = torch.tensor(list(self.validations.divergences.items()), dtype=torch.float64)
        tensors = {"validations": validations.view(-1, 2), "made": torch.tensor(self.made)}
        for name, (latent, _) in self.latents.items():
            tensors |= {f"latent.{name}": latent, f"best.{name}": self.best[name]}
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(latent, {}).items()}
        write_tensors(self.file, {name: tensor.cpu() for name, tensor in tensors.items()})
        self.written = time.monotonic()

    def load(self) -> None:
        """Go on from the file, if there is one."""
        if not self.file.is_file():
            return
        kept = map_file(self.file)
        self.made = int(kept["made"])
        self.validations = Validations({int(step): found for step, found in kept["validations"].tolist()})
        for name, (latent, _) in self.latents.items():
            latent.copy_(kept[f"latent.{name}"])
            self.best[name] = kept[f"best.{name}"].to(latent, copy=True)
            if f"exp_avg.{name}" in kept:
                self.optimizer.state[latent] = {
                    key: kept[f"{key}.{name}"].clone().to(latent.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        log.info(f"Resuming the recovery after {self.made} of {self.settings.recover} steps.")
        self.install()

    def run(self, text: "Text", progress: Progress) -> None:
        """Train until no progress is made any more, or all steps are. Afterwards the latents are the best."""
        steps = self.settings.recover
        assert self.settings.recover_lr is not None
        schedule = rates(steps, self.settings.recover_lr)
        with progress.stage("Recovering", steps, done=self.made) as step:
            try:
                while True:
                    is_new = self.made not in self.validations.divergences
                    if is_new and (self.made == 0 or is_checked(self.made, steps)):
                        self.validate(*text.validation)
                    if self.made == steps:
                        break
                    if not self.validations.goes_on():
                        log.info(f"Recovering: the last validations show no progress; {self.made} steps were made.")
                        break
                    self.step(*text.batch(self.made), schedule[self.made])
                    if time.monotonic() - self.written > SECONDS_BETWEEN_STATES:
                        self.save()
                    step()
            except BaseException:
                if self.best and not self.updating:
                    self.save()
                raise
        self.restore()


@dataclass(frozen=True)
class Text:
    """Sequences (T,) to train on and to validate on, each with the outputs (T, D) of the dense model's last block."""

    ids: Sequence[Tensor]
    wanted: Sequence[Tensor]
    order: Sequence[Tensor]
    """The numbers of the sequences of each step."""
    validation: tuple[Sequence[Tensor], Sequence[Tensor]]

    def batch(self, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """The sequences of a step, and the outputs."""
        numbers = self.order[step].tolist()
        return [self.ids[i] for i in numbers], [self.wanted[i] for i in numbers]
