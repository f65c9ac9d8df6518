"""Tuning without labels: what is scored is what the file gives back, outputs teach and shuffled ones do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from safetensors.numpy import load_file
from tiny_hosts import tiny_host
from toy_runs import TINY_LIMIT, make_adapter, pair_data, sequence_data, token_data, toy_options

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, TuneOptions, TuneTraining
from uhl_cli.commands.pretrain import pretrain
from uhl_cli.commands.scoring import load, references_of
from uhl_cli.commands.tune import run_tune
from uhl_cli.commands.tune_student import distillation_data, trained_student, training_of, tune_student
from uhl_cli.data import Examples, load_task
from uhl_cli.errors import DataError, UsageError
from uhl_cli.formats.ported import FILE_NAME, load_ported
from uhl_cli.formats.task import read_task
from uhl_cli.formats.transfer import StoredTransfer
from uhl_cli.metrics import score
from uhl_cli.reports import TuneReport, silent
from uhl_cli.train.run_files import RunFiles
from uhl_cli.transfer.general import record_of
from uhl_cli.transfer.texts import TransferSet, TransferTexts

KINDS = ("delta-theta", "lora")
DATA = {"sequence": sequence_data, "pairs": pair_data, "tokens": token_data}


class Stop(Exception):
    """The run is cut off."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """A file with a transfer set for a task of each kind."""
    folder = tmp_path_factory.mktemp("student")
    for name, data in DATA.items():
        made = make_adapter(tiny_host("bert"), data(), folder / name, max_steps=20, transfer_set="auto")
        assert made.transfer_texts > 10
    return {name: folder / name for name in DATA}


def target():
    return tiny_host("gpt2", hidden_size=40, num_hidden_layers=3, seed=1)


def options_for(adapter: Path, output: Path, parameters: str, **changes) -> TuneOptions:
    training = {"max_steps": 6, "batch_size": 8, "learning_rate": 0.02 if parameters == "delta-theta" else 3e-3}
    training |= {name: changes.pop(name) for name in list(changes) if name in TuneTraining.model_fields}
    settings = {"max_flops": TINY_LIMIT, "save_every": 3, "rank": 2 if parameters == "lora" else 8} | changes
    return TuneOptions(
        adapter=adapter,
        target=HostOptions(name="tiny", device="cpu"),
        parameters=parameters,
        training=TuneTraining(**training),
        output=output,
        **settings,
    )


def run(adapter: Path, output: Path, parameters: str, *, data=None, evaluation=None, host=None, **changes):
    more = {name: changes.pop(name) for name in ("files", "reporter") if name in changes}
    options = options_for(adapter, output, parameters, **changes)
    loaded, accelerator = UniversalAdapter.load(adapter), Accelerator(cpu=True)
    host = host or target()
    return tune_student(loaded, host, data, options, evaluation=evaluation, accelerator=accelerator, **more)


def given_back(adapter: Path, output: Path, report: TuneReport):
    if report.parameters == "lora":
        host = target()
        return load_ported(output, host.model, host.tokenizer)
    return UniversalAdapter.load(adapter).port(target(), task=output, max_flops=TINY_LIMIT)


@pytest.mark.parametrize("parameters", KINDS)
@pytest.mark.parametrize("kind", DATA)
def test_what_is_scored_is_what_the_file_gives_back(kind, parameters, adapters, tmp_path):
    output, data = tmp_path / "out", DATA[kind]()
    report = run(adapters[kind], output, parameters, evaluation=data, max_steps=20)
    model, loaded = given_back(adapters[kind], output, report), UniversalAdapter.load(adapters[kind])
    held = distillation_data(loaded.transfer_set(), target()).held
    zero_shot = loaded.port(target(), max_flops=TINY_LIMIT)
    for examples, kept in ((data.evaluation, report.scores), (held, report.agreement)):
        for name, ported in (("tuned", model), ("zero_shot", zero_shot)):
            rows = ported.classes_of(examples).for_metric(data.task.kind)
            assert score(data.task.metric, rows, references_of(examples), data.task.labels) == kept[name]
    assert (report.supervision, report.own_task, report.unread) == ("transfer set", True, 0)
    texts = list(data.evaluation.texts)
    if kind == "sequence":
        assert not np.allclose(model(texts).numpy(), zero_shot(texts).numpy(), atol=1e-3), "nothing was tuned"


def test_bytes_are_those_of_the_file(adapters, tmp_path):
    small = run(adapters["sequence"], tmp_path / "task", "delta-theta")
    assert (small.delta_bytes, small.lora_bytes, small.readout_bytes) == (512, 0, 0)
    assert small.bytes == (tmp_path / "task").stat().st_size
    record = read_task(tmp_path / "task").record
    assert (record.parameters, record.supervision, record.score) == ("low-rank", "transfer set", None)
    large = run(adapters["sequence"], tmp_path / "lora", "lora")
    path = tmp_path / "lora" / FILE_NAME
    tensors = load_file(path)
    parts = {"lora.": large.lora_bytes, "readout.": large.readout_bytes}
    for prefix, size in parts.items():
        assert size == sum(value.nbytes for name, value in tensors.items() if name.startswith(prefix)) > 0
    assert large.delta_bytes == 0
    assert large.bytes == path.stat().st_size
    assert small.scores == large.scores == {}


@pytest.mark.parametrize("parameters", KINDS)
def test_a_run_that_is_cut_off_and_resumed_ends_with_the_same_file(parameters, adapters, tmp_path):
    def stop(label: str, done: int, total: int, note: str = "") -> None:
        if label == "tuning" and done == 40:  # the report of the last step comes before its checkpoint
            raise Stop

    def content(name: str) -> bytes:
        path = tmp_path / name
        return (path / FILE_NAME if parameters == "lora" else path).read_bytes()

    adapter, files = adapters["sequence"], RunFiles(tmp_path / "b")
    run(adapter, tmp_path / "whole", parameters, files=RunFiles(tmp_path / "a"), max_steps=40)
    with pytest.raises(Stop):
        run(adapter, tmp_path / "cut", parameters, files=files, reporter=stop, max_steps=40)
    assert not (tmp_path / "cut").exists()
    begun: list[int] = []

    def report(label: str, done: int, total: int, note: str = "") -> None:
        if label == "tuning":
            begun.append(done)

    run(adapter, tmp_path / "cut", parameters, files=files, reporter=report, resume=True, max_steps=40)
    assert begun == [0, 40], "nothing was resumed"
    assert content("cut") == content("whole")
    run(adapter, tmp_path / "other", parameters, seed=5, max_steps=40)
    assert content("other") != content("whole")


def test_pretraining_that_is_cut_off_in_its_teacher_is_resumed_there(tmp_path):
    def run_pretrain(name: str, reporter, files: RunFiles, *, resume: bool = False) -> bytes:
        changes = {"max_steps": 40, "batch_size": 4, "teacher": "lora", "transfer_set": "auto", "save_every": 6}
        options = toy_options(tmp_path / name, **changes, resume=resume)
        accelerator = Accelerator(cpu=True)
        pretrain(tiny_host("bert"), sequence_data(), options, accelerator=accelerator, files=files, reporter=reporter)
        return (tmp_path / name).read_bytes()

    steps: list[tuple[str, int]] = []

    def record(label: str, done: int, total: int, note: str = "") -> None:
        if label in ("training", "teacher") and done:
            steps.append((label, done))

    def stop(label: str, done: int, total: int, note: str = "") -> None:
        if label == "teacher" and done == 40:
            raise Stop

    whole = run_pretrain("whole", record, RunFiles(tmp_path / "a"))
    assert steps == [("training", 20), ("training", 40), ("teacher", 20), ("teacher", 40)]
    files = RunFiles(tmp_path / "b")
    with pytest.raises(Stop):
        run_pretrain("cut", stop, files)
    assert RunFiles(files.folder / "teacher").checkpoint.exists()
    steps.clear()
    assert run_pretrain("cut", record, files, resume=True) == whole
    assert steps == [("teacher", 40)], "a part was trained again"


def oracle(texts: tuple[str, ...], labels: tuple[int, ...]) -> TransferSet:
    """A transfer set whose teacher knows the labels of two classes."""
    codes = np.array([[7 if label else -7] for label in labels], dtype=np.int8)
    return TransferSet(TransferTexts(texts, None, 0, False, "test"), codes, "an oracle")


def test_texts_that_the_target_cannot_read_are_left_out(adapters):
    known = sequence_data().train.texts[:20]
    alien = ("\u4f60\u597d", "\u2603\u2603 \u2603")
    host = tiny_host("bert")
    mixed = distillation_data(oracle((*known[:7], *alien, *known[7:]), (1,) * 22), host)
    assert mixed.unread == 2
    assert set(mixed.examples.texts) | set(mixed.held.texts) == set(known)
    assert distillation_data(oracle((*known, *alien), (1,) * 22)).unread == 0  # no host, no judgement
    assert mixed.targets([0, 18]).shape == (2, 2)
    with pytest.raises(DataError, match=r"knows no token of the transfer set's texts.*--task"):
        distillation_data(oracle(alien, (1, 1)), host)
    with pytest.raises(DataError, match="single text"):
        distillation_data(oracle((known[0], *alien), (1, 1, 1)), host)


def test_outputs_stay_with_their_texts_in_every_part(adapters):
    texts = tuple(dict.fromkeys(sequence_data().train.texts))
    labels = tuple(int("w" in text) for text in texts)
    distillation = distillation_data(oracle(("\u2603", *texts), (1, *labels)), tiny_host("bert"))
    part, held = distillation.split(0.25, seed=3)
    assert {*part.examples.texts, *held.texts, *distillation.held.texts} == set(texts)
    assert len(part.examples) + len(held) + len(distillation.held) == len(texts)
    assert len(held) == round(0.25 * len(distillation.examples))
    for some in (distillation, part):
        classes = some.targets(list(range(len(some.examples)))).argmax(-1).tolist()
        assert classes == [int("w" in text) for text in some.examples.texts]
    assert held.labels == tuple(int("w" in text) for text in held.texts)


def test_a_text_is_held_out_with_all_its_spans(adapters):
    transfer = UniversalAdapter.load(adapters["sequence"]).transfer_set()
    distillation = distillation_data(transfer)
    part, held = distillation.split(0.25, seed=0)
    assert len(distillation.examples) > len(set(distillation.owners))
    owner = dict(zip(transfer.examples().texts, transfer.texts.owners(), strict=True))
    of_held = {owner[text] for text in held.texts if list(transfer.examples().texts).count(text) == 1}
    assert of_held.isdisjoint(part.owners)
    assert len(of_held) > 1


@pytest.mark.integration
def test_true_outputs_teach_a_target_and_shuffled_ones_do_not(tmp_path):
    """Agreement with a teacher that knows the reviews' labels, on texts that the target has not seen."""
    path, data = tmp_path / "adapter", load_task("reviews", limit_train=3000)
    host = load(HostOptions(name="builtin:tiny", device="cpu"))
    make_adapter(host, data, path, max_steps=1, max_flops=10.0)
    adapter = UniversalAdapter.load(path)
    options = options_for(path, tmp_path / "out", "lora", max_steps=150, batch_size=16, max_flops=10.0)
    config, aligned = training_of(adapter, options), adapter.align(host)
    distillation = distillation_data(oracle(data.train.texts, data.train.labels), host)
    order = np.random.default_rng(0).permutation(len(distillation.examples)).tolist()
    shuffled = replace(distillation, targets=lambda rows: distillation.targets([order[row] for row in rows]))

    def agreement(model) -> float:
        classes = model.classes_of(distillation.held).for_metric("sequence")
        return score("accuracy", classes, references_of(distillation.held), data.task.labels).value

    before, found = agreement(adapter.port(aligned)), {}
    for name, each in (("true", distillation), ("shuffled", shuffled)):
        student = trained_student(
            adapter, aligned, each, config, options, accelerator=Accelerator(cpu=True), files=None, reporter=silent
        )
        found[name] = agreement(adapter.port(aligned).with_adapter(student.finished(host)))
    assert found["true"] > before + 0.1
    assert abs(found["shuffled"] - before) < 0.1


def test_a_lora_takes_the_adapters_own_labels_alone(adapters, tmp_path):
    report = run(adapters["sequence"], tmp_path / "lora", "lora", data=sequence_data())
    assert (report.supervision, report.agreement) == ("labels", {})
    assert set(report.scores) == {"zero_shot", "tuned", "majority_class"}
    for other in (token_data(), replace_labels(sequence_data())):
        with pytest.raises(DataError, match=r"labels are cold, warm.*--parameters delta-theta"):
            run(adapters["sequence"], tmp_path / "other", "lora", data=other)
    empty = replace(sequence_data(), train=Examples((), labels=()))
    with pytest.raises(DataError, match="no training example"):
        run(adapters["sequence"], tmp_path / "other", "lora", data=empty)
    assert not (tmp_path / "other").exists()


def replace_labels(data):
    return replace(data, task=data.task.model_copy(update={"labels": ("bad", "good")}))


def test_a_file_without_texts_or_with_texts_of_another_version_says_what_to_do(adapters, tmp_path):
    bare = tmp_path / "bare"
    make_adapter(tiny_host("bert"), sequence_data(), bare)
    with pytest.raises(DataError, match=r"no transfer set.*--task or --data"):
        run(bare, tmp_path / "out", "lora")
    loaded = UniversalAdapter.load(adapters["sequence"])
    stored = loaded.transfer
    newer = record_of(["a"]).model_copy(update={"version": 999})
    record = stored.record.model_copy(update={"general": newer})
    with pytest.raises(DataError, match=r"version 999.*--task or --data"):
        replace(loaded, transfer=StoredTransfer(record, stored.codes, None, words=False)).transfer_set()


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"rank": 4}, "--rank"),
        ({"top_k": 1}, "--top-k"),
        ({"training": TuneTraining(active_weight=0.5)}, "--active-weight"),
        ({"training": TuneTraining(readout_learning_rate=0.01)}, "--readout-learning-rate"),
        ({"parameters": "lora", "training": TuneTraining(delta_weight=0.5)}, "--delta-weight"),
        ({"parameters": "lora", "top_k": 1}, "--top-k"),
        ({"data": DataOptions(text_column="t")}, "--text-column"),
        ({"data": DataOptions(limit_train=9), "score_data": "x"}, "--limit-train"),
        ({"data": DataOptions(task="x"), "rank": 4}, "--rank"),
        ({"data": DataOptions(data="x"), "score_data": "x"}, "--score-data"),
    ],
)
def test_an_option_without_effect_is_refused_before_anything_is_read(changes, option):
    options = TuneOptions(adapter=Path("nowhere"), target=HostOptions(name="x"), **changes)
    with pytest.raises(UsageError, match=f"{option} has no effect"):
        run_tune(options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameters": "lora", "rank": 4, "training": TuneTraining(readout_learning_rate=0.01, max_steps=3)},
        {"score_data": "x", "data": DataOptions(text_column="t", limit_evaluation=9)},
        {"data": DataOptions(task="x", limit_train=9), "top_k": 1, "training": TuneTraining(active_weight=0.5)},
        {"data": DataOptions(task="x"), "parameters": "lora", "rank": 4},
    ],
)
def test_options_with_effect_are_taken(changes):
    TuneOptions(adapter=Path("nowhere"), target=HostOptions(name="x"), **changes).refuse_idle()
