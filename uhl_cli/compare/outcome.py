"""What a method gives on a target, before it is scored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.scoring import Classes
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.results import Costs, CurvePoint, DevPoint, Search
from uhl_cli.data import Examples, TaskData
from uhl_cli.data.tasks import Task
from uhl_cli.errors import UsageError
from uhl_cli.metrics import Score


@dataclass
class Outcome:
    """A method's result: predictions on the evaluation examples and everything else that the metrics need.

    :param examples: How many examples it was trained on; None for all training examples of the data set.
    :param source: Name of the source, and its score there, of a method that has both without an adapter file.
    """

    predictions: Classes
    costs: Costs
    seconds: float = 0.0
    search: Search | None = None
    curve: tuple[CurvePoint, ...] = ()
    zero_shot: Classes | None = None
    adapter: UniversalAdapter | None = None
    dev_curve: tuple[DevPoint, ...] = ()
    examples: int | None = None
    source: str | None = None
    source_score: Score | None = None


def evaluation_of(data: TaskData) -> Examples:
    """The evaluation examples, which `Resources.data` has checked."""
    assert data.evaluation is not None
    return data.evaluation


def train_of(data: TaskData) -> Examples:
    """The training examples, which `Resources.data` has checked."""
    assert data.train is not None
    return data.train


def refuse_other_labels(run: RunConfig, own: Task, data: TaskData) -> None:
    """Return only if the adapter's own task is on the run's labels.

    :raises UsageError: Otherwise.
    """
    if (own.kind, own.labels) != (data.task.kind, data.task.labels):
        raise UsageError(
            f"run {run.run_id}: the adapter of {own.name} does not know the labels of {data.task.name}.",
            "Give an adapter of that task, or use uhl-tuned-new-task.",
        )


def curve_of_log(path: Path) -> list[CurvePoint]:
    """The learning curve in a JSON-lines log of `train.loop`; empty without one."""
    if not path.exists():
        return []
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [CurvePoint(**{name: entry[name] for name in CurvePoint.model_fields}) for entry in entries]
