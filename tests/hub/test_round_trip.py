"""From training to a port in a fresh home, and again offline: the same bytes, the same result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_runs import call, port_arguments, pretrain_arguments, write_data
from hub.server import TOKEN
from tiny_hosts import save_tiny_host

from uhl_cli.hub import fetch
from uhl_cli.hub.reference import Reference

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with data, a target, and an adapter that was trained on a host."""
    folder = tmp_path_factory.mktemp("made")
    host = save_tiny_host(folder / "host", "bert")
    save_tiny_host(folder / "target", "gpt2", hidden_size=48, num_hidden_layers=3, seed=1)
    data, file = write_data(folder / "data"), folder / "made.safetensors"
    assert call(*pretrain_arguments(host, data, file), "--quiet").code == 0
    return folder


def test_pretrain_push_port_by_id_and_offline_again(hub, uhl, made, tmp_path):
    file, home = made / "made.safetensors", tmp_path / "fresh"
    assert uhl("push", file, "user/films", "--yes", "--quiet", HF_TOKEN=TOKEN).code == 0
    arguments = [each for each in port_arguments("user/films", made / "target", made / "data") if each != "--offline"]
    reports = []
    for more, env in (([], {}), (["--offline"], {"HF_HUB_OFFLINE": "0"})):
        hub.asked.clear()
        called = uhl(*arguments, "--json", *more, HF_HOME=str(home), **env)
        assert called.code == 0, called.err
        reports.append(json.loads(called.out) | {"seconds": None})
        assert bool(hub.asked) == (not more)
    assert reports[0]["adapter"] == "user/films"
    assert reports[0]["bytes"] == file.stat().st_size
    assert reports[1] == reports[0]
    local = json.loads(call(*port_arguments(file, made / "target", made / "data"), "--json").out) | {"seconds": None}
    assert local == reports[0] | {"adapter": str(file)}
    (cached,) = home.glob("hub/models--user--films/snapshots/*/*")
    assert cached.read_bytes() == file.read_bytes()


def test_commands_give_the_same_by_id_as_by_path(made, here, monkeypatch):
    """Task files too; what a command writes lies in the current folder and names the hub."""
    monkeypatch.chdir(here)
    store = here / "store"
    store.mkdir()

    def fetched(reference: Reference, **_: object) -> Path:
        return store / f"{reference.stem}.safetensors"

    monkeypatch.setattr(fetch, "fetch", fetched)
    shutil.copy(made / "made.safetensors", store / "films.safetensors")
    target = ["--target", str(made / "target"), "--max-flops", "1000", "--device", "cpu", "--offline"]
    tuned = call("tune", "user/films", *target, "--steps", "2", "--json")
    assert tuned.code == 0, tuned.err
    assert json.loads(tuned.out)["adapter"] == "user/films"
    (task,) = here.glob("films.*.task.safetensors")
    assert "uhl tune user/films --target target" in call("inspect", task, "--json").out
    assert str(store) not in call("inspect", task, "--json").out
    task.rename(store / "task.safetensors")
    texts = ["a fine film", "a dull one"]
    named = ("user/films", "--task-file", "user/task")
    paths = (str(store / "films.safetensors"), "--task-file", str(store / "task.safetensors"))
    first, second = (call("predict", adapter, *texts, *rest, *target, "--json") for adapter, *rest in (named, paths))
    assert first.code == 0, first.err
    assert first.out == second.out
    ported = call("port", *named, *target, "--data", made / "data", "--json")
    assert json.loads(ported.out)["adapter"] == "user/films"
    short = ["--target", str(made / "target"), "--steps", "2", "--max-flops", "1000", "--device", "cpu", "--offline"]
    made_of = [
        call("export", *each, *short, "--output", here / name, "--json") for each, name in ((named, "a"), (paths, "b"))
    ]
    assert made_of[0].code == 0, made_of[0].err
    assert (here / "a" / "model.safetensors").read_bytes() == (here / "b" / "model.safetensors").read_bytes()
    assert "uhl export user/films --target" in (here / "a" / "README.md").read_text()
