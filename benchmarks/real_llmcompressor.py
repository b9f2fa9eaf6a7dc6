"""Runs in the environment of llm-compressor, for quality_real.py: one of its methods, saved as a dense checkpoint.

    python real_llmcompressor.py METHOD [OPTIONS] MODEL TOKENS.safetensors OUT

METHOD is sparsegpt, wanda or gptq, each with its defaults but for what is given. Everything is computed in float32.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor_job import IGNORE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def modifier(args: argparse.Namespace) -> Any:
    if args.method == "gptq":
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.gptq import GPTQModifier

        weights = QuantizationArgs(num_bits=args.bits, strategy="group", group_size=args.group_size, symmetric=True)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return GPTQModifier(config_groups={"all": scheme}, ignore=[IGNORE])
    if args.method == "wanda":
        from llmcompressor.modifiers.pruning import WandaPruningModifier as Modifier
    else:
        from llmcompressor.modifiers.pruning import SparseGPTModifier as Modifier
    structure = args.structure or "0:0"
    return Modifier(sparsity=args.sparsity, mask_structure=structure, targets=["Linear"], ignore=[IGNORE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("sparsegpt", "wanda", "gptq"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--structure")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    ids = load_file(args.tokens)["ids"]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=modifier(args),
        dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        pad_to_max_length=False,
    )
    # The weights are those of the grid already; only the description of the grid is left out.
    model.config.quantization_config = None
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if not name.endswith(("_scale", "_zero_point"))
    }
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    plain.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
