"""Seconds to find and prove the map of a random model of BERT-base's shape: found by running it, and from the cache.

    python tests/benchmarks/resolving.py --turns 5 --output tests/benchmarks/results/resolving.json

Both have 12 layers of 768.  In each turn every way is timed once, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from uhl_cli.files import write_text
from uhl_cli.host.map_cache import load_map, save_map
from uhl_cli.host.proof import resolve


def base_sized(model_type: str) -> nn.Module:
    """A random model of the type's default shape."""
    torch.manual_seed(0)
    model: nn.Module = AutoModel.from_config(AutoConfig.for_model(model_type))
    return model.eval().requires_grad_(False)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, and write all turns with their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    mpnet, bert = base_sized("mpnet"), base_sized("bert")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UHL_CACHE"] = folder
        for model in (mpnet, bert):
            save_map(resolve(model))
            assert load_map(model) is not None
        ways: dict[str, Callable[[], object]] = {
            "mpnet": lambda: resolve(mpnet),
            "mpnet, from the cache": lambda: resolve(mpnet, cached=True),
            "bert": lambda: resolve(bert),
            "bert, from the cache": lambda: resolve(bert, cached=True),
        }
        turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(given.turns)]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in ways}
    found = {"shape": "12 x 768", "threads": torch.get_num_threads(), "medians": medians, "turns": turns}
    text = json.dumps(found, indent=1) + "\n"
    if given.output is not None:
        write_text(given.output, text)
    print(text)


if __name__ == "__main__":
    main()
