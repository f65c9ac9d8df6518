"""Batches cover every example once an epoch, and depend on the seed and the epoch alone."""

import pytest

from uhl_cli.data import Examples
from uhl_cli.train.batches import BATCHES_PER_GROUP, batches_from, batches_of_epoch, steps_per_epoch


def examples(count, pairs=False):
    texts = tuple("x" * (1 + number * 7 % 31) for number in range(count))
    return Examples(texts=texts, pairs=texts if pairs else None, labels=(0,) * count)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
@pytest.mark.parametrize("count", [1, 5, 63, 4 * BATCHES_PER_GROUP + 3])
def test_every_example_exactly_once(count, batch_size):
    batches = batches_of_epoch(examples(count), batch_size=batch_size, seed=3, epoch=2)
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    assert max(map(len, batches)) <= batch_size
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert len(batches) == steps_per_epoch(count, batch_size)


def test_order_depends_on_seed_and_epoch_only():
    data = examples(60)
    first = batches_of_epoch(data, batch_size=8, seed=0, epoch=0)
    assert batches_of_epoch(data, batch_size=8, seed=0, epoch=0) == first
    assert batches_of_epoch(data, batch_size=8, seed=1, epoch=0) != first
    assert batches_of_epoch(data, batch_size=8, seed=0, epoch=1) != first


def test_texts_of_a_batch_are_of_similar_length():
    data = examples(310)
    lengths = [
        [len(data.texts[row]) for row in batch] for batch in batches_of_epoch(data, batch_size=10, seed=0, epoch=0)
    ]
    assert max(max(row) - min(row) for row in lengths) <= 1


@pytest.mark.parametrize("first_step", [0, 1, 7, 8, 9, 16, 29])
def test_a_later_start_gives_the_same_tail(first_step):
    data = examples(60, pairs=True)  # eight steps an epoch
    whole = list(batches_from(data, batch_size=8, seed=5, first_step=0, last_step=30))
    assert [step for step, _ in whole] == list(range(30))
    assert list(batches_from(data, batch_size=8, seed=5, first_step=first_step, last_step=30)) == whole[first_step:]


def test_no_step_is_left():
    assert list(batches_from(examples(8), batch_size=4, seed=0, first_step=9, last_step=9)) == []
