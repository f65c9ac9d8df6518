"""Rows of a file or of stdin, read once from beginning to end, with one chunk of them in memory at a time.

Values keep their types: text in csv, tsv and txt, those of JSON or Arrow in jsonl and parquet.  pandas is not used: it
fills short lines, infers types separately for each chunk, and may use the first column as an index.

This module imports neither torch nor datasets.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from uhl_cli.data.columns import Columns
from uhl_cli.data.parsing import (
    HEAD_BYTES,
    Row,
    checked_encoding,
    conll_sentences,
    delimited_rows,
    json_records,
    tag_column,
    text_lines,
)
from uhl_cli.data.table import data_error
from uhl_cli.errors import DataError, UsageError

Form = Literal["txt", "csv", "tsv", "jsonl", "parquet", "conll"]
STDIN = "-"
FORMS: Mapping[str, Form] = {
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".conll": "conll",
}
_TEXT = Columns(label="", text="text")


class Rows:
    """Rows that can be read once, in chunks.  The constructor reads the first chunk.

    :param origin: Their name in messages.
    :param total: Number of rows, if known.
    :param columns: Columns of their text or words, if the format defines them.
    :param schema: Arrow's types of the columns, for a parquet file.
    :raises DataError: There is no row, or the first chunk cannot be read.
    """

    def __init__(
        self,
        origin: str,
        rows: Iterator[Row],
        *,
        size: int,
        total: int | None = None,
        columns: Columns | None = None,
        schema: Any = None,  # noqa: ANN401 - pyarrow has no types
    ) -> None:
        self.origin = origin
        self.total = total
        self.columns = columns
        self.schema = schema
        self._rows = rows
        self._size = size
        self._first = list(islice(rows, size))
        if not self._first:
            raise DataError(f"{origin} holds no text.", "Give one with at least one text.")
        self.names = tuple(dict.fromkeys(chain.from_iterable(self._first)))

    def is_list(self, name: str) -> bool:
        """Whether the column holds a list in a row of the first chunk."""
        return any(isinstance(row.get(name), list) for row in self._first)

    def chunks(self) -> Iterator[list[Row]]:
        """Yield lists of rows."""
        chunk, self._first = self._first, []
        while chunk:
            yield chunk
            chunk = list(islice(self._rows, self._size))


@dataclass(frozen=True)
class Source:
    """An existing file, or stdin, of a known form."""

    path: Path | None
    form: Form
    guessed: bool

    @property
    def origin(self) -> str:
        """Its name in messages."""
        return "stdin" if self.path is None else f"{self.path.absolute().parent.name}/{self.path.name}"


def find_source(name: str, form: Form | None) -> Source:
    """The file `name`, or stdin for `-`.  The form follows from the file's ending unless it is given; stdin is txt.

    :raises DataError: There is no such file, or its ending is unknown.
    """
    if name == STDIN:
        if form == "parquet":
            raise UsageError("parquet cannot be read from stdin.", "Name the file with --input.")
        return Source(None, form or "txt", guessed=False)
    path = Path(name).expanduser()
    if not path.is_file():
        problem = f"{name} is a folder." if path.is_dir() else f"there is no file {name}."
        if not path.is_dir() and path.exists():  # a pipe, such as a shell's <(...), has no ending
            return Source(path, form or "txt", guessed=False)
        raise DataError(problem, "Name a file with --input, or - for stdin.")
    found = form or FORMS.get(path.suffix.casefold())
    if found is None:
        raise DataError(
            f"the ending of {path.name} is none of {' '.join(FORMS)}.",
            "Say what it is with --format, such as --format jsonl for one JSON record a line.",
        )
    return Source(path, found, guessed=form is None)


@contextmanager
def open_rows(source: Source, *, size: int, words: bool = False, encoding: str | None = None) -> Iterator[Rows]:
    """The rows of a file or of stdin, in chunks of `size`.

    A txt file is read as `text`, one per line.  A sentence of a CoNLL file has its words in `tokens` and, if a column
    looks like entity tags, these in `gold_tags`.

    :param words: For a model that labels words: a .txt file that begins with a sentence in CoNLL's columns is read as
        CoNLL.
    :param encoding: Of a text file; None is UTF-8.
    :raises UsageError: There is no such encoding, or the file is no text file.
    :raises DataError: It is empty, damaged, binary or in another encoding; raised when opening it, or during reading.
    """
    if source.form == "parquet":
        if encoding is not None:
            raise UsageError(f"--encoding has no effect on {source.origin}, which is parquet.", "Leave it out.")
        assert source.path is not None  # find_source gives no other
        with _parquet(source, source.path, size) as rows:
            yield rows
        return
    with _opened(source) as binary:
        form = source.form
        head = binary.peek(HEAD_BYTES)[:HEAD_BYTES]
        if words and form == "txt" and source.guessed and _begins_as_conll(head, checked_encoding(encoding)):
            form = "conll"
        newline = "" if form in ("csv", "tsv") else None if form == "txt" else "\n"
        with text_lines(binary, source.origin, encoding=encoding, newline=newline) as lines:
            yield _rows_of(source.origin, form, lines, size)


def _rows_of(origin: str, form: Form, lines: Iterator[str], size: int) -> Rows:
    if form == "txt":
        rows = ({"text": line.rstrip("\n")} for line in lines)
        return Rows(origin, _guarded(rows, origin), size=size, columns=_TEXT)
    if form == "conll":
        sentences = _guarded(conll_sentences(lines, origin, least=1), origin)
        first = list(islice(sentences, size))
        tags = tag_column(first) if first else None
        columns = Columns(label="", tokens="tokens")
        rows = (_sentence(fields, tags) for fields in chain(first, sentences))
        return Rows(origin, rows, size=size, columns=columns)
    if form == "jsonl":
        return Rows(origin, _guarded(json_records(lines, origin), origin), size=size)
    fields = _guarded(delimited_rows(lines, origin, tabs=form == "tsv"), origin)
    names = next(fields)
    return Rows(origin, (dict(zip(names, row, strict=True)) for row in fields), size=size)


def _sentence(fields: Sequence[Sequence[str]], tags: int | None) -> Row:
    row: Row = {"tokens": [word[0] for word in fields]}
    return row if tags is None else row | {"gold_tags": [word[tags] for word in fields]}


def _begins_as_conll(head: bytes, encoding: str) -> bool:
    lines = head.decode(encoding, "replace").split("\n")
    try:
        sentence = next(conll_sentences(lines[:-1] if len(head) == HEAD_BYTES else lines, ""), None)
    except DataError:
        return False
    return sentence is not None and tag_column([sentence]) is not None


@contextmanager
def _opened(source: Source) -> Iterator[io.BufferedReader]:
    if source.path is not None:
        try:
            file = source.path.open("rb")
        except OSError as error:
            raise _unreadable(source.origin, error) from error
        with file:
            yield file
        return
    if sys.stdin is None:
        raise DataError("stdin is closed.", "Name a file with --input.")
    stream: Any = sys.stdin.buffer
    if hasattr(stream, "peek"):
        yield stream
    else:
        wrapped = io.BufferedReader(stream)
        try:
            yield wrapped
        finally:
            wrapped.detach()


@contextmanager
def _parquet(source: Source, path: Path, size: int) -> Iterator[Rows]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: names that are not UTF-8
        raise _unreadable(source.origin, error) from error
    with file:
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            raise DataError(f"{source.origin}: column names are duplicated.", "Give each column its own name.")
        batches = file.iter_batches(batch_size=size)
        rows = (row for batch in batches for row in batch.to_pylist())
        guarded = _guarded(
            rows, source.origin, pyarrow.ArrowException, OverflowError, ValueError
        )  # dates beyond Python's
        yield Rows(source.origin, guarded, size=size, total=file.metadata.num_rows, schema=file.schema_arrow)


def _guarded(values: Iterator[Any], origin: str, *kinds: type[Exception]) -> Iterator[Any]:
    """The same values; errors on the way are converted to `DataError`."""
    failures: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield from values
    except failures as error:
        raise _unreadable(origin, error) from error


def _unreadable(origin: str, error: Exception) -> DataError:
    return data_error(f"Cannot read {origin}", error, "Check that the file is whole, and its permissions.")
