"""The Triton kernels. Only `mspc.kernels.launch.on_gpu` imports from here, so that mspc works without Triton."""
