"""sdist and wheels in fresh environments, with and without a C++ compiler. Oracle: pip, auditwheel, and float64."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from mspc.kernels.cpu import building

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PLATFORM = "manylinux_2_34_x86_64"
COPIED = ("mspc", "exporters", "pyproject.toml", "setup.py", "README.md", "LICENSE")
PROBE = """
import json, logging
import torch
import mspc
from kernel_cases import HALF, stored
from mspc.formats import layout
from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu import kernel, library
from mspc.types import Grid
said = []
class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("mspc").addHandler(Said())
matrix = StoredMatrix((37, 384), HALF, Grid(4), torch.bfloat16)
found, error = library.library(), None
if found is not None:
    x, tensors = torch.randn(3, 384), stored(matrix)
    expected = x.double() @ layout.unpack(tensors, matrix.shape, matrix.target, torch.float32).weight.double().T
    product = kernel.product(x, kernel.repack(tensors, matrix), matrix)
    error = float((product - expected).norm() / expected.norm())
print(json.dumps({"home": mspc.__file__, "library": found and found._name, "error": error, "said": said}))
"""


def run(*command: str | Path, **more) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clean(**more: str) -> dict[str, str]:
    """The environment without a compiler, as PATH is empty."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH", "MSPC_CPU_ISA")}
    return kept | {"PATH": ""} | more


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Unpacked."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    name = run(sys.executable, "-c", build, cwd=folder, env=clean()).split()[-1]
    shutil.unpack_archive(folder / "dist" / name, folder / "unpacked")
    return folder / "unpacked" / name.removesuffix(".tar.gz")


def wheel_of(sdist: Path, out: Path, env: dict[str, str]) -> Path:
    options = "--no-deps", "--no-build-isolation", "--disable-pip-version-check"
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", out, sdist, env=env)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def plain(sdist, tmp_path_factory) -> Path:
    """Made without a compiler."""
    return wheel_of(sdist, tmp_path_factory.mktemp("plain"), clean())


@pytest.fixture(scope="module")
def with_library(sdist, tmp_path_factory) -> Path:
    if building.compiler() is None or not building.is_x86() or sys.platform != "linux":
        pytest.skip("there is no C++ compiler for Linux on x86")
    env = os.environ | {"MSPC_WHEEL_PLATFORM": PLATFORM}
    return wheel_of(sdist, tmp_path_factory.mktemp("with_library"), env)


def probe(wheel: Path, folder: Path, env: dict[str, str]) -> dict:
    """A report from a fresh environment with this wheel. Its other packages are those of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    options = "--no-deps", "--no-index", "--disable-pip-version-check"
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, env=clean())
    purelib = next(folder.glob("lib/python*/site-packages"))
    (purelib / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    env = env | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT / "tests")}
    found = json.loads(run(python, "-c", PROBE, env=env, cwd=folder).splitlines()[-1])
    assert Path(found["home"]).is_relative_to(purelib)
    return found


def test_a_wheel_brings_the_library(with_library, tmp_path):
    assert with_library.name.endswith(f"-py3-none-{PLATFORM}.whl")
    found = probe(with_library, tmp_path / "env", clean())
    assert Path(found["library"]).is_relative_to(tmp_path / "env" / "lib")
    assert found["error"] < 1e-4
    assert found["said"] == []
    assert not (tmp_path / "env" / "cache" / "mspc" / "cpu").exists()


def test_a_wheel_keeps_to_its_tag(with_library):
    pytest.importorskip("auditwheel")
    found = run(sys.executable, "-m", "auditwheel", "show", with_library)
    (tag,) = re.findall(r'following\s+platform\s+tag:\s+"(\w+)"', found)
    assert tag == PLATFORM


def test_a_wheel_needs_the_c_library_only(with_library, tmp_path):
    """Oracle: objdump."""
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump")
    with ZipFile(with_library) as files:
        library = files.extract(f"mspc/kernels/cpu/{building.NAME}", tmp_path)
    needed = set(re.findall(r"NEEDED +(\S+)", run("objdump", "-p", library)))
    assert needed <= {"libc.so.6", "ld-linux-x86-64.so.2"}
    names = re.findall(r"^\w+ g .* (\w+)$", run("objdump", "-T", library), re.MULTILINE)
    assert names
    assert [name for name in names if not name.startswith("mspc_")] == ["RegisterCustomOps"]


def test_an_sdist_installs_without_a_compiler(plain, tmp_path):
    """The sources are inside, for a compiler that comes later; until then one line says what is missing."""
    assert plain.name.endswith("-py3-none-any.whl")
    with ZipFile(plain) as files:
        inside = {Path(name).name for name in files.namelist() if name.startswith("mspc/kernels/cpu/")}
    assert inside >= {path.name for path in building.FOLDER.iterdir() if path.suffix in (".py", ".h", ".cpp")}
    assert building.NAME not in inside
    found = probe(plain, tmp_path / "env", clean())
    assert found["library"] is None
    (line,) = found["said"]
    assert "many times slower than in C++: there is no C++ compiler. Install g++ 11" in line


def test_an_sdist_is_built_at_the_first_load_where_a_compiler_is(plain, tmp_path):
    if building.compiler() is None:
        pytest.skip("there is no C++ compiler")
    found = probe(plain, tmp_path / "env", dict(os.environ))
    assert Path(found["library"]).is_relative_to(tmp_path / "env" / "cache" / "mspc" / "cpu")
    assert found["error"] < 1e-4


def test_a_library_of_other_sources_is_not_taken(with_library, tmp_path):
    """Without a compiler nothing else is left."""
    other = tmp_path / "changed"
    with ZipFile(with_library) as files:
        files.extractall(other)
    source = other / "mspc" / "kernels" / "cpu" / "interface.h"
    source.write_text(source.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    wheel = tmp_path / with_library.name
    with ZipFile(wheel, "w") as files:
        for path in sorted(other.rglob("*")):
            files.write(path, path.relative_to(other))
    found = probe(wheel, tmp_path / "env", clean())
    assert found["library"] is None
    assert "there is no C++ compiler" in found["said"][-1]
