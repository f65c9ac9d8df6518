"""Columns that predictions add to an input: labels and probabilities of texts, or tags and entities of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uhl_cli.data import Examples
from uhl_cli.data.load import metric_of
from uhl_cli.data.parsing import Row
from uhl_cli.data.writer import Kind, json_line
from uhl_cli.metrics import entities_of

# Decimal places of a probability; further ones change with the batch.
_PLACES = 6
# Maximum number of probabilities per text in the table for people.
_SHOWN = 4


class OfTexts:
    """`label`, and `probability_NAME` of every class, or of the `top_k` most probable classes of each text.

    :param threshold: If the largest probability is below it, the label is null.
    """

    heading = ("label", "probabilities")

    def __init__(self, names: Sequence[str], *, prefix: str, top_k: int | None, threshold: float | None) -> None:
        self._label = f"{prefix}label"
        self._columns = tuple(f"{prefix}probability_{name}" for name in names)
        self._names = tuple(names)
        self._top_k = top_k
        self._threshold = threshold or 0.0
        self.held: dict[str, Kind] = {self._label: "text", **dict.fromkeys(self._columns, "number")}

    def rows(self, texts: Sequence[str], examples: Examples, logits: Sequence[Tensor]) -> list[Row]:
        """The added columns of each text of a chunk."""
        found = torch.cat(list(logits))
        order = found.argsort(dim=-1, descending=True, stable=True)[:, : self._top_k]
        rows: list[Row] = []
        for values, best in zip(found.softmax(-1).tolist(), order.tolist(), strict=True):
            row: Row = {self._label: self._names[best[0]] if values[best[0]] >= self._threshold else None}
            rows.append(row | {self._columns[place]: round(values[place], _PLACES) for place in sorted(best)})
        return rows

    def labels(self, row: Row) -> list[str | None]:
        """The label of a row's text."""
        return [row[self._label]]

    def counted(self, row: Row) -> list[str]:
        """The label again, if there is one."""
        return [label for label in self.labels(row) if label is not None]

    def cells(self, row: Row) -> tuple[str, ...]:
        """The cells below `heading` in a table for people."""
        named = zip(self._names, self._columns, strict=True)
        best = sorted(((row[column], name) for name, column in named if column in row), reverse=True)
        shown = ", ".join(f"{name} {value:.3f}" for value, name in best[:_SHOWN])
        return row[self._label] or "-", shown + (", ..." if len(best) > _SHOWN else "")


class OfWords:
    """`tags` of words with the `probabilities` of these tags, and `entities` where the tags are of entities.

    An entity has `start`, `end`, `label` and `text`: the characters [start, end) of the text.  If the input was texts,
    their `words` are added; if it was lists of words, the `text`, which joins them by spaces.

    :param threshold: A tag whose probability is below it is null and in no entity, like that of a word cut off.
    :param whole: The input was texts, not lists of words.
    """

    def __init__(self, names: Sequence[str], *, prefix: str, threshold: float | None, whole: bool) -> None:
        self._names = tuple(names)
        self._threshold = threshold or 0.0
        self._whole = whole
        self._given = f"{prefix}{'words' if whole else 'text'}"
        self._tags, self._probabilities = f"{prefix}tags", f"{prefix}probabilities"
        self._entities = f"{prefix}entities" if metric_of("tokens", names) == "entity_f1" else None
        self.held: dict[str, Kind] = {self._given: "texts" if whole else "text"}
        self.held |= {self._tags: "texts", self._probabilities: "numbers"}
        if self._entities is not None:
            self.held[self._entities] = "entities"
        self.heading = ("tags",) if self._entities is None else ("entities",)

    def rows(self, texts: Sequence[str], examples: Examples, logits: Sequence[Tensor]) -> list[Row]:
        """The added columns of each text of a chunk; the words of `examples` are joined by spaces."""
        rows: list[Row] = []
        for text, joined, spans, found in zip(texts, examples.texts, examples.words or (), logits, strict=True):
            values, places = found.softmax(-1).max(-1)
            # A classifier gives zeros for a word that it did not read because the text was cut before it.
            read = found.any(-1).tolist()
            tags = [
                self._names[place] if known and value >= self._threshold else None
                for known, value, place in zip(read, values.tolist(), places.tolist(), strict=True)
            ]
            words = [joined[start:end] for start, end in spans]
            row: Row = {
                self._given: words if self._whole else joined,
                self._tags: tags,
                self._probabilities: [round(value, _PLACES) for value in values.tolist()],
            }
            if self._entities is not None:
                row[self._entities] = _entities(text, tags, _places(text, words))
            rows.append(row)
        return rows

    def labels(self, row: Row) -> list[str | None]:
        """The tags of a row's words."""
        tags: list[str | None] = row[self._tags]
        return tags

    def counted(self, row: Row) -> list[str]:
        """The label of each entity, or the tag of each word if tags are not of entities."""
        if self._entities is not None:
            return [entity["label"] for entity in row[self._entities]]
        return [tag for tag in self.labels(row) if tag is not None]

    def cells(self, row: Row) -> tuple[str, ...]:
        """The cells below `heading` in a table for people."""
        if self._entities is not None:
            return (", ".join(f"{entity['text']} ({entity['label']})" for entity in row[self._entities]),)
        return (" ".join(tag or "-" for tag in self.labels(row)),)


Added = OfTexts | OfWords


@dataclass(frozen=True)
class Labelled:
    """A chunk of the input with its predictions, one entry per text.

    :param rows: The input's columns, followed by those of `added`.
    """

    texts: list[str]
    rows: list[Row]
    added: Added

    def json(self) -> list[str]:
        """Each row as JSON on one line."""
        return [json_line(row) for row in self.rows]


def _places(text: str, words: Sequence[str]) -> list[tuple[int, int]]:
    """Character positions [start, end) of the words of a text, in their order."""
    places, end = [], 0
    for word in words:
        start = text.index(word, end)
        end = start + len(word)
        places.append((start, end))
    return places


def _entities(text: str, tags: Sequence[str | None], places: Sequence[tuple[int, int]]) -> list[Row]:
    found = []
    for label, first, last in entities_of([tag or "O" for tag in tags]):
        start, end = places[first][0], places[last][1]
        found.append({"start": start, "end": end, "label": label, "text": text[start:end]})
    return found
