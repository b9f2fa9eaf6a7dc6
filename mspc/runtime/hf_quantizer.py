"""The sparse export in transformers: after `import mspc.hf`, `from_pretrained` loads it as it is stored.

    import mspc.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("out/sparse", device_map="auto")

Linear layers that the export describes become `SparseLinear` before any weight is read, so that the dense model is
never there; `save_pretrained` writes the export again.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mspc.errors import InputError
from mspc.formats.description import StoredMatrix, check_types, types_of
from mspc.runtime.linear import SparseLinear, prepare
from mspc.storage.checkpoint import map_file
from mspc.storage.sparse_export import QUANT_METHOD, descriptions


@register_quantization_config(QUANT_METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sparse export, as it stands in its config.json."""

    def __init__(self, **values: Any) -> None:
        """Raises InputError for what cannot be meant, and for a version above our own."""
        descriptions(values, "quantization_config")
        self.__dict__.update(values)


@register_quantizer(QUANT_METHOD)
class SparseQuantizer(HfQuantizer):
    """Loads and saves; it makes no sparse model out of a dense one, which is what `mspc compress` does."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.name_of: dict[str, str] = {}  # by the module that holds the matrix

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config.to_dict()
        described = descriptions(config, "quantization_config")
        if checkpoint_files:
            check_files(described, [Path(file) for file in checkpoint_files])
        for name, matrix in described.items():
            parameter = str(config["matrices"][name].get("parameter", f"{name}.weight"))
            module_name = _module_of(model, parameter.removesuffix(".weight"))
            replace_linear(model, module_name, matrix, name)
            self.name_of[module_name] = name

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module_name, name in self.name_of.items():
            layer = model.get_submodule(module_name)
            assert isinstance(layer, SparseLinear)
            for part, (dtype, _) in layer.matrix.tensors().items():
                # Some models keep some layers in float32; what is stored stays as it is stored.
                setattr(layer, part, getattr(layer, part).to(dtype))
            if not any(tensor.is_meta for tensor in layer.stored().values()):  # offloaded to disk
                layer.check(name)
        prepare(model, model.dtype)
        model.requires_grad_(False)  # a gradient would keep the decoded weights for the backward pass

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called before a model is saved: its config takes on the names that its tensors are about to get, which are
        other ones where the export had them without the prefix of the model."""
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


def check_files(described: dict[str, StoredMatrix], files: list[Path]) -> None:
    """Raises InputError, naming the matrix, for a tensor that is missing or not of the type described."""
    found = {key: of for file in files for key, of in types_of(map_file(file)).items()}
    for name, matrix in described.items():
        keys = {part: f"{name}.{part}" for part in matrix.tensors()}
        check_types({part: found[key] for part, key in keys.items() if key in found}, matrix, name)


def replace_linear(model: PreTrainedModel, module_name: str, matrix: StoredMatrix, name: str) -> None:
    """Put a SparseLinear in the place of a linear layer, whose bias it keeps.

    Raises InputError, naming the matrix, where the model has no such layer.
    """
    owner, _, leaf = module_name.rpartition(".")
    try:
        layer: nn.Module = model.get_submodule(module_name)
    except AttributeError:
        layer = nn.Identity()
    if not isinstance(layer, nn.Linear | Conv1D):
        raise InputError(
            f"{name}: the model has no linear layer {module_name}. A matrix that is none, such as a slice of fused "
            "experts, is not loaded from this format; export it dense."
        )
    shape = tuple(layer.weight.shape)[:: -1 if isinstance(layer, Conv1D) else 1]
    if shape != matrix.shape or isinstance(layer, Conv1D) != matrix.transposed:
        raise InputError(
            f"{name}: it is described as {matrix.shape}{', transposed' * matrix.transposed}, and the model's layer is "
            f"a {type(layer).__name__} of {shape}; config.json and the weights do not belong together."
        )
    setattr(model.get_submodule(owner), leaf, SparseLinear(matrix, layer.bias))


def _module_of(model: PreTrainedModel, name: str) -> str:
    """The name of a layer in this model: one without a head lacks the prefix that the one with a head has."""
    names = {found for found, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), name)
