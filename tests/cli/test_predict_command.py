"""`uhl predict`: what it says is what `port` scores and what transformers says, whatever form texts come and go in."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pyarrow.parquet
import pytest
import torch
from command_runs import ROOT, Called, Workplace, call, imported, port_arguments, pretrain_arguments
from endless import Endless
from tiny_classifiers import fine_tuned, save, tiny_classifier, with_lora
from tiny_hosts import SENTENCES, save_tiny_host
from transformers import pipeline

from uhl_cli import UniversalAdapter
from uhl_cli.cli.output import _Stdout
from uhl_cli.commands.options import PredictOptions
from uhl_cli.commands.predict import run_predict
from uhl_cli.formats.export import RECORD_FILE
from uhl_cli.formats.folder import read_ported
from uhl_cli.formats.ported import load_ported, save_ported
from uhl_cli.metrics import score
from uhl_cli.ported.model import PortedModel

LABELS = ("negative", "positive")
TAGS = ("B-PER", "O")
TEXTS = ("Anna lives  in Paris", "a waste of time")
ON_HOST = ["--max-flops", "1000", "--device", "cpu", "--offline"]


@dataclass(frozen=True)
class Made:
    """What the tests predict with; none may change it."""

    adapter: Path
    tagger: Path
    pairs: Path
    lora: Path
    ported: Path
    classifier: Path
    peft: Path
    words: Path


@pytest.fixture(scope="module")
def made(place, tmp_path_factory) -> Made:
    """Adapters of sixty steps, a LoRA from one, and classifiers by transformers and peft alone."""
    folder = tmp_path_factory.mktemp("predict")
    for name, data, task in (("a", place.data, "sst2"), ("t", place.conll, str(place.conll))):
        given = pretrain_arguments(place.host, data, folder / f"{name}.safetensors")
        given[given.index("--max-steps") + 1], given[given.index("--task") + 1] = "60", task
        assert call(*given, "--quiet").code == 0
    rows = [json.dumps({"question": text, "answer": text[:9], "label": int("w" in text)}) for text in SENTENCES]
    for name in ("train", "dev"):
        (folder / "pairs").mkdir(exist_ok=True)
        (folder / "pairs" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    given = pretrain_arguments(place.host, folder / "pairs", folder / "p.safetensors")
    given[given.index("--task") + 1] = str(folder / "pairs")
    columns = ["--text-column", "question", "--pair-column", "answer", "--label-column", "label"]
    assert call(*given, *columns, "--quiet").code == 0
    given = ["tune", folder / "a.safetensors", "--target", place.target, "--data", place.data, *ON_HOST, "--quiet"]
    given += ["--parameters", "lora", "--rank", "2", "--steps", "60", "--batch-size", "8", "--output", folder / "lora"]
    assert call(*given).code == 0
    given = port_arguments(folder / "a.safetensors", place.target, place.data)
    assert call(*given, "--no-score", "--output", folder / "ported", "--quiet").code == 0
    truth = [int("w" in text) for text in SENTENCES]
    save(folder / "classifier", "bert", fine_tuned(tiny_classifier("bert", LABELS), "bert", SENTENCES, truth))
    save(folder / "words", "bert", tiny_classifier("bert", TAGS, "tokens"))
    base = save_tiny_host(folder / "base", "bert")
    peft = with_lora(tiny_classifier("bert", LABELS), modules_to_save=["classifier", "pooler"])
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(folder / "peft")
    files = {name: folder / f"{name[0]}.safetensors" for name in ("adapter", "tagger", "pairs")}
    return Made(**files, **{name: folder / name for name in ("lora", "ported", "classifier", "peft", "words")})


def on(place: Workplace, adapter: Path, *more: str | Path) -> list[str | Path]:
    return ["predict", adapter, "--target", place.target, *ON_HOST, *more]


def records(*arguments: str | Path, **how: Any) -> list[dict[str, Any]]:
    """The JSON lines of a call that works."""
    called = call(*arguments, **how)
    assert called.code == 0, called.err
    return [json.loads(line) for line in called.out.splitlines()]


def ids(labels: list[str], names: tuple[str, ...]) -> list[int]:
    return [names.index(label) for label in labels]


@pytest.mark.integration
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet", "stdout"])
def test_a_score_of_its_output_is_ports(place, made, here, form, tuned):
    more = ["--task-file", made.lora] if tuned else []
    ported = json.loads(call(*port_arguments(made.adapter, place.target, place.data), *more, "--json").out)
    given = on(place, made.adapter, "--input", place.data / "dev.tsv", "--prefix", "predicted_", *more)
    if form == "stdout":
        rows = pandas.DataFrame(records(*given))
    else:
        assert call(*given, "--output", here / f"out.{form}").code == 0
        read = {"jsonl": lambda path: pandas.read_json(path, lines=True), "csv": pandas.read_csv}
        read |= {"tsv": lambda path: pandas.read_csv(path, sep="\t", quoting=3), "parquet": pandas.read_parquet}
        rows = read[form](here / f"out.{form}")
    assert list(rows["sentence"]) == list(SENTENCES[:12])
    truth, found = [int(label) for label in rows["label"]], ids(list(rows["predicted_label"]), LABELS)
    wanted = ported["scores"]["ported"]
    assert json.loads(score("accuracy", found, truth, LABELS).model_dump_json()) == wanted
    assert score("accuracy", [1 - found[0], *found[1:]], truth, LABELS).value != wanted["value"], "it would be noticed"
    assert not tuned or len(set(found)) == 2


@pytest.mark.integration
@pytest.mark.parametrize("name", ["dev.conll", "dev.txt", "dev.jsonl"])
def test_a_score_of_tags_is_ports(place, made, here, name):
    data = here / name
    if name.endswith("jsonl"):
        rows = [
            {"words": text.split(), "tags": ["B-PER" if w[0].isupper() else "O" for w in text.split()]}
            for text in SENTENCES
        ]
        data.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        data.write_text((place.conll / "dev.conll").read_text())
    wanted = json.loads(call(*port_arguments(made.tagger, place.target, place.conll), "--json").out)["scores"]["ported"]
    rows = records(*on(place, made.tagger, "--input", data, "--prefix", "my_"))
    found = [ids(row["my_tags"], TAGS) for row in rows]
    truth = [ids(row["tags" if name.endswith("jsonl") else "gold_tags"], TAGS) for row in rows]
    assert 0 < wanted["value"] < 1
    assert json.loads(score("entity_f1", found, truth, TAGS).model_dump_json()) == wanted
    other = [[1 - tag for tag in found[0]], *found[1:]]
    assert score("entity_f1", other, truth, TAGS).value != wanted["value"], "it would be noticed"
    for row in rows:
        assert row["my_text"] == " ".join(row["words" if name.endswith("jsonl") else "tokens"])
        for entity in row["my_entities"]:
            assert row["my_text"][entity["start"] : entity["end"]] == entity["text"]
        assert len(row["my_entities"]) == row["my_tags"].count("B-PER")
        assert len(row["my_probabilities"]) == len(row["my_tags"])


@pytest.mark.integration
def test_probabilities_are_those_of_the_python_interface(place, made):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(place.target).eval(), AutoTokenizer.from_pretrained(place.target)
    found = UniversalAdapter.load(made.adapter).port(model, tokenizer, max_flops=1000.0).predict(SENTENCES)
    rows = records(*on(place, made.adapter, *SENTENCES))
    for row, text, wanted in zip(rows, SENTENCES, found, strict=True):
        probabilities = {f"probability_{name}": value for name, value in wanted.probabilities.items()}
        assert row == {
            "text": text,
            "label": wanted.label,
            **{k: pytest.approx(v, abs=2e-6) for k, v in probabilities.items()},
        }


@pytest.mark.integration
def test_a_folder_says_what_the_file_says_that_it_was_made_from(place, made, here):
    for folder, more in ((made.ported, []), (made.lora, ["--task-file", made.lora])):
        wanted = records(*on(place, made.adapter, *more, *SENTENCES))
        for given in (folder, folder / "ported.safetensors"):
            assert records("predict", given, "--device", "cpu", *SENTENCES) == wanted
    assert records("predict", made.ported, "--device", "cpu", *SENTENCES) != wanted
    moved = here / "moved"
    moved.symlink_to(place.target)
    assert records("predict", made.lora, "--device", "cpu", "--target", moved, *SENTENCES) == wanted
    other = call("predict", made.lora, "--target", place.host, "--device", "cpu", "a text")
    assert "was made for" in other.error


@pytest.mark.integration
@pytest.mark.parametrize("name", ["classifier", "peft"])
def test_a_classifier_of_others_says_what_it_says_to_them(made, name):
    rows = records("predict", getattr(made, name), "--device", "cpu", "--offline", *SENTENCES)
    model: Any = str(made.classifier)
    if name == "peft":
        from peft import PeftModel
        from transformers import AutoTokenizer

        base = tiny_classifier("bert", ("LABEL_0", "LABEL_1"))
        model = PeftModel.from_pretrained(base, made.peft).merge_and_unload().eval()
        tokenizer = AutoTokenizer.from_pretrained(made.peft.parent / "base")
        speaks = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")
    else:
        speaks = pipeline("text-classification", model=model, top_k=None, device="cpu")
    for row, said in zip(rows, speaks(list(SENTENCES)), strict=True):
        assert row["label"] == said[0]["label"]
        for each in said:
            assert row[f"probability_{each['label']}"] == pytest.approx(each["score"], abs=1e-5)


@pytest.mark.integration
def test_a_tagger_of_others_takes_plain_text_apart_at_blanks(made, here):
    texts = [text.replace(" a ", "  a\u00a0") for text in SENTENCES]
    (here / "texts.txt").write_text("\n".join(texts) + "\n\n")
    rows = records("predict", made.words, "--device", "cpu", "--input", "texts.txt")
    assert [row["text"] for row in rows] == [*texts, ""]
    assert [row["words"] for row in rows] == [text.split() for text in (*texts, "")]
    assert rows[-1]["tags"] == rows[-1]["entities"] == []
    entities = [entity for row in rows for entity in row["entities"]]
    assert entities
    for row in rows:
        for entity in row["entities"]:
            assert row["text"][entity["start"] : entity["end"]] == entity["text"]
            assert entity["label"] == "PER"
    apart = here / "apart.jsonl"
    apart.write_text("\n".join(json.dumps({"tokens": text.split()}) for text in texts))
    tags = [row["tags"] for row in records("predict", made.words, "--input", apart)]
    assert tags == [row["tags"] for row in rows[:-1]]


@pytest.mark.integration
def test_neither_chunks_nor_batches_change_a_prediction(place, made, here, monkeypatch):
    (here / "texts.txt").write_text("\n".join(SENTENCES))
    for adapter in (made.adapter, made.tagger):
        whole = records(*on(place, adapter, "--input", "texts.txt"))
        monkeypatch.setattr("uhl_cli.commands.predict.CHUNK_ROWS", 5)
        for size in ("1", "7"):
            parts = records(*on(place, adapter, "--input", "texts.txt", "--batch-size", size))
            for row, wanted in zip(parts, whole, strict=True):
                assert row == {
                    name: pytest.approx(value, abs=1e-5) if name.startswith("probabilit") else value
                    for name, value in wanted.items()
                }
        monkeypatch.setattr("uhl_cli.commands.predict.CHUNK_ROWS", 1024)
        assert records(*on(place, adapter, *reversed(SENTENCES)))[::-1] != whole[::-1], "the order matters"


@pytest.mark.integration
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_reading_goes_no_further_than_what_is_labelled(made, monkeypatch, form):
    """An input without an end: after the second chunk nobody reads on."""
    line = b"a text\n" if form == "txt" else b'{"text": "a text"}\n'
    stream = Endless(line)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream, isatty=lambda: False))
    monkeypatch.setattr("uhl_cli.commands.predict.CHUNK_ROWS", 50)
    shown = []
    options = PredictOptions(adapter=made.classifier, input="-", format=form, batch_size=8)
    report = run_predict(options, show=lambda part: shown.append(part) or len(shown) < 2)
    assert report.texts == 100
    assert [len(part.rows) for part in shown] == [50, 50]
    assert stream.lines <= 100 + 2 * io.DEFAULT_BUFFER_SIZE // len(line)


@pytest.mark.integration
def test_columns_are_kept_in_their_order_and_names(place, made, here):
    (here / "in.csv").write_text('id,text,note\n007,a fine film,"x, y"\n8,a waste of time,\n')
    rows = records(*on(place, made.adapter, "--input", "in.csv"))
    assert [list(row) for row in rows] == [
        ["id", "text", "note", "label", "probability_negative", "probability_positive"]
    ] * 2
    assert (rows[0]["id"], rows[0]["note"], rows[1]["note"]) == ("007", "x, y", "")
    (here / "in.jsonl").write_text('{"n": 1, "text": "a"}\n{"text": "b", "deep": {"x": [1, null]}}\n')
    rows = records(*on(place, made.adapter, "--input", "in.jsonl", "--top-k", "1"))
    assert rows[1]["deep"] == {"x": [1, None]}
    assert [len(row) for row in rows] == [4, 4]
    assert all(row[f"probability_{row['label']}"] >= 0.5 for row in rows)
    pandas.read_csv(here / "in.csv").to_parquet(here / "in.parquet")
    assert call(*on(place, made.adapter, "--input", "in.parquet", "--output", "out.parquet")).code == 0
    assert pandas.read_parquet("out.parquet")["id"].dtype == "int64"


@pytest.mark.integration
def test_below_the_threshold_a_label_is_empty(place, made, here):
    (here / "in.txt").write_text("\n".join(SENTENCES))
    whole = records("predict", made.words, "--input", "in.txt")
    values = sorted(value for row in whole for value in row["probabilities"])
    middle = (values[len(values) // 2] + values[len(values) // 2 + 1]) / 2
    for row, before in zip(
        records("predict", made.words, "--input", "in.txt", "--threshold", middle), whole, strict=True
    ):
        kept = [
            tag if value >= middle else None for tag, value in zip(before["tags"], before["probabilities"], strict=True)
        ]
        assert row["tags"] == kept
        assert len(row["entities"]) == kept.count("B-PER")
    given = ["predict", made.classifier, "--input", "in.txt", "--threshold", "1", "--output", "out.csv"]
    report = json.loads(call(*given, "--json").out)
    with Path("out.csv").open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert set(labels) == {""}
    assert (report["texts"], report["unsure"], report["labels"]) == (24, 24, {})


@pytest.mark.integration
def test_pairs(place, made, here):
    rows = [{"question": text, "answer": text[:9]} for text in SENTENCES]
    (here / "in.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    table = records(*on(place, made.pairs, "--input", "in.jsonl"))
    words = [word for row in rows for word in row.values()]
    told = records(*on(place, made.pairs, *words))
    assert [row["label"] for row in told] == [row["label"] for row in table]
    assert told[0]["pair"] == rows[0]["answer"]
    called = call(*on(place, made.pairs, "one text"))
    assert called.code == 2
    assert "two texts for each pair" in called.error
    (here / "in.txt").write_text("one text\n")
    assert "takes pairs" in call(*on(place, made.pairs, "--input", "in.txt")).error
    (here / "one.jsonl").write_text('{"question": "a"}\n')
    assert "--pair-column" in call(*on(place, made.pairs, "--input", "one.jsonl")).error


@pytest.mark.integration
def test_what_is_printed_where(place, made, monkeypatch, here):
    given = ["predict", made.classifier, *TEXTS]
    assert call(*given).out == call(*given, "--json").out == call(*given, "--json", "--quiet").out
    labels = [row["label"] for row in records(*given)]
    assert call(*given, "--quiet") == Called(0, "".join(f"{label}\n" for label in labels), "")
    tags = records("predict", made.words, TEXTS[1])[0]["tags"]
    assert call("predict", made.words, TEXTS[1], "--quiet").out == " ".join(tags) + "\n"
    called = call(*given, "--output", "out.jsonl", "--quiet")
    assert called == Called(0, "out.jsonl\n", "")
    assert "2 texts labelled by classifier" in call(*given, "--output", "out.jsonl", "--overwrite").out
    monkeypatch.setattr(_Stdout, "isatty", lambda _: True)
    table = call(*given, env={"COLUMNS": "100"})
    assert table.err == ""
    assert "probabilities" in table.out
    assert all(text in table.out for text in TEXTS)
    assert call(*given, "--json").out.startswith('{"text": ')
    table = call("predict", made.words, *SENTENCES[:3], env={"COLUMNS": "100"}).out
    assert "entities" in table
    assert "(PER)" in table


@pytest.mark.integration
def test_texts_that_are_cut_are_counted(place, made):
    long = "word " * 200
    called = call("predict", made.classifier, "short", long)
    assert "warning: texts cut at the longest input: 1;" in called.err
    assert "cut" not in call("predict", made.classifier, "short").err
    called = call(*on(place, made.adapter, "short", long, "--max-length", "8"))
    assert "warning: texts cut at the longest input: 1;" in called.err
    shorter = json.loads(call(*on(place, made.adapter, SENTENCES[0], "--max-length", "6")).out)
    assert shorter != json.loads(call(*on(place, made.adapter, SENTENCES[0])).out)


@pytest.mark.integration
def test_a_word_that_was_cut_off_has_no_tag_and_is_in_no_entity(made):
    """Class 0 is B-PER here: where nothing is known, it would be the first."""
    given = ["predict", made.words, "Anna saw Anna again", "--max-length", "4"]
    row, whole = records(*given)[0], records(*given[:3])[0]
    read = 4 - row["tags"].count(None)
    assert 0 < read < 4
    assert row["tags"][read:] == [None] * (4 - read)
    assert None not in whole["tags"]
    words = row["words"]
    assert all(entity["end"] <= len(" ".join(words[:read])) for entity in row["entities"])


def files_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["--input", "absent.csv"], 1, "there is no file absent.csv"),
        (["--input", "."], 1, ". is a folder"),
        (["--input", "empty.txt"], 1, "holds no text"),
        (["--input", "blank.txt"], 1, "holds no text"),
        ([""], 1, "holds no text"),
        (
            ["--input", "prose.csv"],
            1,
            "no column 'sentence' or 'text' for sst2; its columns are id, prose. Name the column with --text-column",
        ),
        (["--input", "prose.csv", "--text-column", "absent"], 1, "no column 'absent'"),
        (["--input", "null.jsonl"], 1, "holds no text"),
        (["--input", "number.jsonl"], 1, "type int in row 1"),
        (["--input", "half.jsonl"], 1, "row 1 of here/half.jsonl is not valid Unicode"),
        (["--input", "binary.txt"], 1, "is binary"),
        (["--input", "latin.txt"], 1, "is not UTF-8: invalid continuation byte. Name its encoding with --encoding"),
        (["--input", "latin.txt", "--encoding", "nosuch"], 2, "--encoding nosuch: Python knows no such encoding"),
        (["a text", "--encoding", "latin-1"], 2, "--encoding has no effect"),
        (["--input", "x.xlsx"], 1, "none of .txt .csv"),
        (["--input", "good.txt", "--format", "jsonl"], 1, "line 1 is not JSON"),
        (
            ["--input", "labelled.csv"],
            1,
            "has a column 'label' already. Rename the added columns, for example with --prefix",
        ),
        (["--input", "good.txt", "a text"], 2, "both texts and --input were given"),
        (["--format", "csv", "a text"], 2, "--format has no effect"),
        (["--input", "-", "--format", "parquet"], 2, "parquet cannot be read from stdin"),
        (["a text", "--overwrite"], 2, "--overwrite has no effect"),
        (["a text", "--output", "good.txt"], 2, "none of .csv, .tsv, .jsonl, .parquet"),
        (
            ["a text", "--output", "there.csv"],
            1,
            "there.csv already exists. Choose another --output, or add --overwrite",
        ),
        (["a text", "--output", "folder.csv"], 1, "is a folder"),
        (["a text", "--output", "there.csv/x.csv"], 1, "cannot write to"),
        (["a text", "--threshold", "2"], 2, "--threshold"),
        (["a text", "--top-k", "0"], 2, "--top-k"),
        (["a text", "--batch-size", "0"], 2, "--batch-size"),
        (["a text", "--batch-size", "9" * 30], 2, "--batch-size"),
        (["a text", "--output", "\udcff.csv", "--json"], 1, "is not UTF-8. Choose another --output"),
        (["--input", "twice.parquet"], 1, "here/twice.parquet: column names are duplicated"),
        (["--input", "dates.parquet"], 1, "Cannot read here/dates.parquet"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(place, made, here, monkeypatch, given, code, words):
    (here / "empty.txt").touch()
    (here / "blank.txt").write_text("\n \n")
    (here / "prose.csv").write_text("id,prose\n1,a\n")
    (here / "null.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    (here / "number.jsonl").write_text('{"text": 5}\n')
    (here / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (here / "binary.txt").write_bytes(b"\x89PNG\x00\x01")
    (here / "latin.txt").write_bytes(b"caf\xe9\n")
    (here / "x.xlsx").write_bytes(b"PK")
    (here / "good.txt").write_text("a text\n")
    (here / "labelled.csv").write_text("text,label\na,b\n")
    (here / "there.csv").write_text("precious")
    (here / "folder.csv").mkdir()
    years = pyarrow.array([2**62], pyarrow.timestamp("us"))  # beyond those of Python
    for name, last in (("twice", pyarrow.array(["b"])), ("dates", years)):
        names = ["text", "text" if name == "twice" else "when"]
        pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(["a"]), last], names=names), f"{name}.parquet")
    monkeypatch.setattr("uhl_cli.commands.predict.load", lambda _: pytest.fail("the host was loaded"))
    before = files_in(here)
    for more in ([], [] if "--output" in given or "--overwrite" in given else ["--output", "out.csv"]):
        called = call(*on(place, made.adapter, *given, *more))
        assert called.code == code
        assert words in called.error
        assert files_in(here) == before


@pytest.mark.integration
def test_wrong_adapters_and_targets(place, made, here):
    (here / "bare").mkdir()
    (here / "exported").mkdir()
    (here / "exported" / RECORD_FILE).write_text("{}")
    for given, words in (
        (["a.safetensors", "a text"], "there is no file a.safetensors"),
        (["bare", "a text"], "config.json"),
        ([made.adapter, "a text"], "needs a model to run on. Name one with --target"),
        ([place.host, "a text"], "has no classification head"),
        ([made.classifier, "--target", place.host, "a text"], "--target has no effect"),
        ([made.classifier, "--align", "size", "a text"], "--align has no effect"),
        ([made.ported, "--max-flops", "20", "a text"], "--max-flops has no effect"),
        ([made.ported, "--task-file", made.lora, "a text"], "--task-file has no effect"),
        ([made.adapter, "--target", place.host, *ON_HOST, "--task-file", made.lora, "a text"], "was made for"),
        ([made.tagger, "--target", place.host, *ON_HOST, "--task-file", made.lora, "a text"], "another adapter"),
        ([made.words, "--top-k", "1", "a text"], "--top-k has no effect"),
        ([made.words, "--pair-column", "b", "--input", "in.csv"], "takes no second text"),
        (["--target", "x", "a text"], "there is no file a text"),
        (["--target", "x"], "there is no adapter.safetensors in this folder. Make one with `uhl pretrain`"),
        (["--target", "exported"], "An exported folder is a whole model: `uhl predict exported`."),
        (["--target", "exported", "a text"], "An exported folder is a whole model: `uhl predict exported TEXT`."),
        (["a text", "another", "--target", "exported"], "there is no file a text. An exported folder is a whole model"),
        ([made.adapter, "--target", "exported", "a text"], "'exported' has no config.json"),  # a host as any other
    ):
        (here / "in.csv").write_text("text,b\na,b\n")
        assert words in call("predict", *given).error, given


@pytest.mark.integration
def test_a_host_that_has_gone_is_asked_for(place, made, here):
    record = read_ported(made.lora / "ported.safetensors").record
    target = record.target.model_copy(update={"name": str(here / "gone")})
    save_ported(here / "folder", load_ported(made.lora), target, record.tuned)
    line = call("predict", "folder", "a text").error
    assert "Give its path with --target" in line
    assert call("predict", "folder", "a text", "--target", place.target).code == 0


@pytest.mark.integration
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_what_breaks_off_leaves_nothing(place, made, here, monkeypatch, failure, form):
    (here / "in.txt").write_text("\n".join(SENTENCES))
    (here / f"old.{form}").write_text("precious")
    whole, calls = PortedModel.outputs_of, []

    def second(self, *given, **named):
        calls.append(self)
        if len(calls) % 2 == 0:
            raise failure
        return whole(self, *given, **named)

    monkeypatch.setattr("uhl_cli.commands.predict.CHUNK_ROWS", 5)
    monkeypatch.setattr(PortedModel, "outputs_of", second)
    before = files_in(here)
    given = on(place, made.adapter, "--input", "in.txt", "--batch-size", "5")
    for output in ([f"new.{form}"], [f"old.{form}", "--overwrite"]):
        called = call(*given, "--output", *output)
        assert called.code == (130 if failure is KeyboardInterrupt else 1)
        assert called.error
        assert files_in(here) == before
    assert len(calls) == 4


@pytest.mark.integration
@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("{", "line 13 is not JSON"),
        ('{"text": 5}', "type int in row 13"),
        ('{"text": "b", "label": "c"}', "row 13 of here/in.jsonl has a column 'label' already"),
    ],
)
def test_an_error_far_down_comes_with_its_line_and_leaves_nothing(made, here, monkeypatch, last, words):
    monkeypatch.setattr("uhl_cli.commands.predict.CHUNK_ROWS", 5)
    (here / "in.jsonl").write_text('{"text": "a"}\n' * 12 + f"{last}\n")
    called = call("predict", made.classifier, "--input", "in.jsonl", "--batch-size", "5", "--output", "out.jsonl")
    assert words in called.error
    assert [path.name for path in here.iterdir()] == ["in.jsonl"]


def process(*arguments: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "uhl_cli", "predict", *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **streams)


@pytest.mark.integration
def test_a_reader_that_leaves_ends_it(made, here):
    """`uhl predict FOLDER --input many.txt | head -1`"""
    (here / "many.txt").write_text("\n".join(SENTENCES * 1000))
    running = process(made.classifier, "--input", here / "many.txt", "--quiet", "--json", stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert json.loads(running.stdout.readline())["text"] == SENTENCES[0]
    running.stdout.close()
    _, err = running.communicate(timeout=240)
    assert (running.returncode, err) == (141, b"")


@pytest.mark.integration
def test_streams_that_are_closed_or_a_terminal(made, here):
    closed = process(made.classifier, "a text", preexec_fn=lambda: os.close(1))
    _, err = closed.communicate(timeout=240)
    assert (closed.returncode, err.decode()) == (
        1,
        "error: stdout is closed, so the result cannot be printed. Name a file with --output.\n",
    )
    main, terminal = pty.openpty()
    asked = process(made.classifier, stdin=terminal, stdout=subprocess.PIPE)
    _, err = asked.communicate(timeout=240)
    os.close(main)
    os.close(terminal)
    assert asked.returncode == 2
    assert err.decode().splitlines()[-1].startswith("error: there is no text to label. Give texts after the adapter")


@pytest.mark.integration
def test_stdin_is_read_when_something_is_sent_there(made):
    wanted = records("predict", made.classifier, *TEXTS)
    for named in ([], ["--input", "-"]):
        assert records("predict", made.classifier, *named, stdin="\n".join(TEXTS)) == wanted
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    assert records("predict", made.classifier, "--format", "jsonl", stdin=lines) == wanted
    assert "stdin holds no text" in call("predict", made.classifier, stdin="").error
    assert "stdin is not UTF-8" in call("predict", made.classifier, stdin=b"caf\xe9").error


@pytest.mark.integration
def test_progress_is_on_stderr_alone_while_lines_are_written(made, here):
    """Of a bar that takes stdout for its own, the lines would go to the terminal of stderr."""
    (here / "in.txt").write_text("\n".join(SENTENCES))
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "uhl_cli", "predict", str(made.classifier), "--input", "in.txt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.set_blocking(main, False)
    said = os.read(main, 100_000).decode()
    os.close(main)
    os.close(terminal)
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == list(SENTENCES)
    assert "labelling" in said
    assert SENTENCES[0] not in said


def test_the_help_needs_no_torch():
    assert imported(["predict", "--help"], cwd=ROOT)[0] <= {"numpy"}
    assert torch.__version__
