"""Parse text files of data: their encoding, csv and tsv, JSON, CoNLL's columns.

Text stays text: `null`, `NA` and `007` are read as written.  Every error names the file, and the line where there is
one.  A file is untrusted: beyond `MOST_COLUMNS` columns or `MOST_DEPTH` nested lists and records it is refused before
they are built.

This module imports neither torch nor datasets.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

from uhl_cli.errors import DataError, UsageError, first_line

Row = dict[str, Any]
MOST_COLUMNS = 5000
MOST_DEPTH = 100
# Bytes at the beginning of a file that show what it is.
HEAD_BYTES = 4096
# Names of columns that a message lists.
_LISTED = 30

# The tags of CoNLL files.
_TAG = re.compile(r"O|[BIES]-\S+")
_BLANKS = re.compile(r"[ \t]+")  # str.split() would also cut words at no-break spaces
_CONLL_HINT = "Write a word a line as `word tag`, with an empty line between sentences."
_JSON_HINT = 'Write one JSON record a line, such as {"text": "..."}.'
_QUOTED = re.compile(r'"[^"]*"')
# The strings of JSON, whose brackets do not nest; and the brackets.
_JSON_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"|[\[\]{}]')
_SEPARATORS = {",": "','", "\t": "tabs", ";": "';'", "|": "'|'"}
# UTF-32's mark for little endian begins with UTF-16's.
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def shown_columns(names: Sequence[str]) -> str:
    """The names of columns for a message, the first of very many."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def checked_encoding(name: str | None) -> str:
    """An encoding as Python knows it; UTF-8, with or without a mark, if None.

    :raises UsageError: There is no such encoding of text.
    """
    if name is None:
        return "utf-8-sig"
    try:
        found = codecs.lookup(io.TextIOWrapper(io.BytesIO(), encoding=name).encoding).name
    except (LookupError, ValueError) as error:
        problem = f"--encoding {name}: Python knows no such encoding of text."
        raise UsageError(problem, "Examples: utf-8, utf-16, latin-1, cp1252.") from error
    return "utf-8-sig" if found == "utf-8" else found


@contextmanager
def text_lines(
    binary: io.BufferedReader, origin: str, *, encoding: str | None = None, newline: str | None = ""
) -> Iterator[Iterator[str]]:
    """The lines of a file, with their line ends.  `binary` stays open.

    :param newline: As in `open`; "" keeps line ends as they are.
    :raises UsageError: There is no such encoding.
    :raises DataError: From the iterator, when the file is binary or not in this encoding.
    """
    wrapper = io.TextIOWrapper(binary, encoding=checked_encoding(encoding), newline=newline)

    def lines() -> Iterator[str]:
        refuse_binary(binary.peek(HEAD_BYTES)[:HEAD_BYTES], origin, encoding)
        try:
            yield from (line if number else line.removeprefix("\ufeff") for number, line in enumerate(wrapper))
        except UnicodeError as error:
            raise _not_decoded(origin, encoding, error) from error

    try:
        yield lines()
    finally:
        wrapper.detach()


def refuse_binary(head: bytes, origin: str, encoding: str | None) -> None:
    """Refuse a file that is not text in the encoding, as far as its beginning shows.

    :raises DataError: It is binary, or seems to be in another encoding.
    """
    seems = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if encoding is None and seems is None and b"\0" in head and not head.startswith((b"PAR1", b"PK")):
        odd, even = head[1::2].count(0), head[::2].count(0)
        if max(odd, even) > len(head) // 5:
            seems = "utf-16-le" if odd > even else "utf-16-be"
    if encoding is None and seems is not None:
        raise DataError(f"{origin} is not UTF-8; it seems to be {seems.upper()}.", f"Add --encoding {seems}.")
    if "\0" in head.decode(checked_encoding(encoding), "ignore"):
        if head.startswith(b"PAR1"):
            raise DataError(
                f"{origin} is binary: a parquet file.",
                "Name it .parquet; for `uhl predict`, --format parquet does the same.",
            )
        hint = "Save it as text in UTF-8, or name its encoding with --encoding."
        raise DataError(f"{origin} is binary, not text{f' in {encoding}' if encoding else ''}.", hint)


def _not_decoded(origin: str, encoding: str | None, error: UnicodeError) -> DataError:
    reason = error.reason if isinstance(error, UnicodeDecodeError) else first_line(error)
    hint = "Name its encoding with --encoding, such as --encoding latin-1 or cp1252, or save it as UTF-8."
    return DataError(f"{origin} is not {encoding or 'UTF-8'}: {reason}.", hint)


def delimited_rows(lines: Iterable[str], name: str, *, tabs: bool) -> Iterator[list[str]]:
    """Yield the column names, then the fields of each row, as many as there are names.

    Empty lines are left out.  Fields are separated by commas (by tabs if `tabs`, and then not quoted); where the first
    line has none, by the tab, `;`, `|` or comma that it does have.

    :param lines: Lines with their line ends, as from a file opened with `newline=""`.
    :raises DataError: If a row has more or fewer fields, quotes do not close, a name is missing or duplicated, or there
        are over `MOST_COLUMNS` names.
    """
    lines, leading = iter(lines), list[str]()
    for line in lines:
        leading.append(line)
        if line.strip("\r\n"):
            break
    first = leading[-1] if leading else ""
    separator = _separator(first, "\t" if tabs else ",")
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs and separator == "\t" else csv.QUOTE_MINIMAL
    limit = csv.field_size_limit(sys.maxsize)
    try:
        if first.count(separator) >= MOST_COLUMNS:  # counted before the fields are built
            raise too_many_columns(name)
        rows = csv.reader(chain(leading, lines), delimiter=separator, quoting=quoting, strict=True)
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
                problem = f"{name}: line {rows.line_num} has {len(row)} fields, the header {len(header)}"
                raise DataError(
                    f"{problem} (separated by {_SEPARATORS[separator]}).", _fields_hint(first, separator, quoting)
                )
    except csv.Error as error:
        raise DataError(f"Cannot read {name}: {error}.", "Check its quotes and delimiters.") from error
    finally:
        csv.field_size_limit(limit)


def _separator(header: str, usual: str) -> str:
    """The separator of a first line: the usual one, or the most frequent of the others if it has none of that."""
    unquoted = _QUOTED.sub("", header)
    return usual if usual in unquoted else max((usual, *_SEPARATORS), key=unquoted.count)


def _fields_hint(header: str, separator: str, quoting: int) -> str:
    seems = max((separator, *_SEPARATORS), key=header.count)
    if seems != separator:
        return f"It seems to be separated by {_SEPARATORS[seems]}: keep other separators out of the column names."
    return f"Repair the line; fields {'are not' if quoting == csv.QUOTE_NONE else 'may be'} quoted."


def too_many_columns(name: str) -> DataError:
    """The error for a table beyond `MOST_COLUMNS`."""
    return DataError(f"{name} has over {MOST_COLUMNS:,} columns.", "Keep the columns of the text and the label.")


def json_records(lines: Iterable[str], name: str, *, whole: bool = False) -> Iterator[Row]:
    """Yield the records of JSON lines; empty lines are left out.

    :param whole: Also read what needs the whole file: an array of records or texts, one record over several lines, or
        a record of columns, which are lists of one length.
    :raises DataError: If a line is not a record, or is nested over `MOST_DEPTH` deep; names the line (the record in an
        array).
    """
    lines = iter(lines)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}: line {number}"
        if whole and (line.lstrip().startswith("[") or line.strip() == "{"):
            yield from _whole_records("".join(chain([line], lines)), name)
            return
        record = _parsed(line, where)
        if not isinstance(record, dict):
            what = "a whole array" if isinstance(record, list) else f"a {type(record).__name__}"
            raise DataError(f"{where} is {what}, not a record.", _JSON_HINT)
        yield _few_keys(record, where)


def _whole_records(content: str, name: str) -> Iterator[Row]:
    value = _parsed(content, name)
    if isinstance(value, dict):
        columns = list(value.values())
        if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
            yield _few_keys(value, name)
            return
        value = [dict(zip(_few_keys(value, name), row, strict=True)) for row in zip(*columns, strict=True)]
    for number, record in enumerate(value, 1):
        where = f"{name}: record {number}"
        if isinstance(record, str):
            yield {"text": record}
        elif isinstance(record, dict):
            yield _few_keys(record, where)
        else:
            raise DataError(f"{where} is of type {type(record).__name__}, not a record.", _JSON_HINT)


def _few_keys(record: Row, where: str) -> Row:
    if len(record) > MOST_COLUMNS:
        raise too_many_columns(where)
    return record


def _parsed(text: str, where: str) -> Any:  # noqa: ANN401 - any JSON
    # json and pyarrow follow nested values by recursion, which ends in an error or in a crash of the process.
    if text.count("[") + text.count("{") > MOST_DEPTH:
        depth = 0
        for found in _JSON_TOKEN.finditer(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth > MOST_DEPTH:
                raise DataError(
                    f"{where} is nested over {MOST_DEPTH} deep.", "Keep the text and the label of each row."
                )
    try:
        return json.loads(text, parse_constant=lambda _: None)  # NaN is pandas' missing value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {first_line(error)}.", "Write one JSON record a line.") from error


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


def tagged_words(sentences: Sequence[list[list[str]]], name: str) -> tuple[list[list[str]], list[list[str]]]:
    """(words, tags) of sentences in CoNLL's columns.

    The tags are the last column in which every value is `O` or begins with a one-letter chunk prefix such as `B-`: so
    the four columns of CoNLL-2003 (word, part of speech, chunk, entity) and `word entity 0` both give the entity.

    :raises DataError: If there are no words, or no column looks like tags.
    """
    if not sentences:
        raise DataError(f"{name} has no words.", _CONLL_HINT)
    column, width = tag_column(sentences), len(sentences[0][0])
    if column is None and width > 2:
        raise DataError(
            f"{name}: none of columns 2 to {width} holds only tags such as O, B-PER, I-PER.",
            "Keep two columns, `word tag`, or mark entities as B-NAME and I-NAME.",
        )
    column = column or 1  # with two columns, the second is taken whatever its tags, such as parts of speech
    words = [[fields[0] for fields in sentence] for sentence in sentences]
    return words, [[fields[column] for fields in sentence] for sentence in sentences]
