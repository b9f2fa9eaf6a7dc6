"""A client of llama.cpp's server, which gives tokens, templates, logits and times.

    with running(Path("model.gguf"), context=256) as model:
        ids = model.tokenize("Once upon a time")
        print(model.log_probabilities(ids, vocabulary=4096), model.generate(ids, 16))

The package is xllamacpp: a wheel without dependencies that holds llama.cpp and its server.
"""

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SERVER = Path(__file__).with_name("llamacpp_server.py")
BIAS = 1e9
"""Added to a logit, it makes sampling take that token."""


class LlamaCppError(Exception):
    """A file that does not load, or a request that fails; the message is llama.cpp's own."""


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy: the server is on this machine."""


@dataclass(frozen=True)
class LlamaCpp:
    """A loaded file. Every method is one or more requests to the server; nothing is kept between two of them."""

    address: str

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with DIRECT.open(request) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise LlamaCppError(error.read().decode(errors="replace")) from error
        except (OSError, HTTPException) as error:
            raise LlamaCppError(f"The server has ended ({error!r}).") from error
        return found

    def _complete(self, ids: Sequence[int], count: int, **options: object) -> dict[str, Any]:
        """Greedy, of the whole prompt anew."""
        prompt = [int(i) for i in ids]
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        return self._ask("/completion", body | options)

    def tokenize(self, text: str, *, added: bool = True) -> list[int]:
        """Ids of a text; names of special tokens are these tokens. `added` are those that the file says are added."""
        found = self._ask("/tokenize", {"content": text, "add_special": added, "parse_special": True})
        return list(found["tokens"])

    def template(self) -> str:
        """The chat template of the file, or llama.cpp's own if it has no template."""
        return str(self._ask("/props")["chat_template"])

    def render(self, messages: list[dict[str, str]]) -> str:
        """A chat as the prompt of an answer. A leading BOS token is left out, since `tokenize` adds it."""
        return str(self._ask("/apply-template", {"messages": messages})["prompt"])

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> NDArray[np.float32]:
        """(V,) float32 for the token after `ids`: the logits up to a constant, before any sampler.

        Probabilities that are 0 in float32 are -inf.
        """
        # Of a token that ends the text, or is half a character, it gives none: sampling gets another one.
        letter = [[self.tokenize("a", added=False)[-1], BIAS]]
        answer = self._complete(ids, 1, n_probs=vocabulary, logit_bias=letter)["completion_probabilities"][0]
        found = np.full(vocabulary, np.nan, np.float32)
        for token in answer["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        found[found <= np.finfo(np.float32).min] = -np.inf  # its way to write this in JSON
        return found

    def generate(self, ids: Sequence[int], count: int) -> tuple[list[int], bool]:
        """The greedy continuation, at most `count` tokens, and whether the last one ends the text."""
        answer = self._complete(ids, count)
        return list(answer["tokens"]), answer["stop_type"] == "eos"

    def timings(self, ids: Sequence[int], count: int, *, known: bool = True) -> dict[str, Any]:
        """Milliseconds of `count` tokens after `ids`, as the server reports them; a prompt that it knows is kept."""
        return dict(self._complete(ids, count, cache_prompt=known, ignore_eos=True)["timings"])

    def stops_at(self, token: int, ids: Sequence[int]) -> bool:
        """True if generation ends when this token is chosen."""
        answer = self._complete(ids, 2, logit_bias=[[token, BIAS]])
        return bool(answer["stop_type"] == "eos" and answer["tokens_predicted"] == 1)


@contextmanager
def running(file: Path, context: int, threads: int = 1, variables: dict[str, str] | None = None) -> Iterator[LlamaCpp]:
    """llama.cpp with this file, in a process of its own. `context` counts tokens. Raises LlamaCppError.

    `variables` are added to its environment variables.
    """
    command = [sys.executable, str(SERVER), str(file), str(context), str(threads)]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=os.environ | (variables or {})
        )
        assert process.stdin
        assert process.stdout
        try:
            address = process.stdout.readline().strip()
            if not address:
                process.wait()
                log.seek(0)
                raise LlamaCppError(f"{file.name} does not load: {log.read()[-1000:]}")
            yield LlamaCpp(address)
        finally:
            process.stdin.close()
            process.wait()
            process.stdout.close()
