"""`mspc eval --tasks`: models asked one after the other, and their answers as a table or JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mspc.cli.console import print_json, print_table, reported
from mspc.errors import InputError

TASKS = "With --tasks"


def refuse(options: Mapping[str, object], when: str) -> None:
    """Raises InputError for the first option that was given, as it has no effect."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} has no effect {when}. Leave it out.")


def ask(
    paths: list[str],
    tasks: str,
    against: str | None,
    on_text: Mapping[str, object],
    options: Mapping[str, Any],
    as_json: bool,
    debug: bool,
) -> None:
    """Evaluate models on tasks, the reference once, and print the answers. `on_text` are options that must be None."""
    results: list[tuple[str, Any]] = []
    with reported(debug):
        refuse(on_text, "with --tasks")
        from mspc.bench.tasks import evaluate_tasks

        given = {name: value for name, value in options.items() if value is not None}
        try:
            reference = None if against is None else evaluate_tasks(against, tasks, **given)
            for path in paths:
                results.append((path, evaluate_tasks(path, tasks, against=reference, **given)))
        finally:  # what was measured is shown when a later path fails
            _show(results, against, as_json, several=len(paths) > 1)


def _show(results: list[tuple[str, Any]], against: str | None, as_json: bool, several: bool) -> None:
    if not results:
        return
    from mspc.storage.manifest import was_recovered

    if as_json:
        rows = [
            {"path": path, **result.to_dict()} | ({"recovered": True} if was_recovered(Path(path)) else {})
            for path, result in results
        ]
        print_json({"models": rows} if several else {name: rows[0][name] for name in rows[0] if name != "path"})
        return
    from mspc.cli.tables import task_table

    named = [(path + " (recovered)" * was_recovered(Path(path)), result) for path, result in results]
    print_table(task_table(named, against))
