"""Data files on the command line: --encoding wherever one is read, and what is said of them in lines on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_runs import call, port_arguments, pretrain_arguments, write_data

TEXTS = "\n".join(f"Ein schöner Satz über die Nummer {number} und viele weitere Wörter" for number in range(60))


def warned(err: str) -> list[str]:
    """The lines that `warning: ` begins; a warning of Python's own kind has other lines too."""
    assert "UhlWarning" not in err
    return [line for line in err.splitlines() if line.startswith("warning: ")]


def recoded(folder: Path, encoding: str) -> Path:
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("a", "ä"), encoding=encoding)
    return folder


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_an_encoding_is_asked_for_and_taken(place, here, encoding):
    data = recoded(write_data(here / "data"), encoding)
    # The name of the label column is recoded too.
    columns = ["--text-column", "sentence", "--label-column", "läbel"]
    port = port_arguments(place.adapter, place.target, data)
    assert f"--encoding {encoding}" in call(*port).error
    called = call(*port, *columns, "--encoding", encoding, "--json")
    assert called.code == 0
    assert json.loads(called.out)["scores"]["ported"]["examples"] == 12
    predict = ["predict", place.adapter, "--target", place.target, "--input", data / "dev.tsv", "--max-flops", "1000"]
    predict += ["--device", "cpu", "--offline", "--prefix", "p_"]
    assert f"--encoding {encoding}" in call(*predict).error
    called = call(*predict, "--encoding", encoding)
    assert called.code == 0
    assert (
        "ä" in json.loads(called.out.splitlines()[0])["sentence"] + json.loads(called.out.splitlines()[1])["sentence"]
    )
    assert call(*port, "--encoding", "nosuch").error.startswith("error: --encoding nosuch: ")


def test_files_of_texts_have_the_encoding_too(place, here):
    (here / "texts.txt").write_text(TEXTS, encoding="latin-1")
    given = pretrain_arguments(place.host, place.data, "out.safetensors")
    given += ["--anchors", "texts.txt", "--transfer-set", "texts.txt"]
    assert "texts.txt is not UTF-8" in call(*given).error
    assert call(*given, "--encoding", "latin-1").code == 0


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_rows_without_a_label_are_counted_on_stderr(place, here, quiet):
    data = write_data(here / "data")
    with (data / "dev.tsv").open("a") as file:
        file.write("no label\t\nnone here\tNA\n")
    called = call(*port_arguments(place.adapter, place.target, data), *quiet)
    assert called.code == 0
    assert warned(called.err) == ["warning: 2 unlabelled or empty rows of data/dev.tsv left out, of 14."]
    called = call(*port_arguments(place.adapter, place.target, place.data), *quiet)
    assert warned(called.err) == []


def test_texts_that_are_null_are_counted_once_for_the_whole_input(place, here, monkeypatch):
    monkeypatch.setattr("uhl_cli.commands.predict.CHUNK_ROWS", 2)
    rows = [{"text": None if number % 2 else "a text"} for number in range(10)]
    (here / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["predict", place.adapter, "--target", place.target, "--input", "x.jsonl", "--max-flops", "1000"]
    called = call(*given, "--device", "cpu", "--offline", "--batch-size", "2")
    assert called.code == 0
    assert len(called.out.splitlines()) == 10
    assert warned(called.err) == ["warning: 5 null texts of here/x.jsonl were read as empty."]


def test_a_kaggle_layout_trains(place, here):
    data = write_data(here / "data")
    rows = (data / "dev.tsv").read_text().splitlines()
    (data / "dev.tsv").unlink()
    (data / "test.csv").write_text("\n".join(["id,sentence", *(f'{n},"{row}"' for n, row in enumerate(rows[1:]))]))
    called = call(*pretrain_arguments(place.host, data, "out.safetensors"))
    assert called.code == 0
    assert "data/test.csv has no labels" in warned(called.err)[0]


def test_a_task_that_is_none_is_answered_with_those_that_are(place, here):
    given = pretrain_arguments(place.host, place.data, "out.safetensors")
    given[given.index("--task") + 1] = "nosuch"
    del given[given.index("--data") : given.index("--data") + 2]
    line = call(*given).error
    assert "'nosuch' is no task of this package" in line
    assert "Give sst2, boolq, conll2003, amazon, reviews" in line
