"""CoNLL files in both column orders, and token tasks from JSON."""

import json

import pytest

from uhl_cli.data import load_task
from uhl_cli.errors import DataError, UhlWarning, UsageError

SHORT = "EU B-ORG 0\nrejects O 0\n\nPeter B-PER 0\nBlackburn I-PER 0\n\n"
FULL = (
    "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER\n"
)


def load(folder, content, name="train.txt", **options):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return load_task(options.pop("task", str(path)), data=str(path), need_train=False, **options)


@pytest.mark.parametrize("content", [SHORT, FULL, SHORT.replace(" ", "\t").replace("\n", "\r\n"), "\ufeff" + SHORT])
@pytest.mark.parametrize("name", ["x.txt", "x.conll"])
def test_both_column_orders(tmp_path, content, name):
    loaded = load(tmp_path, content, name, task="conll2003")
    found = loaded.evaluation
    assert found.texts == ("EU rejects", "Peter Blackburn")
    assert found.words == (((0, 2), (3, 10)), ((0, 5), (6, 15)))
    named = [[loaded.task.labels[tag] for tag in tags] for tags in found.tags]
    assert named == [["B-ORG", "O"], ["B-PER", "I-PER"]]
    assert loaded.task.metric == "entity_f1"
    assert len(loaded.task.labels) == 9


def test_tags_without_a_row_are_sorted_and_pick_the_metric(tmp_path):
    assert load(tmp_path, SHORT).task.labels == ("B-ORG", "B-PER", "I-PER", "O")
    assert load(tmp_path, SHORT).task.metric == "entity_f1"
    assert load(tmp_path, "dog NOUN\nbarks VERB\n").task.metric == "accuracy"


def test_words_may_hold_no_break_spaces_and_look_like_comments(tmp_path):
    found = load(tmp_path, "a\u00a0b B-X\n# O\n").evaluation
    assert found.texts == ("a\u00a0b #",)
    assert found.words == (((0, 3), (4, 5)),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a O\nb O 0\n", "line 2 has 3 column"),
        ("a\nb\n", "line 1 has 1 column"),
        ("a X 0\nb Y 0\n", "none of columns 2 to 3"),
        ("a O\nb O\n", "two or more"),
    ],
)
def test_bad_conll(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, content)


def test_conll_that_is_not_utf8(tmp_path):
    path = tmp_path / "x.conll"
    path.write_bytes(b"caf\xe9 O\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_task(str(path))


def jsonl(folder, rows, **options):
    return load(folder, "\n".join(json.dumps(row) for row in rows), "x.jsonl", **options)


def test_tokens_from_json(tmp_path):
    rows = [
        {"words": ["a", "b"], "tags": ["O", "B-X"]},
        {"words": [], "tags": []},
        {"words": ["c"], "tags": None},
    ]
    with pytest.warns(UhlWarning, match="2 unlabelled or empty rows"):
        loaded = jsonl(tmp_path, rows)
    assert loaded.task.kind == "tokens"
    assert loaded.evaluation.texts == ("a b",)
    assert "2 unlabelled or empty rows" in loaded.source
    ints = jsonl(tmp_path, [{"tokens": ["a", "b"], "ner_tags": [0, 3]}], task="conll2003")
    assert ints.evaluation.tags == ((0, 3),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "B-X"]}, "1 words but 2 tags"),
        ({"tokens": ["a", "b"], "tags": ["B-X", None]}, "Row 1 of .* has words without a tag"),
        ({"tokens": [None, "b"], "tags": ["B-X", "O"]}, "not a list of words alone in row 1"),
        ({"tokens": None, "tags": ["B-X", "O"]}, "null in row 1"),
    ],
)
def test_bad_tokens(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        jsonl(tmp_path, [row, {"tokens": ["a", "b"], "tags": ["B-X", "O"]}])


def test_null_words_are_found_in_arrays_and_not_seen_in_texts(tmp_path):
    rows = [{"text": "[null, x]", "label": 0}, {"text": "a", "label": 1, "other": [1, None]}]
    assert jsonl(tmp_path, rows).evaluation.texts == ("[null, x]", "a")
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", None], "tags": ["O", "B-X"]}]))
    with pytest.raises(DataError, match="not a list of words alone in row 2"):
        load_task(str(path))


def test_texts_and_words_in_one_table_need_a_flag(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-X"], "text": "a b", "label": n} for n in (0, 1)]
    with pytest.raises(DataError, match="both words and texts"):
        jsonl(tmp_path, rows)
    assert jsonl(tmp_path, rows, tokens_column="tokens").task.kind == "tokens"
    assert jsonl(tmp_path, rows, text_column="text").task.kind == "sequence"
    with pytest.raises(UsageError, match="tags words"):
        jsonl(tmp_path, rows, task="conll2003", text_column="text")
