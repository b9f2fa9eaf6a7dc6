"""Run exported folders in auto-gptq on the CPU, for verify_autogptq.py and in the environment that it makes.

    python autogptq_logits.py PROMPT_LENGTH OUT FOLDER...

Every folder holds `verification.npz`. OUT/<folder>.npz gets the logits (B, T, V) float32 on its fixed tokens and the
greedy tokens (N) after the first PROMPT_LENGTH tokens of the first sequence. OUT/report.json gets the versions of all
packages and, for every folder, the class of its packed layers or the error that it raised.
"""

import json
import sys
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM


def run(folder: Path, prompt_length: int, out: Path) -> str:
    with np.load(folder / "verification.npz", allow_pickle=False) as file:
        ids, count = torch.from_numpy(file["ids"]), len(file["tokens"])
    loaded = AutoGPTQForCausalLM.from_quantized(
        str(folder),
        device="cpu",
        torch_dtype=torch.float32,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        trust_remote_code=False,
    )
    model = loaded.model.eval()
    sequence = ids[:1, :prompt_length]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float().numpy()
        for _ in range(count):
            best = model(input_ids=sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, best], 1)
    np.savez(out / f"{folder.name}.npz", logits=logits, tokens=sequence[0, prompt_length:].numpy())
    packed = {type(layer) for layer in model.modules() if hasattr(layer, "qzeros")}
    return ", ".join(sorted(f"{kind.__module__}.{kind.__name__}" for kind in packed))


def main() -> None:
    prompt_length, out, folders = int(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]]
    report: dict[str, dict[str, str]] = {
        "versions": {found.metadata["Name"]: found.version for found in distributions()},
        "layers": {},
        "failed": {},
    }
    for folder in folders:
        try:
            report["layers"][folder.name] = run(folder, prompt_length, out)
        except Exception as error:  # users of auto-gptq would meet the same error
            report["failed"][folder.name] = f"{type(error).__name__}: {error}"
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
