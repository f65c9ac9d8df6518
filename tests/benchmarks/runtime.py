"""What a ported model costs at run time: against the host alone and against LoRA of `peft` on the same modules.

    python tests/benchmarks/runtime.py --host SHARED/hosts/minilm-l6 --output tests/benchmarks/results/runtime.json

One process; within a case the systems take turns, so that whatever else happens to the machine happens to all.  A
ratio is that of two medians, and its spread the 10th to 90th percentile of the ratios of single turns.  Every system is
the whole forward pass over made-up tokens: `ported` with its readout, the same with its tables in the host's own
precision in place of eight bits (`ported, wide`), LoRA unmerged and merged (which is the host's own cost).  The longest
case runs in float32 with the most threads alone.
`--host random:768x12 --shared SHARED` takes a BERT of BERT-base's shape with random weights, see `growth.py`.
`--device cuda` measures on a GPU, where a turn ends when the device has done its work; `--threads 1` then.
Memory is counted, not timed: bytes of the tensors added, and the peak of a pass (see `cost.memory`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth import host_of
from peft import LoraConfig, get_peft_model
from torch import nn

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.adapter.sparse import row_values
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.layout import is_table
from uhl_cli.cost.flops import count_map_flops
from uhl_cli.cost.memory import peak_bytes
from uhl_cli.cost.passes import PassShape, forward_pass
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import Host, load_host

CASES = ("1x16", "1x128", "1x512", "32x16", "32x128", "32x512")
LONGEST = 32 * 512
Row = dict[str, Any]


def with_lora(name: str, device: str, dtype: str, *, merged: bool) -> nn.Module:
    """The host with rank-8 LoRA on every module that the adapter edits; its factors are not zero."""
    host = load_host(name, device=device, dtype=dtype)
    modules = sorted({linear.name for layer in host.map.layers for linear in layer.target_modules.values()})
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=modules, init_lora_weights=False)
    model = get_peft_model(host.map.base, config).eval()
    if merged:
        return model.merge_and_unload().eval()
    assert not model.training
    return model.to(host.device, host.map.embeddings.weight.dtype)


def turns(systems: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every turn of every system; two turns first that do not count."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(repetitions + 2):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn > 1:
                times[name].append(time.perf_counter() - started)
    return times


def compared(times: dict[str, list[float]]) -> Row:
    """Medians, and ratios to the host with the spread of single turns."""
    base = np.array(times["host"])
    row: Row = {"milliseconds": {name: 1000 * statistics.median(values) for name, values in times.items()}}
    row["ratio"] = {}
    for name, values in times.items():
        if name != "host":
            low, high = np.percentile(np.array(values) / base, [10, 90])
            middle = statistics.median(values) / statistics.median(times["host"])
            row["ratio"][name] = {"value": middle, "low": float(low), "high": float(high)}
    return row


def compiled_case(
    name: str, device: str, dtype: str, adapter: UniversalAdapter, shape: PassShape, repetitions: int
) -> Row:
    """The host and the ported model, both by torch.compile, attached once."""
    torch.compiler.reset()
    bare, aligned_file = (load_host(name, device=device, dtype=dtype) for _ in range(2))
    folded = adapter.port(aligned_file).adapter
    with (
        torch.inference_mode(),
        forward_pass(bare.map, None, shape) as (plain, ids),
        forward_pass(aligned_file.map, folded, shape) as (ported, _),
    ):
        one, other = torch.compile(plain), torch.compile(ported)
        return compared(turns({"host": lambda: one(ids), "ported": lambda: other(ids)}, repetitions))


def widened(folded: PortedAdapter, dtype: torch.dtype) -> PortedAdapter:
    """The same adapter, its tables unpacked."""
    return folded.mapped(lambda name, value: row_values(value, dtype) if is_table(name) else value)


def forward_case(
    host: Host, folded: PortedAdapter, loras: dict[str, nn.Module], shape: PassShape, repetitions: int
) -> Row:
    """One case, all systems."""
    ids = torch.arange(shape.batch_size * shape.tokens, device=host.device) % 20_000
    ids = ids.view(shape.batch_size, shape.tokens)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        systems: dict[str, Callable[[], object]] = {}
        wide = widened(folded, host.map.embeddings.weight.dtype)
        for name, carried in (("host", None), ("ported", folded), ("ported, wide", wide)):

            def run(carried: PortedAdapter | None = carried) -> object:
                with forward_pass(host.map, carried, shape) as (module, tokens):
                    return module(tokens)

            systems[name] = run
        for name, model in loras.items():
            systems[name] = lambda model=model: model(input_ids=ids, attention_mask=mask)  # type: ignore[misc]
        times = turns(systems, repetitions)
    row = compared(times)
    bare, carried_flops = (count_map_flops(host.map, each, shape) for each in (None, folded))
    peaks = [peak_bytes(host.map, each, shape) for each in (None, folded)]
    row |= {
        "flops_percent": 100 * (carried_flops / bare - 1),
        "peak_bytes": dict(zip(("host", "ported"), peaks, strict=True)),
    }
    return row


def table(results: dict[str, Row]) -> list[str]:
    """Markdown: a line a case, overhead over the host in percent."""
    lines = ["| threads, precision, batch x length | host | FLOPs | ported | its tables not in eight bits | "]
    lines[0] += "LoRA r8, unmerged | LoRA, merged |"
    lines.append("|---" * 7 + "|")

    def cell(found: dict[str, float]) -> str:
        return (
            f"{100 * (found['value'] - 1):+.0f} % [{100 * (found['low'] - 1):+.0f}, {100 * (found['high'] - 1):+.0f}]"
        )

    for key, row in results.items():
        cells = [cell(row["ratio"][name]) for name in ("ported", "ported, wide", "LoRA", "LoRA merged")]
        lines.append(
            f"| {key} | {row['milliseconds']['host']:.1f} ms | {row['flops_percent']:+.1f} % | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True)
    parser.add_argument("--shared", type=Path, help="for `--host random:WIDTHxDEPTH` alone")
    parser.add_argument("--adapter", type=Path, default=Path("adapters/sst2-minilm-l6.safetensors"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=CASES, help="batch x length, uncompiled")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument(
        "--compiled", nargs="*", default=["1x128", "32x128"], help="batch x length, by torch.compile, float32"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = arguments.host
        if where.startswith("random:"):
            where, made = folder, host_of(arguments.host, arguments.shared)
            made.model.save_pretrained(where)
            made.tokenizer.save_pretrained(where)
        measure(where, arguments)


def measure(where: str, arguments: argparse.Namespace) -> None:
    """Every case on the host that lies there."""
    adapter = UniversalAdapter.load(arguments.adapter)
    results: dict[str, Row] = {}
    memory: dict[str, Row] = {}
    compiled: dict[str, Row] = {}

    def keep() -> None:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
        content = {"host": arguments.host.rstrip("/").split("/")[-1], "torch": torch.__version__, "device": device}
        content |= {"memory": memory}
        content |= {"results": results, "compiled": compiled}
        write_text(arguments.output, json.dumps(content, indent=1) + "\n")

    for dtype in arguments.dtypes:
        host = load_host(where, device=arguments.device, dtype=dtype)
        folded = adapter.port(host).adapter
        own = sum(value.nbytes for value in host.map.base.parameters())
        memory[dtype] = {"host": own, "adapter": folded.nbytes, "percent": 100 * folded.nbytes / own}
        loras = {
            name: with_lora(where, arguments.device, dtype, merged=merged)
            for name, merged in (("LoRA", False), ("LoRA merged", True))
        }
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for batch, length in (map(int, case.split("x")) for case in arguments.cases):
                longest = batch * length >= LONGEST
                if length > host.max_length or (longest and (dtype, threads) != ("float32", max(arguments.threads))):
                    continue
                key = f"{threads}, {dtype}, {batch} x {length}"
                results[key] = forward_case(host, folded, loras, PassShape(batch, length), arguments.repetitions)
                print(
                    key,
                    {k: round(v["value"], 3) for k, v in results[key]["ratio"].items()},
                    file=sys.stderr,
                    flush=True,
                )
                keep()
        for case in arguments.compiled if dtype == "float32" else ():
            batch, length = map(int, case.split("x"))
            key = f"{arguments.threads[-1]}, {dtype}, {batch} x {length}"
            shape = PassShape(batch, length)
            compiled[key] = compiled_case(where, arguments.device, dtype, adapter, shape, arguments.repetitions)
            keep()
    print("\n".join(table(results)))
    for key, row in compiled.items():
        found = row["ratio"]["ported"]
        print(f"both compiled, {key}: {100 * (found['value'] - 1):+.1f} % over {row['milliseconds']['host']:.1f} ms")
    for dtype, row in memory.items():
        print(f"{dtype}: the adapter's tensors take {row['adapter']:,} bytes, {row['percent']:.1f} % of the host's own")


if __name__ == "__main__":
    main()
