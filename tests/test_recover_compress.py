"""`compress --recover`: training in a run. Oracles: torch's gradients of whole models, and the one-shot artifact."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_resume import content
from torch.nn.functional import log_softmax

import mspc
from mspc.errors import InputError
from mspc.formats import layout
from mspc.model.hub import load_tokenizer
from mspc.model.open import open_model
from mspc.passes.blocks import handed_through
from mspc.pipeline import own_text, recovering, recovery_stage, run
from mspc.pipeline.latents import latents_of
from mspc.pipeline.student import Student
from mspc.pipeline.summary import cost_lines, recovery_line
from mspc.storage.artifact import OWN_TEXT, ArtifactSource, read_matrix
from mspc.storage.manifest import was_recovered
from mspc.storage.sparse_export import read_sparse
from mspc.text.tokens import calibration_tokens
from mspc.types import NM, Codes, CompressedLinear, Grid, Target, Unstructured

CPU = torch.device("cpu")
BY_HAND = {"num_sequences": 24, "seed": 1, "group_size": 32, "effort": "fast"}
LR = 3e-3
"""Random models need large steps."""
QUANTIZED_LR = 1e-4


@pytest.fixture(scope="module")
def made(folder_of, calibration, tmp_path_factory):
    """`made(family, **recipe)`: the one-shot artifact, and the recovered one by the same recipe; made once."""
    known = {}

    def get(family="llama", steps=12, rate=None, **recipe):
        quantizes = recipe.get("bits", 16) != 16 or "bits_per_weight" in recipe
        rate = rate or (QUANTIZED_LR if quantizes else LR)
        key = f"{family}{steps}{rate}{sorted(recipe.items())}"
        if key not in known:
            options = {**BY_HAND, **recipe}
            if options.get("bits", 16) == 16 and "bits_per_weight" not in options:
                options.pop("group_size")
            folder = tmp_path_factory.mktemp("both")
            known[key] = [
                tiny.compress(folder_of(family), folder / name, calibration, **options, **more)
                for name, more in (("one-shot", {}), ("recovered", {"recover": steps, "recover_lr": rate}))
            ]
        return known[key]

    return get


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradients_are_those_of_the_whole_model(family, folder_of, monkeypatch):
    """With capped logits, tied and transposed matrices. Oracle: the gradient of the divergence of whole logits."""
    monkeypatch.setattr("mspc.passes.distillation.head_gradients.__defaults__", (25,))  # does not divide the positions
    folder, ids = folder_of(family), tiny.ids(3)
    whole, changed = tiny.reference(folder), tiny.reference(folder)
    names = [name for name, p in whole.named_parameters() if ".0." in name or p.ndim == 1]
    for name in names:
        changed.get_parameter(name).data *= 1 + 0.1 * torch.randn(whole.get_parameter(name).shape)
        changed.get_parameter(name).requires_grad_()
    p, q = (log_softmax(model(input_ids=ids, use_cache=False).logits, -1) for model in (whole, changed))
    loss = (p.exp() * (p - q)).sum() / ids.numel()
    expected = torch.autograd.grad(loss, [changed.get_parameter(name) for name in names], allow_unused=True)
    last = f"{tiny.blocks_name(family)}.1"
    wanted = tiny.noted(whole, ids, [last], lambda _, out: out[0] if isinstance(out, tuple) else out)[last]
    with ExitStack() as stack:
        dense, model = (open_model(folder, device=CPU) for _ in range(2))
        stack.enter_context(dense.loaded_outer())
        stack.enter_context(model.whole())
        for name in names:
            model.model.get_parameter(name).data.copy_(changed.get_parameter(name))
        student = Student(model, stack.enter_context(handed_through(dense)), names)
        assert student.divergence(list(ids), list(wanted)) == pytest.approx(float(loss.detach()), rel=1e-4)
        for half, tolerance in ((False, 1e-4), (True, 0.2)):
            student.half = half
            found = student.gradients(list(ids), list(wanted))
            for name, gradient in zip(names, expected, strict=True):
                if gradient is None:
                    assert name not in found
                elif float(gradient.norm()) > 1e-6:  # that of the biases of keys is noise
                    assert float((found[name] - gradient).norm() / gradient.norm()) < tolerance, name


def matrix_of(pattern, grid, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(8, 64, generator=generator) < 0.6
    if isinstance(pattern, NM):
        mask = torch.rand(8, 16, 4, generator=generator).argsort(-1).lt(2).view(8, 64)
    weight = torch.randn(8, 64, generator=generator) * mask
    codes = None
    if grid is not None:
        groups = 64 // (grid.group_size or 64)
        zeros = torch.randint(2**grid.bits, (8, groups), generator=generator, dtype=torch.uint8)
        values = torch.randint(2**grid.bits, (8, 64), generator=generator, dtype=torch.uint8)
        codes = Codes(values, torch.rand(8, groups, generator=generator).half(), zeros)
    return layout.as_stored(CompressedLinear(weight, mask, Target(pattern, grid), codes), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", [Unstructured(0.4), NM(2, 4)])
@pytest.mark.parametrize("grid", [None, Grid(3, 32, False), Grid(4, None, True), Grid(8, 16, True), Grid(2, 32, True)])
def test_latents_begin_and_end_with_what_is_stored(grid, pattern, dtype):
    """Oracles: the digest of the matrix, autograd through the product of distance and scale, the mask."""
    matrix = matrix_of(pattern, grid, dtype)
    latents = latents_of(matrix, CPU)
    assert layout.digest(latents.stored()) == layout.digest(matrix)
    gradient = torch.randn(8, 64)
    found = latents.gradients(gradient)
    assert found.keys() == latents.latents().keys()
    if grid is None:
        assert torch.equal(found["values"], gradient[matrix.mask])
    else:
        size = grid.group_size or 64
        zeros = matrix.codes.zeros.float().repeat_interleave(size, 1)
        change = torch.zeros(matrix.codes.scales.shape, requires_grad=True)
        scales = (matrix.codes.scales.float() * (1 + change)).repeat_interleave(size, 1)
        distance = (matrix.codes.values.float() - zeros).requires_grad_()
        (distance * scales * matrix.mask * gradient).sum().backward()
        assert torch.allclose(found["codes"], distance.grad[matrix.mask], atol=1e-6)
        assert torch.allclose(found["scales"], change.grad, atol=1e-4)
    for latent, _ in latents.latents().values():
        latent += 0.7 * torch.rand(latent.shape)
    moved = latents.stored()
    assert layout.digest(moved) != layout.digest(matrix)
    assert not bool(moved.weight[~matrix.mask].any())
    packed = layout.pack(moved, dtype)
    again = layout.unpack(packed, (8, 64), matrix.target, dtype) if pattern != Unstructured(0.4) else moved
    assert layout.digest(again) == layout.digest(moved)


@pytest.mark.parametrize(
    "recipe",
    [
        {"pattern": "2:4"},
        {"sparsity": 0.5, "bits": 4},
        pytest.param({"sparsity": 0.0, "bits": 3, "asymmetric": True}, marks=pytest.mark.slow),
        pytest.param({"bits_per_weight": 5.0, "sensitivity_sequences": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_recovered_artifact_is_nearer_and_has_the_same_masks_and_bytes(recipe, made, folder_of, tmp_path):
    """Oracles: the one-shot artifact; whole logits of the loaded models on the validation text."""
    before, after = made(**recipe)
    found = after.manifest["recovery"]
    assert found["divergence_after"] < found["divergence_before"]
    assert found["best_step"] > 0
    assert after.manifest["bytes"]["artifact"] == pytest.approx(before.manifest["bytes"]["artifact"], abs=64)
    assert after.manifest["bits_per_weight"] == before.manifest["bits_per_weight"]
    sources = [ArtifactSource(one.path) for one in (before, after)]
    assert [one.name for one in sources[0].entries] == [one.name for one in sources[1].entries]
    changed = 0
    for old, new in zip(*(source.entries for source in sources), strict=True):
        a, b = read_matrix(before.path, old), read_matrix(after.path, new)
        assert torch.equal(a.mask, b.mask)
        assert not bool(b.weight[~b.mask].any())
        assert layout.digest(b) == new.digest
        assert new.zeros == int((b.weight == 0).sum())
        assert new.output_error is None
        assert new.num_bytes == old.num_bytes
        changed += new.digest != old.digest
    assert changed
    sources[1].check_files()
    assert sorted(path.name for path in (after.path / "matrices").iterdir()) == [
        "00000.recovered.safetensors", "00001.recovered.safetensors",
    ]  # fmt: skip
    assert not (after.path / "measurements").exists()
    for artifact, when in ((before, "before"), (after, "after")):
        measured = mean_divergence(mspc.load(folder_of("llama")), artifact.load(), text_after(after, 3))
        assert measured == pytest.approx(found[f"divergence_{when}"], rel=1e-3)


def text_after(artifact, sequences):
    """The sequences after the 24 that calibrate: three to validate on, then those of the test."""
    tokenizer, settings = load_tokenizer(artifact.path), artifact.manifest["settings"]
    drawn = calibration_tokens(tokenizer, settings["calibration"], 24, tiny.LENGTH, settings["seed"], spare=sequences)
    return drawn.ids[24:]


def mean_divergence(dense, model, ids):
    with torch.no_grad():
        p, q = (log_softmax(one(input_ids=ids).logits.double(), -1) for one in (dense, model))
    return float((p.exp() * (p - q)).sum() / ids.numel())


def test_norms_and_biases_are_those_that_were_trained(made, folder_of, tmp_path):
    """In the weights that are not compressed, in exports and in the evaluation. Oracle: transformers."""
    before, after = made("gpt2", pattern="2:4", eval=True)
    names = ["transformer.ln_f.bias", "transformer.wte.weight"]
    vectors = [dict(ArtifactSource(one.path).read(names)) for one in (before, after)]
    assert not torch.equal(vectors[0]["transformer.ln_f.bias"], vectors[1]["transformer.ln_f.bias"])
    assert torch.equal(vectors[0]["transformer.wte.weight"], vectors[1]["transformer.wte.weight"])
    exported = after.export("dense", tmp_path / "dense", progress=False)
    loaded, reloaded = after.load(), tiny.reference(exported)
    ids = tiny.ids(2)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, reloaded(input_ids=ids).logits, atol=1e-4)
    measured = mean_divergence(tiny.reference(folder_of("gpt2")), loaded, text_after(after, 19)[3:])
    assert after.manifest["evaluation"]["divergence"]["mean"] == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize(
    "recipe", [pytest.param({"pattern": "2:4"}, marks=pytest.mark.slow), {"sparsity": 0.5, "bits": 4}]
)
def test_without_progress_every_byte_stays(recipe, made):
    """The rate is absurd. Oracle: the files of the one-shot artifact."""
    before, after = made(steps=20, rate=1.0, **recipe)
    found = after.manifest["recovery"]
    assert found["best_step"] == 0
    assert found["divergence_after"] == found["divergence_before"]
    assert found["steps"] == 6  # it gives up
    files = [content(one.path) for one in (before, after)]
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == ["mspc.json", "recipe.toml"]
    assert before.manifest["matrices"] == after.manifest["matrices"]
    assert before.manifest["files"] == after.manifest["files"]


def test_threads_change_no_byte(made, folder_of, calibration, tmp_path):
    """Oracle: the run with one thread."""
    _, one = made(sparsity=0.5, bits=4)
    recipe = mspc.Recipe(**one.manifest["recipe"])
    for threads in (1, 2):
        other = mspc.compress(folder_of("llama"), recipe, out=tmp_path / f"{threads}", progress=False, threads=threads)
        found, wanted = (content(artifact.path) for artifact in (other, one))
        for files in (found, wanted):
            manifest = json.loads(files["mspc.json"])
            files["mspc.json"] = json.dumps({**manifest, "threads": 0})
        assert found == wanted


def test_a_finished_artifact_can_be_recovered_afterwards(made, folder_of, tmp_path, monkeypatch):
    """Cut off before its first step as well. Oracle: the run that was to recover from its start."""
    before, wanted = made(sparsity=0.5, bits=4, solver="kfac")
    model, out = folder_of("llama"), tmp_path / "out"
    shutil.copytree(before.path, out)
    before.export("dense", out / "exports" / "dense", progress=False)
    recipe = mspc.Recipe(**wanted.manifest["recipe"])
    with pytest.raises(InputError, match=r"settings\.damp was 0\.01 and is 0\.02"):
        mspc.compress(model, replace(recipe, damp=0.02), out=out, progress=False, resume=True)
    assert mspc.Artifact(out).manifest == before.manifest
    with monkeypatch.context() as patch:
        patch.setattr(recovering.Training, "step", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mspc.compress(model, recipe, out=out, progress=False, resume=True)
    found = mspc.compress(model, recipe, out=out, progress=False, resume=True)
    assert content(found.path) == content(wanted.path)
    stages = found.manifest["seconds_by_stage"]
    for stage in ("Gradients", "Compressing"):  # nothing is measured or solved again
        assert stages[stage] == before.manifest["seconds_by_stage"][stage]


@pytest.mark.parametrize("at", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_a_resumed_recovery_ends_with_the_same_bytes(at, made, folder_of, calibration, tmp_path, monkeypatch):
    """Stopped at a step, then killed within another one. Oracle: the undisturbed run."""
    _, wanted = made(sparsity=0.5, bits=4)
    model, out = folder_of("llama"), tmp_path / "out"
    recipe = mspc.Recipe(**wanted.manifest["recipe"])
    with pytest.raises(mspc.Stopped):
        mspc.compress(model, recipe, out=out, progress=lambda event: event.stage != "Recovering" or event.done < at)
    steps = []
    original = recovering.Training.step

    def cut_off(training, *args):
        steps.append(training.made)
        if len(steps) == 3:
            raise KeyboardInterrupt
        original(training, *args)

    monkeypatch.setattr(recovering.Training, "step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        mspc.compress(model, recipe, out=out, progress=False, resume=True)
    assert steps == [at, at + 1, at + 2]
    steps = [0, 0, 0]
    resumed = mspc.compress(model, recipe, out=out, progress=False, resume=True)
    assert steps[3:] == list(range(at + 2, 12))
    found, undisturbed = content(resumed.path), content(wanted.path)
    assert found == undisturbed


@pytest.mark.slow
def test_a_run_killed_after_the_recovery_trains_nothing_again(made, folder_of, tmp_path, monkeypatch):
    """In the evaluation, or while old files are removed. Oracle: the undisturbed run."""
    _, wanted = made("gpt2", pattern="2:4", eval=True)
    recipe = mspc.Recipe(**wanted.manifest["recipe"])
    for owner, name in ((run.Run, "evaluate"), (run, "discard_work")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mspc.compress(folder_of("gpt2"), recipe, out=tmp_path / "out", progress=False, resume=True)
        monkeypatch.setattr(owner, name, original)
        monkeypatch.setattr(recovering.Training, "step", None)
    resumed = mspc.compress(folder_of("gpt2"), recipe, out=tmp_path / "out", progress=False, resume=True)
    assert content(resumed.path) == content(wanted.path)


def test_without_a_goal_and_without_text(folder_of, tmp_path, monkeypatch):
    """The model writes what trains and validates. Cut off and resumed. Oracle: whole logits on the validation text."""
    model, out = folder_of("llama"), tmp_path / "out"
    given = {"sequence_length": tiny.LENGTH, "effort": "fast", "group_size": 32, "sensitivity_sequences": 2}
    outer = {"head_bits": 16, "embedding_bits": 16}  # they would be quantized after the recovery
    recipe = mspc.Recipe(calibration="self", recover=3, recover_lr=1e-5, num_sequences=8, **outer, **given)
    with pytest.raises(mspc.Stopped):
        mspc.compress(model, recipe, out=out, progress=lambda event: event.stage != "Recovering" or event.done < 2)
    texts = sorted((load_file(file)["ids"] for file in (out / OWN_TEXT).iterdir()), key=len)
    assert [len(text) for text in texts] == [1, 8, 16]  # to validate, to calibrate and to test
    monkeypatch.setattr(own_text, "Writer", None)
    artifact = mspc.compress(model, recipe, out=out, progress=False, resume=True)
    found = artifact.manifest["recovery"]
    assert (found["text"], found["steps"]) == ("self", 3)
    assert found["best_step"] > 0
    measured = mean_divergence(mspc.load(model), artifact.load(), texts[0])
    assert measured == pytest.approx(found["divergence_after"], rel=1e-3)
    assert artifact.manifest["settings"]["bits_per_weight"] == 4.25
    assert artifact.manifest["bits_per_weight"] <= 4.25
    assert not (out / OWN_TEXT).exists()


def test_the_sparse_export_holds_the_recovered_codes(made, tmp_path):
    """Oracle: the digests in the manifest, of matrices that are read back from the export."""
    before, after = made(sparsity=0.5, bits=4)
    sparse = after.export("sparse", tmp_path / "sparse", progress=False, verify=False)
    digests = [layout.digest(matrix) for _, _, matrix in read_sparse(sparse)]
    assert sorted(digests) == sorted(row["sha256"] for row in after.manifest["matrices"])
    assert was_recovered(sparse)
    assert not was_recovered(before.export("sparse", tmp_path / "before", progress=False, verify=False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # in gptqmodel
@pytest.mark.parametrize("name", ["gptq", "gguf", "dense"])
def test_exports_of_a_recovered_model_are_verified(name, calibration, tmp_path):
    """Oracle: other code that reads them, and their runtimes; a mismatch raises VerificationError."""
    bundled = Path(mspc.__file__).parents[1] / "examples" / "tiny_llama"
    model = bundled if name == "gguf" else tiny.build(tmp_path / "model", "llama", hidden_size=64)
    options = {"recover": 6, "recover_lr": QUANTIZED_LR, "sparsity": 0.0, "bits": 4, **BY_HAND}
    after = tiny.compress(model, tmp_path / "out", calibration if name != "gguf" else "builtin", **options)
    assert after.manifest["recovery"]["best_step"] > 0
    after.export(name, tmp_path / name, progress=False)


def test_a_lack_of_memory_is_said_before_any_work(folder_of, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery_stage, "free_memory", lambda device: 300_000)
    with pytest.raises(mspc.InputError, match=r"recover: training needs [\d,]+ KB .*, and 300 KB are free"):
        tiny.compress(folder_of("llama"), tmp_path / "out", calibration, recover=3)
    assert not (tmp_path / "out").exists()


def test_what_has_no_effect_or_no_text_is_refused(folder_of, calibration, tmp_path):
    for options, message in (
        ({"recover_lr": 1e-4}, "recover_lr 0.0001 has no effect with recover 0"),
        ({"recover": 5, "sparsity": 0.0}, "recover 5 has no effect with sparsity 0 and bits 16"),
        ({"recover": 5, "keep_zeros": True}, "recover 5 has no effect with keep_zeros True"),
        ({"recover": -1}, "recover must be at least 0"),
        ({"recover": 5, "recover_lr": 0.0}, "recover_lr must be a number above 0"),
    ):
        with pytest.raises(mspc.InputError, match=message):
            mspc.Recipe(**options)
    assert "recover" not in mspc.Recipe().settings().to_dict()
    with pytest.raises(mspc.InputError, match="recover needs validation text after 93 sequences of 32 tokens"):
        tiny.compress(folder_of("llama"), tmp_path / "out", calibration, recover=3, num_sequences=93)


def test_long_sequences_are_cut_and_begin_as_texts_do():
    """Oracle: by hand."""
    ids = torch.arange(2 * 1100).view(2, 1100)
    ids[:, 0] = 7
    found = recovery_stage.pieces(ids, (7,))
    assert found.shape == (4, 512)
    assert found[:, 0].tolist() == [7] * 4
    assert found[1, 1:].tolist() == list(range(512, 1023))
    assert found[2, 1:].tolist() == list(range(1101, 1612))
    assert torch.equal(recovery_stage.pieces(ids[:, :512], (7,)), ids[:, :512])


def test_recovered_models_are_named_so(made, folder_of, tmp_path):
    """In the summary, in tables and on a page, and one-shot models are not."""
    before, after = made(pattern="2:4")
    assert "Recovered after one-shot compression." in str(after)
    assert "ecovered" not in str(before)
    found = after.manifest["recovery"]
    line = recovery_line(found)
    assert f"{found['tokens']:,} tokens" in line
    assert line in cost_lines(after.manifest)
    page = mspc.report([before, after], tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"bits per weight, {'recovered'}." in page
    assert f"bits per weight, {'one-shot'}." in page
    assert "recovered (recovered)" in page
    assert "one-shot (recovered)" not in page
