"""F1 and accuracy of a run are those of scikit-learn and seqeval, whichever is the task's own metric."""

from __future__ import annotations

import numpy as np
import pytest
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score

from uhl_cli.compare.results import Costs, both_scores, published

RNG = np.random.default_rng(3)
TAGS = ("O", "B-PER", "I-PER")


def drawn(classes, count=60):
    return RNG.integers(0, classes, count).tolist(), RNG.integers(0, classes, count).tolist()


def sentences(classes):
    lengths = [int(length) for length in RNG.integers(1, 9, 30)]
    return tuple([RNG.integers(0, classes, length).tolist() for length in lengths] for _ in range(2))


def flat(rows):
    return [tag for row in rows for tag in row]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_texts(classes):
    found, true = drawn(classes)
    scores = both_scores(found, true, [f"c{index}" for index in range(classes)])
    average = "binary" if classes == 2 else "macro"
    assert scores.f1_metric == ("f1 of c1" if classes == 2 else "macro f1")
    assert scores.f1 == pytest.approx(f1_score(true, found, average=average))
    assert scores.accuracy == pytest.approx(accuracy_score(true, found))


def test_classes_that_neither_side_has_do_not_count():
    scores = both_scores([0, 0, 2, 2], [0, 2, 2, 2], ["a", "b", "c", "d"])
    assert scores.f1 == pytest.approx(f1_score([0, 2, 2, 2], [0, 0, 2, 2], average="macro"))


def test_words():
    found, true = sentences(3)
    scores = both_scores(found, true, TAGS)
    names = [[[TAGS[tag] for tag in row] for row in part] for part in (true, found)]
    assert scores.f1_metric == "entity_f1"
    assert scores.f1 == pytest.approx(entity_f1(*names, zero_division=0))
    assert scores.accuracy == pytest.approx(accuracy_score(flat(true), flat(found)))
    assert scores.f1 != pytest.approx(f1_score(flat(true), flat(found), average="macro"))


def test_words_whose_labels_are_not_of_entities():
    found, true = sentences(3)
    scores = both_scores(found, true, ("NOUN", "VERB", "X"))
    assert scores.f1_metric == "macro f1"
    assert scores.f1 == pytest.approx(f1_score(flat(true), flat(found), average="macro"))


def test_published_names():
    scores = both_scores([0, 1], [0, 1], ("a", "b"))
    costs = Costs(adapter_bytes=1, memory_mb=2.0, flops_percent=3.0)
    expected = {"Memory overhead (MB)": 2.0, "FLOP overhead (%)": 3.0, "F1 Score": 1.0, "Accuracy": 1.0}
    assert published(costs, scores) == expected
    with_atoms = costs.model_copy(update={"atoms_per_token": 1.5})
    assert published(with_atoms, scores) == expected | {"Active atoms per token": 1.5}
