"""The process of `exporters.runtimes.vllm`: FOLDER ANSWERS DTYPE LOAD_FORMAT. Requests are lines, `[ids, count]`.

Each is answered by the path of a file with the logits (T, V) float32 and the tokens that follow.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 4096
"""Tokens; the reference has at most 2048."""


def main(folder: str, answers: str, dtype: str, load_format: str) -> None:
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to stdout too
    from vllm import LLM, SamplingParams, TokensPrompt

    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    length = min(config.get("max_position_embeddings") or config.get("n_positions") or LONGEST, LONGEST)
    engine = LLM(
        model=folder, dtype=dtype, load_format=load_format, enforce_eager=True, max_model_len=length,
        max_num_batched_tokens=max(length, LONGEST), enable_prefix_caching=False, disable_log_stats=True,
        trust_remote_code=False,
    )  # fmt: skip
    seen: list[Any] = []

    def watch(model: Any) -> None:
        model.logits_processor.register_forward_hook(
            lambda _, inputs, logits: seen.append(logits.float().cpu().numpy())
        )

    engine.apply_model(watch)
    for number, line in enumerate(sys.stdin):
        ids, count = json.loads(line)
        seen.clear()
        # Asked for logarithms of the prompt it computes all logits: first those of the last position.
        wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, prompt_logprobs=1)
        (found,) = engine.generate([TokensPrompt(prompt_token_ids=ids)], wanted, use_tqdm=False)
        logits = np.concatenate([seen[1], seen[0]]) if len(ids) > 1 else seen[0]
        path = Path(answers, f"{number}.npz")
        np.savez(path, logits=logits, tokens=np.array(found.outputs[0].token_ids))
        print(path, file=answer_to, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
