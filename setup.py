"""Builds the C++ library of products on a CPU into a wheel if MSPC_WHEEL_PLATFORM names one, as `make wheel` does.

Without it the wheel is for every platform, needs no compiler, and the library is built at the first load.
ctypes loads the library, so one wheel serves every Python and every torch.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PLATFORM = os.environ.get("MSPC_WHEEL_PLATFORM")
CPU = Path("mspc", "kernels", "cpu")


class WithLibrary(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        building = runpy.run_path(str(CPU / "building.py"))
        library = Path(self.build_lib, CPU, building["NAME"]).absolute()
        library.unlink(missing_ok=True)  # of an earlier wheel
        if PLATFORM:
            compiler = building["compiler"]()
            if compiler is None:
                raise SystemExit("A wheel with the C++ library needs a C++ compiler. Install g++, or set CXX.")
            building["build"](compiler, library)


class WithPlatform(Distribution):
    def has_ext_modules(self) -> bool:  # files with machine code belong where a wheel has those of its platform
        return bool(PLATFORM)


class ForEveryPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", PLATFORM or "any"


setup(cmdclass={"build_py": WithLibrary, "bdist_wheel": ForEveryPython}, distclass=WithPlatform)
