"""Data as spreadsheets, pandas, Kaggle and older tools write it: read right, or refused in one line that says why."""

import json
import tracemalloc
import warnings

import pytest

from uhl_cli.data import load_task
from uhl_cli.data.load import load_unlabelled
from uhl_cli.data.parsing import MOST_COLUMNS, MOST_DEPTH
from uhl_cli.data.stream import find_source, open_rows
from uhl_cli.errors import DataError, UhlError, UhlWarning, UsageError


def write(folder, name, content, encoding="utf-8"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def scored(path, **options):
    return load_task(path, need_train=False, **options)


def rows_of(path, **options):
    with open_rows(find_source(path, None), size=2, **options) as rows:
        return [row for chunk in rows.chunks() for row in chunk]


def said(caught):
    return [str(each.message) for each in caught if issubclass(each.category, UhlWarning)]


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "NA", "N/A", "<NA>", "null", "-1", "-1.0"])
def test_whole_numbers_beside_an_empty_cell(tmp_path, missing):
    path = write(tmp_path, "x.csv", f"text,label\na,1.0\nb,0.0\nc,{missing}\nd,1.0\n")
    with pytest.warns(UhlWarning, match=r"1 unlabelled or empty rows of .*/x\.csv left out, of 4"):
        loaded = scored(path)
    assert (loaded.task.labels, loaded.evaluation.labels) == (("0", "1"), (1, 0, 1))
    assert loaded.evaluation.texts == ("a", "b", "d")
    with pytest.warns(UhlWarning, match="left out"):
        assert scored(path, labels=("negative", "positive")).evaluation.labels == (1, 0, 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_whole_numbers_that_pandas_made_floats(tmp_path, suffix):
    import pandas

    table = pandas.DataFrame({"text": ["a", "b", None, "d"], "label": [1.0, float("nan"), 0.0, 1.0]})
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=True)
    with pytest.warns(UhlWarning) as caught:
        loaded = scored(str(path))
    assert loaded.evaluation.texts == ("a", "", "d"), "a null text is an empty one"
    assert (loaded.task.labels, loaded.evaluation.labels) == (("0", "1"), (1, 0, 1))
    assert [line.split()[:2] for line in said(caught)] == [["1", "unlabelled"], ["1", "null"]]


def test_nan_of_json_is_missing_in_texts_and_labels(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": float("nan"), "label": 1}, {"text": "c", "label": float("nan")}]
    path = write(tmp_path, "x.jsonl", "\n".join(json.dumps(row) for row in rows))
    with pytest.warns(UhlWarning):
        loaded = scored(path)
    assert loaded.evaluation.texts == ("a", "")


def test_names_of_missing_values_are_classes_where_they_are_known_or_tags(tmp_path):
    path = write(tmp_path, "x.csv", "text,label\na,NA\nb,EU\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scored(path, labels=("EU", "NA")).evaluation.labels == (1, 0)
        assert scored(write(tmp_path, "x.conll", "dog NA\nbarks VB\n")).task.labels == ("NA", "VB")
        none = write(tmp_path, "y.csv", "text,label\na,none\nb,None\nc,hate\n")
        assert scored(none).task.labels == ("None", "hate", "none")


@pytest.mark.parametrize(
    ("label", "words"), [("0.5", "decimal"), ("1.25", "decimal"), ("1e5", "decimal"), ("1" * 5000, "decimal")]
)
def test_other_numbers_are_no_classes(tmp_path, label, words):
    with pytest.raises(DataError, match=words):
        scored(write(tmp_path, "x.csv", f"text,label\na,1.0\nb,{label}\n"))


@pytest.mark.parametrize(
    "content",
    [
        ("x.csv", "text,label\na,\"['a', 'b']\"\nb,\"['a']\"\n"),
        ("x.csv", 'text,label\na,"[0, 1]"\nb,[]\n'),
        ("x.jsonl", '{"text": "a", "label": ["a", "b"]}\n{"text": "b", "label": ["a"]}\n'),
    ],
)
def test_lists_of_labels_are_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"lists.*multi-label") as caught:
        scored(write(tmp_path, *content))
    assert "one class" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", 'text;label\n"a; b, c";1\nd;0\n'),
        ("x.csv", 'text\tlabel\n"a; b, c"\t1\nd\t0\n'),
        ("x.csv", 'text|label\n"a; b, c"|1\nd|0\n'),
        ("x.tsv", 'text,label\n"a; b, c",1\nd,0\n'),
        ("x.tsv", "\n\ntext;label\na; b, c".replace("; b", '" b').replace('a"', '"a;') + '";1\nd;0\n'),
    ],
)
def test_other_separators_are_recognised(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert scored(path).evaluation.texts == ("a; b, c", "d")
    assert [row["label"] for row in rows_of(path)] == ["1", "0"]


def test_the_usual_separator_goes_before_others_and_the_error_names_what_it_seems(tmp_path):
    path = write(tmp_path, "x.csv", "text,label;x\na;b,1\nc,0\n")
    assert rows_of(path)[0] == {"text": "a;b", "label;x": "1"}
    assert rows_of(write(tmp_path, "x.csv", "text\na\nb\n")) == [{"text": "a"}, {"text": "b"}]
    path = write(tmp_path, "x.csv", "id;text, long;label\n1;a;0\n")
    with pytest.raises(DataError, match=r"line 2 has 1 fields, the header 2 \(separated by ','\)") as caught:
        scored(path)
    assert "seems to be separated by ';'" in caught.value.hint


CAFE = "text,label\ncafé,1\nthé,0\n"


@pytest.mark.parametrize(
    ("encoding", "named", "words"),
    [
        ("latin-1", "latin-1", "is not UTF-8: invalid continuation byte"),
        ("utf-16", "utf-16", "it seems to be UTF-16"),
        ("utf-16-le", "utf-16-le", "it seems to be UTF-16-LE"),
        ("utf-16-be", "utf-16-be", "it seems to be UTF-16-BE"),
        ("utf-32", "utf-32", "it seems to be UTF-32"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".conll", ".txt"])
def test_other_encodings(tmp_path, encoding, named, words, suffix):
    content = {".csv": CAFE, ".conll": "café B-X\nthé O\n", ".txt": "café B-X\nthé O\n"}.get(suffix)
    if content is None:
        rows = [{"text": "café", "label": 1}, {"text": "thé", "label": 0}]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        content = lines if suffix == ".jsonl" else json.dumps(rows, ensure_ascii=False)
    path = write(tmp_path, f"x{suffix}", content, encoding)
    readers = [scored] if suffix == ".json" else [scored, rows_of]
    for read in readers:
        with pytest.raises(DataError) as caught:
            read(path)
        assert f"x{suffix}" in caught.value.message
        assert words in caught.value.message
        assert f"--encoding {named}" in str(caught.value).replace("with --encoding, such as --encoding", "--encoding")
    assert scored(path, encoding=named).evaluation.texts[0].startswith("café")
    if suffix != ".json":
        first = rows_of(path, encoding=named, words=suffix == ".txt")[0]
        assert "café" in (first["text"] if suffix in (".csv", ".jsonl") else first["tokens"])


def test_an_encoding_that_is_not_the_files(tmp_path):
    path = write(tmp_path, "x.csv", CAFE, "utf-16")
    for read in (scored, rows_of):
        with pytest.raises(DataError, match=r"x\.csv is binary, not text in latin-1"):
            read(path, encoding="latin-1")
        with pytest.raises(UsageError, match="Python knows no such encoding"):
            read(path, encoding="nosuch")
        with pytest.raises(UsageError, match="Python knows no such encoding"):
            read(path, encoding="hex")
    with pytest.raises(DataError, match="is not utf-16: UTF-16 stream does not start with BOM"):
        scored(write(tmp_path, "x.csv", CAFE), encoding="utf-16")
    lines = write(tmp_path, "x.txt", "café\n", "latin-1")
    with pytest.raises(DataError, match="not UTF-8"):
        load_unlabelled(lines, kind="sequence")
    assert load_unlabelled(lines, kind="sequence", encoding="latin-1").examples.texts == ("café",)


@pytest.mark.parametrize("header", ["Text,Label", "TEXT,LABEL", " text , label"])
def test_column_names_match_whatever_their_case(tmp_path, header):
    write(tmp_path, "train.csv", f"{header}\na,1\nb,0\n")
    write(tmp_path, "dev.csv", "text,label\nc,1\n")
    loaded = load_task(str(tmp_path))
    assert (loaded.train.texts, loaded.evaluation.texts) == (("a", "b"), ("c",))
    assert load_task("sst2", data=str(tmp_path)).train.labels == (1, 0)
    assert load_task(str(tmp_path), text_column="tEXT", label_column="laBEL").train.labels == (1, 0)
    with pytest.raises(DataError, match="no column 'tex'"):
        load_task(str(tmp_path), text_column="tex")


def test_a_name_that_fits_exactly_goes_before_others(tmp_path):
    path = write(tmp_path, "x.csv", "Text,text,label\na,b,1\nc,d,0\n")
    assert scored(path).evaluation.texts == ("b", "d")
    assert scored(path, text_column="Text").evaluation.texts == ("a", "c")
    with pytest.raises(DataError, match="no column 'TEXT'"):
        scored(path, text_column="TEXT")


@pytest.mark.parametrize("hidden", ["id,text\n8,x\n9,y\n", "id,text,target\n8,x,\n9,y,\n", "id,text,target\n8,x,-1\n"])
def test_a_kaggle_layout_trains_and_is_scored(tmp_path, hidden):
    rows = "".join(f"{index},t{index},{index % 2}\n" for index in range(20))
    write(tmp_path, "train.csv", f"id,text,target\n{rows}")
    write(tmp_path, "test.csv", hidden)
    write(tmp_path, "sample_submission.csv", "id,target\n8,0\n9,0\n")
    with pytest.warns(UhlWarning, match=r"test\.csv has no labels: the scores are of training rows"):
        loaded = load_task(str(tmp_path))
    assert (len(loaded.train), len(loaded.evaluation)) == (18, 2)
    with pytest.warns(UhlWarning, match=r"test\.csv has no labels"):
        assert scored(str(tmp_path)).evaluation == loaded.evaluation
    with pytest.raises(DataError, match=r"No row of|lacks the column|no known label column"):
        load_task(str(tmp_path), evaluation_split="test")
    write(tmp_path, "dev.csv", "id,text,target\n1,labelled,1\n")
    assert load_task(str(tmp_path)).evaluation.texts == ("labelled",), "a split with labels is used"


def test_a_class_of_the_test_part_alone_is_said(tmp_path):
    write(tmp_path, "train.csv", "text,label\na,x\nb,y\n")
    write(tmp_path, "test.csv", "text,label\na,x\nb,z\n")
    with pytest.warns(UhlWarning, match="no training example has the label z, but evaluation examples do"):
        load_task(str(tmp_path))
    write(tmp_path, "test.csv", "text,label\na,x\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(str(tmp_path))


def test_a_column_of_ids_is_said(tmp_path):
    path = write(tmp_path, "x.csv", "text,label\n" + "".join(f"a,{index}\n" for index in range(30)))
    with pytest.warns(UhlWarning, match="column 'label' of .* has 30 different labels in 30 rows, like ids"):
        scored(path)
    path = write(tmp_path, "x.csv", "text,label\n" + "".join(f"a,{index % 15}\n" for index in range(30)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(path)


IOB1 = "Ann I-PER\nLee I-PER\nof O\nBonn I-LOC\n\nBonn I-LOC\nAnn I-PER\nJim B-PER\nBo I-PER\n"
IOB2 = "Ann B-PER\nLee I-PER\nof O\nBonn B-LOC\n\nBonn B-LOC\nAnn B-PER\nJim B-PER\nBo I-PER\n"


def test_iob1_and_iob2_are_one_scheme(tmp_path):
    write(tmp_path, "train.txt", IOB1)
    write(tmp_path, "dev.txt", IOB2)
    loaded = load_task(str(tmp_path))
    assert loaded.train == loaded.evaluation
    assert loaded.task.labels == ("B-LOC", "B-PER", "I-PER", "O")
    row = {"tokens": ["Ann", "Lee"], "tags": ["I-PER", "I-PER"]}
    path = write(tmp_path, "x.jsonl", json.dumps(row) + "\n" + json.dumps(row | {"tags": ["O", "O"]}))
    assert scored(path).task.labels == ("B-PER", "I-PER", "O")
    assert scored(path, labels=("O", "I-PER")).evaluation.tags[0] == (1, 1), "known names go before the scheme"


def test_tags_that_end_in_an_odd_blank_are_read(tmp_path):
    assert scored(write(tmp_path, "x.conll", "Ann I-PER\x1c\nof O\n")).task.labels == ("B-PER", "O")


def test_other_schemes_stay(tmp_path):
    path = write(tmp_path, "x.conll", "Ann S-PER\nLee I-PER\nof O\nBonn E-LOC\n")
    assert scored(path).task.labels == ("E-LOC", "I-PER", "O", "S-PER")


@pytest.mark.parametrize("name", ["nosuch", "sst3"])
def test_a_task_that_is_none_lists_those_that_are(name):
    with pytest.raises(DataError, match=f"'{name}' is no task of this package") as caught:
        load_task(name, offline=True)
    assert "Give sst2, boolq, conll2003, amazon, reviews, a hub id" in caught.value.hint


DEEP = 20_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", "[" * DEEP + "]" * DEEP),
        ("x.json", "[" * DEEP + "]" * DEEP),
        ("x.jsonl", '{"text": "a", "label": 0, "more": ' + "[" * DEEP + "]" * DEEP + "}\n"),
        ("x.jsonl", '{"a":' * DEEP + "1" + "}" * DEEP),
        ("x.json", "{\n" + '"a": {' * DEEP + "}" * DEEP + "}\n"),
        ("x.jsonl", '{"text": "a", "label": 0}\n' * 3 + '{"text": ' + "[" * DEEP + "]" * DEEP + "}\n"),
    ],
)
def test_deep_json_is_refused_before_it_is_read(tmp_path, name, content):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=rf"{name}.* is nested over {MOST_DEPTH} deep"):
        scored(path)
    if name == "x.jsonl":
        with pytest.raises(DataError, match=f"nested over {MOST_DEPTH} deep"):
            rows_of(path)


def test_brackets_that_do_not_nest_are_no_depth(tmp_path):
    text = '[{"\\"' * DEEP
    rows = [{"text": text, "label": 0, "more": [[1]] * DEEP}, {"text": "b", "label": 1, "more": []}]
    for name, content in (("x.jsonl", "\n".join(map(json.dumps, rows))), ("x.json", json.dumps(rows, indent=1))):
        assert scored(write(tmp_path, name, content)).evaluation.texts == (text, "b")


def wide(columns, form):
    names = ["text", "label", *(f"c{index}" for index in range(columns - 2))]
    if form == "csv":
        return "\n".join([",".join(names), *(",".join(["a", str(label), *["1"] * (columns - 2)]) for label in (0, 1))])
    rows = [dict.fromkeys(names, 1) | {"text": "a", "label": label} for label in (0, 1)]
    if form == "rows":  # each row has names of its own
        rows = [{"text": "a", "label": place % 2, name: 1} for place, name in enumerate(names[2:])]
    return json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "rows"])
def test_tables_are_refused_beyond_a_sane_number_of_columns(tmp_path, form):
    name = "x.jsonl" if form == "rows" else f"x.{form}"
    with pytest.raises(DataError, match=f"x.* has over {MOST_COLUMNS:,} columns"):
        scored(write(tmp_path, name, wide(MOST_COLUMNS + 1, form)))
    if form != "rows":  # as many are read; of rows, as wide a table would be sparse
        assert len(scored(write(tmp_path, name, wide(MOST_COLUMNS, form))).evaluation) == 2
    if form in ("csv", "jsonl"):
        with pytest.raises(DataError, match="columns"):
            rows_of(write(tmp_path, name, wide(MOST_COLUMNS + 1, form)))


def test_a_million_columns_are_refused_in_little_memory(tmp_path):
    path = write(tmp_path, "x.csv", "," * 1_000_000 + "\n" + "," * 1_000_000 + "\n")
    scored(write(tmp_path, "y.csv", "text,label\na,0\nb,1\n"))  # what it imports does not count
    tracemalloc.start()
    with pytest.raises(DataError, match="columns"):
        scored(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6


def test_a_message_lists_the_first_of_many_columns(tmp_path):
    content = ",".join(f"c{index}" for index in range(500)) + "\n" + ",".join(["1"] * 500) + "\n"
    with pytest.raises(DataError, match="c29 and 470 more") as caught:
        scored(write(tmp_path, "x.csv", content))
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".conll", ".txt"])
@pytest.mark.parametrize(
    "damage", [b"", b"\0\1\2\xff\xfe" * 50, b'{"text": ', b'text,label\n"open', b"PAR1" + b"\x15" * 40, b"[[[", b"\x80"]
)
def test_the_error_of_a_damaged_file_names_it(tmp_path, suffix, damage):
    write(tmp_path, f"train{suffix}", damage)
    with pytest.raises(UhlError) as caught:
        load_task(str(tmp_path))
    assert f"train{suffix}" in caught.value.message
    assert caught.value.hint
    assert str(tmp_path) not in str(caught.value)


def test_the_damaged_shard_is_named(tmp_path):
    import datasets

    for shard in range(3):
        path = tmp_path / f"train-0000{shard}-of-00003.parquet"
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(str(path))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="Cannot read train-00002-of-00003"):
        load_task(str(tmp_path))


def test_forms_of_json(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    columns = {"text": ["a", "b"], "label": [0, 1]}
    for name, content in {
        "array.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=2),
        "lines.json": "\n\n".join(map(json.dumps, rows)),
        "columns.json": json.dumps(columns, indent=2),
    }.items():
        assert scored(write(tmp_path, name, content)).evaluation.texts == ("a", "b"), name
    with pytest.raises(DataError, match=r"x\.json: record 2 is of type int"):
        scored(write(tmp_path, "x.json", '[{"text": "a"}, 5]'))
    with pytest.raises(DataError, match=r"Cannot read .*x\.jsonl"):  # a column's name that is no Unicode
        scored(write(tmp_path, "x.jsonl", '{"text": "a", "label": 0, "\\ud800": 1}\n'))
    with pytest.raises(DataError, match=r"Cannot read column 'label' of .*x\.jsonl"):
        scored(write(tmp_path, "x.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": "x"}\n'))
