"""Calibration text that the model writes itself, for `--calibration self`."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mspc.errors import InputError
from mspc.memory import free_memory
from mspc.model.config_checks import setting_of
from mspc.model.open import choose_dtype, open_model, open_source
from mspc.model.special_ids import special_ids
from mspc.model.streamed import StreamedModel
from mspc.passes.sampling import Writer
from mspc.progress import Progress, log
from mspc.settings import Settings
from mspc.sizes import in_words
from mspc.storage.files import write_tensors
from mspc.text.reading import Beginning, Reading, beginning
from mspc.text.scripts import Script, chat_script, document_script
from mspc.text.tokens import SELF, Tokens
from mspc.threads import fitting, run_all

ROWS = 32
"""Sequences that are written at once, a piece of work."""
CHUNK = 32
"""Tokens of a sequence that are a step of progress."""
LOGITS = 5
"""Copies of the logits of the next token at once: themselves, without what is not allowed, shares, and their sums."""
PARTS = ("calibration", "validation", "test")


@dataclass(frozen=True)
class Author:
    """A model in a folder that writes its own text."""

    source: Path
    device: torch.device
    settings: Settings
    tokenizer: Any
    identity: list[Any]
    """Hashes of the checkpoint."""
    folder: Path
    """Folder that keeps what was written."""
    progress: Progress

    def write(self, counts: Sequence[int]) -> Tokens:
        """Sequences (N, T) for calibration, validation and test, one after the other; `counts` has their numbers.

        Those of one part do not depend on the other numbers. In each part every second sequence is a chat, where the
        tokenizer has a template. Raises InputError for a model that does not fit in memory, and for other options that
        have no effect on this text.
        """
        settings = self.settings
        reading = Reading(settings.bos, settings.text_column, settings.text_encoding)
        reading.check_columns(False, SELF)
        reading.check_encodings(False, SELF)
        if settings.bos == "no":
            raise InputError("bos no has no effect with calibration self, which begins with a token. Leave it out.")
        dtype = self._dtype()
        # Fused attention of one token at a time takes several times as long on a CPU in half precision.
        eager = self.device.type == "cpu" and dtype != "float32"
        model = open_model(self.source, device=self.device, dtype=dtype, eager=eager)
        begin = beginning(self.tokenizer, settings.bos)
        scripts = self._scripts(begin, model.config.get_text_config().vocab_size)
        files = {part: self._file(part, count, scripts) for part, count in zip(PARTS, counts, strict=True) if count}
        missing = [part for part, file in files.items() if not file.is_file()]
        if missing:
            self._check_memory(model)
            self._write({part: (files[part], counts[PARTS.index(part)]) for part in missing}, model, scripts)
        else:
            log.info(f"Calibration text: taken from {self.folder}.")
        return Tokens(torch.cat([_read(file) for file in files.values()]), SELF, begin.wanted)

    def _dtype(self) -> str:
        """The dtype that was asked for, else that of the checkpoint: writing reads all weights for a few tokens."""
        asked = self.settings.dtype
        stored = choose_dtype("auto", open_source(self.source), torch.device("meta"))
        return str(stored).removeprefix("torch.") if asked == "auto" else asked

    def _scripts(self, begin: Beginning, size: int) -> tuple[Script, ...]:
        """The scripts that the sequences follow in turn."""
        special = special_ids(self.source, size, self.tokenizer)
        document = document_script(self.tokenizer, begin, special.bos, special.eos)
        chat = chat_script(self.tokenizer, begin, special.eos)
        if chat and 2 * sum(map(len, chat.parts)) > int(self.settings.sequence_length or 0):
            log.info("calibration self: the chat template fills half of a sequence, so the model writes no chats.")
            return (document,)
        return (document, chat) if chat else (document,)

    def _file(self, part: str, count: int, scripts: Sequence[Script]) -> Path:
        """The file for the sequences of a part; the name has the hash of everything that they depend on."""
        key = {
            "source": self.identity,
            "scripts": [[script.parts, sorted(script.ends)] for script in scripts],
            "part": [part, count, self.settings.sequence_length, self.settings.seed, ROWS],
            "computed": [self.device.type, self._dtype(), torch.__version__, version("transformers")],
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"text-{digest}.safetensors"

    def _check_memory(self, model: StreamedModel) -> None:
        weights = sum(math.prod(shape) for _, shape in model.source.types().values()) * model.dtype.itemsize
        need, free = weights + self._bytes_each(model), free_memory(self.device)
        if need > free:
            raise InputError(
                f"{self.source}: calibration self needs the whole model and {ROWS} sequences in memory, "
                f"{in_words(need)} on {self.device}, and {in_words(free)} are free. Free some, give shorter sequences "
                "(--sequence-length), or another --calibration text, such as builtin."
            )

    def _bytes_each(self, model: StreamedModel) -> int:
        """Bytes of the keys, values and logits of the sequences that are written at once, estimated."""
        config = model.config
        heads = int(setting_of(config, "num_attention_heads") or 1)
        width = int(setting_of(config, "head_dim") or config.get_text_config().hidden_size // heads)
        of_token = 2 * len(model.blocks) * int(setting_of(config, "num_key_value_heads") or heads) * width
        logits = config.get_text_config().vocab_size * LOGITS * torch.float32.itemsize
        return ROWS * (of_token * int(self.settings.sequence_length or 0) * model.dtype.itemsize + logits)

    def _write(self, parts: Mapping[str, tuple[Path, int]], model: StreamedModel, scripts: Sequence[Script]) -> None:
        """Write the sequences of each part, given by its file and their number, to the file."""
        size, length = model.config.get_text_config().vocab_size, int(self.settings.sequence_length or 0)
        allowed = torch.zeros(size, dtype=torch.bool)
        allowed[[token for token in set(self.tokenizer.get_vocab().values()) if token < size]] = True
        steps = -(-length // CHUNK)
        pieces = sum(-(-count // ROWS) for _, count in parts.values())
        with model.whole() as whole, self.progress.stage("Writing calibration text", pieces * steps) as step:
            for part, (file, count) in parts.items():
                texts = [
                    Writer(
                        whole, [scripts[row % len(scripts)] for row in range(at, min(at + ROWS, count))], length,
                        _seed(self.settings.seed, part, at), allowed.to(self.device),
                    )
                    for at in range(0, count, ROWS)
                ]  # fmt: skip
                at_once = fitting(self._bytes_each(model))
                for group in (texts[at : at + at_once] for at in range(0, len(texts), at_once)):
                    for _ in range(steps):
                        run_all(lambda text: text.advance(CHUNK), group)
                        for _ in group:
                            step()
                    for text in group:
                        text.cache = None
                write_tensors(file, {"ids": torch.cat([text.ids for text in texts])})


def _seed(*parts: object) -> int:
    """A seed for each piece of work."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def _read(file: Path) -> Tensor:
    try:
        return load_file(file)["ids"]
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as text ({error!r}). Delete it to write it again.") from error
