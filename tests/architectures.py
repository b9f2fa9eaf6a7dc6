"""Every decoder of transformers, tiny and random, through all of mspc, compared with transformers' own whole model.

`make verify-architectures` tries each model type that has no row in docs/architectures.md yet, and writes the row at
once. It fails for a type without a verdict that is not in `ACCEPTED`, and for one whose verdict is worse than its row
said before. A child process tries a type, for at most 300 seconds. Oracles: hooks on
the whole model, products caught by the storage of weights, and one autograd pass.
"""

import argparse
import importlib.util
import logging
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
import torch
import transformers
from families import ACCEPTED, NEEDED, PACKAGES, UNMEASURED
from tiny_configs import tiny_config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

import mspc
from mspc.errors import MspcError
from mspc.kernels.cpu import kernel as cpu
from mspc.model.open import open_model
from mspc.passes import perplexity
from mspc.passes.blocks import batches_of
from mspc.passes.gradients import OutputFisher, SquaredGradient, reverse_walk
from mspc.passes.trial import irregular_layers
from mspc.passes.walk import walk
from mspc.text.tokens import calibration_tokens

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
SECONDS = 300
CPU = torch.device("cpu")
SEQUENCES = 4
NEEDED_SHARE = 0.95
"""Share of the weights that products of blocks read, routers aside, which must be compressed."""
ROUTERS = re.compile(r"router|indexer|selector|experts?_gate|\bgate\.(weight|wg)|\bgate$|correction|hash_table|tid2eid")
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
MULTIMODAL = {
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast", "sparsity": 0.5, "bits": 4, "group_size": 16},
    "default": {"sparsity": 0.5},
}
EXPORTS = ("dense", "sparse")
REMEDY = "save_original_format"
"""An option of `save_pretrained` by which each parameter is a tensor."""


class Wrong(Exception):
    """Something that mspc computed differs from the oracle, and mspc did not say so."""


class Watch(TorchFunctionMode):
    """Products with parameters or parts of them, by name and index: their inputs, and the parameters they read.

    It knows the storage of parameters and nothing of modules.
    """

    PRODUCTS = (
        "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "_grouped_mm",
        "grouped_mm", "tensordot",
    )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():  # parts of a tensor of a checkpoint share a storage
            self.parameters.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
        self.read: dict[str, int] = {}
        self.inputs: dict[str, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.PRODUCTS:
            tensors = [a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, Tensor)]
            for position, tensor in enumerate(tensors):
                for name, parameter in self.parameters.get(tensor.untyped_storage().data_ptr(), []):
                    first = tensor.storage_offset() - parameter.storage_offset()
                    if tensor.ndim < 2 or not 0 <= first < parameter.numel():
                        continue
                    self.read[name] = parameter.numel()
                    is_part = tensor.ndim == 2 and tensor.numel() < parameter.numel()  # rows of experts, as in DBRX
                    if (parameter.ndim == 3 or is_part) and len(tensors) > 1:
                        index = first // tensor.numel() if tensor.ndim == 2 else None
                        self.note(name, index, tensors[1 - position].detach())
        return result

    def note(self, name: str, index: int | None, inputs: Tensor) -> None:
        """Keep the inputs of one expert, or of all of them, where a row of zeros is a token that is not routed."""
        found = {index: inputs}
        if index is None:
            found = {expert: x[x.any(-1)] for expert, x in enumerate(inputs)} if inputs.ndim == 3 else {}
        for index, x in found.items():
            self.inputs.setdefault(f"{name}[{index}]", []).append(x)


def close(found: Tensor, expected: Tensor, share: float, what: str) -> float:
    """The deviation as a share of the largest expected number. Raises Wrong if it is above `share`."""
    if found.shape != expected.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)}, and {tuple(expected.shape)} in transformers")
    deviation = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not deviation <= share:
        raise Wrong(f"{what}: off by {deviation:.1e} of the largest")
    return deviation


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights with which activations keep their size, and no part is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            owner = model.get_submodule(name.rpartition(".")[0])
            if parameter.ndim <= 1 or "A_log" in name or "position" in name:
                parameter.add_((0.2 * noise).to(parameter))
            elif isinstance(owner, nn.Embedding):
                parameter.copy_(0.25 * noise)
                if owner.padding_idx is not None:
                    parameter[owner.padding_idx] = 0
            elif isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                parameter.copy_(noise / (parameter.numel() / len(parameter)) ** 0.5)
            else:
                parameter.copy_(1.2 * noise / 8)
    return model


class Seen:
    """The Grams of matrices in one pass of the whole model, by hooks, and for experts by the storage of weights."""

    def __init__(self, model: Any, ids: Tensor, names: Sequence[str]) -> None:
        with Watch(model) as watch:
            self.inputs = tiny.inputs_of(model, ids, names)
        self.of_experts, self.read = watch.inputs, watch.read

    def gram(self, name: str, size: int, borrowed: int) -> Tensor:
        """(I, I) float64. That of an expert has `borrowed` tokens that are the mean of its layer."""
        if name in self.inputs:
            return _gram(self.inputs[name])
        if not name.endswith("]"):
            raise Wrong(f"{name} is no layer that transformers calls")
        own = [x.reshape(-1, size) for x in self.of_experts.get(name, [])]
        tokens = sum(map(len, own))
        gram = sum((_gram(x) for x in own), torch.zeros(size, size, dtype=torch.float64))
        if not borrowed:
            return gram
        prefix = name.partition("[")[0] + "["
        layer = [x.reshape(-1, size) for key, xs in self.of_experts.items() if key.startswith(prefix) for x in xs]
        mean = sum(_gram(x) for x in layer) / sum(map(len, layer))
        return (gram + borrowed * mean) * max(tokens, 1) / (tokens + borrowed)


def _gram(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def auto_class(key: str) -> Any:
    """The class that loads what it saves: the language models of some have a config that no auto class knows."""
    if key in CAUSAL:
        own = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[key]].config_class
        if key not in MULTIMODAL or own in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForCausalLM
    return transformers.AutoModelForMultimodalLM


def whole(key: str, folder: Path, attention: str | None = "eager") -> Any:
    """The model that transformers loads, its experts in plain operations, and its attention unless that is None."""
    model = auto_class(key).from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def built(key: str, folder: Path, **options: bool) -> Path:
    """A checkpoint of a type, saved with `options`."""
    config = tiny_config(key, NEEDED.get(key, {}))
    model = randomized(auto_class(key).from_config(config, attn_implementation="eager")).eval()
    return tiny.save(model, folder / "model", **options)


def check_passes(model: Any, oracle: Any, matrices: Any, ids: Tensor) -> dict[str, int]:
    """Loss and Grams of one block at a time against the whole model; the weights that its products read, by name."""
    seen = Seen(oracle, ids, [m.name for of_block in matrices for m in of_block if m.index is None])
    expected = float(tiny.losses(oracle, ids).double().mean())
    *_, found = perplexity.measure(model, ids)
    if not abs(found.nll - expected) < 1e-4 * max(abs(expected), 1):
        raise Wrong(f"loss {found.nll:.6f} by blocks, {expected:.6f} whole")
    for visit in walk(model, batches_of(model, ids, batch_size=2), matrices):
        gram = seen.gram(visit.matrix.name, visit.matrix.shape[1], visit.stats.borrowed_tokens)
        close(visit.stats.gram.double(), gram, 1e-4, f"Gram of {visit.matrix.name}")
    return seen.read


def check_gradients(model: Any, oracle: Any, matrices: Any, ids: Tensor) -> None:
    """Mean squared gradients of weights, and at outputs, by one autograd pass of the whole model for each."""
    flat = [matrix for of_block in matrices for matrix in of_block]
    parameters = {matrix.parameter: oracle.get_parameter(matrix.parameter) for matrix in flat}
    outputs: dict[str, Tensor] = {}
    handles = [
        oracle.get_submodule(m.name).register_forward_hook(lambda _, a, out, name=m.name: outputs.update({name: out}))
        for m in flat
        if m.index is None
    ]
    oracle.requires_grad_(True)
    one, several = ids[:1], ids[:2]
    grads = torch.autograd.grad(tiny.losses(oracle, one).mean(), list(parameters.values()), allow_unused=True)
    of = dict(zip(parameters, grads, strict=True))
    loss, kept = tiny.losses(oracle, several).sum(), {}
    wanted = {name: out for name, out in outputs.items() if out.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    kept = {name: g for name, g in zip(wanted, found, strict=True) if g is not None}
    oracle.requires_grad_(False)
    for handle in handles:
        handle.remove()
    largest = max((float(g.double().square().mean()) for g in of.values() if g is not None), default=1.0)

    def compare(name: str, found: float, expected: float, floor: float) -> None:
        if not abs(found - expected) <= 1e-3 * abs(expected) + floor:
            raise Wrong(f"gradient of {name}: {found:.4e}, and {expected:.4e} by autograd")

    for sample in reverse_walk(model, one, matrices, SquaredGradient()):
        gradient = of[sample.matrix.parameter]
        expected = 0.0 if gradient is None else float(sample.matrix.read(gradient).double().square().mean())
        compare(sample.matrix.name, float(sample.value), expected, 1e-9 * largest)
    for sample in reverse_walk(model, several, matrices, OutputFisher()):
        if sample.matrix.index is None:
            g = kept.get(sample.matrix.name)
            trace = 0.0 if g is None else _mean_square(g, several)
            compare(
                f"outputs of {sample.matrix.name}", float(sample.value.diagonal(dim1=-2, dim2=-1).sum()), trace, 1e-12
            )


def _mean_square(gradient: Tensor, ids: Tensor) -> float:
    """The mean over tokens of the squared length of a gradient, without the first token of each sequence."""
    rows = gradient.double().flatten(0, -2)
    if len(rows) == ids.numel():
        rows = rows.view(*ids.shape, -1)[:, 1:]
    return float(rows.square().sum(-1).mean())


def check_artifact(key: str, source: Path, folder: Path, effort: str, calibration: Path) -> Any:
    """Compress with exports, and compare weights, output errors, logits and greedy tokens."""
    artifact = tiny.compress(source, folder / effort, calibration, **EFFORTS[effort])
    dense, sparse = (artifact.export(f, folder / f"{effort}-{f}", verify=False, progress=False) for f in EXPORTS)
    rows = artifact.manifest["matrices"]
    before, after = tiny.tensors(source), tiny.tensors(dense)
    if before.keys() != after.keys():
        raise Wrong("the dense export has other tensors")
    changed = sum(before[k].numel() for k in before if not torch.equal(before[k], after[k]))
    listed = sum(row["shape"][0] * row["shape"][1] for row in rows)
    if changed > listed:
        raise Wrong(f"{changed} weights are in changed tensors, but the manifest lists {listed}")
    if artifact.manifest["sparsity"]["achieved"] != 0.5:
        raise Wrong(f"sparsity {artifact.manifest['sparsity']['achieved']} in place of 0.5")
    # By the default attention: with images, some models have another mask by it than in plain operations.
    original, compressed = whole(key, source, None), whole(key, dense, None)
    check_errors(rows, original, compressed, calibration)
    ids = tiny.ids(2)
    expected = compressed(input_ids=ids, use_cache=False).logits
    with patch.dict(cpu.FUSED, dict.fromkeys(cpu.FUSED, 0)):  # the C++ kernels round their inputs to 16 bits
        for path in (sparse, artifact.path):
            loaded = mspc.load(path)
            close(loaded(input_ids=ids, use_cache=False).logits, expected, 1e-3, f"logits of {path.name}")
        check_tokens(loaded, compressed, ids[:1, :8])
    return artifact


def check_errors(rows: Any, original: Any, compressed: Any, calibration: Path) -> None:
    """Output errors by the inputs in the model whose matrices are replaced: no matrix sees those after it."""
    ids = calibration_tokens(tiny.byte_tokenizer(), str(calibration), SEQUENCES, tiny.LENGTH, seed=0).ids
    seen = Seen(compressed, ids, [row["name"] for row in rows if row["index"] is None])
    for row in rows:
        if row["output_error"] is None:
            continue
        both = [m.get_parameter(row["parameter"]).double() for m in (original, compressed)]
        if row.get("stacked"):
            count = both[0].numel() // (row["shape"][0] * row["shape"][1])
            both = [w.view(count, -1, w.shape[1]) for w in both]
        weight, result = (w if row["index"] is None else w[row["index"]] for w in both)
        if row["transposed"]:
            weight, result = weight.T, result.T
        gram = seen.gram(row["name"], weight.shape[1], row.get("borrowed_tokens") or 0)
        difference = weight - result
        whole_output = float((weight @ gram * weight).sum())
        error = float((difference @ gram * difference).sum()) / whole_output if whole_output else 0.0
        if not abs(row["output_error"] - error) <= 2e-3 * error + 1e-9:
            raise Wrong(f"output error of {row['name']}: {row['output_error']:.5f}, and {error:.5f} by hooks")


def check_tokens(loaded: Any, dense: Any, prompt: Tensor) -> None:
    """Greedy tokens of the loaded model and of the dense export, both in transformers."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    try:
        expected = dense.generate(prompt, **options)
    except Exception:  # transformers itself cannot
        return
    found = loaded.generate(prompt, **options)
    if not torch.equal(found, expected):
        raise Wrong("greedy tokens of the sparse model differ from those of the dense export")


def kind_of(name: str) -> str:
    """The name of a parameter without the numbers of layers."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def share_at_default(key: str, needed: set[str], left: Sequence[str]) -> float:
    """The share of weights that are compressed, of kinds of parameters, in a model of the default config.

    Tiny models have more weights than others in what depends on few of the sizes.
    """
    with torch.device("meta"):
        model = auto_class(key).from_config(CONFIG_MAPPING[key]())
    sizes = [(kind_of(name), parameter.numel()) for name, parameter in model.named_parameters()]
    return sum(n for kind, n in sizes if kind in needed and kind not in left) / sum(n for k, n in sizes if k in needed)


def tried(key: str, folder: Path) -> dict[str, Any]:
    """The verdict of a type, with what else its row needs; for one to save first, the verdict after that as well."""
    row = _tried(key, folder)
    if row["verdict"] == "refused" and REMEDY in row["note"]:
        again = _tried(key, folder / "again", **{REMEDY: False})
        row["note"] += f" Saved so: {again['verdict']}, {again.get('share', 0):.0%}."
    return row


def _tried(key: str, folder: Path, **saving: bool) -> dict[str, Any]:
    """Exceptions are those of the first check that fails."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"step": "building"}
    try:
        source = built(key, folder, **saving)
        text = folder / "text.txt"
        text.write_text(tiny.text(2400, seed=1))
        with torch.no_grad():
            ids = tiny.ids(3)
            model = open_model(source, device=CPU, eager=True)
            oracle = whole(key, source)
            row["step"] = "passes"
            matrices = model.matrices((), irregular_layers(model))
            read = check_passes(model, oracle, matrices, ids)
        blocks = model.blocks_name + "."
        needed = {n: k for n, k in read.items() if n.startswith(blocks) and not ROUTERS.search(n)}
        taken = {m.parameter for of_block in matrices for m in of_block}
        row["share"] = sum(k for n, k in needed.items() if n in taken) / max(sum(needed.values()), 1)
        row["left"] = sorted({kind_of(n) for n in needed.keys() - taken})
        row["step"] = "gradients"
        check_gradients(model, oracle, matrices, ids)
        for effort in EFFORTS:
            row["step"] = effort
            check_artifact(key, source, folder, effort, text)
        row["step"] = ""
        row["note"] = ""
        if row["share"] < NEEDED_SHARE:
            row["share"] = share_at_default(key, {kind_of(n) for n in needed}, row["left"])
            dense = ", ".join(kind.partition(".*.")[2] for kind in row["left"])
            row["note"] = f"dense, of the weights of the default config: {dense}"
        row["verdict"] = "works" if row["share"] >= NEEDED_SHARE else "in part"
    except Wrong as error:
        row |= {"verdict": "wrong", "note": f"{row['step']}: {error}"}
    except MspcError as error:
        row |= {"verdict": "refused", "note": f"{row['step']}: {error}"}
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        kind = "not built" if row["step"] == "building" else "error"
        row |= {"verdict": kind, "note": f"{row['step']}: {type(error).__name__}: {str(error)[:300]} ({where})"}
        row["trace"] = traceback.format_exc()
    return row


HEADING = """# Model types of transformers

Written by `make verify-architectures`, which tries each type that has no row here. A tiny random model of each type
goes through passes, gradients, compression by `--effort fast` and by default, `dense` and `sparse` exports, loading and
generation. All of it is compared with transformers' own whole model: hooks, and one autograd pass.

- `works`: no option is needed, and at least 95% of the weights that products in blocks read are compressed, routers
  aside (in the tiny model, or at the sizes of the default config). All Grams, gradients, output errors, logits and
  greedy tokens equal those of the whole model.
- `in part`: all is equal, but more stays dense.
- `refused`: an error in a sentence, before any work. If it says how to save the model first, that was tried as well.
- `error`: another exception. `wrong`: a difference that mspc does not notice.
- `not measured`: no tiny model of the type can be made here. `not built`: transformers cannot make one.

Some towers need packages that mspc does not: rows of fast_vlm, gemma3n and perception_lm are with timm 1.0.31, that of
inkling_mm_model with scipy 1.17.1.

"""
ORDER = ("works", "in part", "refused", "error", "wrong", "not measured", "not built")


def read_rows(table: Path) -> dict[str, tuple[str, str, str]]:
    """Verdict, share and note by model type."""
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    return {c[0]: (c[1], c[2], c[3] if len(c) > 3 else "") for c in cells if len(c) >= 3 and c[1] in ORDER}


def write_rows(table: Path, rows: dict[str, tuple[str, str, str]]) -> None:
    text = HEADING + f"transformers {transformers.__version__}, torch {torch.__version__}.\n"
    for title, keys in (("Causal language models", CAUSAL), ("Models with images, sound or video", MULTIMODAL)):
        mine = {key: rows[key] for key in sorted(rows) if key in keys and (keys is CAUSAL or key not in CAUSAL)}
        if mine:
            counts = [f"{sum(row[0] == verdict for row in mine.values())} {verdict}" for verdict in ORDER]
            shown = ", ".join(count for count in counts if not count.startswith("0 "))
            left = sum(key not in rows and (keys is CAUSAL or key not in CAUSAL) for key in keys)
            text += f"\n## {title}\n\n{len(mine)} types: {shown}.{f' {left} were not tried yet.' * bool(left)}\n\n"
            text += "| type | verdict | compressed | note |\n|---|---|---|---|\n"
            text += "".join(f"| {key} | {' | '.join(row)} |\n" for key, row in mine.items())
    partial = table.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(table)


def _child(key: str, found: Any) -> None:
    logging.getLogger("mspc").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found.put(tried(key, Path(folder)))


def verdict_of(key: str) -> dict[str, Any]:
    """The row of a type, by a child process of at most 300 seconds."""
    if key in UNMEASURED:
        return {"verdict": "not measured", "note": UNMEASURED[key]}
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    process = context.Process(target=_child, args=(key, found))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return {"verdict": "error", "note": f"no end in {SECONDS} seconds"}
    return found.get() if not found.empty() else {"verdict": "error", "note": f"exit code {process.exitcode}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types to try again (default: those without a row)")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--verdict", action="append", default=[], help="try again what has this verdict")
    parser.add_argument("--only", choices=("causal", "multimodal"))
    parser.add_argument("--traces", type=Path, help="a folder for the tracebacks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = read_rows(given.table)
    keys = {"causal": CAUSAL, "multimodal": MULTIMODAL}.get(given.only, {**CAUSAL, **MULTIMODAL})
    again = [key for key in keys if key in rows and rows[key][0] in given.verdict]
    worse: list[str] = []
    for key in given.types or again or [key for key in keys if key not in rows]:
        if key in PACKAGES and not importlib.util.find_spec(PACKAGES[key]):
            print(f"{key}: not tried, as it needs the package {PACKAGES[key]}", flush=True)
            continue
        began = time.time()
        row = verdict_of(key)
        share = f"{row['share']:.0%}" if "share" in row else ""
        note = re.sub(r"\s+", " ", row.get("note", "").replace("|", "/"))
        note = re.sub(r"/tmp/\S*?/(model|fast|default)\b", r"\1", note)
        rows = read_rows(given.table)
        if key in rows and is_worse(row["verdict"], rows[key][0]):
            worse.append(f"{key} ({rows[key][0]}, now {row['verdict']})")
        rows[key] = row["verdict"], share, note
        write_rows(given.table, rows)
        if given.traces and "trace" in row:
            given.traces.mkdir(exist_ok=True, parents=True)
            (given.traces / key).write_text(row["trace"])
        print(f"{key}: {row['verdict']} {share} {note[:200]} ({time.time() - began:.0f} s)", flush=True)
    open_ones = unexplained(rows, keys)
    if open_ones:
        print(f"Without a good verdict, and not accepted in tests/families.py: {', '.join(open_ones)}", file=sys.stderr)
    if worse:
        print(f"Worse than before: {', '.join(worse)}", file=sys.stderr)
    return 1 if open_ones or worse else 0


def unexplained(rows: Mapping[str, tuple[str, str, str]], keys: Iterable[str]) -> list[str]:
    """Types that were not tried, or whose verdict is a fault that nobody has explained; `wrong` needs a repair."""
    verdicts = {key: rows.get(key, ("not built",))[0] for key in keys}
    open_ones = {"not built", "error"}
    return [k for k, found in verdicts.items() if found == "wrong" or (found in open_ones and k not in ACCEPTED)]


def is_worse(found: str, before: str) -> bool:
    """Tell if a verdict is worse than another; those of types that cannot be measured are no comparison."""
    graded = ORDER[: ORDER.index("not measured")]
    return found not in graded[: graded.index(before) + 1] if before in graded else False


if __name__ == "__main__":
    sys.exit(main())
