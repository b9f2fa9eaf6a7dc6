"""A token through all blocks in C++: logits and tokens against transformers, in float64 where values are exact."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import mspc
from mspc.errors import MspcError
from mspc.kernels.cpu import library
from mspc.kernels.cpu.step import Constants, Step
from mspc.runtime import generation, stepping
from mspc.runtime.linear import SparseLinear
from mspc.runtime.stepping import stepper_of

BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0}
FAMILIES = {
    "llama": ("llama", {}), "biases": ("llama", BIASES), "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {}),
    "granite": ("granite", GRANITE), "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "gemma3": ("gemma3_text", {}),
}  # fmt: skip
QUICK = {"solver": "mask", "criterion": "magnitude", "allocator": "uniform", "num_sequences": 2}
LENGTH = 40

pytestmark = pytest.mark.skipif(not library.available(), reason="there is no C++ compiler")


@pytest.fixture(params=library.ISAS)
def isa(request, monkeypatch) -> str:
    if request.param not in library.available():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("MSPC_CPU_ISA", request.param)
    return request.param


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, calibration):
    """`loaded(family, **recipe)`: a compressed model in memory, in float32."""

    def get(family: str, **recipe: object) -> nn.Module:
        name, changes = FAMILIES[family]
        folder = tiny.build(tmp_path_factory.mktemp("step") / "model", name, **changes)
        artifact = tiny.compress(folder, tmp_path_factory.mktemp("step") / "out", calibration, **QUICK | recipe)
        return mspc.load(artifact.path, "cpu", "float32")

    return get


def logits_by_steps(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """(T - prompt + 1, V): after the prompt and after each token that is then given."""
    stepper = stepper_of(model, ids.shape[1])
    assert stepper is not None
    with torch.no_grad():
        found = [stepper.read(ids[:, :prompt])]
        found += [stepper.next(int(token)) for token in ids[0, prompt:]]
    return torch.cat(found)


class Float64(nn.Module):
    """A linear layer with the weight that a compressed one stands for."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def in_float64(model: nn.Module, ids: Tensor) -> Tensor:
    """Oracle: logits (T, V) of transformers with dense weights in float64."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Float64(layer))
    with torch.no_grad():
        return model.double()(input_ids=ids, use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_give_the_logits_of_transformers_in_float64(family, loaded, isa):
    model, ids = loaded(family, sparsity=0.5), tiny.ids(1, LENGTH)
    found = logits_by_steps(model, ids, 7)
    expected = in_float64(model, ids)
    assert float((found - expected[6:]).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    "recipe",
    [
        {"pattern": "2:4", "bits": 4, "group_size": 32},
        {"sparsity": 0.6, "bits": 3, "group_size": 32},
        {"sparsity": 0.1, "bits": 8, "group_size": 32, "head_bits": 8, "embedding_bits": 8},
        {"sparsity": 0.5, "skip": ("k_proj", "up_proj")},
        {"sparsity": 0.1, "bits": 4, "group_size": 32, "asymmetric": True},
    ],
    ids=["2:4+int4", "60%+int3", "int8 with head", "dense layers", "asymmetric"],
)  # fmt: skip
def test_codes_give_the_logits_of_transformers(recipe, loaded, isa):
    """Inputs are rounded to 16 bits in each group, which costs some 1e-5 of them in every product."""
    model, ids = loaded("llama", **recipe), tiny.ids(1, LENGTH)
    found = logits_by_steps(model, ids, 7)
    expected = in_float64(model, ids)
    assert float((found - expected[6:]).abs().max()) < 3e-4 * float(expected.abs().max())


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 30])
def test_a_prompt_may_be_longer_than_a_window(prompt, loaded, monkeypatch):
    """Oracle: transformers. The window is 8, and memory that was not written holds NaN."""
    model, ids = loaded("gemma3", sparsity=0.5), tiny.ids(1, LENGTH)

    def spoiled(*given: object) -> Step:
        for cache in given[1]:
            cache.fill_(torch.nan)
        return Step(*given)

    monkeypatch.setattr(stepping, "Step", spoiled)
    found = logits_by_steps(model, ids, prompt)
    expected = in_float64(model, ids)
    assert float((found - expected[prompt - 1 :]).abs().max()) < 1e-5 * float(expected.abs().max())


def test_the_default_dtype_of_torch_changes_nothing(loaded):
    model, ids = loaded("llama", sparsity=0.5), tiny.ids(1, LENGTH)
    expected = logits_by_steps(model, ids, 7)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = logits_by_steps(model, ids, 7)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.allclose(found, expected, atol=1e-4)


def test_int8_inputs_are_those_of_the_layers(loaded):
    """Oracle: the same model by transformers, whose layers round as much."""
    model, ids = loaded("llama", pattern="2:4", bits=4, group_size=32), tiny.ids(1, LENGTH)
    exact = logits_by_steps(model, ids, 7)
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.use_int8_inputs()
    found = logits_by_steps(model, ids, 7)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0, 6:]
    rounding = float((expected - exact).abs().max())
    assert float((found - expected).abs().max()) < 0.5 * rounding


def test_threads_change_no_bit(loaded):
    model, ids = loaded("llama", pattern="2:4", bits=4, group_size=32), tiny.ids(1, LENGTH)
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.append(logits_by_steps(model, ids, 7)[1:])
        torch.set_num_threads(before)
    # The prompt is read by torch, whose sums may depend on the threads, so each reads it anew before.
    assert torch.allclose(found[0], found[1], atol=1e-5)
    step = stepper_of(model, LENGTH)
    x = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(step.step(x, 0))
    torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_models_that_have_no_steps(loaded, tmp_path):
    model = loaded("llama", sparsity=0.5)
    assert stepper_of(tiny.reference(tiny.build(tmp_path / "dense", "llama")), LENGTH) is None
    for name, value in (
        ("sliding_window", LENGTH - 1), ("model_type", "gemma2"), ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
    ):  # fmt: skip
        before = getattr(model.config, name, None)
        setattr(model.config, name, value)
        assert stepper_of(model, LENGTH) is None, name
        setattr(model.config, name, before)
    assert stepper_of(model, LENGTH) is not None
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert stepper_of(model, LENGTH) is None
    hook.remove()
    activation = model.model.layers[1].mlp.act_fn
    activation.forward = activation.forward
    assert stepper_of(model, LENGTH) is None
    del activation.forward
    assert stepper_of(model, LENGTH) is not None
    assert stepper_of(model.bfloat16(), LENGTH) is None


def test_without_the_library_dense_layers_are_not_repacked(loaded, monkeypatch):
    model = loaded("llama", sparsity=0.5, skip=("k_proj",))
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.unprepare()
    monkeypatch.setenv("MSPC_CPU_ISA", "torch")
    assert stepper_of(model, LENGTH) is None


def test_inputs_that_some_layers_round_more(loaded):
    model = loaded("llama", pattern="2:4", bits=4, group_size=32)
    next(layer for layer in model.modules() if isinstance(layer, SparseLinear)).use_int8_inputs()
    assert stepper_of(model, LENGTH) is None


def test_dense_layers_are_repacked_once_for_a_weight(loaded):
    model, ids = loaded("llama", sparsity=0.5, skip=("k_proj", "up_proj")), tiny.ids(1, LENGTH)
    logits_by_steps(model, ids, 7)
    layer = model.model.layers[0].mlp.up_proj
    first = stepping._dense[layer][1]
    logits_by_steps(model, ids, 7)
    assert stepping._dense[layer][1] is first
    with torch.no_grad():
        layer.weight.mul_(2.0)
    found, expected = logits_by_steps(model, ids, 7), in_float64(model, ids)
    assert float((found - expected[6:]).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}])
def test_generation_writes_the_same_without_steps(options, artifact_of, monkeypatch):
    """Oracle: `generate` of transformers, with the same draws."""
    artifact = artifact_of("llama")
    made = []
    monkeypatch.setattr(generation, "stepper_of", lambda *given: made.append(stepper_of(*given)) or made[-1])
    written = mspc.generate(artifact.path, "the other", max_new_tokens=20, progress=False, device="cpu", **options)
    text = "".join(written)
    assert isinstance(made[0], stepping.Stepper)
    monkeypatch.setattr(generation, "stepper_of", lambda *_: None)
    other = mspc.generate(artifact.path, "the other", max_new_tokens=20, progress=False, device="cpu", **options)
    assert text == "".join(other)
    assert (written.ids, written.ended) == (other.ids, other.ended)


def test_a_step_refuses_what_does_not_fit(loaded):
    model = loaded("llama", sparsity=0.5)
    stepper = stepper_of(model, LENGTH)
    x = torch.zeros(1, model.config.hidden_size)
    for inputs, first in ((x, LENGTH), (x, -1), (x[:, 1:], 0), (x.double(), 0)):
        with pytest.raises(MspcError, match=f"caches of {LENGTH} tokens"):
            stepper.step(inputs, first)
    layers, caches, rotations, norm = stepper.step._kept[:4]
    short = [(cos[1:], sin) for cos, sin in rotations]
    for faulty in (
        (layers, [cache[..., 1:] for cache in caches], rotations, norm),
        (layers, caches, short, norm),
        (layers, caches, rotations, norm.double()),
        ([replace(layers[0], qkv=layers[0].qkv[:2]), *layers[1:]], caches, rotations, norm),
    ):
        with pytest.raises(MspcError):
            Step(*faulty, Constants(1e-5, 1.0))


def test_steps_that_compute_something_else_are_noticed(artifact_of, monkeypatch, caplog):
    """Oracle: the text of transformers. The fault is a scale of attention that the config does not tell."""
    artifact, options = artifact_of("llama"), {"max_new_tokens": 12, "progress": False, "device": "cpu"}
    expected = "".join(mspc.generate(artifact.path, "the other", **options))
    monkeypatch.setattr(stepping, "Constants", lambda eps, scale, *more: Constants(eps, 20.0 * scale, *more))
    assert "".join(mspc.generate(artifact.path, "the other", **options)) == expected
    assert "computes other logits than its steps in C++" in caplog.text


def test_a_long_text_and_heads_that_share_keys(tmp_path, calibration):
    """Oracle: transformers on the whole text."""
    folder = tiny.build(tmp_path / "model", "llama", max_position_embeddings=2048, num_key_value_heads=1)
    artifact = tiny.compress(folder, tmp_path / "out", calibration, **QUICK | {"sparsity": 0.5})
    model = mspc.load(artifact.path, "cpu", "float32")
    ids = tiny.ids(1, 1200)
    found = logits_by_steps(model, ids, 1190)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0, 1189:]
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())
