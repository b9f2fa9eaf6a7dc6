"""The tensors of a checkpoint that each parameter is made of, by the renamings and conversions of transformers.

A parameter may be one tensor, several tensors, or a part of one.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming, rename_source_key

from mspc.errors import InputError, in_brief
from mspc.model.on_meta import assign, get_tensor, named_tensors
from mspc.storage.checkpoint import StoredType


@dataclass(frozen=True)
class SourceTensors:
    """The keys of a parameter in the source, and the conversion, unless it is simply the one tensor."""

    keys: list[str]
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()
    layer: str = ""
    """The parameter by which transformers names the conversion: the first that it makes."""
    is_part: bool = False
    """True if the conversion makes other parameters as well."""

    def converted(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name, as transformers makes them from tensors by key. Raises whatever it raises."""
        converter = copy.deepcopy(self.converter)
        assert converter is not None
        for key, pattern in zip(self.keys, self.patterns, strict=True):
            ready: Future[Tensor] = Future()
            ready.set_result(tensors[key])
            converter.add_tensor(self.layer, key, pattern, ready)
        found = converter.convert(self.layer, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}


def flips(origin: SourceTensors, stored: tuple[int, ...], expected: Sequence[int]) -> bool | None:
    """Tell if the slices of a 3-D parameter are transposed in its tensor; None if that is not all of the conversion.

    Transformers leaves some as they are whose shape is that of the parameter.
    """
    operations = origin.converter.operations if origin.converter is not None else []
    if len(operations) != 1 or not isinstance(operations[0], Transpose) or len(stored) != 3 or len(origin.keys) != 1:
        return None
    (operation,) = operations
    if {operation.dim0 % 3, operation.dim1 % 3} != {1, 2}:
        return None
    return not (operation.check_dims and stored == tuple(expected))


def map_keys(model: PreTrainedModel, types: Mapping[str, StoredType]) -> dict[str, SourceTensors]:
    """Parameter name -> its tensors in the source.

    Raises InputError, naming the tensor, for one that cannot be taken apart as transformers does.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names = dict(named_tensors(model))
    rename = partial(rename_source_key, base_model_prefix=model.base_model_prefix, meta_state_dict=names)
    found: dict[str, SourceTensors] = {}
    parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in sorted(types, key=_natural):
        name, pattern = rename(key, renamings, converters)
        if name not in names and key in names:
            name, pattern = key, None
        if pattern is None:
            found[name] = SourceTensors([key])
        else:
            parts[name].append((key, pattern))
    for name, of_name in parts.items():
        keys, patterns = [key for key, _ in of_name], tuple(pattern for _, pattern in of_name)
        origin = SourceTensors(keys, converter_of[patterns[0]], patterns, name)
        found |= _targets(model, origin, types)
    return found


def _targets(
    model: PreTrainedModel, origin: SourceTensors, types: Mapping[str, StoredType]
) -> dict[str, SourceTensors]:
    """The parameters that a conversion makes: those that it makes of tensors without content."""
    converter = origin.converter
    assert converter is not None
    if len(converter.target_patterns) == 1 and "*" not in converter.target_patterns[0]:
        return {origin.layer: origin}
    shown = {key: torch.empty(types[key][1], device="meta") for key in origin.keys}
    try:
        made = origin.converted(model, shown)
    except Exception as error:  # whatever the operation raises
        raise InputError(
            f"{origin.keys[0]} cannot be taken apart as transformers does ({in_brief(error)}). Give the config.json "
            "that belongs to the weights."
        ) from error
    return {name: SourceTensors(origin.keys, converter, origin.patterns, origin.layer, len(made) > 1) for name in made}


def match_ties(model: nn.Module, source_tensors: dict[str, SourceTensors], known_cause: str) -> None:
    """Untie weights that the checkpoint stores separately, as transformers does. The other ties share one entry.

    Raises InputError for a parameter that the checkpoint does not hold under any of its names.
    """
    by_identity: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(model):
        by_identity[id(tensor)].append(name)
    for aliases in by_identity.values():
        known = [name for name in aliases if name in source_tensors]
        tensor = get_tensor(model, aliases[0])
        if not isinstance(tensor, nn.Parameter):
            continue
        if not known:
            raise InputError(
                f"The checkpoint holds no {aliases[0]}, which the model needs. {known_cause}It is incomplete, or its "
                "config.json is of another model: get it again."
            )
        for name in known[1:]:
            assign(model, name, nn.Parameter(tensor, requires_grad=False))
        for name in set(aliases) - set(known):
            source_tensors[name] = source_tensors[known[0]]


def _natural(key: str) -> list[tuple[int, str]]:
    """Sort key that puts experts.10 after experts.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
