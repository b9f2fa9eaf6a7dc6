# %% [markdown]
# # A model, smaller: compress, look, generate
#
# The cells of a notebook: open this file in VS Code, or `pip install jupytext` and
# `jupytext --to notebook examples/notebook.py`. It runs offline in a minute on the bundled model.

# %%
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mspc

# As a script: python examples/notebook.py [OUT [MODEL]]
arguments = sys.argv[1:] if "__file__" in globals() else []
OUT = Path(arguments[0] if arguments else tempfile.mkdtemp())
MODEL = Path(arguments[1] if len(arguments) > 1 else "examples/tiny_llama")

# %% [markdown]
# Any transformers model will do, in memory or in a folder. The model in memory stays as it is.
# `progress` may be a function: here it keeps the error of each matrix, and returning False would stop the run.

# %%
model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=False)
tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
errors: dict[str, float] = {}


def keep_errors(event: mspc.Event) -> None:
    if event.row is not None:
        errors[event.matrix] = event.row["output_error"]


recipe = mspc.Recipe(bits_per_weight=3.25, group_size=64, effort="fast", num_sequences=8, sequence_length=256)
artifact = mspc.compress(model, recipe, tokenizer=tokenizer, out=OUT / "small", progress=keep_errors, overwrite=True)
artifact  # noqa: B018  in a notebook: a table with a row for each matrix

# %% [markdown]
# What did it cost? The run has measured it on text that it used for nothing else; `evaluate` does it on any text.

# %%
print(artifact)
print(artifact.manifest["evaluation"])
small = mspc.evaluate(artifact, max_windows=20, against=MODEL, progress=False)
low, high = small.divergence_interval
print(f"perplexity {small.reference_perplexity:.2f} -> {small.perplexity:.2f}")
print(f"KL {small.divergence:.4f} ({low:.4f} to {high:.4f}) nats per token")

# %% [markdown]
# Where did the weights go? One bar for each matrix: the share of zeros, labelled with its bits.

# %%
import matplotlib  # noqa: E402  a cell of its own: mspc[plots]

if arguments:
    matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

rows = artifact.manifest["matrices"]
figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
bars = axes.bar(range(len(rows)), [100 * row["sparsity"] for row in rows])
axes.bar_label(bars, [str(row["bits"]) for row in rows], fontsize=6)
axes.set(xlabel="matrix, in the order of execution", ylabel="zeros (%)", title="sparsity, and bits of kept weights")
figure.savefig(OUT / "plan.png", dpi=150)

# %% [markdown]
# Run it as it is stored: the matrices stay packed.

# %%
loaded = artifact.load(device="cpu")
prompt = tokenizer("The function returns", return_tensors="pt")
with torch.no_grad():
    generated = loaded.generate(**prompt, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(generated[0]))
