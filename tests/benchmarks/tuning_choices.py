"""Learning rates of `uhl tune`, each tried on a slice of the training set; dev is never read.

    python tests/benchmarks/tuning_choices.py adapters/sst2-minilm-l6.safetensors --targets minilm-l3 wiki-256x4 \
        --shared SHARED --output tests/benchmarks/results/tuning_choices.json

The slice is that of `pretraining_choices`.  The adapter has seen these sentences in its own pretraining on the source,
so only differences on one target mean anything, and they favour no learning rate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from accelerate import Accelerator
from pretraining_choices import slice_of

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, TuneOptions, tuning_defaults
from uhl_cli.commands.tune import tune
from uhl_cli.data import TaskData, load_task
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.host.checkpoint import load_host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3, 5e-3, 2e-2, 8e-2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=1500)
    parser.add_argument("--least-words", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    task = read_adapter(arguments.adapter).manifest.task.name
    where = None if task == "reviews" else str(arguments.shared / "data" / task)
    loaded = load_task(task, data=where, need_evaluation=False)
    rest, held = slice_of(loaded.train, held_out=arguments.held_out, least_words=arguments.least_words)
    data = TaskData(loaded.task, rest, held, f"a slice of {task}'s training set")
    adapter = UniversalAdapter.load(arguments.adapter)
    results = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for target in arguments.targets:
            name = target if target.startswith("builtin:") else str(arguments.shared / "hosts" / target)
            host = load_host(name, device="cpu")
            for rate in arguments.learning_rates:
                update = {"learning_rate": rate, "max_steps": arguments.steps, "seed": arguments.seed}
                options = TuneOptions(
                    adapter=arguments.adapter,
                    target=HostOptions(name=name),
                    data=DataOptions(task=task),
                    training=tuning_defaults().model_copy(update=update),
                    output=Path(folder) / "task.safetensors",
                    overwrite=True,
                )
                report = tune(adapter, host, data, options, accelerator=Accelerator(cpu=True))
                row = {name: each.model_dump() for name, each in report.scores.items()}
                row["gain"] = report.gains["zero_shot"].model_dump()
                results[f"{task}/{target}/{rate:g}/seed-{arguments.seed}"] = row
                before, after = report.scores["zero_shot"].value, report.scores["tuned"].value
                print(f"{task} on {target}, {rate:g}: {before:.3f} -> {after:.3f}", file=sys.stderr, flush=True)
                content = {"steps": arguments.steps, "held_out": len(held), "results": results}
                arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
