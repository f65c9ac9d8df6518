"""Score predictions, with a 95 % interval, and compare two sets of predictions on the same examples.

Guarantee: a score is the value that scikit-learn or seqeval gives, and the
same input gives the same interval on every run.

Every metric here is a function of counts summed over examples (a sentence is
one example of a token task).  So a bootstrap resample of the examples is a
multinomial draw over the distinct rows of counts, which costs the same for
eight hundred examples as for a million.

Importing this imports neither torch nor datasets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from uhl_cli.errors import DataError, LabelError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]
    Values = NDArray[np.float64]
    Statistic = Callable[[Counts, Counts], Values]

Predictions = Sequence[int | Sequence[int]]

RESAMPLES = 1000
_SEED = 20240501
_NORMAL_975 = 1.959963984540054


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metric: str = Field(max_length=300)
    value: float
    low: float
    high: float
    examples: int = Field(ge=1)


class Score(_Record):
    """A metric's value in [0, 1] with its 95 % interval, and the number of examples.

    `metric` says what was computed: `accuracy`, `entity_f1`, `macro f1` or `f1 of` the positive label.
    """


class Difference(_Record):
    """Value of a minus value of b, in [-1, 1], with a 95 % interval by paired bootstrap."""


def score(task_metric: str, predictions: Predictions, references: Predictions, label_names: Sequence[str]) -> Score:
    """The metric of class ids against the true ones.

    :param task_metric: `accuracy`: fraction right, of the words for a token
        task.  `f1`: of class 1 if there are two labels, else the mean over
        the classes that occur.  `entity_f1`: of entities, as seqeval counts
        them in its default mode.
    :param predictions: One class id per example, or one sequence of class ids per sentence.
    :param references: The true class ids, of the same shape.
    :param label_names: The name of each class id.
    :returns: With Wilson's interval for the accuracy of single examples, else
        the percentile interval of 1000 bootstrap resamples of the examples.
    :raises DataError: If there are no examples, shapes differ, or an id has no name.
    :raises LabelError: If `entity_f1` is requested for labels that are not O, B-, I-, E-, S-.
    :raises UsageError: If the metric is unknown.
    """
    name, rows, statistic = count(task_metric, predictions, references, label_names)
    value, low, high, _ = _bootstrap(rows, statistic)
    if task_metric == "accuracy" and isinstance(references[0], (int, np.integer)):
        low, high = wilson_interval(int(rows[:, 0].sum()), len(rows))
    return Score(metric=name, value=value, low=low, high=high, examples=len(rows))


class Counted(NamedTuple):
    """A metric's name, a row of small integers for each example, and the metric of weighted distinct rows."""

    name: str
    rows: Counts
    statistic: Statistic


class MeanDifference(Difference):
    """Mean of the differences of several pairs (of seeds), each interval over the examples that all of them share.

    `p_value` is that of a two-sided z test of `value` over `standard_error`, the bootstrap's; 1 where both are zero.
    """

    standard_error: float = Field(ge=0)
    p_value: float = Field(ge=0, le=1)


def paired_difference(
    task_metric: str,
    predictions_a: Predictions,
    predictions_b: Predictions,
    references: Predictions,
    label_names: Sequence[str],
) -> Difference:
    """How much better a is than b: both are resampled on the same examples, 1000 times.

    :raises UhlError: As `score` does.
    """
    a, b = (count(task_metric, each, references, label_names) for each in (predictions_a, predictions_b))
    return Difference(**mean_difference([(a, b)]).model_dump(include=set(Difference.model_fields)))


def mean_difference(pairs: Sequence[tuple[Counted, Counted]]) -> MeanDifference:
    """How much better the first of a pair is than the second, in the mean of all pairs.

    All are resampled on the same examples, 1000 times: seeds that err on the same examples do not count as new
    evidence.  The interval does not include the variation over other seeds.

    :param pairs: Results of `count` for the predictions of a and of b on the same examples, one pair per seed.
    :raises DataError: When there is no pair.
    """
    if not pairs:
        raise DataError("There are no runs to compare.", "Give one pair of predictions at least.")
    counted = [each for pair in pairs for each in pair]
    name, first, statistic = counted[0]
    width = first.shape[1]

    def difference(rows: Counts, weights: Counts) -> Values:
        values = [statistic(rows[:, at : at + width], weights) for at in range(0, rows.shape[1], width)]
        mean: Values = np.mean([a - b for a, b in zip(values[::2], values[1::2], strict=True)], axis=0)
        return mean

    value, low, high, error = _bootstrap(np.concatenate([rows for _, rows, _ in counted], axis=1), difference)
    p_value = math.erfc(abs(value) / error / math.sqrt(2)) if error > 0 else float(value == 0)
    return MeanDifference(
        metric=name, value=value, low=low, high=high, examples=len(first), standard_error=error, p_value=p_value
    )


def correct(predictions: Predictions, references: Predictions) -> NDArray[np.bool_]:
    """Whether each example is right; a sentence is right if each of its tags is.  Shape (examples,).

    :raises DataError: If there are no examples or shapes differ.
    """
    _check(predictions, references, None)
    hits = [_hits(predicted, true) for predicted, true in zip(predictions, references, strict=True)]
    return np.array([right == words for right, words in hits], dtype=np.bool_)


def majority_class(label_counts: Sequence[int]) -> int:
    """The most frequent class id; of equally frequent ones the lowest.

    :raises DataError: If nothing was counted.
    """
    if not any(label_counts):
        raise DataError("There are no labels to take a majority of.", "Give data with labelled examples.")
    return max(range(len(label_counts)), key=lambda index: (label_counts[index], -index))


def wilson_interval(right: int, examples: int) -> tuple[float, float]:
    """(low, high): Wilson's 95 % score interval of the proportion `right / examples`.

    :raises DataError: If `right` is not in 0..examples, or there are no examples.
    """
    if not 0 <= right <= examples or examples == 0:
        raise DataError(f"{right} right of {examples} examples is not a proportion.", "Check the counts.")
    square = _NORMAL_975**2
    proportion = right / examples
    middle = proportion + square / (2 * examples)
    spread = _NORMAL_975 * math.sqrt(proportion * (1 - proportion) / examples + square / (4 * examples**2))
    scale = 1 + square / examples
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def entity_counts(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Counts:
    """For each sentence the numbers of (entities found, entities predicted, entities true).  Shape (n, 3).

    Entities are those of seqeval's default mode; their sums give its micro average.
    """
    rows = []
    for predicted, true in zip(predictions, references, strict=True):
        found_entities, true_entities = set(entities_of(predicted)), set(entities_of(true))
        rows.append((len(found_entities & true_entities), len(found_entities), len(true_entities)))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(label, first word, last word) of each entity in the tags of a sentence, by seqeval's default mode."""
    from seqeval.metrics.sequence_labeling import get_entities

    found: list[tuple[str, int, int]] = get_entities(list(tags))
    return found


def count(metric: str, predictions: Predictions, references: Predictions, label_names: Sequence[str]) -> Counted:
    """The counts that a metric needs of some predictions.

    :raises UhlError: As `score` does.
    """
    nested = _check(predictions, references, len(label_names))
    if metric == "accuracy":
        hits = [_hits(predicted, true) for predicted, true in zip(predictions, references, strict=True)]
        rows = np.array(hits, dtype=np.int64)
        if not rows[:, 1].any():
            raise DataError("There are no words to score.", "Give sentences with words.")
        return Counted("accuracy", rows, _accuracy)
    if metric == "entity_f1" and nested:
        odd = [name for name in label_names if name != "O" and name[:2] not in ("B-", "I-", "E-", "S-")]
        if odd:
            problem = f"entity_f1 cannot read the label {odd[0]!r}."
            raise LabelError(problem, "Name tags O, B-NAME, I-NAME, or use accuracy.")
        named = [
            [[label_names[tag] for tag in _ids(sentence)] for sentence in part] for part in (predictions, references)
        ]
        return Counted("entity_f1", entity_counts(named[0], named[1]), _entity_f1)
    if metric == "f1" and not nested:
        pairs = np.stack([np.asarray(predictions), np.asarray(references)], axis=1).astype(np.int64)
        if len(label_names) == 2:
            binary = np.stack([pairs[:, 0] * pairs[:, 1], pairs[:, 0], pairs[:, 1]], axis=1)
            return Counted(f"f1 of {label_names[1]}", binary, _entity_f1)  # one class counts as one kind of entity
        return Counted("macro f1", pairs, _macro_f1)
    problem = f"A {'token' if nested else 'sequence'} task is not scored by {metric!r}."
    raise UsageError(problem, "Use accuracy, f1 (texts) or entity_f1 (words).")


def _accuracy(rows: Counts, weights: Counts) -> Values:
    sums: Values = (weights @ rows).astype(np.float64)  # (resamples, 2): right, all
    return sums[:, 0] / np.maximum(sums[:, 1], 1)


def _entity_f1(rows: Counts, weights: Counts) -> Values:
    """Rows (found, predicted, true); 0 where nothing is predicted or true, as in seqeval and scikit-learn."""
    sums: Values = (weights @ rows).astype(np.float64)
    return 2 * sums[:, 0] / np.maximum(sums[:, 1] + sums[:, 2], 1)


def _macro_f1(rows: Counts, weights: Counts) -> Values:
    """Rows (predicted, true); the mean over the classes that are predicted or true, as in scikit-learn."""
    classes = np.arange(int(rows.max()) + 1)
    predicted, true = rows[:, :1] == classes, rows[:, 1:] == classes  # (distinct, classes)
    both = weights @ (predicted.astype(np.int64) + true)
    found = weights @ (predicted & true).astype(np.int64)
    f1 = 2 * found / np.maximum(both, 1)
    mean: Values = f1.sum(axis=1) / (both > 0).sum(axis=1)
    return mean


def _bootstrap(rows: Counts, statistic: Statistic) -> tuple[float, float, float, float]:
    """(value, low, high, standard error) of a statistic of the examples with these rows.

    Drawing n examples with replacement draws each distinct row a multinomial number of times.
    """
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    value = float(statistic(distinct, counts[None])[0])
    total = int(counts.sum())
    weights = np.random.default_rng(_SEED).multinomial(total, counts / total, size=RESAMPLES)
    drawn = statistic(distinct, weights)
    low, high = np.percentile(drawn, [2.5, 97.5])
    # The percentile interval of a skewed statistic need not contain its value, which would mislead.
    return value, min(float(low), value), max(float(high), value), float(drawn.std(ddof=1))


def _check(predictions: Predictions, references: Predictions, classes: int | None) -> bool:
    """Whether the examples are sentences, once both sides have the same shape and ids below `classes`."""
    if len(references) == 0:
        raise DataError("There are no examples to score.", "Give evaluation data with labelled rows.")
    if len(predictions) != len(references):
        problem = f"{len(predictions)} predictions for {len(references)} references."
        raise DataError(problem, "Predict each example once.")
    nested = not isinstance(references[0], (int, np.integer))
    for row, (predicted, true) in enumerate(zip(predictions, references, strict=True), 1):
        if any(isinstance(each, (int, np.integer)) == nested for each in (predicted, true)):
            raise DataError(f"Example {row} mixes a class id with a list.", "Give the same shape everywhere.")
        predicted_ids, true_ids = _ids(predicted), _ids(true)
        if len(predicted_ids) != len(true_ids):
            problem = f"Sentence {row} has {len(true_ids)} tags but {len(predicted_ids)} predictions."
            raise DataError(problem, "Predict each word once.")
        for label in (*predicted_ids, *true_ids):
            if label < 0 or (classes is not None and label >= classes):
                raise DataError(f"Example {row} has class id {label} of {classes}.", "Check the labels.")
    return nested


def _ids(value: int | Sequence[int]) -> Sequence[int]:
    return (int(value),) if isinstance(value, (int, np.integer)) else value


def _hits(predicted: int | Sequence[int], true: int | Sequence[int]) -> tuple[int, int]:
    """(right, all) of the class ids of one example."""
    pairs = list(zip(_ids(predicted), _ids(true), strict=True))
    return sum(a == b for a, b in pairs), len(pairs)
