"""The README's picture, drawn from the committed results of `zero_shot.py`; needs the extra `figures`.

python tests/benchmarks/figure.py --output tests/benchmarks/results/zero_shot.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
FILES = ("zero_shot.json", "zero_shot_builtin.json")
# Name in the results, words in the legend, colour, marker.
ROWS = (
    ("ported", "ported, zero-shot", "#0b6e4f", "o"),
    ("head_only", "control: linear head carried over", "#d1495b", "s"),
    ("size", "control: map that ignores the target (--align size)", "#8d99ae", "D"),
    ("untouched", "control: commonest answer", "#c9c9c9", "^"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    # Text stays text and the file is the same every time.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "uhl", "font.size": 9})
    contents = [json.loads((RESULTS / name).read_text())["results"] for name in FILES]
    panels = [[row for row in content if row["strategy"] == "anchors"] for content in contents]
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), sharey=True, constrained_layout=True)
    for axis, rows in zip(axes, panels, strict=True):
        for place, row in enumerate(rows):
            for offset, (name, label, colour, marker) in enumerate(ROWS):
                score = row["scores"][name]
                x = place + (offset - 1.5) * 0.13
                axis.errorbar(
                    x,
                    score["value"],
                    yerr=[[score["value"] - score["low"]], [score["high"] - score["value"]]],
                    fmt=marker,
                    color=colour,
                    capsize=2,
                    label=label if place == 0 else None,
                )
        axis.set_xticks(range(len(rows)), [_label(row) for row in rows])
        examples = rows[0]["scores"]["ported"]["examples"]
        axis.set_title(f"{rows[0]['task']}, trained on {rows[0]['source']} ({examples} examples)", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("accuracy on the dev set, 95 % interval")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(arguments.output, metadata={"Date": None})
    figure.savefig(arguments.output.with_suffix(".png"), dpi=110)


def _label(row: dict) -> str:
    target = row["target"]
    shape = target["fingerprint"]
    own = " (source)" if target["name"] == row["source"] else ""
    return f"{target['name']}\n{shape['num_hidden_layers']} x {shape['hidden_size']}{own}"


if __name__ == "__main__":
    main()
