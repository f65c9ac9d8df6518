"""Choices of pretraining, each tried alone on a slice of a training set; dev is never read.

    python tests/benchmarks/pretraining_choices.py --shared SHARED \
        --output tests/benchmarks/results/pretraining_choices.json
    python tests/benchmarks/pretraining_choices.py --task reviews --source builtin:base --targets builtin:small \
        --output tests/benchmarks/results/pretraining_choices_reviews.json --held-out 400 --least-words 1

Of SST-2, 1,500 training sentences of twelve words or more are held out, and with them every training phrase that one
of them contains.  Each variant trains for `--steps` on the rest, is scored on the slice on its source, and is
ported to the targets and scored there.  One standard error is about one point.  By default the variants are the
ablation: each part of the method off, or smaller, in turn; `--variants` names others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.api import UniversalAdapter
from uhl_cli.commands import texts as chosen_texts
from uhl_cli.commands.options import DataOptions, HostOptions, PortOptions, PretrainOptions
from uhl_cli.commands.port import port
from uhl_cli.commands.pretrain import pretrain
from uhl_cli.data import Examples, TaskData, load_task
from uhl_cli.host.checkpoint import load_host
from uhl_cli.schema import AdapterConfig, TrainingConfig

# Changes to the defaults, by name: options of the run (anchors, sizes), or of the training.
VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    "canonical-128-anchors-4096": {"canonical_size": 128, "num_anchors": 4096},
    "anchors-general": {"anchors": "general"},
    "anchors-general-plain": {"anchors": "general", "style": False},
    "no-features": {"feature_words": 0},
    "update-noise-1": {"update_noise": 1.0},
    "no-noise": {"noise": 0.0},
    "no-update-dropout": {"update_dropout": 0.0},
    "active-weight-0.05": {"active_weight": 0.05},
    "learning-rate-1e-3": {"learning_rate": 1e-3},
    "learning-rate-6e-3": {"learning_rate": 6e-3},
    "no-updates": {"updates": False},
    "learning-rate-4e-3": {"learning_rate": 4e-3},
    "readout-learning-rate-3e-3": {"readout_learning_rate": 3e-3},
    "noise-0.5": {"noise": 0.5},
    "weight-decay-0.1": {"weight_decay": 0.1},
    "no-router": {"router": False},
    "one-knot": {"knots": (1.0,)},
    "anchors-1024": {"num_anchors": 1024},
    "anchors-512": {"num_anchors": 512},
}
# The default with one part of the method off or smaller at a time.
ABLATION = (
    "default",
    "no-updates",
    "no-router",
    "no-noise",
    "one-knot",
    "no-features",
    "anchors-1024",
    "anchors-512",
)


@contextmanager
def style_of(kept: bool) -> Iterator[None]:
    """Without it the package's texts are anchors as they are, and not written like the task's."""
    original = chosen_texts._like_the_tasks
    if not kept:
        chosen_texts._like_the_tasks = lambda texts, _: texts
    try:
        yield
    finally:
        chosen_texts._like_the_tasks = original


@contextmanager
def router_of(kept: bool) -> Iterator[None]:
    """Without a router all tokens take the same atoms: its rows are zero and stay so, the task's own logits decide."""
    original = CanonicalAdapter.freeze_untrained

    def without(adapter: CanonicalAdapter) -> None:
        original(adapter)
        router = adapter.get_parameter("router").requires_grad_(False)
        router.data.zero_()

    if not kept:
        CanonicalAdapter.freeze_untrained = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        CanonicalAdapter.freeze_untrained = original  # type: ignore[method-assign]


def slice_of(train: Examples, *, held_out: int, least_words: int) -> tuple[Examples, Examples]:
    """(rest, held out) with no phrase of a held-out sentence among the rest."""
    order = np.random.default_rng(1).permutation(len(train))
    held = [int(row) for row in order if len(train.texts[row].split()) >= least_words][:held_out]
    texts = "\n".join(train.texts[row] for row in held)
    taken = set(held)
    rest = [row for row in range(len(train)) if row not in taken and train.texts[row].strip() not in texts]
    return train.select(rest), train.select(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--source", default="minilm-l6")
    parser.add_argument("--targets", nargs="+", default=["minilm-l3", "wiki-256x4"])
    parser.add_argument("--held-out", type=int, default=1500)
    parser.add_argument("--least-words", type=int, default=12)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(ABLATION), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    arguments = parser.parse_args()
    where = None if arguments.task == "reviews" else str(arguments.shared / "data" / arguments.task)
    loaded = load_task(arguments.task, data=where, need_evaluation=False)
    assert loaded.train is not None
    rest, held = slice_of(loaded.train, held_out=arguments.held_out, least_words=arguments.least_words)
    data = TaskData(loaded.task, rest, held, f"a slice of {arguments.task}'s training set")
    hosts = {
        name: load_host(name if name.startswith("builtin:") else str(arguments.shared / "hosts" / name), device="cpu")
        for name in (arguments.source, *arguments.targets)
    }
    results = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in arguments.variants:
            if f"{variant}/steps-{arguments.steps}/seed-{arguments.seed}" in results:
                continue
            changes = dict(VARIANTS[variant])
            with_router, styled = bool(changes.pop("router", True)), bool(changes.pop("style", True))
            shape = {name: changes.pop(name) for name in list(changes) if name in AdapterConfig.model_fields}
            path = Path(folder) / f"{variant}.safetensors"
            options = PretrainOptions(
                host=HostOptions(name=arguments.source),
                data=DataOptions(task=arguments.task),
                output=path,
                adapter=AdapterConfig(**shape),
                anchors=changes.pop("anchors", None),
                num_anchors=changes.pop("num_anchors", 2048),
                feature_words=changes.pop("feature_words", None),
                training=TrainingConfig(
                    max_steps=arguments.steps,
                    seed=arguments.seed,
                    mixed_precision=arguments.mixed_precision,
                    **changes,
                ),
            )
            source = hosts[arguments.source]
            with router_of(with_router), style_of(styled):
                accelerator = Accelerator(cpu=True, mixed_precision=arguments.mixed_precision)
                trained = pretrain(source, data, options, accelerator=accelerator)
            row = {"source": trained.model_dump(mode="json", exclude={"output"}), "targets": {}}
            adapter = UniversalAdapter.load(path)
            line = f"{variant}: source {trained.score.value:.3f} (updates off {trained.readout_only.value:.3f})"
            for target in arguments.targets:
                port_options = PortOptions(adapter=path, target=HostOptions(name=target), controls=True, cache=False)
                _, report = port(adapter, hosts[target], port_options, data=data)
                row["targets"][target] = report.model_dump(mode="json", exclude={"adapter", "output"})
                scores = report.scores
                line += f", {target} {scores['ported'].value:.3f} (off {scores['readout_only'].value:.3f})"
            print(line, file=sys.stderr, flush=True)
            results[f"{variant}/steps-{arguments.steps}/seed-{arguments.seed}"] = row
            content = {"held_out": len(held), "train": len(rest), "results": results}
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
