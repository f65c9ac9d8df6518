"""Local data: find the files of the splits in a folder, and read each through `datasets`.

Text stays text: `null`, `NA` and `007` come out as they are written, and a
line with too few or too many fields is an error with its number.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from uhl_cli.data.conll import read_conll
from uhl_cli.data.json_nulls import refuse_null_words
from uhl_cli.data.quiet import data_error, load_failures
from uhl_cli.data.table import Table
from uhl_cli.errors import DataError

READERS: Mapping[str, str] = {
    ".tsv": "csv",
    ".csv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "conll",
    ".conll": "conll",
}
TRAIN_STEMS = ("train",)
EVALUATION_STEMS = ("dev", "valid", "eval", "test")  # "valid" finds "validation" too

_SHARD = re.compile(r"(.*)-\d+-of-\d+$")
_SUFFIXES = " ".join(READERS)


def split_files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """The data files of one split: those of the first stem that names any; empty if none does.

    A file named exactly as the stem goes before others that begin with it;
    the shards of one file (`train-00000-of-00002.parquet`) come together.

    :raises DataError: If several files could be meant.
    """
    files = data_files(folder)
    for stem in stems:
        found = [path for path in files if path.stem.casefold().startswith(stem)]
        exact = [path for path in found if path.stem.casefold() in (stem, f"{stem}idation")]
        found = exact or found
        sets = {(_SHARD.sub(r"\1", path.stem), path.suffix.casefold()) for path in found}
        if len(sets) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(
                f"Several files in {folder.name} could be the {stem} split: {names}.",
                "Keep one of them in the folder, or give one file instead of the folder.",
            )
        if found:
            return found
    return []


def data_files(folder: Path) -> list[Path]:
    """All files of the folder whose suffix is that of a data file, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.casefold() in READERS)


def read_files(paths: list[Path]) -> Table:
    """The rows of one file, or of the shards of one file.

    :raises DataError: If a file cannot be read, is damaged, or has no rows.
    """
    from datasets import Dataset, load_dataset

    origin = f"{paths[0].absolute().parent.name}/{paths[0].name}"
    if len(paths) > 1:
        origin += f" and {len(paths) - 1} more"
    reader = READERS.get(paths[0].suffix.casefold())
    if reader is None:
        raise DataError(f"{origin} is not a kind of data file.", f"Give one of: {_SUFFIXES}.")
    options: dict[str, object] = {}
    try:
        if any(path.stat().st_size == 0 for path in paths):
            raise DataError(f"{origin} is empty.", "Give a file with data.")
        if reader == "conll":
            words: list[list[str]] = []
            tags: list[list[str]] = []
            for path in paths:
                more_words, more_tags = read_conll(path)
                words += more_words
                tags += more_tags
            return Table(Dataset.from_dict({"tokens": words, "tags": tags}), origin)
        if reader == "csv":
            options = _delimited_options(paths)
        if reader == "json":
            for path in paths:
                refuse_null_words(path)
        files = [str(path) for path in paths]
        dataset = load_dataset(reader, data_files={"train": files}, split="train", **options)
    except load_failures() as error:
        raise data_error(f"Cannot read {origin}", error, "Check that the file is whole and UTF-8.") from error
    return Table(dataset, origin)


def _delimited_options(paths: list[Path]) -> dict[str, object]:
    """How `datasets` is to read these files: every column as text, and nothing taken for a missing value."""
    from datasets import Features, Value

    tabs = paths[0].suffix.casefold() == ".tsv"
    headers = [_header(path, tabs) for path in paths]
    if any(header != headers[0] for header in headers):
        raise DataError(f"The shards of {paths[0].name} differ in their columns.", "Give them one header.")
    return {
        "sep": "\t" if tabs else ",",
        "quoting": _quoting(tabs),
        "keep_default_na": False,
        "na_filter": False,
        # Without types, each block of rows guesses its own: 007 becomes 7, and a late word is an error.
        "features": Features({name: Value("string") for name in headers[0]}),
    }


def _quoting(tabs: bool) -> Literal[0, 3]:
    return csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL


def _header(path: Path, tabs: bool) -> list[str]:
    """The column names, once every line is known to be as wide as the first.

    pandas would fill a short line up with empty fields, and take the first
    column for an index if all lines are one field longer than the header.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, csv.excel_tab if tabs else csv.excel, quoting=_quoting(tabs), strict=True)
            header = next((row for row in rows if row), [])
            empty = True
            for row in rows:
                empty = empty and not row
                if len(row) != len(header) and any(field.strip() for field in row):
                    raise DataError(
                        f"{path.name}: line {rows.line_num} has {len(row)} fields, the header {len(header)}.",
                        "Repair the line; fields of .tsv are not quoted, fields of .csv may be.",
                    )
    except csv.Error as error:
        raise data_error(f"Cannot read {path.name}", error, "Check its quotes and delimiters.") from error
    finally:
        csv.field_size_limit(limit)
    if empty:
        raise DataError(f"{path.name} has no rows under its column names.", "Give a file with data.")
    if len(set(header)) != len(header) or any(not name.strip() for name in header[1:]):
        raise DataError(
            f"{path.name}: column names are empty or there twice.", "Give each column its own name on line 1."
        )
    # A table that pandas wrote with its index has no name over the first column.
    return [name if name else f"Unnamed: {index}" for index, name in enumerate(header)]
