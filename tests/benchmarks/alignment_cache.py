"""Seconds to align the shipped adapter to the builtin hosts and to a random BERT-base: without the cache, first, again.

    python tests/benchmarks/alignment_cache.py --turns 3 --output tests/benchmarks/results/alignment_cache.json

In each turn every host is aligned three times, one call after the other: without the cache, with an empty cache (the
call also writes), and again.  What is read must be what was written, to the bit; `repeats` says whether two fits were
equal as well.  `bytes` compares what is kept with the word states that the maps are fitted to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from uhl_cli.align.alignment import Alignment
from uhl_cli.align.states import word_states
from uhl_cli.api import UniversalAdapter
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.ported.aligned import AlignedHost

ROOT = Path(__file__).parents[2]
BUILTIN = ("builtin:tiny", "builtin:small", "builtin:base", "builtin:decoder")
RANDOM = "random, BERT-base's shape"


def random_base() -> Host:
    """A random model of 12 layers of 768 with a builtin host's tokenizer."""
    tokenizer = load_host("builtin:base", device="cpu").tokenizer
    assert tokenizer is not None
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("bert"))
    return wrap_host(model.eval().requires_grad_(False), tokenizer, name=RANDOM)


def numbers(alignment: Alignment) -> torch.Tensor:
    """Values of all maps that a sequence task uses, one after the other."""
    found = [part for maps in alignment.layers for part in (maps.mean, maps.read, maps.write_stream, maps.write_mlp)]
    found += [*alignment.depth_weights.values(), alignment.depth_bias]
    if alignment.features is not None:
        found += [*alignment.features.depth_weights.values(), alignment.features.bias, alignment.features.head]
    return torch.cat([part.reshape(-1) for part in found])


def turn(adapter: UniversalAdapter, host: Host) -> dict[str, float]:
    """Seconds of the three calls, bytes of the file, and whether two fits were equal."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UHL_CACHE"] = folder
        seconds: dict[str, float] = {}
        made: list[AlignedHost] = []
        for name, cache in (("without", False), ("first", True), ("again", True)):
            start = time.perf_counter()
            made.append(adapter.align(host, cache=cache))
            seconds[name] = time.perf_counter() - start
        assert [each.cached for each in made] == [False, False, True]
        without, first, again = (numbers(each.alignment) for each in made)
        assert torch.equal(first, again)
        (file,) = Path(folder).rglob("*.safetensors")
        return seconds | {"bytes": file.stat().st_size, "repeats": torch.equal(without, first)}


def states_bytes(adapter: UniversalAdapter, host: Host) -> int:
    """Bytes of the anchors' word states, each tensor once; the feature bank's words have none that are kept."""
    states = word_states(host, adapter.bank.anchors)
    tensors = {id(each): each for each in (*states.stream, *states.attention, *states.mlp)}
    return sum(each.nbytes for each in tensors.values())


def main() -> None:
    """Measure, and write all turns with their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ROOT / "adapters" / "reviews-builtin-base.safetensors")
    parser.add_argument("--hosts", nargs="*", default=[*BUILTIN, RANDOM])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    adapter = UniversalAdapter.load(given.adapter)
    results = {}
    for name in given.hosts:
        host = random_base() if name == RANDOM else load_host(name, device="cpu")
        turns = [turn(adapter, host) for _ in range(1 if name == RANDOM else given.turns)]
        medians = {key: statistics.median(each[key] for each in turns) for key in ("without", "first", "again")}
        results[name] = {
            "layers": host.num_hidden_layers,
            "width": host.hidden_size,
            "medians": medians,
            "ratio": medians["without"] / medians["again"],
            "repeats": all(each["repeats"] for each in turns),
            "bytes": {"kept": turns[0]["bytes"], "word_states": states_bytes(adapter, host)},
            "turns": turns,
        }
        found = {"adapter": given.adapter.name, "threads": torch.get_num_threads(), "results": results}
        if given.output is not None:
            write_text(given.output, json.dumps(found, indent=1) + "\n")
        print(name, json.dumps({key: round(value, 3) for key, value in medians.items()}), flush=True)


if __name__ == "__main__":
    main()
