"""A causal language model as an ONNX graph: tokens and a key-value cache in, logits and the longer cache out.

Every matrix that was compressed becomes one MatMul of an initializer (in, out) with the name of the model's own
parameter, by which readers find it.
"""

import inspect
import re
import warnings
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import onnxscript  # noqa: F401  torch.onnx imports it late and would say in other words that it is missing
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mspc.errors import MspcError
from mspc.storage.manifest import MatrixEntry

Past = list[tuple[Tensor, Tensor]]
BATCH, LENGTH, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class Decoder(nn.Module):
    """The traced module: plain tensors in and out, since a cache object cannot be an input of a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past
    ) -> tuple[Tensor, ...]:
        positions = {"position_ids": position_ids} if takes_positions(self.model) else {}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(ddp_cache_data=past),
            use_cache=True,
            **positions,
        )
        cache = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (out.logits, *cache)


class MatMul(nn.Module):
    """x W + b with W (in, out): the graph has no transpose to fold, so the parameter keeps its name."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


def takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def decoder_graph(model: nn.Module, entries: Iterable[MatrixEntry], opset: int) -> ir.Model:
    """The graph of a loaded model. Its compressed linear layers are replaced, so the model is of no use afterwards.

    Raises MspcError, naming the operator, when the model has no ONNX form, and for states other than keys and values.
    """
    for entry in entries:
        linear: Any = model.get_submodule(entry.name)
        weight = linear.weight if entry.address.transposed else linear.weight.T
        model.set_submodule(entry.name, MatMul(weight.contiguous(), linear.bias), strict=True)
    with torch.no_grad():
        found = model(input_ids=torch.zeros(2, 5, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(found, "past_key_values", None), "layers", [])
    if not layers or not all(hasattr(layer, "keys") for layer in layers):
        raise MspcError(
            f"{type(model).__name__} keeps other states between tokens than keys and values alone, and the graph has "
            "no place for them. Export dense or sparse instead."
        )
    graph = traced(Decoder(model).eval(), [(layer.keys, layer.values) for layer in layers], opset)
    for name, value in list(graph.graph.initializers.items()):
        if name.startswith("model."):
            value.name = name.removeprefix("model.")
    return graph


def traced(decoder: Decoder, past: Past, opset: int) -> ir.Model:
    """`past` is a cache (2, H, 5, D) of keys and values for every layer."""
    ids = torch.zeros(2, 3, dtype=torch.long)  # lengths of 0 and 1 would be taken for constants
    inputs = (ids, torch.ones(2, 8, dtype=torch.long), torch.arange(5, 8).expand(2, 3).contiguous(), past)
    names = [f"{index}.{part}" for index in range(len(past)) for part in ("key", "value")]
    cache = {0: BATCH, 2: PAST}
    shapes = {
        "input_ids": {0: BATCH, 1: LENGTH},
        "attention_mask": {0: BATCH, 1: TOTAL},
        "position_ids": {0: BATCH, 1: LENGTH},
        "past": [(cache, cache)] * len(past),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                decoder,
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
                output_names=["logits", *(f"present.{name}" for name in names)],
            )
    except Exception as error:  # torch.onnx wraps whatever the model or a translation raised
        raise MspcError(_explanation(type(decoder.model).__name__, error)) from error
    assert program is not None
    return program.model


def _explanation(model: str, error: BaseException) -> str:
    """The innermost reason of an error, and the operator that it names."""
    reasons = [error]
    while following := reasons[-1].__cause__ or reasons[-1].__context__:
        reasons.append(following)
    text = "\n".join(str(reason) for reason in reversed(reasons))
    operator = re.search(r"\b(?:aten|prims|torchvision|mspc|[a-z_]+::)[.:]*[a-z_]\w*(?:\.\w+)?", text)
    first_line = next((line for reason in reversed(reasons) for line in str(reason).splitlines() if line.strip()), "")
    at = f" at the operator {operator[0]}" if operator else ""
    return f"torch.onnx cannot export {model}: it stops{at} ({first_line.strip()}). Export dense or sparse instead."
