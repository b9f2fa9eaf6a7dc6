"""The cgroups of Linux that this process is in: limits on cores and memory, in version 2 and version 1."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")


def folders(controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders that may have files of a controller for this process, and whether they are of version 2.

    A limit of a cgroup holds for those inside it. In a container the path of the process may not exist: its own
    cgroup is the root there.
    """
    lines = []
    with suppress(OSError):
        lines = OF_PROCESS.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [CGROUP, CGROUP / "unified"]
        elif controller in controllers.split(","):
            roots = list(dict.fromkeys((CGROUP / controller, CGROUP / controllers)))
        else:
            continue
        inner = Path(path.lstrip("/"))
        for root in roots:
            for folder in (root / inner, *(root / outer for outer in inner.parents)):
                yield folder, controllers == ""
