"""Choices of pretraining, each tried alone on a slice of SST-2's training set; dev is never read.

    python tests/benchmarks/pretraining_choices.py --shared SHARED \
        --output tests/benchmarks/results/pretraining_choices.json

1,500 training sentences of twelve words or more are held out, and with them every training phrase that one of them
contains.  Each variant trains for `--steps` on the rest, is scored on the slice on its source, and is ported to the
targets and scored there.  One standard error is about one point.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from uhl_cli.api import UniversalAdapter
from uhl_cli.data import Examples, TaskData, load_task
from uhl_cli.host.checkpoint import load_host
from uhl_cli.pipeline.options import DataOptions, HostOptions, PortOptions, PretrainOptions
from uhl_cli.pipeline.port import port
from uhl_cli.pipeline.pretrain import pretrain
from uhl_cli.schema import TrainingConfig

SOURCE = "minilm-l6"
TARGETS = ("minilm-l3", "wiki-256x4")
# Changes to the defaults, by name; "anchors" is an option of the run, the rest of the training.
VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    "anchors-general": {"anchors": "general"},
    "no-width-views": {"width_views": 0},
    "update-noise-1": {"update_noise": 1.0},
    "no-noise": {"noise": 0.0},
    "no-update-dropout": {"update_dropout": 0.0},
    "active-weight-0.05": {"active_weight": 0.05},
    "learning-rate-1e-3": {"learning_rate": 1e-3},
    "learning-rate-6e-3": {"learning_rate": 6e-3},
    "no-updates": {"updates": False},
}


def slice_of(train: Examples, *, held_out: int = 1500, least_words: int = 12) -> tuple[Examples, Examples]:
    """(rest, held out) with no phrase of a held-out sentence among the rest."""
    order = np.random.default_rng(1).permutation(len(train))
    held = [int(row) for row in order if len(train.texts[row].split()) >= least_words][:held_out]
    texts = "\n".join(train.texts[row] for row in held)
    taken = set(held)
    rest = [row for row in range(len(train)) if row not in taken and train.texts[row].strip() not in texts]
    return train.select(rest), train.select(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    loaded = load_task("sst2", data=str(arguments.shared / "data" / "sst2"), need_evaluation=False)
    assert loaded.train is not None
    rest, held = slice_of(loaded.train)
    data = TaskData(loaded.task, rest, held, "a slice of SST-2's training set")
    hosts = {name: load_host(str(arguments.shared / "hosts" / name), device="cpu") for name in (SOURCE, *TARGETS)}
    results = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in arguments.variants:
            changes = dict(VARIANTS[variant])
            path = Path(folder) / f"{variant}.safetensors"
            options = PretrainOptions(
                host=HostOptions(name=SOURCE),
                data=DataOptions(task="sst2"),
                output=path,
                anchors=changes.pop("anchors", None),
                training=TrainingConfig(max_steps=arguments.steps, seed=arguments.seed, **changes),
            )
            trained = pretrain(hosts[SOURCE], data, options, accelerator=Accelerator(cpu=True))
            row = {"source": trained.model_dump(mode="json", exclude={"output"}), "targets": {}}
            adapter = UniversalAdapter.load(path)
            line = f"{variant}: source {trained.score.value:.3f} (updates off {trained.readout_only.value:.3f})"
            for target in TARGETS:
                port_options = PortOptions(adapter=path, target=HostOptions(name=target))
                _, report = port(adapter, hosts[target], port_options, data=data)
                row["targets"][target] = report.model_dump(mode="json", exclude={"adapter", "output"})
                scores = report.scores
                line += f", {target} {scores['ported'].value:.3f} (off {scores['readout_only'].value:.3f})"
            print(line, file=sys.stderr, flush=True)
            results[f"{variant}/seed-{arguments.seed}"] = row
            content = {"steps": arguments.steps, "held_out": len(held), "train": len(rest), "results": results}
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
