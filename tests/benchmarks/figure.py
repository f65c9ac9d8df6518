"""The picture of README, drawn from committed results of `label_free.py` and `uhl compare`; needs the extra `figures`.

python tests/benchmarks/figure.py --output tests/benchmarks/results/label_free.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "minilm-l3": "MiniLM\n3 x 384",
    "wiki-256x4": "encoder, own basis\n4 x 256",
    "builtin:decoder": "Llama-like decoder\n4 x 192",
    "builtin:base": "encoder\n6 x 256",
}
# Words in the legend, colour, marker.
HEAD = ("control: a linear head carried over", "#8d99ae", "s")
PORTED = ("uhl, ported in seconds: no label, no gradient", "#74b49b", "o")
LEARNT = ("uhl, LoRA distilled from the task's own texts: no label", "#0b6e4f", "D")
OTHERS = ("uhl, LoRA distilled from other texts: no label", "#e09f3e", "v")
TEACHER = "the teacher: a LoRA of the source, trained on labels"
LABELLED = ("LoRA retrained on the target with labels", "#d1495b", "^")


def scores(rows: list[dict[str, Any]], target: str, kind: str, file: str = "sst2") -> list[float]:
    """Of the default runs of one kind, one a seed."""
    name = "zero_shot" if kind == "zero-shot" else "tuned"
    wanted = (file, target, kind, "transfer", "ported", None)
    keys = ("file", "target", "kind", "distillation", "start", "steps")
    return [row["scores"][name]["value"] for row in rows if tuple(row[key] for key in keys) == wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    mpl.rcParams.update({"font.size": 9})
    rows = json.loads((RESULTS / "label_free.json").read_text())
    groups = json.loads((RESULTS / "compare_local" / "comparison" / "groups.json").read_text())["groups"]
    retrained = {(each["host"], each["method"]): each for each in groups if each["task"] == "sst2"}
    figure, axis = plt.subplots(figsize=(9, 3.9), constrained_layout=True)
    for place, target in enumerate(TARGETS):
        head, labelled = retrained[target, "head-only"], retrained[target, "lora"]
        series = (
            (HEAD, [head["mean"]], head["standard_error"]),
            (PORTED, scores(rows, target, "zero-shot"), 0.0),
            (OTHERS, scores(rows, target, "lora", "sst2-general"), 0.0),
            (LEARNT, scores(rows, target, "lora"), 0.0),
            (LABELLED, [labelled["mean"]], labelled["standard_error"]),
        )
        for offset, ((label, colour, marker), values, error) in enumerate(series):
            at = [place + (offset - 2) * 0.14] * len(values)
            axis.errorbar(
                at, values, yerr=error or None, fmt=marker, color=colour, capsize=2, label=None if place else label
            )
    teacher = json.loads((RESULTS / "label_free_files.json").read_text())["sst2"]["teacher_score"]["value"]
    axis.axhline(teacher, color="#555555", linestyle=":", label=TEACHER)
    axis.set_xticks(range(len(TARGETS)), list(TARGETS.values()))
    axis.set_ylabel("SST-2 accuracy, 872 dev sentences")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title(
        "One adapter of a 6-layer MiniLM on four other models (one point per seed; bars: ± 1 standard error)"
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(arguments.output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
