"""Two files of the same kind side by side: header fields, values of the parts, and anchors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from uhl_cli.errors import FormatError
from uhl_cli.formats.adapter import AdapterFile, Quantised, values_of
from uhl_cli.formats.task import TaskFile
from uhl_cli.inspect.content import Opened
from uhl_cli.inspect.report import AnchorDifference, Comparison, FieldDifference, InspectReport, PartDifference
from uhl_cli.schema import Frozen

Doubles = npt.NDArray[np.float64]


def compare_files(first: Opened, second: Opened) -> InspectReport:
    """The report of the first file with what differs in the second.

    :raises FormatError: When one is an adapter and one a task file.
    """
    one, two = first.content, second.content
    anchors = None
    if isinstance(one, AdapterFile) and isinstance(two, AdapterFile):
        fields, anchors = _different_fields(one.manifest, two.manifest), _compare_anchors(one, two)
    elif isinstance(one, TaskFile) and isinstance(two, TaskFile):
        fields = _different_fields(one.record, two.record)
    else:
        raise FormatError(
            f"{first.path} and {second.path} are an adapter and a task file.",
            "Compare two adapters, or two task files.",
        )
    parts, same_parts = _different_parts(one, two)
    return InspectReport(
        file=str(first.path),
        kind="task" if anchors is None else "adapter",
        format_version=first.contents.version,
        bytes=first.contents.size,
        comparison=Comparison(
            other=str(second.path),
            other_bytes=second.contents.size,
            identical=first.contents == second.contents,
            fields=fields,
            parts=parts,
            same_parts=same_parts,
            anchors=anchors,
        ),
    )


def _different_fields(first: Frozen, second: Frozen) -> tuple[FieldDifference, ...]:
    """Fields of two headers that differ, by dotted name; lists count as one field."""
    one, two = (dict(_flat("", record.model_dump(mode="json"))) for record in (first, second))
    return tuple(
        FieldDifference(name=name, first=one.get(name), second=two.get(name))
        for name in dict.fromkeys([*one, *two])
        if one.get(name) != two.get(name)
    )


def _different_parts(
    first: AdapterFile | TaskFile, second: AdapterFile | TaskFile
) -> tuple[tuple[PartDifference, ...], int]:
    """Parameters whose values differ, and the number of those that have the same values."""
    one, two = first.parameters, second.parameters
    found = [_part_difference(name, one, two) for name in dict.fromkeys([*one, *two])]
    if isinstance(first, AdapterFile) and isinstance(second, AdapterFile):
        found += _feature_differences(first, second)
    different = tuple(entry for entry in found if entry.relative is None or entry.relative > 0)
    return different, len(found) - len(different)


def _compare_anchors(first: AdapterFile, second: AdapterFile) -> AnchorDifference:
    """Texts and words that both files have, and how far the coordinates of the common words are apart.

    A word is the same when it is the same one of the same text.
    """
    one, two = _positions(first), _positions(second)
    common = [word for word in one if word in two]
    values = [_coordinates(content) for content in (first, second)]
    relative = None
    same_frame = first.manifest.config.knots == second.manifest.config.knots
    if common and same_frame and values[0].shape[2] == values[1].shape[2]:
        places = [[positions[word] for word in common] for positions in (one, two)]
        relative = _relative_difference(values[0][:, places[0]], values[1][:, places[1]])
    return AnchorDifference(
        first_texts=len(first.anchors.texts),
        second_texts=len(second.anchors.texts),
        common_texts=len(set(first.anchors.texts) & set(second.anchors.texts)),
        first_words=first.anchors.num_words,
        second_words=second.anchors.num_words,
        common_words=len(common),
        relative=relative,
    )


def _relative_difference(first: npt.NDArray[np.floating[Any]], second: npt.NDArray[np.floating[Any]]) -> float:
    """Euclidean norm of the difference over the larger of both norms: 0 for equal values, at most 2."""
    one, two = first.astype(np.float64), second.astype(np.float64)
    larger = max(float(np.linalg.norm(one)), float(np.linalg.norm(two)))
    return float(np.linalg.norm(one - two)) / larger if larger else 0.0


def _part_difference(name: str, one: Mapping[str, Quantised], two: Mapping[str, Quantised]) -> PartDifference:
    values = [values_of(parameters[name]) if name in parameters else None for parameters in (one, two)]
    first, second = values
    relative = None
    if first is not None and second is not None and first.shape == second.shape:
        relative = _relative_difference(first, second)
    return PartDifference(
        name=name,
        first=None if first is None else first.shape,
        second=None if second is None else second.shape,
        relative=relative,
    )


def _feature_differences(first: AdapterFile, second: AdapterFile) -> list[PartDifference]:
    """The feature bank as one more part, where either file has one; other texts are another part altogether."""
    banks = [content.features for content in (first, second)]
    one, two = banks
    if one is None and two is None:
        return []
    relative = None
    if one is not None and two is not None and one.anchors.digest == two.anchors.digest:
        values = [bank.codes.codes * bank.codes.scales + bank.mean for bank in (one, two)]
        if values[0].shape == values[1].shape:
            relative = _relative_difference(*values)
    shapes = [None if bank is None else bank.codes.codes.shape for bank in banks]
    return [PartDifference(name="features.codes", first=shapes[0], second=shapes[1], relative=relative)]


def _flat(prefix: str, content: object) -> Iterator[tuple[str, str]]:
    """Dotted names and JSON texts of the leaves of nested dictionaries."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), value)
    else:
        yield prefix, json.dumps(content, ensure_ascii=False)


def _positions(content: AdapterFile) -> dict[tuple[str, int], int]:
    """Place of every anchor word among all, by its text and its ordinal in it."""
    pairs = [
        (text, ordinal)
        for text, ordinals in zip(content.anchors.texts, content.anchors.chosen, strict=True)
        for ordinal in ordinals
    ]
    return {pair: place for place, pair in enumerate(pairs)}


def _coordinates(content: AdapterFile) -> Doubles:
    """Canonical coordinates of the anchor words, [knots, words, d0]."""
    entry = content.coordinates
    values: Doubles = entry.codes.astype(np.float64) * entry.scales[:, None, :]
    return values
