"""Train the small Llama of `examples/tiny_llama` on the documentation and source of the running Python.

    python examples/train_tiny.py --out examples/tiny_llama --tokens 12000000
    python examples/train_tiny.py --moe --out tiny_moe --tokens 2500000

The text is the calibration split of `mspc.text.builtin`, three times, and the tests of the interpreter once, if they
are installed. Neither the model nor its tokenizer sees modules of the test split. Training takes about 75 minutes on
two CPU cores. It writes config, tokenizer, bf16 safetensors, and `training.json` with the test loss and two samples.

`--moe` makes a Mixtral of 5.9 million parameters instead: 4 blocks of 8 experts, and each token is routed to 2.
"""

import argparse
import importlib.util
import json
import math
import platform
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mspc.text import builtin as builtin_text

END = "<|endoftext|>"
LONGEST_DOCUMENT = 300_000  # characters; longer ones among the tests are tables
CONTEXT = 256
PROMPTS = ("def read_lines(path):\n", "The with statement is used to")


def training_documents() -> tuple[list[str], list[str]]:
    library = builtin_text.documents("calibration")
    tests = builtin_text.module_sources("test", importlib.util.find_spec("test"))
    return library, [
        text for name, text in tests if builtin_text.split_of(name) == "calibration" and len(text) < LONGEST_DOCUMENT
    ]


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids += [tokenizer.eos_token_id, *encoding.ids]
    return torch.tensor(ids)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: torch.Tensor, windows: int) -> float:
    batches = ids[: windows * CONTEXT].view(-1, CONTEXT).split(16)
    options = {"use_cache": False} | ({"output_router_logits": False} if is_moe(model) else {})
    total = sum(float(model(input_ids=b, labels=b, **options).loss) * len(b) for b in batches)
    return total / sum(len(b) for b in batches)


def is_moe(model: PreTrainedModel) -> bool:
    return model.config.model_type == "mixtral"


def new_model(moe: bool, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    common = {
        "vocab_size": 4096,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if not moe:
        own = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64}
        return LlamaForCausalLM(LlamaConfig(**common | own))
    own = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 48}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**common | own | experts, router_aux_loss_coef=0.02))


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(out[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moe", action="store_true", help="a mixture of experts")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    order = random.Random(args.seed)

    library, tests = training_documents()
    tokenizer = train_tokenizer(library + tests, vocab_size=4096)
    documents = library * 3 + tests
    order.shuffle(documents)
    ids = encode(tokenizer, documents)
    test_ids = encode(tokenizer, builtin_text.documents("test"))
    print(f"{len(ids):,} training tokens, {len(test_ids):,} test tokens", flush=True)

    model = new_model(args.moe, tokenizer)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    steps = args.tokens // (args.batch * CONTEXT)
    warmup = 200

    def rate(step: int) -> float:
        """Linear warm-up, then a cosine to 2% of the peak."""
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / (steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    compiled = model if args.moe else torch.compile(model)  # the number of tokens of an expert varies
    starts: list[int] = []
    begin = time.time()
    for step in range(steps):
        if len(starts) < args.batch:
            offset = order.randrange(CONTEXT)
            starts = list(range(offset, len(ids) - CONTEXT, CONTEXT))
            order.shuffle(starts)
        batch = torch.stack([ids[s : s + CONTEXT] for s in (starts.pop() for _ in range(args.batch))])
        loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.time() - begin:.0f} s", flush=True)
        if step % 1000 == 999 or step == steps - 1:
            save(args, model, tokenizer, step + 1, len(ids), test_ids, time.time() - begin)


def save(args, model, tokenizer, step, corpus_tokens, test_ids, seconds) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    loss = mean_loss(model, test_ids, windows=400)
    record = {
        "python": platform.python_version(),
        "tokens_seen": step * args.batch * CONTEXT,
        "corpus_tokens": corpus_tokens,
        "test_loss": round(loss, 4),
        "test_perplexity": round(math.exp(loss), 3),
        "seconds": round(seconds),
        "seed": args.seed,
        "samples": [sample(model, tokenizer, prompt) for prompt in PROMPTS],
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    tokenizer.save_pretrained(args.out)
    weights = {name: p.detach().to(torch.bfloat16) for name, p in model.state_dict().items()}
    saved = type(model)(model.config).to(torch.bfloat16)
    saved.load_state_dict(weights)
    if is_moe(saved):
        saved.config.output_router_logits = False
    saved.save_pretrained(args.out)
    if is_moe(saved):
        saved.config.output_router_logits = True  # it is the config of the model that is trained, too
    print(record, flush=True)


if __name__ == "__main__":
    main()
