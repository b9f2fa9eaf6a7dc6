"""Linear layers of vLLM whose matrices stay compressed."""

from collections.abc import Callable, Hashable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)

from mspc.formats.description import StoredMatrix
from mspc.runtime.joined import DenseLinear
from mspc.runtime.linear import SparseLinear
from mspc.serving.shards import Loading, Place, Shard, stacked

HELD = "compressed"
"""The name under which a layer of vLLM holds its compressed layer."""
MARK = "qweight"
"""An empty buffer by which vLLM finds the device of a quantized layer for LoRA."""


class SparseLinearMethod(LinearMethodBase):
    """One layer. `matrices` are by vLLM's id of a shard: name in the checkpoint, and description or None if dense."""

    def __init__(self, matrices: Mapping[Hashable, tuple[str, StoredMatrix | None]]) -> None:
        self.matrices = dict(matrices)

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        """Register an empty parameter for each tensor that may come: vLLM finds them by their names."""
        places = places_of(layer, list(self.matrices))
        shards = {i: Shard(*matrix, tuple(places[i])) for i, matrix in self.matrices.items()}
        expect(layer, Loading(shards, params_dtype, torch.empty(0).device))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises InputError, naming the matrix, if a tensor of it was not in the checkpoint."""
        finish(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., I) -> (..., O) of this rank."""
        y: Tensor = layer.compressed(x)
        return y if bias is None else y + bias

    def dequantize_weight(self, layer: Any) -> Tensor:
        """The dense weight (O, I) of this rank."""
        return dense_weight(layer)


def expect(layer: Any, loading: Loading) -> None:
    """Register placeholders whose loader gives what vLLM reads to `loading`."""
    layer.mspc_loading = loading

    def loader_of(part: str) -> Callable[..., None]:
        def load(parameter: Parameter, tensor: Tensor, shard_id: Hashable = None) -> None:
            loading.add(shard_id, part, tensor.detach())

        return load

    for part, dtype in loading.parts().items():
        placeholder = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        placeholder.weight_loader = loader_of(part)  # type: ignore[attr-defined]
        layer.register_parameter(part, placeholder)


def finish(layer: Any) -> None:
    """Put the compressed layer in the place of the placeholders. Once: models may name a layer twice."""
    loading = layer.__dict__.pop("mspc_loading", None)
    if loading is None:
        return
    compressed = loading.whole()
    for part in loading.parts():
        delattr(layer, part)
    layer.add_module(HELD, compressed)
    layer.register_buffer(MARK, torch.empty(0, device=loading.device), persistent=False)


def dense_weight(layer: Any) -> Tensor:
    parts = [part for part in layer.compressed.modules() if isinstance(part, SparseLinear | DenseLinear)]
    return torch.cat([part.weight for part in parts])


def places_of(layer: Any, ids: list[Hashable]) -> dict[Hashable, list[Place]]:
    """The pieces of each matrix that this rank holds, by vLLM's ids of shards."""
    rank, size, num_columns = layer.tp_rank, layer.tp_size, layer.input_size
    columns = 0, num_columns
    if isinstance(layer, RowParallelLinear):
        rows = {ids[0]: [(0, layer.output_size)]}
        columns = rank * num_columns // size, (rank + 1) * num_columns // size
    elif isinstance(layer, QKVParallelLinear):
        rows = _rows_of_heads(layer, ids)
    elif isinstance(layer, ColumnParallelLinear):
        lengths = [length * size for length in layer.output_partition_sizes]
        if ids == [None]:
            rows = {None: stacked(lengths, rank, size)}
        else:
            rows = {i: stacked([length], rank, size) for i, length in zip(ids, lengths, strict=True)}
    else:
        rows = {ids[0]: [(0, layer.output_size)]}
    return {i: [Place(of_rows, columns) for of_rows in found] for i, found in rows.items()}


def _rows_of_heads(layer: Any, ids: list[Hashable]) -> dict[Hashable, list[tuple[int, int]]]:
    """Rows of q, k and v. There may be fewer heads of k and v than ranks; ranks then hold the same."""
    replicas = layer.num_kv_head_replicas
    found: dict[Hashable, list[tuple[int, int]]] = {}
    start = 0
    for i, heads, total, size, repeated in (
        ("q", layer.num_heads, layer.total_num_heads, layer.head_size, 1),
        ("k", layer.num_kv_heads, layer.total_num_kv_heads, layer.head_size, replicas),
        ("v", layer.num_kv_heads, layer.total_num_kv_heads, layer.v_head_size, replicas),
    ):
        first = layer.tp_rank // repeated * heads * size
        found[i] = [(start + first, start + first + heads * size)]
        if ids == [None]:  # one matrix in the checkpoint, q above k above v
            start += total * size
    if ids != [None]:
        return found
    rows = [of_rows for (of_rows,) in found.values()]
    whole = rows[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(rows))
    return {None: [(0, rows[-1][1])] if whole else rows}
