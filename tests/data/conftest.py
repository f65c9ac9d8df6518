"""The datasets cache of these tests lies in a temporary folder, and nothing goes to the network."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def shared_data() -> Path:
    folder = os.environ.get("UHL_SHARED")
    if not folder:
        pytest.skip("UHL_SHARED does not name the folder of the real data")
    return Path(folder) / "data"
