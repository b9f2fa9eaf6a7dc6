"""Text to tokens: calibration sequences, and windows of the test text for perplexity."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError, in_brief
from mspc.text import builtin as builtin_text
from mspc.text.builtin import Split
from mspc.text.files import SUFFIXES, documents_of
from mspc.text.reading import Beginning, Reading, beginning
from mspc.text.rows import TEXT, column_of, document_of, sound

HUB_TEXTS = {
    "c4": ("allenai/c4", "en", {"calibration": "train", "test": "validation"}),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", {"calibration": "train", "test": "test"}),
}
"""Name -> dataset id on the hub, configuration, and the dataset's split for each of ours."""
SELF = "self"
"""The source of calibration text that the model writes (`mspc.pipeline.own_text`)."""
MOST_HUB_DOCUMENTS = 20_000
"""Documents read from the start of a hub dataset, at most."""
AT_ONCE = 8
"""Number of documents that are tokenized together."""
AS_IT_IS = Reading()


@dataclass(frozen=True, slots=True)
class Tokens:
    """`ids` (N, T) int64, the source they came from, and the tokens that each sequence begins with."""

    ids: Tensor
    source: str
    begin: tuple[int, ...] = ()

    @property
    def note(self) -> str:
        """The beginning of the sequences in words; empty if they have none."""
        return f"Every window begins with BOS (token {', '.join(map(str, self.begin))})." if self.begin else ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()


def calibration_tokens(
    tokenizer: Any,
    source: str | Sequence[str],
    num_sequences: int,
    sequence_length: int,
    seed: int,
    reading: Reading = AS_IT_IS,
    spare: int = 0,
) -> Tokens:
    """`num_sequences` windows of `sequence_length` tokens from the calibration split of a source.

    Up to `spare` more follow if there is text for them; the first ones do not depend on that.

    Documents are visited in a random order that depends on the seed. Each visit takes one window at a random position,
    or all of a shorter document. When every document was visited, further rounds take windows that do not overlap the
    earlier ones. The pieces are concatenated and cut into sequences. So long documents give one window each, short ones
    are packed, and no text is used twice. Every document and every sequence begins with the BOS token, if there is
    one. Raises InputError when the source holds too little text.
    """
    documents = load_documents(source, "calibration", reading, tokenizer)
    begin = beginning(tokenizer, reading.bos)
    length = _text_per_window(begin, sequence_length)
    rng = random.Random(seed)
    order = rng.sample(range(len(documents)), len(documents))
    windows: list[list[list[int]]] = []  # for each visited document, the ones not used yet
    stream: list[int] = []
    most = num_sequences + spare

    def is_full() -> bool:
        if len(stream) < most * length:
            return False  # a quick answer, for most documents
        sequences = begin.cut(stream, sequence_length)
        return len(sequences) > most or sum(map(len, sequences)) == most * sequence_length

    for ids in _tokenized(tokenizer, (documents[i] for i in order)):
        pieces = _windows(begin.stripped(ids), length, rng, begin)
        stream += pieces.pop(0)
        windows.append(pieces)
        if is_full():
            break
    while not is_full() and any(windows):
        for pieces in windows:
            stream += pieces.pop(0) if pieces else []
    sequences = begin.cut(stream, sequence_length)[:most]
    wanted, found = num_sequences * sequence_length, sum(map(len, sequences[:num_sequences]))
    if found < wanted:
        raise InputError(
            f"Too little text in {name_of(source)!r}: it has {found:,} tokens, and {num_sequences} sequences of "
            f"{sequence_length} need {wanted:,}. Lower --num-sequences or --sequence-length, or give more text."
        )
    whole = [sequence for sequence in sequences if len(sequence) == sequence_length]
    return Tokens(torch.tensor(whole), name_of(source), begin.wanted)


def _text_per_window(begin: Beginning, sequence_length: int) -> int:
    """The number of tokens of text in a window."""
    if sequence_length <= len(begin.wanted):
        raise InputError(
            f"sequence_length is {sequence_length}, but every window begins with {len(begin.wanted)} tokens that are "
            "not text. Raise it."
        )
    return sequence_length - len(begin.wanted)


def tokens_of(tokenizer: Any, text: str | list[str], **options: bool) -> Any:
    """The ids of a text, or of several. Raises InputError for text that a tokenizer refuses, such as broken Unicode."""
    try:
        return tokenizer(text, verbose=False, **options)["input_ids"]
    except Exception as error:  # whatever the tokenizers of many projects raise
        raise InputError(f"The tokenizer refuses a text ({in_brief(error)}). Correct it, or the tokenizer.") from error


def _tokenized(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of each document. The tokenizer gets several documents at once, to work on all cores."""
    left = iter(documents)
    while texts := list(islice(left, AT_ONCE)):
        yield from tokens_of(tokenizer, texts)


def _windows(ids: list[int], length: int, rng: random.Random, begin: Beginning) -> list[list[int]]:
    """A document cut into pieces of at most `length`, shuffled; a whole window always comes first.

    The piece that the document begins with has the beginning before it.
    """
    start = rng.randrange(max(len(ids) - length, 0) + 1) % length
    pieces = [ids[i : i + length] for i in range(start, len(ids), length)]
    if pieces and not start:
        pieces[0] = begin.before(pieces[0])
    rng.shuffle(pieces)
    pieces.sort(key=lambda piece: len(piece) < length)
    return [*pieces, begin.before(ids[:start])] if start else pieces or [[]]


def windows_of_test_text(
    tokenizer: Any,
    source: str | Sequence[str],
    sequence_length: int,
    max_windows: int | None,
    reading: Reading = AS_IT_IS,
) -> Tokens:
    """The test split of a source as non-overlapping windows (N, T) of one stream; the rest is dropped.

    The documents are joined by blank lines and tokenized as one text. Every window begins with the BOS token, if there
    is one, and the rest of it is text.
    """
    text = "\n\n".join(load_documents(source, "test", reading, tokenizer))
    begin = beginning(tokenizer, reading.bos)
    _text_per_window(begin, sequence_length)
    most = None if max_windows is None else max_windows * sequence_length
    stream = _first_tokens(tokenizer, text, most, special=not begin.added)
    windows = [window for window in begin.cut(stream, sequence_length) if len(window) == sequence_length]
    if not windows:
        raise InputError(
            f"Too little text in {name_of(source)!r}: {len(begin.wanted) + len(stream):,} tokens do not fill one "
            f"window of {sequence_length}. Lower --sequence-length or give more text."
        )
    return Tokens(torch.tensor(windows[:max_windows]), name_of(source), begin.wanted)


def _first_tokens(tokenizer: Any, text: str, most: int | None, special: bool) -> list[int]:
    """The tokens of a text, or at least its first `most`, which are read from a prefix with about twice as many.

    Without `special`, those that the tokenizer puts around a text are left out.
    """
    options = {} if special else {"add_special_tokens": False}
    characters = len(text) if most is None else 16 * most
    while True:
        ids = list(tokens_of(tokenizer, text[:characters], **options))
        if characters >= len(text) or len(ids) >= 2 * int(most or 0):
            return ids
        characters *= 2


def load_documents(
    source: str | Sequence[str], split: Split, reading: Reading = AS_IT_IS, tokenizer: Any = None
) -> list[str]:
    """The documents of `builtin`, `c4`, `wikitext2`, a local file or folder, or a dataset on the hub; a list is one.

    The tokenizer is needed for chats, which its chat template writes out.
    """
    path = Path(source) if isinstance(source, str) else None
    if path is None or source == "builtin":
        reading.check_columns(False, name_of(source))
    if path is None or not path.exists():
        reading.check_encodings(False, name_of(source))
    if not isinstance(source, str):
        return _given(source)
    if source == "builtin":
        return builtin_text.documents(split)
    if not source:
        raise InputError("The name of the text is empty. Give builtin, a file or folder, or a dataset id.")
    if source == SELF:
        raise InputError(
            "The text self, which the model writes, is for --calibration of compress only. Give builtin, a file or "
            "folder (./self for one of that name), or a dataset id."
        )
    assert path is not None
    if path.exists():
        documents = documents_of(path, reading, tokenizer)
    elif source not in HUB_TEXTS and (path.suffix in SUFFIXES or source.startswith((".", "/", "~"))):
        raise InputError(f"Text {source!r} does not exist (looked for {path.absolute()}).")
    else:
        documents = _hub_documents(source, split, reading, tokenizer)
    if not documents:
        raise InputError(f"Text {source!r} is empty.")
    return documents


def _given(documents: Sequence[str]) -> list[str]:
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise InputError(f"Document {number} of the text is a {type(document).__name__}. Give strings.")
        sound(document, partial("Document {} of the text".format, number))
    if not any(document.strip() for document in documents):
        raise InputError("The list of documents holds no text.")
    return [document for document in documents if document.strip()]


def name_of(source: str | Sequence[str]) -> str:
    """The name of a source in messages and manifests."""
    return source if isinstance(source, str) else f"a list of {len(source)} documents"


def _hub_documents(source: str, split: Split, reading: Reading, tokenizer: Any) -> list[str]:
    nothing_here = f"Text {source!r} is not a file or folder here ({Path(source).absolute()})"
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{nothing_here}, and loading one from the hub needs the extra datasets of mspc "
            "(pip install '.[datasets]' in its folder)."
        ) from error
    name, configuration, splits = HUB_TEXTS.get(source, (source, None, {"calibration": "train", "test": "test"}))
    try:
        rows: Sequence[Any] = datasets.load_dataset(
            name, configuration, split=splits[split], streaming=True, trust_remote_code=False
        )
        texts = [
            _of_hub_row(row, n, name, reading, tokenizer) for n, row in enumerate(islice(rows, MOST_HUB_DOCUMENTS))
        ]
    except InputError:
        raise
    except Exception as error:  # whatever the hub client raises: offline, unknown id, gated, network
        raise InputError(
            f"{nothing_here} and could not be loaded from the hub as {name!r} ({error}). Check the name, or use "
            "builtin or a file, which need no network."
        ) from error
    # WikiText has a row per line, and all rows are one document.
    return ["\n\n".join(texts)] if source == "wikitext2" else texts


def _of_hub_row(row: Any, number: int, dataset: str, reading: Reading, tokenizer: Any) -> str:
    column = column_of(row, reading.column)
    if column is None:
        raise InputError(
            f"Dataset {dataset!r} has no `{reading.column or TEXT}` column, but {', '.join(map(str, row))}. Name one "
            "with --text-column."
        )
    where = partial("Dataset {!r}, row {}".format, dataset, number)
    return "" if row[column] is None else document_of(row[column], column, tokenizer, where)
