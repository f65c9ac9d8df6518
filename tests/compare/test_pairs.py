"""Paired tests over seeds: what is better, worse and open, by hand-made predictions."""

from __future__ import annotations

import numpy as np
import pytest

from uhl_cli.compare.aggregate import aggregate, counted
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.results import Costs, Predicted, RunFolder, RunMetrics
from uhl_cli.compare.tables import paired_markdown
from uhl_cli.metrics import score

EXAMPLES = 600
ONES = [1] * EXAMPLES
LEVELS = (("uhl-zero-shot", 0.80), ("lora", 0.84))


def write_run(results, method: str, seed: int, right: float) -> str:
    """A run whose predictions are right that often, by chance."""
    run_id = f"{method}--host--task--s{seed}"
    rng = np.random.default_rng((seed, round(1000 * right), len(method)))
    predictions = (rng.random(EXAMPLES) < right).astype(int).tolist()
    config = RunConfig.model_validate(
        {
            "run_id": run_id,
            "method": method,
            "host": {"name": "host"},
            "dataset": {"task": "task"},
            "adapter": {"file": "adapter.safetensors"},
        }
    )
    metrics = RunMetrics(
        run_id=run_id,
        method=method,
        host="host",
        task="task",
        seed=seed,
        config_digest=config.digest,
        mode="full",
        score=score("accuracy", predictions, ONES, ("no", "yes")),
        costs=Costs(adapter_bytes=1, memory_mb=0.0, flops_percent=0.0),
        within_budget=True,
        training_seconds=0.0,
    )
    predicted = Predicted(labels=("no", "yes"), metric="accuracy", predictions=predictions, references=ONES)
    RunFolder(results, run_id).write(config, metrics, predicted)
    return run_id


@pytest.fixture
def tests_of(tmp_path):
    """The paired tests of runs (method, seed, share right)."""

    def made(*runs):
        return aggregate(tmp_path, [write_run(tmp_path, *run) for run in runs]).tests

    return made


def test_better_worse_and_open(tests_of):
    shares = {"uhl-zero-shot": 0.80, "majority-class": 0.50, "lora": 0.92, "full": 0.80}
    found = tests_of(*((method, seed, share) for seed in (0, 1, 2) for method, share in shares.items()))
    assert {row.other: row.outcome for row in found.verdicts} == {
        "majority-class": "better",
        "lora": "worse",
        "full": "open",
    }
    assert all(row.seeds == (0, 1, 2) for row in found.verdicts)
    assert len(found.pairings) == 9
    assert counted(found.verdicts, "uhl-zero-shot", "baseline") == {"worse": 1, "open": 1}
    table = paired_markdown(found.verdicts)
    assert table.count(" better |") == table.count(" worse |") == 1
    assert "| uhl, zero-shot minus LoRA r8 | -0.1" in table


def test_seeds_that_only_one_of_them_has_do_not_count(tests_of):
    found = tests_of(("uhl-zero-shot", 0, 0.8), ("uhl-zero-shot", 1, 0.8), ("lora", 1, 0.9), ("full", 2, 0.9))
    assert [(row.other, row.seeds) for row in found.verdicts] == [("lora", (1,))]


def test_several_seeds_show_what_one_leaves_open(tests_of):
    few = tests_of(("uhl-zero-shot", 0, 0.80), ("lora", 0, 0.84))
    many = tests_of(*((method, seed, share) for seed in range(8) for method, share in LEVELS))
    assert [row.outcome for row in few.verdicts] == ["open"]
    assert [row.outcome for row in many.verdicts] == ["worse"]
    assert many.verdicts[0].difference.standard_error < 0.5 * few.verdicts[0].difference.standard_error


def test_the_tuned_stands_beside_the_ported_and_not_the_other_way_round(tests_of):
    found = tests_of(("uhl-zero-shot", 0, 0.7), ("uhl-tuned", 0, 0.9))
    assert [(row.proposed, row.other, row.outcome) for row in found.verdicts] == [
        ("uhl-tuned", "uhl-zero-shot", "better")
    ]


def test_many_comparisons_are_corrected_for(tests_of):
    levels = [(method, seed, share) for seed in (0, 1) for method, share in LEVELS]
    (alone,) = tests_of(*levels).verdicts
    assert alone.holm_p == alone.difference.p_value
    among = tests_of(*levels, *((method, seed, 0.8) for method in ("full", "sat-lora", "head-only") for seed in (0, 1)))
    rows = sorted(among.verdicts, key=lambda row: row.difference.p_value)
    assert rows[0].other == "lora"
    assert rows[0].difference == alone.difference
    assert rows[0].holm_p == pytest.approx(4 * alone.difference.p_value)
