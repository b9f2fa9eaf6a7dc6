"""The tokenizer in a GGUF file: vocabulary, special tokens and chat templates, as llama.cpp reads them.

What is written is the tokenizer that transformers loads from the folder. Byte-level BPE is known by its pre-tokenizer,
which readers have under a name. SentencePiece vocabularies are read by the score of each token: adjacent pieces whose
joint token scores highest are joined first. Ranks of merges are such scores.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from exporters.gguf_pieces import SPACE, is_byte, piece_scores, refused, space_prefix
from mspc.errors import InputError
from mspc.model.hub import load_tokenizer
from mspc.model.special_ids import DEFAULT, NO_END, chat_templates, special_ids
from mspc.text.reading import beginning

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2, DIGITS = "GPT-2's own cut", "single digits"
PRE = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",  # and StarCoder
    ((LLAMA3_SPLIT,), True): "llama-bpe",
    ((LLAMA3_SPLIT,), False): "dbrx",
    ((QWEN2_SPLIT,), False): "qwen2",
}
"""Names by the cuts before merging, and whether a piece that is a token is taken whole, past the merges."""
ENDS = ("eos", "eot", "eom")
"""The ids at which llama.cpp stops, in the order in which they are given."""
LAST_BYTE = ("ÿ", "<0xFF>")
"""A byte that UTF-8 never has, as byte-level BPE and SentencePiece write it."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as the file holds it."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    templates: dict[str, str]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a folder whose model has `size` embeddings. Raises InputError if readers have no name for it."""
    try:
        tokenizer = load_tokenizer(folder)
    except InputError as error:
        raise InputError(f"{error} gguf holds the tokenizer too, so it is needed.") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise refused(f"{type(tokenizer).__name__} is not of the tokenizers library")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise refused(f"it is {model['type']}")
    if not model["merges"]:
        raise refused("it has no merges, which readers need")
    for what in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(what):
            raise refused(f"it has a {what.replace('_', ' ')}")
    pieces = bool(model.get("byte_fallback"))
    pre = "default" if pieces else split_name(described)
    tokens, kinds = vocabulary(described, size)
    templates = chat_templates(folder, tokenizer)
    special, add_bos, add_eos, notes = _special(tokenizer, folder, tokens, kinds)
    if "bos" not in special and any("bos_token" in text for text in templates.values()):
        notes += _hide_bos(special, kinds)
    notes += _notes(described, pieces)
    parts: dict[str, Any] = {}
    if pieces:
        parts = {"scores": piece_scores(described, tokens, kinds), "space_prefix": space_prefix(described)}
    else:
        parts = {"merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]}
    return Vocabulary(
        "llama" if pieces else "gpt2", pre, tokens, kinds, special, add_bos, add_eos, templates, notes=notes, **parts
    )


def vocabulary(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the type of every id below `size`; ids that no token has are named as unused.

    Special tokens without an embedding, which no text holds, are left out.
    """
    model = described["model"]
    pieces = bool(model.get("byte_fallback"))
    added = {token["content"]: token for token in described["added_tokens"]}
    ids = model["vocab"] | {text: token["id"] for text, token in added.items()}
    tokens: list[str | None] = [None] * size
    kinds = [int(TokenType.UNUSED)] * size
    for text, i in ids.items():
        if i >= size:
            if text in added and added[text]["special"]:
                continue
            raise refused(f"its token {text!r} has the id {i}, and the model has {size} of them")
        tokens[i], kinds[i] = text, int(TokenType.NORMAL)
        if pieces and text == model.get("unk_token"):
            kinds[i] = int(TokenType.UNKNOWN)
        elif text in added and added[text]["special"]:
            kinds[i] = int(TokenType.CONTROL)
        elif text in added and not (pieces and SPACE in text and text in model["vocab"]):
            # Runs of spaces are made by merges: what is added is looked for in the text before its spaces are replaced.
            kinds[i] = int(TokenType.USER_DEFINED)
        elif pieces and is_byte(text):
            kinds[i] = int(TokenType.BYTE)
    return [f"[PAD{i}]" if text is None else text for i, text in enumerate(tokens)], kinds


def split_name(described: dict[str, Any]) -> str:
    """The name by which readers know how it cuts text before merging. Raises InputError if they have none."""
    normalizer = described.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        raise refused(f"it has a normalizer, {normalizer['type']}")
    *before, last = steps(described.get("pre_tokenizer"), "pretokenizers") or [{"type": "none"}]
    cuts = [_cut(step) for step in before]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        cuts += [GPT2] if last.get("use_regex", True) else []
        if name := PRE.get((tuple(cuts), bool(described["model"].get("ignore_merges")))):
            return name
    shown = [*cuts, *([last["type"]] if last["type"] != "ByteLevel" else ["bytes"])]
    raise refused(f"it cuts text in a way that readers have no name for ({', then '.join(shown)})")


def _cut(step: dict[str, Any]) -> str:
    """A cut in the words of `PRE`, or else its type and pattern."""
    if step["type"] == "Digits" and step["individual_digits"]:
        return DIGITS
    if step["type"] != "Split":
        return str(step["type"])
    pattern = step["pattern"].get("Regex") or repr(step["pattern"])
    if step["behavior"] != "Isolated" or step.get("invert"):
        return f"{step['behavior']} {pattern}"
    return DIGITS if pattern == r"\p{N}" else str(pattern)


def steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """One step, or those of a sequence."""
    if part is None:
        return []
    found: list[dict[str, Any]] = part[key] if part["type"] == "Sequence" else [part]
    return found


def _special(
    tokenizer: Any, folder: Path, tokens: Sequence[str], kinds: Sequence[int]
) -> tuple[dict[str, int], bool, bool, list[str]]:
    """Special ids by role, whether BOS and EOS are put around a text, and notes."""
    ids = special_ids(folder, len(tokens), tokenizer)
    before, after = around(tokenizer)
    bos = before[0] if before else _own(tokenizer, "bos", len(tokens), ids.bos)
    ends = list(ids.eos)
    first = after[0] if after else tokenizer.eos_token_id
    if first in ends:  # that which templates and texts end with
        ends.remove(first)
        ends.insert(0, first)
    if after and after[0] not in ends:
        raise refused(f"it puts {tokens[after[0]]!r} after a text, at which the model does not stop")
    special = {"bos": bos, "pad": ids.pad, "unk": ids.unk, **dict(zip(ENDS, ends, strict=False))}
    notes = []
    if len(ends) > len(ENDS):
        rest = ", ".join(repr(tokens[i]) for i in ends[len(ENDS) :])
        notes.append(f"The model stops at {len(ends)} tokens, and gguf names {len(ENDS)}: {rest} is not among them.")
    if not ends:
        special["eos"] = _unreachable(tokens, kinds)
        notes.append(NO_END.format("model.gguf"))
    return {role: i for role, i in special.items() if i is not None}, bool(before), bool(after), notes


def _own(tokenizer: Any, role: str, size: int, named: int | None) -> int | None:
    """The id that the tokenizer itself gives, which templates use, or else the one that is named."""
    own = getattr(tokenizer, f"{role}_token_id", None)
    return own if own is not None and own < size else named


def _unreachable(tokens: Sequence[str], kinds: Sequence[int]) -> int | None:
    """An id that no text has. llama.cpp takes a comma or the like as the end where none is named."""
    unused = [i for i, kind in enumerate(kinds) if kind == TokenType.UNUSED]
    unused += [i for i, text in enumerate(tokens) if text in LAST_BYTE]
    return next(iter(unused), None)


def _hide_bos(special: dict[str, int], kinds: Sequence[int]) -> list[str]:
    """Name an unused id as BOS, which llama.cpp writes as nothing. Without one it would write a comma or the like."""
    unused = next((i for i, kind in enumerate(kinds) if kind == TokenType.UNUSED), None)
    if unused is None:
        return [
            "The chat template writes a BOS token, but the model has none: llama.cpp writes some other token there."
        ]
    special["bos"] = unused
    return ["The chat template writes a BOS token, but the model has none: gguf names an unused id instead."]


def around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that it puts before and after a text. Raises InputError when that is more than one at a side."""
    start = beginning(tokenizer, "auto")
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    text = list(tokenizer("a", verbose=False, add_special_tokens=False)["input_ids"])
    before, after = start.wanted, tuple(whole[len(start.added) + len(text) :])
    if len(before) > 1 or len(after) > 1:
        raise refused(f"it puts {len(before)} tokens before and {len(after)} after a text, and one is accepted")
    return before, after


def _notes(described: dict[str, Any], pieces: bool) -> list[str]:
    """Sentences on texts that readers are known to cut otherwise."""
    found = []
    if described.get("normalizer") and not pieces:
        found.append("llama.cpp does not normalize: of texts that are not in NFC, the tokens may differ.")
    first = (steps(described.get("pre_tokenizer"), "pretokenizers") or [{"type": None}])[0]
    if pieces and first["type"] == "Metaspace" and first.get("prepend_scheme") != "never":
        found.append("llama.cpp puts a space before every text, also before one that begins with a space or a token.")
    strips = [token["content"] for token in described["added_tokens"] if token["lstrip"] or token["rstrip"]]
    if strips:
        found.append(f"llama.cpp keeps the spaces around {', '.join(strips[:5])}, which the tokenizer drops.")
    return found


def add_tokenizer(writer: GGUFWriter, found: Vocabulary) -> None:
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    if found.scores:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    else:
        writer.add_token_merges(found.merges)
    for role, i in found.special.items():
        getattr(writer, f"add_{role}_token_id")(i)
    writer.add_add_bos_token(found.add_bos)
    writer.add_add_eos_token(found.add_eos)
    if list(found.templates) == [DEFAULT]:
        writer.add_chat_template(found.templates[DEFAULT])
    elif found.templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in found.templates.items()])
