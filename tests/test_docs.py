"""The documentation against the code: commands, options, Python names, links. Slow: what it shows is run."""

import ast
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from language import offences

import mspc
from mspc.cli.main import app

ROOT = Path(__file__).parents[1]
SHOWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "benchmarks/results/*.md", "examples/*/*.md")
PAGES = [page for pattern in SHOWN for page in sorted(ROOT.glob(pattern))]
TRIED = [ROOT / "README.md", ROOT / "docs" / "usage.md"]
"""Pages whose commands on the bundled model are run."""
FIELDS = {field.name for field in dataclasses.fields(mspc.Recipe)}
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Words of the lines that begin with `mspc`, in code blocks and text. A list of options belongs to compress."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    lines += re.findall(r"`(mspc [a-z]+ [^`]*)`", text)
    lines += [f"mspc compress MODEL --out small {options}" for options in re.findall(r"`(--[^`]+ --[^`]+)`", text)]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("mspc ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page):
    """Oracle: the parser of the verb, and the recipe, which refuses options without effect."""
    wrong = []
    for _, verb, *arguments in commands(page):
        if not arguments or "DIR" in arguments or "FORMAT" in arguments:
            continue  # an outline, not a command
        try:
            given = VERBS[verb].make_context(verb, arguments).params
            asked = {name: value for name, value in given.items() if value not in (None, [], ())}
            if verb == "compress":
                mspc.Recipe.from_dict({name: value for name, value in asked.items() if name in FIELDS})
        except typer.Exit:  # --help
            continue
        except Exception as error:
            wrong.append(f"{verb} {' '.join(arguments)}: {error}")
    assert wrong == []


def test_usage_lists_the_options_of_compress():
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    section = text[text.index("## Options of compress") : text.index("### Presets")]
    listed = re.findall(r"^\| `(--[a-z-]+)` \|", section, re.MULTILINE)
    options = [param.opts[0] for param in VERBS["compress"].params if param.param_type_name == "option"]
    assert sorted(listed) == sorted(options)


def test_public_names_are_public():
    """`mspc.name` in Python examples and in text."""
    written = {
        name: page.name
        for page in PAGES
        for name in re.findall(r"(?<![\w/])mspc\.([A-Za-z_]+)(?=[(`\s,.])", page.read_text(encoding="utf-8"))
    }
    modules = {path.stem for path in (ROOT / "mspc").iterdir()} | {"json", "cli"}
    assert {name: page for name, page in written.items() if name not in {*mspc.__all__, *modules}} == {}


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            file = page if not path else (page.parent / path).resolve()
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_paths_of_the_code_exist():
    """Paths in backticks, such as `mspc/formats/layout.py`."""
    prefix = r"`((?:mspc|exporters|benchmarks|tests|examples|docs)/[\w/.-]*)`"
    found = {(page.name, path) for page in PAGES for path in re.findall(prefix, page.read_text(encoding="utf-8"))}
    assert [f"{page}: {path}" for page, path in sorted(found) if not (ROOT / path).exists()] == []


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_pages_are_in_plain_english():
    assert [offence for page in PAGES for offence in offences(page)] == []


@pytest.mark.parametrize("page", TRIED, ids=lambda page: page.name)
def test_examples_are_python(page):
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.mark.slow
def test_what_the_pages_show_runs(tmp_path):
    """Commands on the bundled model as they are written, page after page, then every Python example."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for page in TRIED:
        shown = [
            [sys.executable, "-m", *arguments]
            for arguments in commands(page)
            if any(word.startswith(("examples/", "out/")) for word in arguments)
        ]
        assert len(shown) >= 3
        for command in [*shown, *([sys.executable, "-c", code] for code in blocks(page, "python"))]:
            ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, f"{command[2:]}: {ran.stderr}"
