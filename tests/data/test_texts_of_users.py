"""Texts as users hold them: one string is one text, and what is no text is named by its place and type."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from uhl_cli.data.texts import as_texts
from uhl_cli.errors import DataError

ROWS = ["a cold day", "", "soup\nand bread"]


@pytest.mark.parametrize(
    "held",
    [
        ROWS,
        tuple(ROWS),
        np.array(ROWS),
        np.array(ROWS, dtype=object),
        pd.Series(ROWS, index=[7, 3, 5]),
        pd.Series(ROWS, dtype="string"),
        pd.Series(ROWS, dtype="category"),
        Dataset.from_dict({"text": ROWS})["text"],
    ],
    ids=["list", "tuple", "array", "object array", "series", "string series", "categories", "datasets"],
)
def test_a_collection_gives_its_strings_in_order(held):
    found = as_texts(held)
    assert found == ROWS
    assert [type(text) for text in found] == [str] * 3


@pytest.mark.parametrize("one", ["a cold day", np.str_("a cold day"), np.array("a cold day")])
def test_one_string_is_one_text(one):
    assert as_texts(one) == ["a cold day"]
    assert type(as_texts(one)[0]) is str


@pytest.mark.parametrize(
    ("entry", "kind"),
    [(None, "NoneType"), (float("nan"), "float"), (1.5, "float"), (b"a", "bytes"), (["a"], "list"), (3, "int")],
)
@pytest.mark.parametrize("hold", [list, tuple, lambda rows: pd.Series(rows, dtype=object)])
def test_an_entry_that_is_no_string_is_named(entry, kind, hold):
    with pytest.raises(DataError, match=rf"texts\[1\] is of type {kind}"):
        as_texts(hold(["a", entry]))


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (pd.Series(["a", None], dtype="string"), r"texts\[1\] is of type NAType"),
        (np.array([["a"], ["b"]]), r"texts\[0\] is of type list"),
        (np.array([1, 2]), r"texts\[0\] is of type int"),
        (np.array(["a", "b"], dtype=bytes), r"texts\[0\] is of type bytes"),
    ],
)
def test_arrays_of_other_things_are_refused(wrong, kind):
    with pytest.raises(DataError, match=kind):
        as_texts(wrong)


@pytest.mark.parametrize("empty", [[], (), np.array([]), pd.Series([], dtype=object)])
def test_no_text_is_refused(empty):
    with pytest.raises(DataError, match="empty"):
        as_texts(empty)


@pytest.mark.parametrize("wrong", [None, 3, b"a", bytearray(b"a"), {"a": 1}, {"a"}, pd.DataFrame({"text": ["a"]})])
def test_what_holds_no_texts_is_refused_by_its_type(wrong):
    with pytest.raises(DataError, match=f"type {type(wrong).__name__} "):
        as_texts(wrong)


def test_neither_numpy_nor_pandas_is_imported_for_it():
    code = "import sys, uhl_cli.data.texts; print([n for n in ('numpy', 'pandas', 'torch') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
