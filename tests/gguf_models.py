"""Random models of the families that a GGUF file can describe, with tokenizers trained here and cut as theirs are."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 640  # some more than the tokens of every tokenizer here
MERGED = 300
"""Tokens that training makes at most, without the alphabet."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
AWKWARD = (
    "Hello, world!  It's 2024:\n\n the the déjà vu 123456",
    "  two spaces,\tand a tab;\r\nwindows lines\n\n\n   \nend  ",
    "I'LL we'd THEY'RE don't O'Neill's 'twas",
    "3.14159 1,000,000 0x7fff 2e-5 1234567890 ١٢٣ ⅷ ²",
    "Grüße aus Köln: äöüß ÄÖÜ, naïve façade, Ελληνικά, русский, 日本語の文, 한국어",
    "🙂👍🏽 👩‍👩‍👧 → ∑x² ≠ ∞ …",
    "def f(x):\n    return {'a': [x, x**2], \"b\": x != 3}  # comment\n",
    "<|begin|>system<|end|>",
    "a",
    " a",
    "",
)
"""Texts in which tokenizers differ: digits, spaces, lines, apostrophes, other scripts, symbols, code, special ones."""


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


CUTS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: _split(_LLAMA3),
    "dbrx": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}
"""Pre-tokenizers as the families define them, by the names of llama.cpp. StarCoder's is that of SmolLM."""


def _texts() -> Iterator[str]:
    for text in AWKWARD[:-4]:
        yield from [text] * 4
    yield tiny.text(2000, seed=3)
    yield from ["the cat and the other thing then there is 12 123 1234 100 200"] * 9


def byte_level(name: str, special: Sequence[str] = ("<|begin|>", "<|end|>")) -> Tokenizer:
    """A byte-level BPE tokenizer that is cut as `name` says."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = CUTS[name]()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + MERGED, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_texts(), trainer)
    made.model.ignore_merges = name == "llama-bpe"
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    made.add_tokens(["<think>"])
    return made


def pieces(kind: str) -> Tokenizer:
    """A SentencePiece vocabulary as the tokenizers library has it: `gemma`, `metaspace` or `prepend`."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    trained.train_from_iterator(_texts(), trainers.BpeTrainer(vocab_size=MERGED, show_progress=False))
    learned = [text for text, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    first = ["<pad>", "<eos>", "<bos>", "<unk>"] if kind == "gemma" else ["<unk>", "<s>", "</s>"]
    texts = [*first, *(f"<0x{i:02X}>" for i in range(256)), *learned, "▁▁", "▁▁▁▁", "\n\n"]
    ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    joined = [text for text in ids if len(text) > 1 and text not in first and not text.startswith("<0x")]
    ranks = {text: i for i, text in enumerate(joined)}
    merges = [(text[:i], text[i:]) for text in joined for i in range(1, len(text))]
    merges = [pair for pair in merges if all(part in ids for part in pair)]
    merges.sort(key=lambda pair: ranks["".join(pair)])
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if kind == "gemma":
        made.normalizer = replace
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.add_special_tokens([AddedToken(text, normalized=False) for text in (*first, "<|begin|>", "<|end|>")])
    if kind == "gemma":
        made.add_tokens([AddedToken(text, normalized=False) for text in ("▁▁", "▁▁▁▁", "\n\n")])
    bos = "<bos>" if kind == "gemma" else "<s>"
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
    )
    return made


def fast(made: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


ENDS = {"eos_token": "<|end|>"}
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    **{name: lambda name=name: fast(byte_level(name), **ENDS) for name in CUTS},
    "gemma": lambda: fast(pieces("gemma"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"),
    "metaspace": lambda: fast(pieces("metaspace"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    "prepend": lambda: fast(pieces("prepend"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
}

_NAMES = {"linear": {}, "yarn": {"original_max_position_embeddings": 32}}
_LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def rope(kind: str, **more: object) -> dict[str, object]:
    found = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0}
    return {"rope_parameters": found | (_LLAMA31 if kind == "llama3" else _NAMES[kind]) | more}


_GEMMA3 = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
_GEMMA3 |= {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
MODELS: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("llama", "smollm", {}),
    "llama-3.1": ("llama", "llama-bpe", rope("llama3")),
    "llama-linear": ("llama", "metaspace", rope("linear")),
    "llama-yarn": ("llama", "gpt-2", rope("yarn")),
    "mistral": ("mistral", "metaspace", {"sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2-tied": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", "qwen2", rope("yarn")),
    "qwen3": ("qwen3", "qwen2", {}),
    "gemma2": ("gemma2", "gemma", {}),
    "gemma3": ("gemma3_text", "gemma", {}),
    "gemma3-linear": ("gemma3_text", "gemma", {"rope_parameters": _GEMMA3}),
    "phi3": ("phi3", "prepend", {}),
    "phi3-window": ("phi3", "prepend", {"sliding_window": 64}),
    "phi3-partial": ("phi3", "dbrx", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
}
"""Family, tokenizer and changes of the config."""


def build(name: str, folder: Path) -> Path:
    """The checkpoint folder of one of `MODELS`."""
    family, tokenizer, changes = MODELS[name]
    if family == "phi3":
        changes = {"original_max_position_embeddings": 128} | changes
    made = TOKENIZERS[tokenizer]()
    ids = {f"{role}_token_id": getattr(made, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    tiny.build(folder, family, hidden_size=64, vocab_size=VOCABULARY, **ids, **changes)
    made.save_pretrained(folder)
    return folder
