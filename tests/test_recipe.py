"""Recipes: what is written is what is read, and what cannot be meant is refused with words that help."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from mspc.errors import InputError
from mspc.recipe import Recipe
from mspc.types import NM, Grid

# Every field, with a value that is not its default.
OTHER = {
    "sparsity": 0.625,
    "pattern": "N:16",
    "bits": 3,
    "group_size": 64,
    "asymmetric": True,
    "effort": "best",
    "solver": "admm",
    "iterations": 12,
    "propagation": 0.25,
    "criterion": "ria",
    "allocator": "uniform",
    "alpha": 0.25,
    "search_minutes": 2.5,
    "sensitivity": "fisher",
    "sensitivity_sequences": 7,
    "sensitivity_probes": 2,
    "calibration": 'a "quoted" path\\with\nlines',
    "num_sequences": 9,
    "sequence_length": 33,
    "seed": 5,
    "skip": ("lm_head", r"layers\.[0-3]\."),
    "plan": "plan.json",
    "damp": 0.1,
    "activation_order": True,
    "device": "cuda:1",
    "dtype": "bfloat16",
}


EXCLUDED = {"bits_per_weight", "target_size", "reconstruct"}  # by the sparsity or bits above


def written(recipe: Recipe, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    return Recipe.from_toml(path)


def test_every_field_has_another_value_here():
    default = Recipe()
    assert set(OTHER) | EXCLUDED == {field.name for field in dataclasses.fields(Recipe)}
    assert all(getattr(default, name) != value for name, value in OTHER.items())


def test_toml_round_trip_of_every_field(tmp_path):
    recipe = Recipe(**OTHER)
    assert written(recipe, tmp_path) == recipe
    assert tomllib.loads(recipe.to_toml()) == {**OTHER, "skip": list(OTHER["skip"]), "reconstruct": 0}


def test_reconstruct_survives_toml(tmp_path):
    assert written(Recipe(sparsity=0.5, reconstruct=100), tmp_path) == Recipe(sparsity=0.5, reconstruct=100)


def test_toml_of_the_defaults_says_what_they_stand_for(tmp_path):
    """None is not TOML: an unset sparsity is written as what it means; unset length, plan and alpha are left out."""
    values = tomllib.loads(Recipe().to_toml())
    assert values["sparsity"] == 0.5
    assert set(OTHER) - set(values) == {"sequence_length", "plan", "alpha"}
    assert written(Recipe(), tmp_path) == Recipe(sparsity=0.5)


@pytest.mark.parametrize("budget", [{"bits_per_weight": 3.125}, {"target_size": "2.2GB"}])
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_a_budget_survives_toml_and_has_plans_tried(budget, effort, tmp_path):
    recipe = Recipe(effort=effort, **budget)
    assert recipe.allocator == "auto"
    assert written(recipe, tmp_path) == recipe
    assert "sparsity" not in recipe.to_dict()


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("2.2GB", 2_200_000_000), ("900 MB", 900_000_000), ("1.5k", 1500), ("77", 77), ("3TB", 3 * 10**12)],
)
def test_sizes(size, num_bytes):
    assert Recipe(target_size=size).target_bytes == num_bytes


def test_a_row_as_group_survives_toml(tmp_path):
    assert tomllib.loads(Recipe(group_size=None).to_toml())["group_size"] == "row"
    assert written(Recipe(group_size=None, sparsity=0.5), tmp_path).group_size is None


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:3", 1 - 1 / 3), ("5:16", 0.6875), ("1:256", None)])
def test_a_fixed_pattern_implies_its_sparsity_and_survives_toml(pattern, sparsity, tmp_path):
    recipe = Recipe(pattern=pattern)
    assert recipe.target_sparsity == (sparsity if sparsity is not None else 1 - 1 / 256)
    assert written(recipe, tmp_path) == dataclasses.replace(recipe, sparsity=recipe.target_sparsity)


def test_what_a_recipe_means():
    assert Recipe().target_sparsity == 0.5
    assert Recipe(sparsity=0).target_sparsity == 0
    assert Recipe(pattern="2:4").fixed_pattern == NM(2, 4)
    assert Recipe(pattern="N:16").fixed_pattern is None
    assert Recipe(pattern="N:16", sparsity=0.7).target_sparsity == 0.7
    assert Recipe(asymmetric=True).grid is None  # 16 bits: nothing is rounded
    assert Recipe(bits=4).grid == Grid(4, 128, True)
    assert Recipe(bits=3, group_size=None, asymmetric=True).grid == Grid(3, None, False)


def test_whole_numbers_do_where_fractions_are_meant():
    assert Recipe(sparsity=0, alpha=0, damp=1).damp == 1


def test_lists_become_tuples():
    assert Recipe(skip=["a", "b"]).skip == ("a", "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), not 1\.0: it is the share of zeros"),
        ({"sparsity": 50}, r"sparsity must lie in \[0, 1\), not 50"),
        ({"sparsity": -0.1}, r"sparsity must lie in"),
        ({"sparsity": float("nan")}, r"sparsity must lie in"),
        ({"sparsity": "0.5"}, r"sparsity must be of type float \| None, not '0.5'"),
        ({"sparsity": True}, r"sparsity must be of type"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"pattern 2:4 fixes the sparsity at 0\.5, but sparsity 0\.6.*N:16"),
        ({"pattern": "3:4", "sparsity": 0.75}, r"pattern 3:4 fixes the sparsity at 0\.25"),
        ({"pattern": "4:2"}, r"1 <= N <= M <= 256, not 4:2"),
        ({"pattern": "0:4"}, r"1 <= N <= M <= 256, not 0:4"),
        ({"pattern": "2:512"}, r"1 <= N <= M <= 256, not 2:512"),
        ({"pattern": "2-4"}, r"Unknown pattern '2-4': use unstructured, N:M"),
        ({"pattern": "N:8"}, r"Unknown pattern 'N:8'"),
        ({"search_minutes": 0}, r"search_minutes must be a number above 0, not 0"),
        ({"search_minutes": float("nan")}, r"search_minutes must be a number above 0, not nan"),
        (
            {"bits_per_weight": 3.0, "allocator": "search"},
            r"need the allocator auto or curves, not search",
        ),
        ({"bits": 5}, r"bits must be 16 \(no rounding\), 8, 4, 3 or 2, not 5"),
        ({"bits": 4.0}, r"bits must be of type int, not 4\.0"),
        ({"bits": True}, r"bits must be of type int, not True"),
        ({"group_size": 0}, r"group_size must be at least 1, not 0"),
        ({"group_size": "wide"}, r"group_size must be of type int \| None, not 'wide'"),
        ({"num_sequences": 0}, r"num_sequences must be at least 1"),
        ({"sensitivity_sequences": -1}, r"sensitivity_sequences must be at least 1"),
        ({"sensitivity_probes": 0}, r"sensitivity_probes must be at least 1"),
        ({"sequence_length": 1}, r"sequence_length must be at least 2, not 1"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], not 1\.5"),
        ({"alpha": float("nan")}, r"alpha must lie in"),
        ({"damp": -0.01}, r"damp must be a number >= 0"),
        ({"damp": float("inf")}, r"damp must be a number >= 0"),
        ({"damp": float("nan")}, r"damp must be a number >= 0"),
        ({"dtype": "float15"}, r"Unknown dtype 'float15': did you mean 'float1?[36]"),
        ({"skip": "lm_head"}, r"skip must be of type .*, not 'lm_head'"),
        ({"skip": ("(",)}, r"skip: '\(' is not a regular expression"),
        ({"asymmetric": 1}, r"asymmetric must be of type bool, not 1"),
        ({"plan": Path("plan.json")}, r"plan must be of type str \| None"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Recipe(**values)


@pytest.mark.parametrize(
    ("key", "meant"), [("sparcity", "sparsity"), ("group-size", "group_size"), ("num_sequence", "num_sequences")]
)
def test_unknown_keys_name_what_was_meant(key, meant, tmp_path):
    (tmp_path / "recipe.toml").write_text(f"{key} = 1")
    with pytest.raises(InputError, match=f"Unknown recipe key '{key}': did you mean '{meant}'"):
        Recipe.from_toml(tmp_path / "recipe.toml")


def test_unknown_keys_like_nothing_list_what_there_is():
    with pytest.raises(InputError, match=r"Unknown recipe key 'zzz': choose one of activation_order, .*skip"):
        Recipe.from_dict({"zzz": 1})


@pytest.mark.parametrize("content", [b"sparsity = ", b"\xff\xfe", b"[a", None])
def test_files_that_are_no_toml_are_named(content, tmp_path):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"recipe\.toml cannot be read"):
        Recipe.from_toml(path)
