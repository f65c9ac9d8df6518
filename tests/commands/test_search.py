"""A search for hyper-parameters reads what is tuned by alone, goes on where it was cut off, and widens its ranges."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from tiny_hosts import tiny_host
from toy_runs import TINY_LIMIT, make_adapter, sequence_data, token_data

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, TuneOptions, TuneTraining, tuning_defaults
from uhl_cli.commands.search import RANGES, optimise, widened
from uhl_cli.commands.tune import tune
from uhl_cli.commands.tune_student import distillation_data
from uhl_cli.errors import DataError, TrainingError, UsageError
from uhl_cli.formats.task import read_task
from uhl_cli.reports import SearchReport, Trial
from uhl_cli.train.run_files import RunFiles

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("search") / "adapter.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path, max_steps=30)
    return path


@pytest.fixture(scope="module")
def speaking(tmp_path_factory) -> Path:
    """A file with a transfer set."""
    path = tmp_path_factory.mktemp("search") / "speaking.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path, max_steps=30, transfer_set="auto")
    return path


def options_for(adapter: Path, data, trials: int, **changes) -> TuneOptions:
    training = {"max_steps": 4, "batch_size": 8} | {
        name: changes.pop(name) for name in list(changes) if name in ("seed", "learning_rate")
    }
    return TuneOptions(
        adapter=adapter,
        target=HostOptions(name="tiny", device="cpu"),
        data=DataOptions(task=None if data is None else data.task.name),
        training=TuneTraining(**training),
        max_flops=TINY_LIMIT,
        optimise=trials,
        **changes,
    )


def search(
    adapter: Path, data, trials: int, *, files=None, reporter=None, **changes
) -> tuple[TuneOptions, SearchReport]:
    options = options_for(adapter, data, trials, **changes)
    more = {} if reporter is None else {"reporter": reporter}
    host = tiny_host("distilbert", hidden_size=40)
    loaded = UniversalAdapter.load(adapter)
    return optimise(loaded, host, data, options, accelerator=Accelerator(cpu=True), files=files, **more)


def test_the_first_trial_is_the_options_and_the_best_one_is_taken(adapter, tmp_path):
    data = sequence_data()
    chosen, report = search(adapter, replace(data, evaluation=None), 5)
    first, best = report.trials[0], report.trials[report.best]
    assert [trial.number for trial in report.trials] == list(range(5))
    assert first.learning_rate == tuning_defaults().learning_rate
    assert first.top_k == 2
    assert best.score == max(trial.score for trial in report.trials)
    assert (chosen.training.learning_rate, chosen.top_k, chosen.optimise) == (best.learning_rate, best.top_k, 0)
    assert len({trial.learning_rate for trial in report.trials}) == 5
    for trial in report.trials[1:]:
        for name, (low, high) in report.ranges.items():
            assert low <= getattr(trial, name) <= high
    assert report.held_out == round(0.2 * len(data.train))
    output = tmp_path / "task.safetensors"
    final = chosen.model_copy(update={"output": output})
    tune(UniversalAdapter.load(adapter), tiny_host("distilbert"), data, final, accelerator=Accelerator(cpu=True))
    record = read_task(output).record
    assert record.training.config.learning_rate == best.learning_rate
    assert record.config.top_k == best.top_k
    if best.number:
        assert f"--learning-rate {best.learning_rate}" in record.training.command
    assert "optimise" not in record.training.command


@pytest.mark.integration
def test_a_new_task_searches_the_rate_of_its_readout_too(adapter):
    _, own = search(adapter, sequence_data(), 2)
    _, new = search(adapter, token_data(), 2)
    assert own.trials[1].readout_learning_rate is None
    assert new.trials[0].readout_learning_rate == tuning_defaults().readout_learning_rate
    assert 3e-4 <= new.trials[1].readout_learning_rate <= 3e-2


@pytest.mark.integration
def test_a_search_that_is_cut_off_goes_on_with_the_same_trials(adapter, tmp_path):
    class Stop(Exception):
        pass

    def stop(label: str, done: int, total: int, note: str = "") -> None:
        if "trial 5" in note:
            raise Stop

    _, whole = search(adapter, sequence_data(), 7)
    files = RunFiles(tmp_path / "run")
    with pytest.raises(Stop):
        search(adapter, sequence_data(), 7, files=files, reporter=stop)
    kept = json.loads(files.search.read_text())["trials"]
    assert len(kept) == 4
    _, resumed = search(adapter, sequence_data(), 7, files=files, resume=True)
    assert resumed == whole
    _, other = search(adapter, sequence_data(), 7, seed=3)
    assert other.trials[1:] != whole.trials[1:]


@pytest.mark.integration
def test_trials_of_other_settings_are_refused(adapter, tmp_path):
    files = RunFiles(tmp_path / "run")
    search(adapter, sequence_data(), 1, files=files)
    with pytest.raises(TrainingError, match="other settings"):
        search(adapter, sequence_data(), 2, files=files, resume=True, learning_rate=0.03)
    files.search.write_text("{")
    with pytest.raises(TrainingError, match="no trials"):
        search(adapter, sequence_data(), 2, files=files, resume=True)
    _, anew = search(adapter, sequence_data(), 2, files=files)  # without --resume the old ones are replaced
    assert len(anew.trials) == 2


@pytest.mark.parametrize(
    ("parameters", "labelled", "searched"),
    [
        ("delta-theta", False, {"learning_rate": 0.02}),
        ("lora", False, {"learning_rate": 1.5e-3, "readout_learning_rate": 5e-4}),
        ("lora", True, {"learning_rate": 1.5e-3, "readout_learning_rate": 5e-4}),
    ],
)
def test_a_student_is_searched_without_reading_what_it_is_scored_on(parameters, labelled, searched, speaking):
    data = replace(sequence_data(), evaluation=None) if labelled else None
    chosen, report = search(speaking, data, 3, parameters=parameters)
    assert report.ranges.keys() == searched.keys()
    for trial in report.trials:
        assert set(trial.model_dump(exclude_none=True)) - {"number", "score"} == searched.keys()
    assert {name: getattr(report.trials[0], name) for name in searched} == searched
    assert len({trial.learning_rate for trial in report.trials}) == 3
    best = report.trials[report.best]
    for name in searched:
        assert getattr(chosen.training, name) == getattr(best, name)
    assert (chosen.top_k, chosen.optimise) == (None, 0)
    distillation = distillation_data(UniversalAdapter.load(speaking).transfer_set())
    texts = len(sequence_data().train) if labelled else len(set(distillation.owners))
    assert report.held_out >= round(0.2 * texts)
    assert (report.held_out == round(0.2 * texts)) == labelled  # a text is held out with its spans


@pytest.mark.integration
def test_a_students_search_that_is_cut_off_goes_on_with_the_same_trials(speaking, tmp_path):
    class Stop(Exception):
        pass

    def stop(label: str, done: int, total: int, note: str = "") -> None:
        if "trial 3" in note:
            raise Stop

    _, whole = search(speaking, None, 4)
    files = RunFiles(tmp_path / "run")
    with pytest.raises(Stop):
        search(speaking, None, 4, files=files, reporter=stop)
    assert len(json.loads(files.search.read_text())["trials"]) == 2
    _, resumed = search(speaking, None, 4, files=files, resume=True)
    assert resumed == whole
    for changes in ({"learning_rate": 0.03}, {"parameters": "lora"}):
        with pytest.raises(TrainingError, match="other settings"):
            search(speaking, None, 5, files=files, resume=True, **changes)


def test_a_range_moves_out_where_the_best_lies_on_its_edge():
    def trial(number: int, rate: float, score: float) -> Trial:
        return Trial(number=number, learning_rate=rate, active_weight=0.03, delta_weight=1e-5, top_k=2, score=score)

    ranges = dict(RANGES)
    assert ranges["learning_rate"] == (1e-3, 0.5)
    middle = [trial(number, 0.02, 0.5) for number in range(6)]
    assert widened(ranges, middle) == ranges
    edge = [*middle[:4], trial(4, 0.0011, 0.6)]
    assert widened(ranges, edge)["learning_rate"] == (1e-4, 0.5)
    assert widened(ranges, edge)["active_weight"] == ranges["active_weight"]
    assert widened(ranges, [*middle[:4], trial(4, 0.0011, 0.4)]) == ranges  # on the edge, but not the best
    assert widened(ranges, [trial(0, 0.0011, 0.6)]) == ranges  # one trial says nothing
    assert widened(ranges, [*middle[:4], trial(4, 0.49, 0.6)])["learning_rate"] == (1e-3, 1.0)  # rates end at 1


def test_what_cannot_be_searched_is_said(adapter, monkeypatch):
    small = sequence_data()
    few = replace(small, train=small.train.select(range(9)))
    with pytest.raises(DataError, match="too few"):
        search(adapter, few, 2)
    with pytest.raises(DataError, match="no transfer set"):
        search(adapter, None, 2)
    thin = adapter.with_name("thin.safetensors")
    make_adapter(tiny_host("bert"), small, thin, top_k=1)
    with pytest.raises(UsageError, match="active atom"):
        search(thin, small, 2, top_k=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"uhl\[optimise\]"):
        search(adapter, small, 2)
