"""Uploads and model cards. The oracle is the real client, and a hub on this machine that keeps what it gets."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hub as downloads
import pytest
import torch
import upload_hub
import yaml
from typer.testing import CliRunner
from upload_hub import Hub

import mspc
from mspc.cli.main import app
from mspc.errors import InputError, StorageError
from mspc.publish.card import Subject, escaped, loading

# The client's own call of httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
REPO = "me/small"
BASE_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- chat\n---\n# The dense model\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with upload_hub.started() as found:
        upload_hub.use(found.address, tmp_path / "cache", monkeypatch)
        yield found


@pytest.fixture(scope="module")
def sources(artifact_of: Callable[..., mspc.Artifact], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact with the card of its base model, and exports of it."""
    folder = tmp_path_factory.mktemp("push")
    shutil.copytree(artifact_of("llama").path, folder / "artifact")
    (folder / "artifact" / "README.md").write_text(BASE_CARD)
    found = {"artifact": folder / "artifact"}
    for name in ("sparse", "dense"):
        found[name] = mspc.export(folder / "artifact", name, folder / name, verify=False, progress=False)
    return found


@pytest.fixture
def folder(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the artifact, to be written to."""
    shutil.copytree(sources["artifact"], tmp_path / "artifact")
    return tmp_path / "artifact"


def push(folder: Path, **options: object) -> mspc.Push:
    return mspc.push(folder, REPO, progress=False, **options)


def metadata(card: str) -> dict[str, object]:
    """Oracle: a parser of YAML."""
    empty, block, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(block)


def edited(folder: Path, change: Callable[[dict], object]) -> Path:
    path = folder / "mspc.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("kind", ["artifact", "sparse", "dense"])
def test_what_is_pushed_is_loaded_from_the_hub(kind, sources, hub, monkeypatch, tmp_path):
    """Oracles: the bytes of the folder; the model of the folder, and that of the hub id."""
    found = push(sources[kind], private=True, message="A test.", base_model="meta/Llama-9")
    assert found.url == f"{hub.address}/{REPO}/commit/{upload_hub.COMMIT}"
    assert hub.summaries == ["A test."]
    assert [(row["name"], row["organization"], row.get("private") or row.get("visibility")) for row in hub.created] in (
        [("small", "me", True)], [("small", "me", "private")],
    )  # fmt: skip
    there = {name.removeprefix(f"{REPO}/"): data for name, data in hub.files.items()}
    assert {name: len(data) for name, data in there.items()} == found.files
    assert there.pop("README.md").decode() == found.card
    assert there.pop("README.base.md").decode() == BASE_CARD
    assert there == {name: (sources[kind] / name).read_bytes() for name in there}
    needed = {"artifact": "mspc.json", "sparse": "mspc_export.json", "dense": "mspc_export.json"}
    assert {needed[kind], "config.json", "tokenizer.json"} <= there.keys()
    with downloads.served(hub.save(tmp_path / "served")) as (address, _):
        upload_hub.use(address, tmp_path / "cache", monkeypatch)
        loaded, expected = (mspc.load(path, device="cpu") for path in (REPO, sources[kind]))
    states = loaded.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("kind", "library", "loads"),
    [("artifact", "mspc", "mspc.load("), ("sparse", "mspc", "import mspc.hf"), ("dense", "transformers", "from_pret")],
)
def test_the_card_says_what_it_is(kind, library, loads, sources):
    """Oracle: the manifest of the artifact."""
    found = push(sources[kind], dry_run=True, base_model="meta/Llama-9")
    manifest, card = json.loads((sources["artifact"] / "mspc.json").read_text()), found.card
    assert metadata(card) == {
        "license": "apache-2.0", "language": ["en"], "base_model": "meta/Llama-9", "base_model_relation": "quantized",
        "library_name": library, "pipeline_tag": "text-generation", "tags": ["mspc", "sparse", "4-bit"],
    }  # fmt: skip
    assert "# small\n\n[meta/Llama-9](https://huggingface.co/meta/Llama-9), pruned and quantized by mspc" in card
    assert f"{manifest['sparsity']['achieved']:.2%} of the weights" in card
    assert f"they take {manifest['bits_per_weight']:.3f} bits per weight" in card
    assert "| unstructured | 4 | 50.0% | 14 | 100.0% |" in card
    assert loads in card
    assert f'"{REPO}"' in card
    evaluation = manifest["evaluation"]
    assert ("| perplexity |" in card) == (evaluation is not None)
    assert card.count("```") % 2 == 0
    assert "{" not in card.replace("{REPO}", "")


@pytest.mark.parametrize(("weights", "named"), [("sparse", True), ("qdq", False)])
def test_the_card_of_sparse_weights_in_onnx_names_their_library(weights, named):
    found = loading(Subject("onnx", {"options": {"weights": weights}}, None, {}, 0), REPO)
    assert ("shutil.copy(mspc.onnx_library(), folder)" in found) == named
    assert f'snapshot_download("{REPO}")' in found


def test_results_are_those_of_the_manifest(folder):
    mean = {"mean": 12.0, "interval": [11.0, 13.0]}
    evaluation = {
        "text": "wiki|text", "windows": 3, "sequence_length": 32, "tokens": 93, "dense_perplexity": mean,
        "perplexity": {"mean": 14.5, "interval": None}, "divergence": {"mean": 0.75, "interval": [0.5, 1.0]},
    }  # fmt: skip
    card = push(edited(folder, lambda manifest: manifest.update(evaluation=evaluation)), dry_run=True).card
    assert "| perplexity | 12.00 (11.00 to 13.00) | 14.50 |" in card
    assert "nats per token |  | 0.7500 (0.5000 to 1.000) |" in card
    assert "**This model is badly hurt**: its KL from the dense model is 0.7500" in card
    assert "93 tokens of wiki\\|text (3 windows of 32)" in card


def test_no_name_becomes_markup_or_metadata(folder):
    """Oracle: a parser of YAML, and the rule of CommonMark that a sign after a backslash is no markup."""
    evil = "<script>x</script>`|\n---\nlicense: mit\n# [y](http://z) www.z.org"

    def change(manifest):
        manifest["source"]["name"] = evil
        manifest["mspc_version"] = "<b>"
        manifest["settings"]["calibration"] = "a`b\n# c"

    (folder / "README.md").write_text('---\nlicense: "x\\n---\\n<b>"\ntags: 7\nlanguage: {a: b}\n---\n')
    card = push(edited(folder, change), dry_run=True).card
    found = metadata(card)
    assert "base_model" not in found
    assert "language" not in found
    assert "license" not in found  # one of several lines would end the block
    body = card.split("\n---\n\n", 1)[1]
    for piece in ("<script>", "<b>", "[y]", "http:", "www.z", "\n# c", "a`b"):
        assert piece not in body
    assert escaped(evil) == (
        "\\<script\\>x\\</script\\>\\`\\| --- license\\: mit \\# \\[y\\]\\(http\\://z\\) www\\.z.org"
    )


def test_a_card_of_this_model_is_kept(folder, hub, caplog):
    own = push(folder, dry_run=True).card + "\nMy words.\n"
    (folder / "README.md").write_text(own)
    caplog.set_level("INFO", "mspc")
    found = push(folder)
    assert (found.card, found.card_is_kept) == (own, True)
    assert "is kept as the card" in caplog.text
    assert hub.files[f"{REPO}/README.md"].decode() == own
    assert f"{REPO}/README.base.md" not in hub.files


def test_a_dry_run_asks_nobody(sources, hub):
    result = CliRunner().invoke(app, ["push", str(sources["sparse"]), REPO, "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert "model.safetensors\n" in result.stdout
    assert "Nothing was uploaded: " in result.stderr
    found = json.loads(CliRunner().invoke(app, ["push", str(sources["sparse"]), REPO, "--dry-run", "--json"]).stdout)
    assert result.stdout.endswith(f"\n\n{found['card']}")
    assert (found["url"], found["repo"], found["card_is_kept"]) == (None, REPO, False)
    assert hub.requests == []


def test_offline_is_said(sources):
    result = CliRunner().invoke(app, ["push", str(sources["sparse"]), REPO])
    assert result.exit_code == 2
    assert "Error: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it" in result.stderr


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "matrices" / "00001.safetensors").unlink(), "00001.safetensors is missing"),
        (lambda folder: (folder / "unchanged" / "model.safetensors").write_bytes(b"x"), "is damaged: mspc wrote other"),
        (lambda folder: (folder / "mspc.json").unlink(), "is neither an artifact nor an export of mspc"),
        (lambda folder: (folder / "mspc.json").write_text("{"), "The artifact is damaged"),
        (lambda folder: edited(folder, lambda m: m["files"].pop("matrices/00000.safetensors")), "has no digest"),
        (lambda folder: edited(folder, lambda m: m["files"].update({"../x": "0"})), "points outside its folder"),
    ],
)
def test_nothing_is_uploaded_of_a_folder_that_is_not_whole(damage, said, folder, hub):
    damage(folder)
    with pytest.raises(InputError, match=said):
        push(folder)
    assert hub.requests == []


def test_nothing_is_uploaded_of_an_unfinished_run_or_a_damaged_export(folder, sources, hub, tmp_path):
    from mspc.storage.journal import NAME

    (folder / NAME).write_text("")
    with pytest.raises(InputError, match="holds an unfinished run"):
        push(folder)
    shutil.copytree(sources["sparse"], tmp_path / "sparse")
    (tmp_path / "sparse" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json is damaged"):
        push(tmp_path / "sparse")
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["small", "a/b/c", "me/sm all", "me/..", ""])
def test_a_wrong_repository_is_refused(repo, sources, hub):
    with pytest.raises(InputError, match="is no repository of the hub"):
        mspc.push(sources["sparse"], repo, progress=False)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [(401, InputError, "hf auth login"), (403, InputError, "you may not write there"),
     (400, InputError, "refuses the upload"), (501, StorageError, "the hub refuses|the upload failed")],
)  # fmt: skip
def test_the_answers_of_the_hub_are_said(status, error, said, sources, hub):
    hub.refuses = status
    with pytest.raises(error, match=said):
        push(sources["sparse"])


def test_a_file_that_the_repository_ignores_is_missed(sources, hub):
    hub.ignored = ("tokenizer.json",)
    with pytest.raises(StorageError, match=r"lacks tokenizer.json after the upload"):
        push(sources["sparse"])


def test_other_files_stay_and_are_said(folder, hub, caplog):
    """Files of the folder that belong to nothing are no part of it; those of the repository are not deleted."""
    hub.files[f"{REPO}/model-00002-of-00002.safetensors"] = b"older"
    (folder / "notes.safetensors").write_bytes(b"mine")
    (folder / ".secret").write_text("mine")
    (folder / "exports").mkdir()
    (folder / "exports" / "x.json").write_text("{}")
    edited(folder, lambda manifest: manifest["recipe"].update(calibration="/mine/text.txt"))
    caplog.set_level("INFO", "mspc")
    found = push(folder)
    assert not {"notes.safetensors", ".secret", "exports/x.json"} & found.files.keys()
    assert "Not uploaded, as no part of the model: .secret, exports/x.json, notes.safetensors." in caplog.text
    assert hub.files[f"{REPO}/model-00002-of-00002.safetensors"] == b"older"
    assert "also has other files, such as model-00002-of-00002.safetensors" in caplog.text
    assert "paths of this machine, which readers will see: /mine/text.txt" in caplog.text
    assert "names no base model on the hub, as " in caplog.text
