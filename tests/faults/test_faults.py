"""A small seeded part of the campaigns, whose summaries are beside them, and what the campaigns would find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kills import torn
from runs import RUNS

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks of a process that has imported everything")
def test_a_part_of_the_campaigns():
    command = [sys.executable, str(HERE / "part.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    summaries = json.loads(done.stdout)
    assert {name: summary["problems"] for name, summary in summaries.items()} == {"kills": [], "disk": []}, done.stderr
    # The control: every command was killed, some at a moment and some at an operation, and some fault was an error.
    killed, faults = summaries["kills"]["counts"], summaries["disk"]["counts"]
    assert all(found["kills"] >= 1 for found in killed.values()), killed
    assert 0 < sum(found["by time"] for found in killed.values()) < sum(found["kills"] for found in killed.values())
    assert any(kind.endswith(": an error") for found in faults.values() for kind in found), faults


@pytest.mark.parametrize("name", ["kills.json", "disk.json"])
def test_the_summary_states_no_problem(name):
    assert json.loads((HERE / name).read_text())["problems"] == []


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"out": b"whole", "out.uhl-run": None, "out.uhl-run/log.jsonl": b""}, None),
        ({".out.abc.uhl-tmp": None, ".out.abc.uhl-tmp/new": b"wh", ".out.uhl-lock": b""}, None),
        ({"out": b"who"}, "a torn output"),
        ({"tmpabc": b""}, "tmpabc is not documented"),
    ],
)
def test_what_is_found_after_a_kill(found, problem):
    run = RUNS[0].__class__("run", (), "out")
    assert torn(run, found, {"out": b"whole"}) == ([] if problem is None else [problem])
