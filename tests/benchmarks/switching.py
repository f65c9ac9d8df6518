"""Time of switching task files on one aligned host, beside the time of porting anew.

    python tests/benchmarks/switching.py adapters/sst2-minilm-l6.safetensors --shared SHARED \
        --output tests/benchmarks/results/switching.json

`take` is `port` to the aligned host: read a task file and fold its gains and readout, once a task.  `switch` is leaving
the context of one task and entering that of another, which is all that is left afterwards.  `port` aligns anew.
Hosts: those of SHARED, and one of BERT-base's shape with random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, BertConfig, BertModel

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, TuneOptions, tuning_defaults
from uhl_cli.commands.tune import tune
from uhl_cli.data import load_task
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.ported.model import PortedModel


def hosts(shared: Path) -> dict[str, Host]:
    """The hosts that are measured."""
    found = {name: load_host(str(shared / "hosts" / name), device="cpu") for name in ("minilm-l3", "minilm-l6")}
    tokenizer = AutoTokenizer.from_pretrained(shared / "hosts" / "minilm-l6")
    torch.manual_seed(0)
    found["bert-base shape"] = wrap_host(BertModel(BertConfig(vocab_size=len(tokenizer))).eval(), tokenizer)
    return found


def task_files(adapter: UniversalAdapter, source: Path, host: Host, shared: Path, folder: Path) -> dict[str, Path]:
    """A task file of the adapter's own task and one with a readout of its own; one step of training each."""
    found = {}
    for name, kind in ((adapter.manifest.task.name, "own task"), ("conll2003", "another task")):
        data = load_task(name, data=str(shared / "data" / name), limit_train=64, limit_evaluation=8)
        options = TuneOptions(
            adapter=source,
            target=HostOptions(name="host"),
            data=DataOptions(task=name),
            training=tuning_defaults().model_copy(update={"max_steps": 1}),
            output=folder / f"{name}.task.safetensors",
        )
        tune(adapter, host, data, options, accelerator=Accelerator(cpu=True))
        found[kind] = folder / f"{name}.task.safetensors"
    return found


def milliseconds(act: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median and tenth and ninetieth percentile of an act's time."""
    act()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - started))
    deciles = statistics.quantiles(times, n=10)
    return {"median": statistics.median(times), "p10": deciles[0], "p90": deciles[-1]}


def switch(first: PortedModel, second: PortedModel) -> None:
    """Attach one after the other."""
    for ported in (first, second):
        with ported.attached():
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    adapter = UniversalAdapter.load(arguments.adapter)
    results: dict[str, object] = {}
    for name, host in hosts(arguments.shared).items():
        with tempfile.TemporaryDirectory() as folder:
            files = task_files(adapter, arguments.adapter, host, arguments.shared, Path(folder))
            started = time.perf_counter()
            aligned = adapter.align(host, any_task=True)
            adapter.port(aligned)
            row: dict[str, object] = {"port": 1000 * (time.perf_counter() - started)}
            for kind, path in files.items():
                row[f"take, {kind}"] = milliseconds(partial(adapter.port, aligned, task=path), arguments.rounds)
            first, second = (adapter.port(aligned, task=path) for path in files.values())
            both = milliseconds(partial(switch, first, second), arguments.rounds)
            row["switch"] = {key: value / 2 for key, value in both.items()}
        results[name] = row
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    content = {"unit": "milliseconds", "threads": torch.get_num_threads(), "rounds": arguments.rounds, "hosts": results}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
