"""Plain English, as far as a word list can tell. `python tests/language.py [PATH...]` lists what offends.

Docstrings (attributes have them too), comments, messages and Markdown are read. A docstring begins with a subject and a
verb, or with a noun phrase that stands alone.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

FIRST_WORDS = re.compile(r"(Of|What|That|Likewise|How|Whether|Where|Which|So|Told|Said)\b")
"""A docstring that begins like this is a fragment, whose subject is the name above it."""
PHRASES = re.compile(
    r"\b(beside|besides|likewise|of which|of these|(?-i:is none|are none)|makes? good|made good|foretold|unasked|"
    r"said to be|so many|so much|to be told|is told|are told|one matrix a line|held[- ]?out|held back)\b",
    re.IGNORECASE,
)
"""Use next to, compared with, also, these, predicted, by default, N, compensates for, validation or test text."""


def offences(path: Path) -> Iterator[str]:
    """`file:line: what is wrong` for every docstring, comment, message or line of Markdown that offends."""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    pieces = in_markdown(path) if path.suffix == ".md" else in_python(path)
    for line, text, is_docstring in pieces:
        if is_docstring and (found := FIRST_WORDS.match(text.strip())):
            yield f"{shown}:{line}: begins with {found[0]!r}"
        for found in PHRASES.finditer(text):
            yield f"{shown}:{line}: says {found[0]!r}"


def in_markdown(path: Path) -> Iterator[tuple[int, str, bool]]:
    text = re.sub(r"```.*?```", lambda code: "\n" * code[0].count("\n"), path.read_text(encoding="utf-8"), flags=re.S)
    for number, line in enumerate(text.splitlines(), 1):
        yield number, re.sub(r"`[^`]*`", "", line), False


def in_python(path: Path) -> Iterator[tuple[int, str, bool]]:
    """`(line, text, whether it is a docstring)` for every string and comment."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split()), id(node) in docstrings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, False


def files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted([*path.rglob("*.py"), *path.rglob("*.md")]) if path.is_dir() else [path]


if __name__ == "__main__":
    given = [Path(argument).resolve() for argument in sys.argv[1:]] or [ROOT / name for name in ("mspc", "exporters")]
    for file in files(given):
        for offence in offences(file):
            print(offence)
