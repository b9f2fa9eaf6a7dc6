"""The C++ library under sanitizers, with matrices that were spoiled at random, and on another processor.

Oracle: AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the first read or write outside of a
part, or the first operation that C++ does not define. Every part has memory of its own, of exactly its size.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from mspc.kernels.cpu import building

DRIVER = Path(__file__).with_name("cpu_fuzz.cpp")
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COMMON = (
    "-std=c++17",
    "-pthread",
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-DMSPC_FINGERPRINT=1",
)
ROUNDS = 1500


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def driver(compiler: str, flags: tuple[str, ...], sources: dict[str, tuple[str, ...]], folder: Path) -> Path:
    """The driver with the sources of the library, compiled with `flags`."""
    include = f"-I{building.FOLDER}"
    for name, of_isa in sources.items():
        run(compiler, *COMMON, *flags, *of_isa, "-c", building.FOLDER / f"{name}.cpp", "-o", folder / f"{name}.o")
    objects = [folder / f"{name}.o" for name in sources]
    run(compiler, *COMMON, *flags, include, DRIVER, *objects, "-o", folder / "driver")
    return folder / "driver"


def check(said: str) -> str:
    """Some of what was spoiled can still be read, as a wrong code is a code; much cannot. Returns the digest."""
    *numbers, digest = said.split(", ")
    whole, taken, refused = (int(part.split()[0]) for part in numbers)
    assert whole == taken + refused
    assert taken > whole // 20
    assert refused > whole // 4
    return digest


@pytest.fixture(scope="module")
def compiler() -> str:
    found = building.compiler()
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


@pytest.mark.slow
def test_spoiled_matrices_are_refused_or_read_within_bounds(compiler, tmp_path):
    flags = (*SANITIZERS, *(("-DMSPC_X86",) if building.is_x86() else ()))
    program = driver(compiler, flags, building.sources(), tmp_path)
    for seed in range(2):
        check(run(program, str(ROUNDS), str(seed)))


@pytest.mark.slow
def test_arm_gives_the_same_bits(compiler, tmp_path):
    """Oracle: the portable products here. Debian: apt-get install g++-aarch64-linux-gnu qemu-user."""
    for_arm, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if for_arm is None or emulator is None:
        pytest.skip("there is no compiler or no emulator for Arm")
    digests = []
    for name, start, flags in [(compiler, [], ("-O2",)), (for_arm, [emulator], ("-O2", "-static"))]:
        folder = tmp_path / Path(name).name
        folder.mkdir()
        sources = {name: flags for name, flags in building.SOURCES.items() if name not in building.ONLY_X86}
        digests.append(check(run(*start, driver(name, flags, sources, folder), "300", "0")))
    assert digests[0] == digests[1]
