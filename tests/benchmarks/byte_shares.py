"""What anchors and feature bank are worth by the byte: zero-shot ports of one file with fewer words of each.

    python tests/benchmarks/byte_shares.py ADAPTER --shared SHARED --output tests/benchmarks/results/byte_shares.json

ADAPTER is an SST-2 file with 2,048 anchor words and 20,000 words with features.  Scores are accuracies on 1,000 whole
sentences of the training set, with the updates and without.  No dev set is read.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from label_free import TARGETS, Bench

from uhl_cli.align.features import FeatureBank
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.packing import pack_levels
from uhl_cli.commands.texts import text_bytes
from uhl_cli.data import Examples
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import load_host
from uhl_cli.ported.model import PortedModel
from uhl_cli.transfer.texts import without_contained

SENTENCES, LEAST_WORDS = 1000, 8
SHARES = (
    (2048, 22_000),
    (1024, 22_000),
    (512, 22_000),
    (256, 22_000),
    (512, 15_000),
    (2048, 10_000),
    (512, 10_000),
    (512, 5000),
    (2048, 0),
)


def slice_of(train: Examples) -> Examples:
    """Whole sentences of the training set, drawn with a seed of their own."""
    texts = [" ".join(text.split()) for text in train.texts]
    rows = [row for row in without_contained(texts) if texts[row].count(" ") + 1 >= LEAST_WORDS]
    return train.select(np.random.default_rng(7).permutation(rows)[:SENTENCES].tolist())


def with_fewer(adapter: UniversalAdapter, anchors: int, features: int) -> tuple[UniversalAdapter, dict[str, int]]:
    """The adapter with about so many anchor words and words with features, and the bytes of both."""
    bank = adapter.bank.spread(anchors)
    sizes = {"anchor_bytes": len(pack_levels(bank.codes.numpy())) + text_bytes(bank.anchors), "feature_bytes": 0}
    held = adapter.features
    if held is not None and features:
        texts = held.anchors.first(max(1, round(len(held.anchors.texts) * features / held.anchors.num_words)))
        held = FeatureBank(texts, held.codes[: texts.num_words], held.scales, held.mean, held.shift)
        sizes["feature_bytes"] = len(pack_levels(held.codes.numpy())) + text_bytes(texts)
    return replace(adapter, bank=bank, features=held if features else None), sizes


def accuracy(model: PortedModel, examples: Examples) -> float:
    """Share of right classes."""
    found = np.array(model.classes_of(examples).for_metric("sequence"))
    return float((found == np.array(examples.labels)).mean())


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    bench = Bench(arguments.shared, arguments.output.parent, {})
    adapter = UniversalAdapter.load(arguments.adapter)
    train = bench.data("sst2").train
    assert train is not None
    held = slice_of(train)
    rows: list[dict[str, Any]] = []
    if arguments.output.exists():
        rows = json.loads(arguments.output.read_text(encoding="utf-8"))
    done = {(row["target"], row["anchors"], row["features"]) for row in rows}
    for target in TARGETS[:2]:
        host = load_host(bench.path(target), device="cpu")
        for anchors, features in SHARES:
            if (target, anchors, features) in done:
                continue
            fewer, sizes = with_fewer(adapter, anchors, features)
            ported = fewer.port(host)
            bare = ported.with_adapter(ported.adapter.without_updates())
            row = {"target": target, "anchors": anchors, "features": features, **sizes}
            row |= {"updates_on": accuracy(ported, held), "updates_off": accuracy(bare, held)}
            rows.append(row | {"examples": len(held)})
            write_text(arguments.output, json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
