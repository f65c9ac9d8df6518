"""Weights & Biases gets a run's values under the entity and project of its configuration."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from uhl_cli.compare.results import Costs, CurvePoint, DevPoint, RunMetrics
from uhl_cli.compare.sections import TrackingSection
from uhl_cli.compare.tracking import refuse_missing, report_run
from uhl_cli.errors import UsageError
from uhl_cli.metrics import score

METRICS = RunMetrics(
    run_id="x",
    method="lora",
    host="h",
    task="t",
    seed=0,
    config_digest="d",
    mode="full",
    score=score("accuracy", [1, 0], [1, 1], ("no", "yes")),
    published={"F1 Score": 0.5},
    costs=Costs(adapter_bytes=1, memory_mb=2.0, flops_percent=3.0),
    within_budget=True,
    training_seconds=1.0,
    curve=(CurvePoint(step=20, loss=1.0, accuracy=0.5), CurvePoint(step=40, loss=0.5, accuracy=0.7)),
    dev_curve=tuple(DevPoint(step=step, score=0.6, f1=0.6, accuracy=0.6) for step in (10, 20, 30)),
)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which keeps what it is given."""
    kept = SimpleNamespace(opened=[], rows=[], summary={}, finished=0)

    def finish():
        kept.finished += 1

    def init(**options):
        kept.opened.append(options)
        return SimpleNamespace(log=lambda row, step: kept.rows.append((step, row)), summary=kept.summary, finish=finish)

    module = SimpleNamespace(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return kept


def test_entity_project_and_values(wandb, tmp_path):
    report_run(TrackingSection(report_to="wandb", entity="team", project="mine"), METRICS, tmp_path)
    (opened,) = wandb.opened
    assert (opened["entity"], opened["project"], opened["name"], opened["mode"]) == ("team", "mine", "x", "offline")
    assert [step for step, _ in wandb.rows] == [10, 20, 30, 40]
    assert wandb.rows[1][1] == {"train/loss": 1.0, "train/accuracy": 0.5, "dev/score_in_training": 0.6}
    assert wandb.summary["dev/score"] == METRICS.score.value
    assert wandb.summary["published/F1 Score"] == 0.5
    assert wandb.summary["costs/memory_mb"] == 2.0
    assert wandb.finished == 1


def test_no_tracker_is_told_nothing(wandb, tmp_path):
    report_run(TrackingSection(), METRICS, tmp_path)
    assert wandb.opened == []
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refuse_missing("none")
    with pytest.raises(UsageError, match="reporting to wandb needs wandb"):
        refuse_missing("wandb")
