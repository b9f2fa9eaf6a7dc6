"""One model against a reference on token ids: perplexity, KL divergence and top-1 agreement, in float32.

    python benchmarks/real_evaluation.py JOB.json

JOB names `reference`, `model` (folders that transformers loads), `ids` (a file of `write_sequences`), `cache` (a file
for the last hidden states of the reference, made if need be), `size` (see real_sizes.py) and `out` (the JSON to write).
The same function judges every row of quality_real.py, whoever made it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_sizes import sizes
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mspc.numerics.intervals import mean_interval
from mspc.passes.perplexity import divergence, exponential
from mspc.storage.files import write_json, write_tensors

POSITIONS = 128
"""Positions whose logits are in memory at once."""


@dataclass(frozen=True)
class Scored:
    """Token ids (T,). Those from `first` on are scored, and each is predicted from all before it."""

    ids: Tensor
    first: int


def write_sequences(path: Path, texts: Mapping[str, Sequence[Scored]]) -> None:
    """Write texts as `TEXT.NUMBER.FIRST` -> ids (T,) int64."""
    write_tensors(
        path,
        {f"{name}.{n:04}.{one.first}": one.ids for name, sequences in texts.items() for n, one in enumerate(sequences)},
    )


def read_sequences(path: Path) -> dict[str, list[Scored]]:
    found: dict[str, list[Scored]] = {}
    for key, ids in sorted(load_file(path).items()):
        name, _, first = key.split(".")
        found.setdefault(name, []).append(Scored(ids, int(first)))
    return found


@dataclass
class Sums:
    """Sums over the scored tokens of one sequence: cross entropy and KL(reference || model) in nats, agreements."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreements: int = 0


class Predictor:
    """A causal language model in float32, as last hidden states (T, H) and the logits (T, V) that follow from them."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        if (
            getattr(self.model.config, "final_logit_softcapping", None)
            or getattr(self.model.config, "logit_scale", 1) != 1
        ):
            raise SystemExit(f"{folder}: its logits are more than its head. Teach real_evaluation.py this family.")

    def hidden(self, ids: Tensor) -> Tensor:
        return self.model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        head: nn.Module = self.model.get_output_embeddings()
        return head(hidden)


def add(sums: Sums, logits: Tensor, expected: Tensor, targets: Tensor) -> None:
    """Add predictions (N, V) of the tokens (N,) that came, and those of the reference (N, V)."""
    q, p = logits.log_softmax(-1), expected.log_softmax(-1)
    sums.tokens += len(targets)
    sums.loss -= float(q.gather(-1, targets[:, None]).sum(dtype=torch.float64))
    sums.divergence += divergence(p, q)
    sums.agreements += int((logits.argmax(-1) == expected.argmax(-1)).sum())


def compare(model: Predictor, reference: Predictor, sequence: Scored, expected: Tensor) -> Sums:
    """The sums of one sequence, with the last hidden states (T, H) of the reference."""
    sums = Sums()
    hidden = expected if model is reference else model.hidden(sequence.ids)
    for begin in range(sequence.first, len(sequence.ids), POSITIONS):
        end = min(begin + POSITIONS, len(sequence.ids))
        before = slice(begin - 1, end - 1)  # a token is predicted at the position before it
        wanted = reference.logits(expected[before])
        logits = wanted if model is reference else model.logits(hidden[before])
        add(sums, logits, wanted, sequence.ids[begin:end])
    return sums


def summary(sums: Sequence[Sums]) -> dict[str, Any]:
    """Means over all scored tokens, and the 95% t-interval of the divergence over the sequences (None for one).

    Sequences of different lengths have the interval of the ratio of two sums, by its first-order expansion.
    """
    tokens = sum(one.tokens for one in sums)
    mean = sum(one.divergence for one in sums) / tokens
    share = len(sums) / tokens
    interval = mean_interval([mean + share * (one.divergence - one.tokens * mean) for one in sums])
    return {
        "tokens": tokens,
        "perplexity": exponential(sum(one.loss for one in sums) / tokens),
        "divergence": mean,
        "divergence_interval": interval and [max(interval[0], 0.0), interval[1]],
        "top1_agreement": sum(one.agreements for one in sums) / tokens,
    }


def evaluate(model: Path, reference: Path, ids: Path, cache: Path) -> dict[str, dict[str, Any]]:
    """The summary of every text. The last hidden states of the reference are read from `cache`, or written there."""
    texts, expecting = read_sequences(ids), Predictor(reference)
    with torch.no_grad():
        if not cache.is_file():
            states = {
                f"{name}.{n}": expecting.hidden(one.ids) for name, own in texts.items() for n, one in enumerate(own)
            }
            write_tensors(cache, states)
        judged = expecting if model == reference else Predictor(model)
        found = {}
        with safe_open(cache, "pt") as states:
            for name, own in texts.items():
                sums = [compare(judged, expecting, one, states.get_tensor(f"{name}.{n}")) for n, one in enumerate(own)]
                found[name] = summary(sums)
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    paths = (Path(job[name]) for name in ("model", "reference", "ids", "cache"))
    found = sizes(job["size"], Path(job["model"]), Path(job["reference"]))
    write_json(Path(job["out"]), found | {"texts": evaluate(*paths)})


if __name__ == "__main__":
    main()
