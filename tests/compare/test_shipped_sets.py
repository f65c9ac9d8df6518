"""Every YAML file of the shipped sets is validated, and run in trial mode on small data sets and its first host.

A set's hosts differ in nothing but their place, where small ones stand for them all.
"""

from __future__ import annotations

import json

import pytest
from command_runs import call
from compare_runs import at, write_data_sets, write_hosts
from recompute import differences, read

from uhl_cli.compare import resources
from uhl_cli.compare.config import trial
from uhl_cli.compare.experiment import CompareOptions, chosen_runs
from uhl_cli.compare.load import load_configs, shipped_sets
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.resources import Resources
from uhl_cli.reports import silent

TASKS = {"sst2", "conll2003", "boolq", "amazon"}  # single texts, tokens, and pairs
OURS = {"score", "zero_shot", "after_tuning", "training_seconds", "adapter_bytes", "memory_mb", "flops_percent"}
OURS |= {"atoms_per_token", "wall_clock_percent"}
PUBLISHED = {"Memory overhead (MB)", "FLOP overhead (%)", "Active atoms per token", "F1 Score", "Accuracy"}


# Sets whose runs can be compared with each other: the others have other settings of the same methods.
TOGETHER = (
    ("builtin", "local", "protocol", "published", "size-projectors"),
    ("label-free",),
    ("upwards-builtin-base",),
    ("upwards-minilm-l3",),
    ("proposed-iter1-CoNLL-2003", "comparative-1-iter1-CoNLL-2003"),
)


def first_hosts(names):
    """The first host of each of the sets."""
    return sorted({load_configs([name])[0].host.name for name in names})


def chosen(names, results):
    return chosen_runs(CompareOptions(configs=names, results_dir=results, mode="trial", hosts=first_hosts(names)))


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """All runs of all sets, two steps each: [(names, results, report)]."""
    folder = tmp_path_factory.mktemp("trials")
    hosts = write_hosts(folder / "hosts", {"source": "bert", "target": "bert"})
    data = write_data_sets(folder / "data")
    runs = [run for name in shipped_sets() for run in load_configs([name])]
    sources = {run.adapter.source.name for run in runs if run.adapter is not None}
    places = {run.host.name: hosts["target"] for run in runs} | dict.fromkeys(sources, hosts["source"])
    places |= data  # the data of `reviews` ships with the package
    made = []
    for names in TOGETHER:
        runs, results = load_configs(names), folder / names[0]
        known = {run.host.name for run in runs} | {run.dataset.task for run in runs}
        known |= {run.adapter.source.name for run in runs if run.adapter is not None}
        known |= {run.pretraining_data.task for run in runs}
        called = call(
            "compare",
            "--resume",
            *(word for name in names for word in ("--config", name)),
            *(word for name in first_hosts(names) for word in ("--host", name)),
            *("--mode", "trial", "--no-figures", "--device", "cpu", "--offline", "--json", "--results-dir", results),
            *at({name: place for name, place in places.items() if name in known}),
        )
        assert called.code == 0, called.err
        made.append((names, results, json.loads(called.out)))
    return made


@pytest.mark.integration
@pytest.mark.slow
def test_every_run_of_every_set_is_made(trials):
    assert sorted(name for names, _, _ in trials for name in names) == shipped_sets()
    for names, results, report in trials:
        expected = chosen(names, results)
        assert report["failed"] == []
        assert sorted(report["made"] + report["skipped"]) == sorted(run.run_id for run in expected)
        assert report["skipped"] == []
        runs = read(results)
        for run in expected:  # with the values of its configuration in trial mode
            assert runs[run.run_id]["config_digest"] == run.digest
        # Every method on every data set of every file is there, with its first seed.
        for name in names:
            first = [run for run in load_configs([name]) if run.seed in (0, 42)]
            assert {run.run_id for run in first if run.host.name == first[0].host.name} <= set(runs)
            assert {(run.method, run.dataset.task) for run in first} == {
                (run.method, run.dataset.task) for run in first if run.run_id in runs
            }
    found = {(run["method"], run["task"]) for run in read(trials[0][1]).values()}
    everywhere = {(run.method, task) for run in load_configs(["local"]) for task in TASKS}
    assert found >= everywhere | {("uhl-tuned-new-task", task) for task in TASKS - {"sst2"}}


@pytest.mark.integration
@pytest.mark.slow
def test_one_adapter_a_source_pretraining_task_and_seed_is_made(trials):
    made = [
        sorted(path.name.rsplit("--", 1)[0] for path in (results / "adapters").glob("*.safetensors"))
        for _, results, _ in trials
    ]
    whole = {f"{source}--{task}--s0" for source in ("minilm-l6", "bert-base-uncased") for task in TASKS}
    # The protocol's file of SST-2 is one more, with settings of its own.
    assert made == [
        sorted([*whole, "builtin-base--reviews--s0", "minilm-l6--sst2--s0"]),
        [f"minilm-l6--{task}--s0" for task in ("amazon", "conll2003", "sst2")],
        ["builtin-base--reviews--s0", "builtin-base--sst2--s0"],
        ["minilm-l3--sst2--s0"],
        ["bert-base-uncased--sst2--s42"],
    ]


@pytest.mark.integration
@pytest.mark.slow
def test_the_comparison_says_what_the_runs_say(trials):
    assert [differences(results) for _, results, _ in trials] == [[]] * len(trials)


@pytest.mark.integration
@pytest.mark.slow
def test_every_metric_is_there(trials):
    runs, searched = {}, set()
    for names, results, report in trials:
        metrics = report["aggregated"]["metrics"]
        mine = read(results)
        assert set(metrics["F1 Score"]) == set(metrics["Accuracy"]) == set(mine)
        runs |= {(str(results), name): run for name, run in mine.items()}
        expected = chosen(names, results)  # a search by optuna is left out
        searched |= {(str(results), run.run_id) for run in expected if run.search.learning_rates}
    metrics = trials[0][2]["aggregated"]["metrics"]
    assert set(metrics) == OURS | PUBLISHED
    for name, other in (("Memory overhead (MB)", "memory_mb"), ("FLOP overhead (%)", "flops_percent")):
        assert metrics[name] == metrics[other]
    for (results, name), run in runs.items():
        method, trained = METHODS[run["method"]], METHODS[run["method"]].trained
        assert bool(run["curve"]) == trained
        assert (run["training_seconds"] > 0) == trained
        assert (run["search"] is not None) == (method.searches and (results, name) in searched)
        assert [point["step"] for point in run["dev_curve"]] == ([1, 2] if "-iter1-" in name else [])
        before = run["method"] == "uhl-tuned" or (method.kind == "distilled" and run["method"] != "lora-from-source")
        assert (run["zero_shot"] is not None) == before
        if run["method"] == "uhl-export":  # it replaces its host
            assert run["costs"]["flops_percent"] == 0
        assert (run["source"] is not None) == (method.kind != "retrained")
        assert run["device"] == "cpu"
        assert (run["timed_on"] is None) == (run["costs"]["wall_clock_percent"] is None)


def pretrained(runs, folder, monkeypatch):
    """(source, task, seed) of every pretraining that the runs need, in that order; nothing is trained."""
    made = []

    def pretrain(options, _reporter):
        made.append((options.host.name, options.data.task, options.training.seed))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.touch()

    monkeypatch.setattr(resources, "run_pretrain", pretrain)
    shared = Resources(folder, {}, device="cpu", offline=True, reporter=silent)
    for run in runs:
        if METHODS[run.method].kind == "tuned":
            shared._adapter_file(run)
    return made


@pytest.mark.parametrize("mode", ["full", "trial"])
def test_the_protocol_pretrains_once(tmp_path, monkeypatch, mode):
    runs = load_configs(["protocol"])
    runs = [trial(run) for run in runs] if mode == "trial" else runs
    assert len({run.group for run in runs if run.method == "uhl-tuned-new-task"}) == 4 * 3
    assert pretrained(runs, tmp_path, monkeypatch) == [("minilm-l6", "sst2", 0)]


def test_without_a_task_every_data_set_is_pretrained_on(tmp_path, monkeypatch):
    alone = [
        run.model_copy(update={"adapter": run.adapter.model_copy(update={"task": None})})
        for run in load_configs(["protocol"])
    ]
    made = pretrained(alone, tmp_path, monkeypatch)
    assert sorted(made) == sorted(("minilm-l6", task, 0) for task in TASKS - {"sst2"})


def test_the_protocol_shares_all_but_the_tuning_with_the_local_set():
    local = {run.run_id: run.digest for run in load_configs(["local"])}
    for run in load_configs(["protocol"]):
        other = run.method == "uhl-tuned-new-task"
        assert (run.run_id in local) != other
        assert other or run.digest == local[run.run_id]
        assert run.run_id.endswith("--from-sst2") == other


def test_the_published_runs_have_the_published_values():
    (proposed,) = load_configs(["proposed-iter1-CoNLL-2003"])
    training = proposed.training
    assert (proposed.run_id, proposed.method) == ("proposed-iter1-CoNLL-2003", "uhl-tuned-new-task")
    assert (proposed.host.name, proposed.dataset.task) == ("distilbert-base-uncased", "conll2003")
    assert (proposed.adapter.source.name, proposed.adapter.task) == ("bert-base-uncased", "sst2")
    assert (training.steps, training.learning_rate, training.warmup_steps) == (500, 2e-4, 50)
    assert (training.schedule, training.lambda_F, training.lambda_Q) == ("linear", 0.05, 1e-5)
    assert (training.seed, training.mixed_precision, training.max_length) == (42, "bf16", 128)
    assert proposed.optuna.n_trials == 25
    ranges = {"learning_rate": (1e-5, 5e-4), "lambda_F": (0.01, 0.1), "lambda_Q": (1e-6, 1e-4)}
    assert proposed.optuna.space() == (ranges, {"top_k": (1, 2)})
    tuning = proposed.tuning()
    assert (tuning.active_weight, tuning.delta_weight, tuning.schedule) == (0.05, 1e-5, "linear")
    assert (tuning.max_steps, tuning.warmup_fraction, tuning.mixed_precision) == (500, 0.1, "bf16")
    (other,) = load_configs(["comparative-1-iter1-CoNLL-2003"])
    training = other.training
    assert (other.run_id, other.method) == ("comparative-1-iter1-CoNLL-2003", "sat-lora")
    assert (training.rank, training.alpha, training.steps) == (8, 16, 3000)
    assert (training.learning_rate, training.warmup_steps, training.weight_decay) == (3e-4, 300, 0.01)
    assert other.optuna.n_trials == 25
    assert other.optuna.space() == ({"learning_rate": (1e-5, 1e-3), "rank": (4, 16)}, {"batch_size": (16, 32, 64)})
    assert {type(end) for end in other.optuna.space()[0]["rank"]} == {int}


def test_the_published_set_limits_amazon_and_nothing_else():
    for run in load_configs(["published"]):
        limits = (run.dataset.limit_train, run.dataset.limit_evaluation)
        assert limits == ((100_000, 10_000) if run.dataset.task == "amazon" else (None, None))
