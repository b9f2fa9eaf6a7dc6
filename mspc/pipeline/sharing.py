"""A run that ranks share: what they must agree on before any work, and what only the first one does."""

import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from mspc import ranks
from mspc.errors import InputError, MspcError
from mspc.pipeline.calibration import Drawn
from mspc.settings import Settings
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.journal import Journal
from mspc.storage.output_folder import made_and_held
from mspc.text.tokens import Tokens
from mspc.version import __version__

SECONDS_UNTIL_SEEN = 20.0
"""Time after which a file on shared storage is seen by all machines."""


@contextmanager
def held_by_first(folder: Path) -> Iterator[None]:
    """`made_and_held` on the first rank, for all of them."""
    with made_and_held(folder) if ranks.is_first() else nullcontext():
        ranks.barrier()  # it is there
        yield


def check_ranks(settings: Settings, folder: Path, others: Mapping[str, Path | None]) -> None:
    """Raises InputError where ranks cannot share a run: other versions, a folder that some do not see, or an option.

    `folder` is the output, and `others` are folders that all must see, too, by option.
    """
    if ranks.size() == 1:
        return
    if settings.reconstruct:
        raise InputError("--reconstruct tunes a block on all of the text at once. Leave it out, or use one rank.")
    if settings.has_time_budget and settings.timings is None:
        raise InputError("Ranks would time products at once. Make a file with `mspc timings` first, for --timings.")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {settings.device} is one device, and each rank has its own. Leave --device out.")
    least = min(settings.num_sequences, settings.sensitivity_sequences)
    if least < ranks.num_groups():
        raise InputError(
            f"{least} sequences are too few for {ranks.size()} ranks. Give at least {ranks.num_groups()}: "
            "--num-sequences and --sensitivity-sequences."
        )
    own = {"mspc": __version__, **{name: version(name) for name in ("torch", "transformers")}}
    first = ranks.by_first(lambda: own)
    if own != first:
        raise InputError(f"{_here()} has {_in_words(own)}, and rank 0 has {_in_words(first)}. Install the same.")
    check_shared(folder, "--out")
    for option, other in others.items():
        if other is not None:
            check_shared(other, option)


def check_shared(folder: Path, option: str) -> None:
    """Raises InputError on a rank that does not see what the first one writes to a folder."""

    def mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".{uuid.uuid4().hex}.tmp"
        path.touch()
        return str(path)

    path, begin = Path(ranks.by_first(mark)), time.monotonic()
    while not path.is_file():
        if time.monotonic() - begin > SECONDS_UNTIL_SEEN:
            raise InputError(
                f"{_here()} does not see what rank 0 writes to {folder}. Give {option} a folder that all of them share."
            )
        time.sleep(0.1)
    ranks.barrier()
    if ranks.is_first():
        path.unlink(missing_ok=True)


def digests_of(checkpoint: Checkpoint, step: Callable[[str], None]) -> dict[str, str]:
    """The sha256 of each weight file; the ranks of a machine share the files.

    Raises InputError for NaN or infinity in weights, and if the files of another machine differ.
    """
    files, place = list(checkpoint.shards()), ranks.place()
    own = {}
    for file, digest in checkpoint.fingerprint(files[place.local_rank :: place.local_size]):
        own[file] = digest
        step(file)
    of_machines: dict[int, dict[str, str]] = {}
    for first_rank, digests in ranks.of_each((place.rank - place.local_rank, own)):
        of_machines.setdefault(first_rank, {}).update(digests)
    mine = of_machines[place.rank - place.local_rank]
    for file in sorted(of_machines[0].keys() | mine.keys()):
        if of_machines[0].get(file) != mine.get(file):
            raise InputError(f"{checkpoint.folder}: {file} of {_here()} is not that of rank 0. Give all the same.")
    return {file: mine[file] for file in files}


def check_same(header: dict[str, Any]) -> None:
    """Raises InputError on a rank whose run is not that of the first one."""
    first = ranks.by_first(lambda: header)
    if ranks.size() > 1 and (differences := Journal.differences(first, header)):
        raise InputError(f"{_here()} has another run than rank 0: {'; '.join(differences)}. Give all the same.")


def drawn_by_first(draw: Callable[[], Drawn]) -> Drawn:
    """The text of the run, which the first rank reads for all."""
    if ranks.size() == 1:
        return draw()
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    if ranks.is_first():
        with ranks.alone():
            drawn = draw()
        told = asdict(replace(drawn, calibration=replace(drawn.calibration, ids=None), validation=None, test=None))  # type: ignore[arg-type]
        parts = {"calibration": drawn.calibration.ids, "validation": drawn.validation, "test": drawn.test}
        tensors = {name: ids for name, ids in parts.items() if ids is not None}
    told, tensors = ranks.from_rank(0, told, tensors)
    begin = tuple(told["calibration"]["begin"])
    calibration = Tokens(tensors["calibration"], told["calibration"]["source"], begin)
    return Drawn(calibration, tensors.get("validation"), tensors.get("test"))


def journal_of(open_journal: Callable[[], Journal], folder: Path) -> Journal:
    """The journal that the first rank opens and writes; the others know its entries."""
    opened: list[Journal] = []

    def entries() -> list[dict[str, Any]]:
        opened.append(open_journal())
        return opened[0].entries

    known = ranks.by_first(entries)
    return opened[0] if opened else Journal.followed(folder, known)


def check_equal(name: str, digest: str) -> None:
    """Raises MspcError on a rank whose result is not that of the first one."""
    if ranks.from_rank(0, digest)[0] != digest:
        raise MspcError(
            f"{name}: {_here()} computes other bytes than rank 0. Use machines of one kind, with the same versions."
        )


def _here() -> str:
    return f"rank {ranks.rank()} on {platform.node()}"


def _in_words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
