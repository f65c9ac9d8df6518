"""Zero-shot transfer, side by side: each adapter on each target, with the controls, in one run.

    python tests/benchmarks/zero_shot.py --shared SHARED --output tests/benchmarks/results/zero_shot.json \
        adapters/sst2-minilm-l6.safetensors

SHARED is a folder with data/sst2 and hosts/.  Scores are on all 872 dev sentences; the random-update control is
drawn with `--seed`.  Seconds are wall-clock on the machine at hand and only comparable within the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from uhl_cli.pipeline.options import DataOptions, HostOptions, PortOptions
from uhl_cli.pipeline.port import run_port

TARGETS = ("minilm-l6", "minilm-l3", "wiki-256x4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--align", nargs="+", default=["anchors"], choices=["anchors", "embeddings", "size"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = []
    for adapter in arguments.adapters:
        for target in arguments.targets:
            for strategy in arguments.align:
                _, report = run_port(
                    PortOptions(
                        adapter=adapter,
                        target=HostOptions(name=str(arguments.shared / "hosts" / target), device="cpu"),
                        data=DataOptions(data=str(arguments.shared / "data" / "sst2")),
                        data_required=True,
                        strategy=strategy,
                        seed=arguments.seed,
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
