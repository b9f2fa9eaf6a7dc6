"""Decoding on a CPU, end to end and in turns: mspc's kernels, torch, llama.cpp, ONNX Runtime and OpenVINO.

    python benchmarks/cpu_peers.py --out results.json                           # random weights, shapes of Llama-3.2-1B
    python benchmarks/cpu_peers.py --only 'mspc 2:4+int4' 'llama.cpp Q4_0'
    python benchmarks/cpu_peers.py --mixture out/small --out results.json       # the formats of an artifact as well
    python benchmarks/cpu_peers.py --models out/small model.gguf out/onnx       # real models: artifacts, GGUF, ONNX

Everything is in memory at once, and each turn takes a few tokens of each contender, so that a busy machine disturbs all
alike. Weights lie in pages of 2 MB where the kernel gives them, llama.cpp's too. llama.cpp runs in a process of its own
and reports its own times, which include choosing a token. ONNX Runtime is measured through onnxruntime-genai.
"""

import argparse
import datetime
import fnmatch
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import torch
from cpu_decoders import mixture_of, model_step, random_step
from environments import environment
from random_gguf import write

import mspc
from mspc.bench.models import SHAPES
from mspc.bench.timing import describe_device, spread, versions
from mspc.storage.files import write_atomically

SHAPE = SHAPES["1b"]
CONTEXT = 128
OURS = ("dense", "int8", "int4", "int3", "2:4+int4", "60%+int4", "70%+int4", "80%+int4", "2:4")
LLAMA_CPP = ("Q4_0", "Q4_K", "Q8_0", "Q3_K")
CLOCK = [time.perf_counter]
Decode = Callable[[int], float]
"""Decodes that many tokens after CONTEXT others, and tells the seconds of one."""


def of_llamacpp(file: Path, threads: int, stack: ExitStack) -> Decode:
    """A GGUF file in a server of llama.cpp, which reports the time of tokens after the prompt."""
    python = environment(llamacpp.ROOT / ".venv-llamacpp", llamacpp.REQUIREMENTS)
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    model = stack.enter_context(llamacpp.running(python, file, CONTEXT + 64, threads, variables=pages))
    prompt = [100 + number % 50 for number in range(CONTEXT)]

    def decode(count: int) -> float:
        found = model.timings(prompt, count + 1)  # the first token comes out of the prompt
        return float(found["predicted_per_token_ms"]) / 1000

    return decode


def of_onnx(folder: Path, threads: int) -> Decode:
    """An ONNX export in onnxruntime-genai, with the threads of its session."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    options: dict[str, Any] = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    if json.loads((folder / "mspc_export.json").read_text())["options"]["weights"] == "sparse":
        shutil.copy(mspc.onnx_library(), folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)

    def decode(count: int) -> float:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=CONTEXT + count + 2, min_length=CONTEXT + count + 2, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([[100 + number % 50 for number in range(CONTEXT)]], np.int32))
        generator.generate_next_token()
        return _seconds(generator.generate_next_token, count)

    return decode


def of_openvino(folder: Path, threads: int) -> Decode:
    """An ONNX export in OpenVINO as it is by default, with inputs rounded to 8 bits; its cache is copied by Python."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(folder / "model.onnx", "CPU", options)
    caches = {one.any_name: one.partial_shape for one in model.inputs if one.any_name.startswith("past_key_values.")}

    def step(ids: Any, past: dict[str, Any]) -> dict[str, Any]:
        length = next(iter(past.values())).shape[2]
        total = length + ids.shape[1]
        places = np.arange(length, total)[None]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), "position_ids": places}
        found = model(feeds | past, share_inputs=True, share_outputs=True)
        return {name: found[name.replace("past_key_values", "present")] for name in caches}

    none = {name: np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
            for name, shape in caches.items()}  # fmt: skip
    prompt = step(np.array([[100 + number % 50 for number in range(CONTEXT)]]), none)
    prompt = {name: np.array(value) for name, value in prompt.items()}

    def decode(count: int) -> float:
        past = prompt

        def next_one() -> None:
            nonlocal past
            past = {name: np.array(value) for name, value in step(np.array([[100]]), past).items()}

        return _seconds(next_one, count)

    return decode


def _seconds(step: Callable[[], Any], count: int) -> float:
    before = CLOCK[0]()
    for _ in range(count):
        step()
    return (CLOCK[0]() - before) / count


def of_step(step: Callable[[], Any]) -> Decode:
    return lambda count: _seconds(step, count)


def random_contenders(given: argparse.Namespace, stack: ExitStack) -> dict[str, Callable[[], tuple[Decode, int]]]:
    """Random weights by name: functions that make them, and tell the bytes that a step reads."""
    made: dict[str, Callable[[], tuple[Decode, int]]] = {"torch bf16": lambda: _ours("torch", given.head_bits)}
    for name in OURS:
        made[f"mspc {'bf16' if name == 'dense' else name}"] = lambda name=name: _ours(name, given.head_bits)
    if given.mixture:
        formats = mixture_of(given.mixture, SHAPE.blocks)
        made[f"mspc {given.mixture_name}"] = lambda: _ours(formats, given.head_bits)
    for kind in LLAMA_CPP:
        made[f"llama.cpp {kind}"] = lambda kind=kind: _of_random_gguf(kind, given, stack)
    return made


def _ours(formats: Any, head_bits: int) -> tuple[Decode, int]:
    step, num_bytes = random_step(SHAPE, formats, head_bits, CONTEXT)
    return of_step(step), num_bytes


def _of_random_gguf(kind: str, given: argparse.Namespace, stack: ExitStack) -> tuple[Decode, int]:
    file = given.work / f"{SHAPE.name}-{kind}.gguf"
    given.work.mkdir(parents=True, exist_ok=True)
    num_bytes = write(file, SHAPE, kind)
    return of_llamacpp(file, given.threads, stack), num_bytes


def real_contenders(given: argparse.Namespace, stack: ExitStack) -> dict[str, Callable[[], tuple[Decode, int]]]:
    made = {str(path): lambda path=path: _of_path(path, given, stack) for path in given.models}
    for path in given.openvino:
        made[f"openvino {path}"] = lambda path=path: (of_openvino(path, given.threads), _onnx_bytes(path))
    return made


def _onnx_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.onnx*"))


def _of_path(path: Path, given: argparse.Namespace, stack: ExitStack) -> tuple[Decode, int]:
    if path.suffix == ".gguf":
        return of_llamacpp(path, given.threads, stack), path.stat().st_size
    if (path / "genai_config.json").is_file():
        return of_onnx(path, given.threads), _onnx_bytes(path)
    step, num_bytes = model_step(path, CONTEXT)
    return of_step(step), num_bytes


def in_turns(contenders: dict[str, Decode], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Seconds a token of every contender in every round; the first round warms up and is left out."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, decode in contenders.items():
            seconds = decode(tokens)
            if turn:
                took[name].append(seconds)
    return took


def ratios(took: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Speed relative to `base`, round by round."""
    return {name: spread([one / other for one, other in zip(took[base], mine, strict=True)])
            for name, mine in took.items()}  # fmt: skip


def described(value: Any) -> Any:
    """An option for the result, without the folders of this machine."""
    return (
        value.name
        if isinstance(value, Path)
        else [described(one) for one in value]
        if isinstance(value, list)
        else value
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--models", nargs="+", type=Path, help="real models in place of random weights")
    parser.add_argument(
        "--openvino", nargs="+", type=Path, default=[], help="ONNX exports to time there, with --models"
    )
    parser.add_argument("--mixture", type=Path, help="an artifact whose formats are taken for the shapes")
    parser.add_argument("--mixture-name", default="mixture")
    parser.add_argument("--head-bits", type=int, default=4, choices=(4, 8, 16))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="of this process, on a busy machine; llama.cpp is another one"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=8, help="of each contender in each round")
    parser.add_argument(
        "--work", type=Path, default=Path("out/cpu_peers"), help="folder of GGUF files with random weights"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    CLOCK[0] = time.process_time if given.cpu_seconds else time.perf_counter
    load, python = os.getloadavg()[0], llamacpp.ROOT / ".venv-llamacpp/bin/python"
    with ExitStack() as stack, torch.inference_mode():
        made = real_contenders(given, stack) if given.models else random_contenders(given, stack)
        chosen = [name for name in made if any(fnmatch.fnmatch(name, pattern) for pattern in given.only)]
        decodes, num_bytes = {}, {}
        for name in chosen:
            decodes[name], num_bytes[name] = made[name]()
            print(f"{name}: {num_bytes[name] / 1e6:,.0f} MB", flush=True)
        took = in_turns(decodes, given.rounds, given.tokens)
    base = next((name for name in chosen if name == "llama.cpp Q4_0"), chosen[0])
    compared = ratios(took, base)
    print(f"{'':24} ms a token (10%..90%)   x {base} (10%..90%)")
    for name, seconds in took.items():
        found, ratio = spread([1000 * one for one in seconds]), compared[name]
        print(
            f"{name:24} {found['median']:8.2f} ({found['p10']:.2f}..{found['p90']:.2f})   "
            f"{ratio['median']:.2f} ({ratio['p10']:.2f}..{ratio['p90']:.2f})"
        )
    if given.out:
        result = {
            "date": datetime.date.today().isoformat(),
            "versions": versions() | ({"llama.cpp": llamacpp.version_in(python)} if python.is_file() else {}),
            "device": describe_device(torch.device("cpu")),
            "load_average_before": load,
            "load_average_after": os.getloadavg()[0],
            "configuration": {key: described(value) for key, value in vars(given).items()} | {"context": CONTEXT},
            "base": base,
            "rows": [
                {"name": name, "bytes": num_bytes[name], "seconds": spread(seconds), "samples": seconds,
                 "speedup": compared[name]}
                for name, seconds in took.items()
            ],
        }  # fmt: skip
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(given.out, lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
