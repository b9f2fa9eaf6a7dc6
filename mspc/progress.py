"""What a person sees while and after mspc works. Everything here goes to stderr; stdout is for results."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0

Step = Callable[[str], None]


class Reporter(Protocol):
    """Told of stages of work. `stage` gives a function to call after each of `total` steps, with what it did."""

    def stage(self, title: str, total: int) -> Any: ...

    def say(self, line: str) -> None: ...


class Silent:
    """Reports nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Step]:
        yield lambda detail: None

    def say(self, line: str) -> None:
        pass


class ConsoleReporter:
    """A progress bar on a terminal; a line a stage, and one every ten seconds, in a log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Step]:
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=total, detail="")
                yield lambda detail: bar.update(task, advance=1, detail=detail)
            return
        begin = last = time.monotonic()
        done = 0

        def step(detail: str) -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.say(f"{title}: {done}/{total} {detail}".rstrip())

        yield step
        self.say(f"{title}: done in {time.monotonic() - begin:.1f} s")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=self.console,
        )

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
