"""Runs in the environment of AutoRound, for quality_real.py: its signed gradient rounding, saved as a dense checkpoint.

    python real_autoround.py [--bits 3] [--group-size 64] MODEL TOKENS.safetensors OUT

Symmetric grids, and the iterations that are AutoRound's default.
"""

import argparse

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    ids = load_file(args.tokens)["ids"]
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    rounding = AutoRound(
        model, tokenizer, bits=args.bits, group_size=args.group_size, sym=True, dataset=rows, nsamples=len(rows),
        seqlen=ids.shape[1], device_map="cpu",
    )  # fmt: skip
    rounded, _ = rounding.quantize()
    weights = rounded.state_dict()
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict({name: weights[name].float() for name in plain.state_dict()})
    plain.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
