"""`push`: an artifact or export to a repository of the hub, in one commit, with a model card.

Nothing leaves the machine before the folder is known to be whole, by the digests in its manifest.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from exporters.manifest import read_export_manifest
from exporters.sparse import CLASS, readme_of
from mspc.errors import InputError, MspcError, StorageError, in_brief, is_out_of_memory
from mspc.model.auto_class import auto_class
from mspc.model.hub import load_config
from mspc.progress import Progress, as_progress, log
from mspc.publish.card import ARTIFACT, Subject, card_of
from mspc.sizes import in_words
from mspc.storage.artifact import PAGE, PLAN, RECIPE, TIMINGS, ArtifactSource
from mspc.storage.carrying import belongs
from mspc.storage.files import sha256_of
from mspc.storage.journal import NAME as JOURNAL
from mspc.storage.manifest import EXPORT_MANIFEST, MANIFEST, is_artifact

README, README_OF_BASE = "README.md", "README.base.md"
WHOLE_MODELS = ("sparse", "dense")
"""Formats that can hold a model that sees or hears."""
TAG = "mspc"
"""The tag of cards about models that mspc compressed."""
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data")
OFFLINE = (
    "HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or give --dry-run to see what would be uploaded."
)


@dataclass(frozen=True)
class Push:
    """Files that were uploaded, or would be."""

    repo: str
    files: Mapping[str, int]
    """Bytes by path in the repository, the card included."""
    card: str
    """The text of README.md."""
    card_is_kept: bool
    """True if the card is the one that the folder has."""
    url: str | None
    """Address of the commit; None for a dry run."""

    def to_dict(self) -> dict[str, Any]:
        return {"repo": self.repo, "url": self.url, "files": dict(self.files), "card_is_kept": self.card_is_kept,
                "card": self.card}  # fmt: skip


def push(
    folder: Any,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    dry_run: bool = False,
    progress: bool | Any | Progress = True,
) -> Push:
    """Upload an artifact or export to a repository of the hub, with a model card that says what it is.

    Args:
        folder: Folder that `compress` or `export` wrote, complete.
        repo: OWNER/NAME; it is made if it does not exist.
        private: Make a new repository private. One that exists stays as it is.
        message: Message of the commit.
        base_model: Hub id of the model before compression; None: the name in the manifest, if it is such an id.
        dry_run: Upload nothing, and only return what would be.
        progress: True, False, or a callable that gets an `Event`.

    The README.md of the folder is kept if its metadata has the tag `mspc`. Else it is the card of the base model, which
    compression carries along: it goes to README.base.md, and a card is written.

    Raises InputError, before anything is uploaded, for a folder that is not whole or a repository that does not let
    you, and StorageError if the hub fails.
    """
    folder, shown = Path(getattr(folder, "path", folder)), as_progress(progress)
    for name in (repo, *([] if base_model is None else [base_model])):
        _check_id(name)
    if constants.HF_HUB_OFFLINE and not dry_run:
        raise InputError(OFFLINE)
    kind, manifest, names = _whole(folder, shown)
    files = {name: folder / name for name in names}
    card, is_kept = _card(files, kind, manifest, repo, base_model)
    sizes = {name: path.stat().st_size for name, path in files.items()} | {README: len(card.encode("utf-8"))}
    _warn_of_paths(manifest)
    url = None if dry_run else _upload(repo, files, card, private, message or f"Upload by mspc: {kind}", shown)
    return Push(repo, dict(sorted(sizes.items())), card, is_kept, url)


def _check_id(name: str) -> None:
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise InputError(f"{name!r} is no repository of the hub ({in_brief(error)}). Give OWNER/NAME.") from error


def _whole(folder: Path, progress: Progress) -> tuple[str, dict[str, Any], list[str]]:
    """The kind of a folder, its manifest and the files that belong to it. Raises InputError if it is not complete."""
    if (folder / JOURNAL).is_file():
        raise InputError(f"{folder} holds an unfinished run; finish it with `mspc compress ... --resume` first.")
    if (folder / EXPORT_MANIFEST).is_file():
        kind, digests = (found := read_export_manifest(folder)).format, found.files
        manifest = json.loads((folder / EXPORT_MANIFEST).read_text(encoding="utf-8"))
        own = {EXPORT_MANIFEST, *digests}
    elif is_artifact(folder):
        source = ArtifactSource(folder)
        kind, manifest, digests = ARTIFACT, source.manifest, source.manifest["files"]
        own = {MANIFEST, PLAN, RECIPE, TIMINGS, PAGE, *digests}
        for row in source.entries:
            if row.file not in digests:
                raise InputError(f"{folder}: {row.file} has no digest in {MANIFEST}. Compress again.")
    else:
        raise InputError(f"{folder} is neither an artifact nor an export of mspc. Compress or export a model first.")
    _check_digests(folder, digests, progress)
    return kind, manifest, _names(folder, own)


def _check_digests(folder: Path, digests: Mapping[str, str], progress: Progress) -> None:
    """Raises InputError, naming the file, for one that is missing or does not have the bytes that were written."""
    with progress.stage("Checking files", len(digests)) as step:
        for name, digest in digests.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"The manifest of {folder} points outside its folder, at {name!r}; do not use it.")
            if not path.is_file():
                raise InputError(f"{path} is missing. Restore it, or make the folder again; nothing was uploaded.")
            if sha256_of(path) != digest:
                raise InputError(f"{path} is damaged: mspc wrote other bytes. Restore it; nothing was uploaded.")
            step(name)


def _names(folder: Path, own: set[str]) -> list[str]:
    """The files to upload: those of mspc, and what belongs to the model. Others are named in a message."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    chosen = [name for name in found if name in own or belongs(name)]
    left_out = [name for name in found if name not in chosen]
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        log.info(f"Not uploaded, as no part of the model: {', '.join(left_out[:5])}{more}.")
    return chosen


def _card(
    files: dict[str, Path], kind: str, manifest: Mapping[str, Any], repo: str, base_model: str | None
) -> tuple[str, bool]:
    """The card, and whether the folder had it. The card of the base model gets another name among `files`."""
    there, loads = files.pop(README, None), _auto_class(kind, files)
    base_card: Mapping[str, Any] = {}
    if there is not None and (text := there.read_text(encoding="utf-8", errors="replace")) != readme_of(loads):
        base_card = _metadata_of(there)
        if isinstance(tags := base_card.get("tags"), list) and TAG in tags:
            log.info(f"{there} is kept as the card, as its metadata has the tag {TAG}.")
            return text, True
        files[README_OF_BASE] = there
        log.info(
            f"{there} came with the base model, so it goes to {README_OF_BASE}, and a card is written. If it is about "
            f"this model, give it the tag {TAG} in its metadata."
        )
    source = manifest["source"]
    name = base_model or str(source["name"] if isinstance(source, Mapping) else source)
    base = name if base_model or _is_hub_id(name) else None
    if base is None:
        log.warning(f"The card names no base model on the hub, as {name!r} is a folder. Give its id with --base-model.")
    if not manifest.get("evaluation"):
        log.warning("The card has no perplexity: it was not measured, or an older mspc made this export.")
    heavy = sum(path.stat().st_size for file, path in files.items() if file.endswith(WEIGHTS))
    return card_of(Subject(kind, manifest, base, base_card, heavy, loads), repo), False


def _auto_class(kind: str, files: Mapping[str, Path]) -> str:
    """The class of transformers that loads a folder. Other formats hold language models alone."""
    config = files.get("config.json")
    return CLASS if config is None or kind not in WHOLE_MODELS else auto_class(load_config(config.parent)).__name__


def _metadata_of(card: Path) -> Mapping[str, Any]:
    """The YAML at the head of a card; nothing if it is damaged."""
    try:
        return metadata_load(card) or {}
    except Exception as error:  # of YAML, or no object
        log.info(f"{card}: its metadata cannot be read ({in_brief(error)}), so no licence is taken from it.")
        return {}


def _is_hub_id(name: str) -> bool:
    try:
        _check_id(name)
    except InputError:
        return False
    return not Path(name).exists()


def _warn_of_paths(manifest: Mapping[str, Any]) -> None:
    """Name paths of this machine in the manifest, which whoever reads the repository will see."""
    values = {**(manifest.get("settings") or {}), **(manifest.get("recipe") or {})}
    paths = {value for value in values.values() if isinstance(value, str) and value.startswith(("/", "~", "."))}
    if paths:
        log.warning(f"The manifest names paths of this machine, which readers will see: {', '.join(sorted(paths))}.")


def _upload(
    repo: str, files: Mapping[str, Path], card: str, private: bool, message: str, progress: Progress
) -> str:  # fmt: skip
    """The address of the commit. Raises InputError where the hub refuses, and StorageError where it fails."""
    api = HfApi()
    additions = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    additions.append(CommitOperationAdd(README, card.encode("utf-8")))
    sent = in_words(sum(path.stat().st_size for path in files.values()))
    try:
        with progress.stage(f"Uploading {len(additions)} files, {sent}", 1) as step:
            api.create_repo(repo, private=private or None, exist_ok=True)
            commit = api.create_commit(repo, additions, commit_message=message)
            there = set(api.list_repo_files(repo, revision=commit.oid))
            step()
    except LocalTokenNotFoundError as error:
        raise InputError("You are not logged in to the hub. Run `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except Exception as error:  # network, proxies, wrong answers, storage of large files
        if isinstance(error, MspcError) or is_out_of_memory(error):
            raise
        why = in_brief(error) + (f": {in_brief(error.__cause__)}" if error.__cause__ else "")
        raise StorageError(f"{repo}: the upload failed ({why}). Run the same command again.") from error
    names = {addition.path_in_repo for addition in additions}
    if missing := sorted(names - there):
        raise StorageError(
            f"{repo} lacks {missing[0]} after the upload. Look for it in its .gitignore, and push again."
        )
    if more := sorted(there - names - {".gitattributes"}):
        log.warning(f"{repo} also has other files, such as {more[0]}. Delete those that an older upload left.")
    return str(commit.commit_url)


def _refusal(repo: str, error: HfHubHTTPError) -> MspcError:
    """The error for an answer of the hub: wrong input if it refuses, else a failure of the hub."""
    status = error.response.status_code
    if status == 401:
        return InputError(f"{repo}: the hub does not know you ({status}). Run `hf auth login`, or set HF_TOKEN.")
    if status in (403, 404):
        return InputError(
            f"{repo}: you may not write there ({status}). Check its owner, and that your token may write."
        )
    kind = InputError if 400 <= status < 500 else StorageError
    return kind(f"{repo}: the hub refuses the upload ({in_brief(error)}). Correct what it names, and push again.")
