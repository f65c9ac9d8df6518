"""`uhl demo` on what ships, from an empty home without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_runs import call, start

from uhl_cli.cli.demo import CONTROLS, versus
from uhl_cli.errors import OutputError
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.metrics import Difference
from uhl_cli.reports import DemoReport

# A hundredth of the work: the numbers mean nothing, the way is the same.
SHORT = ["--source", "builtin:tiny", "--target", "builtin:tiny", "--epochs", "0.1", "--tune-steps", "2"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.05, 0.02, 0.08), "better by 0.050 [0.020, 0.080] than"),
        ((-0.05, -0.08, -0.02), "worse by 0.050 [0.020, 0.080] than"),
        ((0.01, -0.02, 0.04), "within the interval (+0.010 [-0.020, 0.040]) of"),
    ],
)
def test_a_difference_is_one_only_outside_its_interval(values, words):
    value, low, high = values
    difference = Difference(metric="accuracy", value=value, low=low, high=high, examples=10)
    assert versus(difference) == words


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A demo from an empty home in a process of its own: (its folder, what the command left behind)."""
    folder = tmp_path_factory.mktemp("demo")
    # As a user has it: what the port aligns, tuning takes from the cache.
    env = {"HOME": str(folder / "home"), "UHL_CACHE": str(folder / "cache")}
    called = start("demo", *SHORT, "--output", "kept", "--json", cwd=folder, env=env)
    assert called.code == 0, called.err
    return folder, called


@pytest.mark.slow
def test_json_agrees_with_the_files_that_are_kept(kept, monkeypatch):
    folder, called = kept
    monkeypatch.chdir(folder)
    assert "Traceback" not in called.err
    assert "tuning: 2/2" in called.err
    report = json.loads(called.out)
    path = Path("kept/demo.safetensors")
    assert report["port"]["bytes"] == path.stat().st_size <= 1_000_000
    assert read_adapter(path).manifest.score.value == report["pretrain"]["score"]["value"]
    assert report["port"]["flops"]["percent"] <= 10
    assert set(report["port"]["scores"]) >= {"ported", "majority_class", "random_update", "head_only", "size"}
    assert Path(report["tune"]["output"]).exists()
    assert report["tune"]["scores"]["zero_shot"] == report["port"]["scores"]["ported"]
    again = call("demo", *SHORT, "--output", "kept", "--quiet")
    assert again.code == 1
    assert "already exists" in again.error


@pytest.mark.slow
def test_the_closing_table_says_what_happened(kept, here, monkeypatch):
    report = DemoReport.model_validate_json(kept[1].out)
    monkeypatch.setattr("uhl_cli.commands.demo.run_demo", lambda *_: report)
    called = call("demo", *SHORT, env={"COLUMNS": "160"})
    assert called.code == 0, called.err
    for words in (
        "1. trained an adapter on builtin:tiny (2 layers x 128)",
        "2. ported the file to builtin:tiny (2 layers x 128): no label, no gradient",
        "3. tuned a LoRA there without labels, 2 steps on the texts in the file",
        "linear head",
        "--align size",
        "seconds in all",
    ):
        assert words in called.out
    shown = [report.port.scores[name] for name in ("ported", *CONTROLS)]
    for score in (report.pretrain.score, *shown, report.tune.scores["tuned"]):
        assert f"{score.value:.3f}" in called.out


def test_without_output_nothing_is_kept(here, monkeypatch):
    written = []

    def stopped(options, reporter):
        options.output.write_bytes(b"an adapter")
        written.append(options.output)
        raise OutputError("stopped here.", "Go on.")

    monkeypatch.setattr("uhl_cli.commands.demo.run_pretrain", stopped)
    called = call("demo", *SHORT, "--quiet")
    assert (called.code, called.error) == (1, "error: stopped here. Go on.")
    assert [path.name for path in written] == ["demo.safetensors"]
    assert not written[0].parent.exists()
    assert list(here.iterdir()) == []
