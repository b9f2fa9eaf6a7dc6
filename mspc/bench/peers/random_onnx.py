"""A Llama with random weights as an ONNX graph of ONNX Runtime's own operators, as its model builder writes them.

Matrices are MatMulNBits, and attention is GroupQueryAttention with the rotations inside. The folder is one of ONNX
Runtime GenAI, and OpenVINO reads the same graph. Needs the extra `onnx`.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from exporters.genai import genai_config
from exporters.onnx import MODEL, write
from exporters.onnx_outer import initializer
from mspc.bench.decoder import Shape
from mspc.bench.formats import Source
from mspc.bench.models import EPS, SEED, rotations
from mspc.bench.peers.blocks import block_of
from mspc.model.special_ids import SpecialIds
from mspc.storage.files import write_json

BITS = 4
LENGTH = 4096
"""Tokens that the rotations are for."""
ROWS = 64
"""Rows of the embeddings: token n has row n modulo ROWS, since a step reads one row only."""
ROUNDED = 4
"""The accuracy level of MatMulNBits that rounds inputs to 8 bits, the fastest on CPUs."""
MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
FLOAT, INT32, INT64, UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8
DTYPES = {torch.float32: FLOAT, torch.int64: INT64, torch.uint8: UINT8}
Parts = dict[str, Tensor]
"""Codes (O, B, block * bits / 8) and scales (O, B)."""


def random_parts(size: tuple[int, int], bits: int, block: int, source: Source) -> Parts:
    """A random matrix (O, I) in symmetric codes: weight = (code - 2^(bits - 1)) * scale."""
    rows, columns = size
    codes = source.stream(rows, columns, bits).view(rows, columns // block, block * bits // 8)
    std = columns**-0.5 / ((4**bits - 1) / 12 + 0.25) ** 0.5
    return {"codes": codes, "scales": (0.5 + source.uniform((rows, columns // block))) * std}


def draw(shape: Shape, head_bits: int) -> tuple[Tensor, dict[str, Parts]]:
    """Embeddings (ROWS, hidden), and the matrices of a block and the head, by name."""
    source, block = Source.seeded(SEED, torch.device("cpu")), block_of(shape)
    drawn = {name: random_parts(size, BITS, block, source) for name, size in shape.linears().items()}
    drawn["head"] = random_parts((shape.vocabulary, shape.hidden), head_bits, block, source)
    return source.normal((ROWS, shape.hidden), 1.0, torch.float32), drawn


def write_random(folder: Path, shape: Shape, head_bits: int, accuracy_level: int = ROUNDED) -> dict[str, int]:
    """Write the folder. All blocks hold the same values, in tensors of their own. `head_bits` is 4 or 8.

    Returns the bytes of weights that a step reads.
    """
    embeddings, drawn = draw(shape, head_bits)
    graph = Graph(shape, head_bits, accuracy_level)
    graph.build(embeddings, drawn)
    write(graph.model, folder / MODEL)
    config = {
        "num_attention_heads": shape.heads, "hidden_size": shape.hidden, "vocab_size": shape.vocabulary,
        "max_position_embeddings": LENGTH,
    }  # fmt: skip
    cache = shape.blocks, shape.kv_heads, shape.head_dim
    found = genai_config(config, SpecialIds(bos=0, eos=(1,)), cache, {})
    found["search"]["past_present_share_buffer"] = True
    del found["model"]["decoder"]["inputs"]["position_ids"]  # GroupQueryAttention counts by itself
    write_json(folder / "genai_config.json", found)
    sizes = {name: sum(part.nbytes for part in parts.values()) for name, parts in drawn.items()}
    head = sizes.pop("head")
    norms = (2 * shape.blocks + 1) * shape.hidden * torch.float32.itemsize
    return {"linears": shape.blocks * sum(sizes.values()), "norms": norms, "head": head}


class Graph:
    """A graph under way: each method adds nodes and returns their result."""

    def __init__(self, shape: Shape, head_bits: int, accuracy_level: int) -> None:
        self.shape, self.head_bits, self.accuracy_level = shape, head_bits, accuracy_level
        self.graph = ir.Graph([], [], nodes=[], opset_imports=OPSETS, name="random")
        self.model = ir.Model(self.graph, ir_version=10)

    def build(self, embeddings: Tensor, drawn: dict[str, Parts]) -> None:
        shape = self.shape
        ids = self.input("input_ids", INT64, ["batch", "length"])
        lengths = self.lengths(self.input("attention_mask", INT64, ["batch", "total"]))
        cache: list[int | str] = ["batch", shape.kv_heads, "past", shape.head_dim]
        pasts = [
            [self.input(f"past_key_values.{number}.{part}", FLOAT, cache) for part in ("key", "value")]
            for number in range(shape.blocks)
        ]
        cos, sin = rotations(shape, LENGTH, torch.float32, torch.device("cpu"))
        half = shape.head_dim // 2
        tables = [self.constant("cos", cos[:, :half].contiguous()), self.constant("sin", sin[:, :half].contiguous())]
        self.norm = self.constant("norm", torch.ones(shape.hidden))
        rows = self.constant("embeddings", embeddings)
        (places,) = self.add("Mod", [ids, self.constant("rows", torch.tensor(ROWS))], ["places"])
        (x,) = self.add("Gather", [rows, places], ["embedded"], axis=0)
        (y,) = self.add(
            "SimplifiedLayerNormalization", [x, self.norm], ["normed"], axis=-1, epsilon=EPS, stash_type=1
        )  # fmt: skip
        caches: list[ir.Value] = []
        for number, past in enumerate(pasts):
            x, y, present = self.block(number, x, y, [*past, *lengths, *tables], drawn)
            caches += present
        logits = self.product("logits", y, drawn["head"], self.head_bits)
        self.output(logits, ["batch", "length", shape.vocabulary])
        for value in caches:
            self.output(value, ["batch", shape.kv_heads, "total", shape.head_dim])

    def block(
        self, number: int, x: ir.Value, y: ir.Value, attended: list[ir.Value], drawn: dict[str, Parts]
    ) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        """The sum before a block and its norm -> those after it, and the keys and values."""
        shape, at = self.shape, f"layers.{number}"
        rows = {"q": shape.heads * shape.head_dim, "k": shape.kv_heads * shape.head_dim}
        qkv = self.products(at, y, drawn["qkv"], rows | {"v": rows["k"]})
        mixed, *present = self.add(
            "GroupQueryAttention", [*qkv, *attended],
            [f"{at}.attention", f"present.{number}.key", f"present.{number}.value"], MICROSOFT, num_heads=shape.heads,
            kv_num_heads=shape.kv_heads, do_rotary=1, rotary_interleaved=0, scale=shape.head_dim**-0.5,
        )  # fmt: skip
        x, y = self.add_norm(f"{at}.mixed", x, self.product(f"{at}.out", mixed, drawn["out"], BITS))
        gate, up = self.products(at, y, drawn["gate_up"], dict.fromkeys(("gate", "up"), shape.intermediate))
        (sigmoid,) = self.add("Sigmoid", [gate], [f"{at}.sigmoid"])
        (silu,) = self.add("Mul", [gate, sigmoid], [f"{at}.silu"])
        (gated,) = self.add("Mul", [silu, up], [f"{at}.gated"])
        x, y = self.add_norm(f"{at}.made", x, self.product(f"{at}.down", gated, drawn["down"], BITS))
        return x, y, present

    def lengths(self, mask: ir.Value) -> list[ir.Value]:
        """Places of the last tokens, and the number of tokens, of the mask of attention."""
        one = self.constant("one", torch.ones(1, dtype=torch.int64))
        (count,) = self.add("ReduceSum", [mask, one], ["count"], keepdims=0)
        (last,) = self.add("Sub", [count, one], ["last"])
        (sizes,) = self.add("Shape", [mask], ["sizes"])
        (total,) = self.add("Gather", [sizes, self.constant("second", torch.tensor(1))], ["total"], axis=0)
        return [self.add("Cast", [value], [f"{value.name}.int32"], to=int(INT32))[0] for value in (last, total)]

    def products(self, at: str, x: ir.Value, parts: Parts, rows: dict[str, int]) -> list[ir.Value]:
        """Products with matrices that lie one below the other, by their rows."""
        split = {name: part.split(list(rows.values())) for name, part in parts.items()}
        return [
            self.product(f"{at}.{name}", x, {part: split[part][index].contiguous() for part in split}, BITS)
            for index, name in enumerate(rows)
        ]

    def product(self, name: str, x: ir.Value, parts: Parts, bits: int) -> ir.Value:
        rows, blocks, width = parts["codes"].shape
        size = width * 8 // bits
        numbers = {"K": blocks * size, "N": rows, "bits": bits, "block_size": size}
        operands = [self.constant(f"{name}.{part}", tensor) for part, tensor in parts.items()]
        (found,) = self.add(
            "MatMulNBits", [x, *operands], [name], MICROSOFT, accuracy_level=self.accuracy_level, **numbers
        )  # fmt: skip
        return found

    def add_norm(self, name: str, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
        """x + y, and its norm."""
        names = [f"{name}.normed", f"{name}.mean", f"{name}.deviation", f"{name}.sum"]
        found = self.add("SkipSimplifiedLayerNormalization", [x, y, self.norm], names, MICROSOFT, epsilon=EPS)
        return found[3], found[0]

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.val(name, dtype, ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, shape: Sequence[int | str]) -> None:
        value.dtype, value.shape = FLOAT, ir.Shape(shape)
        self.graph.outputs.append(value)

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        return initializer(self.model, name, tensor, DTYPES[tensor.dtype], tensor.shape)

    def add(
        self, operator: str, inputs: Sequence[ir.Value], names: Sequence[str], domain: str = "", **numbers: float
    ) -> list[ir.Value]:
        """A node, and its results with their names."""
        node = ir.node(operator, inputs, numbers, domain=domain, num_outputs=len(names), name=names[0])
        for value, name in zip(node.outputs, names, strict=True):
            value.name = name
        self.graph.append(node)
        return list(node.outputs)
