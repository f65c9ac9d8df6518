"""Local data: find the files of the splits in a folder, and read them into a table.

Values keep their types: text in csv, tsv and CoNLL, those of JSON or Arrow in JSON and parquet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from uhl_cli.data.parsing import (
    MOST_COLUMNS,
    Row,
    checked_encoding,
    conll_sentences,
    delimited_rows,
    json_records,
    tagged_words,
    text_lines,
    too_many_columns,
)
from uhl_cli.data.table import Table, data_error, load_failures, offline_datasets
from uhl_cli.errors import DataError, UsageError
from uhl_cli.files import refuse_unwritable_cache

if TYPE_CHECKING:
    from datasets import Dataset

Reader = Literal["tsv", "csv", "json", "parquet", "conll"]
READERS: Mapping[str, Reader] = {
    ".tsv": "tsv",
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
# Rows that are converted to Arrow at a time.
_CHUNK = 10_000
_ALIKE = "Give all values of a column one type, as valid text or numbers."


def split_files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """The data files of one split: those of the first stem that matches any; empty if none does.

    A file named exactly as the stem is preferred to others that begin with it; the shards of one file
    (`train-00000-of-00002.parquet`) are returned together.

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


def read_files(paths: list[Path], encoding: str | None = None) -> Table:
    """The rows of one file, or of the shards of one file.

    :param encoding: Of a text file; None is UTF-8.
    :raises UsageError: There is no such encoding, or the file is no text file.
    :raises DataError: If a file cannot be read, is damaged, or has no rows; names the file.
    :raises OutputError: If the cache of `datasets`, which parquet needs, cannot be written.
    """
    origin = f"{paths[0].absolute().parent.name}/{paths[0].name}"
    if len(paths) > 1:
        origin += f" and {len(paths) - 1} more"
    reader = READERS.get(paths[0].suffix.casefold())
    if reader is None:
        raise DataError(f"{origin} is not a kind of data file.", f"Give one of: {_SUFFIXES}.")
    checked_encoding(encoding)
    if encoding is not None and reader == "parquet":
        raise UsageError(f"--encoding has no effect on {origin}, which is not a text file.", "Leave it out.")
    for path in paths:
        try:
            if path.stat().st_size == 0:
                raise DataError(f"{path.name} is empty.", "Give a file with data.")
        except OSError as error:
            raise data_error(f"Cannot read {path.name}", error, "Check its permissions.") from error
    if reader == "parquet":
        return Table(_parquet(paths, origin), origin)
    return Table(_dataset(_rows(paths, reader, encoding), origin), origin)


def read_lines(
    path: Path, encoding: str | None = None, *, hint: str = "Check the path and its permissions."
) -> list[str]:
    """The lines of a text file, without line ends.

    :param hint: What to do when the file cannot be read.
    :raises UsageError: There is no such encoding.
    :raises DataError: The file cannot be read, or is not text in this encoding.
    """
    try:
        with path.open("rb") as file, text_lines(file, path.name, encoding=encoding, newline=None) as lines:
            return [line.rstrip("\n") for line in lines]
    except OSError as error:
        raise data_error(f"Cannot read {path.name}", error, hint) from error


def _rows(paths: Sequence[Path], reader: Reader, encoding: str | None) -> Iterator[Row]:
    """The rows of text files, one file after the other."""
    names: list[str] | None = None
    for path in paths:
        try:
            with path.open("rb") as file, text_lines(file, path.name, encoding=encoding) as lines:
                if reader == "conll":
                    words, tags = tagged_words(list(conll_sentences(lines, path.name)), path.name)
                    yield from ({"tokens": row, "tags": own} for row, own in zip(words, tags, strict=True))
                    continue
                if reader == "json":
                    yield from json_records(lines, path.name, whole=True)
                    continue
                rows = delimited_rows(lines, path.name, tabs=reader == "tsv")
                header = next(rows)
                if names not in (None, header):
                    raise DataError(f"The shards of {paths[0].name} differ in their columns.", "Give them one header.")
                names, empty = header, True
                for row in rows:
                    yield dict(zip(header, row, strict=True))
                    empty = False
                if empty:
                    raise DataError(f"{path.name} has no rows under its column names.", "Give a file with data.")
        except OSError as error:
            raise data_error(f"Cannot read {path.name}", error, "Check the file and its permissions.") from error


def _dataset(rows: Iterable[Row], origin: str) -> Dataset:
    """The rows in Arrow's types; what a row lacks is null.

    :raises DataError: There is no row, a column mixes types, or there are too many columns.
    """
    import pyarrow
    from datasets import Dataset

    rows, parts, names = iter(rows), [], dict[str, None]()
    while chunk := list(islice(rows, _CHUNK)):
        for row in chunk:
            names.update(dict.fromkeys(row))
            if len(names) > MOST_COLUMNS:
                raise too_many_columns(origin)
        columns = {}
        for name in names:
            try:
                columns[name] = pyarrow.array([row.get(name) for row in chunk])
            except (pyarrow.ArrowException, OverflowError, ValueError) as error:
                raise data_error(f"Cannot read column {name!r} of {origin}", error, _ALIKE) from error
        parts.append(columns)
    if not parts:
        raise DataError(f"{origin} has no rows.", "Give a file with data.")
    try:
        tables = [pyarrow.table(columns) for columns in parts]
        return Dataset(pyarrow.concat_tables(tables, promote_options="permissive"))
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise data_error(f"Cannot read {origin}", error, _ALIKE) from error


def _parquet(paths: Sequence[Path], origin: str) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import load_dataset
    from datasets.config import HF_DATASETS_CACHE

    hint = "Check that the file is whole."
    for path in paths:
        try:
            columns = pyarrow.parquet.read_metadata(path).num_columns
        except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: names that are not UTF-8
            raise data_error(f"Cannot read {path.name}", error, hint) from error
        if columns > MOST_COLUMNS:
            raise too_many_columns(path.name)
    try:
        # Otherwise `datasets` reports the reader that is used to a server, even for a local file.
        with offline_datasets():
            return load_dataset("parquet", data_files={"train": [str(path) for path in paths]}, split="train")
    except load_failures() as error:
        refuse_unwritable_cache(HF_DATASETS_CACHE, error)
        raise data_error(f"Cannot read {origin}", error, hint) from error
