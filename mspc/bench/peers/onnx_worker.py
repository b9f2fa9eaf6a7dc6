"""An ONNX model in ONNX Runtime GenAI or OpenVINO, in a process of its own. It imports nothing of mspc.

    python onnx_worker.py onnxruntime|openvino FOLDER THREADS

Writes a line with its version when the model is loaded. Then each line of standard input asks for a time: `decode
CONTEXT COUNT` for the seconds of each of COUNT tokens after CONTEXT others, `prefill TOKENS` for those of a prompt and
the token after it. Batch 1; a token is the likeliest one.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

Decode = Callable[[int, int], float]
Prefill = Callable[[int], float]


def prompt_of(tokens: int) -> Any:
    return 2 + np.arange(tokens)[None] % 50  # not 0 and 1, which may end a text


def likeliest(logits: Any) -> Any:
    """(1, T, V) -> the token after the last one, (1, 1)."""
    return logits[:, -1:].argmax(-1)


def of_onnxruntime(folder: Path, threads: int) -> tuple[str, Decode, Prefill]:
    """GenAI, which goes back to the end of the prompt after each measurement."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)
    known: dict[tuple[int, int], Any] = {}

    def generator(tokens: int, more: int) -> Any:
        parameters = genai.GeneratorParams(model)
        length = tokens + more
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return genai.Generator(model, parameters)

    def prefill(tokens: int) -> float:
        running = generator(tokens, 2)
        begin = time.perf_counter()
        running.append_tokens(prompt_of(tokens).astype(np.int32))
        running.generate_next_token()
        return time.perf_counter() - begin

    def decode(context: int, count: int) -> float:
        if (context, count) not in known:
            known.clear()
            known[context, count] = generator(context, count + 2)
            known[context, count].append_tokens(prompt_of(context).astype(np.int32))
        running = known[context, count]
        running.rewind_to(context - 1)
        running.append_tokens(prompt_of(context)[:, -1:].astype(np.int32))
        running.generate_next_token()  # out of the prompt
        begin = time.perf_counter()
        for _ in range(count):
            running.generate_next_token()
        return (time.perf_counter() - begin) / count

    return genai.__version__, decode, prefill


def of_openvino(folder: Path, threads: int) -> tuple[str, Decode, Prefill]:
    """OpenVINO as it is by default, with inputs rounded to 8 bits; keys and values are a state of the request."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    core = openvino.Core()
    model = core.read_model(folder / "model.onnx")
    model.reshape({one.any_name: openvino.PartialShape([1, *list(one.partial_shape)[1:]]) for one in model.inputs})
    pasts = [one.any_name for one in model.inputs if one.any_name.startswith("past_key_values.")]
    apply_make_stateful_transformation(model, {name: name.replace("past_key_values", "present") for name in pasts})
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    names = {one.any_name for one in request.model_inputs}
    known: dict[int, dict[str, Any]] = {}

    def step(ids: Any, length: int) -> Any:
        places = np.arange(length - ids.shape[1], length)[None]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), "position_ids": places}
        found = request.infer({name: feeds[name] for name in feeds if name in names}, share_outputs=True)
        return likeliest(found["logits"])

    def prefill(tokens: int) -> float:
        request.reset_state()
        begin = time.perf_counter()
        step(prompt_of(tokens), tokens)
        return time.perf_counter() - begin

    def decode(context: int, count: int) -> float:
        if context not in known:
            known.clear()
            prefill(context)
            known[context] = {state.name: np.array(state.state.data) for state in request.query_state()}
        for state in request.query_state():
            state.state = openvino.Tensor(known[context][state.name])
        ids = np.array([[2]])
        begin = time.perf_counter()
        for number in range(count):
            ids = step(ids, context + number + 1)
        return (time.perf_counter() - begin) / count

    return openvino.__version__.split("-")[0], decode, prefill


ENGINES = {"onnxruntime": of_onnxruntime, "openvino": of_openvino}


def answer(out: TextIO, engine: str, folder: Path, threads: int) -> None:
    version, decode, prefill = ENGINES[engine](folder, threads)
    print(version, file=out, flush=True)
    for line in sys.stdin:
        name, *words = line.split()
        numbers = [int(word) for word in words]
        print(decode(*numbers) if name == "decode" else prefill(*numbers), file=out, flush=True)


def main() -> None:
    # What an engine prints goes to stderr, so that standard output has the answers only.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        answer(out, sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))


if __name__ == "__main__":
    main()
