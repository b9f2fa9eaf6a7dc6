"""Modules whose parameters have a shape but no memory, and the tensors of a module by name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, new modules get parameters on meta but real buffers, because some buffers (rotary) are computed."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, as a checkpoint may hold them; tied ones under each of their names."""
    yield from module.state_dict(keep_vars=True).items()


def get_tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    table[leaf] = tensor


def drop(module: nn.Module, names: Sequence[str]) -> None:
    """Put parameters back on meta, tied ones still tied. Buffers stay, as they cannot be computed again."""
    on_meta: dict[int, nn.Parameter] = {}
    for name in names:
        tensor = get_tensor(module, name)
        if isinstance(tensor, nn.Parameter):
            # Keyed by identity while the real tensor is alive in the dict of another alias or in `tensor` itself.
            fresh = on_meta.setdefault(id(tensor), nn.Parameter(tensor.to("meta"), requires_grad=False))
            assign(module, name, fresh)
