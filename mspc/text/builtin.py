"""Text that every Python carries: its language reference topics and its library source.

It is the `builtin` text source, so that calibration and evaluation work with no download. The documents depend on the
Python version only (parts that distributions split off, such as `test` and `tkinter`, are left out). A hash of the
document's name decides its split, so a module that is held out in one Python version is held out in all of them.
"""

import hashlib
import pkgutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from typing import Literal

Split = Literal["calibration", "heldout"]

# Often packaged apart from the interpreter, removed in some version, or tables rather than text.
# fmt: off
EXCLUDED_PACKAGES = frozenset((
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "pydoc_data", "test", "this",
    "tkinter", "turtledemo", "venv",
))
# fmt: on
HELDOUT_SHARE = 0.1


def documents(split: Split) -> list[str]:
    """The documents of one split, in an order that mixes topics and modules and is the same for a Python version."""
    named = sorted(_named_documents(), key=lambda item: _digest(item[0]))
    return [text for name, text in named if split_of(name) == split]


def split_of(name: str) -> Split:
    """The split that a document's name (`json.decoder`, `pydoc_data.topics.with`) belongs to."""
    return "heldout" if _digest(name)[-1] < 256 * HELDOUT_SHARE else "calibration"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _named_documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for key, text in topics.items():
        yield f"pydoc_data.topics.{key}", text
    for name in sorted(sys.stdlib_module_names - EXCLUDED_PACKAGES):
        if not name.startswith("_sysconfigdata"):  # how this interpreter was built
            yield from module_sources(name, _find(name))


def _find(name: str) -> ModuleSpec | None:
    """The module of the standard library, whatever else of its name is on the path, and even if it is frozen."""
    return PathFinder.find_spec(name, [sysconfig.get_path("stdlib")])


def _source(name: str, spec: ModuleSpec) -> str | None:
    get_source = getattr(spec.loader, "get_source", None)  # built-in modules have none
    try:
        return get_source(name) if get_source else None
    except (SyntaxError, ImportError):  # deliberately broken files among the tests of Python itself
        return None


def module_sources(name: str, spec: ModuleSpec | None) -> Iterator[tuple[str, str]]:
    """`(dotted name, source)` of a module and all below it, test packages left out; nothing is imported."""
    if spec is None:
        return
    source = _source(name, spec)
    if source:
        yield name, source
    for child in sorted(pkgutil.iter_modules(spec.submodule_search_locations or []), key=lambda child: child.name):
        if child.name in ("test", "tests"):
            continue
        child_name = f"{name}.{child.name}"
        yield from module_sources(child_name, child.module_finder.find_spec(child_name, None))
