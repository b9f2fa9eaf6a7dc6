"""Progress of a run: stages that count their steps, shown on a console or handed to a callable as events.

Messages go through `logging.getLogger("mspc")`; the command line attaches a handler that prints them to stderr.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from mspc.errors import InputError, Stopped

SECONDS_BETWEEN_LINES = 10.0

log = logging.getLogger("mspc")


@dataclass(frozen=True)
class Event:
    """One step of a stage, or its beginning (`done` is 0, or what an earlier run did before it was cut off)."""

    stage: str
    done: int
    total: int
    matrix: str = ""
    """Name of the matrix, file or tensor that the step has finished."""
    row: Mapping[str, Any] | None = None
    """While matrices are compressed: target, error (before `reconstruct`) and damping of this one,
    under their names in the manifest."""


class Step(Protocol):
    """Counts one step of a stage."""

    def __call__(self, matrix: str = "", row: Mapping[str, Any] | None = None) -> None: ...


class Progress(Protocol):
    """Shows stages of work. A stage gives a function to call after each of its `total` steps."""

    @property
    def stopped(self) -> bool:
        """True once the run was asked to stop."""

    def stage(
        self, title: str, total: int, *, in_blocks: bool = False, done: int = 0, seconds: float = 0.0
    ) -> AbstractContextManager[Step]:
        """A stage `in_blocks` is not left at a step: it looks at `stopped` after each block.

        `done` steps were made, and `seconds` spent, by earlier runs that were cut off.
        """


class Silent:
    """Shows nothing."""

    stopped = False

    @contextmanager
    def stage(
        self, title: str, total: int, *, in_blocks: bool = False, done: int = 0, seconds: float = 0.0
    ) -> Iterator[Step]:
        yield lambda matrix="", row=None: None


class Callback:
    """Hands each step to a callable. One that returns False stops the run: `Stopped` is raised."""

    def __init__(self, on_event: Callable[[Event], object]) -> None:
        self.on_event, self.stopped = on_event, False

    @contextmanager
    def stage(
        self, title: str, total: int, *, in_blocks: bool = False, done: int = 0, seconds: float = 0.0
    ) -> Iterator[Step]:
        def step(matrix: str = "", row: Mapping[str, Any] | None = None) -> None:
            nonlocal done
            done += 1
            self._tell(Event(title, done, total, matrix, row), in_blocks)

        self._tell(Event(title, done, total), in_blocks)
        yield step

    def _tell(self, event: Event, in_blocks: bool) -> None:
        answer = self.on_event(event)
        self.stopped = self.stopped or (type(answer).__name__ in ("bool", "bool_") and not answer)
        if self.stopped and not in_blocks:
            raise Stopped.at(event.stage)


class Console:
    """A progress bar on a terminal. In a log: one line per stage, and one every ten seconds."""

    stopped = False

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console as RichConsole

        self.console = console or RichConsole(stderr=True)

    @contextmanager
    def stage(
        self, title: str, total: int, *, in_blocks: bool = False, done: int = 0, seconds: float = 0.0
    ) -> Iterator[Step]:
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=total, completed=done, detail="")
                bar.tasks[-1].start_time = (bar.tasks[-1].start_time or bar.get_time()) - seconds
                yield lambda matrix="", row=None: bar.update(task, advance=1, detail=matrix)
            return
        begin = last = time.monotonic()

        def step(matrix: str = "", row: Mapping[str, Any] | None = None) -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self._print(f"{title}: {done}/{total} {matrix}".rstrip())

        yield step
        self._print(f"{title}: done in {seconds + time.monotonic() - begin:.1f} s")

    def _bar(self) -> Any:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )  # fmt: skip

        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=self.console,
        )

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def as_progress(progress: "bool | Callable[[Event], object] | Progress") -> Progress:
    """True: the console; False: nothing; a callable gets an `Event` after each step."""
    if isinstance(progress, bool):
        return Console() if progress else Silent()
    if callable(progress):
        return Callback(progress)
    if not hasattr(progress, "stage"):
        raise InputError(f"progress must be True, False or a function that takes an mspc.Event, not {progress!r}.")
    return progress
