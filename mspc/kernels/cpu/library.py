"""The C++ library: the one next to this file if it was shipped, else one that is built once into the user's cache.

    MSPC_CPU_ISA    avx512 or portable: that instruction set; torch: no library. Without it, the best there is

Without a compiler everything works in plain torch, and one line says so.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mspc.errors import InputError, in_brief, unknown
from mspc.progress import log
from mspc.storage.files import cache_folder

FOLDER = Path(__file__).parent
NAME = "libmspc_cpu.so"
ISAS = ("portable", "avx512")
"""Instruction sets, the best last. The library knows them by their number here."""
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
AVX512 = ("-mbmi2", "-mpopcnt", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi2", "vnni")))
SOURCES = {"dispatch": (), "portable": (), "repack": (), "avx512": AVX512}
"""Files by name, with the flags of their instruction set."""
ONLY_X86 = ("avx512",)


class Matrix(ctypes.Structure):
    """`mspc_matrix` of interface.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "structure", "content")),
        *((name, ctypes.c_void_p) for name in ("kept", "marks", "starts", "scales", "zeros")),
    ]


def may_be_had() -> bool:
    """Tell if `library` should find the library, or a compiler to build it with."""
    shipped = (FOLDER / NAME).is_file()
    return os.environ.get("MSPC_CPU_ISA") != "torch" and (shipped or _compiler() is not None)


def library() -> ctypes.CDLL | None:
    """The library, or None if MSPC_CPU_ISA is torch, or it is not there and cannot be built."""
    return None if os.environ.get("MSPC_CPU_ISA") == "torch" else _loaded()


def available() -> list[str]:
    """The instruction sets that library and processor both have."""
    loaded = _loaded()
    return [] if loaded is None else [name for number, name in enumerate(ISAS) if loaded.mspc_has(number)]


def isa() -> int:
    """The number of the instruction set in use. Raises InputError if MSPC_CPU_ISA names one that is not there."""
    return _isa(os.environ.get("MSPC_CPU_ISA"))


@cache
def _isa(asked: str | None) -> int:
    found = available()
    if asked in (None, "", "torch"):
        return ISAS.index(found[-1])
    if asked not in ISAS:
        raise unknown("MSPC_CPU_ISA", str(asked), (*ISAS, "torch"))
    if asked not in found:
        raise InputError(f"MSPC_CPU_ISA={asked}, but this machine has only {', '.join(found)}. Choose one of them.")
    return ISAS.index(str(asked))


@cache
def _loaded() -> ctypes.CDLL | None:
    try:
        path = FOLDER / NAME
        loaded = ctypes.CDLL(str(path if path.is_file() else _built()))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "Compressed layers run in plain torch on this CPU, many times slower than in C++: %s. Install g++ 11 or "
            "newer, or a wheel of mspc that holds %s.", in_brief(error), NAME,
        )  # fmt: skip
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.mspc_has.argtypes, loaded.mspc_has.restype = [number], number
    matrix = ctypes.POINTER(Matrix)
    for name, arguments in {
        "lengths": [matrix, pointer, number, number, pointer],
        "pack": [matrix, pointer, pointer, number, number],
        "unpack": [matrix, number, number, pointer, pointer],
        "product": [matrix, number, pointer, number, number, pointer, number, number],
        "expand": [matrix, number, number, pointer, number],
    }.items():
        function = getattr(loaded, f"mspc_{name}")
        function.argtypes, function.restype = arguments, None
    return loaded


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _built() -> Path:
    """The library in the cache, built if it is not there. Raises OSError or SubprocessError."""
    compiler = _compiler()
    if compiler is None:
        raise OSError("there is no C++ compiler")
    said = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = {name: flags for name, flags in SOURCES.items() if is_x86 or name not in ONLY_X86}
    key = hashlib.sha256(repr((said, platform.machine(), FLAGS, sources)).encode())
    for file in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")]):
        key.update(file.read_bytes())
    path = cache_folder() / "cpu" / key.hexdigest()[:16] / NAME
    if not path.is_file():
        log.info("Building the products in C++, once: about half a minute.")
        path.parent.mkdir(parents=True, exist_ok=True)
        build(compiler, sources, ("-DMSPC_X86",) if is_x86 else (), path)
    return path


def build(compiler: str, sources: dict[str, tuple[str, ...]], flags: tuple[str, ...], path: Path) -> None:
    """Compile the files side by side and link them. `path` appears whole, whoever else builds it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        jobs = [
            subprocess.Popen(
                [compiler, *FLAGS, *flags, *of_isa, "-c", str(FOLDER / f"{name}.cpp"), "-o", f"{folder}/{name}.o"],
                stderr=subprocess.DEVNULL,
            )
            for name, of_isa in sources.items()
        ]
        failed = [job.wait() for job in jobs]
        if any(failed):
            raise OSError(f"{compiler} cannot compile {FOLDER}")
        objects = [f"{folder}/{name}.o" for name in sources]
        shared = ["-shared", "-pthread", "-static-libstdc++", "-static-libgcc"]
        subprocess.run([compiler, *shared, *objects, "-o", f"{folder}/{NAME}"], check=True, capture_output=True)
        Path(folder, NAME).replace(path)
