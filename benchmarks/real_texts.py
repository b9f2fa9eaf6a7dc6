"""Texts for quality_real.py: documentation and code out of source packages, and prompts for chats.

    python benchmarks/real_texts.py

Source packages come from the package index by `pip download`, with fixed versions, and are checked by their SHA-256.
No package is both in the calibration text and in a test text. Prints the files, which have a document per line.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mspc.storage.files import cache_folder, write_text


@dataclass(frozen=True)
class Source:
    """A source package, and the members that are taken: those whose path in it matches `members`."""

    package: str
    version: str
    sha256: str
    license: str
    members: str


DOCS, CODE = r"docs/.*\.(rst|md|txt)", r"src/.*\.py"
BOTH, BSD = f"{DOCS}|{CODE}", "BSD-3-Clause"
TEXTS = {
    "calibration": (
        Source("click", "8.1.8", "ed53c9d8990d83c2a27deae68e4ee337473f6330c040a31d4225c9574d16096a", BSD, BOTH),
        Source("jinja2", "3.1.5", "8fefff8dc3034e27bb80d67c671eb8a9bc424c0ef4c0826edbff304cceff43bb", BSD, BOTH),
        Source("werkzeug", "3.1.3", "60723ce945c19328679790e3282cc758aa4a6040e4bb330f53d30fa546d44746", BSD, BOTH),
    ),
    "prose": (
        Source("flask", "3.1.0", "5f873c5184c897c8d9d1b05df1e3d01b14910ce69607a117bd3277098a5836ac", BSD, DOCS),
        Source("attrs", "25.1.0", "1c97078a80c814273a76b2a298a932eb681c87415c11dee0a6921de7f1b02c3e", "MIT", DOCS),
    ),
    "code": (
        Source("tox", "4.24.1", "083a720adbc6166fff0b7d1df9d154f9d00bfccb9403b8abf6bc0ee435d6a62e", "MIT", CODE),
        Source("pluggy", "1.5.0", "2cffa88e94fdc978c4c574f15f9e59b7f4201d439195c3715ca9e2486f1d0cf1", "MIT", CODE),
    ),
}  # fmt: skip
LEAST, MOST = 1000, 12_000
"""Characters: shorter files are left out, and longer ones are cut off, so that a text has many documents."""

PROMPTS = (
    "What should I see in Lisbon in two days?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a short poem about the first snow of the year.",
    "How do I get a red wine stain out of a cotton shirt?",
    "Give me three ideas for a vegetarian dinner.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that reverses the words in a sentence.",
    "Why is the sky blue?",
    "Help me write an email to my landlord about a broken heater.",
    "Summarize the story of Romeo and Juliet in five sentences.",
    "How does a bicycle stay upright?",
    "What are some good habits for learning a language?",
    "Tell me a joke about a librarian.",
    "What is compound interest? Give an example with numbers.",
    "List five animals that sleep in winter.",
    "How can I fall asleep faster?",
    "Write the opening of a detective story set in Venice.",
    "What does HTTP status 404 mean, and when is it sent?",
    "Suggest a name for a small bakery and say why it fits.",
    "How do vaccines work?",
    "Compare cats and dogs as pets.",
    "What is the capital of Australia, and why is it not Sydney?",
    "Give me a plan for a 30-minute workout without equipment.",
    "Explain recursion with a simple example.",
    "What were the causes of the First World War?",
    "How do I boil an egg so that the yolk stays soft?",
    "Write a toast for my sister's wedding.",
    "What is the greenhouse effect?",
    "How do I calculate the area of a circle with a diameter of 10 cm?",
    "Describe the taste of a mango to someone who never had one.",
    "What is a good first programming language, and why?",
    "Draft a polite reply that turns down a meeting.",
    "Who was Marie Curie?",
    "What can I do on a rainy afternoon with two children?",
    "Explain the rules of chess in a few paragraphs.",
    "Why do leaves change their colour in autumn?",
    "How do I save money on a small salary?",
    "Write a SQL query that counts the orders of each customer.",
    "What is the moral of the fable of the tortoise and the hare?",
    "Give me tips for my first job interview.",
)
"""One user turn each; the replies of the dense models to them are the chat text."""


def texts() -> dict[str, Path]:
    """The file of each of `TEXTS`, `.jsonl` with a document per line, made if need be. Raises SystemExit."""
    folder = cache_folder() / "real" / "texts"
    found = {}
    for name, sources in TEXTS.items():
        key = hashlib.sha256(repr((sources, LEAST, MOST)).encode()).hexdigest()[:12]
        found[name] = folder / f"{name}-{key}.jsonl"
        if not found[name].is_file():
            documents = [document for source in sources for document in _documents(source)]
            # An order that has nothing to do with package or path, so that the beginning of a text is of all kinds.
            documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
            write_text(found[name], "".join(json.dumps({"text": text}) + "\n" for text in documents))
    return found


def _documents(source: Source) -> list[str]:
    wanted = re.compile(f"[^/]+/(?:{source.members})")
    with tempfile.TemporaryDirectory() as folder:
        pin = f"{source.package}=={source.version}"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            folder,
            pin,
        ]
        if subprocess.run(pip, check=False).returncode:
            raise SystemExit(f"pip could not download {pin}. Check the network and the index of pip.")
        file = next(Path(folder).glob("*.tar.gz"))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != source.sha256:
            raise SystemExit(f"{file.name} has SHA-256 {digest}, not {source.sha256}. Nothing was kept.")
        with tarfile.open(file) as archive:
            members = [member for member in archive if member.isfile() and wanted.fullmatch(member.name)]
            found = [archive.extractfile(member).read().decode("utf-8") for member in members]  # type: ignore[union-attr]
    return [text[:MOST] for text in found if len(text) >= LEAST]


if __name__ == "__main__":
    for name, file in texts().items():
        print(name, file, hashlib.sha256(file.read_bytes()).hexdigest())
