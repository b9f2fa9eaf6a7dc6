"""The entry point of vLLM (`vllm.general_plugins`): sparse exports are served as they are stored. See docs/serving.md.

    vllm serve out/small-sparse

vLLM calls `register` in each of its processes. So nothing heavy is imported before, and what is wrong with an
installation is said by the method that vLLM asks for, not lost in its log of plug-ins.
"""

from mspc.errors import InputError
from mspc.storage.sparse_export import QUANT_METHOD


def register() -> None:
    """Make the `quant_method` of sparse exports, and the loader that makes matrices dense, known to vLLM.

    Raises InputError for a vLLM whose interface is not the one that this was written for.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.model_loader import register_model_loader

        from mspc.serving.config import LOAD_FORMAT, SparseConfig
        from mspc.serving.loader import ExpandingLoader
    except ImportError as error:
        raise InputError(
            f"This version of vLLM does not have what mspc needs ({error}). docs/serving.md names those that it was "
            "run with: install one of them."
        ) from error
    register_quantization_config(QUANT_METHOD)(SparseConfig)
    register_model_loader(LOAD_FORMAT)(ExpandingLoader)
