"""The committed comparisons say what their runs say."""

from __future__ import annotations

from pathlib import Path

import pytest
from recompute import differences, read

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize(("name", "runs"), [("compare_builtin", 27), ("compare_local", 216)])
def test_committed_comparison_is_recomputed(name, runs):
    assert len(read(RESULTS / name)) == runs
    assert differences(RESULTS / name) == []
