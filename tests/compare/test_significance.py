"""Tests of significance, the Pareto front, and the sign of a gap."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from uhl_cli.compare.aggregate import holm, mcnemar, percent_better
from uhl_cli.compare.figures import confusion, pareto
from uhl_cli.compare.results import Predicted


def test_mcnemar_counts_what_only_one_gets_right():
    first = np.array([True] * 15 + [False] * 5)
    second = np.array([True] * 5 + [False] * 10 + [True] * 5)
    # 10 only first, 5 only second: two-sided exact binomial.
    assert mcnemar(first, second) == pytest.approx(0.3017578125)
    assert mcnemar(second, first) == pytest.approx(0.3017578125)
    assert mcnemar(first, first) == 1.0
    assert mcnemar(np.ones(20, bool), np.zeros(20, bool)) == pytest.approx(2 * 0.5**20)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    drawn = np.random.default_rng(0).random(30).tolist()
    assert all(after >= before for before, after in zip(drawn, holm(drawn), strict=True))


def test_a_gap_is_positive_where_the_proposed_is_better():
    assert percent_better(0.9, 0.8, smaller=False) == pytest.approx(12.5)
    assert percent_better(0.9, 0.8, smaller=True) == pytest.approx(-12.5)
    assert percent_better(0.9, 0.0, smaller=False) is None


def test_pareto_front_holds_what_nothing_betters():
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.7), (3.0, 0.6), (0.5, 0.1), (9.0, 0.7)]
    assert pareto(points) == [(0.5, 0.1), (1.0, 0.5), (3.0, 0.7)]


def test_predictions_of_words_are_written_in_digits():
    labels = tuple(f"tag{index}" for index in range(12))
    words = Predicted(labels=labels, metric="entity_f1", predictions=[[0, 11], []], references=[[10, 0], []])
    assert json.loads(words.model_dump_json())["predictions"] == ["0b", ""]
    assert Predicted.model_validate_json(words.model_dump_json()) == words
    lists = {"labels": labels, "metric": "entity_f1", "predictions": [[0, 11], []], "references": [[10, 0], []]}
    assert Predicted.model_validate_json(json.dumps(lists)) == words
    texts = Predicted(labels=("a", "b"), metric="accuracy", predictions=[0, 1], references=[1, 1])
    assert json.loads(texts.model_dump_json())["predictions"] == [0, 1]
    assert Predicted.model_validate_json(texts.model_dump_json()) == texts
    with pytest.raises(ValidationError):
        Predicted.model_validate_json(json.dumps(lists | {"predictions": ["0?", ""]}))


def test_more_classes_than_digits_stay_lists():
    labels = tuple(f"tag{index}" for index in range(40))
    words = Predicted(labels=labels, metric="entity_f1", predictions=[[39]], references=[[38]])
    assert json.loads(words.model_dump_json())["predictions"] == [[39]]
    assert Predicted.model_validate_json(words.model_dump_json()) == words


def test_confusion_counts_words_of_sentences():
    predicted = Predicted(labels=("O", "X"), metric="entity_f1", predictions=[[0, 1], [1]], references=[[0, 0], [1]])
    assert confusion(predicted).tolist() == [[1, 1], [0, 1]]
