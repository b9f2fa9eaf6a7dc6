"""Files that are written whole or not at all, and their digests."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mspc.errors import StorageError

LONGEST_NAME = 240
"""Bytes of a name to which an ending fits; file systems take 255."""


def cache_folder() -> Path:
    """The folder for what can be made again: `mspc` in XDG_CACHE_HOME, or else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mspc"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, flush it to disk and rename it: `path` is either whole or as it was."""
    name = path.name if len(os.fsencode(path.name)) <= LONGEST_NAME else hashlib.sha256(os.fsencode(path)).hexdigest()
    temporary = path.with_name(f".{name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes its files private
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # a read-only file system refuses to remove even what is not there
            temporary.unlink()
        raise StorageError(
            f"Cannot write {path} ({error}); free some space or choose another --out. What was finished is kept: run "
            "the same command again with --resume."
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))  # bytes of names that are no text
