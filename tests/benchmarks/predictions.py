"""Predictions of the shipped adapters on every local host, held against those of another version of this package.

    python tests/benchmarks/predictions.py --shared SHARED --against tests/benchmarks/results/predictions.json
    python tests/benchmarks/predictions.py --shared SHARED --output predictions.json

A change that is meant to move no score moves no prediction.  `results/predictions.json` was made at commit 8e684b4, on
a CPU with two threads; another machine's rounding may move a prediction that is a tie.  Exit code 1 where any differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from uhl_cli import UniversalAdapter
from uhl_cli.data import load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import load_host

FILES = {"sst2": "sst2-minilm-l6", "reviews": "reviews-builtin-base"}
HOSTS = ("minilm-l3", "minilm-l6", "wiki-256x4", "builtin:tiny", "builtin:small", "builtin:decoder", "builtin:base")
ADAPTERS = Path(__file__).parents[2] / "adapters"


def predictions(shared: Path) -> dict[str, str]:
    """A digit, the class, for every dev example, by task and host."""
    found = {}
    for task, name in FILES.items():
        adapter = UniversalAdapter.load(ADAPTERS / f"{name}.safetensors")
        where = str(shared / "data" / task) if task == "sst2" else None
        data = load_task(task, data=where, labels=adapter.manifest.task.labels, need_train=False, offline=True)
        assert data.evaluation is not None
        for host in HOSTS:
            place = host if host.startswith("builtin:") else str(shared / "hosts" / host)
            ported = adapter.port(load_host(place, device="cpu"))
            classes = ported(data.evaluation.texts).argmax(-1).tolist()
            found[f"{task} {host}"] = "".join(map(str, classes))
            print(task, host, len(classes), file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = predictions(arguments.shared)
    if arguments.output:
        write_text(arguments.output, json.dumps({"predictions": found}, indent=1) + "\n")
    if arguments.against:
        wanted = json.loads(arguments.against.read_text())["predictions"]
        moved = {key: sum(a != b for a, b in zip(wanted[key], found[key], strict=True)) for key in wanted}
        total = sum(map(len, wanted.values()))
        print(f"{sum(moved.values())} of {total:,} predictions differ, in {len(wanted)} ports")
        sys.exit(1 if any(moved.values()) else 0)


if __name__ == "__main__":
    main()
