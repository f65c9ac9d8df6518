"""Scores are those of scikit-learn and seqeval; intervals cover what they should."""

import warnings

import numpy as np
import pytest
from scipy.stats import norm
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import f1_score

from uhl_cli.errors import DataError, LabelError, UsageError
from uhl_cli.metrics import (
    correct,
    count,
    entity_counts,
    majority_class,
    mean_difference,
    paired_difference,
    score,
    wilson_interval,
)

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def sentences(seed, count=60):
    random = np.random.default_rng(seed)
    return [random.integers(0, len(TAGS), random.integers(1, 12)).tolist() for _ in range(count)]


def disturbed(references, classes, seed, rate=0.3):
    random = np.random.default_rng(seed)
    flips = random.random(len(references)) < rate
    return np.where(flips, random.integers(0, classes, len(references)), references).tolist()


@pytest.mark.parametrize(
    ("right", "examples", "low", "high"),
    # Agresti and Coull (1998) style values, as statsmodels' proportion_confint(method="wilson") gives them
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (1, 29, 0.00611, 0.17177)],
)
def test_wilson_interval_has_known_values(right, examples, low, high):
    assert wilson_interval(right, examples) == pytest.approx((low, high), abs=2e-5)


def test_wilson_refuses_what_is_no_proportion():
    for right, examples in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(DataError):
            wilson_interval(right, examples)


def test_accuracy_of_examples():
    found = score("accuracy", [0, 1, 1, 0], [0, 1, 0, 0], ("a", "b"))
    assert (found.metric, found.value, found.examples) == ("accuracy", 0.75, 4)
    assert (found.low, found.high) == wilson_interval(3, 4)


def test_accuracy_of_words_counts_words_and_resamples_sentences():
    found = score("accuracy", [[0, 1], [0]], [[0, 0], [0]], ("a", "b"))
    assert found.value == pytest.approx(2 / 3)
    assert found.examples == 2
    assert (found.low, found.high) == (0.5, 1.0)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_f1_is_that_of_scikit_learn(classes, seed):
    random = np.random.default_rng(seed)
    references = random.integers(0, classes, 50).tolist()
    predictions = disturbed(references, classes, seed)
    names = [f"class {index}" for index in range(classes)]
    found = score("f1", predictions, references, names)
    average = "binary" if classes == 2 else "macro"
    assert found.value == pytest.approx(f1_score(references, predictions, average=average))
    assert found.metric == ("f1 of class 1" if classes == 2 else "macro f1")
    assert found.low <= found.value <= found.high


def test_macro_f1_leaves_out_classes_that_never_occur():
    assert score("f1", [0, 1], [0, 1], ("a", "b", "c")).value == 1.0


@pytest.mark.parametrize("seed", range(10))
def test_entity_counts_sum_to_the_f1_of_seqeval(seed):
    references, predictions = sentences(seed), sentences(seed)
    random = np.random.default_rng(seed + 100)
    for sentence in predictions:
        if random.random() < 0.6:
            sentence[int(random.integers(len(sentence)))] = int(random.integers(len(TAGS)))
    named = [[[TAGS[tag] for tag in row] for row in part] for part in (predictions, references)]
    found, predicted, true = entity_counts(*named).sum(axis=0)
    expected = seqeval_f1(named[1], named[0])
    assert 2 * found / (predicted + true) == pytest.approx(expected)
    assert score("entity_f1", predictions, references, TAGS).value == pytest.approx(expected)
    assert 0.3 < expected < 1.0  # the control: the disturbance did something


def test_no_entities_at_all_score_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score("entity_f1", [[0, 0]], [[0, 0]], TAGS)
        assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
        assert score("f1", [0, 0], [0, 0], ("a", "b")).value == 0.0


def test_bootstrap_agrees_with_resampling_one_by_one():
    references = np.random.default_rng(0).integers(0, 2, 300)
    predictions = np.array(disturbed(references, 2, 1))
    found = score("f1", predictions.tolist(), references.tolist(), ("a", "b"))
    random = np.random.default_rng(5)
    values = []
    for _ in range(1000):
        draw = random.integers(0, 300, 300)
        values.append(f1_score(references[draw], predictions[draw]))
    assert (found.low, found.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.01)


def test_bootstrap_is_the_same_each_time_and_narrows_with_more_examples():
    references = np.random.default_rng(0).integers(0, 2, 4000).tolist()
    predictions = disturbed(references, 2, 1)
    few = score("f1", predictions[:100], references[:100], ("a", "b"))
    many = score("f1", predictions, references, ("a", "b"))
    assert score("f1", predictions, references, ("a", "b")) == many
    assert 4 < (few.high - few.low) / (many.high - many.low) < 9  # about the root of 40


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        right = random.random(200) < 0.8
        difference = paired_difference("accuracy", right.astype(int), np.zeros(200, int), np.ones(200, int), "ab")
        hits += difference.low <= 0.8 <= difference.high
    assert 180 <= hits <= 199


@pytest.mark.parametrize(("metric", "classes"), [("accuracy", 2), ("f1", 2), ("f1", 4)])
def test_difference(metric, classes):
    random = np.random.default_rng(3)
    references = random.integers(0, classes, 400).tolist()
    good, bad = disturbed(references, classes, 1, 0.1), disturbed(references, classes, 2, 0.6)
    names = "abcd"[:classes]
    same = paired_difference(metric, good, good, references, names)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    better = paired_difference(metric, good, bad, references, names)
    worse = paired_difference(metric, bad, good, references, names)
    assert better.low > 0 > worse.high
    assert better.value == pytest.approx(-worse.value)
    expected = score(metric, good, references, names).value - score(metric, bad, references, names).value
    assert better.value == pytest.approx(expected)


def test_difference_of_entities():
    references = sentences(1)
    same = paired_difference("entity_f1", references, references, references, TAGS)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert paired_difference("entity_f1", references, [[0] * len(s) for s in references], references, TAGS).value == 1


def test_pairing_narrows_the_interval():
    # b errs where a errs and nowhere else but on few more, so the difference is far surer than either score.
    references = [1] * 500
    a = [0] * 100 + [1] * 400
    b = [0] * 110 + [1] * 390
    difference = paired_difference("accuracy", a, b, references, ("x", "y"))
    alone = score("accuracy", a, references, ("x", "y"))
    assert difference.low > 0
    assert difference.high - difference.low < (alone.high - alone.low) / 2


def test_seeds_that_err_alike_are_no_new_evidence():
    random = np.random.default_rng(0)
    references, names = [1] * 400, ("x", "y")
    a = [(random.random(400) < 0.85).astype(int).tolist() for _ in range(3)]
    b = [(random.random(400) < 0.80).astype(int).tolist() for _ in range(3)]
    pairs = [tuple(count("accuracy", rows, references, names) for rows in pair) for pair in zip(a, b, strict=True)]
    one, same = mean_difference(pairs[:1]), mean_difference(pairs[:1] * 3)
    assert (same.value, same.low, same.high) == pytest.approx((one.value, one.low, one.high))
    several = mean_difference(pairs)
    alone = [paired_difference("accuracy", *pair, references, names).value for pair in zip(a, b, strict=True)]
    assert several.value == pytest.approx(np.mean(alone))
    assert several.standard_error == pytest.approx(one.standard_error / 3**0.5, rel=0.15)  # these err independently
    per_example = np.mean(np.array(a) - np.array(b), axis=0)
    assert several.standard_error == pytest.approx(per_example.std(ddof=1) / 400**0.5, rel=0.1)
    assert several.p_value == pytest.approx(2 * norm.sf(abs(several.value) / several.standard_error))


def test_mean_difference_at_its_ends():
    references, names = [[0, 1], [1]], ("O", "B-X")
    right, wrong = references, [[1, 0], [0]]
    same = count("entity_f1", right, references, names)
    assert mean_difference([(same, same)]).p_value == 1
    pair = tuple(count("accuracy", rows, references, names) for rows in (right, wrong))
    assert mean_difference([pair]).p_value == 0
    with pytest.raises(DataError):
        mean_difference([])


def test_large_inputs_are_cheap():
    references = np.random.default_rng(0).integers(0, 2, 50_000)
    assert score("f1", references, references, ("a", "b")).value == 1.0


def test_correct_and_majority():
    assert correct([0, 1, 1], [0, 0, 1]).tolist() == [True, False, True]
    assert correct([[0, 1], [1]], [[0, 0], [1]]).tolist() == [False, True]
    assert majority_class((1, 5, 5)) == 1
    for nothing in ((), (0, 0)):
        with pytest.raises(DataError):
            majority_class(nothing)


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "error"),
    [
        ("accuracy", [], [], DataError),
        ("accuracy", [0], [0, 1], DataError),
        ("accuracy", [2], [0], DataError),
        ("accuracy", [0], [-1], DataError),
        ("accuracy", [[0]], [0], DataError),
        ("accuracy", [[0]], [[0, 1]], DataError),
        ("accuracy", [[]], [[]], DataError),
        ("entity_f1", [[0]], [[0]], LabelError),
        ("entity_f1", [0], [0], UsageError),
        ("f1", [[0]], [[0]], UsageError),
        ("bleu", [0], [0], UsageError),
    ],
)
def test_bad_input(metric, predictions, references, error):
    with pytest.raises(error) as caught:
        score(metric, predictions, references, ("a", "b"))
    assert caught.value.hint
