"""`uhl tune`: what it writes where, that `port` takes it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_runs import Called, call, port_arguments

from uhl_cli.formats.task import read_task


def tune_arguments(adapter: Path, target: Path, data: Path | str) -> list[str]:
    """A run of three steps."""
    given = ["tune", str(adapter), "--target", str(target), "--data", str(data), "--steps", "3", "--batch-size", "4"]
    return [*given, "--max-flops", "1000", "--device", "cpu", "--offline", "--learning-rate", "0.05"]


@pytest.mark.integration
def test_writes_a_task_file_that_port_takes(place, here):
    arguments = [*tune_arguments(place.adapter, place.target, place.data), "--output", "task.safetensors"]
    called = call(*arguments, "--json")
    assert called.code == 0
    report = json.loads(called.out)
    assert report["bytes"] == Path("task.safetensors").stat().st_size
    assert report["delta_bytes"] == 512
    ported = call(*port_arguments(place.adapter, place.target, place.data), "--task-file", "task.safetensors", "--json")
    scores = json.loads(ported.out)["scores"]
    assert scores["ported"] == report["scores"]["tuned"]
    plain = json.loads(call(*port_arguments(place.adapter, place.target, place.data), "--json").out)["scores"]
    assert plain["ported"] == report["scores"]["zero_shot"]
    assert call(*arguments, "--quiet").error.startswith("error: task.safetensors is there already.")
    assert call(*arguments, "--quiet", "--overwrite") == Called(0, "task.safetensors\n", "")


def test_goes_beside_the_adapter_and_says_what_it_did(place, here):
    adapter = here / "mine.safetensors"
    adapter.write_bytes(place.adapter.read_bytes())
    called = call(*tune_arguments(adapter, place.target, place.data))
    assert called.code == 0, called.err
    assert (here / "mine.sst2.target.task.safetensors").exists()
    for words in ("before, zero-shot", "tuned", "bytes of delta-theta", "512"):
        assert words in called.out
    assert read_task(here / "mine.sst2.target.task.safetensors").record.training.command.startswith("uhl tune mine.")


def test_another_task_has_a_readout_of_its_own(place, here):
    arguments = tune_arguments(place.adapter, place.target, place.conll)
    called = call(*arguments, "--task", place.conll, "--output", "task.safetensors", "--json")
    assert called.code == 0, called.err
    report = json.loads(called.out)
    assert (report["own_task"], report["readout_bytes"] > 0) == (False, True)
    assert "zero_shot" not in report["scores"]
    given = [*port_arguments(place.adapter, place.target, place.conll), "--task-file", "task.safetensors"]
    given += ["--task", str(place.conll)]
    given.remove("--data")
    given.remove(str(place.conll))
    scores = json.loads(call(*given, "--json").out)["scores"]
    assert scores["ported"] == report["scores"]["tuned"]
    assert "head_only" not in scores, "no such control was fitted for this task"
    assert call(*given).code == 0


@pytest.mark.integration
def test_fewer_atoms_and_a_search(place, here):
    arguments = tune_arguments(place.adapter, place.target, place.data)
    both = json.loads(call(*arguments, "--output", "two.safetensors", "--json").out)
    one = json.loads(call(*arguments, "--output", "one.safetensors", "--top-k", "1", "--json").out)
    assert one["atoms_per_token"] <= 1 < both["atoms_per_token"]
    assert "--top-k 1" in read_task(Path("one.safetensors")).record.training.command
    pytest.importorskip("optuna")
    called = call(*arguments, "--output", "best.safetensors", "--optimise", "2", "--json")
    search = json.loads(called.out)["search"]
    assert [trial["number"] for trial in search["trials"]] == [0, 1]
    assert "searching: 6/6" in called.err
    shown = call(*arguments, "--output", "best.safetensors", "--optimise", "2", "--resume").out
    assert "held-out training examples" in shown


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        (("--steps", "3", "--learning-rate", "nan"), "--learning-rate", 2),
        (("--top-k", "3"), "--top-k", 2),
        (("--data", "nowhere/at/all"), "no file or folder", 1),
        (("--target", "nowhere/at/all"), "no folder", 1),
        (("--max-flops", "1"), "--max-flops", 3),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(change, words, code, place, here):
    called = call(
        *tune_arguments(place.adapter, place.target, place.data), "--output", "task.safetensors", "--quiet", *change
    )
    assert called.code == code
    assert words in called.error
    assert list(here.iterdir()) == []


def test_damaged_files_are_refused(place, here):
    call(*tune_arguments(place.adapter, place.target, place.data), "--output", "task.safetensors", "--quiet")
    whole = Path("task.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-20])
    for name, words in (("cut.safetensors", "not a whole"), ("none", "no file"), (place.adapter, "not a uhl task")):
        called = call(
            *port_arguments(place.adapter, place.target, place.data), "--task-file", name, "--quiet", "--no-score"
        )
        assert called.code == 1
        assert words in called.error
    other = call(*port_arguments(place.tagger, place.target, place.conll), "--task-file", "task.safetensors", "--quiet")
    assert "another adapter" in other.error
