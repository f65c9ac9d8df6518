"""The table of claims says what the committed runs say, and README and results.md say what the table says."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from claims import detailed, short
from recompute_claims import differences, row_differences

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
CLAIMS = json.loads((RESULTS / "claims.json").read_text())


@pytest.mark.integration
def test_the_claims_are_recomputed_by_other_means():
    assert differences(RESULTS) == []


def test_the_tables_of_readme_and_results_are_those_of_the_claims():
    assert short(CLAIMS) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert detailed(CLAIMS) in (ROOT / "uhl_cli" / "docs" / "results.md").read_text(encoding="utf-8")


def test_every_claim_is_there_with_its_losses():
    assert [claim["number"] for claim in CLAIMS] == [1, 2, 3]
    for claim in CLAIMS:
        said = [row["verdict"] for row in claim["rows"]]
        assert {word: said.count(word) for word in set(said)} == {
            word: sum(verdicts.get(word, 0) for verdicts in claim["verdicts"].values()) for word in set(said)
        }


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(verdict="true"),
        lambda row: row["difference"].update(value=0.0),
        lambda row: row["difference"].update(low=row["difference"]["low"] - 0.02),
        lambda row: row["scores"].reverse(),
        lambda row: row["runs"].reverse(),
        lambda row: [side.pop() for side in row["runs"]],
        lambda row: row.update(proposed="tuned with labels"),
    ],
    ids=["verdict", "difference", "interval", "scores", "sides", "a seed less", "name"],
)
def test_the_recomputation_notices_a_changed_row(change):
    row = copy.deepcopy(CLAIMS[1]["rows"][0])
    assert len(row["seeds"]) == 3
    assert row_differences(RESULTS, 2, -0.01, row) == []
    change(row)
    assert row_differences(RESULTS, 2, -0.01, row) != []


def test_the_recomputation_notices_a_row_less_and_another_margin(tmp_path):
    for folder in RESULTS.glob("compare_*"):
        (tmp_path / folder.name).symlink_to(folder)
    claim = copy.deepcopy(CLAIMS[1]) | {"margin": -0.5}
    claim["rows"] = claim["rows"][:1]
    claim["sizes"][0]["verdict"] = "true"
    (tmp_path / "sizes.json").symlink_to(RESULTS / "sizes.json")
    (tmp_path / "claims.json").write_text(json.dumps([claim]))
    found = differences(tmp_path)
    assert any("margin -0.5, is -0.01" in each for each in found)
    assert any(each.startswith("claim 2, sizes") for each in found)
    assert any("are missing, or are not of it" in each for each in found)
