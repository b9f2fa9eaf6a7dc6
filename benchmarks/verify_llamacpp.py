"""Exported GGUF files in llama.cpp: logits, greedy tokens, tokens of texts, chat templates, and the end of a text.

    python benchmarks/verify_llamacpp.py [--json FILE] [--models NAME ...]

llama.cpp is the wheel xllamacpp of the extra `bench`. Models are
compressed and exported here and run there, on the CPU. The reference is the artifact in float32. The export compares
what transformers makes of the same file with it too, so all three agree or one is named.

The server gives the logits up to a constant, as logarithms of probabilities. So errors are those of logarithms of
probabilities after their mean is taken off: the norm of all differences by the norm of the reference.

llama.cpp rounds activations to the type of the weights before products: to 8 bits for Q4_0 and Q8_0, to bfloat16, to
float16. So every file is run twice: as it is, within the tolerance of this rounding, and as a copy with every weight
in float32, where a wrong layout cannot hide behind rounding. Where activations become 8 bits, the same rounding is made
in torch too: how far it leads from the artifact, and how far llama.cpp is from that.

Two differences of llama.cpp are known, and it must differ in no other way. It puts a space after every special token,
as SentencePiece tokenizers once did, so such tokenizers are compared in that form. It ignores the sliding window of
Phi-3, so nothing beyond it is compared.

At the end, files that are wrong on purpose show that each check can fail. The exit code is 1 if one is not noticed, and
if anything else is wrong.
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_copies import FAULTS, copy_as_float32, kinds_in
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import mspc
from exporters.gguf import FILE
from exporters.reference import exact_model
from mspc.bench.peers.llamacpp import LlamaCpp, LlamaCppError, running
from mspc.model.hub import load_config
from mspc.model.special_ids import special_ids
from mspc.storage.artifact import ArtifactSource
from mspc.storage.files import write_json
from mspc.text.tokens import windows_of_test_text

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))  # the tests of the exporter have a small model of every family
from gguf_models import AWKWARD, MODELS, build  # noqa: E402

BUNDLED = HERE.parent / "examples" / "tiny_llama"
DTYPES = ("float32", "float16", "bfloat16")
ARTIFACTS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "int4 g32": {"sparsity": 0.0, "bits": 4, "group_size": 32},
    "int8 g32": {"sparsity": 0.0, "bits": 8, "group_size": 32},
}
LENGTH, PROMPT, NEW_TOKENS = 96, 8, 16
"""Tokens of the compared sequence, longer than any sliding window of the models; of a prompt; of its continuation."""
FLOAT = 1e-3
"""Relative error of files in float32 and float16, and of copies in float32."""
ROUNDED = 3e-2
"""Relative error with activations of 8 bits or bfloat16."""
LIKE_ROUNDED = 1e-2
"""Relative error to the artifact with activations of 8 bits in torch: enough where rounding alone exceeds `ROUNDED`."""
FIRST_IDS = 100
LEAD = 6
"""Errors that a lead must exceed, in root mean squares of the errors of all logits."""
LEGACY = "llama.cpp puts a space before every text and after every special token"
FLOOR = -80.0
"""Smaller logarithms of probabilities are no normal float32 numbers as probabilities."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|begin|>' + message['role'] + '\\n' }}"
    "{{ message['content'] | trim }}{{ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\\n' }}{% endif %}"
)
CHATS = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hi there "}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!\nHow are you?"},
        {"role": "user", "content": "Fine, thanks"},
    ],
)


@dataclass(frozen=True)
class Expected:
    """The results that a file must give: `log_probabilities` (T, V) after each of the tokens `ids` (T)."""

    ids: list[int]
    log_probabilities: NDArray[np.float32]
    rounded: NDArray[np.float32] | None
    """The same with activations of 8 bits, if the artifact has matrices that llama.cpp multiplies with these."""
    logits: Callable[[list[int]], NDArray[np.float32]]
    """Tokens (T) -> logits (T, V)."""
    tokenizer: Any
    legacy: Any | None
    """The tokenizer in the form in which llama.cpp knows it, if that is another."""
    ends: list[int]
    """Ids at which generation ends."""


@contextmanager
def expected_of(artifact: Path) -> Iterator[Expected]:
    tokenizer = AutoTokenizer.from_pretrained(artifact, trust_remote_code=False)
    source, config = ArtifactSource(artifact), load_config(artifact)
    window = getattr(config, "sliding_window", None) if config.model_type == "phi3" else None
    ids = windows_of_test_text(tokenizer, "builtin", min(LENGTH, window or LENGTH), 1).ids[0].tolist()
    ends = list(special_ids(artifact, config.get_text_config().vocab_size, tokenizer).eos)
    with exact_model(artifact, torch.float32).whole() as model:

        def logits(sequence: list[int]) -> NDArray[np.float32]:
            with torch.no_grad():
                found = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
            return np.asarray(found.float())

        def log_probabilities() -> NDArray[np.float32]:
            return np.asarray(torch.from_numpy(logits(ids)).log_softmax(-1))

        names = [entry.name for entry in source.entries if entry.target.grid]
        hooks = [model.get_submodule(name).register_forward_pre_hook(round_input) for name in names]
        rounded = log_probabilities() if names else None
        for hook in hooks:
            hook.remove()
        yield Expected(ids, log_probabilities(), rounded, logits, tokenizer, legacy_of(tokenizer), ends)


def round_input(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Activations as llama.cpp's Q8_0: 8 bits in groups of 32 with a scale in float16."""
    groups = inputs[0].unflatten(-1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, groups / scales, 0.0).round()
    return ((codes * scales.half().float()).flatten(-2),)


def legacy_of(tokenizer: Any) -> Any | None:
    """A SentencePiece tokenizer with a space before every piece of text, if this one has it before the first only."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if (described["pre_tokenizer"] or {}).get("type") != "Metaspace":
        return None
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    described["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced]}
    described["pre_tokenizer"] = None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)))


def check(model: LlamaCpp, expected: Expected, tolerance: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Measurements, and what is wrong by the name of the check."""
    measured, wrong = check_logits(model, expected, tolerance)
    found = {
        "greedy": check_greedy(model, expected, measured["largest_error"]),
        "tokens": check_tokens(model, expected),
        "template": check_template(model, expected),
        "end of text": check_end(model, expected),
    }
    return measured, wrong | {name: reason for name, reason in found.items() if reason}


def check_logits(model: LlamaCpp, expected: Expected, tolerance: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The same top token is demanded where its lead over the second exceeds `LEAD` times the error of one logit."""
    vocabulary, exact = expected.log_probabilities.shape[1], expected.log_probabilities
    found = np.stack([model.log_probabilities(expected.ids[: i + 1], vocabulary) for i in range(len(expected.ids))])
    error, differences = errors(found, exact)
    ordered = np.sort(exact, axis=1)
    compared = ordered[:, -1] - ordered[:, -2] > LEAD * np.sqrt(np.mean(differences**2))
    same = found.argmax(1) == exact.argmax(1)
    measured = {
        "relative_error": error,
        "tolerance": tolerance,
        "largest_error": float(np.abs(differences).max()),
        "places": len(same),
        "top_tokens_compared": int(compared.sum()),
        "top_tokens_equal": int(same.sum()),
    }
    is_close = error <= tolerance
    if tolerance == ROUNDED and expected.rounded is not None:
        measured["error_of_rounding"], _ = errors(expected.rounded, exact)
        measured["error_after_rounding"], _ = errors(found, expected.rounded)
        is_close = is_close or measured["error_after_rounding"] <= LIKE_ROUNDED
    if not is_close:
        return measured, {"logits": f"relative error {error:.1e}, more than {tolerance:.0e}"}
    if not same[compared].all():
        return measured, {"logits": f"another top token after {1 + int(np.flatnonzero(compared & ~same)[0])} tokens"}
    return measured, {}


def errors(found: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
    """The relative error of (T, V), every place less its mean, and the differences (T, V)."""
    centred = [np.maximum(values, FLOOR) for values in (found, expected)]
    centred = [values - values.mean(1, keepdims=True) for values in centred]
    differences = centred[0] - centred[1]
    return float(np.linalg.norm(differences) / np.linalg.norm(centred[1])), differences


def check_greedy(model: LlamaCpp, expected: Expected, error: float) -> str:
    """Every token is the reference's own choice, or behind it by less than twice the error moves a lead."""
    prompt = expected.ids[:PROMPT]
    tokens, ended = model.generate(prompt, NEW_TOKENS)
    choices = expected.logits([*prompt, *tokens])[PROMPT - 1 :]
    for i, token in enumerate(tokens):
        if choices[i].max() - choices[i][token] > 4 * error:
            return f"generated token {i} is {token}, not {int(choices[i].argmax())}"
    if ended and tokens[-1] not in [*expected.ends, *added_ids(expected)]:
        return f"the text ends at token {tokens[-1]}"
    return "" if ended or len(tokens) == NEW_TOKENS else f"the text stops after {len(tokens)} tokens"


def added_ids(expected: Expected) -> list[int]:
    """Ids of special tokens. llama.cpp knows some by name, and ends a text there too."""
    return [i for i, token in expected.tokenizer.added_tokens_decoder.items() if token.special]


def check_tokens(model: LlamaCpp, expected: Expected) -> str:
    tokenizer = expected.legacy or expected.tokenizer
    wrong = [text for text in AWKWARD if model.tokenize(text) != tokenizer(text)["input_ids"]]
    return f"{len(wrong)} of {len(AWKWARD)} texts have other tokens: {wrong}" if wrong else ""


def check_template(model: LlamaCpp, expected: Expected) -> str:
    """Prompts and their tokens. llama.cpp leaves out a leading BOS token that its tokenizer adds again."""
    tokenizer = expected.tokenizer
    if not tokenizer.chat_template:
        return ""
    if model.template() != tokenizer.chat_template:
        return "another template"
    for chat in CHATS:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = (expected.legacy or tokenizer)(text, add_special_tokens=False)["input_ids"]
        rendered = model.render(chat)
        if text.removeprefix(tokenizer.bos_token or "") != rendered.removeprefix(tokenizer.bos_token or ""):
            return f"{rendered!r}, not {text!r}"
        if model.tokenize(rendered) != ids:
            return f"{rendered!r} becomes {model.tokenize(rendered)}, not {ids}"
    return ""


def check_end(model: LlamaCpp, expected: Expected) -> str:
    """Generation ends where transformers ends it, and not in the text, nor at small ids that llama.cpp may assume."""
    prompt = expected.ids[:PROMPT]
    missed = [i for i in expected.ends if not model.stops_at(i, prompt)]
    if missed:
        return f"does not stop at {missed}"
    ids = dict.fromkeys([*range(FIRST_IDS), *expected.ids])
    stops = [i for i in ids if i not in [*expected.ends, *added_ids(expected)] and model.stops_at(i, prompt)]
    return f"stops at {stops}" if stops else ""


def make_models(names: Sequence[str], work: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Checkpoints with the artifacts to make of them: the bundled model in every dtype, and small random ones."""
    for dtype in DTYPES if "bundled" in names else ():
        folder = work / f"bundled-{dtype}"
        model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=dtype, trust_remote_code=False)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(BUNDLED, trust_remote_code=False).save_pretrained(folder)
        yield f"bundled {dtype}", folder, list(ARTIFACTS) if dtype == "bfloat16" else ["50%"]
    for name in MODELS:
        if name in names:
            folder = build(name, work / name)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.chat_template = ("{{ bos_token }}" if tokenizer.bos_token else "") + TEMPLATE
            tokenizer.save_pretrained(folder)
            yield name, folder, list(ARTIFACTS)


def verify(model: str, setting: str, checkpoint: Path, work: Path) -> dict[str, Any]:
    """One row: of the file and of its copy in float32. Its `wrong` is empty if all is right."""
    row: dict[str, Any] = {"model": model, "artifact": setting}
    recipe = mspc.Recipe(**ARTIFACTS[setting], allocator="uniform", num_sequences=4, sequence_length=64)
    artifact = mspc.compress(checkpoint, recipe, out=work / "artifact", overwrite=True, progress=False)
    folder = artifact.export("gguf", work / "export", overwrite=True, progress=False)
    in_transformers = json.loads((folder / "verification.json").read_text())["runtimes"]["transformers"]
    row["transformers"] = in_transformers.get("relative_error", in_transformers.get("reason"))
    row["types"] = kinds_in(folder / FILE)
    exact = set(row["types"]) <= {"F32", "F16"}
    copy = copy_as_float32(folder / FILE, work / "float32.gguf")
    row["wrong"] = {}
    with expected_of(artifact.path) as expected:
        row["known"] = [LEGACY] if expected.legacy else []
        runs = (("as_it_is", folder / FILE, FLOAT if exact else ROUNDED), ("in_float32", copy, FLOAT))
        for label, file, tolerance in runs:
            try:
                with running(file, LENGTH + NEW_TOKENS) as loaded:
                    row[label], wrong = check(loaded, expected, tolerance)
            except LlamaCppError as error:
                wrong = {"loading": str(error)}
            row["wrong"] |= {f"{name}, {label}": reason for name, reason in wrong.items()}
    return row


def make_faults(work: Path) -> Iterator[dict[str, Any]]:
    """Every fault of `FAULTS` in the float32 copy of a small Llama, and the checks that notice it."""
    ((_, checkpoint, _),) = make_models(["llama"], work)
    recipe = mspc.Recipe(sparsity=0.5, allocator="uniform", num_sequences=4, sequence_length=64)
    artifact = mspc.compress(checkpoint, recipe, out=work / "artifact", overwrite=True, progress=False)
    folder = artifact.export("gguf", work / "export", overwrite=True, verify=False, progress=False)
    with expected_of(artifact.path) as expected:
        for name, fault in FAULTS.items():
            file = copy_as_float32(folder / FILE, work / "fault.gguf", fault.fields, fault.change)
            try:
                with running(file, LENGTH + NEW_TOKENS) as loaded:
                    _, wrong = check(loaded, expected, FLOAT)
            except LlamaCppError as error:
                wrong = {"loading": str(error)}
            yield {"fault": name, "must_be_noticed_by": fault.noticed_by, "noticed_by": wrong}


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    headings = (
        "model",
        "artifact",
        "types",
        "transformers",
        "relative error",
        "in float32",
        "top tokens equal",
        "wrong",
    )
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        found = [row.get(label) for label in ("as_it_is", "in_float32")]
        errors = [f"{part['relative_error']:.1e}" if part else "" for part in found]
        top = f"{found[0]['top_tokens_equal']} of {found[0]['places']}" if found[0] else ""
        error = row["transformers"]
        shown = f"{error:.1e}" if isinstance(error, float) else str(error)[:30]
        types = " ".join(row["types"])
        table.add_row(row["model"], row["artifact"], types, shown, *errors, top, ", ".join(row["wrong"]) or "nothing")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("out/verify_llamacpp.json"))
    parser.add_argument("--models", nargs="+", choices=["bundled", *MODELS])
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[], help="folders, instead of --models")
    parser.add_argument("--artifacts", nargs="+", choices=list(ARTIFACTS), help="with --checkpoints")
    args = parser.parse_args()
    if args.checkpoints and args.models:
        parser.error("--models has no effect with --checkpoints. Leave one of them out.")
    if args.artifacts and not args.checkpoints:
        parser.error("--artifacts has an effect with --checkpoints only. Give both, or leave it out.")
    packages = ("mspc", "torch", "transformers", "gguf", "numpy", "xllamacpp")
    rows: list[dict[str, Any]] = []
    faults: list[dict[str, Any]] = []
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "make verify-llamacpp",
        "hardware": f"CPU, {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "rows": rows,
        "faults": faults,
    }
    with tempfile.TemporaryDirectory(prefix="mspc-llamacpp-") as name:
        work = Path(name)
        own = [(folder.resolve().name, folder, args.artifacts or list(ARTIFACTS)) for folder in args.checkpoints]
        for model, checkpoint, settings in own or make_models(args.models or ["bundled", *MODELS], work):
            for setting in settings:
                rows.append(verify(model, setting, checkpoint, work))
                write_json(args.json, result)  # now, so that an error later loses nothing
            Console(width=170).print(table_of(rows[-len(settings) :]))
        for row in make_faults(work):
            faults.append(row)
            write_json(args.json, result)
            print(f"made on purpose: {row['fault']}: noticed by {', '.join(row['noticed_by']) or 'nothing'}")
    problems = [f"{row['model']}, {row['artifact']}: {row['wrong']}" for row in rows if row["wrong"]]
    missed = [row for row in faults if row["must_be_noticed_by"] not in row["noticed_by"]]
    problems += [f"{row['fault']} is not noticed by {row['must_be_noticed_by']}" for row in missed]
    for problem in problems:
        print("WRONG", problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
