"""Class ids are stable, and known names are matched or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhl_cli.data.labels import map_labels
from uhl_cli.errors import DataError, LabelError


def ids(values, known=None, class_names=None):
    found = map_labels(values, class_names, known, "here")
    return found.names, [found.ids[value] for value in values]


@pytest.mark.parametrize(
    ("values", "known", "names", "expected"),
    [
        (["b", "a", "b"], None, ("a", "b"), [1, 0, 1]),
        (["b", "a"], ("b", "a"), ("b", "a"), [0, 1]),
        (["Positive", "NEGATIVE"], ("negative", "positive"), ("negative", "positive"), [1, 0]),
        ([0, 1], ("negative", "positive"), ("negative", "positive"), [0, 1]),
        (["0", "1"], ("negative", "positive"), ("negative", "positive"), [0, 1]),
        ([False, True], ("no", "yes"), ("no", "yes"), [0, 1]),
        (["True", "False"], ("no", "yes"), ("no", "yes"), [1, 0]),
        ([True, False], None, ("false", "true"), [1, 0]),
        ([1, 5, 3], None, ("1", "3", "5"), [0, 2, 1]),
        ([10, 9], None, ("9", "10"), [1, 0]),
        (["10", "9"], None, ("9", "10"), [1, 0]),
        ([1, 2], ("1", "2", "3"), ("1", "2", "3"), [0, 1]),  # by name before position
        ([1], ("a", "b"), ("a", "b"), [1]),  # not every class need occur
        ([0, None, 1, -1], None, ("0", "1"), [0, None, 1, None]),
        (["a", "", "b", " "], None, ("a", "b"), [0, None, 1, None]),
        (["01", "02"], ("01", "02"), ("01", "02"), [0, 1]),
    ],
)
def test_label_meanings(values, known, names, expected):
    assert ids(values, known) == (names, expected)


def test_declared_class_names_go_before_numbers():
    assert ids([1, 0], None, ["pos", "neg"]) == (("pos", "neg"), [1, 0])
    assert ids([1, 0, -1], ("neg", "pos"), ["pos", "neg"]) == (("neg", "pos"), [0, 1, None])
    with pytest.raises(LabelError, match="known are negative"):
        ids([0, 1], ("negative", "positive"), ["neg", "pos"])
    with pytest.raises(DataError, match="declares 2 classes"):
        ids([2], None, ["neg", "pos"])


@pytest.mark.parametrize(
    "values", [["a", 1], [True, 1], [0.5], [["a"]], [None], ["a"], [float("nan")], ["a" * 201, "b"]]
)
def test_what_is_no_label(values):
    with pytest.raises(DataError):
        ids(values)


def test_bools_need_two_known_names():
    with pytest.raises(LabelError):
        ids([True, False], ("a", "b", "c"))


@given(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=20), st.randoms())
def test_ids_do_not_depend_on_the_order_of_rows(values, random):
    try:
        first = map_labels(values, None, None, "here")
    except DataError:
        return
    random.shuffle(values)
    assert map_labels(values, None, None, "here") == first
