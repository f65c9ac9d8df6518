"""Which runs of the tests are shared out among the cores."""

from __future__ import annotations

import os

import pytest


def asks_for_gpu(config: pytest.Config) -> bool:
    """Whether the run was asked for tests on a GPU."""
    return "cuda" in config.option.markexpr.replace("not cuda", "")


def share_out(config: pytest.Config) -> None:
    """Share a run of everything out among the cores; a run of named files, on a GPU or in a debugger stays in one.

    One of the processes that a run is shared among must never share out again: each would start as many.
    """
    if hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if named or config.option.collectonly or config.option.usepdb or asks_for_gpu(config):
        return
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = "auto"
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False
