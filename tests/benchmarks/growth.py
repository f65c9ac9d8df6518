"""How a port's time and memory grow with the host and with the bank: seconds by phase, peak of the process, FLOPs.

    python tests/benchmarks/growth.py ADAPTER --shared SHARED --output tests/benchmarks/results/growth.json

A host a process, so that peaks are its own: `loaded` is the most memory that the process held once the host was there
and had run once, `peak` the most it held at all.  `random:WIDTHxDEPTH` is a BERT of that shape with random weights; a
port does as much work on it as on a trained one.  `HOST@N` takes the first texts of the feature bank with N words in
all.  Phases: the alignment by the canonical anchors, the maps to the readout's features, the folding with the
measuring of the mean shift; within them, `host` is the host's own forward passes.  `sentences` a second are those of
SST-2 dev in batches of 64, tokenised and predicted, by the ported model and by the host alone, in turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

from uhl_cli.adapter.fold import feature_prior
from uhl_cli.align.features import FeatureBank, align_features
from uhl_cli.api import UniversalAdapter
from uhl_cli.cost.flops import count_flops
from uhl_cli.cost.plan import plan_for
from uhl_cli.data import Examples, load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.host.encode import encode
from uhl_cli.ported.aligned import AlignedHost, align_host
from uhl_cli.ported.model import PortedModel

HOSTS = ("builtin:tiny", "builtin:base", "wiki-256x4", "minilm-l3", "minilm-l6", "random:768x6", "random:768x12")
FEWER_WORDS = ("minilm-l6@5000", "minilm-l6@10000")
SENTENCES, BATCH_SIZE, TURNS = 256, 64, 5


def host_of(name: str, shared: Path) -> Host:
    """A builtin, one of the shared folder, or one with random weights and minilm-l6's tokenizer."""
    if not name.startswith("random:"):
        return load_host(name if name.startswith("builtin:") else str(shared / "hosts" / name), device="cpu")
    width, depth = map(int, name.removeprefix("random:").split("x"))
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    tokenizer = load_host(str(shared / "hosts" / "minilm-l6"), device="cpu").tokenizer
    return wrap_host(BertModel(config).eval(), tokenizer)


def peak() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def first_words(bank: FeatureBank, words: int) -> FeatureBank:
    """The bank's first texts, of at least so many words."""
    counts = np.cumsum([len(ordinals) for ordinals in bank.anchors.chosen])
    texts = int(np.searchsorted(counts, words)) + 1
    anchors = replace(bank.anchors, texts=bank.anchors.texts[:texts], chosen=bank.anchors.chosen[:texts])
    return replace(bank, anchors=anchors, codes=bank.codes[: anchors.num_words])


@contextmanager
def forward_time(host: Host) -> Iterator[list[float]]:
    """Seconds of every forward pass of the host within."""
    seconds: list[float] = []
    started: list[float] = []
    handles = [
        host.map.base.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
        host.map.base.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started.pop())),
    ]
    yield seconds
    for handle in handles:
        handle.remove()


@torch.inference_mode()
def throughput(host: Host, ported: PortedModel, examples: Examples, max_length: int | None) -> dict[str, float]:
    """Sentences a second, the median of some turns, of the ported model and of the host's passes alone."""

    def bare() -> None:
        order = sorted(examples.texts, key=lambda text: -len(text))
        for start in range(0, len(order), BATCH_SIZE):
            encoded = encode(host, order[start : start + BATCH_SIZE], None, max_length=max_length)
            host.map.base(**encoded.model_inputs())

    def carried() -> None:
        ported.classes_of(examples, batch_size=BATCH_SIZE, max_length=max_length)

    seconds: dict[str, list[float]] = {"host": [], "ported": []}
    for _ in range(TURNS + 1):
        for system, run in (("host", bare), ("ported", carried)):
            begun = time.perf_counter()
            run()
            seconds[system].append(time.perf_counter() - begun)
    return {system: len(examples) / statistics.median(values[1:]) for system, values in seconds.items()}


def one(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Port to one host."""
    torch.set_num_threads(arguments.threads)
    name, _, words = name.partition("@")
    adapter = UniversalAdapter.load(arguments.adapter)
    if words:
        assert adapter.features is not None
        adapter = replace(adapter, features=first_words(adapter.features, int(words)))
    host = host_of(name, arguments.shared)
    bare = count_flops(host, None)
    loaded = peak()
    with forward_time(host) as forward:
        clock = [time.perf_counter()]
        config = adapter.manifest.config
        plan = plan_for(host, config, bare, 10.0)
        found = align_host(host, adapter.bank, config.strategy, plan=plan, joint=adapter.features is None)
        clock.append(time.perf_counter())
        if adapter.features is not None:
            settings = {"knots": config.knots, "depths": plan.readout_depths, "readout_size": config.readout_size}
            prior = feature_prior(adapter.stored, found, config.knots)
            found = replace(found, features=align_features(host, adapter.features, **settings, prior=prior))
        clock.append(time.perf_counter())
        ported = adapter.port(AlignedHost(host, adapter.bank.digest, found, plan, bare))
        clock.append(time.perf_counter())
    most = peak()
    phases = dict(zip(("anchors", "features", "folding"), np.diff(clock).tolist(), strict=True))
    examples = load_task("sst2", data=str(arguments.shared / "data" / "sst2")).evaluation
    assert examples is not None
    speeds = throughput(host, ported, examples.select(range(SENTENCES)), adapter.max_length)
    return {
        "words": adapter.bank.anchors.num_words + (adapter.features.anchors.num_words if adapter.features else 0),
        "phases": phases | {"host": sum(forward)},
        "sentences": speeds,
        "parameters": sum(value.numel() for value in host.map.base.parameters()),
        "hidden_size": host.hidden_size,
        "num_hidden_layers": host.num_hidden_layers,
        "seconds": clock[-1] - clock[0],
        "loaded_bytes": loaded,
        "peak_bytes": most,
        "flops_percent": 100 * (count_flops(host, ported.adapter) / bare - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--hosts", nargs="+", default=[*HOSTS, *FEWER_WORDS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(one(arguments.only, arguments)))
        return
    if arguments.output is None:
        parser.error("give --output")
    rows = {}
    print(
        "| host | parameters | seconds to port | of them the host's passes | peak over loaded | FLOP overhead "
        "| sentences a second, host / ported |\n|---|---|---|---|---|---|---|"
    )
    for name in arguments.hosts:
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = rows[name] = json.loads(done.stdout.splitlines()[-1])
        ratio, passes = row["peak_bytes"] / row["loaded_bytes"], row["phases"]["host"]
        print(
            f"| {name} | {row['parameters'] / 1e6:.1f} M | {row['seconds']:.1f} | {passes:.1f} | {ratio:.2f} "
            f"({row['peak_bytes'] / 2**20:.0f} MiB) | {row['flops_percent']:+.1f} % "
            f"| {row['sentences']['host']:.0f} / {row['sentences']['ported']:.0f} |",
            flush=True,
        )
        content = {"adapter": arguments.adapter.name, "threads": arguments.threads, "hosts": rows}
        write_text(arguments.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
