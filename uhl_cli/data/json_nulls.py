"""Refuse null among the words of a JSON list, before pyarrow reads the file.

pyarrow's JSON reader (18 to 26 at least) makes invalid arrays of
`[null, "word"]`: words move into other rows, or the process dies.  datasets
checks for that from 5.1 on; earlier versions pass the damage on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from uhl_cli.errors import DataError

# Finds every such list and now and then a text that looks like one, which parsing then tells apart.
_SUSPECT = re.compile(rb"[\[,]\s*null\s*[,\]]")


def refuse_null_words(path: Path) -> None:
    """Nothing, unless a list of texts in a record of the file holds null.

    :raises DataError: If one does, naming the line (the record in a file that is one JSON array).
    """
    content = path.read_bytes()
    if _SUSPECT.search(content) is None:
        return
    try:
        whole = json.loads(content) if content.lstrip()[:1] == b"[" else None
        if isinstance(whole, list):
            for number, record in enumerate(whole, 1):
                _check(path, "record", number, record)
            return
        for number, line in enumerate(content.split(b"\n"), 1):
            if _SUSPECT.search(line) is not None:
                _check(path, "line", number, json.loads(line))
    except ValueError:
        return  # not valid JSON: the reader says what is wrong with it


def _check(path: Path, unit: str, number: int, record: object) -> None:
    for value in record.values() if isinstance(record, dict) else ():
        if isinstance(value, list) and None in value and any(isinstance(each, str) for each in value):
            raise DataError(
                f"{path.name}: {unit} {number} has null among the words or tags of a list.",
                "Write each word as text, and O for a word outside; leave out sentences without tags.",
            )
