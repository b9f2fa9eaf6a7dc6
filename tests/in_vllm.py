"""Greedy tokens of vLLM on a CPU, and how far each is from the choice of `mspc.load` after the same tokens.

    python tests/in_vllm.py FOLDER OUT.json '{"dtype": "float32", ...}'     options of vllm.LLM

As a script it is a process of its own, for options that a process can have only once.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # more threads than idle cores make it wait for minutes
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
LENGTH, NEW_TOKENS = 128, 32
# Token ids that every model has; the bundled one reads words of Python's documentation in the texts.
TEXTS = (
    "The function returns", "import os\n\ndef", "Return a list of the", "class Widget(object):\n",
    "If the argument is", "for key in sorted(",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    prompt: list[int]
    ids: list[int]
    text: str


def answers(
    folder: Path,
    prompts: list[Any] | None = None,
    count: int = NEW_TOKENS,
    adapter: Path | None = None,
    then: Callable[[Any], None] | None = None,
    **options: Any,
) -> list[Answer]:
    """The answers to texts or lists of ids, asked all at once, in this process unless options ask for more of them.

    `adapter` is the folder of a LoRA adapter that answers. `then` gets the engine before it ends.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    given = {"dtype": "float32", "enforce_eager": True, "max_model_len": LENGTH, "enable_prefix_caching": False}
    engine = None
    try:
        engine = LLM(model=str(folder), **given | options)
        asked = [p if isinstance(p, str) else TokensPrompt(prompt_token_ids=p) for p in prompts or TEXTS]
        wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        found = engine.generate(asked, wanted, use_tqdm=False, lora_request=lora)
        if then is not None:
            then(engine)
        return [
            Answer(list(one.prompt_token_ids), list(one.outputs[0].token_ids), one.outputs[0].text) for one in found
        ]
    finally:
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


def gaps(
    folder: Path, found: list[Answer], dtype: str = "float32", change: Callable[[Any], None] | None = None
) -> list[float]:
    """For each token that is not the best by the model that mspc loads: the distance of its logit from the best.

    `change` changes that model before.
    """
    import torch

    import mspc

    model, distances = mspc.load(folder, "cpu", dtype), []
    if change is not None:
        change(model)
    for answer in found:
        ids = torch.tensor([answer.prompt + answer.ids[:-1]])
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0, len(answer.prompt) - 1 :].float()
        chosen = logits.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        distances += [float(gap) for gap in logits.amax(1) - chosen if gap > 0]
    return distances


if __name__ == "__main__":
    said = answers(Path(sys.argv[1]), **json.loads(sys.argv[3]))
    Path(sys.argv[2]).write_text(json.dumps([vars(answer) for answer in said]), encoding="utf-8")
