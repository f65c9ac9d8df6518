"""Seconds of a training step: pretraining and tuning against rank-8 LoRA of `peft` on the same host and batches.

    python tests/benchmarks/steps.py --shared SHARED --output tests/benchmarks/results/steps.json

Systems take turns, a block of steps each, on SST-2 in batches of 32; a figure is the median over blocks, its spread the
smallest and the largest.  Tuning trains delta-theta alone, pretraining everything; both carry the readout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lora import LoraSettings, baseline, take_steps

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, PretrainOptions, tuning_defaults
from uhl_cli.commands.pretrain import prepare
from uhl_cli.data import load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import load_host
from uhl_cli.reports import silent
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.loop import train
from uhl_cli.train.task_adapter import TaskAdapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--host", default="minilm-l6")
    parser.add_argument("--adapter", type=Path, default=Path("adapters/sst2-minilm-l6.safetensors"))
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = str(arguments.shared / "hosts" / arguments.host)
    data = load_task("sst2", data=str(arguments.shared / "data" / "sst2"), limit_train=8000, need_evaluation=False)
    assert data.train is not None
    examples = data.train

    def accelerator(precision: str) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)  # one process trains in two precisions
        return Accelerator(cpu=True, mixed_precision=precision)

    host = load_host(where, device="cpu")
    options = PretrainOptions(
        host=HostOptions(name=where),
        data=DataOptions(task="sst2"),
        anchors="general",
        feature_words=0,
        output=Path("unused.safetensors"),
    )
    prepared = prepare(host, data, options, silent)
    config = options.adapter.model_copy(update={"num_labels": 2, "kind": data.task.kind})
    canonical = CanonicalAdapter(config, seed=0)
    universal = UniversalAdapter.load(arguments.adapter)
    aligned = universal.align(host)
    delta = TaskAdapter(universal.stored, universal.manifest.config, new_readout=False, seed=0)
    lora = baseline(where, 2, LoraSettings(1e-3))
    steps = arguments.steps

    def pretraining(precision: str) -> None:
        training = TrainingConfig(max_steps=steps)
        train(canonical, prepared.aligned, examples, training, accelerator=accelerator(precision))

    def tuning() -> None:
        training = tuning_defaults().model_copy(update={"max_steps": steps})
        train(delta, aligned, examples, training, accelerator=accelerator("no"), shift=universal.shift(aligned))

    systems: dict[str, Callable[[], None]] = {
        "LoRA r8": lambda: take_steps(lora, examples, LoraSettings(1e-3, steps=steps)),
        "pretraining": lambda: pretraining("no"),
        "pretraining, bf16": lambda: pretraining("bf16"),
        "tuning": tuning,
    }
    times: dict[str, list[float]] = {name: [] for name in systems}
    for block in range(arguments.blocks + 1):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            if block:  # the first one warms up
                times[name].append((time.perf_counter() - started) / steps)
    rows = {
        name: {"seconds": statistics.median(found), "low": min(found), "high": max(found)}
        for name, found in times.items()
    }
    base = rows["LoRA r8"]["seconds"]
    for name, row in rows.items():
        row["ratio"] = row["seconds"] / base
        print(
            f"{name}: {row['seconds']:.3f} s a step [{row['low']:.3f}, {row['high']:.3f}], {row['ratio']:.2f} of LoRA's"
        )
    content = {"host": arguments.host, "threads": arguments.threads, "torch": torch.__version__, "results": rows}
    write_text(arguments.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
