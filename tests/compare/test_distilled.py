"""Methods on a transfer set: which of its texts have true labels, and what the source may teach."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from uhl_cli.commands.transfer_set import MAX_WORDS, SPANS
from uhl_cli.commands.tune_student import distillation_data
from uhl_cli.compare import resources
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.distilled import FROM_SOURCE, ExactOutputs, labelled_texts, package_texts
from uhl_cli.compare.resources import Resources
from uhl_cli.data import Examples
from uhl_cli.data.tasks import Task
from uhl_cli.errors import DataError
from uhl_cli.reports import silent
from uhl_cli.transfer.texts import TransferSet, TransferTexts, quantised_log_odds

TRAIN = Examples(("a good film", "a  bad\tfilm", "a long story", "another"), labels=(2, 1, 0, 3))
SENTENCES = Examples(("good", "bad"), labels=(0, 1))


def transfer(*texts: str, spans: int = 0, words: bool = False, pairs: tuple[str, ...] | None = None) -> Examples:
    return TransferTexts(texts, pairs, spans, words, "test").examples()


def words_of(*texts: str, tags: tuple[tuple[int, ...], ...]) -> Examples:
    return replace(transfer(*texts, words=True), tags=tags)


def task(**columns: str) -> Task:
    return Task.model_validate({"name": "mine", "labels": ("no", "yes"), "label_column": "label"} | columns)


def test_texts_of_the_training_data_have_its_labels_and_others_are_left_out():
    found = labelled_texts(transfer("a bad film", "a new film", "another", "a good film"), TRAIN)
    assert (found.texts, found.labels) == (("a bad film", "another", "a good film"), (1, 3, 2))


def test_spans_count_where_they_are_training_texts_themselves():
    examples = transfer("a very long story of a good film", spans=40)
    assert len(examples) > 1
    train = Examples((examples.texts[0], examples.texts[3]), labels=(1, 0))
    found = labelled_texts(examples, train)
    assert dict(zip(found.texts, found.labels, strict=True)) == dict(zip(train.texts, train.labels, strict=True))


def test_a_training_text_is_known_by_its_first_words():
    long = " ".join(f"w{index}" for index in range(MAX_WORDS + 9))
    cut = " ".join(long.split()[:MAX_WORDS])
    train = Examples((long,), labels=(1,))
    assert labelled_texts(transfer(cut), train).labels == (1,)
    with pytest.raises(DataError, match="none of the texts"):
        labelled_texts(transfer(cut.rsplit(" ", 1)[0]), train)


def test_both_texts_of_a_pair_count():
    train = Examples(("is it", "is it"), pairs=("a film", "a book"), labels=(1, 0))
    found = labelled_texts(transfer("is it", "was it", pairs=("a book", "a film")), train)
    assert (found.texts, found.pairs, found.labels) == (("is it",), ("a book",), (0,))


def test_words_have_their_tags_and_a_sentence_of_another_length_is_left_out():
    train = words_of("Ann sees Rome", "a b", tags=((1, 0, 2), (0, 1)))
    odd = replace(train, words=(train.words[0], ((0, 3),)), tags=(train.tags[0], (1,)))  # one word with a space in it
    examples = transfer("a b", "Ann sees Rome", words=True)
    assert labelled_texts(examples, train).tags == ((0, 1), (1, 0, 2))
    assert labelled_texts(examples, odd).tags == ((1, 0, 2),)


def test_without_any_training_text_there_is_nothing_to_learn_from():
    with pytest.raises(DataError, match="none of the texts of the adapter's transfer set"):
        labelled_texts(transfer("something else"), TRAIN)


def test_the_package_has_texts_for_single_texts_and_words_and_none_for_pairs():
    single = task(kind="sequence", text_column="a", metric="accuracy")
    texts = package_texts(single, SENTENCES)
    assert (texts.spans, texts.words, texts.pairs) == (SPANS, False, None)
    assert len(texts) > 1000
    tokens = task(kind="tokens", tokens_column="a", metric="entity_f1")
    tagged = package_texts(tokens, words_of("Ann sees", tags=((1, 0),)))
    assert (tagged.spans, tagged.words) == (0, True)
    with pytest.raises(DataError, match="mine is on pairs of texts"):
        package_texts(single.model_copy(update={"pair_column": "b"}), SENTENCES)


def test_the_source_teaches_its_outputs_as_they_are_where_a_file_would_round_them():
    texts = TransferTexts(tuple(f"text {index}" for index in range(40)), None, 0, False, "test")
    logits = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    expected, codes = torch.from_numpy(logits).softmax(-1), quantised_log_odds(logits)

    def worst(transfer_set: TransferSet) -> float:
        taught = distillation_data(transfer_set)
        rows = [int(text.split()[1]) for text in taught.examples.texts]
        return float((taught.targets(list(range(len(rows)))) - expected[rows]).abs().max())

    assert worst(ExactOutputs(texts, codes, "the source", logits)) < 1e-6
    assert worst(TransferSet(texts, codes, "the source")) > 1e-3


class StandInAdapter:
    """Notes the FLOP limit of every alignment and port; its source is any host."""

    digest = "the same file"
    manifest = SimpleNamespace(source=SimpleNamespace(name="source", revision=None, fingerprint="whose"))

    def __init__(self) -> None:
        self.limits: list[float] = []

    def align(self, _host: object, *, max_flops: float) -> float:
        self.limits.append(max_flops)
        return max_flops

    def port(self, _host: object, *, max_flops: float) -> SimpleNamespace:
        self.limits.append(max_flops)
        return SimpleNamespace(logits_of=lambda *_, **__: [torch.full((1, 2), max_flops)])


def test_runs_with_another_flop_limit_share_neither_alignment_nor_outputs_of_the_source(tmp_path, monkeypatch):
    adapter, host = StandInAdapter(), SimpleNamespace(name="source", fingerprint="whose", max_length=64)
    monkeypatch.setattr(resources, "load", lambda _options: host)
    monkeypatch.setattr(Resources, "adapter", lambda _self, _run: (adapter, tmp_path))
    shared = Resources(tmp_path, {}, device="cpu", offline=True, reporter=silent)

    def run(max_flops: float) -> RunConfig:
        content = {"run_id": "one", "method": FROM_SOURCE, "host": {"name": "h"}, "dataset": {"task": "sst2"}}
        return RunConfig.model_validate(
            content | {"adapter": {"file": "a.safetensors"}, "budget": {"max_flops": max_flops}}
        )

    texts = TransferTexts(("a text",), None, 0, False, "test")
    limits = (10.0, 5.0, 5.0)
    assert [shared.aligned_file(run(each)).aligned for each in limits] == list(limits)
    assert [shared.source_outputs(run(each), texts)[0, 0] for each in limits] == list(limits)
    assert adapter.limits == [10.0, 5.0] * 2, "equal runs share them"
