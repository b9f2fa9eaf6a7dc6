"""`mspc.recover` for quality_real.py: a sparse model trained towards the dense one, saved as a dense checkpoint.

    python benchmarks/real_recover.py DENSE ARTIFACT TEACHER TOKENS.safetensors OUT

DENSE is the dense export of ARTIFACT. The options of `recover` are its defaults.
"""

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mspc


def main() -> None:
    dense, artifact, teacher, tokens, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, trust_remote_code=False)
    found = mspc.recover(model, teacher, load_file(tokens)["ids"], artifact=artifact, progress=False)
    print(found)
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(teacher, trust_remote_code=False).save_pretrained(out)


if __name__ == "__main__":
    main()
