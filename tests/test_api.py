"""The public functions: models and texts in memory against the same in folders; progress that stops; one import."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mspc
from mspc.text.tokens import calibration_tokens, windows_of_test_text

QUICK = {"sparsity": 0.5, "effort": "fast", "num_sequences": 4, "sequence_length": 32}


def recipe(calibration: Path, **values) -> mspc.Recipe:
    return mspc.Recipe(**QUICK | {"calibration": str(calibration)} | values)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def artifact(llama, calibration, tmp_path_factory) -> mspc.Artifact:
    return mspc.compress(llama, recipe(calibration), out=tmp_path_factory.mktemp("api") / "out", progress=False)


@pytest.fixture
def model(llama):
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)


def test_a_model_in_memory_gives_the_matrices_of_its_folder_and_stays_as_it_is(
    model, artifact, llama, calibration, tmp_path
):
    """Oracle: the artifact of the folder; the state dict of the model before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model.train()
    made = mspc.compress(model, recipe(calibration), out=tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert {k: v for k, v in weights(made.path).items() if k.startswith("matrices")} == {
        k: v for k, v in weights(artifact.path).items() if k.startswith("matrices")
    }
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # what it was saved to is gone
    assert (made.path / "tokenizer.json").is_file()
    again = mspc.compress(
        model, recipe(calibration), out=tmp_path / "out", tokenizer=tokenizer, progress=False, resume=True
    )
    assert again.path == made.path


@pytest.mark.parametrize("name", ["", ".", "..", "/", "None", "a/.."])
def test_a_model_in_memory_writes_nothing_but_its_artifact(name, model, tmp_path):
    """Whatever its name says, and although its config is the caller's."""
    model.config.name_or_path, model.config.architectures = name, None
    options = {"calibration": tiny.ids(4), "progress": False, "exports": ["dense"]}
    made = mspc.compress(model, mspc.Recipe(sparsity=0.5, effort="fast"), out=tmp_path / "deep" / "out", **options)
    assert made.manifest["source"]["name"] == "LlamaForCausalLM"
    assert [path.name for path in tmp_path.rglob("*") if "out" not in path.parts] == ["deep"]
    assert model.config.architectures is None


def test_a_second_run_does_not_disturb_the_model_of_the_first(model, tmp_path):
    refused = []

    def again(event: mspc.Event) -> None:
        if not refused:
            with pytest.raises(mspc.InputError, match="being written by another") as raised:
                mspc.compress(model, mspc.Recipe(), **options, progress=False, resume=True)
            refused.append(raised)

    options = {"calibration": tiny.ids(9), "out": tmp_path / "out"}
    mspc.compress(model, mspc.Recipe(sparsity=0.5, effort="fast"), **options, progress=again)
    assert refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": {"sparsity": 0.5}}, "recipe must be an mspc.Recipe"),
        ({"exports": "sparse"}, r"exports must be a list of formats, such as \['sparse'\]"),
        ({"calibration": {"text": "a"}}, "calibration must be the name of a text source"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments, said, llama, tmp_path):
    with pytest.raises(mspc.InputError, match=said):
        mspc.compress(llama, out=tmp_path / "out", progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_model_in_memory_and_a_text_need_a_tokenizer(model, calibration, tmp_path):
    with pytest.raises(mspc.InputError, match="A model in memory needs tokenizer="):
        mspc.compress(model, recipe(calibration), out=tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_documents_is_calibration_text(artifact, llama, calibration, tmp_path):
    """Oracle: the same text as a file."""
    documents = ["", calibration.read_text(), "  "]
    made = mspc.compress(llama, mspc.Recipe(**QUICK), out=tmp_path / "a", calibration=documents, progress=False)
    assert weights(made.path) == weights(artifact.path)
    assert made.manifest["calibration"]["source"] == "a list of 3 documents"
    named = mspc.compress(llama, mspc.Recipe(**QUICK), out=tmp_path / "b", calibration=calibration, progress=False)
    assert weights(named.path) == weights(artifact.path)
    assert mspc.Recipe.from_toml(named.path / "recipe.toml").calibration == str(calibration)


@pytest.mark.parametrize("documents", [[], ["", " "], ["text", 3]], ids=str)
def test_documents_that_are_no_text_are_refused(documents, llama, tmp_path):
    with pytest.raises(mspc.InputError, match=r"no text|Document 1"):
        mspc.compress(llama, mspc.Recipe(**QUICK), out=tmp_path / "out", calibration=documents, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_token_ids_are_calibration_text(dtype, artifact, model, llama, calibration, tmp_path):
    """Oracle: the tokens that the run of the text draws. No tokenizer is needed."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = calibration_tokens(tokenizer, str(calibration), 4, 32, 0).ids
    made = mspc.compress(
        model, mspc.Recipe(sparsity=0.5, effort="fast"), out=tmp_path / "out", calibration=ids.to(dtype), progress=False
    )
    assert made.manifest["calibration"]["sha256"] == artifact.manifest["calibration"]["sha256"]
    assert made.manifest["settings"]["num_sequences"] == 4
    assert weights(made.path)["matrices/00000.safetensors"] == weights(artifact.path)["matrices/00000.safetensors"]


def test_some_of_many_given_sequences_are_validation_text(llama, tmp_path):
    """By definition: one in nine, where plans are compared."""
    given = mspc.Recipe(sparsity=0.5, iterations=2)
    made = mspc.compress(llama, given, out=tmp_path / "out", calibration=tiny.ids(20), progress=False)
    assert made.manifest["settings"]["num_sequences"] == 18
    assert set(made.manifest["allocation"]["tried"]) == {"curves", "curves x0.75"}


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (torch.zeros(4, 32), {}, "must be integers, not torch.float32"),
        (torch.zeros(32, dtype=torch.int64), {}, r"shape \(N, T\)"),
        (torch.full((2, 32), 10**6), {}, r"vocabulary, .*lie in 1000000 \.\. 1000000"),
        (torch.full((2, 32), -1), {}, "vocabulary"),
        (torch.zeros(2, 32, dtype=torch.int64), {"num_sequences": 3}, r"num_sequences is 3, but .*\(2, 32\)"),
        (torch.zeros(2, 32, dtype=torch.int64), {"sequence_length": 16}, "sequence_length is 16"),
        (torch.zeros(2, 4096, dtype=torch.int64), {}, "longer than the model allows"),
        (torch.zeros(1, 32, dtype=torch.int64), {"reconstruct": 3}, "num_sequences above 1"),
        (torch.zeros(2, 32, dtype=torch.int64), {"calibration": "c4"}, "calibration c4 of the recipe has no effect"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, values, message, llama, tmp_path):
    with pytest.raises(mspc.InputError, match=message):
        mspc.compress(
            llama,
            mspc.Recipe(sparsity=0.5, effort="fast", **values),
            out=tmp_path / "out",
            calibration=ids,
            progress=False,
        )
    assert not (tmp_path / "out").exists()


def test_measurements_of_ids_of_another_shape_are_others(llama, tmp_path):
    """Oracle: the run without kept measurements."""
    asked, kept = mspc.Recipe(sparsity=0.5, allocator="curves", iterations=2), tmp_path / "kept"
    first, second = tiny.ids(8), tiny.ids(8).view(4, 64)
    mspc.compress(llama, asked, out=tmp_path / "a", calibration=first, measurements=kept, progress=False)
    made = mspc.compress(llama, asked, out=tmp_path / "b", calibration=second, measurements=kept, progress=False)
    alone = mspc.compress(llama, asked, out=tmp_path / "c", calibration=second, progress=False)
    assert weights(made.path) == weights(alone.path)


def test_a_changed_config_is_another_run(model, tmp_path):
    options = {"calibration": tiny.ids(4), "out": tmp_path / "out"}
    with pytest.raises(mspc.Stopped):
        mspc.compress(
            model, mspc.Recipe(sparsity=0.5, effort="fast"), **options, progress=lambda e: e.stage != "Compressing"
        )
    model.config.rms_norm_eps = 0.5
    with pytest.raises(mspc.InputError, match=r"source\.config was"):
        mspc.compress(model, mspc.Recipe(sparsity=0.5, effort="fast"), **options, progress=False, resume=True)


# Progress


def test_events_count_the_steps_of_each_stage(llama, calibration, tmp_path):
    events: list[mspc.Event] = []
    made = mspc.compress(llama, recipe(calibration), out=tmp_path / "out", progress=events.append)
    stages = {event.stage: [e for e in events if e.stage == event.stage] for event in events}
    assert list(stages) == [
        "Checking weights", "Trying the dense model", "Gradients", "Loss curves", "Copying other weights",
        "Compressing", "Evaluating",
    ]  # fmt: skip
    for of_stage in stages.values():
        assert [event.done for event in of_stage] == list(range(of_stage[0].total + 1))
    for event, row in zip(stages["Compressing"][1:], made.manifest["matrices"], strict=True):
        assert event.matrix == row["name"]
        assert event.row == {key: row[key] for key in event.row}
        assert {"shape", "pattern", "bits", "output_error", "damp"} < event.row.keys()


def test_a_callable_that_returns_false_stops_after_the_block_and_resume_goes_on(artifact, llama, calibration, tmp_path):
    """Oracle: the artifact of a run that was not stopped."""
    out = tmp_path / "out"

    def stop_in_the_first_block(event: mspc.Event) -> bool:
        return not (event.stage == "Compressing" and event.done == 2)

    with pytest.raises(mspc.Stopped, match=r"Stopped at 'Compressing', .*resume continues it"):
        mspc.compress(llama, recipe(calibration), out=out, progress=stop_in_the_first_block)
    journal = (out / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line).get("block") for line in journal] == [None, None, 0]  # header, plan, block
    assert not (out / "mspc.json").exists()
    resumed: list[mspc.Event] = []
    made = mspc.compress(llama, recipe(calibration), out=out, progress=resumed.append, resume=True)
    assert weights(made.path) == weights(artifact.path)
    counted = [(event.done, event.total) for event in resumed if event.stage == "Compressing"]
    assert counted == [(done, 14) for done in range(7, 15)]  # the other block's matrices


@pytest.mark.parametrize("stop", [1, 7, 8, 14])
@pytest.mark.parametrize("reconstruct", [0, 2])
def test_a_run_that_was_stopped_anywhere_ends_the_same(stop, reconstruct, llama, calibration, tmp_path):
    """Oracle: a run that was not stopped. What was solved up to the end of the block is committed."""
    asked, out = recipe(calibration, reconstruct=reconstruct, num_sequences=16), tmp_path / "out"
    whole = mspc.compress(llama, asked, out=tmp_path / "whole", progress=False)
    with pytest.raises(mspc.Stopped):
        mspc.compress(llama, asked, out=out, progress=lambda e: not (e.stage == "Compressing" and e.done == stop))
    assert len(list((out / "matrices").iterdir())) == (1 if stop <= 7 else 2)
    made = mspc.compress(llama, asked, out=out, progress=False, resume=True)
    assert weights(made.path) == weights(whole.path)


def test_a_failure_to_write_is_not_hidden_by_a_stop(llama, calibration, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise mspc.StorageError("the disk is full")

    monkeypatch.setattr("mspc.pipeline.solve_blocks.write_tensors", full)
    with pytest.raises(mspc.StorageError, match="the disk is full"):
        mspc.compress(
            llama, recipe(calibration), out=tmp_path / "out", progress=lambda e: e.stage != "Compressing" or e.done < 2
        )


@pytest.mark.parametrize("progress", [None, 3, "yes"])
def test_progress_that_is_none_is_refused(progress, llama, tmp_path):
    with pytest.raises(mspc.InputError, match="progress must be True, False or a function"):
        mspc.compress(llama, out=tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("work", ["evaluate", "export", "verify"])
def test_the_other_functions_stop_too(work, artifact, test_text, tmp_path):
    dense = mspc.export(artifact, "dense", tmp_path / "dense", progress=False)
    calls = {
        "evaluate": lambda: mspc.evaluate(artifact, test_text, sequence_length=32, progress=lambda event: False),
        "export": lambda: mspc.export(artifact, "sparse", tmp_path / "sparse", progress=lambda event: False),
        "verify": lambda: mspc.verify(dense, artifact, progress=lambda event: False),
    }
    with pytest.raises(mspc.Stopped):
        calls[work]()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_messages_go_through_logging(llama, calibration, tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO, "mspc"):
        mspc.compress(llama, recipe(calibration, sparsity=0), out=tmp_path / "out", progress=False)
    assert "the plan prunes and quantizes nothing" in caplog.text
    assert capsys.readouterr() == ("", "")


# Artifacts


def test_a_flipped_byte_of_an_artifact_is_noticed(artifact, test_text, tmp_path):
    folder = shutil.copytree(artifact.path, tmp_path / "copy")
    file = next(folder.glob("unchanged/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    for work in (
        lambda: mspc.load(folder, device="cpu"),
        lambda: mspc.evaluate(folder, test_text, sequence_length=32, progress=False),
        lambda: mspc.evaluate(artifact, test_text, sequence_length=32, against=folder, progress=False),
    ):
        with pytest.raises(mspc.InputError, match=f"{file.name} is damaged"):
            work()
    mspc.load(folder, device="cpu", check=False)


def test_an_artifact_is_made_of_a_string_and_reads_its_manifest_once(artifact):
    same = mspc.Artifact(str(artifact.path))
    assert same.manifest == json.loads((artifact.path / "mspc.json").read_text())
    assert same.manifest is same.manifest
    assert "14 matrices, sparsity 50.00%" in str(same)
    html = same._repr_html_()
    assert html.count("<tr>") == 15
    assert "model.layers.0.self_attn.q_proj" in html


def test_an_artifact_loads_exports_and_verifies(artifact, llama, tmp_path):
    """Oracle: the dense export in transformers."""
    out = artifact.export("dense", tmp_path / "dense", progress=False)
    assert set(mspc.verify(str(out), artifact, progress=False)["runtimes"]) == {"transformers"}
    ids = tiny.ids(2)
    dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(artifact.load(device="cpu")(ids).logits, dense(ids).logits, atol=1e-5)


def test_verify_raises_on_a_mismatch(artifact, tmp_path):
    out = artifact.export("dense", tmp_path / "dense", progress=False)
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(mspc.VerificationError, match="dense is wrong: "):
        mspc.verify(out, progress=False)


def test_what_is_no_artifact_is_named(tmp_path):
    with pytest.raises(mspc.InputError, match="not an mspc artifact"):
        _ = mspc.Artifact(tmp_path).manifest


# Evaluation


def test_a_model_in_memory_has_the_perplexity_of_its_folder(artifact, model, llama, test_text):
    """Oracle: the evaluation of the folders, a block at a time."""
    options = {"sequence_length": 32, "progress": False}
    expected = mspc.evaluate(artifact, test_text, against=llama, **options)
    sparse, tokenizer = artifact.load(device="cpu"), AutoTokenizer.from_pretrained(llama)
    model.train()
    for found in (
        mspc.evaluate(sparse, test_text, tokenizer=tokenizer, against=model, **options),
        mspc.evaluate(artifact, test_text, against=model, **options),
        mspc.evaluate(mspc.load(artifact, device="cpu"), test_text, against=str(llama), **options),
        mspc.evaluate(sparse, test_text, tokenizer=tokenizer, against=str(llama), **options),
        mspc.evaluate(artifact, [test_text.read_text()], tokenizer=tokenizer, against=model, **options),
    ):
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
        assert found.divergence == pytest.approx(expected.divergence, rel=1e-3)
        assert (found.windows, found.tokens) == (expected.windows, expected.tokens)
    assert model.training


def test_given_ids_are_evaluated(artifact, llama, test_text):
    ids = windows_of_test_text(AutoTokenizer.from_pretrained(llama), str(test_text), 32, None).ids
    expected = mspc.evaluate(artifact, test_text, sequence_length=32, max_windows=3, progress=False)
    found = mspc.evaluate(artifact, ids, max_windows=3, progress=False)
    assert found == dataclasses.replace(expected, text="token ids")
    assert expected.text == str(test_text)
    with pytest.raises(mspc.InputError, match="sequence_length is 16"):
        mspc.evaluate(artifact, ids, sequence_length=16, progress=False)


def test_a_model_in_memory_and_a_name_need_a_tokenizer(model, test_text):
    model.config.name_or_path = ""
    with pytest.raises(mspc.InputError, match="tokenizer="):
        mspc.evaluate(model, test_text, sequence_length=32, progress=False)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Oracle: what its cells print and write, on a model of a moment."""
    model = tiny.build(tmp_path / "model", "llama", hidden_size=64, max_position_embeddings=256)
    script = Path(__file__).parents[1] / "examples" / "notebook.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "14 matrices, " in done.stdout
    assert "nats per token" in done.stdout
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "small" / "mspc.json").is_file()


def test_types_are_published():
    assert (Path(mspc.__file__).parent / "py.typed").is_file()
    assert "compress" in dir(mspc)


def test_saved_tensors_are_equal_whatever_the_source(artifact):
    """The fixture is not empty, or the comparisons above say nothing."""
    (first, *_) = sorted((artifact.path / "matrices").iterdir())
    assert load_file(first)
