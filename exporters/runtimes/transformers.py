"""transformers on the CPU, in float32 where the format allows it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GenerationConfig

from exporters.runtimes import FLOAT32, Runner


def load(folder: Path, record: dict[str, Any]) -> Runner:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return runner_of(model, transformers.__version__, FLOAT32)


def runner_of(model: Any, version: str, tolerance: float) -> Runner:
    """Any model with the interface of transformers."""

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = model(input_ids=torch.from_numpy(ids)).logits.float().numpy()
        return found

    def generate(prompt: Sequence[int], count: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        # The model's own would stop at its end-of-text token.
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        return list(found[0, len(prompt) :].tolist())

    return Runner(version, tolerance, logits, generate)
