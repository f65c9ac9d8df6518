"""Convert the values of a label column to class ids: bools, whole numbers, names, or numbers written as text.

Two guarantees: the same names give the same ids on every run (given names keep their order, others are sorted), and a
label that is not among the given names is an error, never a new class.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from uhl_cli.errors import DataError, LabelError, NoLabelsError

MOST_LABELS = 1000
LONGEST_NAME = 200
MULTI_LABEL_HINT = "uhl gives each text one class; write one label a row, or choose another --label-column."
Label = str | int | bool

_CHOOSE = "Choose another --label-column."
# What spreadsheets and pandas write for a missing value.  "None" is not among them: it is a common name of a class.
_MISSING = frozenset({"nan", "NaN", "NAN", "NA", "N/A", "n/a", "#N/A", "<NA>", "null", "NULL", "Null"})
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,99})")
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d{0,99}))\.0{0,99}")  # what pandas makes of whole numbers beside a missing value
_LIST = re.compile(r"\[.*\]", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class LabelMap:
    """Label names, and the class id of every raw value; None marks an unlabelled row."""

    names: tuple[str, ...]
    ids: dict[object, int | None]


def map_labels(
    values: Iterable[object],
    class_names: Sequence[str] | None,
    known: Sequence[str] | None,
    origin: str,
    *,
    words: bool = False,
) -> LabelMap:
    """Class ids for the distinct raw `values` of a label column.

    Null, -1 and the empty string mean "unlabelled"; so do "nan", "NA" and the like, except as tags of words or
    where they are known names.  1.0 is 1.  With `known` names, text and class names are matched by name (then
    without regard to case), bools as (known[0], known[1]), ints by name and then by position.

    :param class_names: Names that the data declares for its ints (ClassLabel), or None.
    :param known: The names that the labels must map to, or None to use those of the data.
    :param origin: Where the values come from, for messages.
    :param words: The values are tags of words.
    :raises DataError: If these are not class labels: fractions, lists (also written as text), mixed types, one class,
        over 1000.
    :raises LabelError: If a label is not among the known names.
    """
    raw = _distinct(values, origin)
    missing = frozenset() if words else _MISSING.difference(known or (), class_names or ())
    named = {value: _named(value, class_names, missing, origin) for value in raw}
    meaning = _read_text(named, known, origin)
    labelled = {label for label in meaning.values() if label is not None}
    if not labelled:
        raise NoLabelsError(
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


def as_iob2(tags: list[Any], known: Sequence[str] | None = None) -> list[Any]:
    """A sentence's tags in IOB2, where every entity begins with B-; IOB1 has that only between entities of one type.

    Both schemes mark the same entities, and metrics read them alike; as classes of words they would differ.  Tags that
    are no text, and schemes with other prefixes (IOBES), stay.

    :param known: Names of the classes, if given; a tag stays when its IOB2 form is not among them.
    """
    if not all(isinstance(tag, str) and (tag == "O" or tag[:2] in ("B-", "I-")) for tag in tags):
        return tags
    found = []
    for before, tag in zip(["O", *tags], tags, strict=False):
        begins = tag.startswith("I-") and before[2:] != tag[2:]
        first = f"B-{tag[2:]}"
        found.append(first if begins and (known is None or first.strip() in known) else tag)
    return found


def _distinct(values: Iterable[object], origin: str) -> set[object]:
    distinct: set[object] = set()
    kinds: set[type] = set()
    for value in values:
        if isinstance(value, list):
            raise DataError(f"The labels of {origin} are lists: multi-label data.", MULTI_LABEL_HINT)
        if value is not None:
            if isinstance(value, float) and not value.is_integer():
                raise _decimal(origin)
            if not isinstance(value, (str, int, float)):  # bool is an int
                raise DataError(f"The labels of {origin} are of type {type(value).__name__}: not labels.", _CHOOSE)
            kinds.add(int if isinstance(value, float) else type(value))
        distinct.add(value)
        if len(distinct) > MOST_LABELS + len(_MISSING) + 3:  # null, -1 and the empty string are not labels
            raise _too_many(origin)
    if len(kinds) > 1:
        types = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"The labels of {origin} mix {types}.", "Write all labels in the same way.")
    return distinct


def _named(value: object, class_names: Sequence[str] | None, missing: Collection[str], origin: str) -> Label | None:
    if value is None or (isinstance(value, str) and value.strip() in ("", *missing)):
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        value = int(value)
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
    if any(_LIST.fullmatch(text) for text in texts):
        example = min(text for text in texts if _LIST.fullmatch(text))
        raise DataError(
            f"The labels of {origin} are lists, such as {example[:60]}: multi-label data.", MULTI_LABEL_HINT
        )
    numbers = {text: whole[1] if (whole := _WHOLE.fullmatch(text)) else text for text in texts}
    if all(_INTEGER.fullmatch(number) for number in numbers.values()):
        integers = {text: None if int(number) == -1 else int(number) for text, number in numbers.items()}
        return {value: integers.get(str(label)) if label is not None else None for value, label in named.items()}
    if all(_NUMBER.fullmatch(text) for text in texts):
        raise _decimal(origin)
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


def _decimal(origin: str) -> DataError:
    return DataError(
        f"The labels of {origin} are decimal numbers: not a classification task.",
        "Choose another --label-column, or write the classes as whole numbers or names.",
    )


def _too_many(origin: str) -> DataError:
    return DataError(f"{origin} has over {MOST_LABELS} different labels: not a classification task.", _CHOOSE)
