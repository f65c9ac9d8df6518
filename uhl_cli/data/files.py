"""Local data: find and read the files of the splits in a folder; `datasets` reads tables, this module CoNLL.

Text stays text: `null`, `NA` and `007` are read as written.  A line with too few or too many fields is an error with
its line number.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from uhl_cli.data.table import Table, data_error, load_failures, offline_datasets
from uhl_cli.errors import DataError
from uhl_cli.files import refuse_unwritable_cache

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

# The tags of CoNLL files.
_TAG = re.compile(r"O|[BIES]-\S+")
_BLANKS = re.compile(r"[ \t]+")  # str.split() would also cut words at no-break spaces
_CONLL_HINT = "Write a word a line as `word tag`, with an empty line between sentences."
# Matches every list with null in JSON, and sometimes a text that looks like one; parsing then distinguishes them.
_NULL_IN_LIST = re.compile(rb"[\[,]\s*null\s*[,\]]")
_SHARD = re.compile(r"(.*)-\d+-of-\d+$")
_SUFFIXES = " ".join(READERS)


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


def read_files(paths: list[Path]) -> Table:
    """The rows of one file, or of the shards of one file.

    :raises DataError: If a file cannot be read, is damaged, or has no rows.
    :raises OutputError: If the cache of `datasets` cannot be written.
    """
    from datasets import Dataset, load_dataset
    from datasets.config import HF_DATASETS_CACHE

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
            parts = [_read_conll(path) for path in paths]
            words, tags = (list(chain.from_iterable(column)) for column in zip(*parts, strict=True))
            return Table(Dataset.from_dict({"tokens": words, "tags": tags}), origin)
        if reader == "csv":
            options = _delimited_options(paths)
        if reader == "json":
            for path in paths:
                _refuse_null_words(path)
        files = [str(path) for path in paths]
        # Otherwise `datasets` reports the reader that is used to a server, even for a local file.
        with offline_datasets():
            dataset = load_dataset(reader, data_files={"train": files}, split="train", **options)
    except load_failures() as error:
        refuse_unwritable_cache(HF_DATASETS_CACHE, error)
        raise data_error(f"Cannot read {origin}", error, "Check that the file is whole and UTF-8.") from error
    return Table(dataset, origin)


def _delimited_options(paths: list[Path]) -> dict[str, object]:
    """Options for `datasets` to read these files: every column as text, and no value as missing."""
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
        # Without types, each block of rows infers its own: 007 becomes 7, and a word in a later block is an error.
        "features": Features({name: Value("string") for name in headers[0]}),
    }


def _quoting(tabs: bool) -> Literal[0, 3]:
    return csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL


def _header(path: Path, tabs: bool) -> list[str]:
    """The column names, after checking that every line has as many fields as the first.

    pandas would fill short lines with empty fields, and use the first column as an index if all lines are one field
    longer than the header.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = delimited_rows(file, path.name, tabs=tabs)
        header = next(rows)
        if not sum(1 for _ in rows):
            raise DataError(f"{path.name} has no rows under its column names.", "Give a file with data.")
    return header


def delimited_rows(lines: Iterable[str], name: str, *, tabs: bool) -> Iterator[list[str]]:
    """Yield the column names, then the fields of each row, as many as there are names.

    Empty lines are left out.

    :param lines: Lines with their line ends, as from a file opened with `newline=""`.
    :raises DataError: If a row has more or fewer fields, quotes do not close, or a name is missing or duplicated.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        rows = csv.reader(lines, csv.excel_tab if tabs else csv.excel, quoting=_quoting(tabs), strict=True)
        header = next((row for row in rows if row), [])
        if len(set(header)) != len(header) or any(not name.strip() for name in header[1:]):
            raise DataError(
                f"{name}: column names are empty or duplicated.", "Give each column its own name on line 1."
            )
        # A table that pandas wrote with its index has no name over the first column.
        yield [column if column else f"Unnamed: {index}" for index, column in enumerate(header)]
        for row in rows:
            if len(row) == len(header):
                yield row
            elif any(field.strip() for field in row):
                raise DataError(
                    f"{name}: line {rows.line_num} has {len(row)} fields, the header {len(header)}.",
                    "Repair the line; fields of .tsv are not quoted, fields of .csv may be.",
                )
    except csv.Error as error:
        raise data_error(f"Cannot read {name}", error, "Check its quotes and delimiters.") from error
    finally:
        csv.field_size_limit(limit)


def _read_conll(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    """(words, tags) of every sentence of a file in CoNLL's columns, see `conll_sentences`.

    The tags are the last column in which every value is `O` or begins with a one-letter chunk prefix such as `B-`: so
    the four columns of CoNLL-2003 (word, part of speech, chunk, entity) and `word entity 0` both give the entity.

    :raises DataError: If the file is not UTF-8, holds no words, has lines of unequal width, or no column looks like
        tags.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            sentences = list(conll_sentences(lines, path.name))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8: {error.reason}.", "Save the file as UTF-8.") from error
    if not sentences:
        raise DataError(f"{path.name} has no words.", _CONLL_HINT)
    column, width = tag_column(sentences), len(sentences[0][0])
    if column is None and width > 2:
        raise DataError(
            f"{path.name}: none of columns 2 to {width} holds only tags such as O, B-PER, I-PER.",
            "Keep two columns, `word tag`, or mark entities as B-NAME and I-NAME.",
        )
    column = column or 1  # with two columns, the second is taken whatever its tags, such as parts of speech
    words = [[fields[0] for fields in sentence] for sentence in sentences]
    return words, [[fields[column] for fields in sentence] for sentence in sentences]


def conll_sentences(lines: Iterable[str], name: str, *, least: int = 2) -> Iterator[list[list[str]]]:
    """Yield sentences as the columns of each word: one word per line, an empty line between sentences.

    Document starts are left out.

    :param least: Minimum number of columns of a line.
    :raises DataError: If a line has fewer columns, or not as many as the first.
    """
    sentence: list[list[str]] = []
    width = 0
    for number, line in enumerate(lines, 1):
        fields = _BLANKS.split(line.strip(" \t\r\n"))
        if fields == [""]:
            if sentence:
                yield sentence
            sentence = []
        elif fields[0] != "-DOCSTART-":
            width = width or len(fields)
            if len(fields) != width or width < least:
                columns = f"{len(fields)} column(s)" + (f", not {width}" if width >= least else "")
                raise DataError(f"{name}: line {number} has {columns}.", _CONLL_HINT)
            sentence.append(fields)
    if sentence:
        yield sentence


def tag_column(sentences: Sequence[list[list[str]]]) -> int | None:
    """The last column, except the words', that has only entity tags; None if there is none."""
    for column in range(len(sentences[0][0]) - 1, 0, -1):
        if all(_TAG.fullmatch(fields[column]) for sentence in sentences for fields in sentence):
            return column
    return None


def _refuse_null_words(path: Path) -> None:
    """Refuse null among the words of a list before pyarrow reads the file.

    pyarrow's JSON reader (at least 18 to 26) makes invalid arrays from `[null, "word"]`: words move into other rows, or
    the process crashes.  datasets checks for that from 5.1 on; earlier versions do not.

    :raises DataError: If a list has null; the message names the line (the record in a file that is one JSON array).
    """
    content = path.read_bytes()
    if _NULL_IN_LIST.search(content) is None:
        return
    try:
        whole = json.loads(content) if content.lstrip()[:1] == b"[" else None
        if isinstance(whole, list):
            for number, record in enumerate(whole, 1):
                _refuse_null(path, "record", number, record)
            return
        for number, line in enumerate(content.split(b"\n"), 1):
            if _NULL_IN_LIST.search(line) is not None:
                _refuse_null(path, "line", number, json.loads(line))
    except ValueError:
        return  # not valid JSON: the reader says what is wrong with it


def _refuse_null(path: Path, unit: str, number: int, record: object) -> None:
    for value in record.values() if isinstance(record, dict) else ():
        if isinstance(value, list) and None in value and any(isinstance(each, str) for each in value):
            raise DataError(
                f"{path.name}: {unit} {number} has null among the words or tags of a list.",
                "Write each word as text, and O for a word outside; leave out sentences without tags.",
            )
