"""The record in an export's folder is read back whole or refused in one line; the card says how to load it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_runs import SEQUENCE, TOKENS

from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.formats.card import model_card
from uhl_cli.formats.export import RECORD_FILE, ExportRecord, is_export, read_export
from uhl_cli.metrics import Score
from uhl_cli.schema import Fingerprint, HostRecord, TrainingConfig, TrainingRecord


def record(**changes: object) -> ExportRecord:
    fingerprint = Fingerprint(
        architecture="BertModel",
        model_type="bert",
        hidden_size=8,
        num_hidden_layers=2,
        vocab_size=9,
        parameters=99,
        digest="a" * 64,
    )
    training = TrainingRecord(
        command="uhl export a --target b", config=TrainingConfig(), steps=3, train_examples=7, train_digest="", data="x"
    )
    fields: dict[str, object] = {
        "format": "merged",
        "adapter": "b" * 64,
        "task": SEQUENCE,
        "target": HostRecord(name="org/name", revision="c0ffee", fingerprint=fingerprint),
        "dtype": "float32",
        "rank": 8,
        "max_length": 128,
        "base": None,
        "revision": None,
        "teachers": ("transfer set: a teacher",),
        "training": training,
        "versions": {"uhl": "1"},
        "agreement": {},
        "scores": {"export": Score(metric="accuracy", value=0.5, low=0.25, high=0.75, examples=1234)},
    }
    return ExportRecord(**fields | changes)


def write(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / RECORD_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_record_comes_back_as_it_was(tmp_path):
    whole = record(format="peft", base="org/name")
    assert read_export(write(tmp_path, whole.model_dump_json())) == whole
    assert is_export(tmp_path)
    assert not is_export(tmp_path.parent)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "merged"}', "null", "[" * 100_000])
def test_what_is_no_record_is_refused(content, tmp_path):
    with pytest.raises(FormatError, match="is not a record of an export") as caught:
        read_export(write(tmp_path, content))
    assert not isinstance(caught.value, NewerFormatError)


def test_what_breaks_a_rule_is_refused_and_a_newer_one_says_so(tmp_path):
    fields = json.loads(record().model_dump_json())
    for change in ({"format": "onnx"}, {"adapter": "short"}, {"unknown": 1}, {"rank": 0}):
        with pytest.raises(FormatError, match="is not a record") as caught:
            read_export(write(tmp_path, fields | change))
        assert not isinstance(caught.value, NewerFormatError)
        with pytest.raises(NewerFormatError) as caught:
            read_export(write(tmp_path, fields | change | {"format_version": "1.1"}))
        assert "upgrade" in caught.value.hint
    assert read_export(write(tmp_path, fields | {"format_version": "1.1"})).rank == 8


def test_a_missing_or_huge_record_is_refused(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        read_export(tmp_path)
    with pytest.raises(FormatError, match="too many for a record"):
        read_export(write(tmp_path, " " * 4_000_001))


def code_of(card: str) -> str:
    """The card's Python, which must at least be Python."""
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    return code


def test_the_card_says_how_to_load_it():
    card = model_card(record(), {})
    head = card.split("---\n")[1]
    assert "base_model: org/name" in head
    assert "pipeline_tag: text-classification" in head
    assert 'pipeline("text-classification", folder)' in code_of(card)
    assert "| accuracy, 1,234 examples |" in card
    assert "| this model | 0.500 [0.250, 0.750] |" in card
    assert "uhl export a --target b" in card
    assert "Agreement" not in card
    tagger = model_card(record(task=TOKENS), {})
    assert 'pipeline("ner", folder, aggregation_strategy="first")' in code_of(tagger)


def test_the_card_of_a_peft_export_says_where_its_base_is():
    beside = model_card(record(format="peft"), {})
    assert "AutoPeftModelForSequenceClassification.from_pretrained(folder)" in code_of(beside)
    assert "`base/`" in beside
    arguments = {"num_labels": 2, "id2label": {0: "a", 1: "b"}}
    named = model_card(record(format="peft", base="org/name"), arguments)
    assert "from_pretrained(folder, num_labels=2, id2label={0: 'a', 1: 'b'})" in code_of(named)
    assert "The base is `org/name`" in named


def test_names_of_others_are_no_markup():
    task = SEQUENCE.model_copy(update={"name": "a](http://x)\n# b", "labels": ("<b>", "`c`")})
    card = model_card(record(task=task, teachers=("line\nbreak ![x](y)",)), {})
    assert "](http" not in card
    assert "\n# b" not in card
    assert "<b>" not in card
    assert "![x]" not in card
    local = HostRecord(name="folder", revision=None, fingerprint=record().target.fingerprint)
    assert "base_model" not in model_card(record(target=local), {})
