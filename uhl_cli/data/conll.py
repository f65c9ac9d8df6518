"""Read CoNLL files: a word a line, its columns between blanks, an empty line between sentences.

The tags are the last column in which every value is `O` or begins with a
one-letter chunk prefix such as `B-`.  So both the four columns of CoNLL-2003
(word, part of speech, chunk, entity) and `word entity 0` are read alike.
"""

from __future__ import annotations

import re
from pathlib import Path

from uhl_cli.errors import DataError

_TAG = re.compile(r"O|[BIES]-\S+")
_BLANKS = re.compile(r"[ \t]+")  # str.split() would also cut words at no-break spaces


def read_conll(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    """(words, tags) of every sentence of the file; document starts are left out.

    :raises DataError: If the file is not UTF-8, holds no words, has lines of
        unequal width, or no column looks like tags.
    """
    hint = "Write a word a line as `word tag`, with an empty line between sentences."
    sentences: list[list[list[str]]] = [[]]
    width = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                fields = _BLANKS.split(line.strip(" \t\r\n"))
                if fields == [""]:
                    sentences.append([])
                    continue
                if fields[0] == "-DOCSTART-":
                    continue
                width = width or len(fields)
                if len(fields) != width or width < 2:
                    columns = f"{len(fields)} column(s)" + (f", not {width}" if width > 1 else "")
                    raise DataError(f"{path.name}: line {number} has {columns}.", hint)
                sentences[-1].append(fields)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8: {error.reason}.", "Save the file as UTF-8.") from error
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise DataError(f"{path.name} has no words.", hint)
    column = _tag_column(path, sentences, width)
    words = [[fields[0] for fields in sentence] for sentence in sentences]
    return words, [[fields[column] for fields in sentence] for sentence in sentences]


def _tag_column(path: Path, sentences: list[list[list[str]]], width: int) -> int:
    for column in range(width - 1, 0, -1):
        if all(_TAG.fullmatch(fields[column]) for sentence in sentences for fields in sentence):
            return column
    if width == 2:
        return 1  # no choice: tags of another kind, such as parts of speech
    raise DataError(
        f"{path.name}: none of columns 2 to {width} holds only tags such as O, B-PER, I-PER.",
        "Keep two columns, `word tag`, or mark entities as B-NAME and I-NAME.",
    )
