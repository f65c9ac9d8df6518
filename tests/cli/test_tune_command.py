"""`uhl tune`: what it writes where, that `port` takes it, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from command_runs import Called, call, port_arguments, pretrain_arguments

from uhl_cli.formats.task import read_task

WIDE = {"COLUMNS": "200"}


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
    assert call(*arguments, "--quiet").error.startswith("error: task.safetensors already exists.")
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
    shown = call(*arguments, "--output", "best.safetensors", "--optimise", "2", "--overwrite").out
    assert "held-out training examples" in shown


def label_free(adapter: Path, target: Path, *more: str) -> list[str]:
    """A run of three steps on the transfer set."""
    given = ["tune", str(adapter), "--target", str(target), "--steps", "3", "--batch-size", "4", "--max-flops", "1000"]
    return [*given, "--device", "cpu", "--offline", *more]


@pytest.mark.parametrize("parameters", ["delta-theta", "lora"])
def test_without_labels_no_data_is_read_and_port_takes_the_result(place, here, parameters):
    arguments = label_free(place.adapter, place.target, "--parameters", parameters, "--output", "out")
    shown = call(*arguments, env=WIDE)
    assert shown.code == 0, shown.err
    sizes = {
        "delta-theta": ("bytes of delta-theta", "bytes of the task file"),
        "lora": ("bytes of the LoRA", "bytes of the readout", "bytes of the file in the folder"),
    }
    for words in (*sizes[parameters], "agreement with the teacher, before", "agreement with the teacher, tuned"):
        assert words in shown.out
    for words in ({*sizes["delta-theta"], *sizes["lora"]} - {*sizes[parameters]}) | {"active atoms", "zero-shot"}:
        assert words not in shown.out
    assert "tuned by the transfer set, no labels" in shown.out
    # The line that says how to score it is a call that works.
    said = re.search(r"to score it: uhl (port .+) --data FILE", shown.out)
    more = ["--data", str(place.data), "--max-flops", "1000", "--device", "cpu", "--offline", "--json"]
    scores = json.loads(call(*shlex.split(said.group(1)), *more).out)["scores"]
    scored = call(*arguments, "--overwrite", "--score-data", str(place.data), "--json")
    report = json.loads(scored.out)
    assert report["scores"]["tuned"] == scores["ported"]
    assert set(report["scores"]) == {"zero_shot", "tuned", "majority_class"}
    again = call(*arguments, "--overwrite", "--score-data", str(place.data), env=WIDE)
    assert "before, zero-shot" in again.out
    assert "not scored" not in again.out
    quiet = call(*arguments, "--overwrite", "--quiet")
    assert (quiet.code, quiet.out) == (0, "out\n")
    # A few steps may end below the port, which is said with --quiet too.
    assert [line for line in quiet.err.splitlines() if not line.startswith("warning: out is worse than the port")] == []


def test_a_lora_with_labels(place, here):
    arguments = [*tune_arguments(place.adapter, place.target, place.data), "--parameters", "lora", "--rank", "2"]
    shown = call(*arguments, "--output", "out", env=WIDE)
    assert shown.code == 0, shown.err
    for words in ("a LoRA tuned by labels", "before, zero-shot", "bytes of the LoRA"):
        assert words in shown.out
    assert "agreement" not in shown.out
    other = call(*arguments, "--task", str(place.conll), "--output", "other", "--quiet")
    assert other.code != 0
    assert not Path("other").exists()


@pytest.mark.integration
def test_a_search_without_labels(place, here):
    pytest.importorskip("optuna")
    called = call(*label_free(place.adapter, place.target, "--output", "out", "--optimise", "2"))
    assert called.code == 0, called.err
    assert "search: agreement with the teacher on" in called.out
    assert "searching: 6/6" in called.err


def test_texts_that_the_target_cannot_read_are_counted(place, here, monkeypatch):
    def deaf(_host, texts, _pairs=None) -> list[bool]:
        return [index >= 3 for index in range(len(texts))]

    monkeypatch.setattr("uhl_cli.commands.agreement.takes_in", deaf)
    called = call(*label_free(place.adapter, place.target, "--output", "out"))
    assert called.code == 0, called.err
    warning = [line for line in called.err.splitlines() if line.startswith("warning: ")]
    assert len(warning) == 1
    assert "knows no token of them: 3." in warning[0]


@pytest.mark.parametrize(
    ("more", "words", "code"),
    [
        (("--rank", "4"), "--rank has no effect here", 2),
        (("--top-k", "1"), "--top-k has no effect here", 2),
        (("--active-weight", "0.5"), "--active-weight has no effect here", 2),
        (("--text-column", "x"), "--text-column has no effect here", 2),
        (("--parameters", "lora", "--top-k", "1"), "--top-k has no effect here", 2),
        (("--data", "d", "--score-data", "d"), "--score-data has no effect here", 2),
        (("--score-data", "nowhere/at/all"), "no file or folder", 1),
    ],
)
def test_what_has_no_effect_is_refused(more, words, code, place, here):
    called = call(*label_free(place.adapter, place.target, *more, "--output", "out", "--quiet"))
    assert called.code == code
    assert words in called.error
    assert list(here.iterdir()) == []


def test_a_file_without_a_transfer_set_says_what_to_do(place, here):
    made = call(*pretrain_arguments(place.host, place.data, "bare.safetensors"), "--transfer-set", "0", "--quiet")
    assert made.code == 0
    called = call(*label_free(Path("bare.safetensors"), place.target, "--quiet"))
    assert called.code == 1
    assert "no transfer set" in called.error
    assert "--task or --data" in called.error


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
