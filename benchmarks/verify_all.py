"""Every format in every runtime: relative errors of logits, equal greedy tokens, sizes, and speed of export.

    python benchmarks/verify_all.py [--models bundled llama qwen3 opt gpt2 mistral phi3] [--json FILE]

The bundled model is trained; the others are random models of 2 blocks, made here. Each is compressed in several ways
and every artifact is exported to every format that accepts it. A runtime that fails or computes something else makes
the exit code 1.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mspc
from exporters import formats, verification
from mspc.errors import InputError, VerificationError
from mspc.progress import Silent
from mspc.storage.artifact import ArtifactSource

BUNDLED = Path(__file__).parent.parent / "examples" / "tiny_llama"
ATTENTION = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}
GATED = ATTENTION | {"intermediate_size": 256, "num_key_value_heads": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48}
LONGROPE |= {"short_factor": [1.0] * 16, "long_factor": [1.0 + step / 4 for step in range(16)]}
MODELS = {
    "llama": GATED,
    "qwen3": GATED | {"head_dim": 32},
    "opt": ATTENTION | {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "gpt2": ATTENTION | {"n_inner": 256},
    "mistral": GATED | {"sliding_window": 24},
    "phi3": GATED | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48, "pad_token_id": 0},
}
ARTIFACTS = {
    "50%": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "50%+int4 g32": {"sparsity": 0.5, "bits": 4, "group_size": 32},
    "2:4+int4 g128": {"pattern": "2:4", "bits": 4, "group_size": 128},
    "50%+int4 g32 asymmetric": {"sparsity": 0.5, "bits": 4, "group_size": 32, "asymmetric": True},
    "50%+int8 g32": {"sparsity": 0.5, "bits": 8, "group_size": 32},
    "50%+int3 g64": {"sparsity": 0.5, "bits": 3, "group_size": 64},
    "50%+int2 g32": {"sparsity": 0.5, "bits": 2, "group_size": 32},
}

EXPORTS: dict[str, tuple[str, dict[str, object]]] = {name: (name, {}) for name in formats.FORMATS} | {
    "onnx matmulnbits": ("onnx", {"weights": "matmulnbits"}),
    "onnx qdq": ("onnx", {"weights": "qdq"}),
    "onnx sparse": ("onnx", {"weights": "sparse"}),
}


def model_folder(name: str, work: Path) -> Path:
    """The bundled model, or a random one of that architecture with the bundled tokenizer."""
    if name == "bundled":
        return BUNDLED
    folder = work / name
    if not folder.exists():
        torch.manual_seed(0)
        vocabulary = json.loads((BUNDLED / "config.json").read_text())["vocab_size"]
        config = AutoConfig.for_model(name, vocab_size=vocabulary, initializer_range=0.1, **MODELS[name])
        AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(BUNDLED / file, folder / file)
    return folder


def size_of(folder: Path) -> int:
    """Bytes of the files with weights."""
    weights = (".safetensors", ".onnx", ".data", ".gguf")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in weights)


def measure(model: str, setting: str, work: Path) -> list[dict[str, object]]:
    recipe = mspc.Recipe(**ARTIFACTS[setting], allocator="uniform", num_sequences=16, sequence_length=64)
    artifact = mspc.compress(model_folder(model, work), recipe, out=work / "artifact", overwrite=True, progress=False)
    rows: list[dict[str, object]] = []
    sizes: dict[str, int] = {}
    for label, (format_name, options) in EXPORTS.items():
        out = work / "export"
        shutil.rmtree(out, ignore_errors=True)
        row: dict[str, object] = {"model": model, "artifact": setting, "format": label}
        rows.append(row)
        begin = time.perf_counter()
        try:
            artifact.export(format_name, out, verify=False, progress=False, **options)
        except InputError as refusal:
            row["refused"] = str(refusal)
            continue
        seconds = time.perf_counter() - begin
        sizes[label] = size_of(out)
        weights = 2 * sum(entry.address.numel for entry in ArtifactSource(artifact.path).entries)
        row |= {
            "bytes": sizes[label],
            "of_dense": sizes[label] / sizes["dense"],
            "gb_per_second": weights / seconds / 1e9,
        }
        try:
            report = verification.verify(out, artifact.path, Silent())
            row |= {
                "weights": report["weights"],
                "runtimes": report["runtimes"],
                "failures": verification.failures(report),
            }
            if model == "bundled":
                row["texts"] = texts_of(report["runtimes"])
        except VerificationError as error:
            row["failures"] = [str(error)]
    return rows


def texts_of(runtimes: dict[str, dict[str, object]]) -> dict[str, str]:
    """Text that each runtime wrote after the same prompt."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, trust_remote_code=False)
    verified = {name: result for name, result in runtimes.items() if "greedy_tokens" in result}
    return {name: tokenizer.decode(result["greedy_tokens"]) for name, result in verified.items()}


def table_of(rows: list[dict[str, object]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "artifact", "format", "size", "weights", "runtimes: relative error, greedy tokens equal"):
        table.add_column(heading)
    for row in rows:
        if "refused" in row:
            table.add_row(row["model"], row["artifact"], row["format"], "", "", f"refused: {row['refused']}")
            continue
        words = [f"{name} {in_short(result)}" for name, result in row["runtimes"].items()]
        weights = "wrong" if row["weights"]["wrong"] else "exact"
        table.add_row(row["model"], row["artifact"], row["format"], f"{row['of_dense']:.3f}", weights, "; ".join(words))
    return table


def in_short(result: dict[str, object]) -> str:
    if result["status"] != "verified":
        return f"{result['status']} ({result['reason']})"
    beyond = f" ({result['relative_error_beyond']:.0e} beyond limits)" if "relative_error_beyond" in result else ""
    return f"{result['relative_error']:.0e}{beyond}, {result['greedy_tokens_equal']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bundled", *MODELS], choices=["bundled", *MODELS])
    parser.add_argument("--artifacts", nargs="+", default=list(ARTIFACTS), choices=list(ARTIFACTS))
    parser.add_argument("--json", type=Path, default=Path("out/verify_all.json"))
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mspc-verify-") as work:
        for model in args.models:
            for setting in args.artifacts:
                rows += measure(model, setting, Path(work))
                args.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))
                Console(width=250).print(table_of(rows[-len(EXPORTS) :]))
    for row in rows:
        for name, text in row.get("texts", {}).items():
            print(f"{row['artifact']}, {row['format']}, {name}: {text!r}")
    wrong = [
        f"{row['model']}, {row['artifact']}, {row['format']}: {row['failures']}" for row in rows if row.get("failures")
    ]
    for line in wrong:
        print("WRONG", line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
