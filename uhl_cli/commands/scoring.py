"""Shared by several commands: records of hosts, FLOP counts, predictions and their scores."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from uhl_cli import __version__
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.align.alignment import Alignment
from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import HostOptions
from uhl_cli.cost.flops import count_flops
from uhl_cli.cost.passes import SEQUENCE_LENGTH
from uhl_cli.data import Examples
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.metrics import majority_class
from uhl_cli.ported.calibrate import Judge
from uhl_cli.ported.controls import Progress, head_logits, mean_final_states, randomised
from uhl_cli.ported.model import PortedModel
from uhl_cli.ported.shift import update_shift
from uhl_cli.reports import DepthQuality, FlopReport, Reporter, phase
from uhl_cli.schema import HostRecord

Classes = list[int] | list[list[int]]


def load(options: HostOptions, *, cache: bool = True) -> Host:
    """The host that the options name.

    :param cache: See `load_host`.

    :raises HostError: When it cannot be found, loaded or used.
    """
    return load_host(**options.model_dump(), cache=cache)


def versions() -> dict[str, str]:
    """Versions of the packages that determine a run's numbers, for a manifest."""
    return {
        "uhl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def host_record(host: Host) -> HostRecord:
    """Name, revision and fingerprint of a host; for a local folder or file only the last part of its path."""
    name = Path(host.name).resolve().name if Path(host.name).exists() else host.name
    return HostRecord(name=name, revision=host.revision, fingerprint=host.fingerprint)


def depth_quality(alignment: Alignment) -> tuple[DepthQuality, ...]:
    """Held-out R^2 of every depth; empty for a strategy without a fit."""
    return tuple(
        DepthQuality(depth=index, normalised_depth=alignment.layers[index].depth, r2=r2)
        for index, r2 in enumerate(alignment.quality)
    )


def flop_report(ported: PortedModel, host_flops: int) -> FlopReport:
    """The adapter's FLOPs, counted as the difference with and without it."""
    host = ported.host
    added = count_flops(host, ported.adapter) - host_flops
    return FlopReport(
        sequence_length=min(SEQUENCE_LENGTH, host.max_length),
        host=host_flops,
        adapter=added,
        percent=100 * added / host_flops,
    )


def references_of(examples: Examples) -> Classes:
    """True classes in the form that `metrics.score` takes."""
    if examples.tags is not None:
        return [list(row) for row in examples.tags]
    assert examples.labels is not None
    return list(examples.labels)


class Predicted(NamedTuple):
    """Predictions of a host that carries an adapter; see `ported.model.ExampleClasses`."""

    classes: Classes
    atoms_per_token: float
    truncated: int


class Predictor:
    """Predictions of an adapter and of its controls on one host, for the same examples."""

    def __init__(self, adapter: UniversalAdapter, examples: Examples, *, batch_size: int, reporter: Reporter) -> None:
        self._adapter = adapter
        self._examples = examples
        self._batch_size = batch_size
        self._reporter = reporter

    def predicted(self, ported: PortedModel, label: str) -> Predicted:
        """Classes by a ported model, its active atoms per token, and how many texts were cut."""
        found = ported.classes_of(
            self._examples, batch_size=self._batch_size, progress=phase(self._reporter, f"scoring: {label}")
        )
        return Predicted(found.for_metric(ported.task.kind), found.atoms_per_token, found.truncated)

    def readout_only(self, ported: PortedModel) -> Classes:
        """Classes by the readout with updates off."""
        bare = self._set(ported, ported.adapter.without_updates())
        return self.predicted(ported.with_adapter(bare), "readout only").classes

    def random_update(self, ported: PortedModel, seed: int) -> Classes:
        """Classes with updates of the same norm in random directions, with the same correction of their shift."""
        redirected, features = randomised(ported.adapter, seed=seed), self._adapter.features
        own = ported.adapter.readout.shift
        if features is not None and own is not None:
            redirected = redirected.with_shift(-update_shift(ported.host, redirected, features).to(own))
        return self.predicted(ported.with_adapter(self._set(ported, redirected)), "random update").classes

    def head_only(self, host: Host, alignment: Alignment) -> Classes:
        """Classes by the linear head on the final state of the host alone."""
        logits, counts = self._head_logits(host, alignment, self._examples, phase(self._reporter, "scoring: head only"))
        judge = self._judge(host)
        if judge is not None:
            logits = logits + judge.offsets(self._head_logits(host, alignment, judge.examples)[0])
        rows = [part.tolist() for part in torch.split(logits.argmax(-1), counts)]
        return [row[0] for row in rows] if self._adapter.manifest.config.kind == "sequence" else rows

    def _head_logits(
        self, host: Host, alignment: Alignment, examples: Examples, progress: Progress | None = None
    ) -> tuple[Tensor, list[int]]:
        """Logits of the head [predictions, labels], and how many predictions each example has."""
        length = min(self._adapter.max_length, host.max_length)
        states, counts = mean_final_states(
            host, examples, batch_size=self._batch_size, max_length=length, progress=progress
        )
        stored = self._adapter.stored
        return head_logits(states, stored["head_weight"], stored["head_bias"], alignment), counts

    def _set(self, ported: PortedModel, changed: PortedAdapter) -> PortedAdapter:
        """A control, calibrated by the transfer set like the adapter, so that they differ in nothing else."""
        judge = self._judge(ported.host)
        return changed if judge is None else judge.with_offsets(changed)

    def _judge(self, host: Host) -> Judge | None:
        return self._adapter.judge(host) if self._adapter is self._adapter.own else None

    def majority_class(self) -> Classes:
        """The majority class of the training labels, for every example or word."""
        guess = majority_class(self._adapter.manifest.label_counts)
        if self._examples.tags is not None:
            return [[guess] * len(row) for row in self._examples.tags]
        return [guess] * len(self._examples)
