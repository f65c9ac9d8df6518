"""The methods that `tuning` compares on one target: majority class, linear head, fresh readout, `uhl tune` and LoRA.

Each gives a row: its score on the evaluation examples, the bytes that it stores for the task, and what else to know.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from lora import LoraSettings, predict, train_lora
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.layout import bits_of
from uhl_cli.commands.options import DataOptions, HostOptions, TuneOptions
from uhl_cli.commands.scoring import Classes, references_of
from uhl_cli.commands.tune import tune
from uhl_cli.data import Examples, TaskData
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.metrics import majority_class, score
from uhl_cli.ported.controls import mean_final_states
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.loop import targets_of, train
from uhl_cli.train.task_adapter import TaskAdapter

INVERSE_STRENGTHS = (0.001, 0.01, 0.1, 1.0)
HEAD_EXAMPLES = 20_000
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A target, a task with both parts of its examples, and the adapter that is tuned."""

    name: str
    path: str
    data: TaskData
    adapter: UniversalAdapter
    adapter_path: Path

    @cached_property
    def host(self) -> Host:
        """The target itself, which no method changes."""
        return load_host(self.path, device="cpu")

    @property
    def train(self) -> Examples:
        """The training examples."""
        assert self.data.train is not None
        return self.data.train

    @property
    def evaluation(self) -> Examples:
        """The examples to score on."""
        assert self.data.evaluation is not None
        return self.data.evaluation

    def row(self, classes: Classes, stored: int, **notes: object) -> Row:
        """The row of these predictions on the evaluation examples."""
        task = self.data.task
        found = score(task.metric, classes, references_of(self.evaluation), task.labels)
        return {"score": found.model_dump(), "bytes": stored, **notes}


def majority(target: Target) -> Row:
    """The majority class of the training labels, for every example or word."""
    guess = majority_class(target.train.label_counts(len(target.data.task.labels)))
    if target.evaluation.tags is not None:
        return target.row([[guess] * len(tags) for tags in target.evaluation.tags], 0)
    return target.row([guess] * len(target.evaluation), 0)


def linear_head(target: Target, *, max_length: int) -> Row:
    """Logistic regression on the target's own frozen mean final state, of each text or of each word.

    Its strength is chosen by the task's metric on a tenth of the (at most `HEAD_EXAMPLES`) training examples.
    """
    task, host = target.data.task, target.host
    length = min(max_length, host.max_length)
    chosen = np.random.default_rng(0).permutation(len(target.train))[:HEAD_EXAMPLES]
    examples = target.train.select(chosen.tolist())
    states, counts = mean_final_states(host, examples, max_length=length)
    features, classes = states.numpy(), np.array(targets_of(examples, list(range(len(examples)))))
    size = max(1, len(examples) // 10)
    held, cases = references_of(examples.select(range(size))), sum(counts[:size])
    found: dict[float, float] = {}
    for strength in INVERSE_STRENGTHS:
        model = _fitted(features[cases:], classes[cases:], strength)
        predicted = _grouped(model.predict(features[:cases]), counts[:size], task.kind)
        found[strength] = score(task.metric, predicted, held, task.labels).value
    best = max(found, key=lambda strength: found[strength])
    model = _fitted(features, classes, best)
    states, counts = mean_final_states(host, target.evaluation, max_length=length)
    predicted = _grouped(model.predict(states.numpy()), counts, task.kind)
    stored = 4 * (model[-1].coef_.size + model[-1].intercept_.size)  # the scaling goes into both
    strengths = {f"{strength:g}": value for strength, value in found.items()}
    return target.row(predicted, stored, inverse_strength=best, strengths=strengths)


def _fitted(features: NDArray[Any], classes: NDArray[Any], strength: float) -> Pipeline:
    steps = [("scale", StandardScaler()), ("regression", LogisticRegression(C=strength, max_iter=500))]
    return Pipeline(steps).fit(features, classes)


def _grouped(classes: NDArray[Any], counts: list[int], kind: str) -> Classes:
    """Classes as `metrics.score` wants them."""
    if kind == "sequence":
        return classes.tolist()
    return [part.tolist() for part in np.split(classes, np.cumsum(counts)[:-1])]


def fresh_readout(target: Target, training: TrainingConfig) -> Row:
    """A canonical readout trained from scratch under the same alignment as `tuned`, with every update off."""
    task, host, manifest = target.data.task, target.host, target.adapter.manifest
    config = manifest.config.model_copy(update={"num_labels": len(task.labels), "kind": task.kind})
    changed = manifest.model_copy(update={"config": config, "task": task})
    adapter = replace(target.adapter, manifest=changed, features=None)  # a feature bank knows the file's readout alone
    aligned = adapter.align(host)
    trained = TaskAdapter(adapter.stored, config, new_readout=True, seed=training.seed)
    training = training.model_copy(update={"updates": False})
    train(trained, aligned, target.train, training, accelerator=Accelerator(cpu=True))
    stored = {name: value.detach() for name, value in trained.stored().items()}
    ported = replace(adapter, stored=stored).port(aligned)
    bare = ported.with_adapter(ported.adapter.without_updates())
    predictions = bare.classes_of(target.evaluation, max_length=min(training.max_length, host.max_length))
    parts = {name: part for name, part in trained.quantised().items() if name != "delta_theta"}
    size = sum(part.codes.size * bits_of(name) // 8 + part.scales.nbytes for name, part in parts.items())
    return target.row(predictions.for_metric(task.kind), size)


def tuned(target: Target, training: TrainingConfig) -> Row:
    """`uhl tune` with these options; on the adapter's own task `zero_shot` is the score before."""
    with tempfile.TemporaryDirectory() as folder:
        options = TuneOptions(
            adapter=target.adapter_path,
            target=HostOptions(name=target.path),
            data=DataOptions(task=target.data.task.name),
            training=training,
            output=Path(folder) / "task.safetensors",
            cache=False,
        )
        report = tune(target.adapter, target.host, target.data, options, accelerator=Accelerator(cpu=True))
    kept = {"bytes", "delta_bytes", "readout_bytes", "atoms_per_token", "truncated", "left_out"}
    row = {"score": report.scores["tuned"].model_dump(), **report.model_dump(mode="json", include=kept)}
    row["gains"] = {name: gain.model_dump() for name, gain in report.gains.items()}
    row["flops_percent"] = report.flops.percent
    before = report.scores.get("zero_shot")
    return row | ({"zero_shot": before.model_dump()} if before else {})


def lora(target: Target, settings: LoraSettings) -> Row:
    """LoRA on a freshly loaded target; factors and head are stored in float16."""
    model = train_lora(target.path, target.train, len(target.data.task.labels), settings)
    parameters = sum(value.numel() for value in model.trained_parameters())
    classes = predict(model, target.evaluation, max_length=settings.max_length)
    return target.row(classes, model.stored_bytes(), parameters=parameters, learning_rate=settings.learning_rate)
