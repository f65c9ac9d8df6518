"""Examples are immutable and keep their parts together."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhl_cli.data.examples import Examples, token_examples
from uhl_cli.errors import DataError, UsageError

SOME = Examples(texts=("a", "b", "c", "d"), pairs=("1", "2", "3", "4"), labels=(0, 1, 1, 1))


def test_select_keeps_order_and_parts():
    chosen = SOME.select([2, 0])
    assert chosen == Examples(texts=("c", "a"), pairs=("3", "1"), labels=(1, 0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOME.texts = ()


def test_examples_follow_others_of_their_kind():
    both = SOME.select([3]).followed_by(SOME)
    assert both == SOME.select([3, 0, 1, 2, 3])
    single, words = Examples(texts=("a",), labels=(0,)), token_examples([["a"]], [[1]])
    assert words.followed_by(words).tags == ((1,), (1,))
    for other in (single, words):
        with pytest.raises(DataError, match="alone has"):
            SOME.followed_by(other)


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_split_is_a_partition(count, fraction, seed):
    examples = Examples(texts=tuple(map(str, range(count))), labels=(0,) * count)
    rest, held_out = examples.split(fraction, seed)
    assert sorted((*rest.texts, *held_out.texts), key=int) == list(examples.texts)
    assert len(rest) > 0
    assert len(held_out) > 0
    assert abs(len(held_out) - fraction * count) <= 1
    assert examples.split(fraction, seed) == (rest, held_out)


def test_split_refuses_nonsense():
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UsageError):
            SOME.split(fraction, 0)
    with pytest.raises(DataError):
        SOME.select([0]).split(0.5, 0)


def test_digest_sees_every_part_and_the_order():
    variants = [
        SOME,
        dataclasses.replace(SOME, pairs=None),
        dataclasses.replace(SOME, labels=(1, 1, 1, 1)),
        SOME.select([1, 0, 2, 3]),
        SOME.select([0]),
        dataclasses.replace(SOME, texts=("a\nb", "", "c", "d")),
        dataclasses.replace(SOME, texts=("a", "b\n", "c", "d")),
    ]
    assert len({each.digest() for each in variants}) == len(variants)
    assert dataclasses.replace(SOME).digest() == SOME.digest()


def test_label_counts():
    assert SOME.label_counts(3) == (1, 3, 0)
    assert token_examples([["a", "b"], ["c"]], [[0, 2], [2]]).label_counts(3) == (1, 0, 2)
    with pytest.raises(DataError, match="not one of 1 labels"):
        SOME.label_counts(1)


@given(st.lists(st.lists(st.text(max_size=4), max_size=5), max_size=4))
def test_spans_cut_the_words_out_of_the_text(sentences):
    examples = token_examples(sentences, [[0] * len(words) for words in sentences])
    for text, spans, words in zip(examples.texts, examples.words, sentences, strict=True):
        assert [text[start:end] for start, end in spans] == words


@pytest.mark.parametrize(
    "parts",
    [
        {"texts": ("a",)},
        {"texts": ("a",), "labels": (0, 1)},
        {"texts": ("a",), "labels": (0,), "tags": ((0,),)},
        {"texts": ("a",), "words": (((0, 1),),)},
        {"texts": ("a",), "words": (((0, 1),),), "tags": ((0, 1),)},
        {"texts": ("a",), "pairs": (), "labels": (0,)},
    ],
)
def test_parts_must_fit(parts):
    with pytest.raises(DataError):
        Examples(**parts)
