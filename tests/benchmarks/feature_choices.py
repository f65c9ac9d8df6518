"""Choices of the feature bank, and of how bytes are shared out, each tried alone with one trained file; no dev is read.

    python tests/benchmarks/feature_choices.py adapters/sst2-minilm-l6.safetensors --source minilm-l6 \
        --targets minilm-l6 minilm-l3 wiki-256x4 builtin:decoder --shared SHARED \
        --output tests/benchmarks/results/feature_choices.json

For every variant canonical coordinates are quantised anew on the source, the source gives its readout's features for
some texts, a bank is made of them, and each target is ported by both and scored on held-out training sentences (the
slice of `pretraining_choices`, which the file was trained on: only differences on one target mean anything).  Variants:
no bank, with coordinates of several steps; a bank of fewer, more, finer or coarser words; the package's texts as they
are, or written like the task's; the task's own texts; no prior from canonical space; the mean shift kept.  Steps are in
standard deviations.  A run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretraining_choices import slice_of

from uhl_cli.align.bank import build_bank
from uhl_cli.align.features import align_features
from uhl_cli.align.states import WordStates, word_states
from uhl_cli.align.texts import choose_feature_texts, general_texts, in_style_of
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.packing import compress_text, pack_levels
from uhl_cli.commands.feature_bank import feature_bank
from uhl_cli.data import Examples, load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.metrics import paired_difference, score
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import silent
from uhl_cli.transfer.general import opinions

Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """How an alignment is stored and fitted."""

    words: int = 19_500  # what fits into 1 MB
    anchor_step: float = 0.75
    step: float = 1.4
    texts: str = "styled"
    prior: bool = True
    shift: bool = True


VARIANTS = {
    "no bank": Variant(words=0),
    "no bank, coordinates of 0.4": Variant(words=0, anchor_step=0.4),
    "no bank, coordinates of 1.0": Variant(words=0, anchor_step=1.0),
    "default": Variant(),
    "5,000 words": Variant(words=5_000),
    "10,000 words": Variant(words=10_000),
    "40,000 words": Variant(words=40_000),
    "features of 0.7": Variant(step=0.7),
    "features of 2.0": Variant(step=2.0),
    "coordinates of 1.0, 22,000 words": Variant(words=22_000, anchor_step=1.0),
    "texts as they are": Variant(texts="plain"),
    "the task's own texts": Variant(texts="task"),
    "no prior": Variant(prior=False),
    "mean shift kept": Variant(shift=False),
}


def texts_of(kind: str, rest: Examples) -> list[str]:
    """Texts of one kind."""
    if kind == "task":
        return list(rest.texts)
    reviews = load_task("reviews", need_evaluation=False).train
    assert reviews is not None
    own = [*general_texts(), *opinions(), *reviews.texts]
    return in_style_of(own, rest.texts) if kind == "styled" else own


def ported_by(adapter: UniversalAdapter, host: Host, variant: Variant) -> PortedModel:
    """The target with the file's updates and a readout by the adapter's bank, if it has one."""
    aligned = adapter.align(host)
    if aligned.alignment.features is not None and not variant.prior:
        assert adapter.features is not None
        config = adapter.manifest.config
        settings = {"knots": config.knots, "depths": aligned.plan.readout_depths, "readout_size": config.readout_size}
        bare = align_features(host, adapter.features, **settings, prior=None)
        assert bare is not None
        alignment = replace(aligned.alignment, features=bare)
        aligned = AlignedHost(host, aligned.space, alignment, aligned.plan, aligned.host_flops, aligned.serves)
    ported = adapter.port(aligned)
    return ported if variant.shift else ported.with_adapter(ported.adapter.with_shift(None))


def changed(
    adapter: UniversalAdapter, source: Host, states: WordStates, rest: Examples, variant: Variant, seed: int
) -> tuple[UniversalAdapter, int]:
    """The adapter with coordinates and a feature bank of the variant, and the bytes that both take."""
    config = adapter.manifest.config
    sizes = {"knots": config.knots, "canonical_size": config.canonical_size}
    bank = build_bank(adapter.bank.anchors, states, **sizes, step=variant.anchor_step)
    found = replace(adapter, bank=bank, features=None)
    size = len(pack_levels(bank.codes.numpy()))
    if variant.words:
        texts = choose_feature_texts(
            texts_of(variant.texts, rest),
            exclude=set(bank.anchors.texts),
            num_words=variant.words,
            seed=seed,
            origin=variant.texts,
        )
        assert texts is not None
        aligned = found.align(source)
        features = feature_bank(found, found.port(aligned), aligned.alignment, texts, silent, step=variant.step)
        assert features is not None
        size += len(pack_levels(features.codes.numpy())) + len(compress_text("\n".join(features.anchors.texts)))
        found = replace(found, features=features)
    return found, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=3000)
    parser.add_argument("--least-words", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    adapter = replace(UniversalAdapter.load(arguments.adapter), features=None)
    task = adapter.manifest.task
    loaded = load_task(task.name, data=str(arguments.shared / "data" / task.name), need_evaluation=False)
    assert loaded.train is not None
    rest, held = slice_of(loaded.train, held_out=arguments.held_out, least_words=arguments.least_words)
    assert held.labels is not None
    references = list(held.labels)
    places = {
        name: name if name.startswith("builtin:") else str(arguments.shared / "hosts" / name)
        for name in {*arguments.targets, arguments.source}
    }
    source = load_host(places[arguments.source], device="cpu")
    states = word_states(source, adapter.bank.anchors)
    content: dict[str, Any] = {"held_out": len(held), "seed": arguments.seed, "digest": adapter.digest, "results": {}}
    if arguments.output.exists():
        content = json.loads(arguments.output.read_text())
        if (content["digest"], content["seed"]) != (adapter.digest, arguments.seed):
            raise SystemExit(f"{arguments.output} is of another file or seed: name another --output")
    before: dict[str, dict[str, list[int]]] = {}
    for name, variant in VARIANTS.items():
        if name != "no bank" and name not in arguments.variants:
            continue
        wanted = [target for target in arguments.targets if f"{target}/{name}" not in content["results"]]
        if not wanted and name != "no bank":
            continue
        found, size = changed(adapter, source, states, rest, variant, arguments.seed)
        for target in arguments.targets if name == "no bank" else wanted:
            ported = ported_by(found, load_host(places[target], device="cpu"), variant)
            bare = ported.with_adapter(ported.adapter.without_updates())
            row: Row = {"words": 0 if found.features is None else found.features.anchors.num_words, "bytes": size}
            for part, model in (("ported", ported), ("readout_only", bare)):
                classes = model.classes_of(held).for_metric("sequence")
                row[part] = score(task.metric, classes, references, task.labels).model_dump()
                first = before.setdefault(target, {}).setdefault(part, classes)  # the first variant is "no bank"
                gain = paired_difference(task.metric, classes, first, references, task.labels)
                row[f"{part} minus no bank"] = gain.model_dump()
                print(f"{name}, {target}, {part}: {row[part]['value']:.4f} {gain.value:+.4f}", file=sys.stderr)
            content["results"][f"{target}/{name}"] = row
            write_text(arguments.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
