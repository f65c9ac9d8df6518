"""From pretraining to standard models that run where uhl is not: by commands alone, on hosts of the package.

    python tests/benchmarks/export_builtin.py --work FOLDER --output tests/benchmarks/results/export_builtin.json

An adapter is pretrained on builtin:base, tuned to a LoRA without labels on each target, and exported there as `merged`
and as `peft`.  Both are loaded in a process where uhl cannot be imported, by transformers and by peft, and asked the
evaluation texts.  What WORK holds already is not made again.  Arguments after `--` go to `uhl pretrain`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhl_cli.data import Examples, load_task
from uhl_cli.files import write_text
from uhl_cli.metrics import paired_difference, score

SOURCE, TASK = "builtin:base", "reviews"
TARGETS = ("builtin:small", "builtin:decoder")
FORMATS = ("merged", "peft")
OUTSIDE = Path(__file__).with_name("without_uhl.py")


def uhl(*arguments: object) -> tuple[dict[str, Any], float]:
    """What a command prints under --json, and its seconds."""
    started = time.monotonic()
    command = [sys.executable, "-m", "uhl_cli", *map(str, arguments), "--json", "--quiet", "--offline"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: uhl {' '.join(map(str, arguments))}")
    return json.loads(done.stdout), round(time.monotonic() - started, 1)


def answers(folder: Path, arguments: dict[str, Any] | None, texts: tuple[str, ...]) -> dict[str, Any]:
    """Logits and labels of an export, from a process without uhl.

    :param arguments: What loading a peft export takes; None for a merged one.
    """
    question = json.dumps({"folder": str(folder), "arguments": arguments, "texts": texts})
    done = subprocess.run([sys.executable, OUTSIDE], input=question, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(target: str, arguments: argparse.Namespace, dev: Examples) -> dict[str, Any]:
    """One target: the tuned model, and both exports of it, from outside."""
    assert dev.labels is not None
    work, seconds = arguments.work, {}
    place = work / target.replace(":", "-")
    steps = ["--steps", arguments.steps] if arguments.steps else []
    common = ["--target", target, *steps, "--device", "cpu"]
    tuned, asked = place.with_suffix(".lora"), work / "dev.txt"
    asked.write_text("".join(f"{' '.join(text.split())}\n" for text in dev.texts), encoding="utf-8")
    if not tuned.exists():
        _, seconds["tuned"] = uhl(
            "tune", work / "adapter.safetensors", "--parameters", "lora", "--output", tuned, *common
        )
    said = place.with_suffix(".jsonl")
    uhl("predict", tuned, "--input", asked, "--output", said, "--overwrite", "--device", "cpu")
    labels = [json.loads(line)["label"] for line in said.read_text(encoding="utf-8").splitlines()]
    logits: dict[str, NDArray[np.float64]] = {}
    sizes = {}
    for form in FORMATS:
        folder, kept = place.with_suffix(f".{form}"), place.with_suffix(f".{form}.json")
        if not kept.exists():
            report, seconds[form] = uhl(
                "export", work / "adapter.safetensors", "--format", form, "--output", folder, *common
            )
            write_text(kept, json.dumps(report))
        report = json.loads(kept.read_text(encoding="utf-8"))
        sizes[form] = report["files"]
        answer = answers(folder, None if form == "merged" else report["arguments"], dev.texts)
        if answer["uhl"] or answer["odd"]:
            raise SystemExit(f"{folder}: uhl is there, or loading said {answer['odd']}")
        names = answer["labels"]
        logits[form] = np.array(answer["logits"])
    classes = {"tuned": [names.index(label) for label in labels]}
    classes |= {form: each.argmax(-1).tolist() for form, each in logits.items()}
    difference = paired_difference("accuracy", classes["merged"], classes["tuned"], dev.labels, names)
    return {
        "target": target,
        "labels": names,
        "scores": {name: score("accuracy", each, dev.labels, names).model_dump() for name, each in classes.items()},
        "merged_minus_tuned": difference.model_dump(),
        "largest_difference_of_a_logit": float(np.abs(logits["merged"] - logits["peft"]).max()),
        "files": sizes,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--steps", type=int, help="steps of tuning and of export; by default theirs")
    parser.add_argument("--limit-evaluation", type=int, help="texts that are asked; by default all")
    parser.add_argument("pretrain", nargs="*", help="arguments of `uhl pretrain`, after --")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    dev = load_task(TASK, limit_evaluation=arguments.limit_evaluation, need_train=False).evaluation
    assert dev is not None
    adapter = arguments.work / "adapter.safetensors"
    if not adapter.exists():
        uhl("pretrain", "--host", SOURCE, "--task", TASK, "--output", adapter, "--device", "cpu", *arguments.pretrain)
    rows = [row(target, arguments, dev) for target in arguments.targets]
    write_text(arguments.output, json.dumps({"pretrain": arguments.pretrain, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
