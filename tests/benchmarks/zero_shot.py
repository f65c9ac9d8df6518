"""Zero-shot transfer, side by side: each adapter on each target, with the controls, in one run.

    python tests/benchmarks/zero_shot.py --shared SHARED --output tests/benchmarks/results/zero_shot.json \
        adapters/sst2-minilm-l6.safetensors

    python tests/benchmarks/zero_shot.py --output tests/benchmarks/results/zero_shot_builtin.json \
        adapters/reviews-builtin-base.safetensors --targets builtin:base builtin:small builtin:tiny builtin:decoder

SHARED is a folder with data/TASK and hosts/; builtin targets and the task `reviews` need none.  Scores are on the
whole dev set of the adapter's own task; the random-update control is drawn with `--seed`.
Seconds are wall-clock on the machine at hand and only comparable within the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from uhl_cli.commands.options import DataOptions, HostOptions, PortOptions
from uhl_cli.commands.port import run_port
from uhl_cli.formats.adapter import read_adapter

TARGETS = ("minilm-l6", "minilm-l3", "wiki-256x4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--align", nargs="+", default=["anchors"], choices=["anchors", "size"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = []
    for adapter in arguments.adapters:
        task = read_adapter(adapter).manifest.task.name
        data = None if task == "reviews" else str(arguments.shared / "data" / task)
        for target in arguments.targets:
            path = target if target.startswith("builtin:") else str(arguments.shared / "hosts" / target)
            for strategy in arguments.align:
                _, report = run_port(
                    PortOptions(
                        adapter=adapter,
                        target=HostOptions(name=path, device="cpu"),
                        data=DataOptions(data=data),
                        strategy=strategy,
                        controls=True,
                        seed=arguments.seed,
                        cache=False,
                    )
                )
                row = report.model_dump(mode="json")
                row["adapter"] = adapter.name
                results.append(row)
                values = "  ".join(f"{name} {score.value:.3f}" for name, score in report.scores.items())
                print(f"{adapter.name} -> {target} [{strategy}]  {values}", file=sys.stderr)
    arguments.output.write_text(json.dumps({"seed": arguments.seed, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
