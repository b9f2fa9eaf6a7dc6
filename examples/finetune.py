"""Tune a 2:4 model on a text of your own, and keep its zeros: compress, train, round, export. Offline, on a CPU.

python examples/finetune.py [--text FILE] [--model examples/tiny_llama] [--out out/finetune]

The trainer needs accelerate (`mspc[runtime]`). A model on a GPU is trained there.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import mspc

HERE = Path(__file__).parent
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=HERE.parent / "CONTRIBUTING.md", help="text to tune on")
    parser.add_argument("--model", type=Path, default=HERE / "tiny_llama", help="dense model")
    parser.add_argument("--out", type=Path, default=Path("out/finetune"), help="folder for all results")
    parser.add_argument("--steps", type=int, default=40, help="steps of training")
    args = parser.parse_args()

    # 1. Prune to 2:4, and get an ordinary folder that transformers can train.
    quick = {"effort": "fast", "num_sequences": 16, "sequence_length": LENGTH, "eval": False}
    recipe = mspc.Recipe(pattern="2:4", **quick)
    pruned = mspc.compress(args.model, recipe, out=args.out / "pruned", overwrite=True)
    folder = pruned.export("dense", args.out / "pruned-dense", overwrite=True)

    # 2. Train with KeepZeros, which holds the pruned weights at zero.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    num_test = max(len(windows) // 8, 1)
    rows = [{"input_ids": row, "labels": row} for row in windows[:-num_test]]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    before = mspc.evaluate(model, windows[-num_test:], progress=False)
    masks = mspc.masks(model, pruned)
    settings = TrainingArguments(
        output_dir=str(args.out / "trainer"), max_steps=args.steps, per_device_train_batch_size=4, learning_rate=3e-4,
        lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True, seed=0,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows, callbacks=[mspc.KeepZeros(masks)]).train()
    after = mspc.evaluate(model, windows[-num_test:], progress=False)
    moved = sum(int(model.get_parameter(name)[~mask].count_nonzero()) for name, mask in masks.items())

    # 3. Round the tuned weights on the zeros that are there, and export them.
    tuned = args.out / "tuned-dense"
    model.to(torch.bfloat16).save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    small = mspc.compress(tuned, mspc.Recipe(keep_zeros=True, bits=4, **quick), out=args.out / "small", overwrite=True)
    small.export("sparse", args.out / "small-sparse", overwrite=True)
    rounded = mspc.evaluate(small, windows[-num_test:], progress=False)

    print(f"Pruned weights that are not zero after training: {moved}.")
    print(f"Patterns: {sorted({row['pattern'] for row in small.manifest['matrices']})}.")
    print(f"Perplexity on {num_test} windows that nothing was trained on: {before.perplexity:.2f} pruned, ", end="")
    print(f"{after.perplexity:.2f} tuned, {rounded.perplexity:.2f} tuned and rounded to 4 bits.")


if __name__ == "__main__":
    main()
