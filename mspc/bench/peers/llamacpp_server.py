"""One GGUF file in llama.cpp's own server on the CPU, for llamacpp.py. It imports nothing of mspc.

    python llamacpp_server.py FILE CONTEXT THREADS

Prints the address that it listens at, and ends with standard input. Keys and values are kept in float32, and attention
is computed without fused kernels, which would round them. The file is read into memory, which can have pages of 2 MB.
"""

import os
import sys

import xllamacpp


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = int(sys.argv[2])
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
    params.n_parallel, params.port, params.warmup, params.use_jinja = 1, 0, False, True
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # its own end can wait for ever


if __name__ == "__main__":
    main()
