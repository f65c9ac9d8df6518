"""Dev scores in training: when they are taken, what survives an interruption, and that learning curves show them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from toy_runs import sequence_data, token_data

from uhl_cli.commands.options import HostOptions
from uhl_cli.commands.scoring import references_of
from uhl_cli.compare import figures
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.results import Costs, CurvePoint, DevPoint, RunMetrics
from uhl_cli.compare.runs import _DevScores
from uhl_cli.compare.sections import DatasetSection, TrainingSection
from uhl_cli.metrics import score


def dev_scores(data, every):
    training = TrainingSection(eval_steps=every)
    dataset = DatasetSection(task="sst2")
    run = RunConfig(run_id="x", method="lora", host=HostOptions(name="h"), dataset=dataset, training=training)
    return _DevScores(run, data)


@pytest.mark.parametrize("data", [sequence_data, token_data])
def test_they_are_taken_every_so_many_steps(data):
    data = data()
    right = references_of(data.evaluation)
    scores = dev_scores(data, 3)
    for step in range(1, 8):
        scores.after_step(step, lambda examples: references_of(examples))
    assert scores.points() == tuple(DevPoint(step=step, score=1.0, f1=1.0, accuracy=1.0) for step in (3, 6))
    none = dev_scores(data, None)
    none.after_step(3, lambda _: right)
    assert none.points() == ()


def test_an_interrupted_training_keeps_those_before(tmp_path):
    data, path = sequence_data(), tmp_path / "run" / "dev.jsonl"
    wrong = [1 - label for label in data.evaluation.labels]
    first = dev_scores(data, 2)
    first.keep_in(path)
    for step in (2, 4):
        first.after_step(step, lambda _: wrong)
    resumed = dev_scores(data, 2)  # from a checkpoint of step 3
    resumed.keep_in(path)
    for step in (4, 5, 6):
        resumed.after_step(step, lambda _: list(data.evaluation.labels))
    assert [(point.step, point.accuracy) for point in resumed.points()] == [(2, 0.0), (4, 1.0), (6, 1.0)]
    again = dev_scores(data, 2)
    again.keep_in(path)
    assert again.points() == resumed.points()


@pytest.mark.parametrize("dev", [(), ((10, 0.4), (20, 0.6))])
def test_learning_curves_show_them(monkeypatch, tmp_path, dev):
    pytest.importorskip("matplotlib")
    drawn = []
    whole = figures._figure

    @contextmanager
    def kept(path, size):
        with whole(path, size) as figure:
            yield figure
            drawn.append(figure)

    monkeypatch.setattr(figures, "_figure", kept)
    run = RunMetrics(
        run_id="x",
        method="lora",
        host="h",
        task="t",
        seed=0,
        config_digest="d",
        mode="full",
        score=score("accuracy", [1, 0], [1, 1], ("no", "yes")),
        costs=Costs(adapter_bytes=1, memory_mb=2.0, flops_percent=3.0),
        within_budget=True,
        training_seconds=1.0,
        curve=(CurvePoint(step=20, loss=1.0, accuracy=0.5),),
        dev_curve=tuple(DevPoint(step=step, score=value, f1=0.0, accuracy=0.0) for step, value in dev),
    )
    figures.draw_learning_curve(run, tmp_path / "curve.pdf")
    lines = {line.get_label(): line for axes in drawn[0].axes for line in axes.get_lines()}
    assert ("dev accuracy" in lines) == bool(dev)
    if dev:
        assert list(zip(*lines["dev accuracy"].get_data(), strict=True)) == list(dev)
