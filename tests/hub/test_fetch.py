"""Adapter files by hub id: fetched once, bounded, cached, offline, and every failure in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import ROOT
from hub.server import TOKEN, Fault, sha256

pytestmark = pytest.mark.integration


def shown(called) -> dict:
    assert (called.code, called.err) == (0, "")
    return json.loads(called.out)


def cached_files(home: Path) -> list[str]:
    return sorted(path.name for path in home.glob("hub/models--*/snapshots/*/**/*") if path.is_file())


def test_a_file_is_fetched_once_and_then_read_from_the_cache(hub, uhl, adapter, tmp_path):
    repo = hub.add(
        "user/repo", {"README.md": b"card", "x.safetensors": adapter, "model.bin": b"pickle", "x.py": b"code"}
    )
    repo.refs["v1"] = repo.refs["main"]
    first = shown(uhl("inspect", "user/repo@v1", "--json"))
    assert first["file"] == "user/repo@v1"
    assert first["bytes"] == len(adapter)
    assert first["adapter"]["digest"]
    assert "snapshots" not in json.dumps(first)
    assert cached_files(tmp_path / "home") == ["x.safetensors"]
    assert {line.split("/")[-1] for line in hub.asked if "resolve" in line} == {"x.safetensors"}
    hub.asked.clear()
    assert shown(uhl("inspect", "user/repo@v1", "--json")) == first
    assert not [line for line in hub.asked if "cdn" in line], "it was fetched again"
    hub.asked.clear()
    assert shown(uhl("inspect", "user/repo@v1", "--json", "--offline")) == first
    assert hub.asked == []
    hub.faults = [Fault(".", 503)]
    assert shown(uhl("inspect", "user/repo@v1", "--json")) == first, "the cache was not used"
    assert "not in the cache" in uhl("inspect", "user/repo", "--offline").error, "only v1 was ever asked for"


def test_commands_name_what_the_user_wrote(hub, uhl_many, adapter, other, task):
    hub.add("user/repo", {"adapter.safetensors": adapter, "b.safetensors": other, "t.task.safetensors": task})
    measured, compared, verified, refused, mistaken = uhl_many(
        ["budget", "user/repo", "--json"],
        ["inspect", "user/repo", "--diff", "user/repo:b.safetensors", "--json"],
        ["inspect", "user/repo:b.safetensors", "--verify", "--json"],
        ["budget", "user/repo", "--task-file", "user/repo:t.task.safetensors"],
        ["budget", "user/repo:t.task.safetensors"],
    )
    assert (shown(measured)["adapter"], shown(measured)["file"]["bytes"]) == ("user/repo", len(adapter))
    assert not shown(compared)["comparison"]["identical"]
    assert shown(verified)["file"] == "user/repo:b.safetensors"
    assert refused.error.startswith("error: user/repo:t.task.safetensors was tuned on another adapter file")
    assert "user/repo:t.task.safetensors: this is not a uhl adapter but a uhl task file" in mistaken.error


def test_a_local_path_wins(hub, uhl, here, adapter):
    hub.add("user/repo", {"x.safetensors": b"not this"})
    (here / "user").mkdir()
    (here / "user" / "repo").write_bytes(adapter)
    assert shown(uhl("inspect", "user/repo", "--json"))["bytes"] == len(adapter)
    assert hub.asked == []


def test_a_private_and_a_gated_repository_need_the_token(hub, uhl_many, adapter):
    hub.add("user/private", {"x.safetensors": adapter}, private=True)
    hub.add("user/gated", {"x.safetensors": adapter}, gated=True)
    calls = [["inspect", "user/private", "--quiet"], ["inspect", "user/gated", "--quiet"]]
    private, gated = (each.error for each in uhl_many(*calls))
    assert "has no repository 'user/private', or it is private. Check the id; for a private repository" in private
    assert "hf auth login" in private
    assert "Access to 'user/gated' is restricted on the hub. Ask for access" in gated
    assert [each.code for each in uhl_many(*calls, HF_TOKEN=TOKEN)] == [0, 0]
    assert hub.trusted
    assert not [line for line in hub.trusted if "/cdn/" in line], "the store got the token"


SIBLINGS = '{"id": "user/%s", "sha": "0", "siblings": [{"rfilename": "x.safetensors"%s}]}'
# By repository: what fails, and what is said.
FAILURES = {
    "limited": (
        [Fault("GET /api/models/user/limited", 429, {"Retry-After": "120"})],
        "limits the number of requests, so 'user/limited' is out of reach. Run again in 120 seconds.",
    ),
    "sometime": (
        [Fault("GET /api/models/user/sometime", 429, {"Retry-After": "\x1b[31msoon" * 9})],
        "Run again in some minutes.",
    ),
    "down": (
        [Fault("GET /api/models/user/down", 500)],
        "answers with error 500 to a request for 'user/down'. Run again later.",
    ),
    "forbidden": (
        [Fault("GET /api/models/user/forbidden", 403)],
        "refuses access to 'user/forbidden'. Use a token whose owner may read it",
    ),
    "welcome": ([Fault("GET /api/models/user/welcome", 200, body=b"<html>Log in</html>")], "hub cannot be reached"),
    "list": ([Fault("GET /api/models/user/list", 200, body=b"[]")], "hub cannot be reached"),
    "head": ([Fault("HEAD /user/head", 403)], "refuses access to 'user/head'"),
    "unsized": (
        [Fault("GET /api/models/user/unsized", 200, body=(SIBLINGS % ("unsized", "")).encode())],
        "is of unknown size; no adapter file is larger than 20,000,000. Name another file",
    ),
    "large": (
        [Fault("GET /api/models/user/large", 200, body=(SIBLINGS % ("large", ', "size": 20000001')).encode())],
        "'x.safetensors' in 'user/large' is of 20,000,001 bytes; no adapter file is larger",
    ),
}
NAMES = {
    "user/none": "The hub has no repository 'user/none', or it is private. Check the id",
    "user/list@old": "The hub has no revision 'old' of 'user/list'. Pass an existing branch, tag or commit.",
    "user/list:y.safetensors": "'user/list' has no file 'y.safetensors'; it has x.safetensors. Name one of these.",
    "user/list@main:../x.safetensors": "'../x.safetensors' is no name of a file in a repository.",
    "./user/none": "there is no file user/none",
    "user/none.safetensors": "there is no file",
    "a/b/none": "there is no file a/b/none",
    "/no/such": "there is no file /no/such",
}


def test_each_failure_is_one_line_that_says_what_to_do(hub, uhl_many, adapter, tmp_path):
    for name, (faults, _) in FAILURES.items():
        hub.add(f"user/{name}", {"x.safetensors": adapter})
        hub.faults += faults
    called = uhl_many(*(["inspect", f"user/{name}"] for name in FAILURES))
    for (name, (_, words)), each in zip(FAILURES.items(), called, strict=True):
        assert words in each.error, name
        assert each.error.isprintable()
    assert cached_files(tmp_path / "home") == []
    asked = [line for line in hub.asked if "resolve" in line or "cdn" in line]
    assert asked
    assert not [line for line in asked if "head" not in line], "a file was fetched before its size was known"


def test_each_name_that_leads_nowhere_is_one_line(hub, uhl_many, adapter):
    hub.add("user/list", {"x.safetensors": adapter})
    called = uhl_many(*(["inspect", name] for name in NAMES))
    for (name, words), each in zip(NAMES.items(), called, strict=True):
        assert words in each.error, name
    assert {line for line in hub.asked if "api/models" in line} == {
        "GET /api/models/user/none",
        "GET /api/models/user/list/revision/old",
        "GET /api/models/user/list",
    }


def test_a_store_that_refuses_is_named(hub, uhl, adapter):
    hub.add("user/repo", {"x.safetensors": adapter})
    hub.faults = [Fault("/cdn/", 403)]
    assert "refuses access to 'user/repo'" in uhl("inspect", "user/repo").error


LOCATE = """
from uhl_cli.errors import HostError
from uhl_cli.host.locate import locate
for name in ("none", "old", "gated", "down", "limited", "pickles", "index"):
    try:
        locate(f"user/{name}", revision="v9" if name == "old" else None)
    except HostError as error:
        print(error)
"""


def test_hosts_have_the_same_errors(hub, here, settings):
    for name in ("old", "gated", "down", "limited"):
        hub.add(f"user/{name}", {"config.json": b"{}"}, gated=name == "gated")
    index = {"weight_map": {"x": "model.safetensors", "y": "pytorch_model.bin"}}
    pickled = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "modeling.py": b"code"}
    hub.add("user/pickles", pickled)
    hub.add("user/index", pickled | {"model.safetensors.index.json": json.dumps(index).encode()})
    hub.faults = [Fault("user/limited", 429, {"Retry-After": "9"}), Fault("user/down", 500)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings
    command = [sys.executable, "-c", LOCATE]
    done = subprocess.run(
        command, cwd=here, env=kept | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    none, old, gated, down, limited, pickles, index_of_pickles = done.stdout.splitlines()
    assert "The hub has no model 'user/none', or it is private. Check the id; for a private model run" in none
    assert "The hub has no revision 'v9' of 'user/old'" in old
    assert "Access to 'user/gated' is restricted on the hub. Ask for access on the model's page" in gated
    assert "answers with error 500 to a request for 'user/down'" in down
    assert "'user/limited' is out of reach. Run again in 9 seconds." in limited
    assert "'user/pickles' has no weights: model.safetensors is missing" in pickles
    assert "lists pytorch_model.bin, which is not loaded since it can run code. Convert them" in index_of_pickles
    fetched = {line.split("/")[-1] for line in hub.asked if "/user/pickles/" in line or "/user/index/" in line}
    assert "config.json" in fetched
    assert not {"pytorch_model.bin", "modeling.py"} & fetched


def test_a_wrong_token_is_named_and_never_printed(hub, uhl, adapter, here, settings):
    hub.add("user/repo", {"x.safetensors": adapter})
    wrong = f"{TOKEN}Not"
    for token in (wrong, f"{wrong}\tx"):
        called = uhl("inspect", "user/repo", "--debug", HF_TOKEN=token)
        assert "token" in called.err.splitlines()[-1]
        assert called.code == 1


def test_no_connection_is_one_line(uhl):
    said = uhl("inspect", "user/repo", HF_ENDPOINT="http://127.0.0.1:9").error
    assert "is not in the cache, and the hub cannot be reached" in said


def test_a_broken_transfer_goes_on_where_it_broke(hub, uhl, adapter, tmp_path):
    hub.add("user/repo", {"x.safetensors": adapter})
    hub.faults = [Fault("GET /cdn/", cut=len(adapter) // 2, times=1)]
    assert uhl("inspect", "user/repo", "--quiet").code == 0
    assert len([line for line in hub.asked if line.startswith("GET /cdn/")]) == 2
    (found,) = (tmp_path / "home").glob("hub/models--*/snapshots/*/x.safetensors")
    assert found.read_bytes() == adapter


def test_a_transfer_that_never_ends_leaves_no_file(hub, uhl, adapter, tmp_path):
    hub.add("user/repo", {"x.safetensors": adapter})
    hub.faults = [Fault("GET /cdn/", cut=0)]
    said = uhl("inspect", "user/repo").error
    assert "could not be fetched" in said
    assert "run again" in said
    assert cached_files(tmp_path / "home") == []


def test_a_damaged_file_is_refused_by_the_reader(hub, uhl_many, adapter):
    damaged = bytearray(adapter)
    damaged[-1] ^= 1
    hub.add("user/repo", {"x.safetensors": bytes(damaged), "y.safetensors": b"\x80\x04pickle"})
    flipped, foreign = uhl_many(*(["inspect", f"user/repo:{name}.safetensors"] for name in "xy"))
    assert "user/repo:x.safetensors: the digest of the content is not" in flipped.error
    assert "user/repo:y.safetensors: not a whole safetensors" in foreign.error


def test_names_in_a_strangers_repository_do_no_harm(hub, uhl_many, adapter):
    names = [
        "../../../x.safetensors",
        "/tmp/x.safetensors",
        "a\x1b]0;x\x07.safetensors",
        "b\n.safetensors",
        "c\\d.safetensors",
    ]
    hub.add("user/repo", dict.fromkeys(names, adapter) | {"README.md": b"\x1b[2Jcard"})
    hub.add(
        "user/many", {f"d/{number:05}-\u202e.safetensors": b"" for number in range(3000)} | {"\u202ea.safetensors": b""}
    )
    hub.add("user/more", {f"d/{number:05}.safetensors": b"" for number in range(3000)} | dict.fromkeys(names, b""))
    repo, many, more = (each.error for each in uhl_many(*(["inspect", f"user/{n}"] for n in ("repo", "many", "more"))))
    assert "has no .safetensors file" in repo
    assert "has no .safetensors file" in many
    assert "has 3,000 .safetensors files: d/00000.safetensors" in more
    assert "and 2,990 more. Name one, as user/more:FILE." in more
    assert not [line for line in hub.asked if "resolve" in line]


def test_an_unwritable_cache_is_named(hub, uhl, adapter, here):
    hub.add("user/repo", {"x.safetensors": adapter})
    (here / "file").touch()
    said = uhl("inspect", "user/repo", HF_HOME=str(here / "file")).error
    assert f"cannot write to the cache {here / 'file' / 'hub'}" in said
    assert "Set HF_HOME" in said


def in_layout(cache: Path, files: dict[str, bytes], *, commit: str = "c" * 40, ref: str = "main") -> None:
    """A repository in a cache of the hub's layout: blobs, snapshots of links, refs."""
    folder = cache / "models--user--repo"
    for name, data in files.items():
        link = folder / "snapshots" / commit / name
        for each in (link, folder / "blobs" / sha256(data), folder / "refs" / ref):
            each.parent.mkdir(parents=True, exist_ok=True)
        (folder / "blobs" / sha256(data)).write_bytes(data)
        link.symlink_to(os.path.relpath(folder / "blobs" / sha256(data), link.parent))
    (folder / "refs" / ref).write_text(commit)


def test_a_cache_that_others_filled_is_used(hub, uhl_many, adapter, other, tmp_path):
    cache = tmp_path / "elsewhere"
    in_layout(cache, {"x.safetensors": adapter, "README.md": b"card"})
    in_layout(cache, {"deep/y.safetensors": other, "z.safetensors": adapter}, commit="d" * 40, ref="v2")
    there = {
        "user/repo": adapter,
        f"user/repo@{'c' * 40}": adapter,
        "user/repo@v2:deep/y.safetensors": other,
    }
    absent = ["user/repo@v3", "user/repo:y.safetensors", "user/other", f"user/repo@{'e' * 40}"]
    calls = [["inspect", name, "--json"] for name in (*there, "user/repo@v2", *absent)]
    called = uhl_many(*calls, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    assert [shown(each)["bytes"] for each in called[:3]] == [len(data) for data in there.values()]
    assert "has 2 .safetensors files: deep/y.safetensors, z.safetensors" in called[3].error
    for each in called[4:]:
        assert "is not in the cache, and the hub cannot be reached or offline mode is on" in each.error
        assert "without offline mode" in each.error
    assert hub.asked == []
