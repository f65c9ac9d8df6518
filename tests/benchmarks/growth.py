"""How a port's time and memory grow with the host: seconds, peak of the process, and FLOPs of the adapter.

    python tests/benchmarks/growth.py ADAPTER --shared SHARED --output tests/benchmarks/results/growth.json

A host a process, so that peaks are its own: `loaded` is the most memory that the process held once the host was there
and had run once, `peak` the most it held at all.  `random:WIDTHxDEPTH` is a BERT of that shape with random weights; a
port does as much work on it as on a trained one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from uhl_cli.adapter.flops import count_flops
from uhl_cli.api import UniversalAdapter
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import Host, load_host, wrap_host

HOSTS = ("builtin:tiny", "builtin:base", "wiki-256x4", "minilm-l3", "minilm-l6", "random:768x6", "random:768x12")


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


def one(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Port to one host."""
    torch.set_num_threads(arguments.threads)
    adapter = UniversalAdapter.load(arguments.adapter)
    host = host_of(name, arguments.shared)
    bare = count_flops(host, None)
    loaded, started = peak(), time.perf_counter()
    ported = adapter.port(host)
    seconds = time.perf_counter() - started
    return {
        "parameters": sum(value.numel() for value in host.map.base.parameters()),
        "hidden_size": host.hidden_size,
        "num_hidden_layers": host.num_hidden_layers,
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": peak(),
        "flops_percent": 100 * (count_flops(host, ported.folded) / bare - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS))
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
    print("| host | parameters | seconds | peak over loaded | FLOPs |\n|---|---|---|---|---|")
    for name in arguments.hosts:
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = rows[name] = json.loads(done.stdout.splitlines()[-1])
        ratio = row["peak_bytes"] / row["loaded_bytes"]
        print(
            f"| {name} | {row['parameters'] / 1e6:.1f} M | {row['seconds']:.1f} | {ratio:.2f} "
            f"({row['peak_bytes'] / 2**20:.0f} MiB) | {row['flops_percent']:+.1f} % |",
            flush=True,
        )
        content = {"adapter": arguments.adapter.name, "threads": arguments.threads, "hosts": rows}
        write_text(arguments.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
