"""The datasets cache of these tests lies in a temporary folder, and nothing goes to the network."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory) -> Iterator[None]:
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:  # no module of the package keeps this value
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def shared_data() -> Path:
    folder = os.environ.get("UHL_SHARED")
    if not folder:
        pytest.skip("UHL_SHARED does not name the folder of the real data")
    return Path(folder) / "data"
