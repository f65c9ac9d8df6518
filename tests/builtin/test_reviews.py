"""The builtin task: its size and balance, and nothing of its dev part in its training part."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from uhl_cli.data import TASKS, load_task

FOLDER = TASKS["reviews"].folder


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize(("name", "least"), [("train", 1600), ("dev", 400)])
def test_large_enough_balanced_and_without_repeats(name, least):
    found = rows(name)
    assert len(found) >= least
    counts = Counter(row["label"] for row in found)
    assert set(counts) == {"negative", "positive"}
    assert counts["negative"] == counts["positive"]
    assert len({words(row["text"]) for row in found}) == len(found)


def test_dev_shares_no_sentence_no_subject_and_no_near_copy_with_train():
    train, dev = rows("train"), rows("dev")
    assert {row["subject"] for row in train}.isdisjoint({row["subject"] for row in dev})
    assert {words(row["text"]) for row in train}.isdisjoint({words(row["text"]) for row in dev})
    # Sentences of six words or more that share more than 70 % of their words would be copies of one another.
    vocabulary = sorted({word for row in train + dev for word in words(row["text"])})
    columns = {word: index for index, word in enumerate(vocabulary)}
    sets = {}
    for name, part in (("train", train), ("dev", dev)):
        sets[name] = np.zeros((len(part), len(columns)), dtype=np.float32)
        for index, row in enumerate(part):
            sets[name][index, [columns[word] for word in words(row["text"])]] = 1
    both = sets["dev"] @ sets["train"].T
    either = sets["dev"].sum(1)[:, None] + sets["train"].sum(1)[None] - both
    near = (both / either).max(1)
    long = sets["dev"].sum(1) >= 6
    assert 0.1 < near[long].max() < 0.7, dev[int(np.where(long, near, 0).argmax())]["text"]


def test_no_opening_and_no_length_gives_the_label_away():
    train = rows("train")
    openings = Counter(words(row["text"])[:3] for row in train)
    assert max(openings.values()) <= len(train) / 100
    lengths = np.array([len(words(row["text"])) for row in train])
    positive = np.array([row["label"] == "positive" for row in train])
    # The best cut on length alone, found on the very sentences it is scored on.
    best = max(abs(float(np.mean((lengths >= cut) == positive)) - 0.5) for cut in range(1, 40))
    assert best < 0.08


def test_loads_by_name_offline_with_its_labels():
    data = load_task("reviews", offline=True)
    assert data.task.labels == ("negative", "positive")
    assert (len(data.train), len(data.evaluation)) == (len(rows("train")), len(rows("dev")))
    first = rows("train")[0]
    assert data.train.texts[0] == first["text"]
    assert data.task.labels[data.train.labels[0]] == first["label"]
    assert "/" not in data.source.replace("reviews/", "")


def test_a_folder_of_the_same_name_does_not_stand_in_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reviews").mkdir()
    (Path("reviews") / "train.tsv").write_text("label\ttext\nnegative\ta\npositive\tb\n")
    assert len(load_task("reviews").train) == len(rows("train"))
    assert len(load_task("./reviews", text_column="text", label_column="label", need_evaluation=False).train) == 2
