"""The page of `mspc report`: structure, escapes, no outside address, comparisons, continuations, and its place."""

import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
from conftest import BUNDLED
from test_cli import mspc_cli, refused

import mspc
from mspc.errors import InputError
from mspc.model.hub import load_tokenizer
from mspc.pages import continuations, page
from mspc.pages.continuations import ENDED, PROMPTS, Continued, greedy
from mspc.pages.heat import heat_maps, place_of, places_of, short
from mspc.pages.html import element, joined
from mspc.pages.plots import _undominated
from mspc.pages.subject import Subject, subjects_of
from mspc.pipeline.summary import number
from mspc.sizes import in_words

AWKWARD = "<script>alert('1')<script> \"&amp; $x$"
ALONE = {"meta", "br"}
"""Elements without an end."""
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "article", "section", "figure"),
    *("figcaption", "h1", "h2", "h3", "p", "div", "span", "b", "i", "code", "mark", "dl", "dt", "dd", "details"),
    *("summary", "table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "path", "defs", "use", "text", "tspan", "clippath", "rect"),
}


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text. An element that is left open is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.cells: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ALONE:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def assert_alone(path: Path) -> None:
    """The page has no script, no outside address and no element that could load something."""
    source, found = path.read_text(encoding="utf-8"), Page(path)
    assert {tag for tag, _ in found.elements} <= ALLOWED
    addresses = ("src", "href", "xlink:href", "action", "data", "srcset", "poster", "background")
    given = [(name, value) for _, attributes in found.elements for name, value in attributes.items()]
    assert [value for name, value in given if name in addresses and not str(value).startswith("#")] == []
    assert [name for name, _ in given if name.startswith("on")] == []
    assert re.findall(r"url\((?!#)|@import", source) == []
    policy = next(a["content"] for tag, a in found.elements if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    ids = [value for name, value in given if name == "id"]
    assert len(ids) == len(set(ids))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and three artifacts, in folders with awkward names: two are evaluated on one text, one is not."""
    folder = tmp_path_factory.mktemp("pages")
    text = folder / "<img src=x>.txt"
    text.write_text(tiny.text(3000, seed=1))
    model = tiny.build(folder / AWKWARD, "llama")
    options = {"allocator": "curves", "iterations": 2, "sensitivity_sequences": 2, "eval": True}
    tiny.compress(model, folder / "<b>a", text, **options)
    tiny.compress(model, folder / "b", text, sparsity=0.3, bits=4, group_size=32, **options)
    tiny.compress(model, folder / "c", text, effort="fast")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def test_a_page_says_what_the_manifest_says(made, out):
    """Oracle: the manifest, and the sums that are written here."""
    assert mspc.report(made / "<b>a", out) == out
    found, manifest = Page(out), mspc.Artifact(made / "<b>a").manifest
    assert found.count("h1") == 1
    assert found.count("h2") == 1  # of the continuations
    for title in ("What it cost", "Where the bits went", "Predicted and measured", "How it was made", "Seconds"):
        assert title in found.text
    evaluation = manifest["evaluation"]
    low, high = evaluation["divergence"]["interval"]
    kl = number(evaluation["divergence"]["mean"])
    rows = {row[0]: row[1:] for row in found.cells if row}
    assert rows["KL from the dense model, nats per token"] == [kl, f"{number(low)} to {number(high)}"]
    assert rows["perplexity before"][0] == number(evaluation["dense_perplexity"]["mean"])
    assert rows["predicted by loss curves"][0] == number(sum(row["sensitivity"] for row in manifest["matrices"]))
    assert rows["sparse export"] == [
        in_words(manifest["bytes"]["sparse_export"]),
        f"{manifest['bytes']['sparse_export'] / manifest['bytes']['dense']:.1%}",
    ]
    for stage, seconds in manifest["seconds_by_stage"].items():
        assert rows[stage][1] == f"{seconds:,.1f}"
    assert rows["in all"][1] == f"{manifest['seconds']:,.1f}"
    assert rows["model.layers.1.mlp.down_proj"][1] == "unstructured"
    assert rows["calibration text, sha256"] == [manifest["calibration"]["sha256"]]
    assert rows["mspc"] == [f"{mspc.__version__}, format 1"]
    assert json.loads(rows["num_sequences"][0]) == 4
    assert "95% t-intervals" in found.text
    assert "Left out: they need the dense model" in found.text


def test_the_same_artifact_gives_the_same_page(made, tmp_path):
    first, second = (mspc.report(made / "b", tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert first == second


def test_names_and_texts_are_text(made, out):
    """Oracle: the parser, which gives back each name as it is in the file system."""
    mspc.report([made / "<b>a", made / "b"], out)
    assert_alone(out)
    found = Page(out)
    assert AWKWARD in found.text  # the model
    assert "<b>a" in found.text  # the artifact
    assert "<img src=x>.txt" in found.text  # the calibration text
    assert found.count("svg") == 3  # a frontier and two forecasts


@pytest.mark.parametrize("value", ["</td><script>", "a & b", "\"'", "&lt;"])
def test_elements_escape_what_is_no_element(value):
    """Oracle: the parser."""
    source = f"<!doctype html>{element('p', value, element('b', value), title=value)}"

    class Seen(HTMLParser):
        data = ""
        titles: tuple[object, ...] = ()

        def handle_starttag(self, tag, attrs):
            assert tag in ("p", "b")
            self.titles += tuple(value for _, value in attrs)

        def handle_data(self, data):
            self.data += data

    seen = Seen()
    seen.feed(source)
    assert (seen.data, seen.titles) == (2 * value, (value,))


def test_names_that_are_no_text_become_visible():
    assert element("p", b"a\xff\x00b".decode("utf-8", "surrogateescape")) == "<p>a\\udcff\ufffdb</p>"


def test_continuations_with_markup_are_text(made, out):
    """Oracle: the parser, and the mark at the first character that differs."""
    said = ["<script>x</script> & more", *[""] * 9], ["<script>y\x00<img src=//a.b>", *[""] * 9]
    found = [Continued(name, texts) for name, texts in zip(("dense", "b"), said, strict=True)]
    page._write(subjects_of([made / "b"]), joined(page._prompts(found)), out)
    assert_alone(out)
    rows = [row for row in Page(out).cells if len(row) == 2]
    assert ["dense", "<script>x</script> & more"] in rows
    assert ["b", "<script>y\ufffd<img src=//a.b>"] in rows
    assert "<mark>y\ufffd&lt;img" in out.read_text()


# Several artifacts


def test_artifacts_on_one_text_are_compared_with_a_plot(made, out):
    """Oracle: the manifests."""
    mspc.report([made / "<b>a", made / "b"], out)
    manifests = [mspc.Artifact(made / name).manifest for name in ("<b>a", "b")]
    source, found = out.read_text(), Page(out)
    assert source.count('class="plot"') == 3
    rows = {row[1]: row for row in found.cells if len(row) == 10}
    assert rows["dense"][2] == in_words(manifests[0]["bytes"]["dense"])
    assert rows["dense"][6] == number(manifests[0]["evaluation"]["dense_perplexity"]["mean"])
    for place, (name, manifest) in enumerate(zip(("<b>a", "b"), manifests, strict=True), 1):
        assert rows[name][:3] == [str(place), name, in_words(manifest["bytes"]["sparse_export"])]
        assert rows[name][7] == number(manifest["evaluation"]["divergence"]["mean"])


def test_artifacts_that_were_not_evaluated_say_so(made, out):
    mspc.report([made / "c", made / "b"], out)
    found = Page(out)
    assert "No plot: fewer than two of them were evaluated" in found.text
    assert "Not measured: the run was made without evaluation" in found.text
    row = next(row for row in found.cells if row[:2] == ["1", "c"])
    assert row[6:9] == ["-"] * 3
    assert_alone(out)


def test_losses_on_different_texts_are_not_plotted(made, out, tmp_path):
    other = changed(made / "b", tmp_path / "other", lambda manifest: manifest["evaluation"].update(sha256="0" * 64))
    mspc.report([made / "<b>a", other], out)
    assert "No plot: they were evaluated on different texts" in Page(out).text


def changed(artifact: Path, copy: Path, change) -> Path:
    shutil.copytree(artifact, copy)
    manifest = json.loads((copy / "mspc.json").read_text())
    change(manifest)
    (copy / "mspc.json").write_text(json.dumps(manifest))
    return copy


def test_artifacts_of_one_name_are_told_apart(made, out, tmp_path):
    copy = changed(made / "b", tmp_path / "b", lambda manifest: None)
    mspc.report([made / "b", copy], out)
    assert {str(made / "b"), str(copy)} <= {row[1] for row in Page(out).cells if len(row) == 10}


def test_manifests_of_older_versions_have_a_page(made, out, tmp_path):
    def older(manifest):
        for key in ("evaluation", "bytes", "seconds_by_stage", "threads"):
            del manifest[key]

    mspc.report([changed(made / "b", tmp_path / "older", older), made / "b"], out)
    assert_alone(out)


def test_a_model_without_finite_loss_has_a_page(made, out, tmp_path):
    """JSON has None for infinity."""

    def infinite(manifest):
        for key in ("perplexity", "divergence"):
            manifest["evaluation"][key] = {"mean": None, "interval": [None, None]}

    mspc.report([changed(made / "b", tmp_path / "bad", infinite), made / "b"], out)
    found = Page(out)
    assert "badly hurt" in found.text
    assert next(row for row in found.cells if row[:2] == ["1", "bad"])[6:9] == ["inf", "inf", "-"]


def test_the_frontier_is_what_nothing_beats():
    """Oracle: by hand."""
    assert _undominated([(3, 1), (1, 5), (2, 6), (2, 3), (4, 1)]) == [(1, 5), (2, 3), (3, 1)]


def test_without_matplotlib_one_sentence_names_the_extra(made, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    mspc.report([made / "<b>a", made / "b"], out)
    found = Page(out)
    assert "Plots need matplotlib: the extra plots of mspc" in found.text
    assert found.count("svg") == 0
    assert found.text.count("Predicted and measured") == 2  # as tables


# Heat maps


def row(name: str, shape: tuple[int, int], **values: object) -> dict[str, object]:
    return {"name": name, "shape": shape, "pattern": "unstructured", "bytes": 8, "output_error": 0.1} | values


def test_cells_are_means_over_weights():
    """Oracle: by hand. The experts of a layer share a cell."""
    rows = [
        row("m.layers.0.q_proj", (4, 4), sparsity=0.25, bits=4, sensitivity=1.0),
        row("m.layers.1.e.up_proj[0]", (1, 4), sparsity=0.5, bits=2, sensitivity=1.0),
        row("m.layers.1.e.up_proj[1]", (3, 4), sparsity=0.9, bits=3, sensitivity=2.0),
    ]
    settings = {"allocator": "auto"}
    shown = heat_maps(Subject("x", {"matrices": rows, "settings": settings}, None, 1))
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", shown)
    assert cells == ["25", "", "", "80", "4", "", "", "2.75", "25.0", "", "", "75.0", "10.0", "", "", "10.0"]
    assert list(places_of(rows)) == ["0", "1"]


def test_places():
    assert place_of("model.layers.3.mlp.experts.down_proj[7]") == ("3", "mlp.experts.down_proj")
    assert place_of("transformer.h.0.attn.c_attn") == ("0", "attn.c_attn")
    assert place_of("m.layers.2.experts.5.w1") == ("2", "experts.*.w1")
    assert place_of("lm_head") == ("", "lm_head")
    assert short(["a.q_proj", "b.up_proj"]) == ["q", "up"]
    assert short(["a.q_proj", "b.q_proj"]) == ["a.q_proj", "b.q_proj"]


# Against the dense model


def test_what_is_measured_afresh_is_what_evaluate_measures(made, out, test_text):
    """Oracle: `mspc.evaluate`."""
    options = {"text": str(test_text), "sequence_length": tiny.LENGTH, "max_windows": 5}
    mspc_cli(
        *("report", made / "b", made / "c", "--out", out, "--against", made / AWKWARD, "--text", test_text),
        *("--sequence-length", tiny.LENGTH, "--max-windows", 5),
    )
    found = Page(out)
    for name in ("b", "c"):
        expected = mspc.evaluate(made / name, against=made / AWKWARD, progress=False, **options)
        shown = next(row for row in found.cells if len(row) == 10 and row[1] == name)
        assert shown[6:8] == [number(expected.perplexity), number(expected.divergence)]
    assert f"155 tokens, 5 windows of 32 of {test_text}. Measured for this page, against" in found.text
    assert found.count("mark") > 0
    said = [row[0] for row in found.cells if len(row) == 2 and row[0] in ("dense", "b", "c")]
    assert said == ["dense", "b", "c"] * len(PROMPTS)
    assert_alone(out)


@pytest.mark.parametrize("model", ["bundled", "gpt2"])
def test_continuations_are_those_of_transformers(model, folder_of):
    """Oracle: `generate` of transformers, for each prompt alone, without padding."""
    folder = BUNDLED if model == "bundled" else folder_of(model)
    tokenizer, reference = load_tokenizer(folder), tiny.reference(folder)
    expected = []
    for prompt in PROMPTS[:3]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = reference.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        before = tokenizer.decode(ids[0], skip_special_tokens=True)
        expected.append(tokenizer.decode(new, skip_special_tokens=True)[len(before) :])
    loaded = mspc.load(folder)
    assert [text.removesuffix(ENDED) for text in greedy(loaded, tokenizer, PROMPTS[:3], 6)] == expected


def test_continuations_beyond_the_longest_sequence_are_refused(folder_of):
    folder = folder_of("gpt2")
    with pytest.raises(InputError, match=r"continuations take \d+ tokens, and the model allows 128"):
        greedy(mspc.load(folder), load_tokenizer(folder), PROMPTS[:1], 128)


def test_the_end_of_a_text_is_shown():
    tokenizer = tiny.byte_tokenizer()
    prompt = torch.tensor(tokenizer("ab")["input_ids"])
    (c,) = tokenizer("c")["input_ids"]
    assert continuations._text(tokenizer, prompt, torch.tensor([c, 7, c]), [None, 7]) == f"c{ENDED}"
    assert continuations._text(tokenizer, prompt, torch.tensor([7]), [7]) == ENDED
    assert continuations._text(tokenizer, prompt, torch.tensor([c, c]), [7]) == "cc"


def test_a_dense_model_that_does_not_fit_is_not_loaded(made, out, monkeypatch):
    monkeypatch.setattr(continuations, "free_memory", lambda _: 1000)
    monkeypatch.setattr(continuations, "load", lambda *_: pytest.fail("loaded"))
    mspc.report(made / "b", out, against=made / AWKWARD, max_windows=2, sequence_length=16, progress=False)
    assert "continuations need the whole dense model in memory, 1" in Page(out).text


# Errors


def test_what_is_wrong_is_refused(made, tmp_path, llama):
    assert "is not an mspc artifact: it has no mspc.json" in refused("report", llama, "--out", tmp_path / "x.html")
    assert "does not exist" in refused("report", made / "b", tmp_path / "no", "--out", tmp_path / "x.html")
    assert "is a folder, and the page is a file" in refused("report", made / "b", "--out", tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "is no file" in refused("report", made / "b", "--out", tmp_path / "fifo")
    assert (tmp_path / "fifo").is_fifo()
    (tmp_path / "x.html").write_text("mine")
    assert "exists and is no report of mspc" in refused("report", made / "b", "--out", tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text() == "mine"
    told = refused("report", made / "b", "--out", tmp_path / "y.html", "--max-windows", 3)
    assert "max_windows has no effect without against" in told
    with pytest.raises(mspc.InputError, match="there is no artifact"):
        mspc.report([], tmp_path / "y.html")
    assert not (tmp_path / "y.html").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("settings"),
        lambda manifest: manifest["evaluation"].pop("divergence"),
        lambda manifest: manifest.update(seconds="<b>"),
        lambda manifest: manifest["bytes"].update(dense=0),
        lambda manifest: manifest.update(allocation=3),
        lambda manifest: manifest.update(recipe=3),
    ],
    ids=("settings", "divergence", "seconds", "dense", "allocation", "recipe"),
)
def test_a_damaged_manifest_is_named(change, made, out, tmp_path):
    damaged = changed(made / "b", tmp_path / "damaged", change)
    assert "damaged: mspc.json cannot be shown" in refused("report", damaged, made / "b", "--out", out)
    assert not out.exists()


def test_an_older_page_is_replaced(made, out):
    mspc.report(made / "b", out)
    mspc.report(made / "c", out)
    assert "<h1>c</h1>" in out.read_text()


# The page of a run


def test_compress_writes_the_page_and_nothing_depends_on_it(llama, calibration, tmp_path):
    """Oracle: the same run without a page."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    options = ("--calibration", calibration, "--num-sequences", 4, "--sequence-length", 32, "--effort", "fast")
    options += ("--sparsity", 0.5)
    mspc_cli("compress", llama, "--out", plain, *options)
    mspc_cli("compress", llama, "--out", out, *options, "--report", "--export", "dense")
    found = Page(out / "report.html")
    assert "What they say" in found.text
    assert [row[0] for row in found.cells if row and row[0] in ("dense", "out")] == ["dense", "out"] * len(PROMPTS)
    assert_alone(out / "report.html")
    for file in plain.rglob("*"):
        if file.is_file() and file.name != "mspc.json":
            assert (out / file.relative_to(plain)).read_bytes() == file.read_bytes()
    with_page, without = (mspc.Artifact(path).manifest for path in (out, plain))
    assert with_page["files"] == without["files"]
    assert with_page["bytes"] == without["bytes"]
    assert not (out / "exports" / "dense" / "report.html").exists()
    mspc.export(out, "dense", tmp_path / "export", verify=False, progress=False)
    assert not (tmp_path / "export" / "report.html").exists()
    (out / "report.html").unlink()
    mspc_cli("compress", llama, "--out", out, *options, "--report", "--resume")  # it is complete: only the page
    assert Page(out / "report.html").cells == found.cells
    mspc_cli("compress", llama, "--out", out, *options, "--overwrite")
    assert not (out / "report.html").exists()
