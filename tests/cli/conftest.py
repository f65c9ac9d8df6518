"""A folder with tiny hosts, data and adapters made by the command itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_runs import Called, Workplace, call, pretrain_arguments, write_conll, write_data
from tiny_hosts import save_tiny_host


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Workplace:
    """Two hosts, two data sets, and an adapter for each."""
    folder = tmp_path_factory.mktemp("workplace")
    made = Workplace(
        host=save_tiny_host(folder / "host", "bert"),
        target=save_tiny_host(folder / "target", "gpt2", hidden_size=48, num_hidden_layers=3, seed=1),
        data=write_data(folder / "data"),
        conll=write_conll(folder / "conll"),
        adapter=folder / "adapter.safetensors",
        tagger=folder / "tagger.safetensors",
    )
    for data, adapter, task in ((made.data, made.adapter, "sst2"), (made.conll, made.tagger, str(made.conll))):
        arguments = pretrain_arguments(made.host, data, adapter)
        arguments[arguments.index("--task") + 1] = task
        called = call(*arguments, "--quiet")
        assert called == Called(0, f"{adapter}\n", "")
    return made


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
