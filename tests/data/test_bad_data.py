"""Data that cannot be used is refused with what is wrong and where, never read as something else."""

import pytest

from uhl_cli.data import load_task
from uhl_cli.errors import DataError, LabelError, UhlError, UhlWarning, UsageError

GOOD = "label\ttext\n0\ta\n1\tb\n"


def load(folder, content, name="data.tsv", **options):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_task(str(path), need_train=False, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "", "is empty"),
        ("x.tsv", "label\ttext\n", "has no rows"),
        ("x.jsonl", "", "is empty"),
        ("x.conll", "\n\n", "has no words"),
        ("x.tsv", "label\ttext\n0\ta\n1\n", "line 3 has 1 fields, the header 2"),
        ("x.tsv", "label\ttext\n0\ta\tb\n1\tc\td\n", "line 2 has 3 fields"),
        ("x.csv", 'label,text\n0,"open\n1,b\n', "Cannot read"),
        ("x.tsv", "label\tlabel\n0\t1\n", "duplicated"),
        ("x.tsv", b"label\ttext\n0\t\xff\xfe\n", "not UTF-8"),
        ("x.jsonl", '{"text": "a", "label"', "line 1 is not JSON"),
        ("x.jsonl", '{"text": "", "label": 0}\n{"text": " ", "label": 1}\n', "holds no text"),
        ("x.jsonl", '{"text": 5, "label": 0}\n{"text": 6, "label": 1}\n', "type int in row 1"),
        (
            "x.jsonl",
            '{"text": "a", "label": 0.5}\n{"text": "b", "label": 1.0}\n',
            "not a classification task",
        ),
        ("x.tsv", "label\ttext\n0.5\ta\n1.5\tb\n", "not a classification task"),
        ("x.jsonl", '{"text": "a", "label": {"x": 1}}\n', "type dict"),
        ("x.tsv", "label\ttext\n-1\ta\n\tb\n", "has a label"),
        ("x.tsv", "label\ttext\n1\ta\n1\tb\n", "two or more"),
        ("x.parquet", b"PAR1 this is none", "Cannot read"),
        ("x.xlsx", b"PK", "not a kind of data file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, content, name)
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_too_many_labels(tmp_path):
    rows = "".join(f"class {index}\ttext\n" for index in range(1001))
    with pytest.raises(DataError, match="over 1000"):
        load(tmp_path, "label\ttext\n" + rows)
    with pytest.warns(UhlWarning, match="1000 different labels in 1000 rows"):
        assert len(load(tmp_path, "label\ttext\n" + rows[: rows.rindex("class")]).task.labels) == 1000


@pytest.mark.parametrize(
    ("header", "message", "flag"),
    [
        ("label\tsentence\ttext", "several text columns", "--text-column"),
        ("label\tprose\tid", "no known text column", "--text-column"),
        ("label\tanswer\ttext", "several label columns", "--label-column"),
        ("id\tother\ttext", "no known label column", "--label-column"),
    ],
)
def test_columns_that_no_name_decides(tmp_path, header, message, flag):
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, f"{header}\n0\ta\tb\n1\tc\td\n")
    assert all(name in caught.value.message for name in header.split("\t"))
    assert flag in caught.value.hint


def test_column_flags_decide(tmp_path):
    content = "stars\tsentence\ttext\n0\ta\tb\n1\tc\td\n"
    loaded = load(tmp_path, content, text_column="text", pair_column="sentence", label_column="stars")
    assert loaded.evaluation.texts == ("b", "d")
    assert loaded.evaluation.pairs == ("a", "c")
    for flag in ("text_column", "pair_column", "label_column", "tokens_column"):
        with pytest.raises(DataError, match="no column 'absent'") as caught:
            load(tmp_path, content, **{flag: "absent"})
        assert f"--{flag.replace('_', '-')}" in caught.value.hint


def test_usual_pairs_are_found_without_flags(tmp_path):
    loaded = load(tmp_path, "label\tpremise\thypothesis\n0\ta\tb\n1\tc\td\n")
    assert (loaded.task.text_column, loaded.task.pair_column) == ("premise", "hypothesis")


def test_options_that_contradict_each_other(tmp_path):
    (tmp_path / "train.tsv").write_text(GOOD)
    folder = str(tmp_path)
    for options in (
        {"need_train": False, "need_evaluation": False},
        {"config": "sst2"},
        {"revision": "main"},
        {"tokens_column": "text", "text_column": "text"},
    ):
        with pytest.raises(UsageError):
            load_task(folder, **options)
    with pytest.raises(UsageError, match="is one file"):
        load_task(str(tmp_path / "train.tsv"), train_split="train")
    with pytest.raises(UsageError, match="classifies texts"):
        load_task("sst2", data=folder, tokens_column="text")


def test_folder_without_the_splits(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        load_task(str(tmp_path))
    (tmp_path / "other.tsv").write_text(GOOD)
    with pytest.raises(DataError, match=r"no training split; it holds other\.tsv"):
        load_task(str(tmp_path))
    (tmp_path / "dev.tsv").write_text(GOOD)
    assert len(load_task(str(tmp_path), need_train=False).evaluation) == 2


def test_splits_must_have_the_same_columns(tmp_path):
    (tmp_path / "train.tsv").write_text(GOOD)
    (tmp_path / "dev.tsv").write_text(GOOD.replace("text", "sentence"))
    with pytest.raises(DataError, match=r"dev\.tsv lacks the column\(s\) text"):
        load_task(str(tmp_path))


def test_unlabelled_rows_are_left_out_and_counted(tmp_path):
    with pytest.warns(UhlWarning, match=r"2 unlabelled or empty rows of .*/data\.tsv left out, of 4"):
        loaded = load(tmp_path, "label\ttext\n0\ta\n\tb\n1\tc\n-1\td\n")
    assert loaded.evaluation.texts == ("a", "c")
    assert "2 unlabelled" in loaded.source


def test_labels_that_the_adapter_does_not_know(tmp_path):
    with pytest.raises(LabelError, match="labels bad, good; known are negative, positive") as caught:
        load(tmp_path, "label\ttext\nbad\ta\ngood\tb\n", labels=("negative", "positive"))
    assert isinstance(caught.value, UhlError)
    with pytest.raises(LabelError):
        load(tmp_path, "label\ttext\n0\ta\n2\tb\n", labels=("negative", "positive"))
