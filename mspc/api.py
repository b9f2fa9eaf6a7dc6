"""The public functions: compress a model, and export, verify, evaluate and load what comes of it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.exporting import check, export
from exporters.formats import load
from mspc.errors import InputError
from mspc.pipeline.run import Run
from mspc.progress import ConsoleReporter, Reporter
from mspc.recipe import Recipe
from mspc.storage.manifest import read_manifest
from mspc.storage.output_folder import held
from mspc.types import PlannedMatrix

EXPORTS = "exports"


@dataclass(frozen=True)
class Artifact:
    """A handle on a folder that `compress` wrote."""

    path: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.path)

    def export(
        self,
        format_name: str,
        out: str | Path,
        *,
        overwrite: bool = False,
        verified: bool = True,
        reporter: Reporter | None = None,
        **options: Any,
    ) -> Path:
        """Write the artifact in a format that a runtime loads, and verify it; see `exporters.formats.FORMATS`."""
        return export(
            self.path, format_name, Path(out), overwrite=overwrite, verified=verified, options=options,
            reporter=reporter or ConsoleReporter(),
        )  # fmt: skip


def compress(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    measurements: str | Path | None = None,
    spill: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    exports: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Artifact:
    """Prune, and round, the matrices of a checkpoint folder or hub id by their sensitivity.

    `measurements` is a folder in which sensitivities are kept for other budgets; `spill` one for activations that do
    not fit in memory. A run that was cut off goes on with `resume`; `overwrite` replaces an older artifact once the new
    one is whole. `exports` names formats to write to `out/exports/` as well. Raises the errors of `mspc.errors`.
    """
    reporter = reporter or ConsoleReporter()
    for name in exports:
        load(name)  # a mistake is told before any work

    def check_exports(plan: list[PlannedMatrix], config: dict[str, Any]) -> None:
        for name in exports:
            check(name, plan, config)

    run = Run(str(model), recipe or Recipe(), Path(out), resume, overwrite, check_exports, reporter)
    try:
        with held(run.folder):
            run.compress(Path(measurements) if measurements else None, Path(spill) if spill else None)
    except InputError:
        with suppress(OSError):  # goes only if it is empty: nothing was begun
            run.folder.rmdir()
        raise
    artifact = Artifact(Path(out))
    for name in exports:
        artifact.export(name, artifact.path / EXPORTS / name, overwrite=resume, reporter=reporter)
    return artifact
