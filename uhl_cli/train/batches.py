"""Batches of similar length, in an order that depends only on the seed and the epoch.

Without other state between steps, a run can be resumed at any step and sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from uhl_cli.data.examples import Examples

# Examples are sorted by length within groups of this many batches: little padding, still a random order.
BATCHES_PER_GROUP = 50


def batches_of_epoch(examples: Examples, *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of every batch of one epoch; only the last drawn batch may be smaller."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(examples))
    lengths = np.array([len(text) for text in examples.texts], dtype=np.int64)
    if examples.pairs is not None:
        lengths = lengths + np.array([len(text) for text in examples.pairs], dtype=np.int64)
    batches: list[list[int]] = []
    group = batch_size * BATCHES_PER_GROUP
    for start in range(0, len(order), group):
        rows = order[start : start + group]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[place : place + batch_size].tolist() for place in range(0, len(rows), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of batches that `batches_of_epoch` gives."""
    group = batch_size * BATCHES_PER_GROUP
    full, rest = divmod(num_examples, group)
    return full * BATCHES_PER_GROUP + -(-rest // batch_size)


def batches_from(
    examples: Examples, *, batch_size: int, seed: int, first_step: int, last_step: int
) -> Iterator[tuple[int, list[int]]]:
    """(step, row numbers) for the steps first_step .. last_step - 1, over as many epochs as needed."""
    per_epoch = steps_per_epoch(len(examples), batch_size)
    step = first_step
    while step < last_step:
        epoch, offset = divmod(step, per_epoch)
        for rows in batches_of_epoch(examples, batch_size=batch_size, seed=seed, epoch=epoch)[offset:]:
            if step >= last_step:
                return
            yield step, rows
            step += 1
