"""The matrix: every adapter file on every target, beside controls, other alignments and what is retrained there.

    python tests/benchmarks/portability.py adapters/sst2-minilm-l6.safetensors --shared SHARED \
        --targets minilm-l3 wiki-256x4 builtin:decoder --output tests/benchmarks/results/portability.json

Files of one task and source count as seeds of one row.  Retrained on each target, with labels: rank-8 LoRA for each of
`--steps`, and for the first of them the whole target, and a canonical readout alone on the frozen target (how far its
states go without updates), `--seeds` seeds each.  Learning rates of LoRA and of the whole are chosen on training data
in runs of `--search-steps`; the readout takes that of `uhl tune`.
Gain recovered is (ported - head only) / (LoRA - head only), by the LoRA of the fewest steps
(DESIGN 4).  Dev is read for scoring alone.  A run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from lora import LoraSettings, predict, search_learning_rate, train_lora
from tuning_methods import Target, fresh_readout

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import HostOptions, PortOptions, tuning_defaults
from uhl_cli.commands.port import port
from uhl_cli.commands.scoring import references_of
from uhl_cli.data import TaskData, load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import load_host
from uhl_cli.metrics import score

Row = dict[str, Any]
METHODS = ["lora", "full", "readout"]
# Rows of the matrix, in order: the name of a score, and what it is called.
ZERO_SHOT = {
    "ported": "**ported: anchors, with updates**",
    "readout_only": "anchors, without updates",
    "embeddings": "`--align embeddings`",
    "majority_class": "control: majority class",
    "random_update": "control: random updates",
    "head_only": "control: head only",
    "size": "control: `--align size`",
}


class Store:
    """The JSON file: rows by key; a row that is there is not made again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, Row] = json.loads(path.read_text())["results"] if path.exists() else {}

    def add(self, key: str, row: Row) -> None:
        """Take in a row and write the file."""
        self.rows[key] = row
        write_text(self._path, json.dumps({"results": self.rows}, indent=1) + "\n")
        print(key, {name: round(entry["value"], 4) for name, entry in row.get("scores", {}).items()}, file=sys.stderr)


def carry(store: Store, path: Path, target: str, where: str, data: TaskData) -> None:
    """One file on one target."""
    adapter = UniversalAdapter.load(path)
    manifest = adapter.manifest
    key = f"{manifest.task.name}/{manifest.source.name}/{target}/{path.stem}/{adapter.digest[:12]}"
    if key in store.rows:
        return
    host = load_host(where, device="cpu")
    row: Row = {"kind": "zero-shot", "task": manifest.task.name, "source": manifest.source.name, "target": target}
    row |= {"file": path.name, "bytes": path.stat().st_size, "digest": adapter.digest}
    row["source_score"] = None if manifest.score is None else manifest.score.model_dump()
    options = PortOptions(adapter=path, target=HostOptions(name=where), controls=True, cache=False)
    _, report = port(adapter, host, options, data=data)
    row["scores"] = {name: found.model_dump() for name, found in report.scores.items()}
    row["gains"] = {name: found.model_dump() for name, found in report.gains.items()}
    row |= {"flops_percent": report.flops.percent, "atoms_per_token": report.atoms_per_token}
    row |= {"feature_quality": report.feature_quality, "left_out": report.left_out, "seconds": report.seconds}
    store.add(key, row)


def retrain(
    store: Store, method: str, steps: int, seeds: list[int], target: str, where: str, data: TaskData, search: int
) -> None:
    """LoRA or the whole target, trained with labels for some steps."""
    rank = 8 if method == "lora" else None
    task, train, evaluation = data.task, data.train, data.evaluation
    assert train is not None
    assert evaluation is not None
    place = f"{task.name}/{target}/{method}"
    for seed in seeds:
        key = f"{place}-{steps}/seed-{seed}"
        if key in store.rows:
            continue
        if f"{place}/search" not in store.rows:
            found = search_learning_rate(where, train, task.labels, task.metric, steps=search, rank=rank)
            tried = found.scores
            store.add(f"{place}/search", {"kind": "search", "rate": found.rate, "tried": tried, "steps": search})
        rate = store.rows[f"{place}/search"]["rate"]
        started = time.monotonic()
        model = train_lora(where, train, len(task.labels), LoraSettings(rate, steps=steps, seed=seed, rank=rank))
        seconds = time.monotonic() - started
        result = score(task.metric, predict(model, evaluation), references_of(evaluation), task.labels)
        row: Row = {
            "kind": "retrained",
            "task": task.name,
            "target": target,
            "method": f"{method}-{steps}",
            "seed": seed,
        }
        row |= {"rate": rate, "seconds": seconds, "scores": {"retrained": result.model_dump()}}
        store.add(key, row)


def frozen(store: Store, steps: int, seeds: list[int], target: Target) -> None:
    """A canonical readout on the frozen target, trained with labels for some steps under the file's alignment."""
    for seed in seeds:
        key = f"{target.data.task.name}/{target.name}/readout-{steps}/seed-{seed}"
        if key in store.rows:
            continue
        training = tuning_defaults().model_copy(update={"max_steps": steps, "seed": seed})
        row: Row = {"kind": "retrained", "task": target.data.task.name, "target": target.name}
        row |= {"method": f"readout-{steps}", "seed": seed}
        store.add(key, row | {"scores": {"retrained": fresh_readout(target, training)["score"]}})


def matrix(rows: list[Row]) -> list[str]:
    """The matrix as Markdown: a column a pair of source and target, every score a mean over files or seeds."""
    ported = [row for row in rows if row["kind"] == "zero-shot"]
    pairs = list(dict.fromkeys((row["task"], row["source"], row["target"]) for row in ported))
    columns = [[row for row in ported if (row["task"], row["source"], row["target"]) == pair] for pair in pairs]
    lines = ["| | " + " | ".join(f"{task}: {source} -> {target}" for task, source, target in pairs) + " |"]
    lines.append("|---" * (len(pairs) + 1) + "|")

    def line(label: str, cells: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    line("the source's own score", [_cell([row["source_score"] for row in column]) for column in columns])
    for name, label in ZERO_SHOT.items():
        line(label, [_cell([row["scores"].get(name) for row in column]) for column in columns])
    trained = [row for row in rows if row["kind"] == "retrained"]
    methods = sorted({row["method"] for row in trained}, key=lambda name: (name.split("-")[0], int(name.split("-")[1])))
    values = {}
    for method in methods:
        cells = []
        for task, _, target in pairs:
            found = [
                row["scores"]["retrained"]
                for row in trained
                if (row["task"], row["target"], row["method"]) == (task, target, method)
            ]
            values[task, target, method] = found
            cells.append(_cell(found))
        line(f"retrained with labels: {method.replace('-', ', ')} steps", cells)
    first = next((method for method in methods if method.startswith("lora")), None)
    recovered = []
    for (task, _, target), column in zip(pairs, columns, strict=True):
        lora, head = (
            _mean(values.get((task, target, first), [])),
            _mean([row["scores"].get("head_only") for row in column]),
        )
        own = _mean([row["scores"]["ported"] for row in column])
        recovered.append(
            "–" if lora is None or head is None or own is None else f"{100 * (own - head) / (lora - head):.0f} %"
        )
    line("gain recovered", recovered)
    for name, label in (
        ("readout_only", "without updates"),
        ("head_only", "head only"),
        ("random_update", "random updates"),
    ):
        gains = [column[0]["gains"].get(name) for column in columns]
        line(
            f"ported minus {label}, paired, first file",
            [
                "–" if gain is None else f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
                for gain in gains
            ],
        )
    line("bytes", [f"{column[0]['bytes']:,}" for column in columns])
    line("FLOP overhead at 128 tokens", [f"{column[0]['flops_percent']:.2f} %" for column in columns])
    return lines


def _mean(found: list[Row | None]) -> float | None:
    values = [row["value"] for row in found if row is not None]
    return float(np.mean(values)) if values else None


def _cell(found: list[Row | None]) -> str:
    """Mean, standard error over seeds where there are several, and the interval over examples of the first."""
    rows = [row for row in found if row is not None]
    if not rows:
        return "–"
    values = np.array([row["value"] for row in rows])
    spread = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread} [{rows[0]['low']:.3f}, {rows[0]['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--targets", nargs="+", default=["minilm-l6", "minilm-l3", "wiki-256x4", "builtin:decoder"])
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", nargs="+", type=int, default=[500, 3000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--search-steps", type=int, default=150)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    store = Store(arguments.output)
    loaded: dict[str, TaskData] = {}
    for path in arguments.adapters:
        manifest = UniversalAdapter.load(path).manifest
        task = manifest.task.name
        if task not in loaded:
            loaded[task] = load_task(task, data=None if task == "reviews" else str(arguments.shared / "data" / task))
        for target in arguments.targets:
            where = target if target.startswith("builtin:") else str(arguments.shared / "hosts" / target)
            if target != manifest.source.name:
                carry(store, path, target, where, loaded[task])
            if "readout" in arguments.methods:
                adapter = UniversalAdapter.load(path)
                place = Target(target, where, loaded[task], adapter, path)
                frozen(store, arguments.steps[0], arguments.seeds, place)
            for method in (name for name in arguments.methods if name != "readout"):
                for steps in arguments.steps if method == "lora" else arguments.steps[:1]:
                    retrain(store, method, steps, arguments.seeds, target, where, loaded[task], arguments.search_steps)
    print("\n".join(matrix(list(store.rows.values()))))


if __name__ == "__main__":
    main()
