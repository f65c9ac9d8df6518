"""Rows come out of a file as they went in, whatever its form, or the file is not there."""

import csv
import datetime
import json

import pandas
import pyarrow.parquet
import pytest

from uhl_cli.data.stream import find_source, open_rows
from uhl_cli.data.writer import json_line, open_writer, written_form
from uhl_cli.errors import DataError, OutputError, UsageError

ADDED = {"label": "text", "p": "number", "tags": "texts", "q": "numbers", "entities": "entities"}
ENTITY = {"start": 0, "end": 2, "label": "ORG", "text": "EU"}
ROWS = [
    {"text": 'a "b"', "n": "007", "label": None, "p": 0.25, "tags": [], "q": [], "entities": []},
    {"text": "c, d", "n": "", "label": "x", "p": None, "tags": ["B-ORG", None], "q": [0.5, 1.0], "entities": [ENTITY]},
]


def written(path, rows=ROWS, first=("text", "n"), schema=None):
    with open_writer(path, first, ADDED, schema=schema) as write:
        for row in rows:
            write([row])
    return path


def test_what_is_written_reads_as_it_was(tmp_path):
    assert [json.loads(line) for line in written(tmp_path / "x.jsonl").read_text().splitlines()] == ROWS
    assert pyarrow.parquet.read_table(written(tmp_path / "x.parquet")).to_pylist() == ROWS
    with written(tmp_path / "x.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    with open_rows(find_source(str(written(tmp_path / "x.tsv")), None), size=9) as rows:
        tabbed = next(rows.chunks())
    for table in (found, tabbed):
        assert [row["text"] for row in table] == ['a "b"', "c, d"]
        assert [row["n"] for row in table] == ["007", ""]
        assert [row["label"] for row in table] == ["", "x"]
        assert [row["p"] for row in table] == ["0.25", ""]
        assert json.loads(table[1]["entities"]) == [ENTITY]
    assert pandas.read_csv(tmp_path / "x.csv", dtype={"n": str})["n"][0] == "007"


def test_columns_that_are_not_there_are_null(tmp_path):
    rows = [ROWS[0], {"text": "e", "label": "x"}]
    assert pyarrow.parquet.read_table(written(tmp_path / "x.parquet", rows)).to_pylist()[1]["n"] is None
    assert json.loads(written(tmp_path / "x.jsonl", rows).read_text().splitlines()[1]) == rows[1]
    assert written(tmp_path / "x.csv", rows).read_text().splitlines()[2] == "e,,x,,,,"


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.parquet"])
def test_a_column_that_comes_late_has_no_place_in_a_table(tmp_path, name):
    with pytest.raises(DataError, match=r"row 3 has a column 'late'.*\.jsonl"):
        written(tmp_path / name, [*ROWS, ROWS[0] | {"late": 1}])
    assert list(tmp_path.iterdir()) == []
    assert written(tmp_path / "x.jsonl", [*ROWS, ROWS[0] | {"late": 1}]).is_file()


@pytest.mark.parametrize("value", ["text", 2**70, "\ud800", {"a": 1}])
def test_parquet_takes_one_type_a_column(tmp_path, value):
    with pytest.raises(DataError, match=r"row.* 2 do not fit.*\.jsonl"):
        written(tmp_path / "x.parquet", [{"text": "a", "n": 1}, {"text": "b", "n": value}])
    assert list(tmp_path.iterdir()) == []


def test_parquet_keeps_the_types_of_its_input(tmp_path):
    schema = pyarrow.schema([("text", pyarrow.large_string()), ("n", pyarrow.int8())], metadata={"pandas": "{}"})
    path = written(tmp_path / "x.parquet", [{"text": "a", "n": 1, "label": None}], schema=schema)
    found = pyarrow.parquet.read_schema(path)
    assert [str(field.type) for field in found][:4] == ["large_string", "int8", "string", "double"]
    assert found.metadata is None


@pytest.mark.parametrize("letter", ["\t", "\n", "\r"])
def test_tsv_has_no_place_for_tabs_and_line_breaks(tmp_path, letter):
    row = ROWS[0] | {"text": f"a{letter}b"}
    with pytest.raises(DataError, match="row 2 holds a tab or a line break"):
        written(tmp_path / "x.tsv", [ROWS[0], row])
    with written(tmp_path / "x.csv", [row]).open(newline="") as file:
        assert next(csv.DictReader(file))["text"] == row["text"]


def test_half_a_character_and_a_date_are_written_as_text(tmp_path):
    row = {"text": "\ud83d", "n": datetime.date(2024, 5, 1)}
    found = json.loads(written(tmp_path / "x.jsonl", [row]).read_text())
    assert found == {"text": "\ud83d", "n": "2024-05-01"}
    assert written(tmp_path / "x.csv", [row]).read_text().splitlines()[1].startswith("\\ud83d,2024-05-01")
    assert json.loads(json_line(row))["n"] == "2024-05-01"


def test_a_number_that_json_lacks_is_null_and_all_else_stays(tmp_path):
    row = {"text": "a", "n": float("nan"), "deep": [{"x": float("inf"), "y": 0.5}]}
    lines = [written(tmp_path / "x.jsonl", [row]).read_text(), json_line(row)]
    for line in lines:
        found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert found == {"text": "a", "n": None, "deep": [{"x": None, "y": 0.5}]}


def test_a_tab_in_the_name_of_a_column_is_said_to_be_there(tmp_path):
    with pytest.raises(DataError, match="the name of a column holds a tab or a line break"):
        written(tmp_path / "x.tsv", [{"text": "a", "m\tn": 1}], ("text", "m\tn"))
    assert not list(tmp_path.iterdir())


def interrupted():
    yield from ROWS
    raise KeyboardInterrupt


def test_an_error_inside_leaves_nothing_and_the_old_file(tmp_path):
    for form in ("csv", "tsv", "jsonl", "parquet"):
        path = tmp_path / f"x.{form}"
        path.write_text("precious")
        with pytest.raises(KeyboardInterrupt):
            written(path, interrupted())
        assert path.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 4


def test_forms_and_places_that_cannot_be_written(tmp_path):
    for name in ("x.xlsx", "x", "x.txt", "x.csv.gz"):
        with pytest.raises(UsageError, match=r"none of \.csv, \.tsv, \.jsonl, \.parquet"):
            written_form(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        written(tmp_path / "file" / "x.csv")
