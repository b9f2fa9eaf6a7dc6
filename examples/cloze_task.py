"""A small task for lm-evaluation-harness, made from text that every Python carries: no download.

    python examples/cloze_task.py out/tasks
    mspc eval examples/tiny_llama --tasks builtin_cloze --include-path out/tasks

Each question is a piece of documentation or source that mspc never calibrates on (the test split of `builtin`). It
asks for the next words: those that follow, or one of three runs of as many words from elsewhere in the same document.
Guessing has 25% right. The folder holds the questions and a task file with their absolute path.
"""

import json
import random
import sys
from pathlib import Path

from mspc.text.builtin import documents

NAME = "builtin_cloze"
CONTEXT, ANSWER, CHOICES = 40, 4, 4
"""Words before the gap, words in it, and answers to choose from."""
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
    validation: {shots}
test_split: test
fewshot_split: validation
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def questions(count: int, seed: int = 0) -> list[dict[str, object]]:
    """`count` questions with `context`, `choices` and the index of the right one as `answer`; a seed decides all."""
    chance, found = random.Random(seed), []
    texts = [words for text in documents("test") if len(words := text.split()) >= 4 * (CONTEXT + ANSWER)]
    while len(found) < count:
        words = chance.choice(texts)
        start = chance.randrange(len(words) - CONTEXT - ANSWER)
        gap = start + CONTEXT
        right = words[gap : gap + ANSWER]
        others = {tuple(words[i : i + ANSWER]) for i in chance.sample(range(len(words) - ANSWER), 4 * CHOICES)}
        wrong = sorted(others - {tuple(right)})
        if len(wrong) < CHOICES - 1:
            continue
        choices = [right, *(list(other) for other in chance.sample(wrong, CHOICES - 1))]
        chance.shuffle(choices)
        found.append({
            "context": " ".join(words[start:gap]),
            "choices": [" ".join(choice) for choice in choices],
            "answer": choices.index(right),
        })  # fmt: skip
    return found


def write(folder: Path, count: int = 200) -> Path:
    """The task file in `folder`, with `count` questions and ten examples for `--num-fewshot` next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"file": folder / f"{NAME}.jsonl", "shots": folder / f"{NAME}_examples.jsonl"}
    for path, rows in ((files["file"], questions(count)), (files["shots"], questions(10, seed=1))):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    quoted = {name: json.dumps(str(path.resolve())) for name, path in files.items()}
    task = folder / f"{NAME}.yaml"
    task.write_text(TASK.format(name=NAME, **quoted), encoding="utf-8")
    return task


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "out/tasks")))
