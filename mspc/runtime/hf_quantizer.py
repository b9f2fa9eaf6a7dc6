"""Registers the sparse export with transformers. After `import mspc.hf`, `from_pretrained` loads it as it is stored.

    import mspc.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("out/sparse", device_map="auto")

Linear layers that the export describes become `SparseLinear` before any weight is read, so that the dense model never
exists in memory. `save_pretrained` writes the export again.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter, revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mspc.errors import InputError
from mspc.formats.decoding import check_finite
from mspc.formats.description import StoredMatrix, check_types, types_of
from mspc.model.experts import layer_name
from mspc.model.outer import SCALE, is_lookup
from mspc.runtime.embedding import SparseEmbedding, TiedHead
from mspc.runtime.experts import replace_experts
from mspc.runtime.linear import SparseLinear, prepare
from mspc.storage.checkpoint import map_file
from mspc.storage.sparse_export import QUANT_METHOD, descriptions, slices_of

NO_SLICE = r"(?![\w\[])"
"""An end for patterns of names of parameters, so that they do not match `gate_up_proj[0].codes`."""


def _without_slices(found: WeightConverter) -> WeightConverter:
    sources, targets = found._original_source_patterns, found._original_target_patterns
    made = WeightConverter(
        [pattern + NO_SLICE for pattern in sources], [pattern + NO_SLICE for pattern in targets], found.operations
    )
    for name in ("force_cpu", "scope_prefix", "base_model_prefix"):  # newer versions have a method `copy` for them
        if hasattr(found, name):
            setattr(made, name, getattr(found, name))
    return made


@register_quantization_config(QUANT_METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sparse export, as in its config.json."""

    def __init__(self, **values: Any) -> None:
        """Raises InputError for values that are not valid, and for a format version above that of this mspc."""
        descriptions(values, "quantization_config")
        self.__dict__.update(values)


@register_quantizer(QUANT_METHOD)
class SparseQuantizer(HfQuantizer):
    """Loads and saves sparse exports. Only `mspc compress` makes a sparse model from a dense one."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.name_of: dict[str, str] = {}  # by the module that holds the matrix
        self.head_of: dict[str, str] = {}  # the module of a head, by that of the embeddings which it is tied to

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config.to_dict()
        matrices = descriptions(config, "quantization_config")
        if checkpoint_files:
            check_files(matrices, [Path(file) for file in checkpoint_files])
        experts = {}
        for parameter, slices in slices_of(config, "quantization_config").items():
            owner, _, leaf = parameter.rpartition(".")
            found = f"{_module_of(model, owner)}.{leaf}"
            experts[found] = {index: (name, matrices[name]) for index, name in slices.items()}
            self.name_of |= {layer_name(found, index): name for index, name in slices.items()}
        replace_experts(model, experts)
        for name, matrix in matrices.items():
            if name in self.name_of.values():
                continue
            row = config["matrices"][name]
            parameter = str(row.get("parameter", f"{name}.weight"))
            module_name = _module_of(model, parameter.removesuffix(".weight"))
            replace_layer(model, module_name, matrix, name)
            self.name_of[module_name] = name
            if row.get("tied"):
                head = _module_of(model, row["tied"].removesuffix(".weight"))
                self.head_of |= {module_name: head} if take_head(model, head, matrix, name) else {}
        forget_ties(model, {f"{module}.weight" for module in (*self.name_of, *self.head_of.values())})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module_name, name in self.name_of.items():
            layer = model.get_submodule(module_name)
            assert isinstance(layer, SparseLinear | SparseEmbedding)
            for part, (dtype, _) in layer.matrix.tensors().items():
                # Some models cast some layers to float32; stored tensors keep their dtype.
                setattr(layer, part, getattr(layer, part).to(dtype))
            if not any(tensor.is_meta for tensor in layer.stored().values()):  # offloaded to disk
                layer.check(name)
                check_finite(layer.stored(), name)
        for module_name, head in self.head_of.items():
            embedding, placeholder = model.get_submodule(module_name), model.get_submodule(head)
            assert isinstance(embedding, SparseEmbedding)
            own = TiedHead.of(embedding.stored(), embedding.matrix, placeholder._parameters.get("bias"))
            model.set_submodule(head, own)
        prepare(model, model.dtype, on_cpu=True)
        model.requires_grad_(False)  # a gradient would keep the decoded weights for the backward pass

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> Any:
        """Conversions that transpose a parameter must not take the tensors of its compressed slices.

        Older versions of transformers (5.19) give no model.
        """
        own = [
            _without_slices(found)
            if isinstance(found, WeightConverter) and any(isinstance(op, Transpose) for op in found.operations)
            else found
            for found in weight_conversions
        ]
        return super().update_weight_conversions(own, *model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Rename the matrices in the config of a model that is about to be saved, as its tensors will be named.

        The names change if those of the export lack the prefix of the model.
        """
        config = model.config.quantization_config
        rows = config.matrices
        some_tensor = {module: next(iter(model.get_submodule(module).stored().items())) for module in self.name_of}
        saved = revert_weight_conversion(model, {f"{m}.{part}": tensor for m, (part, tensor) in some_tensor.items()})
        saved_as = {id(tensor): key.rpartition(".")[0] for key, tensor in saved.items()}
        new_name = {m: saved_as[id(tensor)] for m, (_, tensor) in some_tensor.items()}
        config.matrices = {new_name[module]: rows[name] for module, name in self.name_of.items()}
        self.name_of = new_name
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def check_files(matrices: dict[str, StoredMatrix], files: list[Path]) -> None:
    """Raises InputError, naming the matrix, for a tensor that is missing, not described or not of that type."""
    found = {key: kind for file in files for key, kind in types_of(map_file(file)).items()}
    for key in found:
        name, _, part = key.rpartition(".")
        if part in ("codes", "values") and name not in matrices and f"{name}.weight" not in found:
            raise InputError(
                f"{name}: the files hold its {part}, but config.json does not describe it, so its weights would be "
                "random. Get config.json again, or export the artifact again."
            )
    for name, matrix in matrices.items():
        keys = {part: f"{name}.{part}" for part in matrix.tensors()}
        check_types({part: found[key] for part, key in keys.items() if key in found}, matrix, name)


def replace_layer(model: PreTrainedModel, module_name: str, matrix: StoredMatrix, name: str) -> None:
    """Replace a linear layer by a SparseLinear, which keeps its bias, or embeddings by a SparseEmbedding.

    Raises InputError, naming the matrix, if the model has no such layer.
    """
    owner, _, leaf = module_name.rpartition(".")
    try:
        layer: nn.Module = model.get_submodule(module_name)
    except AttributeError:
        layer = nn.Identity()
    if isinstance(layer, nn.Embedding):
        setattr(model.get_submodule(owner), leaf, _embedding_of(layer, matrix, name))
        return
    if not isinstance(layer, nn.Linear | Conv1D):
        raise InputError(
            f"{name}: the model has no linear layer {module_name}. This format has only "
            "linear layers and embeddings. Export the artifact dense if it has others, such as slices of fused experts."
        )
    shape = tuple(layer.weight.shape)[:: -1 if isinstance(layer, Conv1D) else 1]
    if shape != matrix.shape or isinstance(layer, Conv1D) != matrix.transposed:
        raise InputError(
            f"{name}: it is described as {matrix.shape}{', transposed' * matrix.transposed}, but the model's layer is "
            f"a {type(layer).__name__} of {shape}. Export the artifact again; config.json does not fit the weights."
        )
    setattr(model.get_submodule(owner), leaf, SparseLinear(matrix, layer.bias))


def _embedding_of(layer: nn.Embedding, matrix: StoredMatrix, name: str) -> SparseEmbedding:
    if tuple(layer.weight.shape) != matrix.shape or matrix.transposed or matrix.has_mask or not is_lookup(layer):
        raise InputError(
            f"{name}: it is described as {matrix}, but the model's embeddings are a {type(layer).__name__} of "
            f"{tuple(layer.weight.shape)}. Export the artifact again; config.json does not fit the weights."
        )
    return SparseEmbedding(matrix, layer.weight.dtype, getattr(layer, SCALE, None))


def take_head(model: PreTrainedModel, module_name: str, matrix: StoredMatrix, name: str) -> bool:
    """Take the weight out of the head that is tied to a matrix, which gets it once that is loaded.

    False for a model without a head. Raises InputError for one that does not fit the matrix.
    """
    layer = dict(model.named_modules()).get(module_name)
    if layer is None:
        return False
    if type(layer) is not nn.Linear or tuple(layer.weight.shape) != matrix.shape:
        raise InputError(f"{name}: the model has no head {module_name} of {matrix.shape}. Export the artifact again.")
    placeholder = nn.Module()
    placeholder.register_parameter("bias", layer.bias)
    model.set_submodule(module_name, placeholder)
    return True


def forget_ties(model: PreTrainedModel, gone: set[str]) -> None:
    """Parameters that are no more are tied neither while the model is loaded nor by a later `model.tie_weights()`."""

    def left(ties: dict[str, str], prefix: str = "") -> dict[str, str]:
        return {a: b for a, b in ties.items() if prefix + a not in gone and prefix + b not in gone}

    model.all_tied_weights_keys = left(model.all_tied_weights_keys)
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and part._tied_weights_keys:
            part._tied_weights_keys = left(part._tied_weights_keys, f"{name}." if name else "")


def _module_of(model: PreTrainedModel, name: str) -> str:
    """The name of a layer in this model. A model without a head lacks the prefix that one with a head has."""
    names = {found for found, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), name)
