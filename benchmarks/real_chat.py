"""The chat text of quality_real.py: replies of a dense model to the prompts of real_texts.py, drawn with a fixed seed.

    python benchmarks/real_chat.py MODEL OUT.json

OUT holds one object for each prompt: `ids` of the conversation by the model's own chat template, and `start`, the
place in them where the reply begins. A reply ends at the end of the turn or after `LONGEST` tokens.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from real_texts import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from mspc.storage.files import write_json

SEED, LONGEST = 0, 160
"""Seed of the draws, and tokens of a reply, at most."""


def replies(folder: Path, prompts: tuple[str, ...] = PROMPTS, longest: int = LONGEST) -> list[dict[str, Any]]:
    """The conversations, drawn at temperature 1 from the whole distribution of the model in float32.

    Empty if the model has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        return []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    asked = [_rendered(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, asked))
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([[padding] * (width - len(one)) + one for one in asked])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in asked])
    torch.manual_seed(SEED)
    with torch.no_grad():
        drawn = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest,
            pad_token_id=padding,
        )  # fmt: skip
    found = []
    for one, row in zip(asked, drawn[:, width:].tolist(), strict=True):
        places = [place for place, token in enumerate(row) if token in ends]
        found.append({"ids": one + row[: places[0] + 1 if places else None], "start": len(one)})
    return found


def _rendered(tokenizer: Any, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), replies(Path(sys.argv[1])))
