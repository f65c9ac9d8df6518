"""What agreement with the teacher promises: ports of several files, their agreement, and their true score on dev.

    python tests/benchmarks/agreement.py FILE adapters/*.safetensors --shared SHARED \
        --output tests/benchmarks/results/agreement.json

FILE is that of `uhl compare --config upwards-minilm-l3`, in `adapters/` of its results. SHARED is a folder with
`hosts/` and `data/`. Every file is ported to every target as `uhl port` does it, and to `--weaker` once more for each
of `--fewer`, with fewer anchors and no feature bank, which makes weaker ports. Agreement is measured as `uhl port`
measures it; dev is read for the true score alone. The fit takes ports to other models than the file's source. A port
that is in the output is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from byte_shares import with_fewer

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.agreement import HeldOut, expected_accuracy, judged, judges
from uhl_cli.commands.scoring import Classes, references_of
from uhl_cli.data import TaskData, load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import load_host
from uhl_cli.metrics import score
from uhl_cli.schema import Manifest

Row = dict[str, Any]
TARGETS = (
    "minilm-l3",
    "minilm-l6",
    "wiki-256x4",
    "builtin:base",
    "builtin:small",
    "builtin:tiny",
    "builtin:decoder",
)
WEAKER = ("wiki-256x4", "builtin:small", "builtin:decoder")
EXPONENTS = np.arange(10, 201) / 100
# Half the width of a 95 % interval, in standard deviations.
WIDTH = 1.96


def residuals(rows: Sequence[Row], exponent: float) -> np.ndarray:
    """True minus expected score of every port, float64 [rows]."""
    return np.array([row["score"]["value"] - expected(row, exponent) for row in rows])


def expected(row: Row, exponent: float) -> float:
    """The score that a port's kappa promises."""
    return expected_accuracy(row["kappa"], chance=row["chance"], teacher=row["teacher"], exponent=exponent)


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """The exponent with the least squared residuals, and half the width of a 95 % interval of the residuals."""
    squares = [float(np.square(residuals(rows, float(each))).mean()) for each in EXPONENTS]
    best = int(np.argmin(squares))
    return {"exponent": float(EXPONENTS[best]), "residual": round(WIDTH * squares[best] ** 0.5, 3)}


def port_row(adapter: UniversalAdapter, target: str, where: str, data: TaskData, anchors: int | None) -> Row:
    """One port, with its agreement and its true score."""
    task, host = adapter.manifest.task, load_host(where, device="cpu")
    used = adapter if anchors is None else with_fewer(adapter, anchors, 0)[0]
    ported = used.port(host)
    held = judges(adapter.transfer_set(), host)
    said = ported.classes_of(held.examples).for_metric(task.kind)
    assert data.evaluation is not None
    true = ported.classes_of(data.evaluation).for_metric(task.kind)
    home = host.fingerprint == adapter.manifest.source.fingerprint
    return {"target": target, "anchors": anchors, "home": home} | scored(adapter.manifest, said, held, true, data)


def scored(manifest: Manifest, said: Classes, held: HeldOut, true: Classes, data: TaskData) -> Row:
    """The agreement of what a port says on held-out texts, and the score of what it says on dev."""
    found, task = judged(manifest, said, held), manifest.task
    assert data.evaluation is not None
    return {
        "texts": found.texts,
        "agreement": found.score.model_dump(),
        "kappa": found.kappa,
        "chance": None if found.expected is None else found.expected.chance,
        "teacher": None if found.expected is None else found.expected.teacher,
        "score": score(task.metric, true, references_of(data.evaluation), task.labels).model_dump(),
    }


def finished(rows: list[Row]) -> dict[str, Any]:
    """All rows with their expected score, and the fits over all files and without each of them."""
    fitted = [row for row in rows if row["chance"] is not None and not row["home"]]
    found = fit(fitted)
    for row in rows:
        row["expected"] = None if row["chance"] is None else round(expected(row, found["exponent"]), 4)
    files = sorted({row["file"] for row in fitted})
    apart = {}
    for name in files:
        others, own = [row for row in fitted if row["file"] != name], [row for row in fitted if row["file"] == name]
        if others:
            exponent = fit(others)["exponent"]
            error = residuals(own, exponent)
            apart[name] = {"exponent": exponent, "mean": float(error.mean()), "largest": float(np.abs(error).max())}
    worst = float(np.abs(residuals(fitted, found["exponent"])).max())
    summary = found | {"ports": len(fitted), "files": len(files), "largest": worst, "without": apart}
    return {"fit": summary, "results": rows}


def main() -> None:
    """Make what is missing, then fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--weaker", nargs="*", default=list(WEAKER))
    parser.add_argument("--fewer", nargs="*", type=int, default=[512, 48])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[Row] = []
    if arguments.output.exists():
        rows = json.loads(arguments.output.read_text(encoding="utf-8"))["results"]
    done = {(row["digest"], row["target"], row["anchors"]) for row in rows}
    for path in arguments.adapters:
        adapter = UniversalAdapter.load(path)
        task, digest = adapter.manifest.task.name, adapter.digest[:12]
        data = load_task(task, data=None if task == "reviews" else str(arguments.shared / "data" / task))
        for target in arguments.targets:
            where = target if target.startswith("builtin:") else str(arguments.shared / "hosts" / target)
            for anchors in (None, *(arguments.fewer if target in arguments.weaker else ())):
                if (digest, target, anchors) in done:
                    continue
                named = {"file": path.stem, "digest": digest, "task": task}
                rows.append(named | port_row(adapter, target, where, data, anchors))
                write_text(arguments.output, json.dumps({"results": rows}, indent=1) + "\n")
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    write_text(arguments.output, json.dumps(finished(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
