"""Tasks of lm-evaluation-harness. Without it: what mspc makes of its results, and errors. With it: the wiring."""

import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gguf_models
import pytest
import tiny
import torch
from typer.testing import CliRunner

import mspc
from mspc.bench import tasks
from mspc.bench.tasks import compared, matches, paired_stderr, result_of
from mspc.cli.main import app
from mspc.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cloze_task

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (mspc[lm-eval])"
)
TASK = {"acc": [1.0, 0.0, 1.0, 1.0], "acc_norm": [0.0, 0.0, 1.0, 1.0]}


def raw(answers: dict[str, list[float]], **changes: object) -> dict[str, object]:
    """Results as the harness returns them: one task, and a group of it."""
    count = len(answers["acc"])
    samples = [
        {"doc_id": i, "filter": "none", **{name: values[i] for name, values in answers.items()}} for i in range(count)
    ]
    values: dict[str, object] = {"alias": "cloze", "sample_len": count, "perplexity,none": 7.0}
    for name, found in answers.items():
        values[f"{name},none"] = statistics.fmean(found)
        values[f"{name}_stderr,none"] = statistics.stdev(found) / math.sqrt(count)
    values["perplexity_stderr,none"] = "N/A"
    return {
        "results": {"cloze": values, "group": {"alias": " ", "acc,none": statistics.fmean(answers["acc"])}},
        "samples": {"cloze": [{**row, "perplexity": 1.0} for row in samples]},
        "higher_is_better": {"cloze": {"acc": True, "acc_norm": True, "perplexity": False}},
        "n-samples": {"cloze": {"original": 9, "effective": count}},
        "n-shot": {"cloze": 2},
        "versions": {"cloze": 1.0},
    } | changes  # fmt: skip


def test_scores_are_those_of_the_harness():
    """Oracle: the results by hand."""
    found = result_of(raw(TASK), "0.9")
    rows = {score.key: score for score in found.scores}
    assert list(rows) == [
        ("cloze", "perplexity", "none"), ("cloze", "acc", "none"), ("cloze", "acc_norm", "none"),
        ("group", "acc", "none"),
    ]  # fmt: skip
    acc = rows["cloze", "acc", "none"]
    assert (acc.value, acc.stderr, acc.higher_is_better) == (0.75, 0.25, True)
    assert (acc.questions, acc.num_fewshot, acc.version) == (4, 2, "1.0")
    assert rows["cloze", "perplexity", "none"].stderr is None
    assert set(found.answers) == {("cloze", "acc", "none"), ("cloze", "acc_norm", "none")}  # 7.0 is no mean of ones
    assert found.to_dict()["tasks"][0] == {
        "task": "cloze", "metric": "perplexity", "filter": "none", "value": 7.0, "higher_is_better": False,
        "questions": 4, "num_fewshot": 2, "version": "1.0",
    }  # fmt: skip
    json.dumps(found.to_dict())


def test_a_difference_has_the_error_of_paired_questions():
    """Oracle: the formula on four differences, 0, 0, 1 and 0."""
    one, other = result_of(raw(TASK), "0.9"), result_of(raw(TASK | {"acc": [1.0, 0.0, 0.0, 1.0]}), "0.9")
    rows = {score.key: score for score in compared(one, other).scores}
    acc = rows["cloze", "acc", "none"]
    assert (acc.value, acc.reference, acc.difference) == (0.75, 0.5, 0.25)
    assert acc.difference_stderr == pytest.approx(0.25)
    assert acc.reference_stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert rows["cloze", "acc_norm", "none"].difference_stderr == 0.0
    assert rows["cloze", "perplexity", "none"].difference_stderr is None
    assert rows["group", "acc", "none"].difference == 0.25
    assert rows["group", "acc", "none"].difference_stderr is None


def test_models_that_were_not_asked_the_same_are_not_compared():
    one = result_of(raw(TASK), "0.9")
    for change in ({"n-shot": {"cloze": 0}}, {"versions": {"cloze": 2}}, {"results": {}}):
        with pytest.raises(InputError, match="not asked the same questions"):
            compared(one, result_of(raw(TASK, **change), "0.9"))
    assert paired_stderr({0: 1.0, 1: 0.0}, {0: 1.0, 2: 0.0}) is None
    assert paired_stderr({0: 1.0}, {0: 1.0}) is None


def test_names_and_patterns():
    known = ["arc_easy", "mmlu", "mmlu_law", "mmlu_virology"]
    assert matches("mmlu", known) == ["mmlu"]
    assert matches("mmlu_*", known) == ["mmlu_law", "mmlu_virology"]
    with pytest.raises(InputError, match="Unknown task 'arc_eazy': did you mean 'arc_easy'"):
        matches("arc_eazy", known)
    with pytest.raises(InputError, match="`lm_eval ls tasks` lists those"):
        matches("zzz*", known)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    return result.stderr


def test_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mspc.bench.harness", raising=False)
    message = refused(llama, "--tasks", "arc_easy")
    assert "needs lm-evaluation-harness (lm_eval" in message
    assert "pip install '.[lm-eval]'" in message


def test_options_without_effect_are_refused(llama, tmp_path):
    for given in (("--limit", 3), ("--num-fewshot", 1), ("--include-path", tmp_path), ("--batch-size", 2)):
        assert f"{given[0]} has no effect without --tasks" in refused(llama, *given)
    for given in (("--text", "c4"), ("--max-windows", 3), ("--bos", "no"), ("--sequence-length", 32)):
        assert f"{given[0]} has no effect with --tasks" in refused(llama, "--tasks", "arc_easy", *given)
    assert "limit must be a whole number of at least 1" in refused(llama, "--tasks", "arc_easy", "--limit", 0)
    assert "tasks must be names of tasks" in refused(llama, "--tasks", ",")
    assert "is no folder" in refused(llama, "--tasks", "arc_easy", "--include-path", tmp_path / "no")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A harness that notes how it is called. A model answers the first question right if it is compressed."""
    calls: list[dict[str, object]] = []

    class Manager:
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            self.all_tasks = ["cloze", "far", "broken", "needy", *(["group"] if include_defaults else [])]
            self.all_subtasks = ["cloze", "far", "broken", "needy"]
            calls.append({"include_path": include_path, "include_defaults": include_defaults})

        def load(self, names: list[str]) -> dict[str, object]:
            if names == ["far"]:
                raise ConnectionError("Couldn't reach 'x/far' on the Hub (OfflineModeIsEnabled)")
            if names == ["broken"]:
                raise KeyError("test_split")
            if names == ["needy"]:
                raise ModuleNotFoundError("No module named 'langdetect'")
            task = SimpleNamespace(get_config=lambda key: 0)
            return {"tasks": {"cloze": task}, "groups": {"group": "the group"} if names == ["group"] else {}}

    def simple_evaluate(model: object, **options: object) -> dict[str, object]:
        print("something on stdout")
        calls.append({"model": model, **options})
        compressed = any(type(module).__name__ == "SparseLinear" for module in model.model.modules())
        return raw(TASK | {"acc": [float(compressed), 0.0, 1.0, 1.0]})

    harness, tasks_module, ours = ModuleType("lm_eval"), ModuleType("lm_eval.tasks"), ModuleType("mspc.bench.harness")
    harness.simple_evaluate, harness.__version__ = simple_evaluate, "0.9"
    tasks_module.TaskManager = Manager
    ours.Asked = lambda model, tokenizer, size, progress: SimpleNamespace(model=model, tokenizer=tokenizer, size=size)
    ours.alone = lambda: tiny_context()
    for module in (harness, tasks_module, ours):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


class tiny_context:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_a_model_and_its_reference_are_asked_the_same(fake, artifact_of, llama, capsys):
    """Oracle: the calls of a harness that notes them."""
    found = mspc.evaluate_tasks(
        artifact_of("llama"), "cloze, group", against=llama, limit=7, batch_size=3, device="cpu", progress=False
    )
    acc = next(score for score in found.scores if score.metric == "acc")
    assert (acc.value, acc.reference, acc.difference) == (0.75, 0.5, 0.25)
    assert acc.difference_stderr == pytest.approx(0.25)
    asked = [call for call in fake if "model" in call]
    assert [call["limit"] for call in asked] == [7, 7]
    assert [call["tasks"][1] for call in asked] == ["the group"] * 2
    assert [call["model"].size for call in asked] == [3, 3]
    assert all(call["model"].tokenizer.encode("a") for call in asked)
    assert capsys.readouterr().out == ""


def test_errors_of_tasks_are_said(fake, llama, tmp_path):
    assert "Task 'far': its data set cannot be reached (Couldn't reach 'x/far'" in refused(llama, "--tasks", "far")
    assert "Task 'broken' cannot be read (KeyError: 'test_split')" in refused(llama, "--tasks", "broken")
    assert "Task 'needy' needs a package that is not installed" in refused(llama, "--tasks", "needy")
    assert "Unknown task 'clooze': did you mean 'cloze'?" in refused(llama, "--tasks", "clooze")
    message = refused(llama, "--tasks", "cloze", "--num-fewshot", 2)
    assert "Task 'cloze' has no examples (its file says num_fewshot: 0)" in message
    assert not any("model" in call for call in fake)  # nothing was loaded for them
    refused(llama, "--tasks", "far", "--include-path", tmp_path)
    assert fake[-1] == {"include_path": str(tmp_path), "include_defaults": False}


def test_the_table_and_the_object(fake, artifact_of, llama):
    artifact = artifact_of("llama").path
    asked = ["eval", str(artifact), str(llama), "--tasks", "cloze", "--against", str(llama)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("cloze  acc (higher")]
    assert [row[5] for row in rows] == [str(llama), str(artifact), str(llama)]
    assert "(reference)" in rows[0]
    assert rows[1][6:] == ["0.7500", "±", "0.2500", "+0.2500", "±", "0.2500", "4", "2"]
    assert sum("model" in call for call in fake) == 3  # the reference once
    models = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["models"]
    assert [model["path"] for model in models] == [str(artifact), str(llama)]
    assert [row["difference"] for row in models[0]["tasks"] if row["metric"] == "acc"] == [0.25, 0.25]
    one = json.loads(CliRunner().invoke(app, ["eval", str(llama), "--tasks", "cloze", "--json"]).stdout)
    assert one.keys() == {"tasks", "lm_eval_version"}


def test_a_question_of_the_example_has_one_right_answer():
    """Oracle: the text that it is made of."""
    texts = [" ".join(text.split()) for text in cloze_task.documents("test")]
    found = cloze_task.questions(20)
    assert found == cloze_task.questions(20)
    for question in found:
        whole = [f"{question['context']} {choice}" for choice in question["choices"]]
        assert len(set(question["choices"])) == 4
        assert any(whole[question["answer"]] in text for text in texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cloze_task.write(tmp_path_factory.mktemp("tasks"), count=12).parent


def answers_of(model: torch.nn.Module, folder: Path) -> list[float]:
    """Oracle: the accuracy by hand, from logits of transformers, one prompt at a time."""
    tokenizer, found = tiny.byte_tokenizer(), []
    for line in (folder / "builtin_cloze.jsonl").read_text().splitlines():
        question = json.loads(line)
        scores = []
        for choice in question["choices"]:
            begin = tokenizer(question["context"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{question['context']} {choice}")["input_ids"]])[:, -129:]
            count = ids.shape[1] - min(len(begin), ids.shape[1])
            count = len(tokenizer(f" {choice}")["input_ids"]) if count == 0 else count
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits[0, -count:].double().log_softmax(-1)
            scores.append(float(logits.gather(1, ids[0, -count:, None]).sum()))
        found.append(float(scores.index(max(scores)) == question["answer"]))
    return found


@needs_harness
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dense", "artifact", "sparse", "module"])
def test_every_kind_of_model_is_asked(kind, folder, llama, artifact_of, tmp_path):
    """Oracle: log probabilities of transformers by hand."""
    artifact = artifact_of("llama")
    models: dict[str, Callable[[], object]] = {
        "dense": lambda: llama,
        "artifact": lambda: artifact,
        "sparse": lambda: mspc.export(artifact, "sparse", tmp_path / "sparse", verify=False, progress=False),
        "module": lambda: mspc.load(artifact, device="cpu"),
    }
    model = models[kind]()
    tokenizer = {"tokenizer": tiny.byte_tokenizer()} if kind == "module" else {}
    states = torch.get_rng_state()
    found = mspc.evaluate_tasks(model, "builtin_cloze", include_path=folder, device="cpu", progress=False, **tokenizer)
    assert torch.equal(states, torch.get_rng_state())
    loaded = model if kind == "module" else mspc.load(model, device="cpu")
    expected = answers_of(loaded, folder)
    acc = found.scores[0]
    assert (acc.task, acc.metric, acc.questions, acc.num_fewshot) == ("builtin_cloze", "acc", 12, 0)
    assert acc.value == statistics.fmean(expected)
    assert list(found.answers[acc.key].values()) == expected
    assert acc.stderr == pytest.approx(statistics.stdev(expected) / math.sqrt(12))


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_is_asked(folder, artifact_of, tmp_path, monkeypatch):
    """Oracle: the dense export of the same artifact."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    artifact = artifact_of(gguf_models.build("llama", tmp_path / "model"), bits=16, sparsity=0.5)
    options = {"include_path": folder, "limit": 4, "device": "cpu", "progress": False}
    dense, out = (
        mspc.export(artifact, name, tmp_path / name, verify=False, progress=False) for name in ("dense", "gguf")
    )
    expected = mspc.evaluate_tasks(dense, "builtin_cloze", **options)
    found = mspc.evaluate_tasks(next(out.glob("*.gguf")), "builtin_cloze", against=expected, **options)
    assert found.answers == expected.answers
    assert [score.difference for score in found.scores] == [0.0, 0.0]


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_the_harness_on_the_command_line(folder, llama, artifact_of):
    """Examples in the prompt, a limit, a reference; and a task whose data cannot be reached."""
    asked = ["eval", str(artifact_of("llama").path), "--tasks", "builtin_cloze", "--include-path", str(folder)]
    result = CliRunner().invoke(app, [*asked, "--against", str(llama), "--limit", "5", "--num-fewshot", "1", "--json"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["tasks"]
    assert [(row["metric"], row["questions"], row["num_fewshot"]) for row in rows] == [
        ("acc", 5, 1), ("acc_norm", 5, 1),
    ]  # fmt: skip
    assert all(row["difference"] == row["value"] - row["reference"] for row in rows)
    assert "Comparing answers: done" in result.stderr
    far = folder / "far.yaml"
    far.write_text((folder / "builtin_cloze.yaml").read_text().replace("builtin_cloze\n", "far\n", 1))
    far.write_text(far.read_text().replace("dataset_path: json", "dataset_path: nobody/nothing").split("dataset_kw")[0])
    with far.open("a") as file:
        file.write("test_split: test\noutput_type: multiple_choice\n")
    message = refused(llama, "--tasks", "far", "--include-path", folder)
    assert "Task 'far': its data set cannot be reached" in message


def test_the_request_is_checked(fake):
    with pytest.raises(InputError, match="A model in memory needs tokenizer="):
        mspc.evaluate_tasks(tiny.make("llama"), "cloze", progress=False)
    with pytest.raises(InputError, match="batch_size must be"):
        tasks.Request(("a",), None, None, None, 0)
