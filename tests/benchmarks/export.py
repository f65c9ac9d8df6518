"""Exports beside what they come from: zero-shot port, tuned LoRA, LoRA retrained with labels, by one dev set.

    python tests/benchmarks/export.py --shared SHARED --file sst2.safetensors --work FOLDER --output RESULTS/export.json

FILE is an adapter file with a transfer set.  On each target it is ported, tuned to a LoRA without labels (`uhl tune`),
tuned to a LoRA with labels, and exported twice without labels: from the transfer set, and from the tuned LoRA on.  All
are trained by the defaults of their command, and the dev set is read for scores alone.  What is finished is kept in
WORK and in the output, so that an interrupted call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.export import run_export
from uhl_cli.commands.options import DataOptions, ExportOptions, HostOptions, TuneOptions
from uhl_cli.commands.scoring import Classes, references_of
from uhl_cli.commands.tune import run_tune
from uhl_cli.data import Examples, TaskData, evaluation_data
from uhl_cli.data.tasks import Task
from uhl_cli.files import write_text
from uhl_cli.formats.export import is_export, read_export
from uhl_cli.formats.folder import is_ported
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.metrics import paired_difference, score
from uhl_cli.train.classifier import load_classifier

TARGETS = ("minilm-l3", "builtin:decoder", "builtin:small")
LABELLED_STEPS = 3000


class Bench:
    """One adapter file on one target."""

    def __init__(self, arguments: argparse.Namespace, target: str) -> None:
        self.arguments = arguments
        self.target = target if target.startswith("builtin:") else str(arguments.shared / "hosts" / target)
        self.adapter = UniversalAdapter.load(arguments.file)
        self.task: Task = self.adapter.manifest.task
        asked = DataOptions(data=str(arguments.shared / "data" / self.task.name)).model_dump()
        self.data: TaskData = evaluation_data(self.task, asked, offline=True, seed=0)
        self.work: Path = arguments.work / f"{arguments.file.stem}.{target.replace(':', '-')}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}

    @property
    def examples(self) -> Examples:
        """The dev set."""
        assert self.data.evaluation is not None
        return self.data.evaluation

    def options(self, **more: Any) -> dict[str, Any]:
        """What `tune` and `export` have in common."""
        steps = more.pop("steps", None)
        training = {"max_steps": self.arguments.steps or steps, "mixed_precision": self.arguments.mixed_precision}
        host = HostOptions(name=self.target, device=self.arguments.device, offline=True)
        return {
            "adapter": self.arguments.file,
            "target": host,
            "training": training,
            "resume": True,
            "cache": False,
        } | more

    def lora(self, name: str, **more: Any) -> Path:
        """The folder of a tuned LoRA, made if it is not there."""
        path = self.work / name
        if not is_ported(path):
            started = time.monotonic()
            run_tune(TuneOptions(**self.options(parameters="lora", output=path, **more)))
            self.seconds[name] = round(time.monotonic() - started, 1)
        return path

    def exported(self, name: str, **more: Any) -> Path:
        """The folder of an export, made if it is not there."""
        path = self.work / name
        if not is_export(path):
            started = time.monotonic()
            run_export(ExportOptions(**self.options(output=path, **more)))
            self.seconds[name] = round(time.monotonic() - started, 1)
        return path

    def ported_classes(self, host: Host, task: Path | None) -> Classes:
        """Of the adapter as ported, or as a LoRA tuned it."""
        return self.adapter.port(host, task=task).classes_of(self.examples).for_metric(self.task.kind)

    def exported_classes(self, path: Path) -> Classes:
        """By transformers' own classes."""
        rows = [part.argmax(-1).tolist() for part in load_classifier(str(path), device="cpu").logits_of(self.examples)]
        return rows if self.task.kind == "tokens" else [row[0] for row in rows]

    def row(self) -> dict[str, Any]:
        """Scores of all, and every pair of them that is of interest."""
        host = load_host(self.target, device=self.arguments.device, offline=True)
        tuned = self.lora("tuned.lora")
        train = DataOptions(task=self.task.name, data=str(self.arguments.shared / "data" / self.task.name))
        labelled = self.lora("labelled.lora", data=train, steps=LABELLED_STEPS)
        exports = {
            "export": self.exported("export"),
            "export_of_tuned": self.exported("export-of-tuned", task_file=tuned),
        }
        classes = {
            "zero_shot": self.ported_classes(host, None),
            "tuned": self.ported_classes(host, tuned),
            "labelled": self.ported_classes(host, labelled),
        }
        classes |= {name: self.exported_classes(path) for name, path in exports.items()}
        metric, labels, references = self.task.metric, self.task.labels, references_of(self.examples)
        pairs = [(name, other) for name in exports for other in ("zero_shot", "tuned", "labelled")]
        return {
            "scores": {name: score(metric, found, references, labels).model_dump() for name, found in classes.items()},
            "differences": {
                f"{name}_minus_{other}": paired_difference(
                    metric, classes[name], classes[other], references, labels
                ).model_dump()
                for name, other in pairs
            },
            "agreement": read_export(exports["export"]).agreement["export"].model_dump(),
            "bytes": {name: _bytes(path) for name, path in exports.items()},
            "seconds": self.seconds,
        }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--file", type=Path, required=True, help="adapter file with a transfer set")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--steps", type=int, help="steps of every training, to try the script")
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else []
    done = {(row["file"], row["target"], row["steps"]) for row in rows}
    for target in arguments.targets:
        if (arguments.file.name, target, arguments.steps) in done:
            continue
        row = {"file": arguments.file.name, "target": target, "steps": arguments.steps} | Bench(arguments, target).row()
        rows.append(row)
        write_text(arguments.output, json.dumps(rows, indent=1) + "\n")
        print(target, {name: round(each["value"], 4) for name, each in row["scores"].items()}, flush=True)


if __name__ == "__main__":
    main()
