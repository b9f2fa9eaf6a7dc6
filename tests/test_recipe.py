"""Recipes: what is written is what is read, and what cannot be meant is refused with words that help."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

import mspc.settings as NAMES
from mspc.errors import InputError
from mspc.published.allocators import ALLOCATORS
from mspc.published.criteria import CRITERIA
from mspc.recipe import Recipe
from mspc.settings import DEFAULT_BITS_PER_WEIGHT, EFFORTS, GOALS, NEEDED_BY
from mspc.sizes import at_least, bytes_of, in_words
from mspc.solvers import SOLVERS
from mspc.types import NM, Grid

# Every field, with a value that is not its default, in recipes in which each has an effect.
OTHER = (
    {
        "sparsity": 0.625, "pattern": "N:16", "bits": 3, "group_size": 64, "asymmetric": True, "effort": "best",
        "solver": "obs", "propagation": 0.25, "criterion": "ria", "allocator": "trace-rank", "alpha": 0.25,
        "sensitivity": "hutchinson", "sensitivity_sequences": 7, "sensitivity_probes": 2, "damp": 0.1,
        "calibration": 'a "quoted" path\\with\nlines', "num_sequences": 9, "sequence_length": 33, "seed": 5,
        "text_column": "body", "text_encoding": "cp1252", "bos": "no", "route": "all", "eval": False,
        "skip": ("lm_head", r"layers\.[0-3]\."), "only": ("q_proj", "mlp"), "include": ("gate",),
        "activation_order": True, "device": "cuda:1", "dtype": "bfloat16",
    },
    {"sparsity": 0.5, "allocator": "search", "search_minutes": 2.5, "reconstruct": 100, "iterations": 12},
    {"plan": "plan.json"},
    {"bits_per_weight": 3.125, "recover": 60, "recover_lr": 0.0003, "head_bits": 4, "embedding_bits": 8},
    {"target_size": "2.2GB"},
    {"ms_per_token": 12.5, "timings": "serve.json", "bits": 4},
    {"speedup": 4.0},
    {"bits": 4, "group_size": "row"},
    {"pattern": "2:4"},
    {"keep_zeros": True},
    {},
)  # fmt: skip


def test_every_field_is_in_these():
    assert set().union(*OTHER) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("values", OTHER, ids=str)
def test_toml_holds_what_was_asked_and_comes_back(values, tmp_path):
    recipe, path = Recipe(**values), tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe
    written = {name: list(value) if name in ("skip", "only", "include") else value for name, value in values.items()}
    assert tomllib.loads(recipe.to_toml()) == written


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("2.2GB", 2_200_000_000), ("900 MB", 900_000_000), ("1.5k", 1500), ("77", 77), ("3TB", 3 * 10**12),
        ("5KB", 5000), ("5kb", 5000), ("5KiB", 5120), ("0.5 MiB", 2**19), ("2GiB", 2**31), ("2gib", 2**31),
        ("1.5TiB", 3 * 2**39), ("3Mi", 3 * 2**20), ("10B", 10), ("0.29GB", 290_000_000), ("4,012 KB", 4_012_000),
        ("1,234,567", 1_234_567), (".5MB", 500_000),
    ],
)  # fmt: skip
def test_sizes(size, num_bytes):
    """Oracle: arithmetic of integers by hand."""
    assert Recipe(target_size=size).settings().target_bytes == num_bytes


@pytest.mark.parametrize(
    "size", ["", "GB", "-1GB", "2.2.2GB", "1e9", "2 GB 3", "2XB", "2GBB", "2iB", "2,2GB", "nan", "٣GB"]
)
def test_what_is_no_size_is_refused_with_what_is(size):
    with pytest.raises(InputError, match=r"a number with a unit, such as 800MB or 2\.2GB .* or 2GiB"):
        Recipe(target_size=size)


@pytest.mark.parametrize("size", ["0", "0GB", "0.0001KB", "0.5"])
def test_no_size_at_all_is_refused(size):
    with pytest.raises(InputError, match="target_size must be at least 1 byte, not"):
        Recipe(target_size=size)


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0.0 KB"), (512, "0.5 KB"), (9_960, "10.0 KB"), (10_000, "10 KB"), (131_072, "131 KB"),
        (4_012_345, "4,012 KB"), (9_999_499, "9,999 KB"), (10_000_000, "10.0 MB"), (116_449_999, "116.4 MB"),
        (999_949_999, "999.9 MB"), (1_000_000_000, "1.00 GB"), (2_210_000_000, "2.21 GB"), (7 * 10**12, "7,000.00 GB"),
    ],
)  # fmt: skip
def test_sizes_are_shown_in_kilobytes_below_ten_megabytes(num_bytes, shown):
    assert in_words(num_bytes) == shown


@pytest.mark.parametrize(
    "num_bytes", [1, 999, 4_012_345, 4_013_000, 10_000_001, 123_456_789, 1_000_000_001, 99_999_999_999]
)
def test_a_size_that_is_shown_as_the_least_may_be_asked_for(num_bytes):
    """The size that is read back is not less, and larger by less than one part in 98."""
    asked = bytes_of(at_least(num_bytes))
    assert num_bytes <= asked <= max(num_bytes * 1.0102, 1000)


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("2:4", 0.5), ("1:3", 1 - 1 / 3), ("5:16", 0.6875), ("1:256", 255 / 256)]
)
def test_a_fixed_pattern_implies_its_sparsity(pattern, sparsity):
    assert Recipe(pattern=pattern).settings().target_sparsity == sparsity
    assert Recipe(pattern=pattern, sparsity=sparsity).settings() == Recipe(pattern=pattern).settings()


def test_what_settings_mean():
    assert Recipe(bits=16).settings().target_sparsity == 0.5
    assert Recipe(pattern="unstructured").settings().target_sparsity == 0.5
    assert Recipe(bits=4).settings().target_sparsity == 0.5
    assert Recipe(sparsity=0).settings().target_sparsity == 0
    assert Recipe(pattern="2:4").settings().fixed_pattern == NM(2, 4)
    assert Recipe(pattern="N:16").settings().fixed_pattern is None
    assert Recipe(pattern="N:16", sparsity=0.7).settings().target_sparsity == 0.7
    assert Recipe(sparsity=0.5).settings().grid_for(256) is None
    assert Recipe(bits=4).settings().grid_for(256) == Grid(4, 128, True)
    assert Recipe(bits=4).settings().grid_for(72) == Grid(4, None, True)
    assert Recipe(bits=4, group_size=128).settings().grid_for(72) == Grid(4, 128, True)  # a number is a demand
    assert Recipe(bits=3, group_size="row", asymmetric=True).settings().grid_for(256) == Grid(3, None, False)
    assert Recipe(bits_per_weight=3).settings().sparsity is None


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_decides_what_was_not_asked(effort):
    replaced = dataclasses.replace(Recipe(sparsity=0.5, seed=3), effort=effort).settings()
    assert all(getattr(replaced, name) == value for name, value in EFFORTS[effort].items())
    assert replaced.seed == 3
    assert Recipe(effort=effort, iterations=7).settings().iterations == 7
    assert Recipe(effort=effort, bits_per_weight=3).settings().allocator == "auto"
    assert Recipe(effort=effort).settings().allocator == "auto"


def test_whole_numbers_do_where_fractions_are_meant():
    assert Recipe(sparsity=0, allocator="uniform", damp=1).settings().damp == 1


def test_lists_become_tuples():
    assert Recipe(skip=["a", "b"], only=["c"]).skip == ("a", "b")
    assert Recipe(only=["c"]).only == ("c",)


# Without effect


HALF = {"sparsity": 0.5}
EFFECTS = {
    "sparsity": (0.6, {}, [{"plan": "p"}]),
    "pattern": ("N:16", {}, [{"plan": "p"}]),
    "bits": (4, {}, [{"plan": "p"}]),
    "group_size": (64, {"plan": "p", "head_bits": 8}, [{"sparsity": 0.5}, {"bits": 16}, {"plan": "p"}]),
    "asymmetric": (True, {}, [{"pattern": "2:4"}, {"sparsity": 0.6}, {"plan": "p"}]),
    "solver": ("obs", {"keep_zeros": True, "bits": 4}, [{"keep_zeros": True}]),
    "reconstruct": (5, {"sparsity": 0.5}, [{"keep_zeros": True}]),
    "recover": (5, {}, [{"sparsity": 0.0}, {"keep_zeros": True}]),
    "recover_lr": (0.001, {"recover": 5}, [{}, {"recover": 0}]),
    "iterations": (5, {"solver": "admm"}, [
        {"solver": "obs"}, {"solver": "mask"}, {"sparsity": 0.0, "bits": 4}, {"keep_zeros": True, "bits": 4},
    ]),
    "propagation": (0.7, {"solver": "obs"}, [{"solver": "mask"}, {"keep_zeros": True}]),
    "criterion": ("wanda", {"solver": "mask"}, [{}, {"effort": "fast"}, {"solver": "kfac"}, {"solver": "admm"}]),
    "allocator": ("owl", {"pattern": "N:16"}, [
        {"pattern": "2:4"}, {"sparsity": 0.0}, {"plan": "p"}, {"keep_zeros": True},
    ]),
    "alpha": (0.2, HALF | {"allocator": "owl"}, [
        {}, HALF | {"allocator": "uniform"}, HALF | {"allocator": "curves"}, HALF | {"effort": "fast"}, {"plan": "p"},
        {"pattern": "2:4"}, HALF,
    ]),
    "search_minutes": (3.0, HALF | {"allocator": "search"}, [
        {}, HALF | {"allocator": "owl"}, {"bits_per_weight": 3.0},
    ]),
    "sensitivity": ("fisher", HALF | {"allocator": "trace-rank"}, [
        {}, HALF, HALF | {"allocator": "owl"}, HALF | {"allocator": "curves"},
    ]),
    "sensitivity_probes": (2, HALF | {"allocator": "layer-trace-rank"}, [
        {}, HALF, HALF | {"allocator": "trace-rank", "sensitivity": "gram"}, HALF | {"allocator": "alpha"},
    ]),
    "sensitivity_sequences": (9, HALF | {"effort": "fast", "allocator": "curves"}, [
        {"effort": "fast", "pattern": "2:4"}, {"effort": "fast", "sparsity": 0.0, "bits": 4}, {"sparsity": 0.0},
        HALF | {"solver": "obs", "allocator": "owl"},
        {"solver": "obs", "pattern": "2:4"},
    ]),
    "damp": (0.1, HALF | {"solver": "mask", "criterion": "isc", "allocator": "uniform"}, [
        HALF | {"solver": "mask", "criterion": "wanda", "allocator": "uniform"}, {"keep_zeros": True},
    ]),
    "route": ("all", {}, [{"keep_zeros": True}]),
    "timings": ("serve.json", {"speedup": 2.0}, [{}, HALF, {"bits_per_weight": 3.0}]),
    "activation_order": (True, {"bits": 4}, [
        HALF, {"keep_zeros": True}, HALF | {"solver": "mask"}, HALF | {"effort": "fast"},
    ]),
}  # fmt: skip
"""For each option: a value, options with which it has an effect, and others with which it has none."""


def test_the_table_of_effects_is_whole():
    """Every option is in it, but those that always count."""
    always = {
        "bits_per_weight", "target_size", "ms_per_token", "speedup", "effort", "keep_zeros", "calibration",
        "num_sequences", "sequence_length", "seed", "skip", "only", "include", "plan", "device", "dtype",
        "text_column", "text_encoding", "bos", "eval", "head_bits", "embedding_bits",
    }  # fmt: skip
    assert set(EFFECTS) == set(NEEDED_BY) == {field.name for field in dataclasses.fields(Recipe)} - always


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_with_an_effect_is_accepted(name):
    value, needed, _ = EFFECTS[name]
    assert getattr(Recipe(**{name: value} | needed).settings(), name) == value


@pytest.mark.parametrize(
    ("name", "others"), [(name, others) for name, (_, _, without) in EFFECTS.items() for others in without], ids=str
)
def test_an_option_without_effect_is_refused_and_both_are_named(name, others):
    value = EFFECTS[name][0]
    with pytest.raises(InputError, match=f"{name} {value} has no effect with ") as raised:
        Recipe(**{name: value} | others)
    given, settings = re.findall(r"\bwith (\w+) ([\w.:-]+)", str(raised.value))[0], Recipe(**others).settings()
    assert f"{getattr(settings, given[0])}".startswith(given[1].rstrip("."))


@pytest.mark.parametrize(
    "values",
    [
        {"pattern": "2:4", "allocator": "uniform"},
        {"pattern": "2:4", "sparsity": 0.5},
        {"solver": "mask", "propagation": 0.0},
        {"sparsity": 0.0, "allocator": "uniform"},
        {"asymmetric": False},
        {"activation_order": False},
        {"keep_zeros": True, "route": "routed"},
        {"reconstruct": 0, "bits": 4},
        {"bits": 16},
        {"keep_zeros": True, "pattern": "2:4", "sparsity": 0.5, "bits": 16, "allocator": "uniform"},
        {"keep_zeros": False, "bits_per_weight": 3.0},
        {"plan": "p", "seed": 3, "num_sequences": 5, "calibration": "c4"},
    ],
    ids=str,
)
def test_a_value_that_only_states_what_happens_is_accepted(values):
    Recipe(**values)


@pytest.mark.parametrize(
    ("table", "names"), [(SOLVERS, set(NAMES.SOLVERS)), (CRITERIA, set(NAMES.CRITERIA))], ids=["solvers", "criteria"]
)
def test_settings_know_the_names_of_the_tables(table, names):
    assert set(table) == names


def test_settings_know_the_names_of_the_allocators():
    assert set(ALLOCATORS) | {"auto", "curves", "estimate", "search"} == set(NAMES.ALLOCATORS)
    assert set(NAMES.SPREADS) == set(ALLOCATORS) - {"uniform"}


# Without a goal

GOAL_VALUES = {
    "sparsity": 0.0, "pattern": "unstructured", "bits": 16, "bits_per_weight": 3.0, "target_size": "1GB", "plan": "p",
    "keep_zeros": True, "ms_per_token": 12.0, "speedup": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        {}, {"effort": "fast"}, {"asymmetric": True}, {"group_size": 64}, {"solver": "obs"}, {"allocator": "curves"},
        {"skip": ["a"]}, {"keep_zeros": False},
    ],
    ids=str,
)  # fmt: skip
def test_without_a_goal_it_is_the_size_of_int4(values):
    """Oracle: the arithmetic of int4 in groups of 64, with scales of 16 bits; and the same recipe with this size."""
    assert DEFAULT_BITS_PER_WEIGHT == 4 + 16 / 64
    outer = {"head_bits": 8, "embedding_bits": 8}
    assert Recipe(**values).settings() == Recipe(bits_per_weight=4.25, **outer, **values).settings()
    assert not Recipe(**values).has_goal
    assert Recipe(**values).asked().keys() == {name for name, value in values.items() if value is not None}


@pytest.mark.parametrize("goal", GOALS)
def test_a_goal_replaces_the_default(goal):
    recipe = Recipe(**{goal: GOAL_VALUES[goal]})
    assert recipe.has_goal
    assert recipe.settings().has_budget == (goal in ("bits_per_weight", "target_size", "ms_per_token", "speedup"))
    assert recipe.settings().bits_per_weight == (3.0 if goal == "bits_per_weight" else None)


@pytest.mark.parametrize("allocator", sorted({"search", "uniform", *NAMES.SPREADS}))
def test_an_allocator_of_sparsity_without_a_goal_says_what_to_add(allocator):
    message = f"bits_per_weight 4.25, the default, needs the allocator auto or curves, not {allocator}. .* sparsity 0.5"
    with pytest.raises(InputError, match=message):
        Recipe(allocator=allocator)
    assert Recipe(allocator=allocator, sparsity=0.5).settings().allocator == allocator


# Values


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
        (
            {"sparsity": 0.5, "allocator": "search", "search_minutes": 0},
            r"search_minutes must be a number above 0, not 0",
        ),
        ({"allocator": "search", "search_minutes": float("nan")}, r"search_minutes must be a number above 0, not nan"),
        ({"bits_per_weight": 3.0, "allocator": "search"}, r"needs the allocator auto or curves, not search"),
        ({"keep_zeros": True, "bits_per_weight": 3.0}, r"keep_zeros and bits_per_weight 3\.0 exclude each other"),
        ({"keep_zeros": True, "target_size": "1GB"}, r"keep_zeros and target_size 1GB exclude each other"),
        ({"keep_zeros": True, "plan": "p"}, r"keep_zeros and plan p exclude each other: one takes the zeros"),
        ({"keep_zeros": True, "pattern": "2:4", "sparsity": 0.6}, r"pattern 2:4 fixes the sparsity at 0\.5"),
        ({"bits": 5}, r"bits must be 16 \(not quantized\), 8, 4, 3 or 2, not 5"),
        ({"bits": 4.0}, r"bits must be of type int \| None, not 4\.0"),
        ({"bits": True}, r"bits must be of type int \| None, not True"),
        ({"group_size": 0}, r"group_size must be at least 1, not 0"),
        ({"group_size": "wide"}, r"group_size must be a number, 'auto' or 'row', not 'wide'"),
        ({"num_sequences": 0}, r"num_sequences must be at least 1"),
        ({"sensitivity_sequences": -1}, r"sensitivity_sequences must be at least 1"),
        ({"sensitivity_probes": 0}, r"sensitivity_probes must be at least 1"),
        ({"sequence_length": 1}, r"sequence_length must be at least 2, not 1"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], not 1\.5"),
        ({"alpha": float("nan")}, r"alpha must lie in"),
        ({"damp": -0.01}, r"damp must be a number >= 0"),
        ({"damp": float("inf")}, r"damp must be a number >= 0"),
        ({"damp": float("nan")}, r"damp must be a number >= 0"),
        ({"bos": "sometimes"}, r"Unknown bos 'sometimes': choose one of auto, no, yes"),
        ({"bos": True}, r"bos must be of type str \| None, not True"),
        ({"text_encoding": "latin-99"}, r"text_encoding 'latin-99' is no encoding that Python knows"),
        ({"text_encoding": "base64"}, r"text_encoding 'base64' is no encoding"),
        ({"text_encoding": ""}, r"text_encoding '' is no encoding"),
        ({"dtype": "float15"}, r"Unknown dtype 'float15': did you mean 'float1?[36]"),
        ({"skip": "lm_head"}, r"skip must be of type .*, not 'lm_head'"),
        ({"skip": ("(",)}, r"skip: '\(' is not a regular expression"),
        ({"only": "q_proj"}, r"only must be of type .*, not 'q_proj'"),
        ({"only": ("a", "[")}, r"only: '\[' is not a regular expression"),
        ({"asymmetric": 1}, r"asymmetric must be of type bool \| None, not 1"),
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
