"""The cost of a compression: predictions against the dense model's, bytes and seconds, in the manifest and in words."""

import logging
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from conftest import BUNDLED
from test_resume import killed_at

import mspc
from mspc.model.hub import load_tokenizer
from mspc.model.open import open_model
from mspc.passes.perplexity import divergence, means, window_sums
from mspc.pipeline import cost
from mspc.pipeline import run as pipeline
from mspc.pipeline.calibration import TEST_WINDOWS
from mspc.pipeline.cost import unigram_loss, warn_if_guessing
from mspc.pipeline.summary import cost_lines, hurt_line, number
from mspc.progress import Silent
from mspc.sizes import in_words
from mspc.text.tokens import Tokens, calibration_tokens

CPU = torch.device("cpu")
QUICK = {"sparsity": 0.5, "effort": "fast", "num_sequences": 4, "sequence_length": tiny.LENGTH}


@pytest.fixture(scope="module")
def artifact(llama: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> mspc.Artifact:
    return compress(llama, tmp_path_factory.mktemp("cost") / "out", calibration, sparsity=0.3)


def compress(model: Path, out: Path, calibration: Path, **recipe: object) -> mspc.Artifact:
    """A quick artifact that is evaluated."""
    return tiny.compress(model, out, calibration, **{"effort": "fast", "eval": True} | recipe)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


# Predictions


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_scores_are_the_closed_form(size):
    """Oracle: sums over a vocabulary of three in float64, written out. The window comes in parts of this size."""
    logits = torch.tensor([[[0.3, -1.0, 2.0], [1.0, 0.0, -2.0], [0.1, 0.2, 0.3], [0.5, 0.5, 9.0]]] * 2)
    logits[1] += torch.tensor([0.4, 0.0, -0.7])
    model, dense, window = logits[0], logits[1], torch.tensor([2, 0, 1, 2])
    sums = window_sums(window, model.log_softmax(-1).split(size), dense.log_softmax(-1).split(size), 1)
    nlls, reference_nlls, kl = [], [], []
    for position in (1, 2, 3):
        q, p = ([math.exp(x) for x in rows[position].tolist()] for rows in (model, dense))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        if position < 3:
            nlls.append(-math.log(q[window[position + 1]]))
            reference_nlls.append(-math.log(p[window[position + 1]]))
    found = means([sums], 4, 1)
    assert found.nll == pytest.approx(sum(nlls) / 2, rel=1e-6)
    assert found.perplexity == math.exp(found.nll)
    assert found.reference_perplexity == pytest.approx(math.exp(sum(reference_nlls) / 2), rel=1e-6)
    assert found.divergence == pytest.approx(sum(kl) / 3, rel=1e-5)
    assert (found.tokens, found.windows, found.sequence_length) == (2, 1, 4)
    assert (found.perplexity_interval, found.divergence_interval, found.reference_perplexity_interval) == (None,) * 3


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_the_evaluation_is_that_of_text_that_nothing_has_seen(effort, llama, calibration, tmp_path):
    """Oracles: transformers' losses for the models as they are loaded; the tokens of the run, drawn again."""
    made = compress(llama, tmp_path / "out", calibration, effort=effort, num_sequences=8, iterations=2)
    validation = 1 if effort == "default" else 0
    drawn = calibration_tokens(load_tokenizer(llama), str(calibration), 8 + validation + 16, tiny.LENGTH, 0).ids
    windows = drawn[8 + validation :]
    seen = {tuple(row) for row in drawn[: 8 + validation].tolist()}
    assert not seen & {tuple(row) for row in windows.tolist()}
    found = made.manifest["evaluation"]
    assert (found["windows"], found["tokens"], found["text"]) == (16, 16 * (tiny.LENGTH - 1), str(calibration))
    dense = made.export("dense", tmp_path / "dense", verify=False, progress=False)
    with torch.no_grad():
        for folder, key in ((llama, "dense_perplexity"), (dense, "perplexity")):
            of_windows = tiny.losses(tiny.reference(folder), windows).double().mean(1)
            assert found[key]["mean"] == pytest.approx(math.exp(of_windows.mean()), rel=1e-5)
            half = 2.13145 * of_windows.std() / 4  # the quantile of 15 degrees, by the tables
            expected = [math.exp(of_windows.mean() - half), math.exp(of_windows.mean() + half)]
            assert found[key]["interval"] == pytest.approx(expected, rel=1e-4)
    again = mspc.evaluate(made, windows, against=llama, progress=False)
    assert found["divergence"]["mean"] == pytest.approx(again.divergence, rel=1e-6)
    assert found["divergence"]["interval"] == pytest.approx(again.divergence_interval, rel=1e-5)
    assert found["sha256"] == Tokens(windows, "").sha256


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_logits_in_parts_are_those_of_the_window(family, folder_of, llama, monkeypatch):
    """Oracle: all logits of a window at once."""
    other, ids = tiny.make(family, seed=3), tiny.ids(3, 13)
    whole = mspc.evaluate(folder_of(family), ids, progress=False)
    assert whole.nll == pytest.approx(float(tiny.losses(tiny.reference(folder_of(family)), ids).mean()), rel=1e-5)
    monkeypatch.setattr("mspc.passes.perplexity.LOGITS_AT_ONCE", 5 * tiny.VOCABULARY)
    parts = mspc.evaluate(folder_of(family), ids, progress=False)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)
    against = mspc.evaluate(folder_of(family), ids, against=folder_of(family), progress=False)
    assert (against.divergence, against.nll) == (0, parts.nll)
    assert mspc.evaluate(other, ids, against=folder_of(family), progress=False).divergence > 0


def test_windows_that_begin_with_bos_are_scored_as_eval_does(llama, calibration, tmp_path):
    """Oracle: `evaluate` of the artifact, by its own pass, on the same windows."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    made = mspc.compress(
        llama, mspc.Recipe(**QUICK, bos="yes", calibration=str(calibration)), out=tmp_path / "out",
        tokenizer=tokenizer, progress=False,
    )  # fmt: skip
    found = made.manifest["evaluation"]
    assert found["tokens"] == 16 * (tiny.LENGTH - 1)
    from mspc.text.reading import Reading

    drawn = calibration_tokens(tokenizer, str(calibration), 4, tiny.LENGTH, 0, Reading("yes"), spare=16)
    assert len(drawn.ids) == 20
    assert (drawn.ids[:, 0] == 256).all()
    again = mspc.evaluate(made, drawn.ids[4:], against=llama, progress=False)
    assert found["perplexity"]["mean"] == pytest.approx(again.perplexity, rel=1e-6)


@pytest.mark.parametrize("spare", [0, 7, 500])
def test_spare_windows_follow_the_same_first_ones(spare, llama, calibration):
    tokenizer = load_tokenizer(llama)
    first = calibration_tokens(tokenizer, str(calibration), 9, tiny.LENGTH, 3).ids
    drawn = calibration_tokens(tokenizer, str(calibration), 9, tiny.LENGTH, 3, spare=spare).ids
    assert torch.equal(drawn[:9], first)
    assert len(drawn) == (9 + spare if spare < 500 else 3000 // tiny.LENGTH)
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn)


@pytest.mark.parametrize(
    ("given", "left"),
    [({"calibration": ["word " * 160]}, 21), ({"calibration": ["word " * 126]}, 15), ({"calibration": tiny.ids(4)}, 0)],
    ids=["enough", "one window too few", "token ids"],
)
def test_too_little_text_is_a_note_and_no_figure(given, left, llama, tmp_path, caplog):
    recipe = mspc.Recipe(**(QUICK if left else {"sparsity": 0.5, "effort": "fast"}))
    with caplog.at_level("INFO", "mspc"):
        made = mspc.compress(llama, recipe, out=tmp_path / "out", progress=False, **given)
    noted = [record for record in caplog.records if "16 windows are needed that neither" in record.getMessage()]
    if left >= TEST_WINDOWS:
        assert noted == []
        assert made.manifest["evaluation"]["windows"] == 16
    else:
        assert [record.levelno for record in noted] == [logging.WARNING]
        assert f"and {left} are left" in noted[0].getMessage()
        assert made.manifest["evaluation"] is None
        assert not any("perplexity" in line for line in cost_lines(made.manifest))


def test_given_ids_beyond_the_calibration_are_test_text(llama, tmp_path):
    ids = tiny.ids(22)
    made = mspc.compress(
        llama,
        mspc.Recipe(sparsity=0.5, effort="fast", num_sequences=5),
        out=tmp_path / "out",
        calibration=ids,
        progress=False,
    )
    assert made.manifest["evaluation"]["sha256"] == Tokens(ids[5:21], "").sha256


def test_without_evaluation_every_weight_is_the_same(artifact, llama, calibration, tmp_path):
    without = compress(llama, tmp_path / "out", calibration, sparsity=0.3, eval=False)
    assert weights(without.path) == weights(artifact.path)
    assert without.manifest["evaluation"] is None
    assert "Evaluating" not in without.manifest["seconds_by_stage"]
    assert without.manifest["settings"] == artifact.manifest["settings"]


def test_activations_that_overflow_are_a_note_and_the_artifact_is_finished(
    artifact, llama, calibration, tmp_path, caplog, monkeypatch
):
    def overflow(*_: object) -> None:
        raise mspc.ActivationError("model.layers.1: its output contains NaN")

    monkeypatch.setattr(cost, "score", overflow)
    monkeypatch.setattr(pipeline, "warn_if_guessing", lambda *_: None)
    made = compress(llama, tmp_path / "out", calibration, sparsity=0.3)
    assert weights(made.path) == weights(artifact.path)
    assert made.manifest["evaluation"] is None
    assert "the cost could not be measured on the test text: model.layers.1" in caplog.text


def test_a_run_killed_in_the_evaluation_solves_nothing_again(artifact, llama, calibration, tmp_path, monkeypatch):
    """Oracle: the artifact of a run that was not killed."""
    out = tmp_path / "out"
    options = {"sparsity": 0.3, "effort": "fast"}
    assert killed_at(2, cost, "_install", lambda: compress(llama, out, calibration, **options))
    monkeypatch.setattr(pipeline, "solve_blocks", lambda *_, **__: pytest.fail("solved again"))
    for evaluated in (True, False):  # the rest of the run may also go without
        recipe = mspc.Recipe(
            calibration=str(calibration), num_sequences=4, sequence_length=tiny.LENGTH, eval=evaluated, **options
        )
        copied = tmp_path / f"out-{evaluated}"
        copied.mkdir()
        for file in (file for file in out.rglob("*") if file.is_file()):
            (copied / file.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
            (copied / file.relative_to(out)).write_bytes(file.read_bytes())
        made = mspc.compress(llama, recipe, out=copied, progress=False, resume=True)
        assert weights(made.path) == weights(artifact.path)
        assert made.manifest["evaluation"] == (artifact.manifest["evaluation"] if evaluated else None)


# Words


def test_a_model_that_fits_its_text_is_not_said_to_guess_and_one_that_does_not_is(caplog):
    """The trained model on its own kind of text, and on four texts that are not."""
    model, tokenizer = open_model(BUNDLED, device=CPU), load_tokenizer(BUNDLED)
    ids = calibration_tokens(tokenizer, "builtin", 4, 128, 0).ids
    words = ("привет", "мир", "дом", "человек", "время", "жизнь", "день", "рука", "работа")
    foreign = " ".join(random.Random(0).choices(words, k=300))
    shuffled = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    cases = {
        "as it is": ids,
        "in short windows": ids.view(-1, 32)[:4],
        "ids of another tokenizer": shuffled[ids],
        "ids that are one off": (ids + 1) % 4096,
        "noise": torch.randint(4096, (4, 128), generator=torch.Generator().manual_seed(0)),
        "another language": torch.tensor(tokenizer(foreign)["input_ids"][:512]).view(4, 128),
    }
    for name, given in cases.items():
        caplog.clear()
        warn_if_guessing(model, Tokens(given, name), Silent())
        told = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == (0 if name in ("as it is", "in short windows") else 1), name
        assert all(f"its loss on {name} is" in record.getMessage() for record in told)


def test_the_unigram_loss_is_the_entropy_of_the_tokens():
    """Oracle: a count by hand, the correction of Miller (1955); and the entropy of a known distribution."""
    ids = torch.tensor([[9, 1, 2, 1], [9, 1, 3, 2]])
    counts = Counter([1, 2, 1, 1, 3, 2])
    expected = -sum(math.log(counts[token] / 6) for token in (1, 3, 2)) / 3 + 2 / 12
    assert unigram_loss(ids, ids[1:], begin=1) == pytest.approx(expected)
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    drawn = torch.multinomial(shares, 60_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(
        -1, 100
    )
    assert unigram_loss(drawn, drawn) == pytest.approx(float(-(shares * shares.log()).sum()), rel=0.01)


def test_guessing_is_said_before_the_work(llama, calibration, tmp_path, caplog):
    """A random model guesses."""
    order: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            order.append(record.getMessage())

    handler = Note(logging.ERROR)
    logging.getLogger("mspc").addHandler(handler)
    try:
        recipe = mspc.Recipe(**QUICK | {"effort": "default"}, calibration=str(calibration), iterations=2)
        mspc.compress(llama, recipe, out=tmp_path / "out", progress=lambda event: order.append(event.stage))
    finally:
        logging.getLogger("mspc").removeHandler(handler)
    (said,) = (i for i, line in enumerate(order) if line.startswith("the dense model is close to guessing"))
    assert said < order.index("Gradients")
    assert "Check that the tokenizer belongs to the weights" in order[said]


@pytest.mark.parametrize(
    ("settings", "helps", "not_said"),
    [
        (
            {"sparsity": 0.9, "bits": 16, "effort": "default"},
            ["less --sparsity than 0.9", "--bits-per-weight"],
            "--bits ",
        ),
        ({"sparsity": 0.5, "bits": 2, "effort": "fast"}, ["more --bits than 2", "--effort default"], "plan"),
        (
            {"bits_per_weight": 2.0, "bits": 16, "effort": "default"},
            ["a larger --bits-per-weight than 2.0"],
            "--sparsity",
        ),
        ({"target_size": "2MB", "bits": 16, "effort": "best"}, ["a larger --target-size than 2MB"], "--sparsity"),
        ({"pattern": "2:4", "bits": 4, "effort": "best"}, ["a pattern that keeps more than 2:4"], "--sparsity than"),
        ({"keep_zeros": True, "bits": 3, "effort": "best"}, ["more --bits than 3"], "--bits-per-weight"),
        ({"plan": "plan.json", "bits": 16, "effort": "best"}, ["a plan with more bits"], "--bits-per-weight"),
    ],
)
def test_a_badly_hurt_model_is_said_to_be_so_with_what_would_help(settings, helps, not_said):
    manifest = {
        "settings": {"pattern": "unstructured"} | settings, "sparsity": {"achieved": settings.get("sparsity", 0.4)},
        "evaluation": {"divergence": {"mean": 0.51, "interval": [0.4, 0.6]}},
    }  # fmt: skip
    said = hurt_line(manifest)
    assert "badly hurt: its KL from the dense model is 0.5100 nats per token" in said
    assert "--calibration" in said
    assert all(part in said for part in helps)
    assert not_said not in said
    manifest["evaluation"]["divergence"]["mean"] = None  # infinite
    assert "inf nats" in hurt_line(manifest)
    manifest["evaluation"]["divergence"]["mean"] = 0.5
    assert hurt_line(manifest) is None
    assert hurt_line(manifest | {"evaluation": None}) is None


def test_the_cost_in_words(artifact):
    lines = cost_lines(artifact.manifest)
    assert [line.split(":")[0] for line in lines] == ["Cost", "Size", "Seconds"]
    found = artifact.manifest["evaluation"]
    assert f"perplexity {number(found['dense_perplexity']['mean'])} (" in lines[0]
    assert f"KL from the dense model {number(found['divergence']['mean'])} (" in lines[0]
    assert "16 windows of 32 tokens" in lines[0]
    sizes = artifact.manifest["bytes"]
    assert f"{sizes['dense'] / sizes['sparse_export']:.1f} times smaller" in lines[1]
    assert f"{in_words(sizes['embeddings'])} of it" in lines[1]
    assert all(stage.lower() in lines[2] for stage in artifact.manifest["seconds_by_stage"])
    assert cost_lines({}) == []  # of an older manifest


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12.3456, "12.35"), (123456.7, "123,457"), (0.0123456, "0.01235"), (1.0, "1.000"), (0.0, "0"), (2e-7, "2e-07"),
     (999.96, "1,000.0"), (None, "inf"), (math.inf, "inf"), (1.5e12, "1.5e+12")],
)  # fmt: skip
def test_numbers_have_four_digits(value, shown):
    assert number(value) == shown


def test_tokens_that_both_models_exclude_add_nothing():
    """Oracle: the divergence of the same predictions without these tokens."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 7, generator=generator).log_softmax(-1)
    masked = [torch.cat([one, torch.full((3, 2), -math.inf)], -1) for one in (p, q)]
    assert divergence(*masked) == divergence(p, q)
