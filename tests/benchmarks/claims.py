"""The three claims of the published proposal, each held against the committed runs, with its verdict.

    python tests/benchmarks/claims.py --output tests/benchmarks/results/claims.json

Every claim is a difference of two scores that must be at least a margin: "within 1 point" and "equal" are -0.01, "1.1
points above" is 0.011.  A difference is paired over the examples of the dev set, in the mean of the common seeds.  Its
95 % interval decides: the claim is `true` there if all of it is at or above the margin, `not true` if all of it is
below, else `open`.  The second claim is also one of size: "97 % less memory", and "the same FLOPs", to 0.1 % of the
host's; both are counted on published shapes (`sizes.py`), where there is no chance.  Nothing is run;
`tests/compare/recompute_claims.py` computes the same by other means.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from uhl_cli.compare.results import RunFolder, RunMetrics
from uhl_cli.files import write_text
from uhl_cli.metrics import Counted, count, mean_difference

RESULTS = Path(__file__).parent / "results"
HOSTS = ("minilm-l3", "wiki-256x4", "builtin:decoder", "builtin:base")
TASKS = ("sst2", "conll2003", "amazon")  # BoolQ has no verdict: no method learns it, see docs/results.md
LOCAL, TRANSFER, BUILTIN = "compare_local", "compare_label_free", "compare_builtin"
MEMORY, FLOPS = 0.03, 0.1  # the most memory, as a share of SAT-LoRA's, and FLOPs more, in percent of the host's
UPWARDS = {"minilm-l3": "compare_upwards-minilm-l3", "builtin:base": "compare_upwards-builtin-base"}


@dataclass(frozen=True)
class Side:
    """Runs of one method on a host and a data set, all seeds, in one folder of results."""

    results: str
    method: str
    host: str
    task: str


@dataclass(frozen=True)
class Claim:
    """A claim: `what` of two sides is at least `margin`."""

    number: int
    text: str
    margin: float


CLAIMS = (
    Claim(1, "zero-shot on an abler host, the score is within 1 point of the source's own", -0.01),
    Claim(2, "after 500 steps, the score equals that of SAT-LoRA retrained there", -0.01),
    Claim(3, "on the smallest host, the score is 1.1 points above plain LoRA's", 0.011),
)


def pairs_of(number: int) -> Iterator[tuple[str, Side, Side]]:
    """(name of what is proposed, proposed, other) of a claim, for all that could be run here."""
    if number == 1:
        for source, folder in UPWARDS.items():
            for task in ("sst2", "reviews"):
                for host in ("wiki-256x4", "minilm-l3", "minilm-l6"):
                    if host != source:
                        yield (
                            "zero-shot",
                            Side(folder, "uhl-zero-shot", host, task),
                            Side(folder, "uhl-zero-shot", source, task),
                        )
        return
    other, hosts = ("sat-lora", HOSTS) if number == 2 else ("lora", ("builtin:decoder",))
    for task in TASKS:
        for host in hosts:
            for name, folder, method in (
                ("tuned with labels, file without texts", LOCAL, "uhl-tuned"),
                ("tuned with labels", TRANSFER, "uhl-tuned"),
                ("SST-2's file tuned with labels", TRANSFER, "uhl-tuned-new-task"),
                ("LoRA distilled without labels, 1,500 steps", TRANSFER, "uhl-distilled-lora"),
            ):
                yield name, Side(folder, method, host, task), Side(LOCAL, other, host, task)
    if number == 3:
        yield (
            "tuned with labels, file without texts",
            Side(BUILTIN, "uhl-tuned", "builtin:tiny", "reviews"),
            Side(BUILTIN, "lora", "builtin:tiny", "reviews"),
        )


@cache
def runs_in(results: str) -> tuple[RunMetrics, ...]:
    """All runs of a folder."""
    return tuple(RunFolder(RESULTS, f"{results}/{path.parent.name}").read() for path in _metrics(results))


def _metrics(results: str) -> list[Path]:
    return sorted((RESULTS / results).glob("*/metrics.json"))


def found(side: Side) -> dict[int, RunMetrics]:
    """The side's runs by seed."""
    mine = (side.method, side.host, side.task)
    return {run.seed: run for run in runs_in(side.results) if (run.method, run.host, run.task) == mine}


@cache
def counted(results: str, run_id: str) -> Counted:
    """A run's predictions, counted."""
    kept = RunFolder(RESULTS / results, run_id).read_predictions()
    return count(kept.metric, kept.predictions, kept.references, kept.labels)


def verdict(low: float, high: float, margin: float) -> str:
    """What an interval says of a claim."""
    return "true" if low >= margin else "not true" if high < margin else "open"


def row_of(claim: Claim, name: str, proposed: Side, other: Side) -> dict[str, Any] | None:
    """One difference; None where one of the sides was not run."""
    mine, theirs = found(proposed), found(other)
    seeds = sorted(set(mine) & set(theirs))
    if not seeds:
        return None
    difference = mean_difference(
        [(counted(proposed.results, mine[seed].run_id), counted(other.results, theirs[seed].run_id)) for seed in seeds]
    )
    sides = ((proposed, mine), (other, theirs))
    return {
        "proposed": name,
        "task": proposed.task,
        "host": proposed.host,
        "seeds": seeds,
        "runs": [[f"{side.results}/{runs[seed].run_id}" for seed in seeds] for side, runs in sides],
        "scores": [sum(runs[seed].score.value for seed in seeds) / len(seeds) for _, runs in sides],
        "adapter_bytes": [runs[seeds[0]].costs.adapter_bytes for _, runs in sides],
        "memory_mb": [runs[seeds[0]].costs.memory_mb for _, runs in sides],
        "flops_percent": [runs[seeds[0]].costs.flops_percent for _, runs in sides],
        "difference": difference.model_dump(include={"value", "low", "high", "examples"}),
        "verdict": verdict(difference.low, difference.high, claim.margin),
    }


def sizes() -> list[dict[str, Any]]:
    """What a file and SAT-LoRA take on published shapes, and whether the claim of it is true."""
    rows = []
    for shape, counted_by in json.loads((RESULTS / "sizes.json").read_text(encoding="utf-8")).items():
        sides = [counted_by[name] for name in ("uhl", "sat-lora")]
        memory, flops = ([side[name] for side in sides] for name in ("memory_mb", "flops_percent"))
        holds = memory[0] <= MEMORY * memory[1] and flops[0] - flops[1] <= FLOPS
        said = "true" if holds else "not true"
        rows.append({"shape": shape, "memory_mb": memory, "flops_percent": flops, "verdict": said})
    return rows


def table() -> list[dict[str, Any]]:
    """All claims with their rows, and how often each verdict was found by what is proposed."""
    claims = []
    for claim in CLAIMS:
        rows = [row for pair in pairs_of(claim.number) if (row := row_of(claim, *pair)) is not None]
        names = dict.fromkeys(row["proposed"] for row in rows)
        verdicts = {name: dict(Counter(row["verdict"] for row in rows if row["proposed"] == name)) for name in names}
        claims.append(asdict(claim) | {"verdicts": verdicts, "rows": rows})
        if claim.number == 2:
            claims[-1]["sizes"] = sizes()
    return claims


NAMES = {"sst2": "SST-2", "conll2003": "CoNLL-2003", "amazon": "amazon", "reviews": "reviews"}


def detailed(claims: list[dict[str, Any]]) -> str:
    """A Markdown table of all differences, in the order of the claims."""
    lines = [
        "| claim | what is proposed | data set, host | score, the other's | difference | |",
        "|---|---|---|---|---|---|",
    ]
    for claim in claims:
        for row in claim["rows"]:
            scores = " / ".join(f"{score:.3f}" for score in row["scores"])
            place = f"{NAMES[row['task']]}, {row['host']}"
            if claim["number"] == 1:
                place += f" from {row['runs'][1][0].split('--')[1].replace('builtin-', 'builtin:')}"
            cells = (claim["number"], row["proposed"], place, scores, _interval(row), row["verdict"])
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def short(claims: list[dict[str, Any]]) -> str:
    """A Markdown table with a line for each claim and proposed method: extreme differences and verdicts."""
    lines = ["| claim | by | smallest and largest difference | verdict |", "|---|---|---|---|"]
    for claim in claims:
        for index, (name, verdicts) in enumerate(claim["verdicts"].items()):
            rows = sorted(
                (row for row in claim["rows"] if row["proposed"] == name), key=lambda row: row["difference"]["value"]
            )
            ends = dict.fromkeys(_interval(row) for row in (rows[0], rows[-1]))
            text = f"({claim['number']}) {claim['text']}" if index == 0 else ""
            lines.append(f"| {text} | {name} | {' to '.join(ends)} | {_said(rows, verdicts)} |")
        if claim.get("sizes"):
            lines.append(_sizes(claim["sizes"]))
    return "\n".join(lines) + "\n"


def _sizes(rows: list[dict[str, Any]]) -> str:
    """The line of memory and FLOPs."""
    said = []
    for row in rows:
        memory, flops = (f"{row[name][0]:.2f} against {row[name][1]:.2f}" for name in ("memory_mb", "flops_percent"))
        said.append(f"{row['shape']}: {memory} MB, {flops} % FLOPs")
    verdicts = Counter(row["verdict"] for row in rows)
    words = ", ".join(f"**{word}**, {count} of {len(rows)}" for word, count in verdicts.items())
    return f"| with 97 % less memory and the same FLOPs | any, on published shapes | {'; '.join(said)} | {words} |"


def _interval(row: dict[str, Any]) -> str:
    value, low, high = (row["difference"][name] for name in ("value", "low", "high"))
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _said(rows: list[dict[str, Any]], verdicts: dict[str, int]) -> str:
    """The verdicts in words: one for all rows, or how many of each; those that are true are named."""
    if len(verdicts) == 1:
        return f"**{next(iter(verdicts))}**" + (f", {len(rows)} of {len(rows)}" if len(rows) > 1 else "")
    parts = [f"**{word} on {verdicts[word]}**" for word in ("not true", "open") if word in verdicts]
    holds = [f"{NAMES[row['task']]}, {row['host']}" for row in rows if row["verdict"] == "true"]
    return "; ".join(([f"**true on {len(holds)}** ({'; '.join(sorted(holds))})"] if holds else []) + parts)


def main() -> None:
    """Write the claims, and print them, for the README and docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    claims = table()
    for claim in claims:
        print(f"({claim['number']}) {claim['text']}: {json.dumps(claim['verdicts'])}")
        for row in claim["rows"]:
            print(f"  {row['proposed']:32} {row['task']:10} {row['host']:16} {_interval(row)} {row['verdict']}")
    print(f"\n{short(claims)}\n{detailed(claims)}")
    write_text(output, json.dumps(claims, indent=1) + "\n")


if __name__ == "__main__":
    main()
