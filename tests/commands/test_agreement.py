"""Judging a port without labels: the arithmetic, its negative controls, and the texts that it is judged on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_hosts import SENTENCES, tiny_host

from uhl_cli.commands import agreement
from uhl_cli.commands.agreement import (
    GOOD,
    MOST_JUDGED,
    HeldOut,
    beyond_chance,
    expected_accuracy,
    judged,
    judges,
    parted,
    shares_of,
)
from uhl_cli.data import Examples
from uhl_cli.data.examples import token_examples
from uhl_cli.errors import DataError
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.metrics import Score, wilson_interval
from uhl_cli.transfer.texts import TransferSet, TransferTexts, count_examples

ROOT = Path(__file__).parents[2]
SPANS = 5


@pytest.fixture(scope="module")
def manifest():
    """That of a file whose teacher has a score of 0.73, with classes of the same size."""
    return read_adapter(ROOT / "adapters" / "reviews-builtin-base.safetensors").manifest


def held(classes: list[int], answers: int = SPANS) -> HeldOut:
    """Held-out examples with the teacher's classes, so many of each text."""
    texts = tuple(f"text {index}" for index in range(len(classes)))
    return HeldOut(Examples(texts, labels=tuple(classes)), tuple(index // answers for index in range(len(classes))))


def drawn(seed: int, count: int = 600) -> list[int]:
    return np.random.default_rng(seed).integers(0, 2, count).tolist()


def test_shares_are_those_of_all_answers():
    assert shares_of([0, 0, 1, 1], 2).tolist() == [0.5, 0.5]
    assert shares_of([[0, 1], [2], [0]], 4).tolist() == [0.5, 0.25, 0.25, 0.0]
    first = [int(value > 0) for value in np.random.default_rng(0).integers(0, 4, 4000)]  # three quarters of ones
    second = np.random.default_rng(1).permutation(first)
    met = np.mean(np.array(first) == second)
    assert met == pytest.approx(shares_of(first, 2) @ shares_of(second.tolist(), 2), abs=0.02), "chance is the product"


def test_kappa_is_one_for_all_and_zero_for_chance():
    assert beyond_chance(1.0, 0.5) == 1.0
    assert beyond_chance(0.5, 0.5) == 0.0
    assert beyond_chance(0.8, 0.6) == pytest.approx(0.5)
    assert beyond_chance(0.2, 0.5) < 0
    assert beyond_chance(1.0, 1.0) == 0.0, "where both give one answer, agreement says nothing"


def test_expected_accuracy_goes_from_chance_to_the_teacher():
    ends = {"chance": 0.5, "teacher": 0.9}
    assert expected_accuracy(1.0, **ends) == 0.9
    assert expected_accuracy(0.0, **ends) == expected_accuracy(-0.3, **ends) == 0.5
    values = [expected_accuracy(kappa, **ends) for kappa in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert values == sorted(values)
    assert expected_accuracy(0.25, exponent=0.5, **ends) == pytest.approx(0.7)


def test_the_teacher_itself_is_good_and_a_shuffled_one_is_unusable(manifest):
    answers = drawn(0)
    same = judged(manifest, answers, held(answers))
    assert (same.verdict, same.score.value, same.kappa) == ("good", 1.0, 1.0)
    assert same.expected.value == pytest.approx(manifest.parts.transfer.teacher_score.value)
    control = judged(manifest, answers, held(np.random.default_rng(1).permutation(answers).tolist()))
    assert control.verdict == "unusable"
    assert abs(control.kappa) < 0.1
    assert control.score.value == pytest.approx(0.5, abs=0.05)
    assert control.expected.low <= control.expected.constant


@pytest.mark.parametrize(("wrong", "verdict"), [(0.05, "good"), (0.15, "tune"), (0.5, "unusable")])
def test_the_verdict_follows_the_agreement(manifest, wrong, verdict):
    answers = np.array(drawn(0))
    flipped = np.random.default_rng(2).permutation(len(answers))[: int(wrong * len(answers))]
    said = answers.copy()
    said[flipped] = 1 - said[flipped]
    found = judged(manifest, said.tolist(), held(answers.tolist()))
    assert found.score.value == pytest.approx(1 - wrong)
    assert found.verdict == verdict
    assert (found.score.value >= GOOD) == (verdict == "good")
    expected = found.expected
    assert expected.low < expected.value < expected.high
    assert expected.chance <= expected.value <= expected.teacher


def test_a_constant_answer_is_unusable(manifest):
    found = judged(manifest, [1] * 600, held(drawn(0)))
    assert (found.kappa, found.verdict) == (pytest.approx(0.0), "unusable")
    assert found.expected.value == pytest.approx(found.expected.chance) == pytest.approx(found.expected.constant)


def with_teacher(manifest, counts: tuple[int, int], value: float):
    """The manifest with other training labels, and a teacher of this accuracy on 1,000 examples."""
    low, high = wilson_interval(round(1000 * value), 1000)
    taught = Score(metric="accuracy", value=value, low=low, high=high, examples=1000)
    transfer = manifest.parts.transfer.model_copy(update={"teacher_score": taught})
    parts = manifest.parts.model_copy(update={"transfer": transfer})
    return manifest.model_copy(update={"label_counts": counts, "parts": parts})


def test_where_most_examples_have_one_class_a_port_can_be_good_and_a_constant_answer_cannot(manifest):
    unequal = with_teacher(manifest, (900, 100), 0.94)
    answers = (np.random.default_rng(0).random(600) < 0.1).astype(int)
    assert judged(unequal, answers.tolist(), held(answers.tolist())).verdict == "good"
    constant = judged(unequal, [0] * 600, held(answers.tolist()))
    assert constant.score.value >= GOOD
    assert constant.verdict == "unusable"
    rare = np.flatnonzero(answers)
    verdicts = []
    for lost in (0.5, 0.9):
        said = answers.copy()
        said[rare[: int(lost * len(rare))]] = 0
        found = judged(unequal, said.tolist(), held(answers.tolist()))
        assert found.expected.low <= found.expected.constant, "by the residual"
        verdicts.append(found.verdict)
    assert verdicts == ["good", "unusable"]


def test_a_teacher_no_better_than_a_constant_answer_is_named_as_the_fault(manifest):
    answers = drawn(0)
    for value, verdict in ((0.52, "pretrain"), (0.60, "good")):
        found = judged(with_teacher(manifest, (500, 500), value), answers, held(answers))
        assert (found.score.value, found.verdict) == (1.0, verdict)


def test_answers_on_one_text_are_not_counted_as_new_evidence(manifest):
    """Every text five times over gives the interval of the texts alone; five times as many texts a narrower one."""
    teacher, said = drawn(0, 60), drawn(1, 60)
    said[:45] = teacher[:45]
    alone = judged(manifest, said, held(teacher, 1)).score
    five = [value for value in said for _ in range(SPANS)], [value for value in teacher for _ in range(SPANS)]
    repeated, apart = (judged(manifest, five[0], held(five[1], answers)).score for answers in (SPANS, 1))
    assert (repeated.value, repeated.low, repeated.high) == (alone.value, alone.low, alone.high)
    assert apart.high - apart.low < 0.6 * (alone.high - alone.low)


def test_a_token_task_and_a_teacher_without_a_score_have_no_expected_accuracy(manifest):
    transfer = manifest.parts.transfer.model_copy(update={"teacher_score": None})
    unscored = manifest.model_copy(update={"parts": manifest.parts.model_copy(update={"transfer": transfer})})
    answers = drawn(0)
    found = judged(unscored, answers, held(answers))
    assert (found.expected, found.verdict) == (None, "good")
    assert judged(unscored, answers, held(drawn(1))).verdict == "unusable"

    labels = ("O", "B-PER", "I-PER")
    changes = {"kind": "tokens", "labels": labels, "metric": "entity_f1", "text_column": None, "tokens_column": "w"}
    tagger = manifest.model_copy(
        update={"task": manifest.task.model_copy(update=changes), "label_counts": (80, 10, 10)}
    )
    tags = [[0, 1, 2, 0, 0]] * 40
    sentences = HeldOut(token_examples([["a"] * 5] * 40, tags), tuple(range(40)))
    found = judged(tagger, [list(row) for row in tags], sentences)
    assert (found.score.metric, found.score.value, found.expected, found.verdict) == ("entity_f1", 1.0, None, "good")
    half = judged(tagger, [[0, 1, 2, 0, 0]] * 20 + [[0, 1, 0, 0, 0]] * 20, sentences)
    assert (half.score.value, half.verdict) == (0.5, "tune")
    assert judged(tagger, [[0] * 5] * 40, sentences).verdict == "unusable"


def transfer_of(texts: tuple[str, ...]) -> TransferSet:
    """A transfer set with spans, whose teacher's answers are drawn at random."""
    held = TransferTexts(texts, None, SPANS, False, "test")
    codes = np.where(np.random.default_rng(0).random((count_examples(held)[0], 1)) < 0.5, -7, 7)
    return TransferSet(held, codes.astype(np.int8), "nobody")


def many(count: int) -> tuple[str, ...]:
    return tuple(f"{SENTENCES[index % len(SENTENCES)]} {index}" for index in range(count))


def test_a_port_is_judged_on_texts_that_tuning_holds_out():
    # Texts of which the target reads nothing, or a part of the spans alone, are among them.
    texts = many(300)
    mixed = tuple(f"\u2603 {text} \u2603" if index % 3 == 0 else text for index, text in enumerate(texts))
    transfer, host = transfer_of((*mixed[:90], "\u2603 \u2603", *mixed[90:])), tiny_host("bert")
    whole, part = parted(transfer, host), judges(transfer, host)
    assert whole.unread > 5
    kept = whole.examples.select(whole.held_rows)
    assert (part.examples.texts, part.examples.labels) == (kept.texts, kept.labels)
    assert set(part.owners) == whole.held_texts
    assert not set(part.owners) & {whole.owners[row] for row in whole.fitted_rows}


def test_at_most_so_many_texts_are_read(monkeypatch):
    transfer, host = transfer_of(many(300)), tiny_host("bert")
    monkeypatch.setattr(agreement, "MOST_JUDGED", 11)
    part = judges(transfer, host)
    assert len(set(part.owners)) == 11 < MOST_JUDGED
    assert set(part.owners) < parted(transfer, host).held_texts
    assert len(part.examples) > 11, "spans belong to their text"
    with pytest.raises(DataError, match=r"199 texts 9 are held out, and 10 are needed.*--data"):
        judges(transfer_of(many(199)), host)


def test_constants_are_those_that_the_benchmark_fitted():
    found = json.loads((ROOT / "tests/benchmarks/results/agreement.json").read_text())
    fit, rows = found["fit"], found["results"]
    assert (fit["exponent"], fit["residual"]) == (agreement.EXPONENT, agreement.RESIDUAL)
    used = [row for row in rows if row["chance"] is not None and not row["home"]]
    assert fit["ports"] == len(used) >= 20
    errors = np.array([row["score"]["value"] - row["expected"] for row in used])
    assert 1.96 * np.sqrt(np.mean(errors**2)) == pytest.approx(fit["residual"], abs=1e-3)
    ends = [{"chance": row["chance"], "teacher": row["teacher"]} for row in used]
    assert [round(expected_accuracy(row["kappa"], **each), 4) for row, each in zip(used, ends, strict=True)] == [
        row["expected"] for row in used
    ]
