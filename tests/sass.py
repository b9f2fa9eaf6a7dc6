"""Compiles Triton kernels for a GPU that is not there, and counts the machine instructions of their loops."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def build(
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int = 1,
) -> CompiledKernel:
    """Pointers are aligned to 16 bytes, as torch's are, and integers of type `i32/16` are divisible by 16."""
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") or kind.endswith("/16")
    }
    signature = {name: kind.removesuffix("/16") for name, kind in signature.items()}
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, at, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def longest_loop(compiled: CompiledKernel) -> Counter[str]:
    """Counts of the opcodes in the body of the innermost loop with the most instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            instructions.append(instruction[1])
            branch = re.match(r"BRA.*(\.L_x_\d+)", instruction[1])
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(instructions)))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return Counter(re.split(r"[ .]", instruction)[0] for instruction in instructions[first:last])
