"""Files of a run: `metrics.json` and the predictions, written whole or not at all."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field, ValidationError, field_serializer, field_validator

from uhl_cli.compare.config import RunConfig, dotless
from uhl_cli.data.tasks import Metric
from uhl_cli.errors import FormatError, LabelError
from uhl_cli.files import write_text
from uhl_cli.metrics import Counted, Difference, Predictions, Score, count
from uhl_cli.schema import Frozen, without_removed


class CurvePoint(Frozen):
    """Means over the training batches since the previous point."""

    step: int
    loss: float
    accuracy: float


class DevPoint(Frozen):
    """Scores on the evaluation data in training; of a retrained method before its values are rounded for storage."""

    step: int
    score: float
    f1: float
    accuracy: float


class SearchTrial(Frozen):
    """Values of one trial of a search by optuna, and its score on held-out training examples."""

    values: dict[str, int | float]
    score: float


class Search(Frozen):
    """What a search tried on held-out training examples, and the chosen learning rate.

    :param trials: Of a search by optuna; `best` is the index of the one whose values the run is trained with.
    """

    rate: float
    scores: dict[str, float] = Field(description="by rate, to six digits; empty for optuna")
    held_out: int
    steps: int
    trials: tuple[SearchTrial, ...] = ()
    best: int | None = None


class Costs(Frozen):
    """Costs of a run's file and model.

    Memory is that of the tensors in addition to the host's weights; FLOPs are those of one sequence of
    `evaluation.sequence_length` tokens, unmerged; wall-clock is the median of passes, alternating with the bare host.
    """

    adapter_bytes: int = Field(ge=0)
    memory_mb: float = Field(ge=0)
    flops_percent: float
    atoms_per_token: float | None = None
    wall_clock_percent: float | None = None


class BothScores(NamedTuple):
    """F1 and accuracy of some predictions, and which F1 it is."""

    f1_metric: str
    f1: float
    accuracy: float


def both_scores(predictions: Predictions, references: Predictions, labels: Sequence[str]) -> BothScores:
    """F1 and accuracy, whichever of them is the task's own metric.

    F1 of texts is that of class 1 if there are two classes, else the mean over the classes that occur (macro), as in
    scikit-learn.  F1 of words is that of entities, as in seqeval, or macro F1 over words if the labels are not of
    entities.  Accuracy of words is over words.
    """
    accuracy = count("accuracy", predictions, references, labels)
    if isinstance(references[0], int):
        f1 = count("f1", predictions, references, labels)
    else:
        try:
            f1 = count("entity_f1", predictions, references, labels)
        except LabelError:
            f1 = count("f1", _flat(predictions), _flat(references), labels)
    return BothScores(f1.name, _value(f1), _value(accuracy))


def _flat(rows: Predictions) -> list[int]:
    return [tag for row in rows if not isinstance(row, int) for tag in row]


def _value(counted: Counted) -> float:
    """The metric of all examples, without an interval."""
    return float(counted.statistic(counted.rows, np.ones((1, len(counted.rows)), dtype=np.int64))[0])


def published(costs: Costs, scores: BothScores) -> dict[str, float]:
    """Costs and scores under the names of the published experiment; active atoms only where there are atoms."""
    values = {
        "Memory overhead (MB)": costs.memory_mb,
        "FLOP overhead (%)": costs.flops_percent,
        "Active atoms per token": costs.atoms_per_token,
        "F1 Score": scores.f1,
        "Accuracy": scores.accuracy,
    }
    return {name: value for name, value in values.items() if value is not None}


class RunMetrics(Frozen):
    """`metrics.json`.

    :param score: The run's dev score; for a tuned run after tuning.
    :param f1: F1 of the same predictions, and `f1_metric` says which, see `both_scores`; None in files of earlier
        versions, as `accuracy` and `published`.
    :param zero_shot: For a tuned run, the score before tuning.
    :param gain: For a tuned run, after minus before, paired.
    :param device: Device of training and scoring: `cpu`, or a GPU's name.  `timed_on`: device of the wall-clock.
    """

    run_id: str
    method: str
    host: str
    task: str
    seed: int
    config_digest: str
    mode: str
    source: str | None = None
    source_score: Score | None = None
    score: Score
    f1: float | None = None
    f1_metric: str | None = None
    accuracy: float | None = None
    published: dict[str, float] = Field({}, description="some of these under the published names")
    zero_shot: Score | None = None
    gain: Difference | None = None
    costs: Costs
    within_budget: bool
    training_seconds: float = Field(ge=0)
    search: Search | None = None
    curve: tuple[CurvePoint, ...] = ()
    dev_curve: tuple[DevPoint, ...] = ()
    train_examples: int = Field(0, ge=0)
    device: str | None = None
    timed_on: str | None = None


# A word's class is written as one of these digits: this takes little more than half the bytes of lists.
_DIGITS = string.digits + string.ascii_lowercase


class Predicted(Frozen):
    """`predictions.json`: predicted and true classes of every evaluation example; lists for token tasks.

    In the file, a sentence of a token task is a string of base-36 digits, one per word (`"00120"`), if there are at
    most 36 classes; lists are read as well.
    """

    labels: tuple[str, ...]
    metric: Metric
    predictions: list[int] | list[list[int]]
    references: list[int] | list[list[int]]

    @field_validator("predictions", "references", mode="before")
    @classmethod
    def _from_digits(cls, rows: object) -> object:
        if not isinstance(rows, list):
            return rows
        return [[int(digit, 36) for digit in row] if isinstance(row, str) else row for row in rows]

    @field_serializer("predictions", "references", when_used="json")
    def _as_digits(self, rows: list[int] | list[list[int]]) -> list[int | str | list[int]]:
        few = len(self.labels) <= len(_DIGITS)
        return [
            "".join(_DIGITS[each] for each in row) if few and isinstance(row, list) else row  # a text's class stays
            for row in rows
        ]


class RunFolder:
    """The files of one run below the results folder.

    A run of an earlier version, whose name has dots, is found in its own folder.
    """

    def __init__(self, results: Path, run_id: str) -> None:
        self.path = results / run_id
        if not self.path.exists() and results.is_dir():
            old = [path for path in results.iterdir() if "." in path.name and dotless(path.name) == run_id]
            self.path = old[0] if old else self.path
        self.metrics = self.path / "metrics.json"
        self.predictions = self.path / "predictions.json"
        self.config = self.path / "config.json"
        self.error = self.path / "error.txt"

    def write(self, run: RunConfig, metrics: RunMetrics, predicted: Predicted) -> None:
        """Write everything; the metrics come last, so that a run that has them is finished."""
        write_text(self.config, run.model_dump_json(indent=2) + "\n")
        write_text(self.predictions, predicted.model_dump_json() + "\n")
        self.write_metrics(metrics)

    def write_metrics(self, metrics: RunMetrics) -> None:
        """Replace the metrics only, and remove the error file of an earlier attempt."""
        write_text(self.metrics, metrics.model_dump_json(indent=2) + "\n")
        self.error.unlink(missing_ok=True)

    def read_config(self) -> RunConfig:
        """The run's configuration, without settings that no longer exist.

        :raises FormatError: When it is missing or damaged.
        """
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
            if isinstance(content.get("adapter"), dict):
                content["adapter"] = without_removed(content["adapter"], "pretraining")
            return RunConfig.model_validate(content)
        except (OSError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{self.config} is not a configuration.", "Delete its folder and run with --resume."
            ) from error

    def read(self) -> RunMetrics:
        """The metrics of a finished run.

        :raises FormatError: When they are missing or damaged.
        """
        try:
            return RunMetrics.model_validate_json(self.metrics.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            raise FormatError(
                f"{self.metrics} is not a metrics file.", "Delete its folder and run with --resume."
            ) from error

    def read_predictions(self) -> Predicted:
        """The predictions of a finished run.

        :raises FormatError: When they are missing or damaged.
        """
        try:
            return Predicted.model_validate_json(self.predictions.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            problem = f"{self.predictions} is not a predictions file."
            raise FormatError(problem, "Delete its folder and run with --resume.") from error
