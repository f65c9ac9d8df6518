"""What tables in eight bits cost in score and save in memory: the same port with them and in the host's precision.

    python tests/benchmarks/compact.py adapters/sst2-minilm-l6.safetensors --shared SHARED \
        --targets minilm-l6 minilm-l3 wiki-256x4 builtin:decoder --output tests/benchmarks/results/compact.json

Both share one alignment.  The difference of the scores is paired over the examples of SST-2 dev, with its interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from uhl_cli.adapter.fold import fold
from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.scoring import references_of
from uhl_cli.data import load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import load_host
from uhl_cli.metrics import paired_difference, score
from uhl_cli.ported.model import PortedModel


def one(adapter: UniversalAdapter, where: str, shared: Path) -> dict[str, object]:
    """Both forms on one target."""
    host = load_host(where, device="cpu")
    task = adapter.manifest.task
    examples = load_task(task.name, data=str(shared / "data" / task.name)).evaluation
    assert examples is not None
    aligned = adapter.align(host)
    compact, plan, shift = adapter.port(aligned), aligned.plan, adapter.shift(aligned)
    with torch.no_grad():
        folded = fold(adapter.stored, aligned.alignment, host.map, layers=plan.layers, types=plan.types, shift=shift)
    weight = host.map.embeddings.weight
    wide = compact.with_adapter(folded.mapped(lambda _name, value: value.to(weight)))
    references = references_of(examples)

    def classes(ported: PortedModel) -> list[int] | list[list[int]]:
        return ported.classes_of(examples, max_length=adapter.max_length).for_metric(task.kind)

    found = {"compact": classes(compact), "wide": classes(wide)}
    own = sum(value.nbytes for value in host.map.base.parameters())
    row: dict[str, object] = {
        name: {"score": score(task.metric, predicted, references, task.labels).model_dump()}
        for name, predicted in found.items()
    }
    difference = paired_difference(task.metric, found["compact"], found["wide"], references, task.labels)
    differing = sum(first != second for first, second in zip(found["compact"], found["wide"], strict=True))
    row |= {"difference": difference.model_dump(), "differing": differing, "examples": len(examples), "host_bytes": own}
    return row | {"bytes": {"compact": compact.adapter.nbytes, "wide": wide.adapter.nbytes}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    adapter = UniversalAdapter.load(arguments.adapter)
    rows = {}
    for target in arguments.targets:
        where = target if target.startswith("builtin:") else str(arguments.shared / "hosts" / target)
        rows[target] = one(adapter, where, arguments.shared)
        print(target, rows[target], file=sys.stderr, flush=True)
        write_text(arguments.output, json.dumps({"adapter": adapter.digest, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
