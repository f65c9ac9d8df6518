"""A process that has no uhl and asks an export for its logits: a question in JSON on stdin, the answer on stdout.

`export_builtin.py` starts it.  The question has the folder, the texts, and what loading a peft export takes (null for a
merged one).
"""

from __future__ import annotations

import json
import sys

import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TEXTS_PER_BATCH = 32


class NoUhl:
    """An import hook for which uhl is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse uhl; leave all else to the others."""
        if name.split(".")[0] == "uhl_cli":
            raise ImportError("uhl is not installed here")


def main() -> None:
    """Load, run, print; `odd` names what loading said was missing or left over."""
    sys.meta_path.insert(0, NoUhl())  # type: ignore[arg-type]
    question = json.loads(sys.stdin.read())
    folder, given, odd = question["folder"], question["arguments"], []
    if given is None:
        model, notes = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        odd = sorted(key for key, value in notes.items() if value)
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **given)  # unmerged
    model.eval()
    tokenizer, texts, logits = AutoTokenizer.from_pretrained(folder), question["texts"], []
    with torch.inference_mode():
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            some = texts[start : start + TEXTS_PER_BATCH]
            logits += model(**tokenizer(some, padding=True, truncation=True, return_tensors="pt")).logits.tolist()
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    print(json.dumps({"logits": logits, "labels": labels, "odd": odd, "uhl": "uhl_cli" in sys.modules}))


if __name__ == "__main__":
    main()
