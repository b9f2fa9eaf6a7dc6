"""The options of the command line, in a recipe file and in help; and how other tests call it.

One JSON object on stdout, one paragraph on stderr, exit codes.
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from mspc.cli.main import app
from mspc.errors import MspcError
from mspc.recipe import Recipe
from mspc.settings import GOALS

FAST = ("--num-sequences", "2", "--sequence-length", "16", "--effort", "fast")
GOAL_FLAGS = {"--" + name.replace("_", "-") for name in GOALS}
RUN_FLAGS = {
    *("--export", "--recipe", "--measurements", "--spill", "--resume", "--overwrite", "--json", "--debug", "--out"),
    *("--threads", "--ranks", "--report", "--force"),
}
RECIPE_FLAGS = {
    *("--sparsity", "--pattern", "--bits", "--group-size", "--asymmetric", "--skip", "--only", "--effort", "--solver"),
    *("--include", "--keep-zeros", "--bits-per-weight", "--target-size"),
    *("--iterations", "--propagation", "--criterion", "--allocator", "--alpha", "--sensitivity"),
    "--search-minutes",
    *("--sensitivity-sequences", "--sensitivity-probes", "--damp", "--activation-order", "--calibration"),
    *("--num-sequences", "--sequence-length", "--seed", "--plan", "--device", "--dtype", "--reconstruct", "--recover"),
    *("--recover-lr", "--head-bits", "--embedding-bits", "--ms-per-token", "--speedup", "--timings"),
    *("--text-column", "--text-encoding", "--bos", "--eval", "--route"),
}


def mspc_cli(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.stderr
    return result


def refused(*arguments: object) -> str:
    """The message of a call that is wrong usage or input: one paragraph on stderr, nothing on stdout, exit code 2."""
    result = mspc_cli(*arguments, code=2)
    assert result.stdout == ""
    _, start, message = f"\n{result.stderr}".rpartition("\nError: ")
    assert start
    assert "Traceback" not in result.stderr
    assert "\n\n" not in message.strip()
    return message


def only_json(result: Result) -> dict[str, object]:
    assert len(result.stdout.strip().splitlines()) == 1
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# Options


def test_compress_has_exactly_these_options():
    """Frozen: an option is a promise. A new one belongs in the recipe, in README and here."""
    command = typer.main.get_command(app).commands["compress"]
    assert {flag for option in command.params for flag in option.opts} == RECIPE_FLAGS | RUN_FLAGS | {"model"}


def test_there_is_an_option_for_every_field_of_the_recipe():
    assert {"--" + field.name.replace("_", "-") for field in fields(Recipe)} == RECIPE_FLAGS


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """Get the recipe that some arguments of compress make."""
    recipes: list[Recipe] = []

    def compress(model, recipe, **options):
        recipes.append(recipe)
        raise MspcError("enough")

    monkeypatch.setattr("mspc.api.compress", compress)

    def get(*arguments: object) -> Recipe:
        mspc_cli("compress", "model", "--out", "out", *arguments, code=1)
        return recipes.pop()

    return get


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (("--sparsity", 0), {"sparsity": 0.0}),
        (("--bits", 3, "--group-size", "row"), {"bits": 3, "group_size": "row"}),
        (("--bits", 4, "--group-size", 64), {"bits": 4, "group_size": 64}),
        (("--bits", 4, "--asymmetric"), {"bits": 4, "asymmetric": True}),
        (("--bits", 4, "--symmetric"), {"bits": 4, "asymmetric": False}),
        (
            ("--skip", "a", "--skip", r"b\.", "--calibration", "c4", "--num-sequences", 5, "--sequence-length", 77),
            {"skip": ("a", r"b\."), "calibration": "c4", "num_sequences": 5, "sequence_length": 77},
        ),
        (
            ("--sparsity", 0.4, "--solver", "mask", "--criterion", "ria", "--allocator", "owl", "--alpha", 0.2),
            {"sparsity": 0.4, "solver": "mask", "criterion": "ria", "allocator": "owl", "alpha": 0.2},
        ),
        (
            ("--sparsity", 0.4, "--allocator", "search", "--search-minutes", 2.5),
            {"sparsity": 0.4, "allocator": "search", "search_minutes": 2.5},
        ),
        (("--seed", 3), {"seed": 3}),
        (("--route", "all"), {"route": "all"}),
        (
            ("--pattern", "N:16", "--allocator", "trace-rank", "--sensitivity", "gram", "--damp", 0.5),
            {"pattern": "N:16", "allocator": "trace-rank", "sensitivity": "gram", "damp": 0.5},
        ),
        (
            ("--sensitivity-sequences", 3, "--damp", 0.5),
            {"sensitivity_sequences": 3, "damp": 0.5},
        ),
        (
            ("--bits", 4, "--activation-order", "--allocator", "trace-rank", "--sensitivity-probes", 4),
            {"bits": 4, "activation_order": True, "allocator": "trace-rank", "sensitivity_probes": 4},
        ),
        (
            ("--text-column", "body", "--text-encoding", "cp1252", "--bos", "yes"),
            {"text_column": "body", "text_encoding": "cp1252", "bos": "yes"},
        ),
        (("--no-eval",), {"eval": False}),
        (("--eval",), {"eval": True}),
        (
            ("--plan", "p.json", "--device", "cpu", "--dtype", "float16"),
            {"plan": "p.json", "device": "cpu", "dtype": "float16"},
        ),
    ],
)
def test_options_are_the_fields_of_the_recipe(arguments, values, asked):
    assert asked(*arguments) == Recipe(**values)


def test_options_win_over_a_recipe_file(asked, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(Recipe(sparsity=0.7, bits=4, group_size="row", seed=3, skip=("a",), asymmetric=True).to_toml())
    written = Recipe.from_toml(file)
    assert asked("--recipe", file) == written
    changed = asked("--recipe", file, "--sparsity", 0.2, "--group-size", 32, "--skip", "b")
    assert changed == Recipe(**written.to_dict() | {"sparsity": 0.2, "group_size": 32, "skip": ("b",)})
    assert asked("--recipe", file, "--symmetric").asymmetric is False
    assert asked("--recipe", file, "--pattern", "2:4").sparsity is None  # the pattern fixes it


OWL = {"sparsity": 0.6, "allocator": "owl"}


@pytest.mark.parametrize(
    ("written", "options", "expected"),
    [
        ({}, ("--effort", "fast"), {"effort": "fast"}),
        ({}, ("--effort", "fast", "--solver", "obs"), {"effort": "fast", "solver": "obs"}),
        ({"solver": "admm", "iterations": 3}, ("--solver", "mask"), {"solver": "mask"}),
        ({"sparsity": 0.7, "bits": 4}, ("--bits-per-weight", 3), {"bits_per_weight": 3.0}),
        ({"target_size": "2GB"}, ("--bits-per-weight", 3), {"bits_per_weight": 3.0}),
        ({"bits_per_weight": 3.0}, ("--sparsity", 0.6), {"sparsity": 0.6}),
        ({"sparsity": 0.6, "allocator": "alpha", "alpha": 0.2}, ("--allocator", "owl"), OWL),
        (OWL, ("--effort", "fast"), {"effort": "fast"} | OWL),
        (OWL | {"alpha": 0.2}, ("--pattern", "2:4"), {"pattern": "2:4"}),
        (OWL | {"alpha": 0.2}, ("--bits-per-weight", 3), {"bits_per_weight": 3.0}),
        ({"pattern": "2:4", "seed": 3}, ("--sparsity", 0.6), {"sparsity": 0.6, "seed": 3}),
        ({"bits": 4, "group_size": 64}, ("--bits", 16), {"bits": 16}),
        ({"bits_per_weight": 3.0, "group_size": 64}, ("--sparsity", 0.5), {"sparsity": 0.5}),
        ({"plan": "p.json"}, ("--sparsity", 0.6), {"sparsity": 0.6}),
        ({"sparsity": 0.6, "reconstruct": 9}, ("--bits", 4), {"sparsity": 0.6, "bits": 4}),
        ({"sparsity": 0.6, "reconstruct": 9}, ("--target-size", "2GB"), {"target_size": "2GB"}),
        ({"solver": "admm", "propagation": 0.5}, ("--solver", "kfac"), {"solver": "kfac", "propagation": 0.5}),
        (OWL | {"alpha": 0.2}, ("--alpha", 0.3), OWL | {"alpha": 0.3}),
        ({"sparsity": 0.6, "allocator": "search"}, ("--plan", "p.json"), {"plan": "p.json"}),
    ],
    ids=str,
)
def test_options_replace_the_same_choice_of_a_recipe_file(written, options, expected, asked, tmp_path):
    (tmp_path / "recipe.toml").write_text(Recipe(**written).to_toml())
    assert asked("--recipe", tmp_path / "recipe.toml", *options) == Recipe(**expected)


@pytest.mark.parametrize(
    ("written", "options", "message"),
    [
        (
            {"bits_per_weight": 3.0},
            ("--allocator", "owl"),
            "bits_per_weight 3.0 needs the allocator auto or curves, not",
        ),
        ({"plan": "p.json"}, ("--group-size", 64), "group_size 64 has no effect with plan p.json"),
    ],
    ids=str,
)
def test_the_goal_of_a_recipe_file_does_not_give_way_to_the_default(written, options, message, tmp_path):
    (tmp_path / "recipe.toml").write_text(Recipe(**written).to_toml())
    assert message in refused("compress", "m", "--out", "o", "--recipe", tmp_path / "recipe.toml", *options)


def test_a_recipe_file_that_conflicts_in_itself_is_refused(tmp_path):
    (tmp_path / "recipe.toml").write_text('pattern = "2:4"\nsparsity = 0.7')
    message = refused("compress", "m", "--out", "o", "--recipe", tmp_path / "recipe.toml")
    assert "pattern 2:4 fixes the sparsity at 0.5" in message


VERBS = ("compress", "plan", "eval", "export", "verify", "bench", "report")


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_commands_that_are_right_and_fit_a_terminal(verb):
    """Oracle: the parser of the verb."""
    shown = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(app, [verb, "--help"]).stdout
    command = typer.main.get_command(app).commands[verb]
    written = re.findall(r"^ *(mspc .*)", inspect.cleandoc(command.callback.__doc__), re.MULTILINE)
    assert len(written) >= 2
    for line in written:
        assert re.search(rf"^ +{re.escape(line)} *$", shown, re.MULTILINE), line
        arguments = re.split(r" {2,}", line)[0].split()
        assert arguments[:2] == ["mspc", verb]
        command.make_context(verb, arguments[2:])
