"""Causal language models that are never whole in memory.

The module tree is built on the meta device. Weights are read from safetensors when a part is needed, and dropped
afterwards. Only this file knows how transformers names, converts and ties weights.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mspc.errors import InputError, in_brief
from mspc.memory import give_back
from mspc.model.auto_class import auto_class
from mspc.model.config_checks import check_sizes, check_tensor, count_blocks, setting_of
from mspc.model.experts import IMPLEMENTATION
from mspc.model.matrices import BlockMatrices, Selection, check_patterns, check_reached, skip_option, sort_block
from mspc.model.on_meta import assign, drop, get_tensor, named_tensors, parameters_on_meta
from mspc.model.own_experts import adopt_experts
from mspc.model.rows import Rows, rows_of_slices
from mspc.model.source_tensors import flips, map_keys, match_ties
from mspc.storage.checkpoint import STORABLE, UNUSED, StoredType, TensorSource
from mspc.types import Matrix


@dataclass(frozen=True)
class Route:
    """The way of hidden states through a model: from each block to the next, in the order of the list."""

    num_outputs: int
    """Length of the tuple that the model expects of its blocks; 0 for hidden states alone."""
    axis: int
    """The axis of the sequences in hidden states; that of the tokens is the next."""
    handed_on: frozenset[int]
    """Lengths of tuples whose other values may reach a later block."""
    outside: tuple[str, ...]
    """Linear layers that run outside of the blocks, without the head."""
    to_next: tuple[tuple[int, int | str], ...] = ()
    """Returned values that the next block alone gets: places in the tuple, and positions or names of its arguments."""
    skipped: frozenset[int] = frozenset()
    """Blocks that text alone does not run, such as those of attention to images."""


class StreamedModel:
    """A causal LM whose parts are loaded while they are used.

    `blocks` are its decoder layers; everything else (embeddings, final norm, head) is the outer part.
    """

    def __init__(
        self, source: TensorSource, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, eager: bool
    ) -> None:
        self.source, self.config, self.device, self.dtype = source, config, device, dtype
        # Some versions of transformers run capped attention through kernels that ignore the cap.
        capped = setting_of(config, "attn_logit_softcapping") is not None
        kernels = "eager" if eager or capped else None
        types = source.types()
        check_sizes(config, types)
        self.model = built(
            config, device, dtype=dtype, attn_implementation=kernels, experts_implementation=IMPLEMENTATION
        )
        for buffered in self.model.modules():
            for name, buffer in buffered.named_buffers(recurse=False):
                setattr(buffered, name, buffer.to(device))
        self.blocks_name, self.blocks = find_blocks(self.model)
        stored_blocks = count_blocks(self.model, self.blocks_name, len(self.blocks), types)
        self.source_tensors = map_keys(self.model, types)
        few = f"It has {stored_blocks} blocks, but by config.json the model has {len(self.blocks)}. "
        match_ties(self.model, self.source_tensors, few if 0 < stored_blocks < len(self.blocks) else "")
        self._check_types(types)
        self._rows: dict[str, list[Rows] | None] = {}
        self.route: Route | None = None
        """Found when the model runs (`mspc.passes.route`)."""
        self.shares = False  # True if blocks write what later ones read; found by `mspc.passes.trial`
        self.unread: set[str] = set()  # weights of linear layers that text does not use, found there as well
        self.source_dtypes: dict[str, torch.dtype] = {}  # of the parameters read so far

    def _check_types(self, types: Mapping[str, StoredType]) -> None:
        """Raises InputError, naming the tensor, for one whose shape or dtype does not fit the model."""
        for name, expected in named_tensors(self.model):
            origin = self.source_tensors.get(name)
            for key in origin.keys if origin else ():
                check_tensor(key, types[key], name, expected, origin is not None and origin.converter is None)

    def block_name(self, index: int) -> str:
        return f"{self.blocks_name}.{index}"

    def name_in_block(self, index: int, matrix: Matrix) -> str:
        """The parameter of a matrix as block `index` names it."""
        return matrix.parameter.removeprefix(self.block_name(index) + ".")

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, which are dropped on exit."""
        block = self.blocks[index]
        prefix = self.block_name(index) + "."
        try:
            self._load({prefix + name: name for name, _ in named_tensors(block)}, block)
            yield block
        finally:
            drop(block, [name for name, _ in named_tensors(block)])
            give_back()

    @contextmanager
    def loaded_outer(self) -> Iterator[PreTrainedModel]:
        """The model with all weights except those of the blocks."""
        inside = self.blocks_name + "."
        names = [name for name, _ in named_tensors(self.model) if not name.startswith(inside)]
        try:
            self._load({name: name for name in names}, self.model)
            yield self.model
        finally:
            drop(self.model, names)

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all of its weights."""
        with ExitStack() as stack:
            model = stack.enter_context(self.loaded_outer())
            for index in range(len(self.blocks)):
                stack.enter_context(self.loaded(index))
            yield model

    def _load(self, names: dict[str, str], module: nn.Module) -> None:
        """Fill the tensors of `module`, given as full name -> name within it. Tied ones stay one tensor."""
        by_identity: dict[int, list[str]] = defaultdict(list)
        for full in names:
            by_identity[id(get_tensor(self.model, full))].append(full)
        for aliases in by_identity.values():
            name = aliases[0]
            if name not in self.source_tensors:
                continue  # a buffer that older checkpoints do not store
            tensor = self.read_parameter(name)
            self.source_dtypes[name] = tensor.dtype
            expected = get_tensor(self.model, name)
            if tensor.shape != expected.shape:
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)} in the checkpoint, but {tuple(expected.shape)} by the "
                    "config. Give the config.json that belongs to the weights."
                )
            if tensor.is_floating_point():
                tensor = tensor.to(expected.dtype)
            tensor = tensor.to(self.device)
            if isinstance(expected, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            for full in aliases:
                assign(module, names[full], tensor)

    def read_parameter(self, name: str) -> Tensor:
        """One parameter or buffer from the source, in the source's dtype."""
        origin = self.source_tensors[name]
        tensors = dict(self.source.read(origin.keys))
        if origin.converter is None:
            return tensors[origin.keys[0]]
        try:
            return self._converted(name, tensors)
        except Exception as error:  # tensors of other shapes, or fewer of them
            raise InputError(
                f"{name} cannot be put together from {origin.keys[0]} and others ({in_brief(error)}). Give the "
                "config.json that belongs to the weights."
            ) from error

    def _converted(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """A parameter that transformers puts together from these tensors of the source. Raises whatever it raises."""
        return self.source_tensors[name].converted(self.model, tensors)[name]

    def rows(self, parameter: str) -> list[Rows] | None:
        """The tensors of the source whose rows make each slice of a 3-D parameter; None if it is not made so."""
        if parameter not in self._rows:
            origin, expected = self.source_tensors[parameter], dict(named_tensors(self.model)).get(parameter)
            if origin.converter is None or expected is None or expected.ndim != 3:
                self._rows[parameter] = None
            else:
                shapes = {key: self.source.types()[key][1] for key in origin.keys}
                self._rows[parameter] = rows_of_slices(shapes, expected.shape, partial(self._converted, parameter))
        return self._rows[parameter]

    def rows_of(self, matrix: Matrix) -> Rows:
        """The tensors of the source that are a slice, one below the other; empty for a matrix that is in one."""
        rows = None if matrix.index is None else self.rows(matrix.parameter)
        return rows[matrix.index] if rows is not None and matrix.index is not None else ()

    def flips(self, parameter: str) -> bool | None:
        """Tell if the source has the slices of a 3-D parameter transposed; None if it is made otherwise."""
        origin = self.source_tensors[parameter]
        expected = get_tensor(self.model, parameter).shape
        return flips(origin, self.source.types()[origin.keys[0]][1], expected) if origin.converter else None

    def in_source(self, matrix: Matrix) -> Matrix:
        """The address of a matrix in the tensor of the source."""
        flipped = matrix.index is not None and bool(self.flips(matrix.parameter))
        return replace(matrix, transposed=matrix.transposed != flipped)

    def num_slices(self, matrix: Matrix) -> int:
        """The number of slices of the parameter of a slice; 0 for a matrix that is a parameter."""
        return 0 if matrix.index is None else len(matrix.slices(self.model.get_parameter(matrix.parameter)))

    def is_stacked(self, matrix: Matrix) -> bool:
        """Tell if a matrix is a part of the rows of a 2-D parameter."""
        return matrix.index is not None and self.model.get_parameter(matrix.parameter).ndim == 2

    def needs_version_2(self, matrices: Iterable[Matrix]) -> bool:
        """Tell if version 1 of artifacts cannot say where a matrix is: rows of a 2-D parameter, or of 3-D tensors."""
        types = self.source.types()
        return any(self.is_stacked(m) or any(len(types[key][1]) > 2 for key, _ in self.rows_of(m)) for m in matrices)

    def compressed_keys(self, matrices: Iterable[Matrix]) -> set[str]:
        """The tensors of the source that are in these matrices."""
        return {key for m in matrices for key in ([key for key, _ in self.rows_of(m)] or [self.tensor_key(m)])}

    def unused(self) -> list[str]:
        """Keys of the source that no parameter or buffer of the model reads, and that transformers would report."""
        names = {name for name, _ in (*named_tensors(self.model), *self.model.named_buffers())}
        used = {key for name, origin in self.source_tensors.items() if name in names for key in origin.keys}
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", rf"\{UNUSED}$"]
        left = [key for key in self.source.keys() if key not in used]  # noqa: SIM118  not a dict
        return [key for key in left if not any(re.search(pattern, key) for pattern in ignored)]

    def tensor_key(self, matrix: Matrix) -> str:
        """The name under which the source stores a matrix, its first rows, or the parameter that it is a slice of."""
        rows = self.rows_of(matrix)
        return rows[0][0] if rows else self.source_tensors[matrix.parameter].keys[0]

    def embedding_keys(self) -> list[str]:
        """The tensors of the source that are matrices outside of the blocks: embeddings and head, tied ones once."""
        inside = self.blocks_name + "."
        names = [name for name, p in self.model.named_parameters() if p.ndim > 1 and not name.startswith(inside)]
        return list(dict.fromkeys(key for name in names for key in self.source_tensors[name].keys))

    def matrices(
        self,
        skip: Sequence[str],
        irregular: Collection[str] = (),
        only: Sequence[str] = (),
        include: Sequence[str] = (),
    ) -> list[list[Matrix]]:
        """The weight matrices of every block to compress, in the order of the module tree.

        Raises InputError when most of a block is no linear layer and `skip` does not name it, or when a matrix has a
        dtype that artifacts do not hold.
        """
        blocks = self.sorted_blocks(skip, irregular, only, include)
        self._check_parts(blocks)
        check_reached(blocks)
        found = [block.matrices for block in blocks]
        if not any(found):
            why = "--skip matches every matrix of every block" + " that --only matches" * bool(only) + ". Skip fewer"
            why = why if skip else "no block has a linear layer. Give another model"
            raise InputError(f"Nothing is left to compress: {why}.")
        self._check_storable(matrix for of_block in found for matrix in of_block)
        self._check_shared(found)
        return found

    def _check_shared(self, found: Sequence[Sequence[Matrix]]) -> None:
        """Raises InputError, naming a pair, for matrices that several blocks share.

        They are known by their tensors, as parameters of a block that was loaded are no longer those of the others, and
        by their parameters, as blocks may share a layer whose tensor the checkpoint holds twice.
        """
        alike: dict[tuple[str | int, int | None], list[tuple[str, str]]] = defaultdict(list)
        for index, of_block in enumerate(found):
            for matrix in of_block:
                names = matrix.name, self.name_in_block(index, matrix)
                for key in (self.tensor_key(matrix), id(self.model.get_parameter(matrix.parameter))):
                    alike[key, matrix.index].append(names)
        shared = [group for group in alike.values() if len(group) > 1]
        if shared:
            (first, _), (second, _), *_ = shared[0]
            raise InputError(
                f"{second} and {first} are one weight shared by several blocks, which mspc cannot compress yet. Leave "
                f"such weights dense with {skip_option(name for group in shared for _, name in group)}."
            )

    def _check_parts(self, blocks: Iterable[BlockMatrices]) -> None:
        """Raises InputError for a block most of whose weights transformers makes of others, as the model is loaded."""
        for block in blocks:
            names = [f"{self.block_name(block.index)}.{name}" for name in block.refused()]
            for name in filter(self._is_remade, names):
                origin = self.source_tensors[name]
                how = "is one of several parts of" if origin.is_part else "has other rows than"
                raise InputError(
                    f"{name} {how} {origin.keys[0]} in the checkpoint, which "
                    "mspc cannot compress there. Save the model first with a tensor for each parameter: "
                    "from_pretrained, save_pretrained(..., save_original_format=False)."
                )

    def _is_remade(self, name: str) -> bool:
        """Tell if transformers makes a parameter of tensors of the source that are no rows of it."""
        origin = self.source_tensors.get(name)
        return bool(origin and origin.converter) and not self.rows(name) and self.flips(name) is None

    def _check_storable(self, matrices: Iterable[Matrix]) -> None:
        """Raises InputError, naming the tensor, for a matrix of a dtype that artifacts do not hold."""
        types = self.source.types()
        for matrix in matrices:
            key = self.tensor_key(matrix)
            if types[key][0] not in STORABLE:
                raise InputError(
                    f"{key} is stored as {types[key][0]}, but mspc compresses weights of {', '.join(STORABLE)}. "
                    "Save the model in float32 first: from_pretrained(..., dtype=torch.float32), save_pretrained."
                )

    def check_selection(
        self, skip: Sequence[str], only: Sequence[str], irregular: Collection[str], include: Sequence[str] = ()
    ) -> None:
        """Raises InputError for a pattern that names nothing: no parameter of a block, or no matrix to compress."""
        parameters = [
            f"{self.block_name(index)}.{name}".removesuffix(".weight")
            for index, block in enumerate(self.blocks)
            for name, _ in block.named_parameters()
        ]
        found = [matrix for block in self.sorted_blocks((), irregular, (), include) for matrix in block.matrices]
        matrices = [matrix.name for matrix in found]
        experts = [matrix.parameter for matrix in found if matrix.index == 0]
        selectors = [
            f"{self.block_name(block.index)}.{name}".removesuffix(".weight")
            for block in self.sorted_blocks(skip, irregular, only)
            for name in block.selectors
        ]
        check_patterns("--skip", skip, [*parameters, *matrices])
        check_patterns("--only", only, [*matrices, *experts])
        check_patterns("--include", include, selectors)

    def sorted_blocks(
        self,
        skip: Sequence[str],
        irregular: Collection[str] = (),
        only: Sequence[str] = (),
        include: Sequence[str] = (),
    ) -> list[BlockMatrices]:
        """The parameters of every block by what can be done with them.

        `irregular` are weights of layers that their block does not call exactly once.
        """
        selection = Selection(skip, only, include)
        remade = set(filter(self._is_remade, self.source_tensors))
        parts = self.config, selection, remade.union(irregular), self.unread
        return [
            sort_block(index, self.block_name(index) + ".", block, *parts) for index, block in enumerate(self.blocks)
        ]


def built(config: PreTrainedConfig, device: torch.device, **options: Any) -> PreTrainedModel:
    """The model of a config, on meta. Raises InputError where transformers cannot make one."""
    try:
        with device if device.type == "meta" else parameters_on_meta():
            model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # whatever a size or name that does not fit the others leads to
        raise InputError(
            f"{config.name_or_path}: no model can be built by its config.json ({in_brief(error)}). Give the "
            "config.json that belongs to the weights."
        ) from error
    adopt_experts(model)
    return model.eval()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList with the most parameters in the text decoder: its layers.

    Towers for images and sound are models within the model, with configs of their own, and do not count.
    """
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    towers = [f"{name}." for name in other_models(model)]
    lists = [found for found in lists if not any(found[0].startswith(tower) for tower in towers)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of decoder layers. Give a causal language model with one."
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def other_models(model: nn.Module) -> list[str]:
    """The models within a model that its config does not call the text model: their configs are other parts of it."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return []
    text = config.get_text_config(decoder=True)
    within = [id(part) for part in (text, *_parts(text))]
    around = [id(part) for part in _parts(config) if any(text is inner for inner in _parts(part))]
    others = {type(part) for part in _parts(config) if id(part) not in (*within, *around)} - {type(text)}
    models = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    return [name for name, module in models if name and type(module.config) in others]


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configs within a config, at any depth."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [*inner, *(part for one in inner for part in _parts(one))]
