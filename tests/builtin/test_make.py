"""The training module, from a text file and a teacher to hosts that `uhl` loads, on toy sizes."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_hosts import SENTENCES, save_tiny_host, tiny_host

from uhl_cli.builtin import make
from uhl_cli.builtin.corpus import (
    EXCHANGED_TEXTS,
    LISTS,
    MAX_WORDS,
    MIN_WORDS,
    OPINION_COPIES,
    build_corpus,
    chunks,
    read_paragraphs,
)
from uhl_cli.builtin.recipes import RECIPES
from uhl_cli.builtin.words import tokenise, word_targets
from uhl_cli.data import load_task
from uhl_cli.errors import DataError
from uhl_cli.host.checkpoint import load_host
from uhl_cli.reports import silent
from uhl_cli.transfer.general import opinions

SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def precision_ends_with_the_test() -> Iterator[None]:
    """Hosts are made in bfloat16, and accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> list[str]:
    """A text, a teacher and small recipes in the current folder, and the command line that goes with them."""
    rng = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()
    lines = [" ".join(rng.permutation(words)[:50]) + "." for _ in range(60)]
    with gzip.open(tmp_path / "text.gz", "wt") as file:
        file.write("\n".join(lines))
    save_tiny_host(tmp_path / "teacher", "bert")
    small = {name: replace(recipe, **SHAPE, steps=12, batch_tokens=512) for name, recipe in RECIPES.items()}
    monkeypatch.setattr(make, "RECIPES", small)
    monkeypatch.setattr(make, "HELD_OUT_TEXTS", 8)
    monkeypatch.setattr("uhl_cli.builtin.corpus.opinions", lambda: list(SENTENCES))
    monkeypatch.setattr("uhl_cli.host.builtin._FOLDER", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return ["--text", "text.gz", "--teacher", "teacher", "--output", "out", "--work", "work"]


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make", *arguments])
    make.main()


@pytest.mark.integration
@pytest.mark.parametrize("name", ["tiny", "decoder"])
def test_makes_hosts_that_load_and_the_same_ones_again(name, toy, monkeypatch):
    run(monkeypatch, *toy, "--hosts", name)
    host = load_host(f"builtin:{name}", device="cpu")
    assert (host.hidden_size, host.decoder) == (32, name == "decoder")
    settings = json.loads((Path("out") / name / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    with torch.inference_mode():
        assert torch.isfinite(host.map.base(input_ids=torch.arange(5, 15).unsqueeze(0)).last_hidden_state).all()
    record = json.loads(Path("out", name, "training.json").read_text())
    assert set(record["held_out"]) == {"language_loss", "teacher_variance_missed"}
    first = Path("out", name, "model.safetensors").read_bytes()
    # What is finished stays; what is gone is made again, to the same bytes.
    run(monkeypatch, *toy, "--hosts", name)
    assert Path("out", name, "model.safetensors").read_bytes() == first
    Path("out", name, "model.safetensors").unlink()
    run(monkeypatch, *toy, "--hosts", name)
    assert Path("out", name, "model.safetensors").read_bytes() == first


@pytest.mark.integration
def test_training_lowers_both_losses(toy, monkeypatch):
    records = []
    for steps in ("1", "60"):
        run(monkeypatch, *toy, "--hosts", "tiny", "--steps", steps)
        records.append(json.loads(Path("out/tiny/training.json").read_text())["held_out"])
        Path("out/tiny/model.safetensors").unlink()
    assert records[1]["language_loss"] < records[0]["language_loss"]
    assert records[1]["teacher_variance_missed"] < records[0]["teacher_variance_missed"]


def test_the_teachers_targets_are_its_own_standardised_word_states(tmp_path):
    teacher = tiny_host("bert", num_hidden_layers=2)
    texts = list(SENTENCES)
    targets = word_targets(teacher, texts, tmp_path / "states.npy", silent)
    tokens = tokenise(teacher.tokenizer, texts, max_length=teacher.max_length)
    assert targets.values.shape == (tokens.word_starts[-1], 2 * teacher.hidden_size)
    batch = tokens.batch([4], padding=0)
    with torch.inference_mode():
        hidden = teacher.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
    expected = torch.cat([batch.pool(hidden[1])[0], batch.pool(hidden[2])[0]], dim=1)
    found = targets.of(batch.words)
    # Standardising is one affine map a coordinate, so words correlate as before; bfloat16 leaves a trace.
    for coordinate in range(0, expected.shape[1], 7):
        both = np.corrcoef(expected[:, coordinate].numpy(), found[:, coordinate].numpy())
        assert both[0, 1] > 0.99
    everything = torch.from_numpy(targets.values.astype(np.float32))
    assert abs(float(everything.mean())) < 0.1
    assert abs(float(everything.std()) - 1) < 0.1


def test_chunks_keep_the_words_in_order_and_within_bounds():
    paragraph = "A b c d e f g. " * 60
    pieces = chunks([paragraph, "too short"])
    assert " ".join(pieces).split() == paragraph.split()
    assert all(MIN_WORDS <= len(piece.split()) <= MAX_WORDS for piece in pieces)
    assert max(len(piece.split()) for piece in chunks(["word " * 500])) <= MAX_WORDS


def test_the_corpus_is_disturbed_in_part_and_by_the_seed():
    paragraphs = [f"paragraph {index} has just these nine words in it" for index in range(400)]
    corpus = build_corpus(paragraphs, ["zebra", "yonder"], seed=1)
    assert corpus == build_corpus(paragraphs, ["zebra", "yonder"], seed=1)
    assert corpus != build_corpus(paragraphs, ["zebra", "yonder"], seed=2)
    kept = sum(before == after for before, after in zip(paragraphs, corpus[:400], strict=True))
    assert abs(kept / 400 - (1 - EXCHANGED_TEXTS)) < 0.08
    own = opinions()
    assert corpus[400 : 400 + OPINION_COPIES * len(own)] == own * OPINION_COPIES
    lists = corpus[400 + OPINION_COPIES * len(own) :]
    assert len(lists) == int(LISTS * 400)
    assert all(set(text.split()) <= {"zebra", "yonder"} for text in lists)


def test_opinions_are_no_sentences_of_the_task():
    """Hosts may have read them, so that neither part of `reviews` may hold one."""
    data = load_task("reviews")
    known = {" ".join(re.findall(r"\w+", text.lower())) for text in opinions()}
    assert len(known) == len(opinions())
    for part in (data.train, data.evaluation):
        assert known.isdisjoint(" ".join(re.findall(r"\w+", text.lower())) for text in part.texts)


def test_a_text_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_paragraphs(tmp_path / "absent")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(DataError, match="no text"):
        read_paragraphs(tmp_path / "empty")
