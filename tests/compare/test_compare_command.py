"""`uhl compare` through its entry point: a shipped set in trial mode, what it leaves, and what goes wrong."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import yaml
from command_runs import call
from compare_runs import at, write_data_sets, write_hosts
from recompute import differences, read

from uhl_cli.compare import resources, runs
from uhl_cli.compare.baselines import Retrained
from uhl_cli.compare.load import load_configs
from uhl_cli.compare.resources import Resources
from uhl_cli.files import claimed
from uhl_cli.formats.task import read_task
from uhl_cli.reports import silent

TINY = {
    "hosts": ["small"],
    "datasets": {"sst2": {}},
    "defaults": {"adapter": {"source": {"name": "source"}}},
    "methods": {name: {"training": {"steps": 2}} for name in ("uhl-zero-shot", "uhl-tuned", "lora", "majority-class")},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, data):
    """A small grid with figures: (folder, arguments of the call, its results)."""
    folder = tmp_path_factory.mktemp("tiny")
    hosts = write_hosts(folder / "hosts", {"source": "bert", "small": "bert"})
    (folder / "grid.yaml").write_text(yaml.safe_dump({"grid": TINY}))
    arguments = ["compare", "--config", folder / "grid.yaml", "--mode", "trial", "--device", "cpu", "--offline"]
    arguments += at(hosts | {"sst2": data["sst2"]})
    called = call(*arguments, "--results-dir", folder / "results")
    assert called.code == 0, called.err
    return folder, arguments, folder / "results", called


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.integration
def test_files_of_a_run_and_of_the_comparison(tiny):
    _, _, results, called = tiny
    assert "uhl, zero-shot" in called.out
    name = "lora--small--sst2--s0"
    assert {path.name for path in (results / name).iterdir()} == {
        "config.json",
        "metrics.json",
        "predictions.json",
        f"{name}_learning_curve.pdf",
        f"{name}_confusion_matrix.pdf",
    }
    assert {path.name for path in (results / "uhl-tuned--small--sst2--s0").iterdir()} == {
        "config.json",
        "metrics.json",
        "predictions.json",
        "tuned.task.safetensors",
        "uhl-tuned--small--sst2--s0_learning_curve.pdf",
        "uhl-tuned--small--sst2--s0_confusion_matrix.pdf",
    }
    assert {path.name for path in (results / "comparison").iterdir()} == {
        "aggregated_metrics.json",
        "comparison.csv",
        "comparison.md",
        "comparison.tex",
        "groups.json",
        "comparison_accuracy_bar_chart.pdf",
        "comparison_score_vs_bytes.pdf",
        "comparison_learning_curves.pdf",
        "comparison_seeds_box_plot.pdf",
    }
    for path in results.rglob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF")
    header, *rows = csv.reader((results / "comparison" / "comparison.csv").read_text().splitlines())
    assert len(rows) == 4
    assert all(len(row) == len(header) for row in rows)
    latex = (results / "comparison" / "comparison.tex").read_text()
    assert latex.count(r"\\") == 5


@pytest.mark.integration
def test_an_adapter_leaves_room_for_its_task_file(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(resources, "run_pretrain", lambda options, _reporter: asked.append(options))
    run = next(run for run in load_configs(["builtin"]) if run.method == "uhl-tuned")
    Resources(tmp_path, {}, device="cpu", offline=True, reporter=silent)._adapter_file(run)
    room = run.budget.max_bytes - asked[0].max_bytes
    _, _, results, _ = tiny
    assert 0 < (results / "uhl-tuned--small--sst2--s0" / "tuned.task.safetensors").stat().st_size <= room


@pytest.mark.integration
def test_finished_runs_are_kept_or_refused(tiny):
    folder, arguments, results, _ = tiny
    refused = call(*arguments, "--results-dir", results)
    assert refused.code == 1
    assert "already exists" in refused.error
    before = {path: path.stat().st_mtime_ns for path in results.glob("*/metrics.json")}
    shutil.rmtree(results / "lora--small--sst2--s0")
    resumed = call(*arguments, "--results-dir", results, "--resume", "--json", "--no-figures")
    assert resumed.code == 0
    report = json.loads(resumed.out)
    assert report["made"] == ["lora--small--sst2--s0"]
    assert len(report["skipped"]) == 3
    after = {path: path.stat().st_mtime_ns for path in results.glob("*/metrics.json")}
    assert {path for path in before if before[path] != after[path]} == {results / "lora--small--sst2--s0/metrics.json"}
    changed = yaml.safe_dump({"grid": TINY | {"defaults": {**TINY["defaults"], "budget": {"max_bytes": 5}}}})
    (folder / "other.yaml").write_text(changed)
    arguments = [folder / "other.yaml" if part == folder / "grid.yaml" else part for part in arguments]
    other = call(*arguments, "--results-dir", results, "--resume")
    assert other.code == 1
    assert "another configuration" in other.error


@pytest.mark.integration
def test_comparing_alone_makes_no_run(tiny, tmp_path):
    _, arguments, results, _ = tiny
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    shutil.rmtree(copy / "lora--small--sst2--s0")
    called = call(*arguments, "--results-dir", copy, "--compare-only", "--json", "--no-figures")
    assert called.code == 0
    report = json.loads(called.out)
    assert (report["made"], report["missing"]) == ([], ["lora--small--sst2--s0"])
    assert len(report["skipped"]) == 3
    assert {row["other"] for row in report["verdicts"]} == {"majority-class", "uhl-zero-shot"}
    assert not (copy / "lora--small--sst2--s0").exists()
    assert differences(copy) == []
    table = (copy / "comparison" / "comparison.md").read_text()
    assert "uhl, after tuning minus uhl, zero-shot" in table
    assert "1 missing" in call(*arguments, "--results-dir", copy, "--compare-only", "--no-figures").out


@pytest.mark.integration
def test_timing_alone_changes_the_wall_clock_and_nothing_else(tiny, tmp_path):
    _, arguments, results, _ = tiny
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    before = read(copy)
    for name, run in before.items():
        path = copy / name / "metrics.json"
        metrics = json.loads(path.read_text())
        if run["costs"]["wall_clock_percent"] is not None:
            metrics["costs"]["wall_clock_percent"] = 1e9
        path.write_text(json.dumps(metrics | {"timed_on": "another machine"}))
    called = call(*arguments, "--results-dir", copy, "--time-only", "--json", "--no-figures")
    assert called.code == 0, called.err
    report = json.loads(called.out)
    assert report["made"] == []
    assert {name.split("--")[0] for name in report["timed"]} == {"uhl-zero-shot", "uhl-tuned", "lora"}
    for name, run in read(copy).items():
        assert run["timed_on"] == ("cpu" if name in report["timed"] else "another machine")
        if name in report["timed"]:
            assert run["costs"]["wall_clock_percent"] < 1e6
        for part in (run, before[name]):
            part["timed_on"] = part["costs"]["wall_clock_percent"] = None
        assert run == before[name]
    assert "3 timed again" in call(*arguments, "--results-dir", copy, "--time-only", "--no-figures").out


@pytest.mark.integration
def test_timing_a_run_without_its_adapter_fails_by_name(tiny, tmp_path):
    _, arguments, results, _ = tiny
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    (copy / "adapters").rename(tmp_path / "elsewhere")
    again = (*arguments, "--results-dir", copy, "--time-only", "--no-figures", "--method", "uhl-tuned")
    called = call(*again)
    assert called.code == 1
    assert "1 of 1 runs failed, first uhl-tuned--small--sst2--s0" in called.err
    assert "no longer exists" in called.err
    assert "then continue with --time-only" in called.err
    assert not (copy / "adapters").exists()  # and nothing was pretrained in its place
    assert "Traceback" in (copy / "uhl-tuned--small--sst2--s0" / "error.txt").read_text()
    (tmp_path / "elsewhere").rename(copy / "adapters")
    assert call(*again).code == 0
    assert not (copy / "uhl-tuned--small--sst2--s0" / "error.txt").exists()


@pytest.mark.integration
@pytest.mark.parametrize("flag", ["--compare-only", "--time-only"])
@pytest.mark.parametrize(("extra", "said"), [([], "none of these runs is finished"), (["--overwrite"], "makes no run")])
def test_nothing_to_compare_is_an_error(tiny, tmp_path, flag, extra, said):
    _, arguments, _, _ = tiny
    called = call(*arguments, "--results-dir", tmp_path / "none", flag, *extra)
    assert called.code == 2
    assert said in called.error
    assert not (tmp_path / "none").exists()


@pytest.mark.integration
def test_overwriting_makes_all_anew(tiny, tmp_path):
    _, arguments, results, _ = tiny
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    (copy / "majority-class--small--sst2--s0" / "left-over").write_text("x")
    called = call(*arguments, "--results-dir", copy, "--overwrite", "--json", "--no-figures")
    assert called.code == 0
    assert len(json.loads(called.out)["made"]) == 4
    assert not (copy / "majority-class--small--sst2--s0" / "left-over").exists()
    for name in ("lora", "uhl-tuned"):  # the same seed gives the same run
        path = f"{name}--small--sst2--s0/predictions.json"
        assert (copy / path).read_text() == (results / path).read_text()


def test_where_every_run_failed_no_comparison_is_named(here, data):
    arguments = ["compare", "--config", "size-projectors", "--mode", "trial", "--host", "builtin:decoder", "--offline"]
    arguments += [*at({"minilm-l6": "nowhere", "sst2": data["sst2"]}), "--device", "cpu"]
    called = call(*arguments)
    assert (called.code, called.out.strip()) == (1, "0 runs made, 0 kept, 1 failed")
    assert "nowhere" in called.err
    assert "--at NAME=PATH" in called.err
    assert not (here / "results" / "comparison").exists()
    assert call(*arguments, "--quiet").out == ""


@pytest.mark.integration
def test_one_failed_run_loses_no_other(tiny, tmp_path):
    _, arguments, _, _ = tiny
    bad = {"run_id": "bad", "method": "lora", "host": {"name": str(tmp_path / "none")}, "dataset": {"task": "sst2"}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    called = call(
        *arguments, "--config", tmp_path / "bad.yaml", "--method", "lora", "--results-dir", tmp_path / "r", "--json"
    )
    assert called.code == 1
    report = json.loads(called.out)
    assert [row["run_id"] for row in report["failed"]] == ["bad"]
    assert report["made"] == ["lora--small--sst2--s0"]
    assert "1 of 2 runs failed, first bad" in called.err.splitlines()[-1]
    assert "Traceback" in (tmp_path / "r" / "bad" / "error.txt").read_text()
    assert "Traceback" not in called.err


def test_a_run_that_another_process_is_doing_is_left_alone(tmp_path):
    run = {"run_id": "one", "method": "lora", "host": {"name": str(tmp_path / "none")}, "dataset": {"task": "sst2"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    arguments = ["compare", "--config", tmp_path / "run.yaml", "--mode", "trial", "--results-dir", tmp_path / "r"]
    with claimed(tmp_path / "r" / "one"):
        called = call(*arguments)
        assert called.code == 1
        said = called.err.splitlines()[-1]
        assert "another run is writing" in said
        assert "choose another --results-dir" in said
        assert not (tmp_path / "r" / "one").exists()
    assert call(*arguments).code == 1  # it fails by itself, and says so in its folder
    assert (tmp_path / "r" / "one" / "error.txt").exists()


def test_results_in_a_file_are_refused_by_the_option(here):
    (here / "file").write_text("x")
    called = call("compare", "--config", "builtin", "--results-dir", "file")
    assert called.code == 1
    assert "cannot write to file/comparison. Choose another --results-dir" in called.error


@pytest.mark.integration
def test_an_adapter_of_another_task_is_refused_by_name(tiny, data, tmp_path):
    _, _, results, _ = tiny
    (adapter,) = (results / "adapters").glob("*.safetensors")
    run = {"run_id": "one", "method": "uhl-zero-shot", "host": {"name": "builtin:tiny"}}
    run |= {"adapter": {"file": str(adapter)}, "dataset": {"task": "conll2003"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    arguments = ["compare", "--config", tmp_path / "run.yaml", "--results-dir", tmp_path / "r", "--mode", "trial"]
    called = call(*arguments, *at({"conll2003": data["conll2003"]}), "--json")
    assert called.code == 1
    assert "does not know the labels of conll2003" in called.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "nothing"], "configuration nothing not found"),
        (["--config", "local", "--at", "minilm-l3"], "not of the form NAME=PATH"),
        (["--config", "local", "--at", "sst2=a", "--at", "sst2=b"], "--at has the name sst2 twice"),
        (["--config", "builtin", "--resume", "--overwrite"], "--resume keeps finished runs, and --overwrite replaces"),
        (["--config", "builtin", "--compare-only", "--time-only"], "--compare-only measures nothing"),
        (["--config", "local", "--at", "x=y"], "no run has a host or data set 'x'"),
        (["--config", "local", "--method", "magic"], "no run has the method 'magic'"),
        (["--config", "local", "--seed", "9"], "no run has the seed 9"),
    ],
)
def test_wrong_calls(here, arguments, said):
    called = call("compare", *arguments)
    assert called.code == 2
    assert said in called.error
    assert list(here.iterdir()) == []


def test_list_makes_nothing(here):
    called = call("compare", "--config", "published", "--list", "--task", "sst2", "--method", "lora", "--seed", "1")
    assert called.code == 0
    assert called.out.splitlines()[0] == "lora--bert-base-uncased--sst2--s1"
    assert len(called.out.splitlines()) == 4
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A small grid in full mode: an adapter of SST-2 tuned on words, and LoRA; searches by optuna, dev scores."""
    folder = tmp_path_factory.mktemp("whole")
    hosts = write_hosts(folder / "hosts", {"source": "bert", "small": "bert"})
    limits = {"limit_train": 48, "limit_evaluation": 24}
    adapter = {"source": {"name": "source"}, "task": "sst2", "dataset": limits, "num_anchors": 128}
    adapter |= {"feature_words": 0, "transfer_set": "8", "pretraining": {"max_steps": 2, "max_length": 32}}
    training = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "max_length": 32, "schedule": "linear", "eval_steps": 2}
    rates = {"learning_rate": {"low": 0.001, "high": 0.1}}
    spaces = {
        "uhl-tuned-new-task": rates | {"top_k": [1, 2], "lambda_F": [0.01, 0.1]},
        "lora": rates | {"rank": {"low": 2, "high": 4}},
    }
    grid = {
        "hosts": ["small"],
        "datasets": {"conll2003": {}},
        "defaults": {
            "adapter": adapter,
            "dataset": limits,
            "training": training,
            "evaluation": {"timing_repetitions": 0},
        },
        "methods": {name: {"optuna": {"n_trials": 2, "search_space": space}} for name, space in spaces.items()},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({"grid": grid}))
    places = hosts | {name: data[name] for name in ("sst2", "conll2003")}
    arguments = ["compare", "--config", folder / "grid.yaml", "--device", "cpu", "--offline", *at(places)]
    called = call(*arguments, "--results-dir", folder / "results", "--report-to", "tensorboard")
    assert called.code == 0, called.err
    return arguments, folder / "results", grid


@pytest.mark.integration
def test_a_damaged_file_of_searches_hinders_only_searches(tiny, whole, tmp_path):
    arguments, results, _ = whole
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    (copy / "searches.json").write_text("{")
    compared = call(*arguments, "--results-dir", copy, "--compare-only", "--no-figures")
    assert compared.code == 0, compared.err
    _, plain, _, _ = tiny  # its runs search nothing
    made = call(*plain, "--method", "lora", "--results-dir", copy, "--no-figures")
    assert made.code == 0, made.err
    shutil.rmtree(copy / LORA)
    refused = call(*arguments, "--results-dir", copy, "--resume", "--no-figures")
    assert refused.code == 1
    assert "searches.json holds no searches" in refused.error
    assert not (copy / LORA).exists()


TUNED, LORA = "uhl-tuned-new-task--small--conll2003--s0--from-sst2", "lora--small--conll2003--s0"


@pytest.mark.integration
def test_searches_by_optuna_and_dev_scores_are_recorded(whole):
    _, results, _ = whole
    assert differences(results) == []
    runs = read(results)
    assert set(runs) == {TUNED, LORA}
    for name, settings in ((TUNED, {"learning_rate", "top_k", "lambda_F"}), (LORA, {"learning_rate", "rank"})):
        run = runs[name]
        assert [point["step"] for point in run["dev_curve"]] == [2, 4]
        assert run["dev_curve"][-1]["f1"] == run["dev_curve"][-1]["score"]  # of entities
        search = run["search"]
        assert [set(trial["values"]) for trial in search["trials"]] == [settings] * 2
        assert search["rate"] == search["trials"][search["best"]]["values"]["learning_rate"]
        assert list((results / name).glob("*.uhl-run")) == []
        assert (run["f1_metric"], run["f1"]) == ("entity_f1", run["score"]["value"])
        assert (results / name / f"{name}_learning_curve.pdf").exists()
    assert runs[TUNED]["zero_shot"] is None
    assert len(list((results / "adapters").glob("source--sst2--s0--*.safetensors"))) == 1
    assert not list((results / "adapters").glob("*conll2003*"))


@pytest.mark.integration
def test_what_a_search_chose_is_what_is_trained(whole):
    _, results, _ = whole
    search = read(results)[TUNED]["search"]
    record = read_task(results / TUNED / "tuned.task.safetensors").record
    values = search["trials"][search["best"]]["values"]
    config = record.training.config
    assert (config.learning_rate, config.active_weight) == (values["learning_rate"], values["lambda_F"])
    assert (record.config.top_k, config.schedule, record.task.name) == (values["top_k"], "linear", "conll2003")


@pytest.mark.integration
def test_scoring_in_training_changes_no_run(whole, tmp_path):
    arguments, results, grid = whole
    grid = json.loads(json.dumps(grid))
    grid["defaults"]["training"].pop("eval_steps")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"grid": grid}))
    shutil.copytree(results / "adapters", tmp_path / "results" / "adapters")
    changed = [tmp_path / "grid.yaml" if str(part).endswith("grid.yaml") else part for part in arguments]
    called = call(*changed, "--results-dir", tmp_path / "results", "--no-figures")
    assert called.code == 0, called.err
    for name in (TUNED, LORA):
        path = f"{name}/predictions.json"
        assert (tmp_path / "results" / path).read_text() == (results / path).read_text()
        assert json.loads((tmp_path / "results" / name / "metrics.json").read_text())["dev_curve"] == []


@pytest.mark.integration
def test_the_time_of_what_a_search_chose_is_measured_again(whole, tmp_path, monkeypatch):
    arguments, results, _ = whole
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    chosen = {}
    for name in (TUNED, LORA):
        path = copy / name / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["costs"]["wall_clock_percent"] = 1e9
        search = metrics["search"]
        search["best"] = 1 - search["best"]  # the other trial than the one that was made
        chosen[name] = search["trials"][search["best"]]["values"]
        path.write_text(json.dumps(metrics))
    made = []

    def retrained(method, host, labels, training):
        made.append(training.rank)
        return Retrained(method, host, labels, training)

    monkeypatch.setattr(runs, "Retrained", retrained)
    called = call(*arguments, "--results-dir", copy, "--time-only", "--json", "--no-figures")
    assert called.code == 0, called.err
    assert sorted(json.loads(called.out)["timed"]) == sorted([TUNED, LORA])
    assert made == [chosen[LORA]["rank"]]
    for name in (TUNED, LORA):  # no repetitions are asked for
        assert json.loads((copy / name / "metrics.json").read_text())["costs"]["wall_clock_percent"] is None


@pytest.mark.integration
def test_nothing_is_reported_in_trial_mode_whatever_is_asked(tiny, tmp_path):
    _, arguments, _, _ = tiny
    called = call(
        *arguments, "--method", "majority-class", "--results-dir", tmp_path, "--no-figures", "--report-to", "wandb"
    )
    assert called.code == 0, called.err
    assert not (tmp_path / "tracking").exists()


@pytest.mark.integration
def test_tensorboard_gets_what_the_files_hold(whole):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, results, _ = whole
    events = event_accumulator.EventAccumulator(str(results / "tracking" / LORA)).Reload()
    metrics = json.loads((results / LORA / "metrics.json").read_text())
    dev = events.Scalars("dev/score_in_training")
    assert [event.step for event in dev] == [point["step"] for point in metrics["dev_curve"]]
    assert events.Scalars("published/F1 Score")[0].value == pytest.approx(metrics["f1"])
    assert events.Scalars("dev/score")[0].value == pytest.approx(metrics["score"]["value"])
    assert [event.step for event in events.Scalars("train/loss")] == [point["step"] for point in metrics["curve"]]


@pytest.mark.integration
def test_a_file_is_tuned_by_the_method_of_its_task(tiny, data, tmp_path):
    folder, _, results, _ = tiny
    (file,) = (results / "adapters").glob("*.safetensors")
    grid = {
        "hosts": ["small"],
        "datasets": {"sst2": {}, "amazon": {}},
        "defaults": {"adapter": {"file": str(file)}},
        "methods": {"uhl-tuned": {}, "uhl-tuned-new-task": {}},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"grid": grid}))
    arguments = ["compare", "--config", tmp_path / "grid.yaml", "--mode", "trial", "--device", "cpu", "--offline"]
    arguments += ["--no-figures", "--json", "--results-dir", tmp_path / "results"]
    arguments += at({"small": str(folder / "hosts" / "small")} | {name: data[name] for name in ("sst2", "amazon")})
    called = call(*arguments)
    own, new = "uhl-tuned--small--sst2--s0", "uhl-tuned-new-task--small--amazon--s0"
    report = json.loads(called.out)
    assert (called.code, sorted(report["made"])) == (1, sorted([own, new]))
    said = {each["run_id"]: each["error"] for each in report["failed"]}
    assert set(said) == {"uhl-tuned-new-task--small--sst2--s0", "uhl-tuned--small--amazon--s0"}
    assert "Use uhl-tuned," in said["uhl-tuned-new-task--small--sst2--s0"]
    assert "Use uhl-tuned-new-task," in said["uhl-tuned--small--amazon--s0"]
    made = read(tmp_path / "results")
    assert (made[own]["zero_shot"] is None, made[new]["zero_shot"] is None) == (False, True)
    timed = call(*arguments, "--time-only")
    assert sorted(json.loads(timed.out)["timed"]) == sorted([own, new]), timed.err
