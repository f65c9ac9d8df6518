"""Choices of the feature bank, each tried alone with one trained file, on a slice of its training set; no dev is read.

    python tests/benchmarks/feature_choices.py adapters/sst2-minilm-l6.safetensors --source minilm-l6 \
        --targets minilm-l3 wiki-256x4 --shared SHARED --output tests/benchmarks/results/feature_choices.json

For every variant the source gives its readout's features for some texts, a bank is made of them, and each target is
ported by it and scored on held-out training sentences (the slice of `pretraining_choices`, which the file was trained
on: only differences on one target mean anything).  Variants: no bank; fewer and more words; the package's texts as
they are, or written like the task's; the task's own texts; no prior from canonical space; the mean shift kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from pretraining_choices import slice_of

from uhl_cli.adapter.ported import PortedModel
from uhl_cli.align.features import FeatureBank, align_features
from uhl_cli.align.texts import choose_feature_texts, general_texts, in_style_of
from uhl_cli.api import UniversalAdapter
from uhl_cli.builtin.corpus import opinions
from uhl_cli.controls import without_updates
from uhl_cli.data import Examples, load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.metrics import paired_difference, score
from uhl_cli.pipeline.features import feature_bank
from uhl_cli.reports import silent

WORDS = 22_000
# Texts, words, and what else is changed, by the name of the variant.
VARIANTS: dict[str, tuple[str, int, str]] = {
    "no bank": ("", 0, ""),
    "22,000 words": ("styled", WORDS, ""),
    "5,500 words": ("styled", WORDS // 4, ""),
    "11,000 words": ("styled", WORDS // 2, ""),
    "60,000 words": ("styled", 60_000, ""),
    "texts as they are": ("plain", WORDS, ""),
    "the task's own texts": ("task", WORDS, ""),
    "no prior": ("styled", WORDS, "no prior"),
    "mean shift kept": ("styled", WORDS, "no shift"),
}


def texts_of(kind: str, rest: Examples) -> list[str]:
    """Texts of one kind."""
    if kind == "task":
        return list(rest.texts)
    reviews = load_task("reviews", need_evaluation=False).train
    assert reviews is not None
    own = [*general_texts(), *opinions(), *reviews.texts]
    return in_style_of(own, rest.texts) if kind == "styled" else own


def ported_by(adapter: UniversalAdapter, host: Host, bank: FeatureBank | None, change: str) -> PortedModel:
    """The target with the file's updates and a readout by this bank."""
    changed = replace(adapter, features=bank)
    alignment, plan, host_flops = changed.align(host)
    if bank is not None and change == "no shift" and alignment.features is not None:
        alignment = replace(alignment, features=replace(alignment.features, shift=None))
    if bank is not None and change == "no prior" and alignment.features is not None:
        config = adapter.manifest.config
        settings = {"knots": config.knots, "depths": plan.tap_depths, "readout_size": config.readout_size}
        bare = align_features(host, bank, **settings, prior=None)
        assert bare is not None
        alignment = replace(alignment, features=replace(bare, shift=alignment.features.shift))
    return changed.inject(host, alignment, plan, host_flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=3000)
    parser.add_argument("--least-words", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    adapter = replace(UniversalAdapter.load(arguments.adapter), features=None)
    task = adapter.manifest.task
    loaded = load_task(task.name, data=str(arguments.shared / "data" / task.name), need_evaluation=False)
    assert loaded.train is not None
    rest, held = slice_of(loaded.train, held_out=arguments.held_out, least_words=arguments.least_words)
    assert held.labels is not None
    references = list(held.labels)
    hosts = {name: load_host(str(arguments.shared / "hosts" / name), device="cpu") for name in arguments.targets}
    source = load_host(str(arguments.shared / "hosts" / arguments.source), device="cpu")
    own, plan, host_flops = adapter.align(source)
    on_source = adapter.inject(source, own, plan, host_flops)
    results: dict[str, dict[str, object]] = {}
    before: dict[str, dict[str, list[int]]] = {}
    for name, (kind, words, change) in VARIANTS.items():
        bank = None
        if words:
            chosen = choose_feature_texts(
                texts_of(kind, rest),
                exclude=set(adapter.bank.anchors.texts),
                num_words=words,
                seed=arguments.seed,
                origin=kind,
            )
            assert chosen is not None
            bank = feature_bank(adapter, on_source, own, chosen, silent)
            assert bank is not None
        for target, host in hosts.items():
            ported = ported_by(adapter, host, bank, change)
            bare = PortedModel(host, without_updates(ported.folded), ported.task)
            row: dict[str, object] = {"words": 0 if bank is None else bank.anchors.num_words}
            for part, model in (("ported", ported), ("readout_only", bare)):
                classes = model.predict(held).for_metric("sequence")
                row[part] = score(task.metric, classes, references, task.labels).model_dump()
                first = before.setdefault(target, {}).setdefault(part, classes)  # the first variant is "no bank"
                gain = paired_difference(task.metric, classes, first, references, task.labels)
                row[f"{part} minus no bank"] = gain.model_dump()
                print(f"{name}, {target}, {part}: {row[part]['value']:.4f} {gain.value:+.4f}", file=sys.stderr)  # type: ignore[index]
            results[f"{target}/{name}"] = row
            content = {"held_out": len(held), "seed": arguments.seed, "digest": adapter.digest, "results": results}
            write_text(arguments.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
