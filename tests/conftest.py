"""Settings of all tests: offline, one thread, no colours, and the folder of real data where there is one."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

import torch

import uhl_cli

# A tiny host's work is far smaller than the cost of sharing it out among threads.
torch.set_num_threads(1)

# A module that is first imported while a test has replaced some function would keep the replacement for good.
for module in pkgutil.walk_packages(uhl_cli.__path__, "uhl_cli."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from all tests but those that ask for one, so that the others do the same everywhere."""
    if "cuda" not in config.option.markexpr.replace("not cuda", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _gpu_for_those_that_need_one(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and `-m cuda`")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and checkpoints named by UHL_SHARED; the test is skipped by name without it."""
    folder = os.environ.get("UHL_SHARED", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("UHL_SHARED does not name a folder with data/ and hosts/")
    return Path(folder)
