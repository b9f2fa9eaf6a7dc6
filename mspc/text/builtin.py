"""Text that every Python carries: its language reference topics and its library source.

It is the text source `builtin`, so calibration and `eval` need no download. The documents depend on the Python version
only; packages that distributions split off, such as `tkinter`, are left out. A hash of the document's name decides its
split, so a module that is test text in one Python version is test text in all of them.
"""

import hashlib
import pkgutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from typing import Literal

Split = Literal["calibration", "test"]

# Often packaged apart from the interpreter, removed in some version, or tables rather than text.
# fmt: off
EXCLUDED_PACKAGES = frozenset((
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "pydoc_data", "test", "this",
    "tkinter", "turtledemo", "venv",
))
# fmt: on
TEST_SHARE = 0.1


def documents(split: Split) -> list[str]:
    """The documents of one split. Their order mixes topics and modules, and is fixed for a Python version."""
    named = sorted(_named_documents(), key=lambda item: _digest(item[0]))
    return [text for name, text in named if split_of(name) == split]


def split_of(name: str) -> Split:
    """The split that a document's name (`json.decoder`, `pydoc_data.topics.with`) belongs to."""
    return "test" if _digest(name)[-1] < 256 * TEST_SHARE else "calibration"


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
    """The module of the standard library, even if it is frozen or another of its name is on the path."""
    return PathFinder.find_spec(name, [sysconfig.get_path("stdlib")])


def _source(name: str, spec: ModuleSpec) -> str | None:
    get_source = getattr(spec.loader, "get_source", None)  # built-in modules have none
    try:
        return get_source(name) if get_source else None
    except (SyntaxError, ImportError):  # deliberately broken files among the tests of Python itself
        return None


def module_sources(name: str, spec: ModuleSpec | None) -> Iterator[tuple[str, str]]:
    """`(dotted name, source)` of a module and all its submodules except test packages. Nothing is imported."""
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
