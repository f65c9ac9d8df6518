"""`uhl pretrain --teacher`: somebody's fine-tuned classifier, and somebody's LoRA, made into one file for other hosts.

    python tests/benchmarks/own_teachers.py --shared SHARED --work FOLDER --output RESULTS/own_teachers.json

Teachers are made by transformers and peft alone, with labels: minilm-l6 fine-tuned in full, and a LoRA of it.  Each is
scored by transformers itself, then speaks in place of labels for a file, which is carried to a target and tuned there
without labels.  Dev sets are read for scores alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from uhl_cli.commands.options import DataOptions, HostOptions, PretrainOptions, SourceOptions, TuneOptions
from uhl_cli.commands.pretrain import run_pretrain
from uhl_cli.commands.tune import run_tune
from uhl_cli.data import Examples, load_task
from uhl_cli.files import write_text
from uhl_cli.schema import TrainingConfig

SOURCE, TARGET = "minilm-l6", "minilm-l3"
RATES = {"full": 5e-5, "lora": 1e-3}
STEPS, WARMUP, BATCH_SIZE = 300, 30, 32
LIMIT_TRAIN, PRETRAIN_STEPS = 10_000, 600
NAMES = {0: "negative", 1: "positive"}


def teacher(kind: str, host: Path, train: Examples, output: Path) -> None:
    """Fine-tune as anybody would, and save."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(host)
    model = AutoModelForSequenceClassification.from_pretrained(
        host, num_labels=2, dtype=torch.float32, id2label=NAMES, label2id={name: key for key, name in NAMES.items()}
    )
    if kind == "lora":
        config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
        model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=RATES[kind])
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / STEPS)
    )
    drawn = random.Random(0)
    assert train.labels is not None
    model.train()
    for _ in range(STEPS):
        rows = drawn.sample(range(len(train)), BATCH_SIZE)
        texts = [train.texts[row] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        model(**batch, labels=torch.tensor([train.labels[row] for row in rows])).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.inference_mode()
def accuracy(kind: str, host: Path, folder: Path, dev: Examples) -> float:
    """As transformers, or peft on its base, gives it: the saved model loaded anew."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "lora":
        base = AutoModelForSequenceClassification.from_pretrained(host, num_labels=2, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    right = 0
    assert dev.labels is not None
    for start in range(0, len(dev), 64):
        texts = list(dev.texts[start : start + 64])
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        found = model(**batch).logits.argmax(-1).tolist()
        right += sum(a == b for a, b in zip(found, dev.labels[start : start + 64], strict=True))
    return right / len(dev)


def made(kind: str, shared: Path, work: Path) -> dict[str, Any]:
    """One teacher's row."""
    data = load_task("sst2", data=str(shared / "data" / "sst2"), offline=True)
    assert data.train is not None
    assert data.evaluation is not None
    host, folder, started = shared / "hosts" / SOURCE, work / f"teacher-{kind}", time.monotonic()
    if not folder.exists():
        teacher(kind, host, data.train, folder)
    row: dict[str, Any] = {"teacher": kind, "by_transformers": accuracy(kind, host, folder, data.evaluation)}
    row["teacher_seconds"] = round(time.monotonic() - started, 1)
    sst2 = DataOptions(task="sst2", data=str(shared / "data" / "sst2"), limit_train=LIMIT_TRAIN)
    path = work / f"taught-by-{kind}.safetensors"
    pretrained = run_pretrain(
        PretrainOptions(
            host=SourceOptions(device="cpu"),
            data=sst2,
            output=path,
            teacher=str(folder),
            training=TrainingConfig(max_steps=PRETRAIN_STEPS, mixed_precision="bf16"),
            licence="MIT",
            overwrite=True,
        )
    )
    tuned = run_tune(
        TuneOptions(
            adapter=path,
            target=HostOptions(name=str(shared / "hosts" / TARGET), device="cpu"),
            score_data=str(shared / "data" / "sst2"),
            parameters="lora",
            training={"mixed_precision": "bf16"},
            output=work / f"tuned-by-{kind}",
            overwrite=True,
            cache=False,
        )
    )
    assert pretrained.teacher_score is not None
    row |= {
        "by_uhl": pretrained.teacher_score.model_dump(),
        "adapter": pretrained.score.model_dump() if pretrained.score else None,
        "bytes": pretrained.bytes,
        "pretrain_seconds": round(pretrained.seconds, 1),
        "target": TARGET,
        "tune_seconds": round(tuned.seconds, 1),
    }
    return row | {name: score.model_dump() for name, score in tuned.scores.items()}


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of teachers and files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else []
    for kind in arguments.teachers:
        if any(row["teacher"] == kind for row in rows):
            continue
        rows.append(made(kind, arguments.shared, arguments.work))
        write_text(arguments.output, json.dumps(rows, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
