"""`report`: the page of one artifact, or of several that are compared."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mspc.api import Artifact, ProgressLike, evaluate
from mspc.errors import InputError, MspcError, is_out_of_memory
from mspc.model.hub import choose_device
from mspc.pages import plots
from mspc.pages.continuations import PROMPTS, TOKENS, Continued, continued
from mspc.pages.html import Html, element, joined, note
from mspc.pages.sections import artifact, comparison
from mspc.pages.subject import Subject, subjects_of
from mspc.passes.perplexity import Perplexity
from mspc.progress import Progress, as_progress, log
from mspc.storage.artifact import PAGE
from mspc.storage.files import write_text
from mspc.storage.manifest import MANIFEST
from mspc.threads import using
from mspc.version import __version__

GENERATOR = '<meta name="generator" content="mspc'
"""The mark of a page of mspc: no other file is replaced."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
NO_DENSE = "Left out: they need the dense model, which --against gives."


def report(
    artifacts: Artifact | str | Path | Sequence[Artifact | str | Path],
    out: str | Path,
    *,
    against: str | Path | None = None,
    text: str | None = None,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    bos: str | None = None,
    text_column: str | None = None,
    text_encoding: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    progress: ProgressLike = True,
) -> Path:
    """Write one HTML file about artifacts, which needs no network and no other file; returns `out`.

    It shows how they were made, their sizes and losses with intervals, where the bits went, what was predicted, and
    where the time went. Several artifacts are compared. Plots need matplotlib.

    Args:
        artifacts: An artifact, or several.
        out: File to write. One that exists is replaced if it is such a page.
        against: The dense model. Perplexities and KL divergence are then measured as `evaluate` does, and are not
            those of the manifest. Ten prompts are continued by each model, if the dense one fits in memory.
        text: See `evaluate`, as for the other arguments. All but `progress` need `against`.

    Raises InputError for a path that is no artifact.
    """
    given = [artifacts] if isinstance(artifacts, Artifact | str | Path) else list(artifacts)
    paths = [part.path if isinstance(part, Artifact) else Path(part) for part in given]
    out, shown = Path(out), as_progress(progress)
    options: dict[str, Any] = {
        "text": text, "sequence_length": sequence_length, "max_windows": max_windows, "bos": bos,
        "text_column": text_column, "text_encoding": text_encoding, "device": device, "dtype": dtype,
        "threads": threads,
    }  # fmt: skip
    asked = {name: value for name, value in options.items() if value is not None}
    if not paths:
        raise InputError("report: there is no artifact. Give at least one folder that `mspc compress` wrote.")
    if asked and against is None:
        raise InputError(f"report: {next(iter(asked))} has no effect without against. Give both, or none of them.")
    _check_out(out)
    subjects = subjects_of(paths)
    if against is None:
        return _write(subjects, note(NO_DENSE), out)
    measured = [evaluate(path, against=against, progress=shown, **asked) for path in paths]
    subjects = [
        replace(one, evaluation=_afresh(found, str(against))) for one, found in zip(subjects, measured, strict=True)
    ]
    return _write(subjects, _said(subjects, paths, str(against), device, dtype, threads, shown), out)


def report_of_run(
    made: Artifact, model: str, device: str, dtype: str, threads: int | None, progress: ProgressLike = True
) -> Path:
    """Write the page of a finished run into its artifact. Its figures are those of the run."""
    _check_out(made.path / PAGE)
    subjects = subjects_of([made.path])
    said = _said(subjects, [made.path], model, device, dtype, threads, as_progress(progress))
    return _write(subjects, said, made.path / PAGE)


def _check_out(out: Path) -> None:
    """Raises InputError for a folder, and for a file that is no page of mspc."""
    if out.is_dir():
        raise InputError(f"{out} is a folder, and the page is a file. Give a name such as {out / PAGE}.")
    if not out.exists():
        return
    if not out.is_file():
        raise InputError(f"{out} is no file. Give the name of one.")
    with out.open("rb") as file:
        if GENERATOR.encode() not in file.read(2000):
            raise InputError(f"{out} exists and is no report of mspc. Choose another --out, or remove it.")


def _afresh(found: Perplexity, against: str) -> dict[str, Any]:
    """An evaluation in the form of the manifest's, where None stands for infinity."""
    values = {name: None if value == math.inf else value for name, value in asdict(found).items()}
    names = {"dense_perplexity": "reference_perplexity", "perplexity": "perplexity", "divergence": "divergence"}
    means = {key: {"mean": values[name], "interval": values[f"{name}_interval"]} for key, name in names.items()}
    told = {key: values[key] for key in ("text", "windows", "sequence_length", "tokens")}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return told | means | {"origin": f"Measured for this page, against {against}, by mspc {__version__}, {versions}."}


def _said(
    subjects: Sequence[Subject],
    paths: Sequence[Path],
    against: str,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    progress: Progress,
) -> Html:
    """The continuations, or the reason why they are left out."""
    models = [("dense", Path(against)), *((one.name, path) for one, path in zip(subjects, paths, strict=True))]
    try:
        with using(threads, choose_device(device or "auto")):
            found = continued(models, device or "auto", dtype or "auto", progress)
    except Exception as error:
        if not (isinstance(error, MspcError) or is_out_of_memory(error)):
            raise
        log.warning(f"continuations are left out: {error}")  # the rest of the page is worth having
        return note(f"Left out: {error}")
    explained = f"The likeliest {TOKENS} tokens, one after the other. What differs from the dense model is marked."
    return joined([note(explained), *_prompts(found)])


def _prompts(found: Sequence[Continued]) -> Iterable[Html]:
    for place, prompt in enumerate(PROMPTS):
        dense = found[0].texts[place]
        rows = []
        for one in found:
            text = one.texts[place]
            same = next(
                (i for i, (a, b) in enumerate(zip(dense, text, strict=False)) if a != b), min(len(dense), len(text))
            )
            part = element("span", text) if one is found[0] else joined(
                [element("span", text[:same]), element("mark", text[same:]) if text[same:] else None]
            )  # fmt: skip
            rows.append(
                element("tr", element("th", one.name, scope="row"), element("td", element("div", part, class_="said")))
            )
        yield element("figure", element("figcaption", element("b", prompt)), element("table", element("tbody", *rows)),
                      class_="prompt")  # fmt: skip


def _write(subjects: Sequence[Subject], said: Html, out: Path) -> Path:
    title = subjects[0].name if len(subjects) == 1 else f"{len(subjects)} artifacts"
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    head = element(
        "head", element("meta", charset="utf-8"), Html(f'{GENERATOR} {__version__}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", f"{title} - mspc report"), element("style", Html(style)),
    )  # fmt: skip
    parts = [_article(subject, alone=len(subjects) == 1) for subject in subjects]
    if len(subjects) > 1:
        with _shown(", ".join(subject.name for subject in subjects)):
            parts.insert(0, comparison(subjects))
    parts.append(element("article", element("h2", "What they say"), said))
    without = None if plots.is_installed() else note(plots.MISSING)
    header = element("header", element("p", "mspc report", class_="kicker"), element("h1", title), without)
    footer = element("footer", f"Written by mspc {__version__}.")
    page = element("html", head, element("body", header, element("main", *parts), footer), lang="en")
    write_text(out, f"<!doctype html>\n{page}\n")
    return out


def _article(subject: Subject, *, alone: bool) -> Html:
    """The part of one artifact. Raises InputError for a manifest that lacks what each has."""
    heading = None if alone else element("h2", element("span", subject.place, class_="place"), subject.name)
    with _shown(subject.name):
        return artifact(subject, heading)


@contextmanager
def _shown(name: str) -> Iterator[None]:
    """Inside, a manifest that lacks what each has is an InputError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(
            f"{name}: {MANIFEST} cannot be shown ({error!r}). The artifact is damaged: compress again."
        ) from error
