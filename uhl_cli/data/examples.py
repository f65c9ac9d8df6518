"""The examples of one split, immutable and free of any library's own types.

Characters are counted as Python counts them, so the spans of words can be compared with the offsets that a fast
tokenizer gives.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from uhl_cli.data.tasks import Task
from uhl_cli.errors import DataError, UsageError

Span = tuple[int, int]


@dataclass(frozen=True)
class Examples:
    """Texts with their classes; every field that is not None has one entry per example.

    :param texts: The text to read; for a token task the words joined by single spaces.
    :param pairs: The second text of each example, or None for a task on single texts.
    :param labels: Class ids of a sequence task, else None.
    :param words: For a token task, the (start, end) characters of each word in `texts[i]`, else None.
    :param tags: For a token task, a class id for each word, else None.
    :raises DataError: If the lengths differ, or the fields are neither those of a sequence task nor those of a token
        task.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None
    words: tuple[tuple[Span, ...], ...] | None = None
    tags: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        sequence = self.labels is not None and self.words is None and self.tags is None
        tokens = self.labels is None and self.words is not None and self.tags is not None
        if not (sequence or (tokens and self.pairs is None)):
            raise DataError(
                "Examples have either labels, or words and tags.",
                "Make them with uhl_cli.data.load_task or token_examples.",
            )
        for name in ("pairs", "labels", "words", "tags"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.texts):
                raise DataError(f"{len(self.texts)} texts have {len(values)} {name}.", "Give one entry an example.")
        for row, (words, tags) in enumerate(zip(self.words or (), self.tags or (), strict=True), 1):
            if len(words) != len(tags):
                raise DataError(f"Row {row} has {len(words)} words but {len(tags)} tags.", "Give one tag a word.")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> Examples:
        """The examples at `indices`, in that order.

        :raises IndexError: If an index is out of range.
        """
        chosen = list(indices)
        parts: dict[str, Any] = {}
        for part in fields(self):
            values = getattr(self, part.name)
            parts[part.name] = None if values is None else tuple(values[index] for index in chosen)
        return Examples(**parts)

    def followed_by(self, others: Examples) -> Examples:
        """These examples followed by the others, which must be of the same kind of task.

        :raises DataError: If only one of the two has pairs, or their kinds differ.
        """
        parts: dict[str, Any] = {}
        for part in fields(self):
            first, second = getattr(self, part.name), getattr(others, part.name)
            if (first is None) != (second is None):
                raise DataError(f"one of two sets of examples alone has {part.name}.", "Give data of one kind of task.")
            parts[part.name] = None if first is None else first + second
        return Examples(**parts)

    def split(self, fraction: float, seed: int) -> tuple[Examples, Examples]:
        """(rest, held out): a seeded random `fraction` held out, both parts in their old order.

        :raises DataError: If there are fewer than two examples.
        :raises UsageError: If the fraction is not between 0 and 1.
        """
        rest, held_out = split_indices(len(self), fraction, seed)
        return self.select(rest), self.select(held_out)

    def digest(self) -> str:
        """SHA-256 of the content, in hex: equal exactly for equal examples in equal order."""
        sha = hashlib.sha256()
        for part in fields(self):
            # JSON strings cannot contain a bare newline, so no two contents share an encoding.
            sha.update(f"{part.name}\n".encode())
            for value in getattr(self, part.name) or ():
                sha.update(json.dumps(value, ensure_ascii=True).encode() + b"\n")
        return sha.hexdigest()

    def label_counts(self, num_labels: int) -> tuple[int, ...]:
        """How often each class occurs: examples of a sequence task, words of a token task.

        :raises DataError: If a class id is not below `num_labels`.
        """
        ids = self.labels if self.labels is not None else [tag for tags in self.tags or () for tag in tags]
        counts = [0] * num_labels
        for label in ids:
            if not 0 <= label < num_labels:
                raise DataError(
                    f"Class id {label} is not one of {num_labels} labels.", "Load the data with its labels."
                )
            counts[label] += 1
        return tuple(counts)


def token_examples(words: Sequence[Sequence[str]], tags: Sequence[Sequence[int]]) -> Examples:
    """Examples of a token task from the words of each sentence and a class id for each word.

    :raises DataError: If the numbers of words and tags differ.
    """
    spans = []
    for sentence in words:
        start = 0
        row = []
        for word in sentence:
            row.append((start, start + len(word)))
            start += len(word) + 1  # the space between words
        spans.append(tuple(row))
    return Examples(
        texts=tuple(" ".join(sentence) for sentence in words),
        words=tuple(spans),
        tags=tuple(tuple(row) for row in tags),
    )


def split_indices(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(rest, held out) of `range(count)`, each sorted and neither empty.

    :raises DataError: If there are fewer than two examples.
    :raises UsageError: If the fraction is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise UsageError(f"Cannot hold out a fraction of {fraction}.", "Give a fraction between 0 and 1.")
    if count < 2:
        raise DataError(
            f"{count} example(s) cannot be split for training and evaluation.",
            "Give more data, or training and evaluation files of their own.",
        )
    held = min(count - 1, max(1, round(count * fraction)))
    order = shuffled(count, seed)
    return sorted(order[held:]), sorted(order[:held])


def subset_indices(count: int, limit: int | None, seed: int) -> list[int]:
    """A seeded random subset of `range(count)`, sorted; all of it if `limit` is None or larger.

    With the same seed, a smaller limit gives a subset of a larger limit's.

    :raises UsageError: If the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} examples leaves nothing.", "Give a limit of 1 or more.")
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(shuffled(count, seed)[:limit])


def shuffled(count: int, seed: int) -> list[int]:
    """`range(count)` in an order that depends only on `count` and `seed`."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class TaskData:
    """A task with its examples; a part that was not requested is None.

    :param source: Where the examples came from and what was left out, for display.
    """

    task: Task
    train: Examples | None
    evaluation: Examples | None
    source: str
