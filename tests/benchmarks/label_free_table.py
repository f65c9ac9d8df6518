"""The rows of `label_free.py` as Markdown: one line a run's kind, one column a target, seeds beside each other.

python tests/benchmarks/label_free_table.py tests/benchmarks/results/label_free.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("zero-shot", "delta-theta", "readout", "lora")
KEYS = ("file", "kind", "distillation", "start", "steps")


def label(row: dict[str, Any]) -> str:
    """The run's kind in words."""
    steps = row["steps"] or row.get("taken_steps")
    words = [row["file"], row["kind"] if row["kind"] != "lora" else "LoRA r8"]
    words += [f"{steps:,} steps"] if steps else []
    words += {"labels": ["same texts, true labels"], "shuffled": ["outputs shuffled"]}.get(row["distillation"], [])
    words += ["from a fresh readout"] * (row["start"] == "fresh")
    return ", ".join(words)


def interval(value: dict[str, Any]) -> str:
    """A value with its interval."""
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def cells(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Scores, and paired differences to the zero-shot port (of a zero-shot row: to updates off)."""
    values, gains = [], []
    for row in sorted(rows, key=lambda row: row["seed"]):
        values.append(row["scores"].get("tuned", row["scores"]["zero_shot"]))
        gains.append(row.get("tuned_minus_zero_shot", row.get("zero_shot_minus_updates_off")))
    if len(rows) > 1 and all("right" in row for row in rows):
        gains = [mean_gain(rows)]
    score = interval(values[0]) if len(values) == 1 else ", ".join(f"{value['value']:.3f}" for value in values)
    return score, "; ".join(interval(gain) for gain in gains)


def mean_gain(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over seeds of the paired difference, its 95 % interval by a bootstrap over examples."""
    right = [{name: np.array(list(digits), dtype=float) for name, digits in row["right"].items()} for row in rows]
    difference = np.mean([row["tuned"] - row["zero_shot"] for row in right], axis=0)
    drawn = np.random.default_rng(0).choice(difference, (10_000, len(difference))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"value": float(difference.mean()), "low": low, "high": high}


def main() -> None:
    """Print the table."""
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["file"], KINDS.index(row["kind"]), row["distillation"] != "transfer")):
        kinds.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    for which, title in enumerate(("score", "minus zero-shot, paired (zero-shot: minus updates off)")):
        print(f"\n| {title} | " + " | ".join(targets) + " |\n|---|" + "---|" * len(targets))
        for group in kinds.values():
            found = {target: [row for row in group if row["target"] == target] for target in targets}
            line = [cells(found[target])[which] if found[target] else "" for target in targets]
            print(f"| {label(group[0])} | " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
