"""`uhl pretrain --teacher MODEL`: the model speaks in place of labels, with data, with bare texts and with nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import call, write_conll, write_data
from tiny_classifiers import fine_tuned, save, tiny_classifier, with_lora
from tiny_hosts import SENTENCES, save_tiny_host

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DEFAULT_HOST, DataOptions, HostOptions, PretrainOptions
from uhl_cli.commands.own_teacher import soft_targets, teacher_task
from uhl_cli.data import Examples
from uhl_cli.errors import DataError, LabelError
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.metrics import score
from uhl_cli.train.classifier import Classifier, load_classifier
from uhl_cli.transfer.general import record_of
from uhl_cli.transfer.texts import quantised_log_odds

LABELS = ("no", "yes")
TRUTH = tuple(int("w" in text) for text in SENTENCES)
TAGS = ("O", "B-PER")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A classifier that was really fine-tuned, a PEFT folder, a tagger, and a host of another family."""
    made = tmp_path_factory.mktemp("teachers")
    model = fine_tuned(tiny_classifier("bert", LABELS), "bert", SENTENCES, TRUTH)
    save(made / "tuned", "bert", model)
    save(made / "nameless", "bert", tiny_classifier("bert", ("LABEL_0", "LABEL_1")))
    save(made / "tagger", "bert", tiny_classifier("bert", TAGS, "tokens"))
    base = save_tiny_host(made / "base", "bert")
    lora = with_lora(tiny_classifier("bert", LABELS), modules_to_save=["classifier", "pooler"])
    lora = fine_tuned(lora, "bert", SENTENCES, TRUTH)
    lora.peft_config["default"].base_model_name_or_path = str(base)
    lora.save_pretrained(made / "lora")
    save_tiny_host(made / "host", "gpt2")
    return made


def arguments(teacher: Path | str, *more: Path | str) -> list[str]:
    given = ["pretrain", "--teacher", str(teacher), *(str(word) for word in more), "--output", "a.safetensors"]
    given += ["--max-steps", "2", "--batch-size", "4", "--num-anchors", "64", "--max-flops", "1000"]
    return [*given, "--feature-words", "0", "--device", "cpu", "--offline", "--json"]


def load(path: Path) -> Classifier:
    return load_classifier(str(path), device="cpu", offline=True)


def task_of(teacher: Classifier, **data: object) -> tuple[Classifier, object]:
    return teacher_task(teacher, PretrainOptions(teacher="x", data=DataOptions(**data), host=HostOptions(name="x")))


def classes(teacher: Classifier, examples: Examples) -> list[int]:
    return [int(row.argmax()) for row in teacher.logits_of(examples)]


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["tuned", "lora"])
def test_the_file_says_what_the_teacher_says(kind, folder, here):
    """Labels of the training data are not read: all of them are wrong here."""
    data = write_data(here / "data")
    rows = [f"{text}\t{1 - label}" for text, label in zip(SENTENCES, TRUTH, strict=True)]
    (data / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    called = call(*arguments(folder / kind, "--task", "small", "--data", data))
    assert called.code == 0, called.err
    report, content = json.loads(called.out), read_adapter(here / "a.safetensors")
    manifest = content.manifest
    assert manifest.source.name == {"tuned": "tuned", "lora": "base"}[kind]
    # A PEFT folder has no names of its own, so that the data's stand.
    assert manifest.task.labels == {"tuned": LABELS, "lora": ("0", "1")}[kind]
    assert manifest.task.name == "small"
    assert report["teacher"] == kind
    assert str(folder) not in manifest.model_dump_json()
    teacher = load(folder / kind)
    assert classes(teacher, Examples(SENTENCES, labels=TRUTH)) == list(TRUTH), "not fine-tuned, so nothing is shown"
    assert manifest.label_counts == (TRUTH.count(0), TRUTH.count(1))
    wanted = score("accuracy", list(TRUTH[:12]), list(TRUTH[:12]), LABELS)
    assert report["teacher_score"] == json.loads(wanted.model_dump_json())
    found = UniversalAdapter.load(here / "a.safetensors").transfer
    assert found.record.user_texts == len(SENTENCES)
    held = found.whole()
    logits = torch.cat(teacher.logits_of(held.texts.examples())).numpy()
    assert np.array_equal(held.codes, quantised_log_odds(logits))
    sure = np.abs(held.codes[:, 0]) > 0
    assert (held.log_odds().argmax(1) == logits.argmax(1))[sure].all()
    whole, _ = held.whole(len(SENTENCES))
    assert [label == ("w" in text) for text, label in zip(whole.texts, whole.labels, strict=True)] == [True] * 24


@pytest.mark.integration
def test_bare_texts_will_do(folder, here):
    (here / "mine.txt").write_text("\n".join([*SENTENCES, "", SENTENCES[0]]) + "\n")
    called = call(*arguments(folder / "tuned", "--data", "mine.txt", "--host", folder / "host"))
    assert called.code == 0, called.err
    report, manifest = json.loads(called.out), read_adapter(here / "a.safetensors").manifest
    assert (manifest.task.name, manifest.task.labels, manifest.source.name) == ("mine", LABELS, "host")
    assert manifest.training.train_examples == len(SENTENCES) + 1
    assert (report["score"], report["teacher_score"], report["teacher"]) == (None, None, "tuned")


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["tuned", "tagger"])
def test_without_any_data_the_packages_own_texts_serve(kind, folder, here):
    called = call(*arguments(folder / kind, "--limit-train", "300"))
    assert called.code == 0, called.err
    report, content = json.loads(called.out), read_adapter(here / "a.safetensors")
    manifest = content.manifest
    assert (manifest.task.name, manifest.source.name, report["user_texts"]) == (kind, kind, 0)
    assert manifest.parts.transfer.general is not None
    assert manifest.training.train_examples == 300
    assert "--anchors general" in manifest.training.command
    # A plain text is written as it is; of words, the marks stand apart.
    assert manifest.parts.transfer.general.apart == (kind == "tagger")


@pytest.mark.integration
def test_a_tagger_teaches_words_and_is_scored_on_tags(folder, here):
    data = write_conll(here / "conll")
    called = call(*arguments(folder / "tagger", "--data", data, "--host", folder / "host"))
    assert called.code == 0, called.err
    report, manifest = json.loads(called.out), read_adapter(here / "a.safetensors").manifest
    assert (manifest.task.kind, manifest.task.labels, manifest.task.metric) == ("tokens", TAGS, "entity_f1")
    _, data = task_of(load(folder / "tagger"), data=str(data))
    rows = [row.argmax(-1).tolist() for row in load(folder / "tagger").logits_of(data.evaluation)]
    wanted = score("entity_f1", rows, [list(row) for row in data.evaluation.tags], TAGS)
    assert report["teacher_score"] == json.loads(wanted.model_dump_json())


def test_lessons_are_the_teachers_classes_and_probabilities(folder):
    for name, examples in (
        ("tuned", task_of(load(folder / "tuned"))[1].train.select(range(20))),
        ("tagger", task_of(load(folder / "tagger"))[1].train.select(range(20))),
    ):
        teacher = load(folder / name)
        told, targets = soft_targets(teacher, examples, batch_size=8)
        logits = teacher.logits_of(examples, batch_size=8)
        rows = [3, 0, 7]
        wanted = torch.cat([logits[row] for row in rows])
        assert torch.equal(targets(rows), wanted.softmax(-1))
        own = [told.labels[row] for row in rows] if name == "tuned" else [tag for row in rows for tag in told.tags[row]]
        assert own == wanted.argmax(-1).tolist()
        assert (told.texts, told.words) == (examples.texts, examples.words)


def test_the_packages_own_texts_are_in_the_style_that_their_record_names(folder):
    for name, apart in (("tuned", False), ("tagger", True)):
        _, data = task_of(load(folder / name))
        record = record_of(data.train.texts)
        assert (record.lower, record.apart) == (False, apart)


def test_labels_of_the_data_are_matched_by_name_or_number(folder, here):
    teacher = load(folder / "tuned")
    for names, wanted in (
        (("yes", "no"), (1, 0)),
        (("YES", "No"), (1, 0)),
        ((0, 1), (0, 1)),
        (("false", "true"), (0, 1)),
    ):
        path = here / "rows.tsv"
        rows = [f"{text}\t{names[index % 2]}" for index, text in enumerate(SENTENCES)]
        path.write_text("\n".join(["text\tlabel", *rows]) + "\n")
        found, data = task_of(teacher, data="rows.tsv")
        assert (found.labels, data.task.labels, data.task.name) == (LABELS, LABELS, "rows")
        place = {text: index for index, text in enumerate(SENTENCES)}
        for text, label in zip(data.evaluation.texts, data.evaluation.labels, strict=True):
            assert label == wanted[place[text] % 2], names


def test_a_nameless_teacher_takes_the_names_of_the_data(folder, here):
    write_data(here / "data")
    teacher, data = task_of(load(folder / "nameless"), task="sst2", data="data")
    assert teacher.labels == data.task.labels == ("negative", "positive")
    (here / "bare.csv").write_text("text\n" + "\n".join(f'"{text}"' for text in SENTENCES) + "\n")
    teacher, data = task_of(load(folder / "nameless"), data="bare.csv")
    assert teacher.labels == data.task.labels == ("LABEL_0", "LABEL_1")


def test_data_of_another_kind_serves_by_its_texts(folder, here):
    write_data(here / "data")
    write_conll(here / "conll")
    _, data = task_of(load(folder / "tagger"), task="sst2", data="data")
    assert (data.task.kind, data.evaluation) == ("tokens", None)
    start, end = data.train.words[0][1]
    assert data.train.texts[0][start:end] == SENTENCES[0].split()[1]
    _, data = task_of(load(folder / "tuned"), data="conll")
    assert (data.task.kind, data.evaluation, data.train.texts[0]) == ("sequence", None, SENTENCES[0])


def test_a_text_file_is_conll_for_a_tagger_alone_where_it_reads_so(folder, here):
    blocks = ["\n".join(f"{word} O" if word[0].islower() else f"{word} B-PER" for word in t.split()) for t in SENTENCES]
    (here / "tags.txt").write_text("\n\n".join(blocks) + "\n")
    _, data = task_of(load(folder / "tagger"), data="tags.txt")
    assert data.evaluation is not None
    (here / "lines.txt").write_text("\n".join(SENTENCES) + "\n")
    _, data = task_of(load(folder / "tagger"), data="lines.txt")
    assert (data.evaluation, data.train.texts) == (None, SENTENCES)


def test_what_is_left_open_is_named(folder):
    assert PretrainOptions().with_defaults().host.name == DEFAULT_HOST
    assert PretrainOptions().with_defaults().data.task == "reviews"
    own = PretrainOptions(data=DataOptions(data="films.csv")).with_defaults().data
    assert (own.task, own.data) == ("films.csv", None)
    taught = PretrainOptions(teacher="some/model").with_defaults("some/base")
    assert (taught.host.name, taught.data.task, taught.anchors) == ("some/base", None, "general")
    named = PretrainOptions(teacher="some/model", host=HostOptions(name="x"), data=DataOptions(data="y.txt"))
    assert (named.with_defaults("some/base").host.name, named.with_defaults("some/base").anchors) == ("x", None)


@pytest.mark.parametrize(
    ("teacher", "more", "words"),
    [
        ("no-such/model", (), "not in the cache"),
        ("host", (), "no classification head"),
        ("tuned", ("--data", "other"), "has the labels cold, warm; those of 'tuned' are no, yes"),
        ("tuned", ("--data", "no-such.txt"), "no file or folder 'no-such.txt'"),
        ("tuned", ("--data", "empty.txt"), "holds no text"),
        ("tuned", ("--data", "latin.txt"), "is not UTF-8"),
        ("tuned", ("--data", "numbers.csv"), "no known text column"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(teacher, more, words, folder, here, monkeypatch):
    monkeypatch.setattr("uhl_cli.commands.pretrain.train", lambda *_, **__: pytest.fail("training began"))
    (here / "other").mkdir()
    rows = [f"{text}\t{'warm' if label else 'cold'}" for text, label in zip(SENTENCES, TRUTH, strict=True)]
    (here / "other" / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    (here / "empty.txt").write_text("\n \n")
    (here / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (here / "numbers.csv").write_text("a,b\n1,2\n")
    called = call(*arguments(folder / teacher if (folder / teacher).exists() else teacher, *more))
    assert words in called.error
    assert not (here / "a.safetensors").exists()


def test_errors_are_typed(folder, here):
    teacher = load(folder / "tuned")
    with pytest.raises(DataError):
        task_of(teacher, data="no-such.txt")
    (here / "rows.csv").write_text(
        "text,label\n" + "\n".join(f'"{text}",{index % 3}' for index, text in enumerate(SENTENCES))
    )
    with pytest.raises(LabelError, match="0, 1, 2"):
        task_of(teacher, data="rows.csv")
