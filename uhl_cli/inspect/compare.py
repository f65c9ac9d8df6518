"""Two files of the same kind side by side: header fields, values of the parts, and anchors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from uhl_cli.errors import DataError, FormatError
from uhl_cli.formats.adapter import AdapterFile, values_of
from uhl_cli.formats.folder import PortedFile, stored_values
from uhl_cli.formats.transfer import StoredTransfer
from uhl_cli.inspect.content import KINDS, Content, Opened, transfer_shapes
from uhl_cli.inspect.report import (
    AnchorDifference,
    Comparison,
    FieldDifference,
    InspectReport,
    PartDifference,
    TransferDifference,
)
from uhl_cli.schema import Frozen
from uhl_cli.transfer.texts import TransferTexts

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


def compare_files(first: Opened, second: Opened) -> InspectReport:
    """The report of the first file with its differences from the second.

    :raises FormatError: When they are of different kinds.
    """
    one, two = first.content, second.content
    anchors = transfer = None
    if isinstance(one, AdapterFile) and isinstance(two, AdapterFile):
        fields, anchors = _different_fields(one.manifest, two.manifest), _compare_anchors(one, two)
        transfer = _compare_texts(one, two)
    elif not isinstance(one, AdapterFile) and not isinstance(two, AdapterFile) and type(one) is type(two):
        fields = _different_fields(one.record, two.record)
    else:
        nouns = [content.contents.kind.noun for content in (first, second)]
        kinds = " and ".join(f"{'an' if noun.startswith('a') else 'a'} {noun}" for noun in nouns)
        raise FormatError(
            f"{first.path} and {second.path} are {kinds}.", "Compare two adapters, two task files or two folders."
        )
    parts, same_parts = _different_parts(one, two)
    return InspectReport(
        file=str(first.path),
        kind=KINDS[first.contents.kind.key],
        format_version=first.contents.version,
        bytes=first.contents.file_bytes,
        comparison=Comparison(
            other=str(second.path),
            other_bytes=second.contents.file_bytes,
            identical=first.contents == second.contents,
            fields=fields,
            parts=parts,
            same_parts=same_parts,
            anchors=anchors,
            transfer=transfer,
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


def _different_parts(first: Content, second: Content) -> tuple[tuple[PartDifference, ...], int]:
    """Parameters whose values differ, and the number of those that have the same values."""
    if isinstance(first, PortedFile) and isinstance(second, PortedFile):
        tensors = first.contents.tensors, second.contents.tensors
        found = [
            _difference(name, *(stored_values(name, each[name]) if name in each else None for each in tensors))
            for name in dict.fromkeys([*tensors[0], *tensors[1]])
        ]
    else:
        assert not isinstance(first, PortedFile)
        assert not isinstance(second, PortedFile)
        one, two = first.parameters, second.parameters
        found = [
            _difference(name, *(values_of(each[name]) if name in each else None for each in (one, two)))
            for name in dict.fromkeys([*one, *two])
        ]
    if isinstance(first, AdapterFile) and isinstance(second, AdapterFile):
        found += [*_feature_differences(first, second), *_transfer_differences(first, second)]
    different = tuple(entry for entry in found if entry.relative is None or entry.relative > 0)
    return different, len(found) - len(different)


def _compare_anchors(first: AdapterFile, second: AdapterFile) -> AnchorDifference:
    """Texts and words that both files have, and the relative difference of the common words' coordinates.

    Words are the same if they are at the same place of the same text.
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


def _difference(name: str, first: Floats | None, second: Floats | None) -> PartDifference:
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
    """The feature bank as one more part, if either file has one; with other texts it differs as a whole."""
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


def _transfer_differences(first: AdapterFile, second: AdapterFile) -> list[PartDifference]:
    """The teacher's outputs as one more part, if either file has some; with other texts they differ as a whole."""
    sets = [content.transfer for content in (first, second)]
    one, two = sets
    if one is None and two is None:
        return []
    relative = None
    if one is not None and two is not None and _same_texts(one, two):
        relative = _relative_difference(one.codes.astype(np.float64), two.codes.astype(np.float64))
    shapes = [
        None if part is None else transfer_shapes(part.record, content.manifest.config)["transfer.outputs"]
        for part, content in zip(sets, (first, second), strict=True)
    ]
    return [PartDifference(name="transfer.outputs", first=shapes[0], second=shapes[1], relative=relative)]


def _same_texts(one: StoredTransfer, two: StoredTransfer) -> bool:
    return one.record.digest == two.record.digest and one.codes.shape == two.codes.shape


def _compare_texts(first: AdapterFile, second: AdapterFile) -> TransferDifference | None:
    sets = [content.transfer for content in (first, second)]
    if sets == [None, None]:
        return None
    counts = [0 if part is None else part.record.texts for part in sets]
    try:
        one, two = (set() if part is None else _lines(part.whole().texts) for part in sets)
        common: int | None = len(one & two)
    except (DataError, FormatError):
        common = None
    return TransferDifference(first_texts=counts[0], second_texts=counts[1], common_texts=common)


def _lines(texts: TransferTexts) -> set[tuple[str, str]]:
    return set(zip(texts.texts, texts.pairs or texts.texts, strict=True))


def _flat(prefix: str, content: object) -> Iterator[tuple[str, str]]:
    """Dotted names and JSON texts of the leaves of nested dictionaries."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), value)
    else:
        yield prefix, json.dumps(content, ensure_ascii=False)


def _positions(content: AdapterFile) -> dict[tuple[str, int], int]:
    """Index of every anchor word, by its text and its position in the text."""
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
