"""Invariants of the JSON in a file's header: its schema, and fields that have to agree with each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from uhl_cli.adapter.task_store import TaskRecord
from uhl_cli.metrics import Score
from uhl_cli.schema import Manifest

VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")
# Intervals are computed in floating point and may pass their bounds by a rounding.
_ROUNDING = 1e-9
_SHA256 = re.compile(r"[0-9a-f]{64}")

Record = TypeVar("Record", bound=BaseModel)


def fields(text: str) -> dict[str, Any]:
    """The header's JSON as far as it is an object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def parsed(kind: type[Record], content: object) -> Record | None:
    """A record as the readers take it, or None.  Through JSON: lists stand for tuples there."""
    try:
        return kind.model_validate_json(json.dumps(content))
    except (ValueError, RecursionError):  # a ValidationError is a ValueError
        return None


def header_problems(name: str, text: str, kind: type[BaseModel], newest: str) -> Iterator[str]:
    """Every field that breaks the schema, and a format that is newer than this reader's."""
    version = str(fields(text).get("format_version", ""))
    if VERSION.fullmatch(version) and int(version.split(".")[0]) > int(newest.split(".")[0]):
        yield f"the format version is {version}; this uhl knows up to {newest}"
    try:
        kind.model_validate_json(text)
    except ValidationError as error:
        for entry in error.errors():
            where = ".".join(str(part) for part in entry["loc"])
            yield one_line(f"the {name} breaks the format at {where or 'its top'}: {entry['msg']}")


def training_problems(record: Manifest | TaskRecord) -> Iterator[str]:
    """Counts, digests and scores that have to agree with each other."""
    total, examples = sum(record.label_counts), record.training.train_examples
    if record.config.kind == "sequence" and total != examples:
        yield f"the label counts sum to {total:,}; the training had {examples:,} examples"
    if record.config.kind == "tokens" and total < examples:
        yield f"the label counts sum to {total:,} words; the training had {examples:,} sentences"
    if not _SHA256.fullmatch(record.training.train_digest):
        yield "training.train_digest is not a SHA-256 digest"
    yield from score_problems("score", record.score)


def score_problems(name: str, score: Score | None) -> Iterator[str]:
    """A score or an interval outside 0 to 1, or an interval upside down.

    The value may lie outside its interval: that of a bootstrap's percentiles does not promise to hold it.
    """
    if score is None:
        return
    interval = f"{name}: {score.value:g} with the interval [{score.low:g}, {score.high:g}]"
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in (score.value, score.low, score.high)):
        yield f"{interval} is not within 0 and 1"
    if score.low > score.high + _ROUNDING:
        yield f"{interval} is upside down"


def fingerprint_problems(name: str, record: Manifest | TaskRecord) -> Iterator[str]:
    """A host's fingerprint that no host can have; `name` is the field that holds the host."""
    fingerprint = record.source.fingerprint if isinstance(record, Manifest) else record.target.fingerprint
    if not _SHA256.fullmatch(fingerprint.digest):
        yield f"{name}.fingerprint.digest is not a SHA-256 digest"
    for field in ("architecture", "model_type"):
        if not getattr(fingerprint, field).strip():
            yield f"{name}.fingerprint.{field} is empty"


def one_line(text: str) -> str:
    """One line that no terminal takes for a command: a stranger's file may name its parts as it likes."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
