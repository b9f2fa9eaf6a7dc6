"""The verb `push` of the command line."""

from pathlib import Path
from typing import Annotated

import typer

from mspc.cli.console import DebugOption, JsonOption, option, print_json, reported
from mspc.progress import log


def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Artifact, or folder that `mspc export` wrote.", show_default=False),
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the hub: OWNER/NAME.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, option("Message of the commit.", "that mspc uploads", metavar="TEXT")] = None,
    base_model: Annotated[
        str | None,
        option("Hub id of the model before compression, for the card.", "that in the manifest", metavar="MODEL"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files and the card, and upload nothing.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Upload an artifact or export to the hub, with a model card.

    \b
    mspc push out/small-sparse OWNER/NAME --dry-run    the files and the card
    mspc push out/small-sparse OWNER/NAME --private    one commit

    Every file is compared with its digest first, and nothing is uploaded unless
    all are right. The card says what the model was made from and how, what that
    cost, and how to load it. A README.md in DIR with the tag mspc is kept as the
    card; that of the base model goes to README.base.md. Log in with
    `hf auth login` first.
    """
    with reported(debug):
        from mspc.publish.upload import push as upload
        from mspc.sizes import in_words

        found = upload(folder, repo, private=private, message=message, base_model=base_model, dry_run=dry_run)
        if as_json:
            print_json(found.to_dict())
        elif dry_run:
            for name, size in found.files.items():
                print(f"{in_words(size):>12}  {name}")
            print(f"\n{found.card}", end="")
        else:
            print(found.url)
        if dry_run:
            log.info(f"Nothing was uploaded: {len(found.files)} files, {in_words(sum(found.files.values()))}.")
