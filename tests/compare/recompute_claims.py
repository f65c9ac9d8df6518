"""The table of claims, computed again from the per-run files by other means; imports nothing of uhl.

    python tests/compare/recompute_claims.py tests/benchmarks/results

prints the differences between RESULTS/claims.json and the recomputed values, and exits 1 if there are any.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from recompute import error_of_mean, gains, read, score_of
from seqeval.metrics.sequence_labeling import get_entities

MARGINS = {1: -0.01, 2: -0.01, 3: 0.011}
# Proposed runs of each claim: folder and method; the method that they are held against, and its folder.
SIDES = {
    2: (
        "sat-lora",
        "compare_local",
        (
            ("compare_local", "uhl-tuned"),
            ("compare_label_free", "uhl-tuned"),
            ("compare_label_free", "uhl-tuned-new-task"),
            ("compare_label_free", "uhl-distilled-lora"),
        ),
    ),
}
SIDES[3] = ("lora", "compare_local", SIDES[2][2])
NAMES = {
    ("compare_local", "uhl-tuned"): "tuned with labels, file without texts",
    ("compare_builtin", "uhl-tuned"): "tuned with labels, file without texts",
    ("compare_label_free", "uhl-tuned"): "tuned with labels",
    ("compare_label_free", "uhl-tuned-new-task"): "SST-2's file tuned with labels",
    ("compare_label_free", "uhl-distilled-lora"): "LoRA distilled without labels, 1,500 steps",
}
SMALLEST, SMALLEST_BUILTIN = "builtin:decoder", "builtin:tiny"
TASKS = {"sst2", "conll2003", "amazon"}
RESAMPLES = 400


@cache
def runs_of(folder: Path) -> dict[str, dict]:
    """All runs of a folder of results."""
    return read(folder)


def expected(results: Path) -> dict[int, set[tuple[str, ...]]]:
    """(folder, method, host, task) of what must be held against each claim, by what was run."""
    found: dict[int, set[tuple[str, ...]]] = {1: set(), 2: set(), 3: set()}
    for folder in sorted(path for path in results.glob("compare_*") if path.is_dir()):
        for run in runs_of(folder).values():
            key = (folder.name, run["method"], run["host"], run["task"])
            upwards = folder.name.startswith("compare_upwards") and run["method"] == "uhl-zero-shot"
            if upwards and run["host"] != source_of(run):
                found[1].add(key)
            for number, (_, _, sides) in SIDES.items():
                if key[:2] in sides and run["task"] in TASKS and (number == 2 or run["host"] == SMALLEST):
                    found[number].add(key)
            if key == ("compare_builtin", "uhl-tuned", SMALLEST_BUILTIN, "reviews"):
                found[3].add(key)
    return found


def entity_counts(run: dict) -> np.ndarray:
    """(right, predicted, true) entities of each sentence, by seqeval."""
    rows = []
    for true, said in zip(run["references"], run["predictions"], strict=True):
        sets = [set(get_entities([run["labels"][tag] for tag in row])) for row in (true, said)]
        rows.append((len(sets[0] & sets[1]), len(sets[1]), len(sets[0])))
    return np.array(rows)


def f1(counts: np.ndarray) -> float:
    right, said, true = counts.sum(0)
    return 2 * right / (said + true) if said + true else 0.0


def error_of(pairs: list[tuple[dict, dict]]) -> float:
    """Standard error over examples of the mean difference."""
    if pairs[0][0]["metric"] == "accuracy":
        return error_of_mean([gains(*pair) for pair in pairs])
    tables = [[entity_counts(run) for run in pair] for pair in pairs]
    generator, size = np.random.default_rng(7), len(tables[0][0])
    draws = [generator.integers(0, size, size) for _ in range(RESAMPLES)]
    return float(np.std([np.mean([f1(a[rows]) - f1(b[rows]) for a, b in tables]) for rows in draws], ddof=1))


def row_differences(results: Path, number: int, margin: float, row: dict) -> list[str]:
    """What a row says otherwise."""
    found: list[str] = []
    name = f"claim {number}, {row['proposed']}, {row['task']} on {row['host']}"

    def check(what: str, said: object, own: object, tolerance: float = 0.0) -> None:
        numbers = isinstance(said, float) and isinstance(own, float)
        if abs(said - own) > tolerance if numbers else said != own:
            found.append(f"{name}, {what}: said {said}, is {own}")

    folders = [{part.split("/")[0] for part in side} for side in row["runs"]]
    runs = [[runs_of(results / part.split("/")[0])[part.split("/")[1]] for part in side] for side in row["runs"]]
    places = [{(run["method"], run["host"], run["task"]) for run in side} for side in runs]
    check("folders, methods, hosts and data sets", [len(each) for each in (*folders, *places)], [1, 1, 1, 1])
    (method, host, task), (other, home, other_task) = (next(iter(each)) for each in places)
    check("place", [row["host"], row["task"], other_task], [host, task, task])
    check("name", row["proposed"], NAMES.get((next(iter(folders[0])), method), "zero-shot"))
    # A setting that was dropped when files began to hold texts.
    without_texts = ["width_views" in run["config"]["adapter"]["pretraining"] for run in runs[0]]
    check("files without texts", without_texts, ["without texts" in row["proposed"]] * len(runs[0]))
    if number == 1:
        check("the other side", [method, other, home], ["uhl-zero-shot"] * 2 + [source_of(runs[0][0])])
    else:
        check("the other side", [other, home], [SIDES[number][0], host])
    every = [
        {run["seed"] for run in runs_of(results / next(iter(folder))).values() if place_of(run) in place}
        for folder, place in zip(folders, places, strict=True)
    ]
    for side in ([run["seed"] for run in part] for part in runs):
        check("seeds", side, sorted(every[0] & every[1]))
    check("seeds", row["seeds"], sorted(every[0] & every[1]))
    pairs = list(zip(*runs, strict=True))
    check("one dev set", all(a["references"] == b["references"] for a, b in pairs), True)
    scores = [sum(map(score_of, part)) / len(part) for part in runs]
    value, error = scores[0] - scores[1], error_of(pairs)
    for said, own in zip(row["scores"], scores, strict=True):
        check("score", float(said), float(own), 1e-9)
    said = row["difference"]
    check("difference", float(said["value"]), float(value), 1e-9)
    for end, own in (("low", value - 1.96 * error), ("high", value + 1.96 * error)):
        check(end, float(said[end]), float(own), 0.2 * 1.96 * error + 1e-9)  # 1,000 resamples give it to some 5 %
    check("examples", said["examples"], len(pairs[0][0]["references"]))
    check("verdict", row["verdict"], verdict_of(said, margin))
    for metric in ("adapter_bytes", "memory_mb", "flops_percent"):
        check(metric, row[metric], [part[0]["costs"][metric] for part in runs])
    return found


def place_of(run: dict) -> tuple[str, str, str]:
    return run["method"], run["host"], run["task"]


def source_of(run: dict) -> str:
    """The host that the run's adapter was trained on."""
    return str(run["config"]["adapter"]["source"]["name"])


def size_differences(results: Path, rows: list[dict]) -> list[str]:
    """What the rows of memory and FLOPs say otherwise than the sizes that were counted."""
    own = []
    for shape, parts in json.loads((results / "sizes.json").read_text()).items():
        mine, other = parts["uhl"], parts["sat-lora"]
        less = 1 - mine["memory_mb"] / other["memory_mb"]
        same = mine["flops_percent"] <= other["flops_percent"] + 0.1
        row = {"shape": shape, "verdict": "true" if less >= 0.97 and same else "not true"}
        own.append(row | {name: [mine[name], other[name]] for name in ("memory_mb", "flops_percent")})
    return [] if rows == own else [f"claim 2, sizes: said {rows}, are {own}"]


def verdict_of(difference: dict, margin: float) -> str:
    if difference["low"] >= margin:
        return "true"
    return "not true" if difference["high"] < margin else "open"


def differences(results: Path) -> list[str]:
    """What the table of claims says otherwise than the per-run files."""
    found: list[str] = []
    wanted = expected(results)
    for claim in json.loads((results / "claims.json").read_text()):
        number, margin = claim["number"], MARGINS[claim["number"]]
        if claim["margin"] != margin:
            found.append(f"claim {number}: margin {claim['margin']}, is {margin}")
        seen, counts = set(), {}
        for row in claim["rows"]:
            found += row_differences(results, number, margin, row)
            folder, run_id = row["runs"][0][0].split("/")
            seen.add((folder, *place_of(runs_of(results / folder)[run_id])))
            tally = counts.setdefault(row["proposed"], {})
            verdict = verdict_of(row["difference"], margin)
            tally[verdict] = tally.get(verdict, 0) + 1
        if number == 2:
            found += size_differences(results, claim["sizes"])
        if counts != claim["verdicts"]:
            found.append(f"claim {number}: {claim['verdicts']}, are {counts}")
        if seen != wanted[number]:
            found.append(f"claim {number}: rows of {sorted(seen ^ wanted[number])} are missing, or are not of it")
    return found


def main() -> None:
    found = differences(Path(sys.argv[1]))
    print("\n".join(found) or "the claims say what the runs say")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
