"""The output folder of a run: it must be free to write in, and only a whole output replaces an older one."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mspc.errors import InputError, StorageError
from mspc.sizes import in_words
from mspc.storage.files import sync_folder
from mspc.storage.manifest import MANIFEST, is_artifact


def working_folder(out: Path, *, resume: bool, overwrite: bool) -> Path:
    """The folder to write in, which `made_and_held` makes. Raises InputError when `out` must not be touched.

    A new output is written in place. One that replaces an older output is written next to it, as `.NAME.new`, and takes
    its place when it is whole (`publish`). --resume continues in the folder that exists, `.NAME.new` first.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other: continue the old run, or replace it?")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out needs a folder.")
    new = sibling(out, "new")
    if out.is_dir():
        with held(out):
            pass
    recover(out)
    occupied = out.is_dir() and not is_empty(out)
    if occupied and not is_artifact(out):
        raise InputError(f"{out} is not empty and was not written by mspc; choose another --out.")
    if occupied and not (resume or overwrite):
        if (out / MANIFEST).is_file():
            raise InputError(f"{out} holds a finished artifact. Choose another --out, or replace it with --overwrite.")
        raise InputError(f"{out} holds an unfinished run. Continue it with --resume, or replace it with --overwrite.")
    if not resume and (new / MANIFEST).is_file():
        raise InputError(f"{new} holds a finished artifact that could not be moved to {out}. Move it, or use --resume.")
    if not resume:  # an earlier run that was cut off is not needed then
        shutil.rmtree(new, ignore_errors=True)
    return new if (occupied and overwrite) or new.is_dir() else out


@contextmanager
def made_and_held(folder: Path) -> Iterator[None]:
    """Make a folder with those that it is in, and keep other processes from writing in it.

    On an error, what was made here is removed if it is empty, but never while another process holds the folder.
    """
    place, made = folder.resolve(), list[Path]()
    try:
        for path in reversed([path for path in (place, *place.parents) if not path.exists()]):
            with suppress(FileExistsError):  # another process was first
                path.mkdir()
                made.insert(0, path)
    except OSError as error:
        _remove_empty(made)
        raise StorageError(f"Cannot make {folder}: {error}.") from error
    with held(place):
        try:
            yield
        except BaseException:
            _remove_empty(made)
            raise


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        with suppress(OSError):
            path.rmdir()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from writing in a folder. Raises InputError when one does already."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go when the process ends
        yield
    except BlockingIOError as error:
        raise InputError(f"{folder} is being written by another mspc process; wait for it, or stop it.") from error
    finally:
        os.close(descriptor)


OWN = ".mspc"
"""Suffix of working folders inside an output that has no room for siblings."""


def is_empty(out: Path) -> bool:
    """True if a folder holds nothing but what a killed run of mspc left there."""
    return all(path.suffix in (".tmp", OWN) for path in out.iterdir())


def swaps_inside(out: Path) -> bool:
    """True for a folder that cannot be renamed: a mount point, or one whose parent is not writable."""
    place = out.resolve()
    return place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK | os.X_OK))


def sibling(out: Path, ending: str) -> Path:
    """`.NAME.ending` in the parent of a folder, also if the folder was given as `.` or by a link.

    It is `.ending.mspc` inside a folder that cannot be renamed.
    """
    folder = out.resolve()
    return folder / f".{ending}{OWN}" if swaps_inside(out) else folder.with_name(f".{folder.name}.{ending}")


def publish(folder: Path, out: Path) -> None:
    """Move a finished folder to `out`; an older output there is removed last."""
    old, place = sibling(out, "old"), out.resolve()
    try:
        if folder.parent == place:
            _swap_inside(folder, place, old)
        elif folder != out:
            shutil.rmtree(old, ignore_errors=True)
            if place.exists():
                place.rename(old)
            folder.rename(place)
            sync_folder(place.parent)
    except OSError as error:
        raise StorageError(f"The output is complete in {folder}, but cannot be moved to {out} ({error}).") from error
    shutil.rmtree(old, ignore_errors=True)


def _swap_inside(folder: Path, place: Path, old: Path) -> None:
    """Exchange the content of `place` for that of `folder` inside it. `recover` finishes it, or puts the old back."""
    old.mkdir(exist_ok=True)
    for path in sorted(place.iterdir()):
        if path.suffix != OWN:
            path.rename(old / path.name)
    whole = folder.rename(sibling(place, "whole"))
    sync_folder(place)
    _empty_into(whole, place)


def _empty_into(folder: Path, place: Path) -> None:
    for path in sorted(folder.iterdir()):
        path.rename(place / path.name)
    folder.rmdir()
    sync_folder(place)


def recover(out: Path) -> None:
    """Put the older folder back, or remove it, where a process was killed inside `publish`.

    Raises InputError when another process is inside `publish`: between its renames the folders look the same.
    """
    new, old, place = sibling(out, "new"), sibling(out, "old"), out.resolve()
    if new.is_dir():
        with held(new):
            pass
    if (whole := sibling(out, "whole")).is_dir():
        _empty_into(whole, place)
        shutil.rmtree(old, ignore_errors=True)
    if not old.is_dir():
        return
    if old.parent == place:
        _empty_into(old, place)
    elif not place.exists() or (place.is_dir() and not any(place.iterdir())):  # the new output has not taken its place
        old.rename(place)
    elif not new.is_dir():  # the new output has taken its place
        shutil.rmtree(old, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises StorageError when the disk has fewer than `needed` free bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder} has {in_words(free)} free, and the output needs about {in_words(needed)}: free some space "
            "or choose another --out."
        )
