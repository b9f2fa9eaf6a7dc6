"""Calibration text that the model writes itself, for `--calibration self`."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

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
"""Sequences that are written together, at most: a piece of work, which has a file of its own."""
CHUNK = 32
"""Tokens of a sequence that are a step of progress."""
LOGITS = 5
"""Copies of the logits of the next token at once: themselves, without what is not allowed, shares, and their sums."""
PARTS = ("calibration", "validation", "test")


class Piece(NamedTuple):
    """Sequences of a part that are written together: the place of the first, and their number."""

    part: str
    at: int
    rows: int

    def scripts(self, scripts: Sequence[Script]) -> list[Script]:
        """The script of each sequence."""
        return [scripts[row % len(scripts)] for row in range(self.at, self.at + self.rows)]

    def seed(self, seed: int) -> int:
        """A seed of its own, by that of the run."""
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.part}/{self.at}".encode()).digest()[:7])


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
        pieces = [
            Piece(part, at, min(ROWS, count - at))
            for part, count in zip(PARTS, counts, strict=True)
            for at in range(0, count, ROWS)
        ]
        files = {piece: self._file(piece, scripts) for piece in pieces}
        missing = {piece: file for piece, file in files.items() if not file.is_file()}
        if missing:
            self._check_memory(model)
            self._write(missing, model, scripts)
        else:
            log.info(f"Calibration text: taken from {self.folder}.")
        return Tokens(torch.cat([_read(file) for file in files.values()]), SELF, begin.wanted)

    @property
    def _length(self) -> int:
        return int(self.settings.sequence_length or 0)

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
        if chat and 2 * sum(map(len, chat.parts)) > self._length:
            log.info("calibration self: the chat template fills half of a sequence, so the model writes no chats.")
            return (document,)
        return (document, chat) if chat else (document,)

    def _file(self, piece: Piece, scripts: Sequence[Script]) -> Path:
        """The file for a piece; the name has the hash of everything that its tokens depend on."""
        key = {
            "source": self.identity,
            "scripts": [[script.parts, sorted(script.ends)] for script in scripts],
            "piece": [*piece, self.settings.sequence_length, self.settings.seed],
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
        return ROWS * (of_token * self._length * model.dtype.itemsize + logits)

    def _write(self, files: Mapping[Piece, Path], model: StreamedModel, scripts: Sequence[Script]) -> None:
        """Write the sequences of each piece to its file."""
        length, steps = self._length, -(-self._length // CHUNK)
        allowed = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
        allowed[[token for token in set(self.tokenizer.get_vocab().values()) if token < len(allowed)]] = True
        allowed, pieces, at_once = allowed.to(self.device), list(files), fitting(self._bytes_each(model))
        with model.whole() as whole, self.progress.stage("Writing calibration text", len(pieces) * steps) as step:
            for group in (pieces[at : at + at_once] for at in range(0, len(pieces), at_once)):
                writers = [
                    Writer(whole, piece.scripts(scripts), length, piece.seed(self.settings.seed), allowed)
                    for piece in group
                ]
                for _ in range(steps):
                    run_all(lambda writer: writer.advance(CHUNK), writers)
                    for _ in group:
                        step()
                for piece, writer in zip(group, writers, strict=True):
                    write_tensors(files[piece], {"ids": writer.ids})


def _read(file: Path) -> Tensor:
    try:
        return load_file(file)["ids"]
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as text ({error!r}). Delete it to write it again.") from error
