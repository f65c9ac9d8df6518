"""Convert the values of a label column to class ids: bools, ints, names, or numbers written as text.

Two guarantees: the same names give the same ids on every run (given names keep their order, others are sorted), and a
label that is not among the given names is an error, never a new class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from uhl_cli.errors import DataError, LabelError

MOST_LABELS = 1000
LONGEST_NAME = 200
Label = str | int | bool

_CHOOSE = "Choose another --label-column."
_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class LabelMap:
    """Label names, and the class id of every raw value; None marks an unlabelled row."""

    names: tuple[str, ...]
    ids: dict[object, int | None]


def map_labels(
    values: Iterable[object], class_names: Sequence[str] | None, known: Sequence[str] | None, origin: str
) -> LabelMap:
    """Class ids for the distinct raw `values` of a label column.

    Null, -1 and the empty string mean "unlabelled".  With `known` names, text and class names are matched by name (then
    without regard to case), bools as (known[0], known[1]), ints by name and then by position.

    :param class_names: Names that the data declares for its ints (ClassLabel), or None.
    :param known: The names that the labels must map to, or None to use those of the data.
    :param origin: Where the values come from, for messages.
    :raises DataError: If these are not class labels: floats, lists, mixed types, one class, over 1000.
    :raises LabelError: If a label is not among the known names.
    """
    raw = _distinct(values, origin)
    named = {value: _named(value, class_names, origin) for value in raw}
    meaning = _read_text(named, known, origin)
    labelled = {label for label in meaning.values() if label is not None}
    if not labelled:
        raise DataError(
            f"No row of {origin} has a label.",
            "Choose another --label-column, or a split whose labels are public.",
        )
    if known is None and class_names is not None:
        known = class_names
    names = tuple(known) if known is not None else _own_names(labelled, origin)
    if len(set(names)) != len(names) or len(names) < 2 or "" in names:
        raise DataError(
            f"The classes of {origin} are {', '.join(names)!r}: not two or more different names.",
            "Give data with two or more classes.",
        )
    if len(names) > MOST_LABELS:
        raise _too_many(origin)
    if any(len(name) > LONGEST_NAME for name in names):
        raise DataError(f"{origin} has labels of over {LONGEST_NAME} characters: not names of classes.", _CHOOSE)
    by_label = _match(labelled, names, origin)
    return LabelMap(names, {value: None if label is None else by_label[label] for value, label in meaning.items()})


def _distinct(values: Iterable[object], origin: str) -> set[object]:
    distinct: set[object] = set()
    kinds: set[type] = set()
    for value in values:
        if value is not None:
            kinds.add(type(value))
            if not isinstance(value, (str, int)):  # bool is an int
                what = "not a classification task" if isinstance(value, float) else "not labels"
                raise DataError(
                    f"The labels of {origin} are of type {type(value).__name__}: {what}.",
                    "Choose another --label-column, or write the classes as whole numbers or names.",
                )
        distinct.add(value)
        if len(distinct) > MOST_LABELS + 3:  # null, -1 and the empty string are not labels
            raise _too_many(origin)
    if len(kinds) > 1:
        types = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"The labels of {origin} mix {types}.", "Write all labels in the same way.")
    return distinct


def _named(value: object, class_names: Sequence[str] | None, origin: str) -> Label | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value == -1:
            return None
        if class_names is None:
            return value
        if not 0 <= value < len(class_names):
            raise DataError(
                f"{origin} has class id {value}, but declares {len(class_names)} classes.",
                "Repair the data, or choose another --label-column.",
            )
        return class_names[value]
    return str(value).strip()


def _read_text(
    named: dict[object, Label | None], known: Sequence[str] | None, origin: str
) -> dict[object, Label | None]:
    """Convert numbers and truth values that a text file stores as text."""
    texts = {label for label in named.values() if isinstance(label, str)}
    if not texts or (known is not None and texts <= set(known)):
        return named
    if all(_INTEGER.fullmatch(text) for text in texts):
        integers = {text: None if int(text) == -1 else int(text) for text in texts}
        return {value: integers.get(str(label)) if label is not None else None for value, label in named.items()}
    if all(_NUMBER.fullmatch(text) for text in texts):
        raise DataError(
            f"The labels of {origin} are decimal numbers: not a classification task.",
            "Choose another --label-column, or write the classes as whole numbers or names.",
        )
    if {text.casefold() for text in texts} <= {"true", "false"}:
        return {v: label.casefold() == "true" if isinstance(label, str) else None for v, label in named.items()}
    return named


def _own_names(labelled: set[Label], origin: str) -> tuple[str, ...]:
    if any(isinstance(label, bool) for label in labelled):
        return ("false", "true")
    integers = sorted(label for label in labelled if isinstance(label, int))
    names = tuple(str(label) for label in integers) or tuple(sorted(str(label) for label in labelled))
    if len(names) < 2:
        raise DataError(f"All rows of {origin} have the label {names[0]!r}.", "Give data with two or more classes.")
    return names


def _match(labelled: set[Label], names: tuple[str, ...], origin: str) -> dict[Label, int]:
    exact = {name: index for index, name in enumerate(names)}
    if any(isinstance(label, bool) for label in labelled):
        if len(names) == 2:
            return {False: 0, True: 1}
    elif all(str(label) in exact for label in labelled):
        return {label: exact[str(label)] for label in labelled}
    elif all(isinstance(label, int) and 0 <= label < len(names) for label in labelled):
        return {label: int(label) for label in labelled}
    else:
        folded = {name.casefold(): index for index, name in enumerate(names)}
        if len(folded) == len(names) and all(str(label).casefold() in folded for label in labelled):
            return {label: folded[str(label).casefold()] for label in labelled}
    have = ", ".join(sorted(str(label) for label in labelled)[:20])
    raise LabelError(
        f"{origin} has the labels {have}; known are {', '.join(names[:20])}.",
        "Rename the labels in the data, or choose another --label-column.",
    )


def _too_many(origin: str) -> DataError:
    return DataError(f"{origin} has over {MOST_LABELS} different labels: not a classification task.", _CHOOSE)
