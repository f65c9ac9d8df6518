"""The package's own texts in transfer sets: an adapter file stores their version instead of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

from uhl_cli.align.texts import general_texts, style_of, styled
from uhl_cli.data.load import load_task
from uhl_cli.errors import DataError
from uhl_cli.schema import GeneralRecord

# Raised when any of the texts, their order, or what `styled` makes of them changes.
VERSION = 1


def opinions() -> list[str]:
    """The package's own sentences of praise and blame."""
    content = resources.files("uhl_cli.builtin").joinpath("opinions.txt").read_text(encoding="utf-8")
    return content.splitlines()


def record_of(sample: Sequence[str]) -> GeneralRecord:
    """The record of these texts: this version, in the style of the sample."""
    lower, apart = style_of(sample)
    return GeneralRecord(version=VERSION, lower=lower, apart=apart)


def transfer_texts(record: GeneralRecord) -> list[str]:
    """The package's sentences on many subjects, of praise and blame, and of its task's training set, deduplicated.

    :raises DataError: When this package does not contain the record's version.
    """
    if record.version != VERSION:
        raise DataError(
            f"its transfer set is of version {record.version} of uhl's own texts; this uhl has version {VERSION}.",
            "Install the uhl that made the file (`uhl inspect` names it), or tune with --task or --data.",
        )
    return list(dict.fromkeys(styled(_all(), record.lower, record.apart)))


@cache
def _all() -> tuple[str, ...]:
    reviews = load_task("reviews", need_evaluation=False).train
    assert reviews is not None  # it ships with the package
    return (*general_texts(), *opinions(), *reviews.texts)
