"""The C++ library: the one next to this file if it was shipped, else one that is built once into the user's cache.

    MSPC_CPU_ISA    avx512, avx2 or portable: that instruction set; torch: no library. Without it, the best there is

Without a compiler everything works in plain torch, and one line says so.
"""

import ctypes
import hashlib
import os
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

from mspc.errors import InputError, in_brief, unknown
from mspc.kernels.cpu import building
from mspc.progress import log
from mspc.storage.files import cache_folder

OPENMP = re.compile(r"lib(gomp|omp|iomp5)\b")
"""File names of OpenMP libraries that have GOMP_parallel."""
ISAS = ("portable", "avx2", "avx512")
"""Instruction sets, the best last. The library knows them by their number here."""

REMEDY = f"Install g++ 11 or newer, or a wheel of mspc that holds {building.NAME}."


class Matrix(ctypes.Structure):
    """`mspc_matrix` of interface.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "structure", "content")),
        *((name, ctypes.c_void_p) for name in ("kept", "marks", "starts", "scales", "zeros")),
    ]


def may_be_had() -> bool:
    """Tell if `library` should find the library, or a compiler to build it with."""
    shipped = (building.FOLDER / building.NAME).is_file()
    return os.environ.get("MSPC_CPU_ISA") != "torch" and (shipped or building.compiler() is not None)


def check_there() -> None:
    """Raises InputError, with the remedy, if the library is not wanted, or cannot be had."""
    if os.environ.get("MSPC_CPU_ISA") == "torch":
        raise InputError("MSPC_CPU_ISA=torch leaves out mspc's C++ library, which ONNX weights need. Unset it.")
    if not may_be_had():
        raise InputError(f"Weights in ONNX need mspc's C++ library, and there is no C++ compiler. {REMEDY}")


def onnx_library() -> Path:
    """The file for `register_custom_ops_library` of ONNX Runtime: the library has the operator `ai.mspc::MatMul`.

    It is built at the first call where it was not shipped. Raises InputError, with the remedy, if it cannot be had.
    """
    check_there()
    loaded = _loaded()
    if loaded is None:
        raise InputError(f"mspc's C++ library cannot be built or loaded here. {REMEDY}")
    return Path(loaded._name)


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


def fits(matrix: Matrix, num_bytes: list[int]) -> bool:
    """Tell if every read stays within these bytes of kept, marks, starts, scales and zeros (0: not there)."""
    loaded = library()
    assert loaded is not None
    return bool(loaded.mspc_fits(ctypes.byref(matrix), (ctypes.c_int64 * 5)(*num_bytes)))


@cache
def _loaded() -> ctypes.CDLL | None:
    shipped = building.FOLDER / building.NAME
    if shipped.is_file():
        try:
            return _opened(shipped)
        except OSError as error:
            log.info("%s cannot be used: %s. A compiler is looked for.", shipped, in_brief(error))
    try:
        return _opened(_built())
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "Compressed layers run in plain torch on this CPU, many times slower than in C++: %s. %s",
            in_brief(error), REMEDY,
        )  # fmt: skip
        return None


def _opened(path: Path) -> ctypes.CDLL:
    """The library in a file. Raises OSError if it is missing, or built from other sources."""
    loaded = ctypes.CDLL(str(path))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    built_from = getattr(loaded, "mspc_fingerprint", None)
    if built_from is not None:
        built_from.argtypes, built_from.restype = [], number
    if built_from is None or built_from() != building.fingerprint():
        raise OSError("it was built from other sources")
    loaded.mspc_has.argtypes, loaded.mspc_has.restype = [number], number
    matrix = ctypes.POINTER(Matrix)
    loaded.mspc_fits.argtypes, loaded.mspc_fits.restype = [matrix, ctypes.POINTER(number)], number
    for name, arguments in {
        "lengths": [matrix, pointer, pointer, number, number, pointer],
        "pack": [matrix, pointer, pointer, number, number],
        "unpack": [matrix, number, number, pointer, pointer],
        "product": [matrix, number, pointer, number, number, pointer, number, number],
        "products": [ctypes.POINTER(matrix), number, number, pointer, pointer, number, number],
        "expand": [matrix, number, number, pointer, number],
        "step": [pointer, pointer, number, pointer, number],
    }.items():
        function = getattr(loaded, f"mspc_{name}")
        function.argtypes, function.restype = arguments, None
    loaded.mspc_step_floats.argtypes, loaded.mspc_step_floats.restype = [pointer], number
    loaded.mspc_use_team.argtypes, loaded.mspc_use_team.restype = [pointer], None
    if (team := _team_of_torch()) is not None:
        loaded.mspc_use_team(team)
    return loaded


def _team_of_torch() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch has loaded, if there is one."""
    with suppress(OSError):
        paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
        for path in sorted(path for path in paths if "torch" in path and OPENMP.match(Path(path).name)):
            with suppress(OSError, AttributeError):
                return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
    return None


def _built() -> Path:
    """The library in the cache, built if it is not there. Raises OSError or SubprocessError."""
    compiler = building.compiler()
    if compiler is None:
        raise OSError("there is no C++ compiler")
    said = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(repr((said, building.sources(), building.fingerprint())).encode())
    path = cache_folder() / "cpu" / key.hexdigest()[:16] / building.NAME
    if not path.is_file():
        log.info("Building the products in C++, once: about half a minute.")
        building.build(compiler, path)
    return path
