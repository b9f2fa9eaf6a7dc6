"""One model in vLLM on a CPU, timed by the modules behind `vllm bench latency` and `vllm bench throughput`.

    python benchmarks/vllm_worker.py FOLDER '{"enforce_eager": true}'     options of vllm.LLM

Requests are lines of JSON, [kind, count, prompt, new]: the kind is `latency` (a batch of `count` at once) or
`throughput` (`count` requests in a queue), each of `prompt` tokens that `new` follow. Each is answered by the seconds
on the clock and those of the CPU in this process. Both modules load a model at each call; here they get the one that
is loaded already.
"""

import json
import os
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any


class Held:
    """Stands in the place of `vllm.LLM` in the modules."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def from_engine_args(self, _: Any) -> Any:
        return self.engine


@cache
def parser() -> Any:
    """The options of `vllm bench latency`, whose parser takes a while to make."""
    from vllm.benchmarks import latency as module
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made = FlexibleArgumentParser()
    module.add_cli_args(made)
    return made


def latency(folder: str, count: int, prompt: int, new: int) -> float:
    """Seconds of one batch."""
    from vllm.benchmarks import latency as module

    with tempfile.TemporaryDirectory(prefix="mspc-vllm-") as work:
        out = Path(work, "out.json")
        given = {
            "model": folder, "batch-size": count, "input-len": prompt, "output-len": new, "num-iters-warmup": 0,
            "num-iters": 1, "output-json": out,
        }  # fmt: skip
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        module.main(parser().parse_args([*words, "--disable-detokenize"]))
        return float(json.loads(out.read_text())["avg_latency"])


def throughput(folder: str, count: int, prompt: int, new: int) -> float:
    """Seconds of all requests."""
    import numpy as np
    from vllm.benchmarks import throughput as module
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.engine.arg_utils import EngineArgs

    ids = np.random.default_rng(0).integers(10_000, size=(count, prompt)).tolist()
    requests = [SampleRequest({"prompt_token_ids": row}, prompt, new) for row in ids]
    return float(module.run_vllm(requests, 1, EngineArgs(model=folder), False, disable_detokenize=True)[0])


def main(folder: str, options: str) -> None:
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to stdout too
    import vllm

    engine = vllm.LLM(
        model=folder, dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False, disable_log_stats=True,
        **json.loads(options),
    )  # fmt: skip
    vllm.LLM = Held(engine)
    kinds = {"latency": latency, "throughput": throughput}
    print(json.dumps(vllm.__version__), file=answer_to, flush=True)
    for line in sys.stdin:
        kind, count, prompt, new = json.loads(line)
        before = time.process_time()
        seconds = kinds[kind](folder, count, prompt, new)
        print(json.dumps([seconds, time.process_time() - before]), file=answer_to, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
