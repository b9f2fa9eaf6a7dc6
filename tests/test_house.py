"""The rules of the house, read off the source: floors, no pickle, light imports, short files and functions."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("mspc/**/*.py"), *ROOT.glob("exporters/**/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
# One line an option.
OPTION_LISTS = {("mspc.cli", "compress"), ("mspc.bench_cli", "bench"), ("mspc.export_cli", "export")}

FLOORS = (
    {"mspc.types", "mspc.errors", "mspc.memory", "mspc.version"},
    {"mspc.recipe", "mspc.masks", "mspc.linalg", "mspc.quant", "mspc.formats"},
    {"mspc.saliency", "mspc.kernels"},
    {
        *(
            "mspc.solvers",
            "mspc.allocators",
            "mspc.allocation",
            "mspc.sensitivity",
            "mspc.plan",
            "mspc.checkpoint",
            "mspc.files",
        ),
        *("mspc.files", "mspc.journal", "mspc.artifact", "mspc.output", "mspc.sparse_folder"),
    },
    {"mspc.models", "mspc.tokens", "mspc.builtin_text"},
    {
        *("mspc.blocks", "mspc.passage", "mspc.walk", "mspc.gradients", "mspc.perplexity", "mspc.reconstruct"),
        *("mspc.hf", "mspc.runtime"),
    },
    {
        "exporters",
        "mspc.curves",
        "mspc.measurements",
        "mspc.solve_blocks",
        "mspc.report",
        "mspc.planning",
        "mspc.trial",
        "mspc.search",
    },
    {"mspc.pipeline", "mspc.evaluation", "mspc.bench"},
    {"mspc"},
    {"mspc.cli", "mspc.bench_cli", "mspc.export_cli", "mspc.console", "mspc.__main__"},
)


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names that the code imports anywhere: `from a import b` is a.b when that is a module of ours, else a."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (alias.name for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, "imports are absolute"
            for alias in part.names:
                full = f"{part.module}.{alias.name}"
                yield full if full in MODULES else str(part.module)


def ours(module: str) -> set[str]:
    return {name for name in imported(tree(module)) if name in MODULES} - {module}


def floor_of(module: str) -> int:
    def holds(name: str) -> bool:
        return module == name or (name != "mspc" and module.startswith(f"{name}."))

    found = [floor for floor, names in enumerate(FLOORS) if any(map(holds, names))]
    assert len(found) == 1, f"{module} is on {len(found)} floors"
    return found[0]


def test_every_floor_names_modules_that_exist():
    assert set().union(*FLOORS) <= set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_from_a_higher_floor(module):
    higher = {name for name in ours(module) if floor_of(name) > floor_of(module)}
    assert not higher


def test_imports_have_no_cycles():
    """Oracle: graphlib, which raises CycleError."""
    order = list(TopologicalSorter({module: ours(module) for module in MODULES}).static_order())
    assert set(order) == set(MODULES)


def test_contributing_shows_the_same_floors():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {int(floor): set(re.findall(r"`([a-z_]+)/?`", names)) for floor, names in rows}
    assert shown == {floor: {name.removeprefix("mspc.") for name in names} for floor, names in enumerate(FLOORS)}


KNOW_TRANSFORMERS = {
    *("mspc.models", "mspc.hf", "mspc.runtime.loading", "exporters.onnx_graph", "exporters.runtimes.transformers"),
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_few_modules_know_transformers(module):
    packages = {name.partition(".")[0] for name in imported(tree(module))}
    assert ("transformers" in packages) == (module in KNOW_TRANSFORMERS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_pickle_and_no_remote_code(module):
    assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & set(imported(tree(module)))
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load")
        if isinstance(node, ast.keyword):
            assert node.arg not in ("trust_remote_code", "weights_only")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__")


def functions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_are_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) < LONGEST_FILE
    for function in functions(module):
        lines = int(function.end_lineno or 0) - function.lineno + 1
        assert lines < LONGEST_FUNCTION or (module, function.name) in OPTION_LISTS, function.name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(tree(module)) or module == "mspc.__main__"


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", [*FILES, *TESTS, *RESULTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_depends_on_one_machine(path):
    """No absolute path of a home or workplace."""
    assert not re.search(r"[\"' ]/(home|root|Users|work)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_every_test_file_names_its_oracle(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


HEAVY = ("torch", "transformers", "numpy", "datasets", "rich", "typer")


@pytest.mark.parametrize(
    ("code", "not_loaded"),
    [
        ("import mspc", HEAVY),
        ("import mspc.cli", ("transformers", "datasets")),
        ("import mspc; mspc.Recipe(sparsity=0.5)", ("transformers", "datasets")),
        ("import mspc.pipeline", ("datasets", "pyarrow")),
    ],
)
def test_imports_are_light(code, not_loaded):
    """Oracle: sys.modules of a fresh interpreter."""
    script = f"import sys; {code}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "mspc" in loaded
    assert not set(not_loaded) & set(loaded)


def test_every_public_name_is_there():
    import mspc

    assert all(getattr(mspc, name).__name__ == name for name in mspc.__all__)
    assert set(mspc.__all__) == set(mspc._HOME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mspc.__getattr__("nothing")
