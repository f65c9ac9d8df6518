"""Write rows to a file as they come: csv, tsv, jsonl or parquet by its ending.  The file appears when it is complete.

This module imports neither torch nor datasets.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, get_args

from uhl_cli.data.parsing import Row
from uhl_cli.data.table import data_error
from uhl_cli.errors import DataError, UsageError
from uhl_cli.files import atomic_path

WrittenForm = Literal["csv", "tsv", "jsonl", "parquet"]
Kind = Literal["text", "texts", "number", "numbers", "entities"]
Write = Callable[[Sequence[Row]], None]


def written_form(path: Path) -> WrittenForm:
    """The form for a file's ending.

    :raises UsageError: There is no such form.
    """
    for form in get_args(WrittenForm):
        if path.suffix.casefold() == f".{form}":
            found: WrittenForm = form
            return found
    endings = ", ".join(f".{form}" for form in get_args(WrittenForm))
    raise UsageError(f"the ending of {path.name} is none of {endings}.", "Choose another --output, such as out.jsonl.")


@contextmanager
def open_writer(
    path: Path,
    first: Sequence[str],
    added: Mapping[str, Kind],
    *,
    schema: Any = None,  # noqa: ANN401
) -> Iterator[Write]:
    """A writer of rows to a temporary file beside `path`, which replaces `path` when the block ends without an error.

    In csv and tsv, null is an empty field, and lists and records are JSON.  Fields of tsv are not quoted.

    :param first: Columns of the rows; jsonl also accepts others.
    :param added: Columns after them, with their types.
    :param schema: Arrow's types of the columns in `first`; by default those of the first rows.
    :raises OutputError: It cannot be written.
    :raises DataError: From the writer, when a row does not fit the file's form.
    """
    form = written_form(path)
    with atomic_path(path) as temporary:
        if form == "parquet":
            with _parquet(temporary, first, added, schema) as write:
                yield write
            return
        # Invalid characters, such as a lone surrogate from JSON, are written as escapes.
        newline = "" if form == "csv" else "\n"
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline=newline) as file:
            yield _lines(file) if form == "jsonl" else _fields(file, form, [*first, *added])


def json_line(row: Row) -> str:
    """A row as JSON on one line; types that JSON lacks, such as dates, become text, and numbers such as NaN null."""
    return _json(row)


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: object) -> object:
    """The value with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(file: IO[str]) -> Write:
    return lambda rows: file.writelines(f"{json_line(row)}\n" for row in rows)


def _fields(file: IO[str], form: WrittenForm, names: Sequence[str]) -> Write:
    number = 0

    def tabbed(row: Sequence[str]) -> None:
        if any(letter in field for field in row for letter in "\t\r\n"):
            where = f"row {number}" if number else "the name of a column"
            raise DataError(
                f"{where} holds a tab or a line break, which .tsv cannot store.",
                "Name an --output that ends in .csv or .jsonl.",
            )
        file.write("\t".join(row) + "\n")

    put: Callable[[Sequence[str]], object] = csv.writer(file).writerow if form == "csv" else tabbed

    def write(rows: Sequence[Row]) -> None:
        nonlocal number
        for row in rows:
            number += 1
            _refuse_others(row, names, number)
            put([_field(row.get(name)) for name in names])

    put(names)
    return write


def _field(value: object) -> str:
    if value is None:
        return ""
    return _json(value) if isinstance(value, (list, dict, bool)) else str(value)


def _refuse_others(row: Row, names: Sequence[str], number: int) -> None:
    for name in row:
        if name not in names:
            raise DataError(
                f"row {number} has a column {name!r} that the first rows lack, and a table's columns are fixed.",
                "Name an --output that ends in .jsonl.",
            )


@contextmanager
def _parquet(
    path: Path,
    first: Sequence[str],
    added: Mapping[str, Kind],
    schema: Any,  # noqa: ANN401
) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.string(), pyarrow.float64()
    entity = {"start": pyarrow.int64(), "end": pyarrow.int64(), "label": text, "text": text}
    types = {"text": text, "texts": pyarrow.list_(text), "number": number, "numbers": pyarrow.list_(number)}
    types["entities"] = pyarrow.list_(pyarrow.struct(list(entity.items())))
    file: Any = None
    count = 0

    def write(rows: Sequence[Row]) -> None:
        nonlocal file, schema, count
        try:
            if file is None:
                if schema is None:
                    given = [{name: row.get(name) for name in first} for row in rows]
                    schema = pyarrow.Table.from_pylist(given).schema
                schema = schema.remove_metadata()  # other libraries' notes on the columns are no longer valid
                for name, kind in added.items():
                    schema = schema.append(pyarrow.field(name, types[kind]))
                file = pyarrow.parquet.ParquetWriter(path, schema)
            for row in rows:
                count += 1
                _refuse_others(row, schema.names, count)
            file.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema))
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
            where = f"rows up to {count} do not fit the types of the first"
            raise data_error(where, error, "Name an --output that ends in .jsonl.") from error

    try:
        yield write
    finally:
        if file is not None:
            file.close()
