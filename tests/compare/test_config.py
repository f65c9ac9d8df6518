"""Configurations: what is read, what is refused, and what the shipped sets stand for."""

from __future__ import annotations

from itertools import product

import pytest
import yaml

from uhl_cli.compare.config import RunConfig, load_configs, refuse_unknown_places, shipped_sets, trial
from uhl_cli.compare.experiment import CompareOptions, chosen_runs
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.resources import Resources
from uhl_cli.errors import UsageError
from uhl_cli.reports import silent

RUN = {
    "run_id": "one",
    "method": "lora",
    "host": {"name": "builtin:tiny"},
    "dataset": {"task": "reviews"},
    "training": {"steps": 7},
}
GRID = {
    "hosts": ["a", "b/c"],
    "datasets": {"sst2": {"seeds": [0, 3], "methods": {"lora": {"training": {"steps": 5}}}}, "boolq": {}},
    "methods": {"lora": {"training": {"steps": 9, "rank": 2}}, "full": {}},
    "defaults": {"training": {"batch_size": 4, "steps": 11}},
}


def write(folder, content):
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_one_run(tmp_path):
    (run,) = load_configs([write(tmp_path, RUN)])
    assert (run.run_id, run.training.steps, run.training.batch_size) == ("one", 7, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": "red"}, "colour"),
        ({"training": {"stepz": 7}}, "training.stepz"),
        ({"training": {"steps": 0}}, "training.steps"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"method": "uhl-tuned"}, "needs an adapter section"),
        ({"adapter": {"num_anchors": 64}}, "an adapter section needs either file or source"),
        ({"run_id": "../outside"}, "run_id"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path, change, said):
    with pytest.raises(UsageError) as caught:
        load_configs([write(tmp_path, RUN | change)])
    assert said in str(caught.value)


@pytest.mark.parametrize("content", ["", "- 1\n", "a: [", "!!python/object/apply:os.getcwd []\n"])
def test_what_is_no_configuration_is_refused(tmp_path, content):
    with pytest.raises(UsageError):
        load_configs([write(tmp_path, content)])


def test_a_set_that_is_not_there_names_those_that_are():
    with pytest.raises(UsageError, match=r"builtin, .*local, .*protocol, published"):
        load_configs(["nothing"])


def test_a_grid_is_every_method_on_every_host_data_set_and_seed(tmp_path):
    runs = {run.run_id: run for run in load_configs([write(tmp_path, {"grid": GRID})])}
    assert len(runs) == 2 * 2 * 3
    chosen = runs["lora--b-c--sst2--s3"]
    assert (chosen.host.name, chosen.seed, chosen.training.rank) == ("b/c", 3, 2)
    # The data set's word for a method goes before the method's own, that before the defaults.
    assert (chosen.training.steps, chosen.training.batch_size) == (5, 4)
    assert runs["lora--a--boolq--s0"].training.steps == 9
    assert runs["full--a--boolq--s0"].training.steps == 11


def test_two_different_runs_of_one_name_are_refused(tmp_path):
    first = write(tmp_path, RUN)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(RUN | {"method": "full"}))
    assert len(load_configs([first, first])) == 1
    with pytest.raises(UsageError, match="two runs are called one"):
        load_configs([first, str(other)])


def test_shipped_sets_hold_every_method_host_and_data_set():
    single = ["comparative-1-iter1-CoNLL-2003", "proposed-iter1-CoNLL-2003"]
    assert set(shipped_sets()) == {"builtin", "local", "protocol", "published", *single}
    hosts = {
        "local": {"minilm-l3", "wiki-256x4", "builtin:decoder", "builtin:base"},
        "published": {
            "bert-base-uncased",
            "distilbert-base-uncased",
            "bert-large-uncased",
            "huawei-noah/TinyBERT_General_4L_312D",
        },
    }
    for name, expected in hosts.items():
        found = {(run.method, run.host.name, run.dataset.task, run.seed) for run in load_configs([name])}
        data = [("sst2", 0), ("sst2", 1), ("sst2", 2), ("conll2003", 0), ("boolq", 0), ("amazon", 0)]
        assert found == {(method, host, *part) for method, host, part in product(METHODS, expected, data)}


def test_a_trial_of_a_whole_set_makes_every_method_once_a_host_and_data_set(tmp_path):
    whole = ("builtin", "local", "published")
    runs = chosen_runs(CompareOptions(configs=whole, results_dir=tmp_path, mode="trial"))
    places = {(run.host.name, run.dataset.task) for run in runs}
    assert len(places) == 2 * 4 * 4 + 3
    assert [(run.method, *place) for place in places for run in runs if (run.host.name, run.dataset.task) == place] == [
        (method, *place) for place in places for method in METHODS
    ]
    assert len({run.run_id for run in runs}) == len(runs)
    # One adapter a source and data set, whatever the number of targets and methods.
    resources = Resources(tmp_path, {}, device="cpu", offline=True, reporter=silent)
    assert len({resources.adapter_path(run) for run in runs}) == 2 * 4 + 1


def test_sat_lora_is_as_published():
    for run in load_configs(["published"]):
        if run.method == "sat-lora":
            training = run.training
            assert (training.rank, training.alpha, training.steps) == (8, 16, 3000)
            assert (training.learning_rate, training.warmup_steps, training.weight_decay) == (3e-4, 300, 0.01)


def test_every_trained_method_searches_as_many_rates():
    for name in ("builtin", "local", "protocol", "published"):
        sizes = {len(run.search.learning_rates) for run in load_configs([name]) if METHODS[run.method].trained}
        assert sizes == {3}


def test_trial_is_two_steps_and_nothing_else_differs():
    for run in load_configs(["local"])[:9]:
        small = trial(run)
        assert (small.run_id, small.method, small.host) == (run.run_id, run.method, run.host)
        assert (small.training.steps, small.dataset.limit_train, small.budget) == (2, 48, run.budget)
        assert isinstance(small, RunConfig)


def test_places_of_unknown_names_are_refused():
    runs = load_configs(["local"])
    refuse_unknown_places(runs, {"minilm-l6": "x", "minilm-l3": "y", "sst2": "z"})
    with pytest.raises(UsageError, match="minilm-l9"):
        refuse_unknown_places(runs, {"minilm-l9": "x"})


def test_digest_knows_all_but_the_name(tmp_path):
    (run,) = load_configs([write(tmp_path, RUN)])
    assert run.model_copy(update={"run_id": "two"}).digest == run.digest
    assert run.model_copy(update={"method": "full"}).digest != run.digest
