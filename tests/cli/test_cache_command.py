"""The cache as commands use it: a second call reads the alignment and gives the same, `--no-cache` leaves it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_runs import call, port_arguments, start

from uhl_cli.cache import cache_folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UHL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def report(*arguments: Any) -> dict[str, Any]:
    called = call(*arguments, "--json")
    assert called.code == 0, called.err
    found: dict[str, Any] = json.loads(called.out)
    return found


def test_a_second_port_reads_the_alignment_and_gives_the_same(place, cache):
    arguments = [*port_arguments(place.adapter, place.target, place.data), "--controls"]
    first, second, without = report(*arguments), report(*arguments), report(*arguments, "--no-cache")
    assert [each.pop("alignment_cached") for each in (first, second, without)] == [False, True, False]
    for each in (first, second, without):
        assert set(each.pop("seconds")) == {"load", "align", "inject", "score"}
    assert first == second == without
    shown = [call(*arguments, *more).out for more in ([], ["--no-cache"])]
    assert ["(cached)" in out for out in shown] == [True, False]


def test_without_the_cache_nothing_is_kept(place, cache):
    report(*port_arguments(place.adapter, place.target, place.data), "--no-cache")
    assert not cache.exists()
    report(*port_arguments(place.adapter, place.target, place.data))
    assert sorted(path.name for path in cache.iterdir()) == ["alignments", "maps"]


def test_predict_and_tune_use_what_port_has_kept(place, cache, here, monkeypatch):
    on = ["--target", place.target, "--max-flops", "1000", "--device", "cpu", "--offline"]
    predict = ["predict", place.adapter, "a fine film", "--quiet", *on]
    without = call(*predict, "--no-cache")
    assert without.code == 0, without.err
    report(*port_arguments(place.adapter, place.target, place.data), "--no-score")
    monkeypatch.setattr("uhl_cli.ported.aligned.word_states", lambda *_, **__: pytest.fail("the host was run"))
    assert call(*predict) == without
    report("budget", place.adapter, *on)
    tune = ["tune", place.adapter, *on, "--steps", "1", "--parameters", "lora", "--output", "lora"]
    report(*tune, "--data", place.data)


@pytest.mark.integration
def test_another_process_reads_it(place, cache, here):
    arguments = [*port_arguments(place.adapter, place.target, place.data), "--no-score"]
    assert not report(*arguments)["alignment_cached"]
    assert json.loads(start(*arguments, "--json", cwd=here).out)["alignment_cached"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UHL_CACHE", "~/kept")
    assert cache_folder("alignments") == tmp_path / "kept" / "alignments"
