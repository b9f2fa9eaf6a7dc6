"""Text to tokens: calibration sequences, and windows of the test text for perplexity."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError, in_brief
from mspc.text import builtin as builtin_text
from mspc.text.builtin import Split

HUB_TEXTS = {
    "c4": ("allenai/c4", "en", {"calibration": "train", "test": "validation"}),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", {"calibration": "train", "test": "test"}),
}
"""Name -> dataset id on the hub, configuration, and the dataset's split for each of ours."""
MOST_HUB_DOCUMENTS = 20_000
"""Documents read from the start of a hub dataset, at most."""
AT_ONCE = 8
"""Number of documents that are tokenized together."""
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Tokens:
    """`ids` (N, T) int64 and the source they came from."""

    ids: Tensor
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()


def calibration_tokens(
    tokenizer: Any, source: str | Sequence[str], num_sequences: int, sequence_length: int, seed: int
) -> Tokens:
    """`num_sequences` windows of `sequence_length` tokens from the calibration split of a source.

    Documents are visited in a random order that depends on the seed. Each visit takes one window at a random position,
    or all of a shorter document. When every document was visited, further rounds take windows that do not overlap the
    earlier ones. The pieces are concatenated and cut into sequences. So long documents give one window each, short ones
    are packed, and no text is used twice. Raises InputError when the source holds too little text.
    """
    documents = load_documents(source, "calibration")
    rng = random.Random(seed)
    order = rng.sample(range(len(documents)), len(documents))
    wanted = num_sequences * sequence_length
    windows: list[list[list[int]]] = []  # for each visited document, the ones not used yet
    stream: list[int] = []
    for ids in _tokenized(tokenizer, (documents[i] for i in order)):
        pieces = _windows(ids, sequence_length, rng)
        stream += pieces.pop(0)
        windows.append(pieces)
        if len(stream) >= wanted:
            break
    while len(stream) < wanted and any(windows):
        for pieces in windows:
            stream += pieces.pop(0) if pieces else []
    if len(stream) < wanted:
        raise InputError(
            f"Too little text in {name_of(source)!r}: it has {len(stream):,} tokens, and {num_sequences} sequences of "
            f"{sequence_length} need {wanted:,}. Lower --num-sequences or --sequence-length, or give more text."
        )
    return Tokens(torch.tensor(stream[:wanted]).view(num_sequences, sequence_length), name_of(source))


def tokens_of(tokenizer: Any, text: str | list[str]) -> Any:
    """The ids of a text, or of several. Raises InputError for text that a tokenizer refuses, such as broken Unicode."""
    try:
        return tokenizer(text, verbose=False)["input_ids"]
    except Exception as error:  # whatever the tokenizers of many projects raise
        raise InputError(f"The tokenizer refuses a text ({in_brief(error)}). Correct it, or the tokenizer.") from error


def _tokenized(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of each document. The tokenizer gets several documents at once, to work on all cores."""
    left = iter(documents)
    while texts := list(islice(left, AT_ONCE)):
        yield from tokens_of(tokenizer, texts)


def _windows(ids: list[int], length: int, rng: random.Random) -> list[list[int]]:
    """A document cut into pieces of at most `length`, shuffled; a whole window always comes first."""
    start = rng.randrange(max(len(ids) - length, 0) + 1) % length
    pieces = [ids[i : i + length] for i in range(start, len(ids), length)]
    rng.shuffle(pieces)
    pieces.sort(key=lambda piece: len(piece) < length)
    return [*pieces, ids[:start]] if start else pieces or [[]]


def windows_of_test_text(
    tokenizer: Any, source: str | Sequence[str], sequence_length: int, max_windows: int | None
) -> Tokens:
    """The test split of a source as non-overlapping windows (N, T) of one stream; the rest is dropped.

    The documents are joined by blank lines and tokenized as one text, so a BOS can be at the very start only.
    """
    text = "\n\n".join(load_documents(source, "test"))
    most = None if max_windows is None else max_windows * sequence_length
    ids = torch.tensor(_first_tokens(tokenizer, text, most))
    windows = min(len(ids) // sequence_length, max_windows or len(ids))
    if windows < 1:
        raise InputError(
            f"Too little text in {name_of(source)!r}: {len(ids):,} tokens do not fill one window of {sequence_length}. "
            "Lower --sequence-length or give more text."
        )
    return Tokens(ids[: windows * sequence_length].view(windows, sequence_length), name_of(source))


def _first_tokens(tokenizer: Any, text: str, most: int | None) -> list[int]:
    """The tokens of a text, or at least its first `most`, which are read from a prefix with about twice as many."""
    if most is None:
        return list(tokens_of(tokenizer, text))
    characters = 16 * most
    while True:
        ids = list(tokens_of(tokenizer, text[:characters]))
        if characters >= len(text) or len(ids) >= 2 * most:
            return ids
        characters *= 2


def load_documents(source: str | Sequence[str], split: Split) -> list[str]:
    """The documents of `builtin`, `c4`, `wikitext2`, a local file or folder, or a dataset on the hub; a list is one."""
    if not isinstance(source, str):
        return _given(source)
    if source == "builtin":
        return builtin_text.documents(split)
    path = Path(source)
    if not source:
        raise InputError("The name of the text is empty. Give builtin, a file or folder, or a dataset id.")
    if path.exists():
        documents = [text for file in _text_files(path) for text in _read_file(file) if text.strip()]
    elif source in HUB_TEXTS:
        documents = _hub_documents(source, split)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise InputError(f"Text {source!r} does not exist (looked for {path.absolute()}).")
    else:
        documents = _hub_documents(source, split)
    if not documents:
        raise InputError(f"Text {source!r} is empty.")
    return documents


def _given(documents: Sequence[str]) -> list[str]:
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise InputError(f"Document {number} of the text is a {type(document).__name__}. Give strings.")
    if not any(document.strip() for document in documents):
        raise InputError("The list of documents holds no text.")
    return [document for document in documents if document.strip()]


def name_of(source: str | Sequence[str]) -> str:
    """The name of a source in messages and manifests."""
    return source if isinstance(source, str) else f"a list of {len(source)} documents"


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        files = [path]
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise InputError(f"Folder {path} holds no text: give {', '.join(SUFFIXES)} files.")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise InputError(f"{file}: text must be one of {', '.join(SUFFIXES)}.")
    return files


def _read_file(path: Path) -> list[str]:
    try:
        match path.suffix:
            case ".txt":
                return [path.read_text(encoding="utf-8")]
            case ".jsonl":
                return list(_read_jsonl(path))
            case _:
                return _read_parquet(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: expected a JSON object with a `text` field.") from error
            if not isinstance(text, str):
                raise InputError(f"{path}, line {number}: the `text` field is not a string.")
            yield text


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"Reading {path} needs pyarrow: pip install 'mspc[parquet]'.") from error
    try:
        column = pyarrow.parquet.read_table(path, columns=["text"])["text"].drop_null()
        return list(column.cast(pyarrow.string()).to_pylist())
    except (pyarrow.ArrowException, KeyError) as error:
        raise InputError(f"{path} cannot be read as parquet with a `text` column: {error}.") from error


def _hub_documents(source: str, split: Split) -> list[str]:
    nothing_here = f"Text {source!r} is not a file or folder here ({Path(source).absolute()})"
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{nothing_here}, and to load one from the hub needs: pip install 'mspc[datasets]'."
        ) from error
    name, configuration, splits = HUB_TEXTS.get(source, (source, None, {"calibration": "train", "test": "test"}))
    try:
        rows: Sequence[Any] = datasets.load_dataset(name, configuration, split=splits[split], streaming=True)
        texts = [row["text"] for row, _ in zip(rows, range(MOST_HUB_DOCUMENTS), strict=False)]
    except KeyError as error:
        raise InputError(f"Dataset {name!r} has no `text` column.") from error
    except Exception as error:  # whatever the hub client raises: offline, unknown id, gated, network
        raise InputError(
            f"{nothing_here} and could not be loaded from the hub as {name!r} ({error}). Check the name, or use "
            "builtin or a file, which need no network."
        ) from error
    # WikiText has a row per line, and all rows are one document.
    return ["\n\n".join(texts)] if source == "wikitext2" else texts
