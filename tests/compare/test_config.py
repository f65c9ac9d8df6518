"""Configurations: what is read, what is refused, and what the shipped sets stand for."""

from __future__ import annotations

import json
from itertools import product

import pytest
import yaml

from uhl_cli.commands.options import TuneTraining
from uhl_cli.compare.config import RESERVED, RunConfig, dotless, trial
from uhl_cli.compare.experiment import CompareOptions, chosen_runs, tracking_of
from uhl_cli.compare.load import load_configs, refuse_unknown_places, shipped_sets
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.resources import Resources
from uhl_cli.compare.results import RunFolder
from uhl_cli.compare.sections import DatasetSection, TrackingSection
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
        ({"host": {"name": " "}}, "host.name must not be empty"),
        ({"adapter": {"source": {"name": ""}}}, "adapter.source.name must not be empty"),
        ({"training": {"steps": True}}, "training.steps is true or false, and must be a number"),
        ({"training": {"top_k": True}}, "training.top_k is true or false, and must be a number"),
        ({"dataset": {"task": "reviews", "limit_train": True}}, "dataset.limit_train is true or false"),
        ({"search": {"learning_rates": [0.1, True]}}, "search.learning_rates is true or false"),
        (
            {"adapter": {"source": {"name": "s"}, "pretraining": {"max_steps": False}}},
            "adapter.pretraining.max_steps is true or false",
        ),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"training": {"schedule": "stairs"}}, "training.schedule"),
        ({"adapter": {"file": "x.safetensors", "task": "sst2"}}, "a file has its own"),
        ({"adapter": {"source": {"name": "s"}, "dataset": {"config": "x"}}}, "which must be named beside it"),
        (
            {"method": "uhl-zero-shot", "adapter": {"source": {"name": "s"}, "task": "sst2"}},
            "one: uhl-zero-shot is not defined on reviews for an adapter that is pretrained on sst2",
        ),
        ({"method": "head-only", "adapter": {"source": {"name": "s"}, "task": "sst2"}}, "use uhl-tuned-new-task"),
        (
            {"method": "uhl-tuned", "adapter": {"source": {"name": "s"}, "task": "conll2003"}},
            "is tuned by uhl-tuned-new-task",
        ),
        ({"method": "uhl-tuned-new-task", "adapter": {"source": {"name": "s"}}}, "is tuned by uhl-tuned"),
        ({"optuna": {"search_space": {}}}, "optuna.search_space"),
        ({"optuna": {"search_space": {"rank": {"low": 8, "high": 4}}}}, "low must be below high"),
        *(
            (
                {"optuna": {"search_space": {"rank": part}}},
                "optuna.search_space.rank: it must be a list of numbers, or {low: NUMBER, high: NUMBER}. Fix",
            )
            for part in ([], [True, 4], ["a", "b"], [4, None], 4, "4", None, {"low": True, "high": 4})
        ),
        ({"optuna": {"search_space": {"rank": {"low": 4}}}}, "optuna.search_space.rank.range.high: Field required"),
        ({"optuna": {"search_space": {"rank": [4.5]}}}, "optuna.search_space.rank"),
        ({"optuna": {"search_space": {"lambda_F": [0.1]}}}, "method lora has no lambda_F to search"),
        ({"optuna": {"search_space": {"alpha": [1.0]}}}, "optuna.search_space"),
        (
            {"optuna": {"search_space": {"rank": [4]}}, "search": {"learning_rates": [0.1]}},
            "search and optuna both choose",
        ),
        (
            {
                "method": "majority-class",
                "adapter": {"file": "x"},
                "optuna": {"search_space": {"learning_rate": [0.1]}},
            },
            "it has none",
        ),
    ],
)
def test_wrong_configurations_are_refused(tmp_path, change, said):
    with pytest.raises(UsageError) as caught:
        load_configs([write(tmp_path, RUN | change)])
    assert said in str(caught.value)


def test_a_search_space_has_ranges_and_choices(tmp_path):
    space = "optuna: {search_space: {learning_rate: [1e-3, 0.01], rank: {low: 4, high: 8}, batch_size: [16]}}\n"
    (run,) = load_configs([write(tmp_path, yaml.safe_dump(RUN) + space)])  # YAML reads 1e-3 as a string
    assert run.optuna is not None
    assert run.optuna.space() == ({"rank": (4, 8)}, {"learning_rate": (0.001, 0.01), "batch_size": (16,)})


@pytest.mark.parametrize("content", ["", "- 1\n", "a: [", "!!python/object/apply:os.getcwd []\n"])
def test_what_is_no_configuration_is_refused(tmp_path, content):
    with pytest.raises(UsageError):
        load_configs([write(tmp_path, content)])


def test_switches_are_booleans_all_the_same(tmp_path):
    adapter = {"source": {"name": "s", "offline": True}, "pretraining": {"updates": False}}
    (run,) = load_configs([write(tmp_path, RUN | {"adapter": adapter})])
    assert run.adapter is not None
    assert run.adapter.source is not None
    assert (run.adapter.source.offline, run.adapter.pretraining.updates) == (True, False)


def test_a_doubled_key_is_refused_by_name_and_line(tmp_path):
    plain = yaml.safe_dump(RUN)
    line = plain.count("\n") + 1
    with pytest.raises(UsageError, match=f"the key 'method' in line {line} stands there twice. Leave out"):
        load_configs([write(tmp_path, plain + "method: full\n")])
    # One key in two mappings, and a merge over an own key, are none.
    merged = "grid:\n  hosts: [a]\n  datasets: {sst2: {}}\n  defaults: {search: &few {steps: 9, held_out: 3}}\n"
    merged += "  methods: {full: {search: {}}, lora: {search: {<<: *few, steps: 8}}}\n"
    runs = {run.method: run.search for run in load_configs([write(tmp_path, merged)])}
    assert (runs["full"].steps, runs["lora"].steps, runs["lora"].held_out) == (9, 8, 3)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"training": "fast"}, "training must be a section"),
        ({"training": {"seed": 7}}, "training.seed is set by the grid"),
        ({"run_id": "zzz"}, "run_id is set by the grid"),
        ({"method": "full"}, "method is set by the grid"),
        ({"host": {"name": "b"}}, "host.name is set by the grid"),
        ({"dataset": {"task": "boolq"}}, "dataset.task is set by the grid"),
    ],
)
def test_what_a_grid_would_drop_is_refused(tmp_path, part, said):
    def load(defaults, dataset, method, special):
        grid = {"hosts": ["a"], "datasets": {"sst2": dataset | {"methods": {"lora": special}}}}
        return load_configs([write(tmp_path, {"grid": grid | {"methods": {"lora": method}, "defaults": defaults}})])

    used = {"training": {"steps": 3}, "host": {"dtype": "bfloat16"}, "dataset": {"limit_train": 5}}
    (run,) = load(used, {}, {}, {})
    assert (run.training.steps, run.host.dtype, run.dataset.limit_train) == (3, "bfloat16", 5)
    places = ("defaults", "datasets.sst2", "methods.lora", "datasets.sst2.methods.lora")
    for index, place in enumerate(places):
        with pytest.raises(UsageError) as caught:
            load(*(part if each == index else {} for each in range(4)))
        assert f"{place}.{said}" in str(caught.value)


def test_a_seed_is_no_boolean(tmp_path):
    for seeds in ([True], {"a": [True]}, True):
        grid = {"hosts": ["a"], "datasets": {"sst2": {"seeds": seeds}}, "methods": {"lora": {}}}
        with pytest.raises(UsageError, match="seeds"):
            load_configs([write(tmp_path, {"grid": grid})])


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


def test_a_grid_has_seeds_by_host_and_leaves_out_methods_that_are_null(tmp_path):
    grid = {
        "hosts": ["a", "b"],
        "datasets": {"sst2": {"seeds": {"a": [0, 3], "default": [1]}}, "boolq": {"methods": {"full": None}}},
        "methods": {"lora": {}, "full": {}},
    }
    runs = load_configs([write(tmp_path, {"grid": grid})])
    sst2 = {(run.host.name, run.method, run.seed) for run in runs if run.dataset.task == "sst2"}
    assert sst2 == {
        (host, method, seed) for host, seed in (("a", 0), ("a", 3), ("b", 1)) for method in ("lora", "full")
    }
    assert {run.method for run in runs if run.dataset.task == "boolq"} == {"lora"}
    grid["datasets"]["sst2"]["seeds"] = {"c": [0], "default": [1]}
    with pytest.raises(UsageError, match="the seeds of sst2 name 'c'"):
        load_configs([write(tmp_path, {"grid": grid})])


def test_a_label_ends_the_names_of_ported_runs_and_changes_nothing_else(tmp_path):
    grid = {
        "hosts": ["a"],
        "datasets": {"sst2": {}},
        "methods": {"lora": {}, "uhl-zero-shot": {}},
        "defaults": {"adapter": {"source": {"name": "s"}, "seed": 0}},
    }
    plain = load_configs([write(tmp_path, {"grid": grid})])
    grid["defaults"]["adapter"]["label"] = "own"
    labelled = load_configs([write(tmp_path, {"grid": grid})])
    assert [run.run_id for run in labelled] == ["lora--a--sst2--s0", "uhl-zero-shot--a--sst2--s0--own"]
    assert [run.digest for run in labelled] == [run.digest for run in plain]


def test_two_different_runs_of_one_name_are_refused(tmp_path):
    first = write(tmp_path, RUN)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(RUN | {"method": "full"}))
    assert len(load_configs([first, first])) == 1
    with pytest.raises(UsageError, match="two runs are called one"):
        load_configs([first, str(other)])


# In the order of the table of methods.
WHOLE_SETS = ("uhl-zero-shot", "uhl-tuned", "sat-lora", "lora", "full")
WHOLE_SETS += ("majority-class", "random-update", "head-only", "size-only")


def test_shipped_sets_hold_every_method_host_and_data_set():
    single = ["comparative-1-iter1-CoNLL-2003", "proposed-iter1-CoNLL-2003"]
    others = ["label-free", "size-projectors", "upwards-builtin-base", "upwards-minilm-l3"]
    assert set(shipped_sets()) == {"builtin", "local", "protocol", "published", *single, *others}
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
        assert found == {(method, host, *part) for method, host, part in product(WHOLE_SETS, expected, data)}
    # No seed, no run: of the label-free set two data sets are for two of its hosts.
    places = {(run.dataset.task, run.host.name) for run in load_configs(["label-free"])}
    assert places == {
        *(("sst2", host) for host in hosts["local"]),
        *product(("conll2003", "amazon"), ("minilm-l3", "wiki-256x4")),
    }


def test_a_trial_of_a_whole_set_makes_every_method_once_a_host_and_data_set(tmp_path):
    whole = ("builtin", "local", "published")
    runs = chosen_runs(CompareOptions(configs=whole, results_dir=tmp_path, mode="trial"))
    places = {(run.host.name, run.dataset.task) for run in runs}
    assert len(places) == 2 * 4 * 4 + 3
    assert [(run.method, *place) for place in places for run in runs if (run.host.name, run.dataset.task) == place] == [
        (method, *place) for place in places for method in WHOLE_SETS
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


def test_digest_knows_all_but_the_name_and_where_it_is_reported(tmp_path):
    (run,) = load_configs([write(tmp_path, RUN)])
    assert run.model_copy(update={"run_id": "two"}).digest == run.digest
    assert run.model_copy(update={"tracking": TrackingSection(report_to="wandb")}).digest == run.digest
    assert run.model_copy(update={"method": "full"}).digest != run.digest
    for name, value in {"schedule": "linear", "eval_steps": 5, "lambda_F": 0.05, "lambda_Q": 0.1, "top_k": 1}.items():
        changed = run.model_copy(update={"training": run.training.model_copy(update={name: value})})
        assert changed.digest != run.digest


def tuned_from(task, own="boolq", **adapter):
    method = "uhl-tuned" if task in (None, own) else "uhl-tuned-new-task"
    return RunConfig.model_validate(
        {"run_id": "x", "method": method, "host": {"name": "h"}, "dataset": {"task": own}}
        | {"adapter": {"source": {"name": "s"}, **adapter} | ({} if task is None else {"task": task})}
    )


def test_another_task_of_pretraining_is_another_run_and_another_file(tmp_path):
    resources = Resources(tmp_path, {}, device="cpu", offline=True, reporter=silent)
    runs = [tuned_from(task) for task in (None, "sst2", "conll2003")]
    assert len({run.digest for run in runs}) == len({resources.adapter_path(run) for run in runs}) == 3
    assert [run.own_task for run in runs] == [True, False, False]
    # The run's own task, named or not, is one run and one file, which other data sets share.
    assert tuned_from("boolq").digest == tuned_from(None).digest
    shared = {resources.adapter_path(tuned_from("sst2", own)) for own in ("sst2", "boolq", "amazon")}
    assert shared == {resources.adapter_path(tuned_from(None, "sst2"))}
    limited = tuned_from("sst2", dataset={"limit_train": 9})
    assert limited.pretraining_data == DatasetSection(task="sst2", limit_train=9)
    assert {resources.adapter_path(limited)}.isdisjoint(shared)


def test_a_grid_names_another_task_of_pretraining(tmp_path):
    grid = {"hosts": ["h"], "datasets": {"boolq": {}}, "methods": {"uhl-tuned-new-task": {}, "lora": {}}}
    grid["defaults"] = {"adapter": {"source": {"name": "s"}, "task": "sst2"}}
    names = {run.run_id for run in load_configs([write(tmp_path, {"grid": grid})])}
    assert names == {"uhl-tuned-new-task--h--boolq--s0--from-sst2", "lora--h--boolq--s0"}


@pytest.mark.parametrize(
    ("section", "said"),
    [({"loraa": None}, "'loraa', which is no method of the grid"), (None, "methods of sst2 must be sections")],
)
def test_a_method_that_the_grid_has_not_is_refused(tmp_path, section, said):
    grid = {"hosts": ["h"], "datasets": {"sst2": {"methods": {"lora": None}}}, "methods": {"lora": {}, "full": {}}}
    assert [run.method for run in load_configs([write(tmp_path, {"grid": grid})])] == ["full"]
    grid["datasets"]["sst2"]["methods"] = section
    with pytest.raises(UsageError, match=said):
        load_configs([write(tmp_path, {"grid": grid})])


@pytest.mark.parametrize("mode", ["transfer", "lora"])
def test_what_is_left_out_is_as_the_command_has_it(mode):
    (method, *_) = [name for name, row in METHODS.items() if row.mode == mode]
    content = {"run_id": "x", "method": method, "host": {"name": "h"}, "dataset": {"task": "sst2"}}
    content["adapter"] = {"source": {"name": "s"}}
    usual = TuneTraining().with_defaults(mode)
    assert RunConfig.model_validate(content).tuning().with_defaults(mode) == usual
    for steps in (200, 200.0, "200"):
        training = RunConfig.model_validate(content | {"training": {"steps": steps}}).training
        assert (training.steps, training.warmup_steps, training.learning_rate) == (200, 12, usual.learning_rate)
    asked = {"steps": 200, "warmup_steps": 7, "learning_rate": 0.3, "weight_decay": 0.2}
    training = RunConfig.model_validate(content | {"training": asked}).training
    assert training.model_dump(include=set(asked)) == asked
    with pytest.raises(ValueError, match=r"training\.steps"):
        RunConfig.model_validate(content | {"training": {"steps": "many"}})


def test_names_have_no_dots_and_different_names_stay_different(tmp_path):
    names = ["a.b", "a-b", "a_b", "a..b", "a.b.", ".a.b", "ab", "a-b-" + dotless("a.b")[-6:]]
    made = [dotless(name) for name in names]
    assert not any("." in name for name in made)
    # One clash is left, with a name that ends in the hash of another; names without dots stay as they are.
    assert made[0] == names[-1]
    assert len(set(made[:-1])) == len(names) - 1
    assert [name for name in names if dotless(name) == name] == ["a-b", "a_b", "ab", names[-1]]
    (run,) = load_configs([write(tmp_path, RUN | {"run_id": "v1.5"})])
    assert run.run_id == dotless("v1.5")
    grid = {"hosts": ["org/m-1.5b", "org/m-1-5b"], "datasets": {"sst2": {}}, "methods": {"lora": {}}}
    first, second = (run.run_id for run in load_configs([write(tmp_path, {"grid": grid})]))
    assert (first, second) == (dotless("lora--org-m-1.5b--sst2--s0"), "lora--org-m-1-5b--sst2--s0")
    assert first != second


@pytest.mark.parametrize("name", [*RESERVED, "Adapters", dotless("searches.json")])
def test_no_run_has_the_name_of_a_part_of_the_results_folder(tmp_path, name):
    with pytest.raises(UsageError, match=f"run_id: '{name}' is what uhl calls"):
        load_configs([write(tmp_path, RUN | {"run_id": name})])
    (run,) = load_configs([write(tmp_path, RUN | {"run_id": f"{name}-2"})])
    assert run.run_id == dotless(f"{name}-2")


def test_a_run_of_an_earlier_version_with_dots_is_found(tmp_path):
    for name in ("lora--m-1.5b--sst2--s0", "lora--m-1.6b--sst2--s0"):
        (tmp_path / name).mkdir()
    folder = RunFolder(tmp_path, dotless("lora--m-1.5b--sst2--s0"))
    assert folder.path == tmp_path / "lora--m-1.5b--sst2--s0"
    assert RunFolder(tmp_path, "lora--m-1-5b--sst2--s0").path.name == "lora--m-1-5b--sst2--s0"
    config = tmp_path / "lora--m-1.5b--sst2--s0" / "config.json"
    config.write_text(json.dumps(RUN | {"run_id": "lora--m-1.5b--sst2--s0"}))
    assert folder.read_config().training.steps == 7


def test_different_settings_of_one_method_are_not_compared_as_seeds(tmp_path):
    def chosen(*runs):
        paths = [tmp_path / f"{index}.yaml" for index in range(len(runs))]
        for path, run in zip(paths, runs, strict=True):
            path.write_text(yaml.safe_dump(RUN | run))
        return chosen_runs(CompareOptions(configs=tuple(map(str, paths)), results_dir=tmp_path))

    second = {"run_id": "two", "training": {"steps": 7, "seed": 1}}
    assert len(chosen({}, second)) == 2
    assert len(chosen({}, {"run_id": "two", "method": "full"})) == 2
    with pytest.raises(UsageError, match="one and two are both lora on reviews"):
        chosen({}, {"run_id": "two", "training": {"steps": 8, "seed": 1}})


def test_a_trial_searches_and_reports_nothing(tmp_path):
    for name in ("proposed-iter1-CoNLL-2003", "comparative-1-iter1-CoNLL-2003"):
        (run,) = load_configs([name])
        small = trial(run)
        assert run.optuna is not None
        assert (small.optuna, small.tracking, small.training.eval_steps) == (None, None, 1)
        for asked in (None, "wandb", "tensorboard"):
            for mode, expected in (("trial", "none"), ("full", asked or "wandb")):
                options = CompareOptions(configs=(name,), results_dir=tmp_path, mode=mode, report_to=asked)
                assert tracking_of(run, options).report_to == expected
        options = CompareOptions(configs=(name,), results_dir=tmp_path, report_to="none")
        assert tracking_of(run, options).report_to == "none"
