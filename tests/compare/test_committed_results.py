"""The committed comparisons say what their runs say, by the name of the metric that they compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recompute import differences, read

from uhl_cli.compare.aggregate import PRIMARY

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize(("name", "runs"), [("compare_builtin", 27), ("compare_local", 216)])
def test_committed_comparison_is_recomputed(name, runs):
    assert len(read(RESULTS / name)) == runs
    assert differences(RESULTS / name) == []


@pytest.mark.parametrize("name", ["compare_builtin", "compare_local"])
def test_the_primary_metric_has_one_name(name):
    said = json.loads((RESULTS / name / "comparison" / "aggregated_metrics.json").read_text())["primary_metric"]
    assert said == PRIMARY
    assert said == "Target-model dev score under 1 MB / 10 %-FLOP budget (report zero-shot and post-tune)."
