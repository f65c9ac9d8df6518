"""What a comparison says, computed again from the per-run files by other means; imports nothing of uhl.

    python tests/compare/recompute.py RESULTS

prints the differences between RESULTS/comparison and the recomputed values, and exits 1 if there are any.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from scipy.stats import binom, norm
from seqeval.metrics import f1_score
from sklearn.metrics import accuracy_score
from sklearn.metrics import f1_score as class_f1

PROPOSED = ("uhl-zero-shot", "uhl-tuned", "uhl-tuned-new-task")
PROPOSED += ("uhl-distilled-delta-theta", "uhl-distilled-lora", "uhl-export")
BASELINES = ("sat-lora", "lora", "full", "lora-same-texts", "lora-from-source")


def read(results: Path) -> dict[str, dict]:
    """Metrics, configuration and predictions of every finished run, by name."""
    runs = {}
    for path in sorted(results.glob("*/metrics.json")):
        run = json.loads(path.read_text())
        run["config"] = json.loads((path.parent / "config.json").read_text())
        run |= json.loads((path.parent / "predictions.json").read_text())
        for part in ("predictions", "references"):  # a sentence's tags are a string of digits to base 36
            run[part] = [[int(tag, 36) for tag in row] if isinstance(row, str) else row for row in run[part]]
        runs[run["run_id"]] = run
    return runs


def score_of(run: dict) -> float:
    """The run's score from its predictions, by scikit-learn and seqeval; computed once."""
    if "own_score" not in run:
        run["own_score"] = _score(run)
    return run["own_score"]


def _score(run: dict) -> float:
    return f1_of(run) if run["metric"] in ("entity_f1", "f1") else accuracy_of(run)


def f1_of(run: dict) -> float:
    """F1 of the run's predictions: of entities for words, else of class 1 of two, or the mean over classes."""
    if "own_f1" not in run:
        true, found = run["references"], run["predictions"]
        if isinstance(true[0], list):
            names = [[[run["labels"][tag] for tag in row] for row in part] for part in (true, found)]
            run["own_f1"] = float(f1_score(names[0], names[1], zero_division=0))
        else:
            average = "binary" if len(run["labels"]) == 2 else "macro"
            run["own_f1"] = float(class_f1(true, found, average=average, zero_division=0))
    return run["own_f1"]


def accuracy_of(run: dict) -> float:
    """Accuracy of the run's predictions, over words for a token task."""
    flat = [
        [tag for row in run[part] for tag in (row if isinstance(row, list) else [row])]
        for part in ("references", "predictions")
    ]
    return float(accuracy_score(flat[0], flat[1]))


def published_of(run: dict) -> dict[str, float]:
    """The run's costs and scores by the published names; without active atoms where there are none."""
    costs = run["costs"]
    values = {
        "Memory overhead (MB)": costs["memory_mb"],
        "FLOP overhead (%)": costs["flops_percent"],
        "Active atoms per token": costs["atoms_per_token"],
        "F1 Score": f1_of(run),
        "Accuracy": accuracy_of(run),
    }
    return {name: value for name, value in values.items() if value is not None}


def wilson(value: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959963984540054
    centre = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def within(run: dict) -> bool:
    """Whether the run holds its own budget."""
    costs, budget = run["costs"], run["config"]["budget"]
    return (
        costs["adapter_bytes"] <= budget["max_bytes"]
        and costs["flops_percent"] <= budget["max_flops"]
        and (costs["atoms_per_token"] or 0) <= budget["max_atoms"]
    )


def exact_mcnemar(first: dict, second: dict) -> float:
    """Two-sided exact p value: twice the smaller binomial tail."""
    triples = list(zip(first["predictions"], second["predictions"], first["references"], strict=True))
    only_first = sum(a == true != b for a, b, true in triples)
    only_second = sum(b == true != a for a, b, true in triples)
    smaller, count = min(only_first, only_second), only_first + only_second
    return min(1.0, 2 * float(binom.cdf(smaller, count, 0.5))) if count else 1.0


def differences(results: Path) -> list[str]:
    """What the comparison says otherwise than the per-run files."""
    runs = read(results)
    found: list[str] = []

    def check(name: str, said: float | None, own: float | None, tolerance: float = 1e-9) -> None:
        if (said is None) != (own is None) or (said is not None and abs(said - own) > tolerance):
            found.append(f"{name}: said {said}, is {own}")

    for name, run in runs.items():
        check(f"{name} score", run["score"]["value"], score_of(run))
        if run["metric"] == "accuracy" and isinstance(run["references"][0], int):
            low, high = wilson(score_of(run), len(run["references"]))
            check(f"{name} low", run["score"]["low"], low)
            check(f"{name} high", run["score"]["high"], high)
        if run["within_budget"] != within(run):
            found.append(f"{name}: within_budget is {within(run)}")
        if "f1" in run:  # files of earlier versions have neither
            check(f"{name} F1", run["f1"], f1_of(run))
            check(f"{name} accuracy", run["accuracy"], accuracy_of(run))
            own = published_of(run)
            for metric in {**own, **run["published"]}:
                check(f"{name} {metric}", run["published"].get(metric), own.get(metric))
        search = run.get("search") or {}
        if search.get("trials"):
            top = max(range(len(search["trials"])), key=lambda index: (search["trials"][index]["score"], -index))
            check(f"{name} best trial", search["best"], top)
        last = [point for point in run.get("dev_curve", []) if point["step"] == run["config"]["training"]["steps"]]
        if last and run["method"].startswith("uhl-tuned"):  # others are rounded after their last step
            check(f"{name} last dev score", last[0]["score"], score_of(run))
    said = json.loads((results / "comparison" / "aggregated_metrics.json").read_text())
    if set(said) != {"primary_metric", "metrics", "best_proposed", "best_baseline", "gap"}:
        found.append(f"keys {sorted(said)}")
    check("runs with a score", len(said["metrics"]["score"]), len(runs))
    for name, run in runs.items():
        check(f"aggregated score of {name}", said["metrics"]["score"].get(name), score_of(run))
        for metric, value in published_of(run).items():
            check(f"aggregated {metric} of {name}", said["metrics"].get(metric, {}).get(name), value)
    for group in json.loads((results / "comparison" / "groups.json").read_text())["groups"]:
        mine = [run for run in runs.values() if all(run[part] == group[part] for part in ("task", "host", "method"))]
        for metric, own in (("f1", f1_of), ("accuracy", accuracy_of)):
            check(f"{metric} of {group['method']}", group.get(metric), sum(map(own, mine)) / len(mine))
    best = {}
    for role, methods in (("best_proposed", PROPOSED), ("best_baseline", BASELINES)):
        values = [score_of(run) for run in runs.values() if run["method"] in methods and within(run)]
        best[role] = max(values, default=None)
        check(role, said[role] and said[role]["value"], best[role])
        if said[role] is not None:
            check(f"{role}'s run", score_of(runs[said[role]["run_id"]]), best[role])
    gap = None
    if best["best_proposed"] is not None and best["best_baseline"]:
        gap = 100 * (best["best_proposed"] - best["best_baseline"]) / best["best_baseline"]
    check("gap", said["gap"], gap)
    pairings = json.loads((results / "comparison" / "groups.json").read_text())["pairings"]
    raw = []
    for pairing in pairings:
        first, second = runs[pairing["proposed"]], runs[pairing["other"]]
        name = f"{pairing['proposed']} against {pairing['other']}"
        check(name, pairing["difference"]["value"], score_of(first) - score_of(second))
        if first["metric"] == "accuracy":
            check(f"{name}, McNemar", pairing["mcnemar_p"], exact_mcnemar(first, second))
            raw.append((pairing["mcnemar_p"], pairing["mcnemar_holm"]))
    ordered = sorted(raw)
    running = 0.0
    for rank, (p_value, adjusted) in enumerate(ordered):
        running = max(running, min(1.0, p_value * (len(ordered) - rank)))
        check(f"Holm's p of {p_value}", adjusted, running)
    return found + verdict_differences(
        runs, json.loads((results / "comparison" / "groups.json").read_text())["verdicts"]
    )


def verdict_differences(runs: dict[str, dict], verdicts: list[dict]) -> list[str]:
    """What the verdicts over all seeds say otherwise: values, their errors by a formula, p values, Holm, the words."""
    places = {(run["task"], run["host"], run["method"], run["seed"]): run for run in runs.values()}
    found = []
    covered = set()
    for row in verdicts:
        name = f"{row['proposed']} beside {row['other']}, {row['task']} on {row['host']}"
        mine, theirs = (
            [run for place, run in sorted(places.items()) if place[:3] == (row["task"], row["host"], row[part])]
            for part in ("proposed", "other")
        )
        seeds = sorted({run["seed"] for run in mine} & {run["seed"] for run in theirs})
        pairs = [
            [next(run for run in part if run["seed"] == seed) for part in (mine, theirs)] for seed in seeds
        ]  # (proposed, other)
        covered |= {(first["run_id"], second["run_id"]) for first, second in pairs}
        if seeds != row["seeds"]:
            found.append(f"{name}: seeds {row['seeds']}, are {seeds}")
        if not seeds:
            continue
        said = row["difference"]
        own = sum(score_of(first) - score_of(second) for first, second in pairs) / len(pairs)
        if abs(said["value"] - own) > 1e-9:
            found.append(f"{name}: said {said['value']}, is {own}")
        if pairs[0][0]["metric"] == "accuracy" and isinstance(pairs[0][0]["references"][0], int):
            error = error_of_mean([gains(first, second) for first, second in pairs])
            if abs(said["standard_error"] - error) > 0.1 * error:  # 1,000 resamples give it to some 2 %
                found.append(f"{name}: standard error {said['standard_error']}, is {error}")
        if said["standard_error"]:
            p_value = 2 * float(norm.sf(abs(said["value"]) / said["standard_error"]))
        else:
            p_value = 1.0 if said["value"] == 0 else 0.0
        if abs(p_value - said["p_value"]) > 1e-9:
            found.append(f"{name}: p {said['p_value']}, is {p_value}")
    running = 0.0
    for rank, row in enumerate(sorted(verdicts, key=lambda row: row["difference"]["p_value"])):
        running = max(running, min(1.0, row["difference"]["p_value"] * (len(verdicts) - rank)))
        outcome = "open" if running > 0.05 else "better" if row["difference"]["value"] > 0 else "worse"
        if abs(row["holm_p"] - running) > 1e-9 or row["outcome"] != outcome:
            found.append(f"{row['proposed']} beside {row['other']} on {row['host']}: Holm's p is {running}, {outcome}")
    missing = {
        (first["run_id"], second["run_id"])
        for first in runs.values()
        for second in runs.values()
        if first["method"] in PROPOSED
        and second["method"] not in PROPOSED
        and (first["task"], first["host"], first["seed"]) == (second["task"], second["host"], second["seed"])
    } - covered
    return found + [f"no verdict on {first} beside {second}" for first, second in sorted(missing)]


def gains(first: dict, second: dict) -> list[int]:
    """1, 0 or -1 an example: what the first gets right and the second does not, and the other way round."""
    triples = zip(first["predictions"], second["predictions"], first["references"], strict=True)
    return [(a == true) - (b == true) for a, b, true in triples]


def error_of_mean(seeds: list[list[int]]) -> float:
    """Standard error over examples of the mean over examples and seeds."""
    means = [sum(row) / len(seeds) for row in zip(*seeds, strict=True)]
    centre = sum(means) / len(means)
    return math.sqrt(sum((value - centre) ** 2 for value in means) / (len(means) - 1) / len(means))


def main() -> None:
    found = differences(Path(sys.argv[1]))
    print("\n".join(found) or "the comparison says what the runs say")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
