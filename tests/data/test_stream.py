"""Rows are read as they are needed, and as they are written; what cannot be read is one line with its place."""

import io
import json
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from endless import Endless

from uhl_cli.data.columns import ColumnFlags, columns_to_label
from uhl_cli.data.stream import Rows, find_source, open_rows
from uhl_cli.data.tasks import TASKS, Task
from uhl_cli.errors import DataError, UhlError, UsageError

CONLL = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP B-PER\n"


def rows_of(folder, name, content, *, form=None, words=False, size=2):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with open_rows(find_source(str(path), form), size=size, words=words) as rows:
        return [row for chunk in rows.chunks() for row in chunk]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", "a b\n\nNA\r\nlast", [{"text": "a b"}, {"text": ""}, {"text": "NA"}, {"text": "last"}]),
        ("x.txt", "\ufeffone\n", [{"text": "one"}]),
        (
            "x.csv",
            'id,text\n007,"a, ""b""\nc"\n\n8,null\n',
            [{"id": "007", "text": 'a, "b"\nc'}, {"id": "8", "text": "null"}],
        ),
        ("x.TSV", 'text\tn\n"a\t1\n', [{"text": '"a', "n": "1"}]),
        (
            "x.jsonl",
            '{"t": "a", "n": 12345678901234567890}\n\n{"u": [1, null]}',
            [{"t": "a", "n": 12345678901234567890}, {"u": [1, None]}],
        ),
        (
            "x.conll",
            CONLL,
            [
                {"tokens": ["EU", "rejects"], "gold_tags": ["B-ORG", "O"]},
                {"tokens": ["Peter"], "gold_tags": ["B-PER"]},
            ],
        ),
        ("x.conll", "EU\nrejects\n\nPeter\n", [{"tokens": ["EU", "rejects"]}, {"tokens": ["Peter"]}]),
    ],
)
def test_values_stay_what_they_are(tmp_path, name, content, expected):
    assert rows_of(tmp_path, name, content) == expected
    assert rows_of(tmp_path, name, content, size=100) == expected


def test_parquet_keeps_its_types(tmp_path):
    table = pyarrow.table({"text": ["a", "b", "c"], "n": pyarrow.array([1, None, 3], pyarrow.int8())})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=1)
    with open_rows(find_source(str(tmp_path / "x.parquet"), None), size=2) as rows:
        assert (rows.total, rows.schema.field("n").type) == (3, pyarrow.int8())
        assert list(rows.chunks()) == [[{"text": "a", "n": 1}, {"text": "b", "n": None}], [{"text": "c", "n": 3}]]


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("txt", b"a text of some length, so that a buffer is soon full\n"),
        ("jsonl", b'{"text": "a text of some length, so that a buffer is soon full"}\n'),
        ("csv", b"a text of some length; so that a buffer is soon full\n"),
        ("conll", b"word-of-some-length-so-that-a-buffer-is-soon-full O\n\n"),
    ],
)
def test_no_more_is_read_than_is_asked_for(form, line, monkeypatch):
    """Of an input without an end, one chunk of ten and then another; a buffer's worth may be read ahead."""
    stream = Endless(line)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    ahead = 2 * io.DEFAULT_BUFFER_SIZE // len(line) + 1
    with open_rows(find_source("-", form), size=10) as rows:
        chunks = rows.chunks()
        for number in range(3):
            assert len(next(chunks)) == 10
            assert stream.lines <= 10 * (number + 1) + ahead
    most = 100 * ahead
    stream = Endless(line, most)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    with open_rows(find_source("-", form), size=most) as rows:
        assert stream.lines == most, "reading everything would be noticed"
        assert sum(len(chunk) for chunk in rows.chunks()) in (most, most - 1)


def test_a_chunk_that_was_handed_out_is_not_kept():
    class Held(dict):
        """A row that can be asked whether it is still there."""

        alive = 0

        def __init__(self):
            super().__init__(text="a")
            Held.alive += 1

        def __del__(self):
            Held.alive -= 1

    most = 0
    for _ in Rows("x", (Held() for _ in range(1000)), size=10).chunks():
        most = max(most, Held.alive)
    assert most <= 20
    kept = list(Rows("x", (Held() for _ in range(1000)), size=10).chunks())
    assert Held.alive >= len(kept) * 10 == 1000, "it would be noticed"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", "", "holds no text"),
        ("x.csv", "", "holds no text"),
        ("x.csv", "id,text\n", "holds no text"),
        ("x.jsonl", "\n\n", "holds no text"),
        ("x.conll", "\n-DOCSTART-\n", "holds no text"),
        ("x.csv", "id,text\n1,a\n2\n", "line 3 has 1 fields, the header 2"),
        ("x.csv", 'id,text\n1,"open\n', "Check its quotes"),
        ("x.tsv", "text\ttext\na\tb\n", "duplicated"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("x.jsonl", '["a"]\n', "line 1 is a whole array, not a record"),
        ("x.jsonl", '"a"\n', "line 1 is a str, not a record"),
        ("x.jsonl", "[" * 100_000, "line 1 is nested over 100 deep"),
        ("x.conll", "a O\nb\n", "line 2 has 1 column"),
        ("x.txt", b"caf\xe9\n", "is not UTF-8"),
        ("x.csv", b"text\ncaf\xe9\n", "is not UTF-8"),
        ("x.jsonl", b'{"text": "caf\xe9"}\n', "is not UTF-8"),
        ("x.txt", "text".encode("utf-16"), "it seems to be UTF-16. Add --encoding utf-16."),
        ("x.csv", b"PK\x03\x04\x00\x00", "is binary, not text"),
        ("x.txt", b"PAR1\x15\x04\x15\x00", "--format parquet"),
        ("x.parquet", b"PAR1 this is none", "Cannot read"),
        ("x.parquet", b"", "Cannot read"),
        ("x.xlsx", b"PK", "the ending of x.xlsx is none of .txt .csv"),
        ("x", "a", "Say what it is with --format"),
        ("x.json", "[]", "--format jsonl"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, words):
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, name, content)
    assert words in str(caught.value)
    assert caught.value.hint
    assert str(tmp_path) not in str(caught.value)


def test_what_is_wrong_far_down_is_said_with_its_line(tmp_path):
    lines = ['{"text": "a"}'] * 500
    with pytest.raises(DataError, match="line 501"):
        rows_of(tmp_path, "x.jsonl", "\n".join([*lines, "{"]))
    whole = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(n) * 50 for n in range(5000)]}), whole, row_group_size=500)
    content = bytearray(whole.getvalue().to_pybytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    with pytest.raises(DataError, match="Cannot read"):
        rows_of(tmp_path, "x.parquet", bytes(content))


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is no file"):
        find_source(str(tmp_path / "x.csv"), None)
    with pytest.raises(DataError, match="is a folder"):
        find_source(str(tmp_path), None)
    with pytest.raises(UsageError, match="parquet cannot be read from stdin"):
        find_source("-", "parquet")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="stdin is closed"), open_rows(find_source("-", None), size=2):
        pass


def test_a_form_that_is_named_goes_before_the_ending(tmp_path):
    assert rows_of(tmp_path, "x.csv", '{"text": "a"}\n', form="jsonl") == [{"text": "a"}]
    assert rows_of(tmp_path, "x", "a b\n", form="txt") == [{"text": "a b"}]


def test_a_txt_file_in_conlls_columns_is_conll_for_words_alone(tmp_path):
    tagged = rows_of(tmp_path, "x.txt", CONLL, words=True)
    assert tagged[0] == {"tokens": ["EU", "rejects"], "gold_tags": ["B-ORG", "O"]}
    assert rows_of(tmp_path, "x.txt", CONLL * 200, words=True)[-1] == tagged[-1]
    assert rows_of(tmp_path, "x.txt", CONLL)[2] == {"text": "EU NNP B-NP B-ORG"}
    assert rows_of(tmp_path, "x.txt", CONLL, words=True, form="txt")[2] == {"text": "EU NNP B-NP B-ORG"}
    names = "John Smith\nJane Doe\n\nAnna O\n"
    assert rows_of(tmp_path, "x.txt", names, words=True)[0] == {"text": "John Smith"}


def table(*names, lists=()):
    return Rows("x.csv", iter([{name: ["a"] if name in lists else "a" for name in names}]), size=2)


def own_task(**columns):
    kind = "tokens" if "tokens_column" in columns else "sequence"
    return Task(name="mine", kind=kind, labels=("a", "b"), metric="accuracy", label_column="y", **columns)


@pytest.mark.parametrize(
    ("names", "kind", "task", "flags", "expected"),
    [
        (("id", "sentence"), "sequence", None, {}, {"text": "sentence"}),
        (("premise", "hypothesis", "label"), "sequence", None, {}, {"text": "premise", "pair": "hypothesis"}),
        (("id", "body", "text"), "sequence", own_task(text_column="body"), {}, {"text": "body"}),
        (("id", "text"), "sequence", own_task(text_column="body"), {}, {"text": "text"}),
        (("body", "text"), "sequence", own_task(text_column="body"), {"text": "text"}, {"text": "text"}),
        (("a", "b"), "sequence", own_task(text_column="a", pair_column="b"), {}, {"text": "a", "pair": "b"}),
        (("text", "label"), "sequence", TASKS["sst2"], {}, {"text": "text"}),
        (("words*", "text"), "tokens", own_task(tokens_column="words"), {}, {"tokens": "words"}),
        (("words", "text"), "tokens", own_task(tokens_column="words"), {}, {"text": "text"}),
        (("tokens*",), "sequence", None, {}, {"tokens": "tokens"}),
        (("tokens*", "text"), "tokens", None, {"text": "text"}, {"text": "text"}),
    ],
)
def test_columns_are_guessed_as_elsewhere(names, kind, task, flags, expected):
    if task is TASKS["sst2"]:
        task = Task(
            name="sst2", kind="sequence", labels=("n", "p"), metric="accuracy", text_column="x", label_column="y"
        )
    lists = [name.rstrip("*") for name in names if name.endswith("*")]
    rows = table(*(name.rstrip("*") for name in names), lists=lists)
    found = columns_to_label(rows, kind, task, ColumnFlags(**flags))
    assert {name: getattr(found, name) for name in ("text", "pair", "tokens") if getattr(found, name)} == expected


@pytest.mark.parametrize(
    ("names", "kind", "task", "flags", "words"),
    [
        (("id", "prose"), "sequence", None, {}, "no known text column"),
        (("sentence", "text"), "sequence", None, {}, "several text columns"),
        (("text",), "sequence", None, {"text": "absent"}, "no column 'absent'"),
        (("text",), "sequence", own_task(text_column="text", pair_column="b"), {}, "mine takes two"),
        (("text", "b"), "tokens", None, {"text": "text", "pair": "b"}, "takes no second text"),
        (("text", "tokens*"), "tokens", None, {"text": "text", "tokens": "tokens"}, "exclude each other"),
    ],
)
def test_columns_that_do_not_fit(names, kind, task, flags, words):
    rows = table(*(name.rstrip("*") for name in names), lists=[name.rstrip("*") for name in names if "*" in name])
    with pytest.raises(UhlError) as caught:
        columns_to_label(rows, kind, task, ColumnFlags(**flags))
    assert words in str(caught.value)
    assert "-column" in caught.value.hint


def test_json_records_may_differ_in_their_columns(tmp_path):
    lines = "\n".join(json.dumps(row) for row in ({"text": "a"}, {"text": "b", "more": 1}))
    assert rows_of(tmp_path, "x.jsonl", lines)[1] == {"text": "b", "more": 1}
