"""Import this, and `from_pretrained` of transformers loads sparse exports; see `mspc.runtime.hf_quantizer`."""

import mspc.runtime.hf_quantizer  # noqa: F401  registers the format
