"""The entry point of vLLM (`vllm.general_plugins`): sparse exports are served as they are stored. See docs/serving.md.

    vllm serve out/small-sparse

vLLM calls `register` in each of its processes, whatever model it serves. So all else is imported there, and a version
of vLLM that lacks something is a warning: it must still serve its other models.
"""

from mspc.progress import log


def register() -> None:
    """Make the `quant_method` of sparse exports, and the loader that makes matrices dense, known to vLLM."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.model_loader import register_model_loader

        from mspc.serving.config import LOAD_FORMAT, SparseConfig
        from mspc.serving.loader import ExpandingLoader
    except ImportError as error:
        log.warning(
            "Sparse exports of mspc cannot be served: this version of vLLM does not have what mspc needs (%s). Install "
            "one of those that docs/serving.md of mspc names.", error,
        )  # fmt: skip
        return
    register_quantization_config("mspc")(SparseConfig)
    register_model_loader(LOAD_FORMAT)(ExpandingLoader)
