"""Only a run of everything is shared out, and never by one of the processes that share it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sharing import share_out

EVERYTHING = pytest.Config.ArgsSource.TESTPATHS
NAMED = pytest.Config.ArgsSource.ARGS


def processes(*, source=EVERYTHING, xdist=True, asked=None, worker=None, **options) -> object:
    """What a run with these options is told of the number of processes."""
    settings = {"collectonly": False, "usepdb": False, "markexpr": "", "numprocesses": asked} | options
    manager = SimpleNamespace(hasplugin=lambda _: xdist)
    config = SimpleNamespace(args_source=source, option=SimpleNamespace(**settings), pluginmanager=manager)
    if worker is not None:
        config.workerinput = worker
    share_out(config)
    return config.option.numprocesses


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def test_a_run_of_everything_is_shared_out():
    assert processes() == "auto"
    assert processes(markexpr="not integration") == "auto"
    assert processes(markexpr="not cuda") == "auto"


@pytest.mark.parametrize(
    "run",
    [
        {"source": NAMED},
        {"xdist": False},
        {"collectonly": True},
        {"usepdb": True},
        {"markexpr": "cuda"},
        {"worker": {"workerid": "gw0"}},
    ],
    ids=lambda run: next(iter(run)),
)
def test_any_other_stays_in_one_process(run):
    assert processes(**run) is None


def test_the_number_that_was_asked_for_is_kept():
    assert processes(asked=0) == 0


def test_a_worker_never_shares_its_part_out_again(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert processes() is None
