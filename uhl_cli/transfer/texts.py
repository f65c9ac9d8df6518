"""The transfer set: texts, spans of them, and a teacher's outputs on both.

It carries behaviour to a target (docs/method.md, "Transfer set"), which learns a task from it without labels, without
the source model and without the task's data.  Spans cost no bytes: a fixed rule derives them from the texts, so a file
stores only the outputs on a span.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from uhl_cli.data.examples import Examples, token_examples

# Outputs are log-odds in whole steps of this size (natural logarithm), clipped at `MAX_LEVEL` steps.
STEP = 1.0
MAX_LEVEL = 7

Codes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TransferTexts:
    """The texts of a transfer set, without the teacher's outputs.

    :param texts: Single lines, with each run of white space replaced by one space.
    :param pairs: The second text of each, or None for a task on single texts.
    :param spans: Number of spans of each text (with pairs, of each second text) that are examples as well.
    :param words: Whether the examples are of a token task; its words are separated by spaces.
    :param origin: Where the texts come from.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    spans: int
    words: bool
    origin: str

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def digest(self) -> str:
        """SHA-256 over the texts and the rule of their spans."""
        content = "\n".join((*self.texts, *(self.pairs or ()))) + f"\0{self.spans}\0{self.words}"
        return hashlib.sha256(content.encode()).hexdigest()

    def first(self, count: int) -> TransferTexts:
        """The first `count` texts."""
        pairs = None if self.pairs is None else self.pairs[:count]
        return TransferTexts(self.texts[:count], pairs, self.spans, self.words, self.origin)

    def owners(self) -> list[int]:
        """For each of `examples()`, the index of its text."""
        found = []
        for index, text in enumerate(self.texts if self.pairs is None else self.pairs):
            found += [index] * (1 + len(drawn_spans(text.count(" ") + 1, index, self.spans)))
        return found

    def examples(self) -> Examples:
        """Every text followed by its spans, as examples with placeholder classes (all 0).

        Each span is a separate example; with pairs, its first text is the whole first text.
        """
        texts: list[str] = []
        pairs: list[str] | None = None if self.pairs is None else []
        for index, text in enumerate(self.texts):
            whole = text if self.pairs is None else self.pairs[index]
            parts = whole.split(" ")
            found = [whole, *(" ".join(parts[start:end]) for start, end in drawn_spans(len(parts), index, self.spans))]
            if pairs is None:
                texts += found
            else:
                texts += [text] * len(found)
                pairs += found
        if self.words:
            sentences = [text.split(" ") for text in texts]
            return token_examples(sentences, [[0] * len(sentence) for sentence in sentences])
        return Examples(tuple(texts), None if pairs is None else tuple(pairs), labels=(0,) * len(texts))


@dataclass(frozen=True)
class TransferSet:
    """Texts with a teacher's outputs.  P predictions: examples of a sequence task, words of a token task.

    :param codes: int8 [P, labels - 1], within -7..7: log-odds of every class but the first against the first, in steps
        of `STEP`.
    :param teacher: Description of the teacher, for display.
    """

    texts: TransferTexts
    codes: Codes
    teacher: str

    def examples(self) -> Examples:
        """The examples, with the teacher's most probable class as label or tag."""
        bare, classes = self.texts.examples(), self.log_odds().argmax(1).tolist()
        if bare.words is None:
            return Examples(bare.texts, bare.pairs, labels=tuple(classes))
        taken = iter(classes)
        return Examples(bare.texts, words=bare.words, tags=tuple(tuple(next(taken) for _ in row) for row in bare.words))

    def whole(self, count: int) -> tuple[Examples, Floats]:
        """The first `count` texts without their spans, and the log-odds [predictions, labels] of their predictions."""
        examples, owners, odds = self.examples(), self.texts.owners(), self.log_odds()
        rows = [row for row, owner in enumerate(owners) if row == 0 or owners[row - 1] != owner][:count]
        counts = [1] * len(examples) if examples.words is None else [len(row) for row in examples.words]
        starts = np.cumsum([0, *counts])
        parts = [odds[starts[row] : starts[row] + counts[row]] for row in rows]
        return examples.select(rows), np.concatenate(parts)

    def log_odds(self) -> Floats:
        """float32 [P, labels]: the teacher's log-odds against the first class, whose column is zero."""
        codes = np.concatenate([np.zeros((len(self.codes), 1), dtype=np.int8), self.codes], axis=1)
        odds: Floats = codes.astype(np.float32) * np.float32(STEP)
        return odds


def quantised_log_odds(logits: Floats) -> Codes:
    """Codes int8 [P, labels - 1] of logits [P, labels], see `TransferSet`."""
    odds = logits[:, 1:] - logits[:, :1]
    codes: Codes = np.clip(np.rint(odds / STEP), -MAX_LEVEL, MAX_LEVEL).astype(np.int8)
    return codes


def drawn_spans(num_words: int, index: int, count: int) -> list[tuple[int, int]]:
    """Spans [start, end) of a text of `num_words` words, none of them the whole; fewer than `count` for a short text.

    They are part of the file format: drawn from SHA-256, so every machine and every version draws the same.

    :param index: Number of the text.
    """
    found: list[tuple[int, int]] = []
    if num_words < 2:
        return found
    numbers = _numbers(index)
    for _ in range(count):
        length = 1 + next(numbers) % (num_words - 1)
        start = next(numbers) % (num_words - length + 1)
        if (start, start + length) not in found:
            found.append((start, start + length))
    return found


def _numbers(index: int) -> Iterator[int]:
    """32-bit pseudo-random numbers that depend on the text's index alone."""
    block = 0
    while True:
        drawn = hashlib.sha256(f"{index}.{block}".encode()).digest()
        for start in range(0, len(drawn), 4):
            yield int.from_bytes(drawn[start : start + 4], "big")
        block += 1


def single_lines(texts: Sequence[str]) -> list[str]:
    """The texts with each run of white space replaced by one space."""
    return [" ".join(text.split()) for text in texts]


def without_contained(texts: Sequence[str]) -> list[int]:
    """Indices of the texts that are not contained, as a run of words, in a longer text; of equal texts the first.

    Data sets of phrases contain most texts several times; spans of the longer texts replace them.
    """
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index].split(" ")), index))
    seen: set[int] = set()
    kept = []
    for index in order:
        words = texts[index].split(" ")
        if not texts[index] or hash(texts[index]) in seen:
            continue
        kept.append(index)
        if len(words) <= _MAX_WORDS:
            for start in range(len(words)):
                for end in range(start + 1, len(words) + 1):
                    seen.add(hash(" ".join(words[start:end])))
        else:
            seen.add(hash(texts[index]))
    return sorted(kept)


# In longer texts, contained runs are not searched: their number grows with the square of the length.
_MAX_WORDS = 64


def count_examples(texts: TransferTexts) -> tuple[int, int]:
    """Number of examples, and of predictions: one per example of a sequence task, one per word of a token task."""
    examples = predictions = 0
    for index, text in enumerate(texts.texts if texts.pairs is None else texts.pairs):
        words = text.count(" ") + 1
        spans = drawn_spans(words, index, texts.spans)
        examples += 1 + len(spans)
        predictions += words + sum(end - start for start, end in spans) if texts.words else 1 + len(spans)
    return examples, predictions
