"""ONNX Runtime GenAI on the CPU, by the folder's genai_config.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from numpy.typing import NDArray

from exporters.runtimes import Runner
from exporters.runtimes.onnxruntime import tolerance_of


def load(folder: Path, record: dict[str, Any]) -> Runner:
    model = genai.Model(str(folder))

    def generator(rows: int, length: int) -> genai.Generator:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, do_sample=False, batch_size=rows)
        return genai.Generator(model, parameters)

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        running = generator(len(ids), ids.shape[1] + 1)
        running.append_tokens(ids.astype(np.int32))
        return np.array(running.get_output("logits")).astype(np.float32)

    def generate(prompt: Sequence[int], count: int) -> list[int]:
        running = generator(1, len(prompt) + count)
        running.append_tokens(np.array([list(prompt)], np.int32))
        for _ in range(count):
            running.generate_next_token()
        return [int(token) for token in running.get_sequence(0)[len(prompt) :]]

    return Runner(genai.__version__, tolerance_of(record), logits, generate)
