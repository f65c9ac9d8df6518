"""What a name refers to, and a path that is shown by one name and read by another."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest

from uhl_cli.cli.main import COMMANDS
from uhl_cli.commands.options import HostOptions, TuneOptions
from uhl_cli.errors import HubError, UsageError
from uhl_cli.hub import fetch
from uhl_cli.hub.fetch import chosen
from uhl_cli.hub.reference import FetchedPath, Reference


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("user/repo", ("user/repo", None, None)),
        ("user/repo@v1", ("user/repo", "v1", None)),
        ("user/repo@refs/pr/1", ("user/repo", "refs/pr/1", None)),
        ("user/repo:x.safetensors", ("user/repo", None, "x.safetensors")),
        ("user/re.po@v1:deep/er/x.safetensors", ("user/re.po", "v1", "deep/er/x.safetensors")),
        ("user/a.safetensors@v1", ("user/a.safetensors", "v1", None)),
    ],
)
def test_names_of_the_hub(text, parts):
    found = Reference.parse(text)
    assert found == Reference(*parts)
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "adapter", "adapter.safetensors", "./user/repo", "../user/repo", "/user/repo", "~/user/repo", "a/b/c"),
        *(
            "user/x.safetensors",
            "user/",
            "/repo",
            "user\\repo",
            "C:\\user/repo",
            "C:/user/repo",
            "user/repo@",
            "user/repo:",
        ),
        *("user/re--po", "user/..", "us er/repo", "user/re\x1bpo", "user/" + "r" * 200),
    ],
)
def test_what_can_only_be_a_path(text):
    assert Reference.parse(text) is None


@pytest.mark.parametrize(
    "file", ["../x", "a/../../x", "/etc/x", "a//x", "a\\x", "a\x1b[31mx", "x" * 600, "a/./x", "..\\x"]
)
def test_a_file_stays_inside_its_repository(file):
    with pytest.raises(UsageError, match="no name of a file") as caught:
        Reference.parse(f"user/repo:{file}.safetensors")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("revision", ["v1\n", "../../x", "/v1", "a//b", "v 1", "v\x1b1", "a/..", "a\\b"])
def test_a_revision_stays_inside_the_cache(revision):
    with pytest.raises(UsageError, match="no name of a revision"):
        Reference.parse(f"user/repo@{revision}")


def test_only_safetensors_are_named():
    for file in ("x.bin", "x.safetensors.bin", "README.md", "x.SAFETENSORS"):
        with pytest.raises(UsageError, match=r"no \.safetensors file"):
            Reference.parse(f"user/repo:{file}")


def test_names_given_apart():
    assert Reference("user/repo").narrowed("v1", "x.safetensors") == Reference("user/repo", "v1", "x.safetensors")
    assert Reference("user/repo", "v1").narrowed(None, None) == Reference("user/repo", "v1")
    for revision, file in (("v2", None), (None, "y.safetensors")):
        with pytest.raises(UsageError, match="Name it once"):
            Reference("user/repo", "v1", "x.safetensors").narrowed(revision, file)
    for revision, file in (("v:1", None), ("..", None), (None, "../x.safetensors"), (None, "x.bin")):
        with pytest.raises(UsageError):
            Reference("user/repo").narrowed(revision, file)


def test_a_fetched_path_is_shown_by_its_name_and_read_from_the_cache(tmp_path):
    local = tmp_path / "snapshots" / "0" / "x.safetensors"
    local.parent.mkdir(parents=True)
    local.write_bytes(b"content")
    path = FetchedPath.of(Reference("user/repo", "v1"), local)
    for each in (path, copy.copy(path), copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert (str(each), f"{each}") == ("user/repo@v1", "user/repo@v1")
        assert str(tmp_path) not in repr(each)
        assert os.fspath(each) == str(local)
        assert each.read_bytes() == each.open("rb").read() == b"content"
        assert (each.exists(), each.is_file(), each.is_dir()) == (True, True, False)
        assert each.stat().st_size == 7
        assert each.parent == local.parent
        assert Path(os.fspath(each)) == local
    below = path / "adapter.uhl"
    assert (str(below), below.exists(), below.reference) == ("user/repo@v1/adapter.uhl", False, None)
    assert path == FetchedPath.of(Reference("user/repo", "v1"), local)
    assert path != FetchedPath.of(Reference("user/repo", "v2"), local)


def test_what_is_made_from_a_fetched_adapter_lies_here_and_names_the_hub(tmp_path):
    for reference, stem in (
        (Reference("user/my-v1.0", "main"), "my-v1.0"),
        (Reference("u/r", None, "d/a.safetensors"), "a"),
    ):
        path = FetchedPath.of(reference, tmp_path / "x")
        options = TuneOptions(adapter=Path("a"), target=HostOptions(name="org/host")).model_copy(
            update={"adapter": path}
        )
        assert options.output_path("sst2") == Path(f"{stem}.sst2.host.task.safetensors")
        assert f"uhl tune {reference} --target" in options.command("sst2")


@pytest.mark.parametrize("command", [name for name, each in COMMANDS.items() if each.record().files])
def test_every_command_that_reads_files_takes_hub_ids(command, tmp_path, monkeypatch):
    """All their fields of files, by the one call that fetches them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "there").touch()
    asked = []

    def fetched(reference: Reference, **how: object) -> Path:
        asked.append((str(reference), how["offline"]))
        return tmp_path / "cached"

    monkeypatch.setattr(fetch, "fetch", fetched)
    kind = COMMANDS[command].record()
    names = [name.replace("_", "-") for name in kind.files]
    paths = [flag for flag in kind.flags() if flag.name in names]
    assert len(paths) == len(names)
    given = {flag.name: f"user/{flag.name}" for flag in paths} | {"target": "x", "output": Path("o")}
    options = kind.from_flags(given).fetched(given | {"offline": True})
    assert asked == [(f"user/{flag.name}", True) for flag in paths]
    for flag in paths:
        value = options.value_of(flag)
        assert (str(value), os.fspath(value)) == (f"user/{flag.name}", str(tmp_path / "cached"))
    asked.clear()
    for words in ("user/there", "./user/repo", "a.safetensors", "a/b/c"):
        given[names[0]] = words
        given |= dict.fromkeys(names[1:])
        assert kind.from_flags(given).fetched(given) == kind.from_flags(given)
    assert asked == [], "a path that exists, or can only be one, was looked for on the hub"


def test_the_file_that_is_chosen():
    def found(*files: str, file: str | None = None) -> str:
        return chosen(Reference("user/repo", None, file), files)

    assert found("a.safetensors", "README.md", "b.bin") == "a.safetensors"
    assert found("deep/a.safetensors") == "deep/a.safetensors"
    assert found("b.safetensors", "adapter.safetensors") == "adapter.safetensors"
    assert found("b.safetensors", "adapter.safetensors", file="b.safetensors") == "b.safetensors"
    for files, words in (((), "no .safetensors file"), (("x.bin",), "no .safetensors file")):
        with pytest.raises(HubError, match=words):
            found(*files)
    with pytest.raises(
        HubError, match=r"2 \.safetensors files: a\.safetensors, b\.safetensors\. Name one, as user/repo:FILE"
    ):
        found("b.safetensors", "a.safetensors")
    with pytest.raises(HubError, match=r"no file 'c\.safetensors'; it has a\.safetensors"):
        found("a.safetensors", file="c.safetensors")


def test_names_of_strangers_are_not_chosen_and_not_printed_raw():
    bad = [
        "../../x.safetensors",
        "/etc/x.safetensors",
        "a\x1b[31m.safetensors",
        "a\\..\\x.safetensors",
        "a/../x.safetensors",
    ]
    with pytest.raises(HubError, match=r"no \.safetensors file"):
        chosen(Reference("user/repo"), bad)
    assert chosen(Reference("user/repo"), [*bad, "good.safetensors"]) == "good.safetensors"
    with pytest.raises(HubError) as caught:
        chosen(Reference("user/repo"), [f"{number:06}.safetensors" for number in range(100_000)])
    assert "and 99,990 more" in str(caught.value)
    assert len(str(caught.value)) < 500
