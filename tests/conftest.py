"""Settings of all tests: offline, one thread, no GPU unless asked for, and the folder of real data where there is one.

`python -m pytest -m "not integration"` is every law on its own; what is marked `integration` runs whole commands.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from patching import PatchOfImported
from sharing import asks_for_gpu, share_out

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing is kept from test to test or read from the user's cache: the tests of the cache name folders of their own.
os.environ["UHL_CACHE"] = os.devnull
# Of torch, which no test file has imported yet, and of processes that tests start: a tiny host's work is far smaller
# than the cost of sharing it out among threads.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from all tests but those that ask for one, so that the others do the same everywhere."""
    if not asks_for_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before xdist's
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A run of everything uses all cores; see `sharing`."""
    share_out(config)


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "shared", "cuda")):
            item.add_marker(pytest.mark.integration)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What all files imported stays until the end: the collector of garbage need not look through it again.

    Models make many objects that live on, and few cycles, so that it may run more seldom too.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    """pytest's own, by way of `PatchOfImported`; only tests that replace something wait for the whole package."""
    patch = PatchOfImported()
    yield patch
    patch.undo()


@pytest.fixture(autouse=True)
def _gpu_for_those_that_need_one(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and `-m cuda`")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and checkpoints named by UHL_SHARED; the test is skipped by name without it."""
    folder = os.environ.get("UHL_SHARED", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("UHL_SHARED does not name a folder with data/ and hosts/")
    return Path(folder)
