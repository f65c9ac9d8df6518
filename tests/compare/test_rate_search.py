"""The search of a learning rate: what it takes, what it is scored on, and what of it is kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from toy_runs import sequence_data

from uhl_cli.commands.options import HostOptions
from uhl_cli.compare import runs
from uhl_cli.compare.config import DatasetSection, RunConfig, SearchSection, TrainingSection
from uhl_cli.compare.results import Search
from uhl_cli.compare.search import KeptSearches, search_rate, split_for_search
from uhl_cli.errors import TrainingError

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


def test_searches_of_another_process_are_kept(tmp_path):
    first, second = (KeptSearches(tmp_path / "searches.json") for _ in range(2))
    first["a"] = SEARCH
    second["b"] = SEARCH.model_copy(update={"rate": 0.2})
    assert dict(KeptSearches(tmp_path / "searches.json")) == {**first, **second}


def test_searches_written_at_once_are_all_kept(tmp_path):
    def write(index):
        KeptSearches(tmp_path / "searches.json")[str(index)] = SEARCH

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(64)))
    assert len(KeptSearches(tmp_path / "searches.json")) == 64


def test_a_search_serves_all_seeds_of_what_it_was_made_for_and_nothing_else():
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
        runs._search(run, data, searches, attempt)
        return len(attempts) - before

    assert [search(), search(), search(seed=1), search(learning_rate=0.3)] == [2, 0, 0, 0]
    assert [search(rank=4), search(batch_size=8), search(rank=4)] == [2, 2, 0]
