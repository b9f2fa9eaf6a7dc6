"""The command line: thin verbs over `mspc.api`. Results go to stdout, progress and messages to stderr."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mspc.cli.bench_command import bench
from mspc.cli.console import (  # fmt: skip
    ArtifactArgument,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutOption,
    group_size_of,
    option,
    print_json,
    print_table,
    recipe_values,
    reported,
)
from mspc.cli.export_commands import export, verify
from mspc.recipe import Recipe
from mspc.version import __version__

app = typer.Typer(
    name="mspc",
    help="Make a large language model smaller and faster in one call: prune each weight matrix as far as its "
    "sensitivity allows, round what is left in the same pass, and prove the result.",
    epilog="Exit codes: 0 done, 1 failed (disk, device, numerics), 2 wrong usage or input, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

WHAT, HOW, TEXT, RUN = "What to make", "How to make it", "Calibration", "Running"


@app.command()
def compress(
    model: ModelArgument,
    out: OutOption,
    sparsity: Annotated[
        float | None,
        option("Share of zeros over all pruned weights, in 0 .. 1.", 0.5, rich_help_panel=WHAT),
    ] = None,
    pattern: Annotated[
        str | None,
        option(
            "unstructured; 2:4, 4:8, 8:16, ... the same in every matrix; or N:16, N chosen per matrix.",
            "unstructured",
            rich_help_panel=WHAT,
        ),
    ] = None,
    bits: Annotated[
        int | None, option("16 (no rounding), 8, 4, 3 or 2 bits for the kept weights.", 16, rich_help_panel=WHAT)
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        option(
            "Instead: sparsity and bits of each matrix for so many bits a weight, all included.",
            "none",
            rich_help_panel=WHAT,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        option("The same for the weights of the sparse export, such as 2.2GB.", "none", rich_help_panel=WHAT),
    ] = None,
    group_size: Annotated[
        str | None, option("Inputs that share a scale: 128, 64, 32 or row.", 128, rich_help_panel=WHAT)
    ] = None,
    asymmetric: Annotated[
        bool | None,
        typer.Option(
            "--asymmetric/--symmetric",
            help="Integer zero point per group. (default: symmetric)",
            show_default=False,
            rich_help_panel=WHAT,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave matrices dense whose name this matches anywhere; repeatable.", rich_help_panel=WHAT),
    ] = None,
    effort: Annotated[
        str | None,
        option("fast, default or best: what the options marked * are by default.", "default", rich_help_panel=HOW),
    ] = None,
    solver: Annotated[
        str | None,
        option(
            "kfac (searches for what to keep by the model's loss), admm (by the layer's error), obs (one sweep) or "
            "mask (no update).",
            "kfac*",
            rich_help_panel=HOW,
        ),
    ] = None,
    iterations: Annotated[int | None, option("Of the search of kfac and admm.", "20*", rich_help_panel=HOW)] = None,
    propagation: Annotated[
        float | None,
        option("How far a matrix makes good what those before it lost, in 0 .. 1.", "1*", rich_help_panel=HOW),
    ] = None,
    reconstruct: Annotated[
        int | None, option("Steps that tune what attention and MLP keep; not with --bits.", 0, rich_help_panel=HOW)
    ] = None,
    criterion: Annotated[
        str | None, option("Which weights go: isc, obs, wanda, ria, magnitude.", "isc", rich_help_panel=HOW)
    ] = None,
    allocator: Annotated[
        str | None,
        option(
            "How sparsity is shared out: auto (tries several plans on held-out text), curves (least predicted loss), "
            "search (goes on from there for minutes), uniform, trace-rank, layer-trace-rank, owl, alpha "
            "(AlphaPruning), depth (linear).",
            "auto*",
            rich_help_panel=HOW,
        ),
    ] = None,
    alpha: Annotated[
        float | None, option("Half-width of the allocator.", "0.1; owl 0.08, alpha 0.2", rich_help_panel=HOW)
    ] = None,
    search_minutes: Annotated[
        float | None,
        option(
            "Of the allocator search. It stops by the clock: --plan OUT/plan.json makes the same again.",
            10,
            rich_help_panel=HOW,
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        option(
            "What trace-rank ranks by: hutchinson (Hessian trace), fisher (squared gradient), gram (no gradient).",
            "hutchinson",
            rich_help_panel=HOW,
        ),
    ] = None,
    sensitivity_sequences: Annotated[
        int | None, option("Most sequences that measure gradients, curves and sensitivity.", "24*", rich_help_panel=HOW)
    ] = None,
    sensitivity_probes: Annotated[
        int | None, option("Random probes of each of those sequences.", 1, rich_help_panel=HOW)
    ] = None,
    damp: Annotated[
        float | None, option("Share of its mean added to the diagonal of a Gram.", 0.01, rich_help_panel=HOW)
    ] = None,
    activation_order: Annotated[
        bool | None,
        typer.Option(
            "--activation-order/--column-order",
            help="Settle columns with the largest inputs first. (default: column order)",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        option(
            "builtin (Python's own documentation), a .txt, .jsonl or .parquet file, a folder of them, c4, wikitext2, "
            "or a dataset id.",
            "builtin",
            rich_help_panel=TEXT,
        ),
    ] = None,
    num_sequences: Annotated[int | None, option("Calibration sequences.", 128, rich_help_panel=TEXT)] = None,
    sequence_length: LengthOption = None,
    seed: Annotated[int | None, option("Of the choice of text and the probes.", 0, rich_help_panel=TEXT)] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json",
            help="Obey this plan (a plan.json, edited or not) instead of allocating.",
            rich_help_panel=RUN,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Take all of the above from a recipe.toml; options given here win.",
            rich_help_panel=RUN,
        ),
    ] = None,
    measurements: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what was measured here for the next budget.", rich_help_panel=RUN),
    ] = None,
    spill: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep activations in files here, not in memory.", rich_help_panel=RUN),
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT",
            help="Also export to OUT/exports/FORMAT; repeatable (see `mspc export --list`).",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was cut off.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an older artifact when the new one is whole.", rich_help_panel=RUN),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune, and round, a model by its sensitivity.

    \b
    mspc compress MODEL --out DIR                          half of the weights
    mspc compress MODEL --out DIR --pattern 2:4 --bits 4   3.125 bits a weight
    mspc compress MODEL --out DIR --sparsity 0 --bits 4    only rounding
    mspc compress MODEL --out DIR --bits-per-weight 3.125  the best mixture
    """
    given = {
        "sparsity": sparsity, "pattern": pattern, "bits": bits,
        "bits_per_weight": bits_per_weight, "target_size": target_size, "asymmetric": asymmetric, "effort": effort,
        "solver": solver, "iterations": iterations, "propagation": propagation, "reconstruct": reconstruct,
        "criterion": criterion, "allocator": allocator, "alpha": alpha, "search_minutes": search_minutes,
        "sensitivity": sensitivity, "sensitivity_sequences": sensitivity_sequences,
        "sensitivity_probes": sensitivity_probes, "damp": damp, "activation_order": activation_order,
        "calibration": calibration, "num_sequences": num_sequences, "sequence_length": sequence_length, "seed": seed,
        "skip": skip or None, "plan": plan, "device": device, "dtype": dtype,
    }  # fmt: skip
    with reported(debug, "What was solved is kept: `mspc compress` goes on with --resume."):
        given["group_size"] = group_size_of(group_size)
        chosen = {name: value for name, value in given.items() if value is not None}
        whole = Recipe.from_dict(recipe_values(recipe, chosen) | chosen)
        import mspc
        from mspc.cli.tables import summary
        from mspc.progress import ConsoleReporter

        artifact = mspc.compress(
            model, whole, out=out, measurements=measurements, spill=spill, resume=resume, overwrite=overwrite,
            exports=export or (),
        )  # fmt: skip
        if as_json:
            print_json(artifact.manifest)
        else:
            ConsoleReporter().say(f"{out}: {summary(artifact.manifest)}")


@app.command(name="eval")
def eval_(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Checkpoint folder, hub id, artifact, dense or sparse export.")
    ],
    text: Annotated[
        str,
        typer.Option(
            help="The held-out part of builtin (Python's own documentation), c4, wikitext2 or a dataset id; or a .txt, "
            ".jsonl or .parquet file, or a folder of them, whole."
        ),
    ] = "builtin",
    sequence_length: LengthOption = None,
    max_windows: Annotated[int | None, typer.Option(help="Measure the first so many windows. (default: all)")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also the KL divergence from this model's predictions; 0 is none."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """How well a model predicts text that it was not calibrated on: perplexity, of which less is better.

    \b
    mspc eval MODEL                         the original
    mspc eval out/small                     what compress wrote
    mspc eval out/small --against MODEL     and how far apart they are
    mspc eval out/small --text t.txt --max-windows 100

    The text is one stream of tokens, cut into windows that do not overlap. Only
    perplexities of the same text, length and number of windows can be compared.
    """
    with reported(debug):
        from mspc.pipeline.evaluation import evaluate

        result = evaluate(
            path, text, sequence_length=sequence_length, max_windows=max_windows, device=device or "auto",
            dtype=dtype or "auto", against=against,
        )  # fmt: skip
    if as_json:
        print_json({name: value for name, value in asdict(result).items() if value is not None})
    else:
        print(
            f"perplexity {result.perplexity:.4f} over {result.tokens:,} tokens, {result.windows} windows of "
            f"{result.sequence_length}"
            + ("" if result.divergence is None else f", KL divergence {result.divergence:.5f} nats a token")
        )


@app.command()
def inspect(artifact: ArtifactArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """What an artifact holds, matrix by matrix."""
    with reported(debug):
        from mspc.cli.tables import matrix_table, summary
        from mspc.storage.manifest import read_manifest

        manifest = read_manifest(artifact)
    if as_json:
        print_json(manifest)
        return
    print_table(matrix_table(manifest))
    print(summary(manifest))


app.command()(export)
app.command()(verify)
app.command()(bench)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def main() -> None:
    # What these say when they are imported is not about anything that the user did.
    for name in ("torchao", "torch.utils._pytree", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app()
