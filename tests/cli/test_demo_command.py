"""`uhl demo` and bare `uhl pretrain`, on what ships, from an empty home without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_runs import call, start

from uhl_cli.adapter.store import read_adapter
from uhl_cli.cli.render_demo import versus
from uhl_cli.metrics import Difference

# A hundredth of the work: the numbers mean nothing, the way is the same.
SHORT = ["--source", "builtin:tiny", "--target", "builtin:small", "--epochs", "0.1", "--tune-steps", "2"]


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


@pytest.mark.slow
def test_from_an_empty_home_to_a_closing_table(here):
    called = start("demo", *SHORT, cwd=here, env={"HOME": str(here / "home"), "COLUMNS": "160"})
    assert called.code == 0, called.err
    for words in (
        "1. trained an adapter on builtin:tiny (2 layers x 128)",
        "2. carried the file to builtin:small (4 layers x 192): no label, no gradient",
        "3. tuned 512 bytes of it there, 2 steps with labels",
        "linear head",
        "--align size",
        "seconds in all",
    ):
        assert words in called.out
    assert "Traceback" not in called.err
    assert "tuning: 2/2" in called.err
    assert [path.name for path in here.iterdir() if path.name != "home"] == [], "without --output nothing is kept"


@pytest.mark.slow
def test_json_agrees_with_the_files_that_are_kept(here):
    called = call("demo", *SHORT, "--output", "kept", "--json")
    assert called.code == 0, called.err
    report = json.loads(called.out)
    path = Path("kept/demo.safetensors")
    assert report["port"]["bytes"] == path.stat().st_size <= 1_000_000
    assert read_adapter(path).manifest.score.value == report["pretrain"]["score"]["value"]
    assert report["port"]["flops"]["percent"] <= 10
    assert set(report["port"]["scores"]) >= {"ported", "untouched", "random_update", "head_only", "size"}
    assert Path(report["tune"]["output"]).exists()
    assert report["tune"]["scores"]["zero_shot"] == report["port"]["scores"]["ported"]
    again = call("demo", *SHORT, "--output", "kept", "--quiet")
    assert again.code == 1
    assert "there already" in again.error


@pytest.mark.slow
def test_bare_pretrain_uses_what_ships(here):
    called = call("pretrain", "--max-steps", "1", "--limit-evaluation", "20", "--limit-train", "200", "--quiet")
    assert (called.code, called.out) == (0, "adapter.safetensors\n"), called.err
    manifest = read_adapter(Path("adapter.safetensors")).manifest
    assert (manifest.source.name, manifest.task.name) == ("builtin:base", "reviews")
