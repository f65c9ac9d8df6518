"""`inspect --verify`: every broken rule of a file's format, not only the first.

The rules of the formats are those of the readers (`formats.container.Problems`).  Added are checks that no reader
needs: the size limit, and whether counts, digests and scores agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from uhl_cli.errors import DataError, FormatError
from uhl_cli.formats.adapter import AdapterFile
from uhl_cli.formats.container import Problems
from uhl_cli.formats.folder import PortedRecord, TunedRecord, is_ported, ported_path
from uhl_cli.formats.task import TaskRecord
from uhl_cli.inspect.content import KINDS, parse_any, parse_record, read_any
from uhl_cli.inspect.report import InspectReport, Verification
from uhl_cli.metrics import Score
from uhl_cli.schema import Fingerprint, Manifest

MAX_BYTES = 1_000_000
# Intervals are computed in floating point and may exceed their bounds by a rounding error.
_ROUNDING = 1e-9
_SHA256 = re.compile(r"[0-9a-f]{64}")


def verify_file(path: Path) -> InspectReport:
    """The report of a file, one line per broken rule.

    :raises FormatError: When there is no such file, or it is too large to be read.
    """
    problems = Problems(path, collect=True)
    kind = version = None
    file = ported_path(path) if is_ported(path) else path
    num_bytes = file.stat().st_size if file.is_file() else 0
    if num_bytes > MAX_BYTES and not is_ported(path):
        problems.add(FormatError(f"the file holds {num_bytes:,} bytes; at most {MAX_BYTES:,} are allowed"))
    before = len(problems.found)
    try:
        contents = read_any(path, problems)
    except FormatError:
        if len(problems.found) == before:  # nothing was read
            raise
    else:
        kind, version, num_bytes = KINDS[contents.kind.key], contents.version, contents.file_bytes
        content = parse_any(contents, problems)
        if isinstance(content, AdapterFile) and content.transfer is not None:
            with suppress(DataError):  # texts of another version cannot be compared here
                problems.attempt(content.transfer.whole)
        record = parse_record(contents, Problems(path, collect=True))
        for line in () if record is None else _disagreements(record):
            problems.add(FormatError(line))
    return InspectReport(
        file=str(path),
        kind=kind,
        format_version=version,
        bytes=num_bytes,
        verification=Verification(problems=tuple(problems.found)),
    )


def _disagreements(record: Manifest | TaskRecord | PortedRecord) -> Iterator[str]:
    """Counts, digests and scores that cannot be right, although a reader accepts the file."""
    if isinstance(record, PortedRecord):
        yield from _fingerprint_problems("target", record.target.fingerprint)
        if record.tuned is not None:
            yield from _training_problems("tuned.", record.tuned)
        return
    if isinstance(record, Manifest) or record.parameters == "gains":  # else the counts are those of the adapter
        total, examples = sum(record.label_counts), record.training.train_examples
        if record.config.kind == "sequence" and total != examples:
            yield f"the label counts sum to {total:,}; the training had {examples:,} examples"
        if record.config.kind == "tokens" and total < examples:
            yield f"the label counts sum to {total:,} words; the training had {examples:,} sentences"
    yield from _training_problems("", record)
    if isinstance(record, Manifest):
        if record.parts.transfer is not None:
            yield from _score_problems("parts.transfer.teacher_score", record.parts.transfer.teacher_score)
        if record.atoms_per_token is not None and record.atoms_per_token > record.config.top_k:
            yield f"atoms_per_token is {record.atoms_per_token:g}, more than top_k, {record.config.top_k}"
        yield from _fingerprint_problems("source", record.source.fingerprint)
    else:
        yield from _fingerprint_problems("target", record.target.fingerprint)


def _training_problems(prefix: str, record: Manifest | TaskRecord | TunedRecord) -> Iterator[str]:
    if not _SHA256.fullmatch(record.training.train_digest):
        yield f"{prefix}training.train_digest is not a SHA-256 digest"
    yield from _score_problems(f"{prefix}score", record.score)
    if not isinstance(record, Manifest):
        yield from _score_problems(f"{prefix}before", record.before)


def _score_problems(name: str, score: Score | None) -> Iterator[str]:
    """A score or an interval outside 0 to 1, or an interval upside down.

    The value may lie outside its interval: percentiles of a bootstrap need not contain it.
    """
    if score is None:
        return
    interval = f"{name}: {score.value:g} with the interval [{score.low:g}, {score.high:g}]"
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in (score.value, score.low, score.high)):
        yield f"{interval} is not within 0 and 1"
    if score.low > score.high + _ROUNDING:
        yield f"{interval} is upside down"


def _fingerprint_problems(name: str, fingerprint: Fingerprint) -> Iterator[str]:
    """A host's fingerprint that no host can have; `name` is the field that holds the host."""
    if not _SHA256.fullmatch(fingerprint.digest):
        yield f"{name}.fingerprint.digest is not a SHA-256 digest"
    for field in ("architecture", "model_type"):
        if not getattr(fingerprint, field).strip():
            yield f"{name}.fingerprint.{field} is empty"
