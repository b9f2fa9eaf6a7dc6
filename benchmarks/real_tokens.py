"""The tokens of quality_real.py for one model: calibration sequences that every row gets, and the test texts.

    python benchmarks/real_tokens.py MODEL FOLDER JOB.json

JOB names the files of `texts` and of `chat`, the conversations of real_chat.py, and has the sizes. FOLDER gets
`calibration.safetensors` with `ids` (N, T) int64, and `test.safetensors` as real_evaluation.py reads it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from real_evaluation import Scored, write_sequences
from real_sizes import matrices
from transformers import AutoConfig

from mspc.model.hub import load_tokenizer
from mspc.storage.dequantized import origin_note
from mspc.storage.files import write_json, write_tensors
from mspc.text.tokens import calibration_tokens, windows_of_test_text

SEED = 0


def write_tokens(model: Path, folder: Path, job: dict[str, Any]) -> None:
    """Write both files, and `tokens.json`, which describes them. `group_size` is the largest that divides all rows."""
    tokenizer, length = load_tokenizer(model), job["sequence_length"]
    calibration = calibration_tokens(tokenizer, job["texts"]["calibration"], job["num_sequences"], length, SEED)
    tests = {}
    for name in ("prose", "code"):
        windows = windows_of_test_text(tokenizer, job["texts"][name], length, job["max_windows"])
        first = max(len(windows.begin), 1)
        tests[name] = [Scored(ids.clone(), first) for ids in windows.ids]
    chats = json.loads(Path(job["chat"]).read_text(encoding="utf-8"))
    if chats:
        tests["chat"] = [Scored(torch.tensor(chat["ids"]), chat["start"]) for chat in chats]
    write_tensors(folder / "calibration.safetensors", {"ids": calibration.ids})
    write_sequences(folder / "test.safetensors", tests)
    columns = {shape[1] for shape in matrices(model).values()}
    group = next(size for size in (128, 64, 32) if not any(count % size for count in columns))
    described: dict[str, Any] = {
        "calibration_sha256": calibration.sha256,
        "begin": list(calibration.begin),
        "group_size": group,
    }
    described["origin"] = origin_note(AutoConfig.from_pretrained(model, trust_remote_code=False))
    scored = {name: sum(len(one.ids) - one.first for one in own) for name, own in tests.items()}
    write_json(folder / "tokens.json", described | {"scored": scored})


if __name__ == "__main__":
    write_tokens(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))
