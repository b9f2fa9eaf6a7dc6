"""Sparse exports in vLLM on a CPU, by the plug-in that its entry point names. Run by `make test-vllm`.

Oracle: `mspc.load` of the same folder. In float32 every greedy token must be its choice too; in bfloat16 up to logits
that are one rounding apart.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from in_vllm import ENVIRONMENT, TEXTS, Answer, answers, gaps
from safetensors.torch import load_file, save_file

from mspc.bench.formats import Source, describe, parse_format, random_stored
from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.planning.plan_file import write_plan
from mspc.runtime.joined import joined
from mspc.runtime.linear import SparseLinear, prepare
from mspc.types import NM, Grid, PlannedMatrix, Target, Unstructured

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm)"),
    pytest.mark.filterwarnings("ignore"),  # of vLLM
]

HERE = Path(__file__).parent
BUNDLED = HERE.parent / "examples" / "tiny_llama"
NEAR = 0.125
"""Two units of bfloat16 at logits of 8 to 16."""
FORMATS = {
    "2:4 int4": {"pattern": "2:4", "bits": 4},
    "50%": {"sparsity": 0.5},
    "50% int4": {"sparsity": 0.5, "bits": 4},
    "8:16": {"pattern": "8:16"},
    "int3": {"sparsity": 0.0, "bits": 3, "group_size": 64, "asymmetric": True},
}
MIXTURE = [
    Target(NM(2, 4), Grid(4, 128)), Target(Unstructured(0.37)), Target(Unstructured(0.0), Grid(3, 64)),
    Target(NM(5, 16)), Target(Unstructured(0.31), Grid(4, 128, False)), Target(NM(8, 16), Grid(4, 32, False)),
    Target(Unstructured(0.25), Grid(8, None)), Target(Unstructured(0.5), Grid(4, 128, False)),
    Target(Unstructured(0.1), Grid(2, 32)), Target(NM(3, 4)), Target(Unstructured(0.4), Grid(3, 128)),
    Target(NM(2, 4), Grid(4, 64)), Target(Unstructured(0.0), Grid(8, 128)), Target(NM(2, 4), Grid(4, 128, False)),
]  # fmt: skip
"""By matrix in turn: two blocks have q, k, v, o, gate, up and down of 14 kinds."""
# Heads of 32: vLLM has no attention for smaller ones on a CPU.
LARGER = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "max_position_embeddings": 256}
FAMILIES = {
    "qwen2": (LARGER, {"bits": 4, "group_size": 32}),  # biases
    "phi3": (LARGER, {"pattern": "2:4"}),  # q, k and v are one matrix in the file, and gate and up
    "gpt2": (
        {"hidden_size": 128, "n_inner": 256, "max_position_embeddings": 256},  # transposed, biases, tied
        {"sparsity": 0.5, "bits": 4, "group_size": 32},
    ),
    "gemma2": (
        LARGER | {"head_dim": 32, "query_pre_attn_scalar": 32},  # tied, and logits are capped
        {"bits": 4, "group_size": 32},
    ),
    "llama": (LARGER, {"bits": 4, "group_size": 32, "head_bits": 4, "embedding_bits": 8}),
}  # fmt: skip


def exported(model: Path, folder: Path, calibration: str | Path, **recipe: Any) -> Path:
    quick = {"num_sequences": 2, "solver": "mask", "device": "cpu"}
    if "plan" not in recipe:
        quick["allocator"] = "uniform"
    artifact = tiny.compress(model, folder / "artifact", calibration, **quick | recipe)
    return artifact.export("sparse", folder / "sparse", verify=False, progress=False)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory) -> Callable[[str], Path]:
    """`bundled(format)`: a sparse export of the bundled model, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("bundled")
            recipe = FORMATS.get(name) or {"plan": str(_plan(folder)), "skip": ("layers.1.self_attn.k_proj",)}
            made[name] = exported(BUNDLED, folder, "builtin", **recipe)
        return made[name]

    return get


def _plan(folder: Path) -> Path:
    """The plan of the mixture, without k of the second block, which stays dense."""
    model = open_model(BUNDLED, device=torch.device("cpu"))
    matrices = [m for of_block in model.matrices(()) for m in of_block if "layers.1.self_attn.k_proj" not in m.name]
    targets = [MIXTURE[number % len(MIXTURE)] for number in range(len(matrices))]
    write_plan(
        folder / "plan.json",
        [PlannedMatrix(m.name, m.shape, target) for m, target in zip(matrices, targets, strict=True)],
    )
    return folder / "plan.json"


@pytest.mark.parametrize("name", [*FORMATS, "mixture"])
def test_in_float32_every_token_is_that_of_mspc(name, bundled):
    found = answers(bundled(name))
    assert sum(len(answer.ids) for answer in found) == 192
    assert gaps(bundled(name), found) == []


@pytest.mark.parametrize("name", ["2:4 int4", "mixture"])
def test_in_bfloat16_they_differ_only_where_two_are_nearly_equal(name, bundled):
    found = answers(bundled(name), dtype="bfloat16")
    differ = gaps(bundled(name), found, "bfloat16")
    assert len(differ) <= 10
    assert max(differ, default=0) <= NEAR


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_biases_ties_and_matrices_that_are_fused_in_the_file(family, calibration, tmp_path):
    changes, recipe = FAMILIES[family]
    model = tiny.build(tmp_path / "model", family, **changes)
    folder = exported(model, tmp_path, calibration, **recipe)
    prompts = tiny.ids(4, 12).tolist()
    found = answers(folder, prompts, 16)
    assert [answer.prompt for answer in found] == prompts
    assert gaps(folder, found) == []


def in_a_process(folder: Path, out: Path, environment: dict[str, str] | None = None, **options: Any) -> list[Answer]:
    """`answers` in a process of its own, with a time limit: workers may linger."""
    command = [sys.executable, str(HERE / "in_vllm.py"), str(folder), str(out), json.dumps(options)]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT | (environment or {}), timeout=900, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Answer(**row) for row in json.loads(out.read_text())]


def test_compiled_whole_by_dynamo(bundled, tmp_path):
    """One graph for any number of tokens and no guards, as vLLM compiles."""
    found = in_a_process(
        bundled("mixture"), tmp_path / "out.json", {"VLLM_CPU_CI_ENV": "1"}, enforce_eager=False, dtype="float32"
    )
    assert sum(len(answer.ids) for answer in found) == 192
    assert gaps(bundled("mixture"), found) == []


def test_compressed_embeddings_and_head_compiled(calibration, tmp_path):
    changes, recipe = FAMILIES["llama"]
    folder = exported(tiny.build(tmp_path / "model", "llama", **changes), tmp_path, calibration, **recipe)
    found = in_a_process(folder, tmp_path / "out.json", {"VLLM_CPU_CI_ENV": "1"}, enforce_eager=False)
    assert gaps(folder, found) == []


def test_a_layer_compiled_by_inductor():
    """As vLLM compiles for a CPU: q, k and v of two kinds in one graph for any number of tokens, without guards."""
    source = Source.seeded(0, torch.device("cpu"))
    matrices = [describe((96, 128), parse_format(name), name) for name in ("2:4+int4", "2:4+int4", "50%")]
    layer = joined([SparseLinear.of(random_stored(matrix, source), matrix) for matrix in matrices])
    prepare(layer, torch.bfloat16, on_cpu=True)

    def between(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(layer(x * 2)).float()

    compiled = torch.compile(
        between, fullgraph=True, dynamic=False, backend="inductor",
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "cpp.dynamic_threads": True},
    )  # fmt: skip
    for num_tokens in (64, 3, 1, 200):
        x = source.normal((num_tokens, 128), 1.0, torch.bfloat16)
        if num_tokens == 64:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), between(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["mixture", "50% int4"])
def test_tensor_parallel_of_two(name, bundled, tmp_path):
    found = in_a_process(bundled(name), tmp_path / "out.json", tensor_parallel_size=2)
    assert gaps(bundled(name), found) == []


def test_tensor_parallel_of_a_vocabulary_and_of_matrices_that_are_fused_in_the_file(calibration, tmp_path):
    for family in ("llama", "phi3"):
        changes, recipe = FAMILIES[family]
        (tmp_path / family).mkdir()
        model = tiny.build(tmp_path / family / "model", family, **changes)
        folder = exported(model, tmp_path / family, calibration, **recipe)
        assert gaps(folder, in_a_process(folder, tmp_path / "out.json", tensor_parallel_size=2)) == []


@contextmanager
def served(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of an OpenAI server of a folder, in processes of its own."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += [
        "--host",
        "127.0.0.1",
        "--max-model-len",
        "128",
        "--enforce-eager",
        "--served-model-name",
        "m",
        *options,
    ]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ask(url: str, values: dict[str, Any] | None = None) -> Any:
    data = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def when_ready(url: str, seconds: int = 600) -> Any:
    for _ in range(seconds):
        try:
            return ask(url)
        except OSError:
            time.sleep(1)
    raise TimeoutError(url)


def test_a_server_needs_no_flag_and_says_the_same(bundled, tmp_path):
    folder = bundled("2:4 int4")
    expected = answers(folder)
    with served(folder, tmp_path / "log", "--dtype", "float32") as url:
        models = when_ready(f"{url}/v1/models")
        assert [model["id"] for model in models["data"]] == ["m"]
        for text, answer in zip(TEXTS, expected, strict=True):
            asked = {"model": "m", "prompt": text, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
            said = ask(f"{url}/v1/completions", asked)
            assert said["choices"][0]["text"] == answer.text
            assert said["usage"]["completion_tokens"] == 32
    assert "quantization=mspc" in (tmp_path / "log").read_text()


def damaged(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


UP = "model.layers.3.mlp.up_proj"


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.scales"][0, 0] = torch.nan


def _another_mask(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.mask"][0, 0] ^= 1


def _shorter(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.codes"] = tensors[f"{UP}.codes"][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(f"{UP}.scales"), f"{UP}: its scales are missing"),
        (_shorter, f"{UP}: its codes are"),
        (_not_a_number, f"{UP}: its scales contain NaN"),
        (_another_mask, f"{UP}: its row_offsets do not count the bits of its mask"),
        (_without("model.layers.2.input_layernorm.weight"), "model.layers.2.input_layernorm.weight"),
    ],
    ids=["missing", "short", "nan", "mask", "norm"],
)
def test_a_damaged_folder_is_refused_by_name(change, message, bundled, tmp_path):
    folder = damaged(bundled("50% int4"), tmp_path / "copy", change)
    with pytest.raises(ValueError, match=message):  # of pydantic, where vLLM makes its config
        answers(folder)


def test_a_hub_folder_that_is_not_whole_is_refused_when_it_is_loaded(bundled, tmp_path, monkeypatch):
    """As one that was not there when vLLM read its config: only the loader sees the files."""
    from mspc.serving.config import SparseConfig

    monkeypatch.setattr(SparseConfig, "maybe_update_config", lambda *_, **__: None)
    folder = damaged(bundled("50% int4"), tmp_path / "copy", _without(f"{UP}.scales"))
    with pytest.raises(InputError, match=f"{UP}: its scales are missing"):
        answers(folder)


@pytest.mark.parametrize("name", ["sparse", "dense", "gptq", "compressed-tensors"])
def test_verify_runs_exports_in_it(name, tmp_path):
    """Logits and greedy tokens of the artifact, at the tolerances of `verify`."""
    quick = {"num_sequences": 2, "solver": "mask", "device": "cpu", "allocator": "uniform", "bits": 4}
    artifact = tiny.compress(BUNDLED, tmp_path / "artifact", "builtin", **quick)
    out = artifact.export(name, tmp_path / "out", progress=False)
    found = json.loads((out / "verification.json").read_text())["runtimes"]["vllm"]
    assert found["status"] == "verified"
    assert found["relative_error"] < found["tolerance"]


EXPANDED = {
    "mixtral": (
        LARGER | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        {"pattern": "2:4", "bits": 4, "group_size": 32},
    ),
    "gemma2": (FAMILIES["gemma2"][0], {"bits": 4, "group_size": 32, "embedding_bits": 8}),
}


@pytest.mark.parametrize("family", EXPANDED)
def test_the_loader_makes_dense_what_no_layer_takes_compressed(family, calibration, tmp_path):
    changes, recipe = EXPANDED[family]
    folder = exported(tiny.build(tmp_path / "model", family, **changes), tmp_path, calibration, **recipe)
    found = answers(folder, tiny.ids(4, 12).tolist(), 16, load_format="mspc")
    assert gaps(folder, found) == []
    refused = "--load-format mspc" if family == "mixtral" else "no module or parameter named 'model.embed_tokens.codes'"
    with pytest.raises(ValueError, match=refused):
        answers(folder, [[1]], 1)


ADAPTED = ("q_proj", "v_proj", "down_proj")


def adapter_of(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA adapter of rank 4 for some matrices of the bundled model, as peft writes it, and what it adds to each."""
    generator, tensors, added = torch.Generator().manual_seed(0), {}, {}
    model = open_model(BUNDLED, device=torch.device("cpu"))
    for matrix in (m for of_block in model.matrices(()) for m in of_block):
        if not matrix.name.endswith(ADAPTED):
            continue
        a = torch.randn(4, matrix.shape[1], generator=generator) / 16
        b = torch.randn(matrix.shape[0], 4, generator=generator) / 16
        tensors |= {
            f"base_model.model.{matrix.name}.lora_A.weight": a,
            f"base_model.model.{matrix.name}.lora_B.weight": b,
        }
        added[matrix.name] = 2 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(ADAPTED)}))
    return folder, added


@pytest.mark.parametrize("name", ["2:4 int4", "mixture"])
def test_an_adapter_adds_to_compressed_layers(name, bundled, tmp_path):
    """Oracle: the product of the adapter's matrices, added to the outputs of the layers that mspc loads."""
    adapter, added = adapter_of(tmp_path / "adapter")
    found = answers(bundled(name), adapter=adapter, enable_lora=True, max_lora_rank=8)

    def change(model: torch.nn.Module) -> None:
        for layer, weight in added.items():
            model.get_submodule(layer).register_forward_hook(
                lambda _, inputs, y, weight=weight: y + torch.nn.functional.linear(inputs[0], weight)
            )

    # mspc.load is asked for whole sequences: it does not round inputs to 16 bits, as both do for up to 8 tokens.
    assert max(gaps(bundled(name), found, change=change), default=0) < 0.02
    assert max(gaps(bundled(name), found)) > 0.5


def test_what_cannot_be_done_is_said(bundled):
    """New weights for compressed layers by mspc. Sleep is refused by vLLM on a CPU; there is no other test of it."""

    def reload(engine: Any) -> None:
        with pytest.raises(InputError, match="new weights cannot be loaded into a compressed layer. Start the server"):
            engine.collective_rpc("reload_weights")

    answers(bundled("2:4 int4"), ["a"], 1, then=reload)
    with pytest.raises(ValueError, match="[Ss]leep mode is not supported"):
        answers(bundled("2:4 int4"), ["a"], 1, enable_sleep_mode=True)
