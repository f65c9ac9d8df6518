"""The search of a learning rate: what it takes, what it is scored on, and what of it is kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from toy_runs import sequence_data

from uhl_cli.commands.options import HostOptions
from uhl_cli.compare import runs
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.results import Search
from uhl_cli.compare.search import KeptSearches, chosen_training, search_rate, search_space, split_for_search
from uhl_cli.compare.sections import DatasetSection, SearchSection, TrainingSection
from uhl_cli.errors import FormatError, TrainingError
from uhl_cli.train.run_files import RunFiles

SEARCH = Search(rate=0.1, scores={"0.1": 0.5}, held_out=10, steps=2)


def test_search_takes_the_best_and_follows_an_edge():
    section = SearchSection(learning_rates=(1e-3, 1e-2, 1e-1), edge_factor=10.0, edge_tries=2)
    inside = search_rate(section, lambda rate: 1.0 if rate == 1e-2 else 0.5, 9)
    assert (inside.rate, len(inside.scores), inside.held_out) == (1e-2, 3, 9)
    low = search_rate(section, lambda rate: -rate, 9)
    assert low.rate == pytest.approx(1e-5)
    assert len(low.scores) == 5
    # Within one standard error of the highest, 0.0125 of 1,600 examples, rates tie.
    for middle, expected in ((0.49, 1e-2), (0.48, 1e-3)):
        near = search_rate(section, lambda rate, middle=middle: {1e-3: 0.5, 1e-2: middle}.get(rate, 0.1), 1600)
        assert near.rate == expected
    # All rates tie: the middle one, and no edge to follow.
    level = search_rate(section, lambda rate: 0.5, 9)
    assert (level.rate, len(level.scores)) == (1e-2, 3)

    def diverges(rate):
        if rate > 1e-3:
            raise TrainingError("nan")
        return 0.7

    assert search_rate(section.model_copy(update={"edge_tries": 0}), diverges, 9).rate == 1e-3


def test_held_out_examples_are_not_trained_on():
    data = sequence_data().train
    held, rest = split_for_search(data, 2000)
    assert len(held) == len(data) // 4
    assert not set(held.texts) & set(rest.texts)
    assert len(held) + len(rest) == len(data)
    assert split_for_search(data, 3)[0].texts == held.texts[:3]


SPACE = {
    "learning_rate": {"low": 1e-5, "high": 1e-3},
    "rank": {"low": 4, "high": 16},
    "batch_size": [16, 32, 64],
}


def searched(folder, attempt, space=SPACE, method="sat-lora", training=None, **section):
    run = RunConfig(
        run_id="x",
        method=method,
        host=HostOptions(name="h"),
        adapter={"file": "a"},
        dataset=DatasetSection(task="sst2"),
        training=training or TrainingSection(learning_rate=3e-4),
        optuna={"n_trials": 12, "search_space": space} | section,
    )
    return search_space(run.optuna, run, attempt, 9, files=RunFiles(folder / "search.uhl-run"), identity="x")


def test_optuna_tries_its_trials_in_the_space_and_takes_the_best(tmp_path):
    tried = []

    def attempt(values):
        tried.append(values)
        return 1.0 - abs(values["rank"] - 11) / 20 - (values["batch_size"] != 64) / 10

    found = searched(tmp_path, attempt)
    assert [trial.values for trial in found.trials] == tried
    assert len(tried) == 12
    assert tried[0] == {"learning_rate": 3e-4, "rank": 8, "batch_size": 32}  # the run's own values
    assert all(1e-5 <= each["learning_rate"] <= 1e-3 for each in tried)
    assert all(isinstance(each["rank"], int) and 4 <= each["rank"] <= 16 for each in tried)
    assert {each["batch_size"] for each in tried} == {16, 32, 64}
    assert len({each["rank"] for each in tried}) > 3
    scores = [trial.score for trial in found.trials]
    assert scores[found.best] == max(scores) > scores[0]
    assert found.rate == tried[found.best]["learning_rate"]
    assert (found.held_out, found.steps, found.scores) == (9, 500, {})
    again = searched(tmp_path, attempt)
    assert again == found
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_search_continues_with_the_same_trials(tmp_path):
    def score_of(values):
        return values["lambda_F"] + values["learning_rate"]

    space = {"learning_rate": {"low": 1e-5, "high": 5e-4}, "lambda_F": {"low": 0.01, "high": 0.1}, "top_k": [1, 2]}
    whole = searched(tmp_path / "whole", score_of, space, "uhl-tuned")
    # A value of the run outside of the space is moved to its nearest end; one that is not set is the default.
    assert whole.trials[0].values == {"learning_rate": 3e-4, "lambda_F": 0.01, "top_k": 2}
    done = []

    def stops(values):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(values)
        return score_of(values)

    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path, stops, space, "uhl-tuned")
    done.clear()
    resumed = searched(tmp_path, lambda values: done.append(values) or score_of(values), space, "uhl-tuned")
    assert resumed == whole
    assert len(done) == 12 - 5


def test_a_value_outside_of_the_space_begins_at_its_nearest(tmp_path):
    training = TrainingSection(learning_rate=0.5, rank=64, batch_size=40)
    found = searched(tmp_path, lambda values: 0.5, training=training, n_trials=1)
    assert found.trials[0].values == {"learning_rate": 1e-3, "rank": 16, "batch_size": 32}


def test_a_trial_that_diverges_scores_zero(tmp_path):
    def diverges(values):
        if values["rank"] != 8:
            raise TrainingError("nan")
        return 0.5

    found = searched(tmp_path, diverges)
    assert found.trials[found.best].values["rank"] == 8
    assert 0.0 in [trial.score for trial in found.trials]


def test_searches_of_another_process_are_kept(tmp_path):
    first, second = (KeptSearches(tmp_path / "searches.json") for _ in range(2))
    first["a"] = SEARCH
    second["b"] = SEARCH.model_copy(update={"rate": 0.2})
    assert dict(KeptSearches(tmp_path / "searches.json")) == {**first, **second}


@pytest.mark.parametrize("content", ["", '{"a": ', "[1]", '{"a": {"rate": 1}}', b"\xff"])
def test_a_damaged_file_of_searches_is_refused_by_name(tmp_path, content):
    path = tmp_path / "searches.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=r"searches\.json holds no searches. Delete it; its searches"):
        KeptSearches(path)
    path.unlink()
    assert KeptSearches(path) == {}


def test_searches_written_at_once_are_all_kept(tmp_path):
    def write(index):
        KeptSearches(tmp_path / "searches.json")[str(index)] = SEARCH

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(64)))
    assert len(KeptSearches(tmp_path / "searches.json")) == 64


def test_a_search_serves_all_seeds_of_what_it_was_made_for_and_nothing_else(tmp_path):
    data, searches, attempts = sequence_data(), {}, []

    def attempt(_data, held, training):
        attempts.append(training)
        return [0] * len(held)

    def search(**changes):
        training = TrainingSection(**({"steps": 20, "warmup_steps": 2} | changes))
        section = SearchSection(learning_rates=(1e-3, 1e-2), steps=4, edge_tries=0)
        run = RunConfig(
            run_id="x",
            method="lora",
            host=HostOptions(name="h"),
            dataset=DatasetSection(task="sst2"),
            training=training,
            search=section,
        )
        before = len(attempts)
        runs._search(run, data, searches, attempt, tmp_path)
        return len(attempts) - before

    assert [search(), search(), search(seed=1), search(learning_rate=0.3)] == [2, 0, 0, 0]
    assert [search(rank=4), search(batch_size=8), search(rank=4)] == [2, 2, 0]
    assert [search(eval_steps=5), search(schedule="linear")] == [0, 2]


def test_a_search_is_not_shared_by_adapters_of_different_tasks(tmp_path):
    data, searches, attempts = sequence_data(), {}, []

    def attempt(_data, held, training):
        attempts.append(training)
        return [0] * len(held)

    def search(task):
        run = RunConfig(
            run_id="x",
            method="uhl-tuned" if task in (None, "boolq") else "uhl-tuned-new-task",
            host=HostOptions(name="h"),
            adapter={"source": {"name": "s"}, "task": task},
            dataset=DatasetSection(task="boolq"),
            search=SearchSection(learning_rates=(1e-3, 1e-2), steps=4, edge_tries=0),
        )
        before = len(attempts)
        runs._search(run, data, searches, attempt, tmp_path)
        return len(attempts) - before

    assert [search("sst2"), search("sst2"), search("amazon"), search(None), search("boolq")] == [2, 0, 2, 2, 0]


def test_a_search_is_not_shared_by_different_adapters_of_a_task(tmp_path):
    data, searches, attempts = sequence_data(), {}, []

    def attempt(_data, held, training):
        attempts.append(training)
        return [0] * len(held)

    def search(method="uhl-tuned", **adapter):
        run = RunConfig(
            run_id="x",
            method=method,
            host=HostOptions(name="h"),
            adapter=adapter,
            dataset=DatasetSection(task="sst2"),
            search=SearchSection(learning_rates=(1e-3, 1e-2), steps=4, edge_tries=0),
        )
        before = len(attempts)
        runs._search(run, data, searches, attempt, tmp_path)
        return len(attempts) - before

    source = {"source": {"name": "s"}}
    assert [search(**source), search(**source, label="mine"), search(**source, anchors=None)] == [2, 0, 2]
    assert [search(file="one"), search(file="two"), search(file="one")] == [2, 2, 0]
    assert [search("lora", file="one"), search("lora", file="two")] == [2, 0]


def test_a_search_by_optuna_is_held_out_and_serves_all_seeds(tmp_path):
    data, searches, held_out = sequence_data(), {}, []

    def attempt(part, held, training):
        assert set(part.train.texts) | set(held.texts) == set(data.train.texts)
        assert not set(part.train.texts) & set(held.texts)
        held_out.append(training)
        return [int(training.rank > 8)] * len(held)

    def search(seed):
        run = RunConfig(
            run_id="x",
            method="lora",
            host=HostOptions(name="h"),
            dataset=DatasetSection(task="sst2"),
            training=TrainingSection(seed=seed),
            optuna={"n_trials": 6, "steps": 50, "search_space": {"rank": [4, 8, 16], "learning_rate": [1e-3, 2e-3]}},
        )
        found = runs._search(run, data, searches, attempt, tmp_path)
        return chosen_training(run, found)

    first, second = search(0), search(1)
    assert len(held_out) == 6
    assert {(each.steps, each.warmup_steps, each.seed) for each in held_out} == {(50, 5, 0)}
    assert (first.rank, first.seed, second.seed) == (second.rank, 0, 1)
    assert first.steps == 500
