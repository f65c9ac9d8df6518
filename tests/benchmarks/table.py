"""The Markdown table of a result file of `zero_shot.py`, as README and cards show it.

python tests/benchmarks/table.py tests/benchmarks/results/zero_shot.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROWS = (
    ("ported", "**ported, zero-shot**"),
    ("readout_only", "readout only, updates off"),
    ("full_updates", "updates at full strength, where they are left out"),
    ("majority_class", "control: majority class"),
    ("random_update", "control: random updates, same norm"),
    ("head_only", "control: head only"),
    ("size", "control: `--align size`"),
)


def interval(score: dict) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def table(results: list[dict]) -> list[str]:
    """Lines of the table; a column a target, other strategies as rows of their own."""
    columns = [row for row in results if row["strategy"] == "anchors"]
    names = []
    for row in columns:
        shape = row["target"]["fingerprint"]
        source = ", the source" if row["target"]["name"] == row["source"] else ""
        names.append(f"{row['target']['name']} ({shape['num_hidden_layers']} x {shape['hidden_size']}){source}")
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]

    def line(label: str, values: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(values) + " |")

    line(ROWS[0][1], [interval(row["scores"]["ported"]) for row in columns])
    for strategy in sorted({row["strategy"] for row in results} - {"anchors"}):
        scores = {row["target"]["name"]: row["scores"]["ported"] for row in results if row["strategy"] == strategy}
        line(f"ported with `--align {strategy}`", [interval(scores[row["target"]["name"]]) for row in columns])
    for name, label in ROWS[1:]:
        found = [row["scores"].get(name) for row in columns]
        if any(found):
            line(label, ["as ported" if score is None else interval(score) for score in found])
    for name, label in (
        ("head_only", "head only"),
        ("readout_only", "readout only"),
        ("random_update", "random updates"),
    ):
        line(f"ported minus {label}, paired", [interval(row["gains"][name]) for row in columns])
    if any(row.get("calibration") for row in columns):
        line("strength of the updates", [f"{row['calibration']['strength']:g}" for row in columns])
    line("FLOP overhead at 128 tokens", [f"{row['flops']['percent']:.2f} %" for row in columns])
    line("active atoms per token", [f"{row['atoms_per_token']:.2f}" for row in columns])
    qualities = [", ".join(f"{value:.2f}" for value in row["readout_quality"]) for row in columns]
    if any(qualities):
        line("R² of the canonical coordinates at the three knots", qualities)
    features = [row.get("feature_quality") for row in columns]
    if any(value is not None for value in features):
        line(
            "R² of the readout's features by the bank (0.88 at most)",
            ["–" if value is None else f"{value:.2f}" for value in features],
        )
    line(
        "seconds to align and inject", [f"{row['seconds']['align'] + row['seconds']['inject']:.1f}" for row in columns]
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print("\n".join(table(json.loads(parser.parse_args().results.read_text())["results"])))


if __name__ == "__main__":
    main()
