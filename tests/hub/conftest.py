"""A hub on loopback, files to put there, and calls of `uhl` that reach nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_runs import ROOT, Called, start
from hub.server import TOKEN, Hub, running_hub
from tiny_adapters import tiny_file, tiny_task_file, tiny_transfer

from uhl_cli.formats.adapter import to_bytes
from uhl_cli.formats.task import task_to_bytes

Uhl = Callable[..., Called]


@pytest.fixture(scope="session")
def adapter() -> bytes:
    """An adapter file with anchors, a feature bank and a transfer set, all with texts of the user's."""
    return to_bytes(tiny_file(featured=True, transfer=tiny_transfer()))


@pytest.fixture(scope="session")
def other() -> bytes:
    """Another adapter file."""
    return to_bytes(tiny_file(seed=1))


@pytest.fixture(scope="session")
def task() -> bytes:
    """A task file, which has no text."""
    return task_to_bytes(tiny_task_file())


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub without repositories."""
    with running_hub() as found:
        yield found


@pytest.fixture
def here(tmp_path) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def settings(hub, tmp_path) -> dict[str, str]:
    """The environment of every process: this hub, and a cache of its own."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "UHL_CACHE": os.devnull,
    }


@pytest.fixture
def uhl(here, settings) -> Uhl:
    """Run `uhl` in a process of its own; the token may be in its environment, and never in its output."""

    def run(*arguments: str | Path, **changes: str) -> Called:
        called = start(*arguments, cwd=here, env=settings | changes)
        assert TOKEN not in called.out + called.err
        assert "Signature" not in called.err
        return called

    return run


# Not `command_runs.call`, which comes with torch.
_MANY = """
import contextlib, io, json, sys
from uhl_cli.cli.main import app
found = []
for arguments in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(arguments)
        except SystemExit as left:
            code = left.code
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture
def uhl_many(here, settings) -> Callable[..., list[Called]]:
    """The same for many calls, one after the other in one process, which takes a fraction of the time."""

    def run(*calls: list[str], **changes: str) -> list[Called]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "UHL_"))}
        done = subprocess.run(
            [sys.executable, "-c", _MANY],
            input=json.dumps([[str(word) for word in words] for words in calls]),
            cwd=here,
            env=kept | settings | {"PYTHONPATH": str(ROOT)} | changes,
            capture_output=True,
            text=True,
            check=True,
        )
        assert TOKEN not in done.stdout + done.stderr
        assert done.stderr == "", "a line beside those of the command"
        return [Called(*each) for each in json.loads(done.stdout)]

    return run
