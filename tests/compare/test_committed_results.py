"""The committed comparison says what its runs say."""

from __future__ import annotations

from pathlib import Path

from recompute import differences, read

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "compare_builtin"


def test_committed_comparison_is_recomputed():
    assert len(read(RESULTS)) == 27
    assert differences(RESULTS) == []
