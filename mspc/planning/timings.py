"""Timings of a device: milliseconds of each part of a token, for the shapes of one model. A JSON file holds them.

    {"format_version": 2, "device": "...", "threads": 1, "kernels": "...", "date": "...",
     "group_size": 128, "symmetric": true, "sizes": {"hidden": 2048, ...},
     "rest_ms": 1.5, "lookup_ms": 0.1,
     "products": [{"shape": [512, 2048], "kind": "mask", "numbers": "int4", "sparsity": 0.5, "ms": 0.05}, ...]}

A product has one token. Its kind is `dense`, `2:4`, `mask` (any other zeros, which a CPU keeps behind a bitmap, or as
dense codes where these are faster), or `torch` (the product of torch, of dense weights); its numbers are int8 to int2,
or a dtype.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mspc.errors import InputError
from mspc.planning.token_work import Size, Sizes
from mspc.settings import ROW
from mspc.storage.files import write_json
from mspc.types import NM, Target

FORMAT_VERSION = 2
DENSE, TWO_FOUR, MASK, TORCH = "dense", "2:4", "mask", "torch"
KINDS = (DENSE, TWO_FOUR, MASK, TORCH)
BATCH, CONTEXT = 1, 128
"""The token that is timed: one sequence, after this many others."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product that was timed."""

    shape: Size
    kind: str
    numbers: str
    sparsity: float = 0.0


@dataclass(frozen=True)
class Timings:
    """Milliseconds by part of a token."""

    device: str
    threads: int
    kernels: str
    """Versions, and the instruction set."""
    date: str
    group_size: int | None
    """The group size of all products with codes, as the settings of a run have it."""
    symmetric: bool
    sizes: Sizes
    rest_ms: float
    """All but the linear layers and the head: attention, norms, rotations, embeddings."""
    lookup_ms: float
    """The further time of embeddings of 8 bits."""
    products: Mapping[Product, float]

    @property
    def origin(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.device}, {threads}, {self.kernels}, measured on {self.date}"

    def of_target(self, shape: Size, target: Target, dtype: torch.dtype) -> float:
        """Milliseconds of the product with a compressed matrix whose values, without a grid, have this dtype.

        Between the sparsities that were timed they are interpolated; beyond, the nearest counts. Raises InputError,
        naming the shape, if it was not timed.
        """
        numbers = name_of(dtype) if target.bits is None else f"int{target.bits}"
        kind = kind_of(target)
        if kind != MASK:
            return self._at(Product(shape, kind, numbers))
        known = sorted(
            (product.sparsity, ms)
            for product, ms in self.products.items()
            if (product.shape, product.kind, product.numbers) == (shape, MASK, numbers)
        )
        if not known:
            raise self._missing(Product(shape, MASK, numbers))
        right = bisect_left(known, (target.pattern.sparsity, -1.0))
        if right in (0, len(known)):
            return known[min(right, len(known) - 1)][1]
        (low, first), (high, last) = known[right - 1], known[right]
        return first + (last - first) * (target.pattern.sparsity - low) / (high - low)

    def of_torch(self, shape: Size, dtype: torch.dtype) -> float:
        """Milliseconds of torch's product with a dense matrix of this dtype."""
        return self._at(Product(shape, TORCH, name_of(dtype)))

    def _at(self, product: Product) -> float:
        if product not in self.products:
            raise self._missing(product)
        return self.products[product]

    def _missing(self, product: Product) -> InputError:
        rows, columns = product.shape
        return InputError(
            f"The timings of {self.device} have no {product.kind} product of {rows}x{columns} with {product.numbers}. "
            "Make them for this model with `mspc timings`."
        )


def kind_of(target: Target) -> str:
    """The kind of a product by its pattern. Every N:M but 2:4 is like a mask on a CPU."""
    if target.pattern.sparsity == 0:
        return DENSE
    return TWO_FOUR if target.pattern == NM(2, 4) else MASK


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_timings(path: Path, timings: Timings) -> None:
    values: dict[str, Any] = {"format_version": FORMAT_VERSION}
    values |= {field.name: getattr(timings, field.name) for field in fields(timings)}
    values["group_size"], values["sizes"] = timings.group_size or ROW, asdict(timings.sizes)
    values["products"] = [asdict(product) | {"ms": ms} for product, ms in timings.products.items()]
    write_json(path, values)


def read_timings(path: Path) -> Timings:
    """Raises InputError for a file that is missing, damaged, or of another format."""
    check_there(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"Timings {path} have format {values['format_version']}, and this mspc reads {FORMAT_VERSION}. "
                "Write them again with `mspc timings`."
            )
        return _timings_of(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"Timings {path} cannot be read ({error!r}). Write them with `mspc timings`.") from error


def check_there(path: Path) -> None:
    """Raises InputError for a file that is missing."""
    if not path.is_file():
        raise InputError(f"Timings {path} do not exist (looked for {path.absolute()}). Write them with `mspc timings`.")


def _timings_of(values: dict[str, Any]) -> Timings:
    group = values["group_size"]
    products = {}
    for row in values["products"]:
        rows, columns = map(int, row["shape"])
        product = Product((rows, columns), row["kind"], str(row["numbers"]), float(row.get("sparsity", 0.0)))
        if product.kind not in KINDS:
            raise ValueError(f"kind {product.kind!r}")
        products[product] = _positive(row["ms"])
    return Timings(
        str(values["device"]), int(values["threads"]), str(values["kernels"]), str(values["date"]),
        None if group == ROW else int(group), bool(values["symmetric"]), Sizes(**values["sizes"]),
        _positive(values["rest_ms"]), _positive(values["lookup_ms"]), products,
    )  # fmt: skip


def _positive(value: Any) -> float:
    ms = float(value)
    if not 0 <= ms < float("inf"):
        raise ValueError(f"{value} ms")
    return ms
