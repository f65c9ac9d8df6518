"""Read chosen rows of a table into `Examples`; a row that cannot be read is an error with its number."""

from __future__ import annotations

from collections.abc import Sequence

from uhl_cli.data.columns import Columns
from uhl_cli.data.examples import Examples, token_examples
from uhl_cli.data.labels import LabelMap
from uhl_cli.data.table import Table
from uhl_cli.errors import DataError


def labelled_rows(table: Table, columns: Columns, label_map: LabelMap) -> list[int]:
    """Indices of the rows that have a label; for token tasks, of the sentences that have words and tags.

    :raises DataError: If there are none, or a sentence has tags on some of its words only.
    """
    indices = []
    for index, value in enumerate(table.column(columns.label)):
        if columns.kind == "sequence":
            if label_map.ids[value] is not None:
                indices.append(index)
            continue
        if value is None:
            continue
        if not isinstance(value, list):
            raise _bad(table, index, columns.label, "a list of tags", value)
        tagged = [label_map.ids[tag] is not None for tag in value]
        if any(tagged) and not all(tagged):
            raise DataError(
                f"Row {index + 1} of {table.origin} has words without a tag.",
                "Tag each word; write O outside.",
            )
        if any(tagged):
            indices.append(index)
    if not indices:
        raise DataError(
            f"No row of {table.origin} has a label.",
            "Choose another split (the labels of test splits are often hidden) or another --label-column.",
        )
    return indices


def read_rows(table: Table, columns: Columns, label_map: LabelMap, indices: Sequence[int]) -> Examples:
    """The examples in the rows at `indices`, all of which have labels.

    :raises DataError: If a text is null or not text, or words and tags differ in number.
    """
    raw_labels = table.column(columns.label, indices)
    if columns.tokens is None:
        assert columns.text is not None  # resolve_columns gives either tokens or text
        return Examples(
            texts=_texts(table, columns.text, indices),
            pairs=None if columns.pair is None else _texts(table, columns.pair, indices),
            labels=tuple(_class_id(label_map, value) for value in raw_labels),
        )
    words: list[list[str]] = []
    tags: list[list[int]] = []
    for index, sentence, row in zip(indices, table.column(columns.tokens, indices), raw_labels, strict=True):
        if not isinstance(sentence, list) or not all(isinstance(word, str) for word in sentence):
            raise _bad(table, index, columns.tokens, "a list of words", sentence)
        assert isinstance(row, list)  # labelled_rows took no other
        if len(sentence) != len(row):
            raise DataError(
                f"Row {index + 1} of {table.origin} has {len(sentence)} words but {len(row)} tags.",
                "Give one tag a word.",
            )
        words.append(sentence)
        tags.append([_class_id(label_map, tag) for tag in row])
    return token_examples(words, tags)


def _texts(table: Table, column: str, indices: Sequence[int]) -> tuple[str, ...]:
    texts = []
    for index, value in zip(indices, table.column(column, indices), strict=True):
        if not isinstance(value, str):
            raise _bad(table, index, column, "text", value)
        texts.append(value)
    return tuple(texts)


def _class_id(label_map: LabelMap, value: object) -> int:
    label = label_map.ids[value]
    assert label is not None  # labelled_rows took no other
    return label


def _bad(table: Table, index: int, column: str, wanted: str, value: object) -> DataError:
    found = "null" if value is None else f"of type {type(value).__name__}"
    return DataError(
        f"Column {column!r} is {found} in row {index + 1} of {table.origin}, not {wanted}.",
        "Repair or remove the row, or choose another column.",
    )
