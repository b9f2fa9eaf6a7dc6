"""The journal of a run that is under way, so that no solved block is lost: one JSON object a line, flushed to disk.

The first line says what the run is (recipe, source, calibration); every other line commits one file of solved matrices
with its digest, and the last one may commit all recovered matrices. A line that a crash cut short, or whose file has
another digest, is ignored with all that follow.
"""

import json
import os
from pathlib import Path
from typing import Any

from mspc.errors import InputError, StorageError
from mspc.storage.files import sha256_of, sync_folder, write_text

NAME = "journal.jsonl"


class Journal:
    """An open journal. `entries` are the commits whose files are whole, in order."""

    def __init__(self, folder: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        self.path = folder / NAME
        self.entries = entries
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in [header, *entries]))

    @classmethod
    def start(cls, folder: Path, header: dict[str, Any]) -> "Journal":
        return cls(folder, header, [])

    @classmethod
    def followed(cls, folder: Path, entries: list[dict[str, Any]]) -> "Journal":
        """The journal as it is for a rank that does not write it."""
        journal = cls.__new__(cls)
        journal.path, journal.entries = folder / NAME, entries
        return journal

    @classmethod
    def resume(cls, folder: Path, header: dict[str, Any]) -> "Journal":
        """Raises InputError, naming the differences, when the journal is that of another run."""
        lines = _whole_lines(folder / NAME)
        if not lines:
            return cls.start(folder, header)
        cls.compare(folder, lines[0], header)
        entries: list[dict[str, Any]] = []
        for entry in lines[1:]:
            if not all(_is_whole(folder, part) for part in (entry, *entry.get("recovered", ()))):
                break
            entries.append(entry)
        return cls(folder, header, entries)

    @staticmethod
    def header_in(folder: Path) -> dict[str, Any] | None:
        """The header of the run that is under way in a folder; None without one."""
        lines = _whole_lines(folder / NAME)
        return lines[0] if lines else None

    @staticmethod
    def has_plan(folder: Path) -> bool:
        """Tell if a folder has a journal with a whole first commit, which is that of the plan."""
        lines = _whole_lines(folder / NAME)
        return len(lines) > 1 and _is_whole(folder, lines[1])

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The commits of solved blocks; the first commit of all is that of the plan."""
        return [entry for entry in self.entries if "block" in entry]

    @property
    def num_solved(self) -> int:
        """The number of solved matrices."""
        return sum(len(entry["matrices"]) for entry in self.blocks)

    @property
    def outer(self) -> dict[str, Any] | None:
        """The commit of the matrices outside of the blocks, their rows under `outer`."""
        return next((entry for entry in self.entries if "outer" in entry), None)

    @property
    def recovery(self) -> dict[str, Any] | None:
        """The outcome of a recovery, once it is committed."""
        return next((entry["recovery"] for entry in self.entries if "recovery" in entry), None)

    @property
    def results(self) -> list[dict[str, Any]]:
        """The blocks as they are to be stored: the recovered ones, if any are, else the solved ones."""
        recovered = [block for entry in self.entries for block in entry.get("recovered", ())]
        return recovered or self.blocks

    def commit(self, entry: dict[str, Any]) -> None:
        """Append one entry durably; its file must be on disk already."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"Cannot write {self.path} ({error}); what was finished is kept: --resume.") from error
        self.entries.append(entry)

    @staticmethod
    def differences(before: dict[str, Any], header: dict[str, Any]) -> list[str]:
        """The differences between two headers in words. Recipes do not count, as the settings follow from them."""
        now = {key: value for key, value in json.loads(json.dumps(header)).items() if key != "recipe"}
        return _differences({key: before.get(key) for key in now}, now)

    @staticmethod
    def compare(folder: Path, before: dict[str, Any], header: dict[str, Any]) -> None:
        """Raises InputError, naming the differences, when a folder's header (or manifest) is that of another run."""
        if differences := Journal.differences(before, header):
            raise InputError(
                f"{folder} holds a run that differs from this one: {'; '.join(differences)}. Give the same options to "
                "--resume, or start anew with --overwrite."
            )

    @staticmethod
    def discard(folder: Path) -> None:
        (folder / NAME).unlink(missing_ok=True)
        sync_folder(folder)


def _is_whole(folder: Path, part: dict[str, Any]) -> bool:
    """Tell if a file is there, with the digest of its commit."""
    file = folder / part["file"]
    return file.is_file() and sha256_of(file) == part["sha256"]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _differences(before: dict[str, Any], now: dict[str, Any], at: str = "") -> list[str]:
    """`recipe.sparsity was 0.5 and is 0.6`, for every leaf that differs."""
    found = []
    for key in sorted(now if at == "source." else before.keys() | now.keys()):  # a manifest says more about its source
        old, new, path = before.get(key), now.get(key), f"{at}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{path}.")
        elif old != new:
            found.append(f"{path} was {old!r} and is {new!r}")
    return found
