"""The model card of an artifact or export: metadata for the hub, results, method, and how to load it.

Names and texts come from models and files, so all of them are escaped: none becomes markup or metadata.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from mspc.pages.html import printable
from mspc.pages.subject import interval_in_words
from mspc.pipeline.summary import HURT, number, outer_in_words, recovery_line
from mspc.sizes import in_words
from mspc.storage.manifest import is_recovered

ARTIFACT = "artifact"
"""The kind of a folder that `compress` wrote; exports have the name of their format."""
LIBRARIES = {ARTIFACT: "mspc", "sparse": "mspc", "dense": "transformers", "gptq": "transformers",
             "compressed-tensors": "transformers"}  # fmt: skip
"""The `library_name` of each kind; the hub has none for the others."""
LICENCES = ("license", "license_name", "license_link", "language")
"""Fields of the base model's card that hold for what is made of it."""
TRANSFORMERS = """{first}from transformers import {class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = {class}.from_pretrained("{repo}")
"""
MSPC = """import mspc
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = mspc.load("{repo}")
"""
GENAI = """import onnxruntime_genai
from huggingface_hub import snapshot_download

model = onnxruntime_genai.Model(snapshot_download("{repo}"))
tokenizer = onnxruntime_genai.Tokenizer(model)
"""
GENAI_SPARSE = """import shutil

import mspc
import onnxruntime_genai
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo}")
shutil.copy(mspc.onnx_library(), folder)  # onnxruntime_genai takes it from there only
model = onnxruntime_genai.Model(folder)
tokenizer = onnxruntime_genai.Tokenizer(model)
"""
ONNX_SPARSE = "onnx sparse"
HOW = {
    ARTIFACT: (("python", "With mspc, which keeps the matrices compressed in memory:", MSPC),),
    "sparse": (
        ("python", "With mspc, which keeps the matrices compressed in memory:", MSPC),
        ("python", "Or with transformers. Without the first line it would fill these matrices with random numbers:",
         "{first}" + TRANSFORMERS),
    ),
    "dense": (("python", "With transformers, as any model:", TRANSFORMERS),),
    "gptq": (("python", "With transformers, where gptqmodel and optimum are installed:", TRANSFORMERS),),
    "compressed-tensors": (
        ("python", "With transformers, where compressed-tensors is installed:", TRANSFORMERS),
    ),
    "onnx": (("python", "With ONNX Runtime GenAI:", GENAI),),
    ONNX_SPARSE: (("python", "With ONNX Runtime GenAI, and the library of mspc:", GENAI_SPARSE),),
    "gguf": (("", "With llama.cpp, which downloads the file:", "llama-cli -hf {repo}\n"),),
}  # fmt: skip
"""The ways to load each kind: language, introduction, code."""


@dataclass(frozen=True)
class Subject:
    """The folder that a card is about."""

    kind: str
    """ARTIFACT, or the format of an export."""
    manifest: Mapping[str, Any]
    """The manifest of the artifact, or that of the export, which lacks some parts if an older mspc wrote it."""
    base: str | None
    """Hub id of the model before compression, if it is known."""
    base_card: Mapping[str, Any]
    """Metadata of the base model's own card."""
    weight_bytes: int
    """Bytes of the files of weights that are uploaded."""
    auto_class: str = "AutoModelForCausalLM"
    """The class of transformers that loads the folder."""


def card_of(subject: Subject, repo: str) -> str:
    """The card as a README.md for the hub: Markdown after a block of YAML."""
    parts = [f"# {escaped(repo.rpartition('/')[2])}", _lead(subject)]
    parts += [_results(subject), _method(subject), loading(subject, repo)]
    return f"---\n{_metadata(subject)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: object) -> str:
    """A text that comes from outside, in one line and as Markdown that shows it as it is."""
    line = re.sub(r"([!-&(-+:-@\[-`{-~])", r"\\\1", " ".join(printable(text).split()))
    return re.sub(r"(?i)(www)\.", r"\1\\.", line)  # or it would become a link


def _metadata(subject: Subject) -> str:
    rows = _all_rows(subject.manifest)
    bits = sorted({row["bits"] for row in rows if "group_size" in row})
    sparse = any(row["pruned"] for row in rows)
    formats = [] if subject.kind in (ARTIFACT, "sparse", "dense") else [subject.kind]
    tags = ["mspc", *formats, *["sparse"] * sparse, *(f"{count}-bit" for count in bits)]
    carried = {name: subject.base_card[name] for name in LICENCES if _is_plain(subject.base_card.get(name))}
    known = {"base_model": subject.base} if subject.base else {}
    relation = {"base_model_relation": "quantized"} if subject.base and bits else {}
    library = {"library_name": LIBRARIES[subject.kind]} if subject.kind in LIBRARIES else {}
    values: dict[str, Any] = {**carried, **known, **relation, **library}
    return str(ModelCardData(**values, pipeline_tag="text-generation", tags=tags).to_yaml()).strip()


def _all_rows(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The matrices, embeddings and head too, which an artifact lists apart."""
    return [*manifest["matrices"], *manifest.get("outer", ())]


def _is_plain(value: object) -> bool:
    """Tell if a field of a card is a text in one line, or a list of such texts: one of several could end the block."""
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text.isprintable() for text in texts)


def _lead(subject: Subject) -> str:
    manifest, name = subject.manifest, subject.base or str(_source(subject.manifest))
    rows = _all_rows(manifest)
    quantized = any("group_size" in row for row in rows)
    done = [word for word, is_so in (("pruned", any(row["pruned"] for row in rows)), ("quantized", quantized)) if is_so]
    how = " and ".join(done) or "stored"
    recovered = ", and its kept weights were trained on afterwards" * is_recovered(manifest)
    form = "as mspc writes it" if subject.kind == ARTIFACT else f"in the format {subject.kind}"
    linked = f"[{escaped(name)}](https://huggingface.co/{name})" if subject.base else escaped(name)
    line = f"{linked}, {how} by mspc {escaped(manifest['mspc_version'])}{recovered}, {form}."
    lost = ((manifest.get("evaluation") or {}).get("divergence") or {"mean": 0})["mean"]
    if lost is None or lost > HURT:
        line += f"\n\n**This model is badly hurt**: its KL from the dense model is {number(lost)} nats per token."
    return line


def _source(manifest: Mapping[str, Any]) -> object:
    """The name of the source in a manifest, or in one of an export."""
    source = manifest["source"]
    return source["name"] if isinstance(source, Mapping) else source


def _results(subject: Subject) -> str:
    found, sizes = subject.manifest.get("evaluation"), subject.manifest.get("bytes")
    rows: list[tuple[str, str, str]] = []
    if found:
        for title, before, after in (
            ("perplexity", found["dense_perplexity"], found["perplexity"]),
            ("KL divergence from the dense model, nats per token", None, found["divergence"]),
        ):
            rows.append((title, _mean(before) if before else "", _mean(after)))
    rows.append(("weights", in_words(sizes["dense"]) if sizes else "", in_words(subject.weight_bytes)))
    note = ""
    if found:
        note = (
            f"\n\nMeasured when it was compressed, on {found['tokens']:,} tokens of {escaped(found['text'])} "
            f"({found['windows']} windows of {found['sequence_length']}) that neither calibrated nor chose anything. "
            "Intervals are 95% t-intervals over windows. Perplexities of other texts or windows cannot be compared."
        )
        if subject.kind not in (ARTIFACT, "sparse", "dense"):
            note += " The runtimes of this format may round otherwise."
    return "## Results\n\n" + _table(("", "before", "after"), rows) + note


def _mean(found: Mapping[str, Any]) -> str:
    interval = interval_in_words(found)
    return number(found["mean"]) + (f" ({interval})" if interval else "")


def _method(subject: Subject) -> str:
    manifest, settings = subject.manifest, subject.manifest.get("settings") or {}
    sparsity = manifest["sparsity"]
    achieved = sparsity["achieved"] if isinstance(sparsity, Mapping) else sparsity
    lines = [f"- {achieved:.2%} of the weights of the compressed matrices are zero"]
    if (bits := manifest.get("bits_per_weight")) is not None:
        lines[0] += f", and they take {bits:.3f} bits per weight, scales and positions included"
    outer = [row for row in _all_rows(manifest) if row.get("role")]
    lines[0] += f". Embeddings and head are {outer_in_words(outer)}."
    named = {"solver": "solver", "allocator": "allocator", "preset": "effort", "calibration text": "calibration"}
    if used := [f"{title} `{_code(settings[key])}`" for title, key in named.items() if settings.get(key) is not None]:
        lines.append(f"- Made with {', '.join(used)}.")
    if is_recovered(manifest):
        lines.append(f"- {escaped(recovery_line(manifest['recovery']))}")
    rows = _kinds([row for row in manifest["matrices"] if not row.get("role")])
    table = _table(("pattern", "bits", "zeros", "matrices", "share of their weights"), rows)
    return "## Method\n\n" + "\n".join(lines) + "\n\n" + table


def _kinds(matrices: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The matrices by pattern and bits, most weights first."""
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in matrices:
        kinds[str(row["pattern"]), str(row["bits"])].append(row)
    size_of = {key: sum(row["shape"][0] * row["shape"][1] for row in rows) for key, rows in kinds.items()}
    for (pattern, bits), rows in sorted(kinds.items(), key=lambda item: -size_of[item[0]]):
        size = size_of[pattern, bits]
        zeros = sum(row["pruned"] for row in rows) / size
        yield pattern, bits, f"{zeros:.1%}", str(len(rows)), f"{size / sum(size_of.values()):.1%}"


def loading(subject: Subject, repo: str) -> str:
    """The section of a card that says how to load what is in `repo`."""
    first = "import mspc.hf  # before the model is loaded\n"
    parts = []
    is_sparse = subject.kind == "onnx" and subject.manifest.get("options", {}).get("weights") == "sparse"
    for language, introduction, code in HOW[ONNX_SPARSE if is_sparse else subject.kind]:
        text = code.replace("{first}{first}", first).replace("{first}", "")
        text = text.replace("{class}", subject.auto_class).replace("{repo}", repo)
        parts.append(f"{introduction}\n\n```{language}\n{text}```")
    return "## How to load it\n\n" + "\n\n".join(parts)


def _code(text: object) -> str:
    """A text between backticks. Of a path, which says something about a machine, it is the name."""
    line = " ".join(printable(text).replace("`", "'").split())
    return line.rstrip("/").rpartition("/")[2] if line.startswith(("/", "~", ".")) else line


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
