"""Compiles the C++ library. It imports nothing but the standard library, as `setup.py` runs it on its own.

A library carries the fingerprint of its sources, so that one of another version is not taken.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
NAME = "libmspc_cpu.so"
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fopenmp-simd",
)
LINK: tuple[str, ...] = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc")
if sys.platform == "linux":
    LINK += ("-Wl,-s", "-Wl,--exclude-libs,ALL", "-Wl,-z,nodelete")
"""The runtime of C++ is inside, and shows none of its names, so that it cannot be mixed up with another one. The
library stays when ONNX Runtime unloads it: at their end, threads still call what frees their memory."""
AVX512 = ("-mbmi2", "-mpopcnt", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi2", "vnni")))
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt")
SOURCES = {
    "dispatch": (),
    "check": (),
    "portable": (),
    "repack": (),
    "step": (),
    "onnx": (),
    "avx2": AVX2,
    "avx512": AVX512,
}
"""Files by name, with the flags of their instruction set."""
ONLY_X86 = ("avx2", "avx512")


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def sources() -> dict[str, tuple[str, ...]]:
    """The files for this machine, with their flags."""
    return {name: flags for name, flags in SOURCES.items() if is_x86() or name not in ONLY_X86}


def fingerprint() -> int:
    """63 bits of the digest of sources and flags."""
    key = hashlib.sha256(repr((FLAGS, LINK, SOURCES)).encode())
    for file in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")]):
        key.update(file.name.encode() + file.read_bytes())
    return int.from_bytes(key.digest()[:8], "little") >> 1


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(compiler: str, path: Path) -> None:
    """Compile the files side by side and link them. `path` appears whole, whoever else builds it.

    Raises OSError or SubprocessError.
    """
    shared = (*FLAGS, f"-DMSPC_FINGERPRINT={fingerprint()}", *(("-DMSPC_X86",) if is_x86() else ()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        jobs = [
            subprocess.Popen(
                [compiler, *shared, *flags, "-c", str(FOLDER / f"{name}.cpp"), "-o", f"{folder}/{name}.o"],
                stderr=subprocess.DEVNULL,
            )
            for name, flags in sources().items()
        ]
        failed = [job.wait() for job in jobs]
        if any(failed):
            raise OSError(f"{compiler} cannot compile {FOLDER}")
        objects = [f"{folder}/{name}.o" for name in sources()]
        subprocess.run([compiler, *objects, *LINK, "-o", f"{folder}/{NAME}"], check=True, capture_output=True)
        Path(folder, NAME).replace(path)
