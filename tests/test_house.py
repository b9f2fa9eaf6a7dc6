"""The rules of the house, read off the source. Each test lists what offends it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from house import ROOMS, ROOT, House, circles
from language import files, offences

HOUSE = House(ROOT)
TESTS = sorted(ROOT.glob("tests/*.py"))
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
# One line an option.
OPTION_LISTS = {
    ("mspc.api", "compress"),
    ("mspc.cli.main", "eval_"), ("mspc.cli.bench_command", "bench"), ("mspc.cli.export_commands", "export"),
    ("mspc.cli.report_command", "report"),
}  # fmt: skip
KNOW_TRANSFORMERS = {
    "mspc.api",
    "mspc.model.auto_class", "mspc.model.config_checks", "mspc.model.experts", "mspc.model.gguf_config",
    "mspc.model.gguf_file",
    "mspc.model.hub", "mspc.model.matrices", "mspc.model.source_tensors", "mspc.model.streamed",
    "mspc.runtime.experts", "mspc.runtime.hf_quantizer", "mspc.runtime.keep_zeros", "mspc.runtime.loading",
    "mspc.runtime.recovery", "mspc.runtime.stepping", "mspc.serving.loader",
    "exporters.onnx_graph", "exporters.runtimes.onnxruntime_genai", "exporters.runtimes.transformers",
}  # fmt: skip
PUBLIC = {
    "compress", "evaluate", "export", "forecast", "generate", "load", "masks", "plan", "push", "recover", "report",
    "verify",
}  # fmt: skip
SAY_IT = {"language.py", "test_house.py"}
RUN_CODE = {"from_pretrained", "from_config", "from_quantized", "load_dataset", "load_dataset_builder", "pipeline"}
HEAVY = ("torch", "transformers", "numpy", "datasets", "rich", "typer")


def test_rooms_import_only_from_rooms_below():
    order = {room: place for place, room in enumerate(ROOMS)}
    assert set(order) == set(HOUSE.rooms)
    assert [(a, b) for a, others in HOUSE.arrows().items() for b in others if order[b] > order[a]] == []


def test_modules_import_in_no_circle():
    """Oracle: components that are strongly connected, `mspc` itself included."""
    assert [circle for circle in circles({name: HOUSE.ours(name) for name in HOUSE.files}) if len(circle) > 1] == []


def test_a_circle_is_found():
    """Oracle: made by hand."""
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [frozenset("ab"), frozenset("c")]


def test_contributing_shows_the_same_rooms():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+/[\w/.]*)` \|", text, re.MULTILINE)
    assert sorted(shown) == sorted(path_of(room) for room in HOUSE.rooms)


def path_of(room: str) -> str:
    """`mspc.model` -> `mspc/model/`, `mspc.types` -> `mspc/types.py`."""
    path = HOUSE.files[room].relative_to(ROOT)
    return f"{path.parent}/" if path.name == "__init__.py" and room != "mspc" else str(path)


def test_few_modules_know_transformers():
    knowing = {name for name in HOUSE.files if "transformers" in packages(name)}
    assert knowing == KNOW_TRANSFORMERS


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in HOUSE.imported(module)}


def test_no_module_hides_a_public_function():
    """Importing a package's module sets the attribute of that name: `mspc/plan.py` would hide `mspc.plan`."""
    assert [name for name in HOUSE.files if name.rpartition(".")[2] in PUBLIC] == []


def test_no_pickle_and_no_remote_code():
    assert [f"{name}: {what}" for name in HOUSE.files for what in forbidden(name)] == []


def forbidden(module: str) -> Iterator[str]:
    yield from {"pickle", "dill", "joblib", "marshal", "shelve"} & set(HOUSE.imported(module))
    for node in ast.walk(HOUSE.tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from {"torch.load"} & {f"{node.value.id}.{node.attr}"}
        if isinstance(node, ast.keyword):
            yield from {"weights_only"} & {node.arg}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield from {"eval", "exec", "__import__"} & {node.func.id}


def test_code_of_checkpoints_is_refused_at_each_call():
    """Calls that load by the name of a class say `trust_remote_code=False`. Left out, transformers asks on stdin."""
    trees = {name: HOUSE.tree(name) for name in HOUSE.files}
    others = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
    trees |= {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in others}
    assert [f"{name}:{line}" for name, tree in trees.items() for line in open_to_code(tree)] == []


def open_to_code(tree: ast.Module) -> Iterator[int]:
    """Lines of calls that may run code of a checkpoint or data set, or that say anything but the literal False."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        said = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "trust_remote_code"]
        called = ast.unparse(node.func)
        may_run = called.rpartition(".")[2] in RUN_CODE or called == "GPTQModel.load"
        if (may_run and said != ["False"]) or not set(said) <= {"False"}:
            yield node.lineno


@pytest.mark.parametrize(
    ("code", "is_open"),
    [
        ("AutoTokenizer.from_pretrained(folder)", True),
        ("AutoTokenizer.from_pretrained(folder, trust_remote_code=None)", True),
        ("M.from_config(config, trust_remote_code=trusted)", True),
        ("load_dataset(name, **options)", True),
        ("other(trust_remote_code=True)", True),
        ("GPTQModel.load(folder)", True),
        ("AutoConfig.from_pretrained(folder, trust_remote_code=False)", False),
        ("datasets.load_dataset(name, trust_remote_code=False)", False),
        ("json.load(file)", False),
    ],
)
def test_calls_that_leave_code_open_are_found(code, is_open):
    """Oracle: made by hand."""
    assert list(open_to_code(ast.parse(code))) == [1] * is_open


def test_files_and_functions_are_short():
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in HOUSE.files.items()}
    assert {name: lines for name, lines in lengths.items() if lines >= LONGEST_FILE} == {}
    found = {
        (module, node.name): int(node.end_lineno or 0) - node.lineno + 1
        for module in HOUSE.files
        for node in ast.walk(HOUSE.tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {which for which, lines in found.items() if lines >= LONGEST_FUNCTION} <= OPTION_LISTS


def test_modules_and_tests_say_what_they_are():
    trees = {name: HOUSE.tree(name) for name in HOUSE.files if name != "mspc.__main__"}
    trees |= {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in TESTS}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_the_prose_is_plain():
    """Docstrings, comments, help and errors; `test_docs` does the same for the pages."""
    paths = [ROOT / name for name in ("mspc", "exporters", "tests", "benchmarks", "examples")]
    assert [offence for file in files(paths) if file.name not in SAY_IT for offence in offences(file)] == []


def test_a_fragment_and_a_phrase_are_found(tmp_path):
    """Oracle: made by hand."""
    file = tmp_path / "example.py"
    file.write_text('"""What it is."""  # beside it\n\nraise ValueError(f"so many {1}")\n', encoding="utf-8")
    found = [offence.partition(": ")[2] for offence in offences(file)]
    assert found == ["begins with 'What'", "says 'so many'", "says 'beside'"]


def test_nothing_depends_on_one_machine():
    """No absolute path of a home or workplace."""
    files = [*HOUSE.files.values(), *TESTS, *RESULTS]
    path = re.compile(r"[\"' ]/(home|root|Users|work)/")
    assert [file.name for file in files if path.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("code", "not_loaded"),
    [
        ("import mspc", HEAVY),
        ("import mspc.cli.main", ("transformers", "datasets")),
        ("import mspc; mspc.Recipe(sparsity=0.5)", ("transformers", "datasets")),
        ("import mspc.api", ("datasets", "pyarrow")),
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

    functions = [name for name in mspc.__all__ if not name.startswith("__")]
    assert all(getattr(mspc, name).__name__ == name for name in functions)
    assert set(functions) == set(mspc._MODULE_OF)
    assert mspc.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mspc.__getattr__("nothing")
