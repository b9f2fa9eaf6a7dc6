"""One run of `compress`: measure, plan, solve and write; or continue an earlier run that was cut off."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc import ranks
from mspc.errors import InputError, Stopped
from mspc.model.hub import choose_device, choose_sequence_length, load_config, resolve
from mspc.model.matrices import dense_notes
from mspc.model.open import open_model
from mspc.model.streamed import StreamedModel
from mspc.model.vocabulary import check_range, check_tokenizer_of, tokenizer_for
from mspc.passes.blocks import own_batches
from mspc.passes.trial import irregular_layers, outside_notes
from mspc.pipeline.announcing import announce
from mspc.pipeline.calibration import Calibration, Drawn, draw, with_ids
from mspc.pipeline.copying import copy_rest
from mspc.pipeline.cost import compare, evaluation_to_dict, peak_memory, warn_if_guessing
from mspc.pipeline.in_time import TimeProducts, choices_named, identity_of, is_planned, keep_timings, time_budget_of
from mspc.pipeline.outer import inputs_of_head, outer_notes, planned_outer, quantize_outer, with_outer
from mspc.pipeline.own_text import Author
from mspc.pipeline.reconstruct import batch_size, reconstruction_line
from mspc.pipeline.recovery_stage import recover_all
from mspc.pipeline.reopening import discard_work, is_finished
from mspc.pipeline.results import results
from mspc.pipeline.route_checks import check_route
from mspc.pipeline.sharing import check_ranks, check_same, digests_of, drawn_by_first, journal_of
from mspc.pipeline.solve_blocks import solve_blocks, solved_weights
from mspc.pipeline.stopwatch import SECONDS, Stopwatch
from mspc.pipeline.summary import DEFAULT_GOAL, report, unused_note
from mspc.pipeline.training_checks import check_training
from mspc.planning.allocation import allocate, choose_group_size, possible_targets
from mspc.planning.kept_zeros import plan_of_zeros
from mspc.planning.plan_checks import check_targets
from mspc.planning.plan_file import read_plan, write_plan
from mspc.planning.planner import PlanChoice, Planner, mixture_lines
from mspc.progress import Progress, log
from mspc.recipe import Recipe
from mspc.solvers import REVISION
from mspc.storage.artifact import MEASUREMENTS, OWN_TEXT, PLAN, RECIPE, UNCHANGED
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.config_json import config_digest
from mspc.storage.dequantized import dense_config, open_checkpoint, origin_note
from mspc.storage.files import sha256_of, write_json, write_text
from mspc.storage.journal import Journal
from mspc.storage.manifest import FORMAT_VERSION, MANIFEST, is_artifact
from mspc.storage.output_folder import publish
from mspc.storage.sparse_export import is_sparse_export
from mspc.text.given import check_ids
from mspc.text.tokens import Tokens, name_of
from mspc.types import MatricesByBlock, Matrix, PlannedMatrix, flatten
from mspc.version import __version__


@dataclass
class Run:
    """One call of `compress`, checked before anything is written."""

    recipe: Recipe
    out: Path
    resume: bool
    check_exports: Callable[[list[PlannedMatrix], dict[str, Any], Path], None]
    """Raises InputError if an export that was asked for cannot hold this plan, or this config.json and its folder."""
    time_products: TimeProducts
    progress: Progress
    tokenizer: Any
    calibration: Calibration | None
    model_name: str
    threads: int = 1
    """Number of threads that share the work, for the manifest."""
    force: bool = False  # to start although it does not fit in memory

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.progress)
        self.progress = self.watch
        self.source = resolve(self.model_name)
        is_local = Path(self.model_name).expanduser().exists()
        self.source_name = self.source.resolve().name if is_local else self.model_name
        if is_artifact(self.source):
            raise InputError(f"{self.source} is an mspc artifact already. Compress the original checkpoint instead.")
        if is_sparse_export(self.source):
            raise InputError(f"{self.source} is a sparse export. Compress the original checkpoint instead.")
        self.config = config = load_config(self.source)
        if isinstance(self.calibration, str | Path):
            self.recipe = replace(self.recipe, calibration=str(self.calibration))
        elif self.calibration is not None and self.recipe.calibration is not None:
            raise InputError(
                f"calibration {self.recipe.calibration} of the recipe has no effect with the text given as "
                "calibration=. Leave one of the two out."
            )
        settings = self.recipe.settings()
        self.device = choose_device(settings.device)
        if isinstance(self.calibration, Tensor):
            self.calibration = check_ids(self.calibration, config.get_text_config().vocab_size)
            settings = with_ids(settings, self.calibration, self.recipe.asked())
        elif self.calibration is not None and not isinstance(self.calibration, str | Path):
            settings = replace(settings, calibration=name_of(self.calibration))
        length = choose_sequence_length(config, settings.sequence_length)
        self.settings = replace(settings, sequence_length=length)

    def compress(self, folder: Path, measurements: Path | None, spill: Path | None) -> None:
        """Write the artifact to `folder`, which is `out`, or its sibling until the new artifact is complete."""
        self.folder = folder
        settings, progress = self.settings, self.progress
        if not self.recipe.has_goal:
            log.info(DEFAULT_GOAL)
        checkpoint = open_checkpoint(self.source)
        model = self.open_model()
        if note := origin_note(self.config):
            log.info(note)
        self.unused = model.unused()
        irregular = irregular_layers(model)
        model.check_selection(settings.skip, settings.only, irregular, settings.include)
        matrices = model.matrices(*(selection := (settings.skip, irregular, settings.only, settings.include)))
        self.settings = settings = choose_group_size(settings, matrices)
        self.outer = planned_outer(model, settings, self.recipe.asked())
        self.check_early(model, matrices)
        check_ranks(settings, folder, {"--measurements": measurements})
        parts = settings, model, matrices, irregular, self.outer, self.threads
        planned = ranks.by_first(partial(is_planned, folder, self.resume))
        self.time_budget = None if planned else time_budget_of(*parts, self.time_products, progress)
        about = self.source, self.device, matrices, settings, self.given, self.threads
        announce(*about, spill, folder, self.force, self.resume)
        if ranks.size() > 1:
            _ = self.digests  # before the first rank alone may need them
        text = drawn_by_first(partial(self.draw_text, measurements))
        tokens = text.calibration
        check_same(header := self.header(tokens, model.needs_version_2(flatten(matrices))))
        planner = self.planner(checkpoint, tokens, text.validation, matrices, header, measurements, spill)
        planner.check(model)
        outer = outer_notes(settings, self.outer)
        for note in (*dense_notes(model.sorted_blocks(*selection)), *outside_notes(model), *outer):
            log.info(note)
        if self.unused:
            log.warning(unused_note(self.unused))
        if ranks.by_first(partial(is_finished, folder, self.out, header)):
            return
        journal = journal_of(partial(self.open_journal, model, tokens, header), folder)
        if journal.blocks:
            log.info(f"Resuming after {len(journal.blocks)} of {len(matrices)} blocks.")
        fisher = planner.fisher(model) if journal.num_solved < len(flatten(matrices)) else {}
        plan = self.plan(planner, model, journal, fisher)
        if ranks.is_first():
            compressed = [*flatten(matrices), *(one.outer.matrix for one in self.outer)]
            copy_rest(checkpoint, model, self.with_outer(plan), compressed, self.folder, progress)
        self.solve(model, tokens, matrices, plan, journal, spill, fisher)
        if ranks.is_first():
            with ranks.alone():
                self.complete(checkpoint, model, matrices, text, header, plan, journal, spill)

    def complete(
        self, checkpoint: Checkpoint, model: StreamedModel, matrices: MatricesByBlock, text: Drawn,
        header: dict[str, Any], plan: list[PlannedMatrix], journal: Journal, spill: Path | None,
    ) -> None:  # fmt: skip
        """Make an artifact of the solved blocks."""
        settings, progress, ids = self.settings, self.progress, text.calibration.ids
        if settings.recover:
            recover_all(self.open_for_training, text, settings, self.folder, journal, spill, progress)
        last = self.recovered(journal) or model
        inputs = partial(inputs_of_head, last, ids, matrices, solved_weights(self.folder, journal))
        quantize_outer(last, self.outer, settings, self.folder, journal, progress, inputs)
        evaluation = self.evaluate(model, text, matrices, journal, spill)
        manifest = self.write_manifest(header | {"evaluation": evaluation}, plan, checkpoint, model, journal)
        publish(self.folder, self.out)
        report(manifest)

    def draw_text(self, measurements: Path | None) -> Drawn:
        """The text of the run. Raises InputError for ids that the model does not have."""
        if isinstance(self.calibration, Tensor) or self.tokenizer is not None:
            check_tokenizer_of(self.source)  # it is not used, but it belongs to the artifact
        text = draw(self.settings, self.calibration, self.load_tokenizer, partial(self.own_text, measurements))
        if text.calibration.note:
            log.info(text.calibration.note)
        for ids in (text.calibration.ids, text.validation, text.test):
            if ids is not None:
                check_range(ids, self.config.get_text_config().vocab_size, text.calibration.source)
        return text

    def planner(
        self,
        checkpoint: Checkpoint,
        tokens: Tokens,
        validation: Tensor | None,
        matrices: list[list[Matrix]],
        header: dict[str, Any],
        measurements: Path | None,
        spill: Path | None,
    ) -> Planner:
        """The planner of this run. Without a folder for measurements they are kept in the unfinished output."""
        identity = {
            "source": [header["source"][key] for key in ("sha256", "config")],
            "calibration": [header["calibration"]["sha256"], list(tokens.ids.shape)],
        }
        kept = measurements or self.folder / MEASUREMENTS
        return Planner(
            self.settings, checkpoint, self.open_model, tokens.ids, validation, matrices, identity, kept, self.progress,
            saved_bytes=sum(one.saved_bytes for one in self.outer), time_budget=self.time_budget, spill=spill,
        )  # fmt: skip

    @cached_property
    def digests(self) -> dict[str, str]:
        """The sha256 of each weight file. Raises InputError for NaN or infinity in weights."""
        checkpoint = open_checkpoint(self.source)
        with self.progress.stage("Checking weights", len(checkpoint.shards())) as step:
            return digests_of(checkpoint, step)

    def own_text(self, measurements: Path | None, counts: Sequence[int]) -> Tokens:
        """Text that the model writes, which is kept like measurements."""
        identity, kept = [self.digests, config_digest(self.source)], measurements or self.folder / OWN_TEXT
        tokenizer, device = self.load_tokenizer(), self.device
        return Author(self.source, device, self.settings, tokenizer, identity, kept, self.progress).write(counts)

    def header(self, tokens: Tokens, needs_version_2: bool) -> dict[str, Any]:
        """The identity of the run: two runs with equal headers end with the same bytes."""
        return {
            "format_version": FORMAT_VERSION if needs_version_2 else 1,
            "mspc_version": __version__,
            "solvers": REVISION,
            "source": {"name": self.source_name, "sha256": self.digests, "config": config_digest(self.source)},
            "recipe": self.recipe.to_dict(),
            **identity_of(self.settings, self.folder),
            "plan": sha256_of(Path(self.settings.plan)) if self.settings.plan is not None else None,
            "calibration": {
                "source": tokens.source,
                "tokens": tokens.ids.numel(),
                "sha256": tokens.sha256,
                "bos": list(tokens.begin),
            },
        }

    def open_journal(self, model: StreamedModel, tokens: Tokens, header: dict[str, Any]) -> Journal:
        """Begin the folder of a run, or go on with it."""
        if not is_artifact(self.folder):  # a run that goes on has tried it
            warn_if_guessing(model, tokens, self.progress)
        journal = (Journal.resume if self.resume else Journal.start)(self.folder, header)
        kept = keep_timings(self.recipe, self.settings, self.folder, self.time_budget)
        write_text(self.folder / RECIPE, replace(kept, plan=PLAN if kept.plan else None).to_toml())  # plan's copy there
        self.watch.keep_in(self.folder / MEASUREMENTS / SECONDS)
        return journal

    def plan(
        self, planner: Planner, model: StreamedModel, journal: Journal, fisher: dict[str, Tensor]
    ) -> list[PlannedMatrix]:
        """The plan of the interrupted run, the user's, or a new one."""
        file = self.folder / PLAN
        if journal.entries:  # the plan is committed first
            return read_plan(file, flatten(planner.matrices))
        chosen = PlanChoice(self.given) if self.given else planner.plan(model, fisher)
        plan = self.checked(chosen.plan)
        how = {"chosen": chosen.name, "tried": chosen.divergences, **chosen.search, **planner.not_measured()}
        how |= {"time": self.time_budget.to_dict(plan)} if self.time_budget else {}
        if ranks.is_first():
            write_plan(file, plan)
            journal.commit({"file": PLAN, "sha256": sha256_of(file), "matrices": [], "allocation": how})
        ranks.barrier()
        plan = plan if ranks.is_first() else read_plan(file, flatten(planner.matrices))
        removed = [matrix.name for matrix in plan if matrix.target.pattern.sparsity == 1]
        if removed:
            log.warning(f"the plan removes {len(removed)} whole matrices, such as {removed[0]}.")
        if all(matrix.target.pattern.sparsity == 0 and matrix.target.grid is None for matrix in plan):
            log.warning("the plan prunes and quantizes nothing. Ask for a sparsity, bits, or a smaller size.")
        if self.settings.has_budget:
            for line in mixture_lines(plan):
                log.info(line)
        return plan

    def load_tokenizer(self) -> Any:
        return tokenizer_for(self.config, self.source, self.tokenizer)

    def open_model(self, *, eager: bool = False, replaced: Path | None = None) -> StreamedModel:
        return open_model(self.source, device=self.device, dtype=self.settings.dtype, eager=eager, replaced=replaced)

    def open_for_training(self) -> StreamedModel:
        """The model in a dtype whose gradients do not vanish."""
        model = self.open_model()
        if model.dtype != torch.float16:
            return model
        return open_model(self.source, device=self.device, dtype="float32")

    def given_plan(self, model: StreamedModel, matrices: MatricesByBlock) -> list[PlannedMatrix] | None:
        """The plan that the user gives, or that the zeros of the checkpoint give; None if one is to be made."""
        if self.settings.keep_zeros:
            return plan_of_zeros(model, matrices, self.settings, self.progress)
        return read_plan(Path(self.settings.plan), flatten(matrices)) if self.settings.plan is not None else None

    def checked(self, plan: list[PlannedMatrix]) -> list[PlannedMatrix]:
        """The plan, checked. Raises InputError, naming the matrix, for a target that it or an export cannot have."""
        check_targets(plan, self.settings)
        self.check_exports(self.with_outer(plan), self.raw_config(), self.source)
        return plan

    def with_outer(self, plan: Sequence[PlannedMatrix]) -> list[PlannedMatrix]:
        """The matrices of a plan, and those outside of the blocks."""
        return [*plan, *(one.planned for one in self.outer)]

    def raw_config(self) -> dict[str, Any]:
        """The content of config.json, as it is with dense weights."""
        return dense_config(json.loads((self.source / "config.json").read_text(encoding="utf-8")), self.source)

    def check_early(self, model: StreamedModel, matrices: MatricesByBlock) -> None:
        """Raises InputError, before anything is measured, for a plan or an export that could not be made."""
        self.given = self.given_plan(model, matrices)
        plan = self.given or allocate(self.settings, matrices, {})
        check_training(model, flatten(matrices), plan, self.settings)
        check_route(model, matrices, self.settings)
        if not self.settings.has_budget:
            self.checked(plan)
            return
        check_targets(plan, self.settings)
        with choices_named(self.settings):
            targets = self.with_outer(possible_targets(self.settings, matrices))
            self.check_exports(targets, self.raw_config(), self.source)

    def solve(
        self,
        model: StreamedModel,
        tokens: Tokens,
        matrices: MatricesByBlock,
        plan: Sequence[PlannedMatrix],
        journal: Journal,
        spill: Path | None,
        fisher: dict[str, Tensor],
    ) -> None:
        done = journal.num_solved
        if done == len(plan):  # cut off later, or reopened
            return
        block_of = {matrix.name: block for block, of_block in enumerate(matrices) for matrix in of_block}
        with self.progress.stage("Compressing", len(plan), in_blocks=True, done=done) as step:
            settings, size = self.settings, batch_size(*tokens.ids.shape) if self.settings.reconstruct else None
            batches = own_batches(model, tokens.ids, spill, size)
            needs_dense = settings.propagation or settings.reconstruct
            dense = own_batches(model, tokens.ids, spill, size) if needs_dense else ()
            solved = solve_blocks(
                model, batches, matrices, plan, settings, self.folder, journal, dense=dense, fisher=fisher, spill=spill
            )
            with closing(solved):  # an error in a step must not leave a block half written
                block = None
                for found in solved:
                    if self.progress.stopped and block_of[found.matrix.name] != block:
                        break  # the block is complete; closing waits until it is committed
                    block = block_of[found.matrix.name]
                    step(found.matrix.name, found.row())
        if self.progress.stopped:
            raise Stopped.at("Compressing")
        if settings.reconstruct:
            log.info(reconstruction_line(journal.blocks))

    def evaluate(
        self, model: StreamedModel, text: Drawn, matrices: MatricesByBlock, journal: Journal, spill: Path | None
    ) -> dict[str, Any] | None:
        """The part `evaluation` of the manifest; None without test text."""
        if text.test is None:
            return None
        begin, solved = len(text.calibration.begin), solved_weights(self.folder, journal)
        recovered = self.recovered(journal)
        outer = with_outer(recovered or model, self.folder, journal) if self.outer else None
        found = compare(model, text.test, begin, matrices, solved, spill, self.progress, recovered, outer)
        return evaluation_to_dict(found, text.calibration.source, text.test) if found else None

    def recovered(self, journal: Journal) -> StreamedModel | None:
        """The model with the norms and biases of a recovery; None if none made it better."""
        is_recovered = journal.recovery is not None and journal.recovery["best_step"] > 0
        return self.open_model(replaced=self.folder / UNCHANGED) if is_recovered else None

    def write_manifest(
        self,
        header: dict[str, Any],
        plan: Sequence[PlannedMatrix],
        checkpoint: Checkpoint,
        model: StreamedModel,
        journal: Journal,
    ) -> dict[str, Any]:
        cost = {
            "seconds": self.watch.seconds,
            "seconds_by_stage": self.watch.stages,
            "threads": self.threads,
            "peak_memory_bytes": peak_memory(),
            "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
        }
        manifest = header | results(self.settings, plan, checkpoint, model, journal, self.folder, cost)
        manifest["source"] = header["source"] | {"shards": checkpoint.shards()}
        if self.unused:
            manifest["unused_tensors"] = self.unused
        if self.settings.reconstruct:
            manifest["reconstruction"] = [part for entry in journal.blocks for part in entry["reconstruction"]]
        if journal.recovery is not None:
            manifest["recovery"] = journal.recovery
        write_json(self.folder / MANIFEST, manifest)
        discard_work(self.folder, manifest)
        return manifest
