"""What tuning is worth: `uhl tune` beside majority class, linear head, fresh readout and rank-8 LoRA, in one run.

    python tests/benchmarks/tuning.py adapters/sst2-minilm-l6.safetensors --task sst2 --targets minilm-l3 wiki-256x4 \
        --seeds 0 1 2 --shared SHARED --output tests/benchmarks/results/tuning_sst2.json

Readout, tuning and LoRA take `--steps` steps of 32 each.  LoRA's learning rate is chosen for each target on training
examples in runs of `--search-steps`; all seeds share it.  Dev is read for scoring alone.  A run that was cut off goes
on where it stopped: the JSON is rewritten after every row, and rows in it are not made again.  On the adapter's own
task the goal is zero-shot plus half of what LoRA adds to it.  Seconds are wall-clock, scoring included, and only
comparable within a run on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from lora import LEARNING_RATES, LoraSettings, search_learning_rate
from tuning_methods import (
    HEAD_EXAMPLES,
    INVERSE_STRENGTHS,
    Row,
    Target,
    fresh_readout,
    linear_head,
    lora,
    majority,
    tuned,
)

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import tuning_defaults
from uhl_cli.data import load_task
from uhl_cli.files import write_text
from uhl_cli.schema import TrainingConfig

METHODS = ("majority", "head", "readout", "tuned", "lora")
SEEDED = ("readout", "tuned", "lora")


class Results:
    """The JSON file: rows and LoRA's searches by key, and for each task and method the setting they were made in."""

    def __init__(self, path: Path, task: str, settings: dict[str, Row], redo: list[str]) -> None:
        """Read what is there, less the task's rows of the methods in `redo`.

        :raises SystemExit: When a method's rows were made in another setting.
        """
        self._path, self._task, self._settings = path, task, settings
        self._content: Row = {"settings": {}, "searches": {}, "results": {}, "summary": {}}
        if path.exists():
            self._content |= json.loads(path.read_text())
        self.known: dict[str, Row] = self._content["settings"].setdefault(task, {})
        forgotten = {*redo, "zero_shot"} if "tuned" in redo else {*redo}
        for part in ("results", "searches"):
            rows = self._content[part].items()
            self._content[part] = {
                key: row for key, row in rows if row["task"] != task or row["method"] not in forgotten
            }
        for method in redo:
            self.known.pop(method, None)
        stale = [method for method, setting in self.known.items() if setting != settings[method]]
        if stale:
            names = " ".join(stale)
            raise SystemExit(f"{path} holds rows of another setting: name another --output, or --redo {names}")

    def __contains__(self, key: str) -> bool:
        return key in self._content["results"]

    def search(self, key: str) -> Row | None:
        """The search of that key, if it was made."""
        found: Row | None = self._content["searches"].get(key)
        return found

    def add(self, key: str, row: Row, *, part: str = "results") -> None:
        """Take in a row or a search, and write the file."""
        self._content[part][key] = row
        method = "tuned" if row["method"] == "zero_shot" else row["method"]
        self.known[method] = self._settings[method]
        self._write()
        found = row["score"]["value"] if part == "results" else f"{row['scores']} -> {row['rate']:g}"
        print(f"{key}: {found}", file=sys.stderr, flush=True)

    def summarise(self) -> Row:
        """Write the task's summary, and give it back."""
        summary = summary_of([row for row in self._content["results"].values() if row["task"] == self._task])
        self._content["summary"][self._task] = summary
        self._write()
        return summary

    def _write(self) -> None:
        write_text(self._path, json.dumps(self._content, indent=1) + "\n")


def run(target: Target, method: str, seed: int | None, results: Results, steps: int, search_steps: int) -> None:
    """Make the row of a method (and seed) on a target, unless it is there."""
    key = f"{target.data.task.name}/{target.name}/{method}" + ("" if seed is None else f"/seed-{seed}")
    if key in results:
        return
    names = {"task": target.data.task.name, "target": target.name, "method": method, "seed": seed}
    training = training_of(target, steps, seed or 0)
    rate = learning_rate(target, results, search_steps, training.max_length) if method == "lora" else 0.0
    started = time.monotonic()
    if method == "majority":
        row = majority(target)
    elif method == "head":
        row = linear_head(target, max_length=training.max_length)
    elif method == "readout":
        row = fresh_readout(target, training)
    elif method == "tuned":
        row = tuned(target, training)
    else:
        row = lora(target, LoraSettings(rate, steps=steps, max_length=training.max_length, seed=training.seed))
    seconds = time.monotonic() - started
    before, other = row.pop("zero_shot", None), key.replace(f"/tuned/seed-{seed}", "/zero_shot")
    if before and other not in results:  # its time is part of the tuned row's
        results.add(other, {**names, "method": "zero_shot", "seed": None, "score": before, "seconds": None, "bytes": 0})
    results.add(key, {**names, **row, "seconds": seconds})


def learning_rate(target: Target, results: Results, steps: int, max_length: int) -> float:
    """LoRA's learning rate on this target, searched once and kept in the file."""
    task = target.data.task
    key = f"{task.name}/{target.name}/lora/search"
    search = results.search(key)
    if search is None:
        started = time.monotonic()
        found = search_learning_rate(
            target.path, target.train, task.labels, task.metric, steps=steps, max_length=max_length
        )
        search = {"task": task.name, "target": target.name, "method": "lora", "metric": task.metric, "rate": found.rate}
        search["scores"] = found.scores
        search |= {"held_out": found.held_out, "steps": steps, "seconds": time.monotonic() - started}
        results.add(key, search, part="searches")
    return float(search["rate"])


def training_of(target: Target, steps: int, seed: int) -> TrainingConfig:
    """The defaults of `uhl tune` with these steps and seed; all methods cut texts where the adapter's training did."""
    length = target.adapter.manifest.training.config.max_length
    return tuning_defaults().model_copy(update={"max_steps": steps, "seed": seed, "max_length": length})


def settings_of(target: Target, steps: int, search_steps: int) -> dict[str, Row]:
    """What decides each method's rows, besides target and seed."""
    base = {"train": target.train.digest(), "evaluation": target.evaluation.digest()}
    training = training_of(target, steps, 0).model_dump(exclude={"seed"})
    adapted = base | {"adapter": target.adapter.digest, "training": training}
    search = {"search_steps": search_steps, "learning_rates": list(LEARNING_RATES)}
    return {
        "majority": base,
        "head": base | {"limit": HEAD_EXAMPLES, "inverse_strengths": list(INVERSE_STRENGTHS)},
        "readout": adapted,
        "tuned": adapted,
        "lora": base | {"steps": steps, "max_length": training["max_length"]} | search,
    }


def summary_of(rows: list[Row]) -> Row:
    """Means over seeds with their standard errors, and on the adapter's own task the goal on each target."""
    methods: list[Row] = []
    goals: list[Row] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        means = {}
        for method in ("majority", "zero_shot", *METHODS[1:]):
            found = [row for row in rows if (row["target"], row["method"]) == (target, method)]
            if not found:
                continue
            found.sort(key=lambda row: row["seed"] or 0)
            first, values = found[0], np.array([row["score"]["value"] for row in found])
            means[method] = float(values.mean())
            error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
            interval = {name: first["score"][name] for name in ("metric", "low", "high")}
            entry = {"target": target, "method": method, "mean": means[method], "standard_error": error, **interval}
            entry |= {"seeds": [row["seed"] for row in found if row["seed"] is not None]}
            entry |= {name: first[name] for name in ("bytes", "delta_bytes", "readout_bytes") if name in first}
            methods.append(entry)
            if method == "tuned" and "zero_shot" in first["gains"]:
                goals.append({"target": target, "gain": first["gains"]["zero_shot"]})
        for goal in goals:
            if goal["target"] == target and "lora" in means:
                wanted = means["zero_shot"] + (means["lora"] - means["zero_shot"]) / 2
                goal |= {name: means[name] for name in ("zero_shot", "lora", "tuned")}
                goal |= {"goal": wanted, "reached": means["tuned"] >= wanted}
    return {"methods": methods, "goals": goals}


def lines_of(summary: Row) -> list[str]:
    """The summary as Markdown."""
    first = summary["methods"][0]
    head = ("target", "method", first["metric"], "standard error (seeds)", "95 % over examples, first seed", "bytes")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in summary["methods"]:
        error, size = row["standard_error"], f"{row['bytes']:,}"
        if "delta_bytes" in row:
            size += f" (delta-theta {row['delta_bytes']:,}, readout {row['readout_bytes']:,})"
        spread = f"{error:.4f} ({len(row['seeds'])})" if error is not None else "–"
        cells = [row["target"], row["method"], f"{row['mean']:.3f}", spread, f"[{row['low']:.3f}, {row['high']:.3f}]"]
        lines.append("| " + " | ".join([*cells, size]) + " |")
    for goal in summary["goals"]:
        gain = goal["gain"]
        interval = f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        line = f"\n{goal['target']}: tuned minus zero-shot, paired, first seed: {interval}"
        if "goal" in goal:
            verdict = "reached" if goal["reached"] else "not reached"
            added = goal["lora"] - goal["zero_shot"]
            line += f"; goal {goal['zero_shot']:.4f} {added / 2:+.4f} (half of what LoRA adds) = {goal['goal']:.4f}"
            line += f" {verdict} by {goal['tuned']:.4f}"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--task", help="default: the adapter's own")
    parser.add_argument("--targets", nargs="+", default=["minilm-l3", "wiki-256x4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--redo", nargs="+", default=[], choices=METHODS, help="forget this task's rows of these first")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--search-steps", type=int, default=150, help="length of the runs that choose a learning rate")
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-evaluation", type=int)
    arguments = parser.parse_args()
    adapter = UniversalAdapter.load(arguments.adapter)
    task = arguments.task or adapter.manifest.task.name
    where = None if task == "reviews" else str(arguments.shared / "data" / task)
    limits = {"limit_train": arguments.limit_train, "limit_evaluation": arguments.limit_evaluation}
    data = load_task(task, data=where, **limits)
    targets = []
    for name in arguments.targets:
        path = name if name.startswith("builtin:") else str(arguments.shared / "hosts" / name)
        targets.append(Target(name, path, data, adapter, arguments.adapter))
    steps, search_steps = arguments.steps, arguments.search_steps
    settings = settings_of(targets[0], steps, search_steps)
    results = Results(arguments.output, task, settings, arguments.redo)
    for target in targets:
        for method in arguments.methods:
            for seed in arguments.seeds if method in SEEDED else [None]:
                run(target, method, seed, results, steps, search_steps)
    print("\n".join(lines_of(results.summarise())))


if __name__ == "__main__":
    main()
