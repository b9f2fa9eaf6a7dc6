"""The comparison on real models without models and networks: judging, sizes, rows, resuming, tables and pictures."""

import hashlib
import io
import json
import math
import subprocess
import tarfile
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mspc


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def changed(folder: Path, out: Path) -> Path:
    """The model of a folder with other matrices, which predicts otherwise."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return out


def test_figures_are_those_of_the_definitions(llama, tmp_path):
    """Oracle: whole logits in float64, token by token; the chats have different lengths and places of the reply."""
    from real_evaluation import Scored, evaluate, write_sequences

    other = changed(llama, tmp_path / "other")
    torch.manual_seed(1)
    texts = {
        "prose": [Scored(ids, 1) for ids in torch.randint(0, 256, (3, 32))],
        "chat": [Scored(torch.randint(0, 256, (length,)), first) for length, first in ((20, 12), (33, 5))],
    }
    write_sequences(tmp_path / "ids.safetensors", texts)
    found = evaluate(other, llama, tmp_path / "ids.safetensors", tmp_path / "cache.safetensors")
    p_of, q_of = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (llama, other))
    for name, sequences in texts.items():
        loss = divergence = agreements = tokens = 0.0
        for one in sequences:
            with torch.no_grad():
                p, q = (m(one.ids[None]).logits[0].double().log_softmax(-1) for m in (p_of, q_of))
            for place in range(one.first, len(one.ids)):
                loss -= float(q[place - 1, one.ids[place]])
                divergence += float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum())
                agreements += float(p[place - 1].argmax() == q[place - 1].argmax())
                tokens += 1
        assert found[name]["tokens"] == tokens
        assert found[name]["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
        assert found[name]["divergence"] == pytest.approx(divergence / tokens, rel=1e-4)
        assert found[name]["top1_agreement"] == agreements / tokens
        low, high = found[name]["divergence_interval"]
        assert low < found[name]["divergence"] < high
    itself = evaluate(llama, llama, tmp_path / "ids.safetensors", tmp_path / "cache.safetensors")
    assert itself["prose"]["divergence"] == 0
    assert itself["prose"]["top1_agreement"] == 1
    # Windows of one length: the definition that mspc has in its own evaluation.
    ids = torch.stack([one.ids for one in texts["prose"]])
    assert itself["prose"]["perplexity"] == pytest.approx(
        mspc.evaluate(llama, ids, progress=False).perplexity, rel=1e-4
    )


def test_sizes_are_those_of_the_artifact(artifact_of, tmp_path):
    """Oracle: manifests and sparse exports of artifacts that hold the same matrices."""
    from real_sizes import sizes

    for rule, options in (
        ({"kind": "grid", "bits": 4, "group_size": 32}, {"sparsity": 0.0}),
        ({"kind": "zeros", "row_offsets": True}, {"sparsity": 0.5, "bits": 16}),
    ):
        artifact = artifact_of("llama", **options)
        reference, dense = artifact.path.parent / "model", tmp_path / rule["kind"]
        if not reference.is_dir():
            reference = Path(artifact.manifest["source"]["path"])
        artifact.export("dense", dense, verify=False)
        own = sizes({"kind": "manifest", "file": str(artifact.path / "mspc.json")}, dense, reference)
        found = sizes(rule, dense, reference)
        assert found["matrix_bytes"] == own["matrix_bytes"]
        assert found["bits_per_weight"] == pytest.approx(artifact.manifest["bits_per_weight"])
        sparse = artifact.export("sparse", tmp_path / f"{rule['kind']}-sparse", verify=False)
        stored = [tensor for file in sparse.glob("*.safetensors") for tensor in load_file(file).values()]
        assert found["weight_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in stored)
        assert own["weight_bytes"] == sum(file.stat().st_size for file in sparse.glob("*.safetensors"))
        everything = sizes({"kind": "dense"}, reference, reference)
        assert everything["weight_bytes"] == sum(
            tensor.numel() * tensor.element_size()
            for tensor in AutoModelForCausalLM.from_pretrained(reference, dtype="auto").state_dict().values()
        )


def test_rows_have_names_of_their_own():
    from real_rows import ROWS, chosen

    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(name.replace(".", "").replace("-", "").replace("_", "").isalnum() for name in names)
    assert [row.name for row in chosen(["dense", "mspc-fast-2of4"], lambda name, pattern: name == pattern)] == [
        "dense", "mspc-fast-2of4",
    ]  # fmt: skip


def test_a_row_goes_on_from_the_artifact_of_another(monkeypatch, tmp_path):
    """Its cost is that of both. Oracle: figures made up for each."""
    import quality_real
    import real_makers
    from real_rows import ROWS

    later = next(row for row in ROWS if row.continues)
    first = next(row for row in ROWS if row.name == later.continues)
    took = {"seconds": 2.5, "cpu_seconds": 2.0, "peak_memory_bytes": 7, "command": "first"}
    more = {"seconds": 1.0, "cpu_seconds": 0.5, "peak_memory_bytes": 9, "command": "later", "size": {}}
    there = []

    def maker(options, out, job):
        file = out / "artifact" / "mspc.json"
        there.append(file.read_text() if file.is_file() else None)
        return more

    monkeypatch.setitem(real_makers.MAKERS, "mspc", maker)
    job = types.SimpleNamespace(shared=tmp_path, group_size=64)
    assert real_makers.make(later, tmp_path / later.name, job) == more
    own = tmp_path / first.name
    (own / "artifact").mkdir(parents=True)
    (own / "artifact" / "mspc.json").write_text("of the first")
    (own / real_makers.MADE).write_text(json.dumps(took))
    quality_real.keep_artifact(first, tmp_path)
    found = real_makers.make(later, tmp_path / later.name, job)
    assert there == [None, "of the first"]
    assert (found["seconds"], found["cpu_seconds"], found["peak_memory_bytes"]) == (3.5, 2.5, 9)
    assert found["size"] == more["size"]


def test_options_of_mspc_are_understood():
    """Oracle: the parser of `mspc compress`, and the recipe, which refuses options without effect."""
    import typer
    from real_rows import ROWS

    from mspc.cli.main import app

    fields = set(mspc.Recipe.__dataclass_fields__)
    compress = typer.main.get_command(app).commands["compress"]  # type: ignore[attr-defined]
    for row in ROWS:
        if row.maker == "mspc":
            words = ["64" if option == "GROUP" else option for option in row.options]
            given = compress.make_context("compress", ["M", "--out", "out", *words]).params
            given["group_size"] = given["group_size"] and int(given["group_size"])
            mspc.Recipe.from_dict({k: v for k, v in given.items() if k in fields and v not in (None, [], ())})


RESULT = {
    "matrix_bytes": 1_000_000, "weight_bytes": 3_000_000, "bits_per_weight": 4.0,
    "texts": {name: {"perplexity": 20.0, "divergence": 0.125, "top1_agreement": 0.75} for name in ("prose", "code")},
}  # fmt: skip


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """The tool with a `run` that only notes what is run, or fails for llama.cpp."""
    import quality_real
    from real_process import RowError

    ran: list[str] = []

    def run(row, job, work):
        ran.append(row.name)
        (work / row.name).mkdir(parents=True, exist_ok=True)
        if row.maker == "llamacpp":
            raise RowError("no such type")
        cost = {"seconds": 60.0, "cpu_seconds": 59.0, "peak_memory_bytes": 2_000_000_000} if row.maker else {}
        return json.loads(json.dumps(RESULT)) | cost

    job = types.SimpleNamespace(group_size=64)
    monkeypatch.setattr(quality_real, "run", run)
    monkeypatch.setattr(quality_real, "prepare", lambda args, model, work: (job, {"origin": "From Q4_1."}))
    monkeypatch.setattr(quality_real, "cache_folder", lambda: tmp_path / "cache")

    def call(*options: str) -> list[str]:
        ran.clear()
        quality_real.main(["--models", "some/tiny", "--results", str(tmp_path / "results"), *options])
        return list(ran)

    return call


def test_a_row_that_is_there_is_not_run_again(driver, tmp_path, capsys):
    assert driver("--rows", "dense", "sweep-gptq-*") == ["dense", "sweep-gptq-int3", "sweep-gptq-int4"]
    assert driver("--rows", "sweep-gptq-*", "llama.cpp-q4_0") == ["llama.cpp-q4_0"]
    assert driver("--rows", "llama.cpp-q4_0") == []
    assert driver("--rows", "llama.cpp-q4_0", "dense", "--again") == ["llama.cpp-q4_0"]
    failed = json.loads((tmp_path / "results" / "tiny" / "llama.cpp-q4_0.json").read_text())
    assert failed["error"] == "no such type"
    assert "bits_per_weight" not in failed
    with pytest.raises(SystemExit):
        driver("--rows", "nothing")
    capsys.readouterr()
    assert driver("--list") == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if "sweep-gptq" in line] == ["done", "done"]
    assert [line.split(maxsplit=2)[2] for line in lines if "llama.cpp-q4_" in line] == ["no such type", "not run yet"]


def test_the_table_shows_what_failed_and_what_is_missing(driver, capsys):
    driver("--rows", "dense", "sweep-gptq-int3", "llama.cpp-q4_0")
    capsys.readouterr()
    driver("--table", "--rows", "dense", "sweep-gptq-int?", "llama.cpp-q4_0")
    out = capsys.readouterr().out
    row = (
        "| sweep (GPTQ) | int3 | 4.000 | 1.0 | 3.0 | 20.00, 20.00, - | 0.1250, 0.1250, - | 75.0%, 75.0%, - | 59 | 2.0 |"
    )
    assert row in out.splitlines()
    assert "- **llama.cpp Q4_0** failed: `no such type`" in out.splitlines()
    assert "Not run yet: sweep (GPTQ) int4." in out.splitlines()
    assert "From Q4_1." in out.splitlines()


def test_the_picture_has_the_frontier_of_both_sides(driver, tmp_path):
    """Oracle of the frontier: brute force over all pairs."""
    pytest.importorskip("matplotlib")
    from real_report import undominated

    generator = torch.Generator().manual_seed(0)
    points = [(float(a), float(b)) for a, b in torch.rand(40, 2, generator=generator)]
    best = [p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)]
    assert undominated(points) == sorted(best)
    driver("--rows", "dense", "sweep-gptq-*", "mspc-fast-*", "llama.cpp-q4_0")
    driver("--plot", str(tmp_path / "real.png"))
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")


def test_texts_come_out_of_checked_packages(monkeypatch, tmp_path):
    """Oracle: an archive made here. Its digest decides, and short files and others are left out."""
    import real_texts

    files = {
        "p-1/docs/a.rst": "a" * 2000,
        "p-1/docs/b.md": "b" * 20_000,
        "p-1/docs/c.rst": "c",
        "p-1/src/d.py": "d" * 2000,
    }
    with tarfile.open(tmp_path / "p-1.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    whole = (tmp_path / "p-1.tar.gz").read_bytes()

    def pip(command, check):
        assert command[-1] == "p==1"
        (Path(command[command.index("--dest") + 1]) / "p-1.tar.gz").write_bytes(whole)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(real_texts.subprocess, "run", pip)
    monkeypatch.setattr(real_texts, "cache_folder", lambda: tmp_path / "cache")
    good = real_texts.Source("p", "1", hashlib.sha256(whole).hexdigest(), "MIT", real_texts.DOCS)
    monkeypatch.setattr(real_texts, "TEXTS", {"prose": (good,)})
    lines = real_texts.texts()["prose"].read_text().splitlines()
    assert sorted(json.loads(line)["text"] for line in lines) == ["a" * 2000, "b" * real_texts.MOST]
    monkeypatch.setattr(real_texts, "TEXTS", {"prose": (good, real_texts.Source("p", "1", "0" * 64, "MIT", "x"))})
    with pytest.raises(SystemExit, match="SHA-256"):
        real_texts.texts()


def test_no_package_is_calibrated_and_judged_on():
    from real_texts import PROMPTS, TEXTS

    calibration = {source.package for source in TEXTS["calibration"]}
    assert calibration.isdisjoint(source.package for name in ("prose", "code") for source in TEXTS[name])
    assert len(set(PROMPTS)) == len(PROMPTS) == 40


def test_replies_follow_the_template_and_repeat(llama, tmp_path):
    """Oracle: the template by hand; a reply is no longer than asked, and ends behind the first end of text."""
    import shutil

    from real_chat import replies
    from transformers import AutoTokenizer

    assert replies(llama, ("a",), 4) == []  # it has no template
    folder = shutil.copytree(llama, tmp_path / "model")
    template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    found = replies(folder, ("Hello", "A longer question"), 40)
    encoded = AutoTokenizer.from_pretrained(folder)("<Hello>", add_special_tokens=False)["input_ids"]
    assert found[0]["ids"][: found[0]["start"]] == encoded
    for one in found:
        reply = one["ids"][one["start"] :]
        assert 1 <= len(reply) <= 40
        assert 0 not in reply[:-1]  # the end of text of the tiny models
    assert replies(folder, ("Hello", "A longer question"), 40) == found


def test_types_fall_back_as_in_llamacpp():
    """Oracle: `llama-quant.cpp` for rows of SmolLM2, and its error for rows that no type takes."""
    pytest.importorskip("gguf")
    from real_ggml import type_for

    assert [type_for("Q4_K", columns) for columns in (1536, 576)] == ["Q4_K", "Q5_0"]
    assert [type_for("IQ3_S", columns) for columns in (1536, 576)] == ["IQ3_S", "IQ4_NL"]
    assert type_for("Q6_K", 576) == "Q8_0"
    with pytest.raises(SystemExit, match="Q5_0 does not store rows of 40"):
        type_for("Q4_K", 40)


def test_importances_are_mean_squares_of_inputs(llama):
    """Oracle: the inputs of the first matrices, which are the normed embeddings."""
    pytest.importorskip("gguf")
    from real_ggml import importance

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(0))
    found = importance(model, ids)
    inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).double()
    expected = (inputs**2).mean((0, 1)).float()
    assert torch.allclose(found["model.layers.0.self_attn.k_proj"], expected, rtol=1e-5)
    assert len(found) == 14


@pytest.mark.parametrize("asymmetric", [False, True])
def test_gptq_folders_are_dequantized(artifact_of, tmp_path, asymmetric):
    """Oracle: the weights of the artifact whose export it is."""
    from real_gptqmodel import read

    artifact = artifact_of("llama", sparsity=0.0, asymmetric=asymmetric)
    artifact.export("gptq", tmp_path / "gptq", verify=False)
    artifact.export("dense", tmp_path / "dense", verify=False)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    found = read(tmp_path / "gptq", str(tmp_path / "dense"), 4)
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name], tensor, rtol=1e-2, atol=1e-3), name
    assert not torch.equal(found.lm_head.weight, found.model.layers[0].mlp.gate_proj.weight)
