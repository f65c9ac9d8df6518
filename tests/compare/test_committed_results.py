"""The committed comparisons say what their runs say, by the name of the metric that they compare."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from recompute import differences, read

from uhl_cli.compare.aggregate import PRIMARY
from uhl_cli.compare.load import load_configs
from uhl_cli.compare.resources import Resources
from uhl_cli.compare.results import RunFolder
from uhl_cli.reports import silent

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LABEL_FREE = 95  # runs of three sets that could be compared in one call


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("compare_builtin", 27),
        ("compare_label_free", LABEL_FREE),
        ("compare_upwards-builtin-base", 16),
        ("compare_upwards-minilm-l3", 4),
        pytest.param("compare_local", 216, marks=pytest.mark.integration),
    ],
)
def test_committed_comparison_is_recomputed(name, runs):
    assert len(read(RESULTS / name)) == runs
    assert differences(RESULTS / name) == []


@pytest.mark.parametrize(
    ("sets", "name", "made"),
    [
        (["builtin"], "compare_builtin", 27),
        (["local"], "compare_local", 216),
        (["label-free", "protocol", "size-projectors"], "compare_label_free", LABEL_FREE),
        (["upwards-builtin-base"], "compare_upwards-builtin-base", 16),
        (["upwards-minilm-l3"], "compare_upwards-minilm-l3", 4),
    ],
)
def test_committed_runs_are_those_of_the_shipped_sets(sets, name, made):
    """So that `--compare-only` takes them; a setting that is gone since does not count, one that differs does."""
    found = [(run, RunFolder(RESULTS / name, run.run_id)) for run in load_configs(sets)]
    kept = [(run, folder) for run, folder in found if folder.metrics.exists()]
    assert len(kept) == made
    assert all(folder.read_config().digest == run.digest for run, folder in kept)
    run, folder = kept[0]
    assert folder.read_config().digest != run.model_copy(update={"method": "full"}).digest


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("builtin", "c13a6c38dc78d0f785218cc80e7039c6162abe4895af8a82636a8d4b732eb244"),
        ("local", "bc88bffb8c6bad1e8086edb0c3cfcdfcf173c430c4de7236a3945dcab1cac1da"),
    ],
)
def test_a_setting_that_came_later_and_is_not_set_changes_no_digest(name, digest):
    """The digests are those of before `schedule`, `eval_steps`, `optuna`, `tracking` and the task of pretraining."""
    folders = [RunFolder(RESULTS / f"compare_{name}", run.run_id) for run in load_configs([name])]
    kept = [(folder.path.name, folder.read_config().digest) for folder in folders if folder.metrics.exists()]
    assert hashlib.sha256(json.dumps(kept).encode()).hexdigest() == digest


def test_the_adapters_of_kept_runs_are_found_by_the_same_names(tmp_path):
    resources = Resources(tmp_path, {}, device="cpu", offline=True, reporter=silent)
    names = {resources.adapter_path(run).stem for name in ("builtin", "local") for run in load_configs([name])}
    builtin = {f"builtin-base--reviews--s{seed}--6591dacb" for seed in (0, 1, 2)}
    local = {f"minilm-l6--sst2--s{seed}--23bac664" for seed in (0, 1, 2)}
    local |= {"minilm-l6--amazon--s0--84b6d622", "minilm-l6--boolq--s0--d5455bcf", "minilm-l6--conll2003--s0--093dc239"}
    assert names == builtin | local


@pytest.mark.parametrize("name", ["compare_builtin", "compare_local"])
def test_the_primary_metric_has_one_name(name):
    said = json.loads((RESULTS / name / "comparison" / "aggregated_metrics.json").read_text())["primary_metric"]
    assert said == PRIMARY
    assert said == "Target-model dev score under 1 MB / 10 %-FLOP budget (report zero-shot and post-tune)."


def test_the_recomputation_notices_a_changed_file(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS / "compare_builtin", results)
    path = results / "comparison" / "aggregated_metrics.json"
    content = json.loads(path.read_text())
    content["gap"] += 0.5
    path.write_text(json.dumps(content))
    path = results / "comparison" / "groups.json"
    content = json.loads(path.read_text())
    row = next(row for row in content["verdicts"] if row["outcome"] == "open")
    row["outcome"] = "better"
    path.write_text(json.dumps(content))
    found = differences(results)
    assert len(found) == 2
    assert found[0].startswith("gap")
    assert found[1].startswith(f"{row['proposed']} beside {row['other']} on {row['host']}")


def test_the_recomputation_notices_what_the_published_names_say(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS / "compare_builtin", results)
    name = "lora--builtin-small--reviews--s0"
    path = results / name / "metrics.json"
    run = json.loads(path.read_text())
    costs, accuracy = run["costs"], run["score"]["value"]
    aggregated = json.loads((results / "comparison" / "aggregated_metrics.json").read_text())["metrics"]
    f1 = aggregated["F1 Score"][name]
    published = {"Memory overhead (MB)": costs["memory_mb"], "FLOP overhead (%)": costs["flops_percent"]}
    published |= {"F1 Score": f1, "Accuracy": accuracy}
    trials = [{"values": {"rank": rank}, "score": rank / 10} for rank in (1, 3, 2)]
    right = run | {"f1": f1, "accuracy": accuracy, "published": published}
    right["search"] = run["search"] | {"trials": trials, "best": 1}
    path.write_text(json.dumps(right))
    assert differences(results) == []
    wrong = {
        "F1": {"f1": f1 + 0.01},
        "accuracy": {"accuracy": accuracy - 0.01},
        "FLOP overhead (%)": {"published": published | {"FLOP overhead (%)": 0.0}},
        "Active atoms per token": {"published": published | {"Active atoms per token": 1.0}},
        "best trial": {"search": right["search"] | {"best": 2}},
    }
    for said, change in wrong.items():
        path.write_text(json.dumps(right | change))
        (found,) = differences(results)
        assert found.startswith(f"{name} {said}: ")
    path.write_text(json.dumps(right))
    path = results / "comparison" / "groups.json"
    content = json.loads(path.read_text())
    content["groups"][0]["f1"] += 0.01
    path.write_text(json.dumps(content))
    (found,) = differences(results)
    assert found.startswith(f"f1 of {content['groups'][0]['method']}")
