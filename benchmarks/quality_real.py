"""Tables and a picture of compressed real models, by mspc and by other tools, judged by one function.

    python benchmarks/quality_real.py [--models NAME...] [--rows PATTERN...] [--list | --table | --plot FILE.png]

Every row is a file in --results, MODEL/ROW.json, which is written as soon as the row is known. What is there is not
run again, so a comparison that takes hours can be interrupted. Rows run one at a time. A row that fails is recorded
with its error; --again runs it anew. --rows takes shell patterns of names, such as 'mspc-*'.

    prose, code  60 windows of 512 tokens of documentation and of source code (real_texts.py)
    chat         replies of the dense model to 40 prompts, by its own chat template, drawn once (real_chat.py)
    KL           mean KL(dense || compressed) of a prediction, in nats; with its 95% interval in the files
    top-1        share of predictions whose most probable token is that of the dense model
    CPU seconds  of all threads of the process that compresses, with reading and writing; the files have the time on the
                 clock too, which other work on the machine changes

Calibration is the same 128 sequences of 512 tokens for every row, of other packages than the test texts. Other tools
run in environments of their own in the cache of mspc. Models are those of models.py; a folder is taken as it is.
"""

import argparse
import fnmatch
import json
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from real_makers import MADE, Job, artifact_of, make
from real_process import RowError, cache_folder, measured, output_of, write_json
from real_rows import DENSE, ROWS, Row, chosen

HERE = Path(__file__).parent
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
RESULTS = HERE / "results" / "real"
VERSIONS = ("mspc", "torch", "transformers")


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(HERE / name), *map(str, arguments)]


def prepare(args: argparse.Namespace, model: str, work: Path) -> tuple[Job, dict[str, Any]]:
    """The inputs of all rows of a model, and their description. Those that are not there are made."""
    found = dict(line.split(maxsplit=1) for line in output_of(script("models.py", model))) if model in MODELS else {}
    reference = Path(found.get(model, model)).resolve()
    texts = args.texts or {name: file for name, file, _ in map(str.split, output_of(script("real_texts.py")))}
    work.mkdir(parents=True, exist_ok=True)
    chat = work / "chat.json"
    if not chat.is_file():
        measured(script("real_chat.py", reference, chat), args.threads, work / "chat.log")
    sizes = {name: getattr(args, name) for name in ("num_sequences", "sequence_length", "max_windows")}
    job, wanted = work / "tokens-job.json", {"texts": texts, "chat": str(chat)} | sizes
    if not (work / "tokens.json").is_file() or json.loads(job.read_text(encoding="utf-8")) != wanted:
        write_json(job, wanted)
        for name in ("reference.safetensors", "importance.safetensors"):
            (work / name).unlink(missing_ok=True)
        measured(script("real_tokens.py", reference, work, job), args.threads, work / "tokens.log")
    tokens = json.loads((work / "tokens.json").read_text(encoding="utf-8"))
    shared = Job(
        reference=reference,
        calibration=Path(texts["calibration"]),
        tokens=work / "calibration.safetensors",
        calibration_sha256=tokens["calibration_sha256"],
        num_sequences=args.num_sequences,
        sequence_length=args.sequence_length,
        group_size=tokens["group_size"],
        threads=args.threads,
        environments=cache_folder() / "real" / "venvs",
        shared=work,
    )
    return shared, tokens | sizes


def run(row: Row, job: Job, work: Path) -> dict[str, Any]:
    """Make a row if that was not done, and judge it. Raises RowError."""
    folder = work / row.name
    state = folder / MADE
    if row == DENSE:
        folder.mkdir(exist_ok=True)
        made: dict[str, Any] = {"size": {"kind": "dense"}}
    elif state.is_file():
        made = json.loads(state.read_text(encoding="utf-8"))
    else:
        made = make(row, folder, job)
        write_json(state, made)
    dense = job.reference if row == DENSE else folder / "dense"
    out, wanted = folder / "judged.json", {"model": str(dense), "reference": str(job.reference), "size": made["size"]}
    wanted |= {"ids": str(work / "test.safetensors"), "cache": str(work / "reference.safetensors"), "out": str(out)}
    write_json(folder / "job.json", wanted)
    judging = measured(script("real_evaluation.py", folder / "job.json"), job.threads, folder / "judging.log")
    judged = json.loads(out.read_text(encoding="utf-8"))
    described = {name: value for name, value in made.items() if name != "size"} or {"date": judging["date"]}
    return described | judged | {"judging_seconds": judging["seconds"]}


def record(row: Row, model: str, file: Path, described: dict[str, Any], job: Job, work: Path) -> None:
    """Run a row and write its file, with the error if it fails. The row's folder is removed if it succeeds."""
    head = {"model": Path(model).name, "family": row.family, "setting": row.setting, "group_size": job.group_size}
    versions = {name: version(name) for name in VERSIONS} | {"python": platform.python_version()}
    try:
        result = run(row, job, work)
    except RowError as error:
        result = {"error": str(error)}
    else:
        keep_artifact(row, work)
        shutil.rmtree(work / row.name)
    write_json(file, head | result | {"configuration": described, "versions": versions})


def keep_artifact(row: Row, work: Path) -> None:
    """Keep what a row has made if another one continues it."""
    if any(other.continues == row.name for other in ROWS):
        kept = artifact_of(row.name, work)
        shutil.rmtree(kept.parent, ignore_errors=True)
        kept.parent.mkdir(parents=True)
        for path in (kept, kept.parent / MADE):
            (work / row.name / path.name).rename(path)


def results_of(folder: Path, model: str) -> dict[str, dict[str, Any]]:
    """The results of a model by the name of their rows."""
    files = sorted((folder / Path(model).name).glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--rows", nargs="+", default=[], metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="print the rows and which of them are there")
    parser.add_argument("--table", action="store_true", help="print the results that are there as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results that are there")
    parser.add_argument("--again", action="store_true", help="run rows anew that failed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num-sequences", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=60)
    parser.add_argument("--texts", type=json.loads, help="JSON: files of the texts calibration, prose and code")
    args = parser.parse_args(arguments)
    rows = chosen(args.rows, fnmatch.fnmatch)
    if not rows:
        parser.error(f"no row matches {' '.join(args.rows)}; --list shows them")
    if args.list or args.table or args.plot:
        show(args, rows)
        return
    for model in args.models:
        todo = [row for row in rows if not is_done(args.results / Path(model).name / f"{row.name}.json", args.again)]
        work = cache_folder() / "real" / "work" / Path(model).name
        if not todo:
            continue
        job, described = prepare(args, model, work)
        for row in todo:
            print(f"{Path(model).name}: {row.name}", flush=True)
            record(row, model, args.results / Path(model).name / f"{row.name}.json", described, job, work)


def is_done(file: Path, again: bool) -> bool:
    return file.is_file() and not (again and "error" in json.loads(file.read_text(encoding="utf-8")))


def show(args: argparse.Namespace, rows: list[Row]) -> None:
    import real_report

    found = {Path(model).name: results_of(args.results, model) for model in args.models}
    for model, results in found.items():
        if args.list:
            for row in rows:
                state = "not run yet" if row.name not in results else results[row.name].get("error", "done")
                print(f"{model}  {row.name:36}  {state[:80]}")
        if args.table:
            print(real_report.table(model, results, rows))
    if args.plot:
        real_report.plot({model: results for model, results in found.items() if results}, args.plot)


if __name__ == "__main__":
    main()
