"""`uhl list`: what it finds in a folder and in the hub's cache, whatever strangers put there."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runs import Called, call, imported, port_arguments
from safetensors.numpy import save_file

from uhl_cli.formats.adapter import read_adapter, write_adapter
from uhl_cli.formats.task import write_task
from uhl_cli.inspect import listing

HOSTILE = "a\x1b[31m\nb\u202e"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(place, here) -> Path:
    """An adapter, its task file, another's weights, a damaged file, and files that are not looked at."""
    from tiny_adapters import tiny_task_file

    (here / "deep" / "er").mkdir(parents=True)
    (here / "a.safetensors").write_bytes(place.adapter.read_bytes())
    content = read_adapter(place.adapter)
    write_task(here / "deep" / "er" / "a.task.safetensors", tiny_task_file(content.manifest, adapter=content.digest))
    save_file({"x": np.zeros(3, np.float32)}, here / "model.safetensors", metadata={"format": "pt"})
    (here / "deep" / "bad.safetensors").write_bytes(place.adapter.read_bytes()[:-5])
    (here / "notes.txt").write_text("no")
    (here / ".hidden").mkdir()
    (here / ".hidden" / "b.safetensors").write_bytes(place.adapter.read_bytes())
    return here


def listed(*arguments: Any, **how: Any) -> dict[str, Any]:
    called = call("list", *arguments, "--json", **how)
    assert called.code == 0, called.err
    found: dict[str, Any] = json.loads(called.out)
    return found


def test_it_imports_neither_torch_nor_transformers(folder):
    forms = [[], ["--json"], ["--quiet"], ["--target", "builtin:base"]]
    calls = [["list", *where, *form] for where in ([str(folder)], []) for form in forms]
    assert imported(*calls, cwd=folder) == [{"numpy"}] * len(calls)
    assert imported(calls[0], cwd=folder, first=("pandas",)) == [{"numpy", "pandas"}], "it would be noticed"


def test_files_of_a_folder(place, folder):
    report = listed(".")
    files = {file["name"]: file for file in report["files"]}
    manifest = read_adapter(place.adapter).manifest
    assert [file["kind"] for file in report["files"]] == ["adapter", "unreadable", "task"]
    assert (report["others"], report["complete"], report["target"]) == (1, True, None)
    adapter = files["a.safetensors"]
    assert adapter["bytes"] == (folder / "a.safetensors").stat().st_size
    assert (adapter["task"], adapter["labels"]) == (manifest.task.name, list(manifest.task.labels))
    assert adapter["host"] == manifest.source.model_dump(mode="json")
    assert adapter["score"] == manifest.score.model_dump(mode="json")
    assert (adapter["licence"], adapter["aligned"], adapter["problem"]) == (None, None, None)
    assert files["deep/er/a.task.safetensors"]["score"]["value"] == 0.7
    assert "damaged" in files["deep/bad.safetensors"]["problem"]
    table = call("list", ".", env={"COLUMNS": "200"})
    assert (table.code, table.err) == (0, "")
    for words in (
        "a.safetensors",
        "sst2: negative, positive",
        "from host",
        "0.700 accuracy",
        "1 other .safetensors file",
    ):
        assert words in table.out, words
    assert "deep/bad.safetensors is unreadable: not a whole safetensors file" in table.out
    assert "Traceback" not in table.out
    size = (folder / "deep" / "bad.safetensors").stat().st_size
    assert f"deep/bad.safetensors\tunreadable\t{size}\n" in call("list", ".", "-q").out
    narrow = call("list", ".", env={"COLUMNS": "80"}).out.splitlines()
    assert max(len(line) for line in narrow if "unreadable" not in line) <= 80


def test_an_empty_folder_and_one_that_is_not_there(folder):
    (folder / "empty").mkdir()
    assert call("list", "empty") == Called(0, "no adapter files in empty\n", "")
    assert call("list", "empty", "-q") == Called(0, "", "")
    assert listed("empty")["files"] == []
    called = call("list", "nowhere")
    assert (called.code, called.error) == (
        2,
        "error: there is no folder nowhere. Check the path, or leave it out for the hub's cache.",
    )
    called = call("list", "a.safetensors")
    assert (called.code, "uhl inspect a.safetensors" in called.error) == (2, True)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\ntext\n", "mit"),
        ("---\r\ntags: [x]\r\nlicence: 'apache-2.0'\r\n---\r\n", "apache-2.0"),
        ("text\n---\nlicense: mit\n---\n", "MIT of the file"),
        ("---\nlicense:\n---\n", "MIT of the file"),
        ("---\nlicense: mit", "mit"),
        (f"---\nlicense: {'x' * 900}\n---\n", "x" * 100),
        ("---\n" + "y: z\n" * 50_000 + "license: mit\n---\n", "MIT of the file"),
        ("---\nlicense: \x1b[31mred\n---\n", "\x1b[31mred"),
        (b"---\nlicense: \xff\xfe\n---\n", "\ufffd\ufffd"),
        (None, "MIT of the file"),
    ],
)
def test_the_licence_is_the_cards_else_the_files(folder, card, licence):
    content = read_adapter(folder / "a.safetensors")
    manifest = content.manifest.model_copy(update={"licence": "MIT of the file"})
    write_adapter(folder / "a.safetensors", replace(content, manifest=manifest))
    if card is None:
        os.mkfifo(folder / "README.md")
    else:
        (folder / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert listed(".")["files"][0]["licence"] == licence
    assert "\x1b" not in call("list", ".", env={"COLUMNS": "200"}).out


def test_strangers_names_are_harmless(folder):
    content = read_adapter(folder / "a.safetensors")
    source = content.manifest.source.model_copy(update={"name": HOSTILE})
    manifest = content.manifest.model_copy(update={"source": source})
    write_adapter(folder / f"{HOSTILE}.safetensors", replace(content, manifest=manifest))
    (folder / f"{HOSTILE}2.safetensors").write_bytes(b"x")
    found = {file["name"]: file for file in listed(".")["files"]}
    assert found[f"{HOSTILE}2.safetensors"]["problem"].startswith("not a whole safetensors file")
    assert found[f"{HOSTILE}.safetensors"]["host"]["name"] == HOSTILE
    for form in ([], ["--json"], ["--quiet"]):
        called = call("list", ".", *form)
        assert called.code == 0
        assert all(line.replace("\t", "").isprintable() for line in called.out.split("\n"))


def test_bounds_on_files_and_depth(folder, monkeypatch):
    warning = "has more files than are looked at"
    assert warning not in call("list", ".").err
    for bound, number in (("MOST_DEPTH", 1), ("MOST_FILES", 2), ("MOST_ENTRIES", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(listing, bound, number)
            called = call("list", ".", "--json")
            report = json.loads(called.out)
            assert not report["complete"], bound
            assert len(report["files"]) <= 2
            assert warning in called.err
    (folder / "deep" / "loop").symlink_to(folder)
    assert len(listed(".")["files"]) == 3


def test_special_files_are_no_error(folder):
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "gone.safetensors").symlink_to("nowhere")
    (folder / "large.safetensors").write_bytes((3_000_000).to_bytes(8, "little") + b"{" + b" " * 3_000_000)
    files = {file["name"]: file for file in listed(".")["files"]}
    assert files["pipe.safetensors"]["problem"].startswith("pipe.safetensors is not a regular file")
    assert files["gone.safetensors"]["problem"].startswith("cannot read gone.safetensors: No such file")
    assert "large.safetensors" not in files, "no header of uhl's is as large"


def snapshot(cache: Path, repository: str, commit: str, files: dict[str, bytes], branch: str | None = None) -> None:
    """A repository's snapshot in the hub's layout: links to blobs."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    for number, (name, content) in enumerate(files.items()):
        blob = place / "blobs" / f"{commit[:8]}{number}"
        blob.write_bytes(content)
        link = place / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if branch is not None:
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / branch).write_text(commit)


def test_the_hubs_cache(place, here, monkeypatch):
    cache = here / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    empty = call("list")
    assert empty == Called(0, f"no adapter files in {cache}; `uhl list .` looks in the folder that you are in\n", "")
    content, card = place.adapter.read_bytes(), b"---\nlicense: cc-by-4.0\n---\n"
    files = {"a.safetensors": content, "more/b.safetensors": content, "README.md": card}
    snapshot(cache, "some-user/adapters", COMMIT, files, branch="main")
    snapshot(cache, "some-user/adapters", "f" * 40, {"a.safetensors": content})
    (cache / "datasets--x" / "snapshots" / COMMIT).mkdir(parents=True)
    (cache / "datasets--x" / "snapshots" / COMMIT / "a.safetensors").write_bytes(content)
    report = listed()
    assert [file["name"] for file in report["files"]] == [
        "some-user/adapters@main:a.safetensors",
        "some-user/adapters@main:more/b.safetensors",
        f"some-user/adapters@{'f' * 40}:a.safetensors",
    ]
    assert [file["revision"] for file in report["files"]] == [COMMIT, COMMIT, "f" * 40]
    assert [file["licence"] for file in report["files"]] == ["cc-by-4.0", None, None]


def test_it_says_what_has_been_aligned(place, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("UHL_CACHE", str(tmp_path / "cache"))

    def aligned(target: Path | str) -> list[int | None]:
        files = listed(".", "--target", target)["files"]
        return [None if file["aligned"] is None else len(file["aligned"]) for file in files]

    assert aligned(place.target) == [0, None, 0]
    assert call(*port_arguments(place.adapter, place.target, place.data), "--no-score").code == 0
    assert aligned(place.target) == [1, None, 1]
    assert aligned(place.host) == [0, None, 0]
    assert aligned("builtin:base") == [0, None, 0]
    monkeypatch.chdir(place.target.parent)
    relative = listed(folder, "--target", place.target.name)["files"]
    assert len(relative[0]["aligned"]) == 1
    assert relative[0]["aligned"][0]["fingerprint"]["digest"]
    table = call("list", folder, "--target", place.target, env={"COLUMNS": "300"}).out
    assert "aligned" in table
    assert "yes" in table
    assert "yes" not in call("list", folder, "--target", place.host, env={"COLUMNS": "300"}).out
    for path in (tmp_path / "cache" / "alignments").iterdir():
        path.write_bytes(b"damaged")
    assert len(listed(folder, "--target", place.target)["files"][0]["aligned"]) == 0
