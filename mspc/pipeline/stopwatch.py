"""Seconds of a run, as a whole and by stage, which a file keeps so that a resumed run adds to them."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mspc.progress import Progress, Step

SECONDS = "seconds.json"
"""Name of the file."""
SECONDS_BETWEEN_WRITES = 0.5


class Stopwatch:
    """Progress that is shown by another one, and timed. What a kill loses is the time since the last step."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown
        self.begin = self.written = time.monotonic()
        self.earlier = 0.0
        self.stages: dict[str, float] = {}
        """Seconds by stage, in the order in which they were entered first."""
        self.file: Path | None = None

    @property
    def stopped(self) -> bool:
        """As the shown progress says."""
        return self.shown.stopped

    @property
    def seconds(self) -> float:
        """Seconds of this run and of the earlier ones that it continues."""
        return self.earlier + time.monotonic() - self.begin

    def keep_in(self, file: Path) -> None:
        """Keep the seconds in a file, after those that it has of earlier runs."""
        self.file = file
        with suppress(
            OSError, ValueError, TypeError, AttributeError, KeyError
        ):  # a damaged file costs only its seconds
            kept = json.loads(file.read_text(encoding="utf-8"))
            seconds, stages = float(kept["seconds"]), {name: float(value) for name, value in kept["stages"].items()}
            self.earlier += seconds
            self.stages = {
                name: stages.get(name, 0.0) + self.stages.get(name, 0.0)
                for name in dict.fromkeys([*stages, *self.stages])
            }
        self._write()

    @contextmanager
    def stage(
        self, title: str, total: int, *, in_blocks: bool = False, done: int = 0, seconds: float = 0.0
    ) -> Iterator[Step]:
        before = self.stages.setdefault(title, 0.0) + seconds
        begin = time.monotonic()

        def note() -> None:
            self.stages[title] = before + time.monotonic() - begin

        with self.shown.stage(title, total, in_blocks=in_blocks, done=done, seconds=before) as shown:

            def step(matrix: str = "", row: Mapping[str, Any] | None = None) -> None:
                note()
                if time.monotonic() - self.written > SECONDS_BETWEEN_WRITES:
                    self._write()
                shown(matrix, row)

            try:
                yield step
            finally:
                note()
                self._write()

    def _write(self) -> None:
        """Write the file, without waiting for the disk: a lost one costs nothing but a few seconds in a report."""
        if self.file is None:
            return
        self.written = time.monotonic()
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"seconds": self.seconds, "stages": self.stages}), encoding="utf-8")
            os.replace(temporary, self.file)
