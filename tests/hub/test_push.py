"""`uhl push`: what becomes public is said first, file and card go up in one commit, and each failure is one line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import ROOT
from hub.server import TOKEN, Fault
from huggingface_hub import ModelCard

pytestmark = pytest.mark.integration


@pytest.fixture
def file(here, adapter) -> Path:
    path = here / "adapter.safetensors"
    path.write_bytes(adapter)
    return path


def shown(called) -> dict:
    assert called.code == 0, called.err
    return json.loads(called.out)


def refused(called) -> str:
    """The error line, after the one that says what becomes public."""
    assert called.code == 1
    warning, *lines = called.err.splitlines()
    assert warning.startswith("warning: adapter.safetensors makes training texts public: ")
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(".")
    return lines[0]


def pushed(uhl, *arguments: str | Path, token: str = TOKEN, **env: str):
    return uhl("push", *arguments, HF_TOKEN=token, **env)


def test_a_dry_run_prints_the_card_and_touches_no_network(hub, uhl, file, adapter):
    called = uhl("push", file, "user/repo", "--dry-run", "--language", "en", "--license", "mit")
    assert called.code == 0
    assert called.out.startswith("---\nlibrary_name: uhl\n")
    assert "license: mit\nlanguage:\n- en\n" in called.out
    assert "nothing was uploaded: --dry-run" in called.out
    assert called.err.startswith("warning: adapter.safetensors makes training texts public: ")
    assert len(called.err.splitlines()) == 1
    found = shown(uhl("push", file, "user/repo", "--dry-run", "--json"))
    assert (found["url"], found["commit"], found["changed"]) == (None, None, False)
    assert found["files"]["adapter.safetensors"] == len(adapter)
    assert found["texts"]["anchor texts"] > 0
    assert hub.asked == []


def test_texts_become_public_only_when_somebody_agrees(hub, uhl, file):
    called = pushed(uhl, file, "user/repo")
    assert called.code == 2
    for part in ("anchor texts", "feature texts", "transfer texts"):
        assert part in called.error
    assert called.error.endswith("Nothing was uploaded; add --yes to agree.")
    assert hub.asked == []


def answered(file: Path, settings: dict[str, str], answer: bytes) -> tuple[int, str]:
    """Exit code and what stood on the terminal where somebody answers."""
    ours, theirs = pty.openpty()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = kept | settings | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    command = [sys.executable, "-m", "uhl_cli", "push", str(file), "user/repo", "--quiet"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs, env=env) as process:
        os.close(theirs)
        os.write(ours, answer)
        said = b""
        while True:
            try:
                read = os.read(ours, 4096)
            except OSError:
                break
            if not read:
                break
            said += read
        code = process.wait(60)
    os.close(ours)
    return code, said.decode()


def test_a_terminal_asks(hub, file, settings):
    code, said = answered(file, settings, b"n\n")
    assert (code, hub.repos) == (2, {})
    assert "Upload to user/repo? [y/N]" in said
    assert "anchor texts" in said
    code, said = answered(file, settings, b"y\n")
    assert code == 0, said
    assert "adapter.safetensors" in hub.repos["user/repo"].files()


def test_file_and_card_go_up_in_one_commit(hub, uhl, file, adapter, here):
    called = pushed(uhl, file, "user/repo", "--yes", "--json", "--license", "apache-2.0", "--message", "First of all")
    found = shown(called)
    assert called.err.count("\n") == 1
    assert "makes training texts public" in called.err
    repo = hub.repos["user/repo"]
    assert repo.messages == ["", "First of all"]
    files = repo.files()
    assert files["adapter.safetensors"] == adapter
    assert files["README.md"].decode() == found["card"]
    assert ModelCard(files["README.md"].decode()).data.license == "apache-2.0"
    assert (found["url"], found["commit"]) == (f"{hub.endpoint}/user/repo", repo.refs["main"])
    assert (found["changed"], found["private"]) == (True, False)
    assert not [line for line in hub.trusted if "/store/" in line], "the store got the token"

    hub.asked.clear()
    again = pushed(uhl, file, "user/repo", "--yes", "--license", "apache-2.0")
    assert again.code == 0
    assert "nothing to upload" in again.out
    assert len(repo.messages) == 2
    assert not [line for line in hub.asked if "commit" in line or "store" in line]

    card = b"---\nlicense: mit\n---\nMine.\n"
    repo.commit({"README.md": card})
    assert "'user/repo' has another README.md. Add --overwrite" in refused(pushed(uhl, file, "user/repo", "--yes"))
    assert repo.files()["README.md"] == card
    (here / "b.safetensors").write_bytes(adapter)
    assert (
        pushed(uhl, here / "b.safetensors", "user/repo", "--yes", "--no-card", "-q").out
        == f"{hub.endpoint}/user/repo\n"
    )
    assert repo.files()["README.md"] == card
    assert repo.files()["b.safetensors"] == adapter
    assert pushed(uhl, file, "user/repo", "--yes", "--overwrite", "--quiet").code == 0
    assert repo.files()["README.md"] != card


def test_a_task_file_has_no_text_to_agree_to(hub, uhl, here, task):
    (here / "t.task.safetensors").write_bytes(task)
    called = pushed(uhl, here / "t.task.safetensors", "user/repo", "--revision", "feature/x", "--private")
    assert (called.code, called.err) == (0, "")
    repo = hub.repos["user/repo"]
    assert repo.private
    assert set(repo.refs) == {"main", "feature/x"}
    assert "t.task.safetensors" not in repo.files()
    assert repo.files("feature/x")["t.task.safetensors"] == task


def test_private_is_never_public(hub, uhl, file):
    hub.add("user/repo", {})
    said = refused(pushed(uhl, file, "user/repo", "--yes", "--private"))
    assert "'user/repo' exists and is public. Leave out --private" in said
    assert len(hub.repos["user/repo"].messages) == 1


# By repository: what fails, and what is said.
FAILURES = {
    "user/limited": (
        Fault("POST /api/repos/create", 429, {"Retry-After": "60"}, times=1),
        "limits the number of requests, so 'user/limited' is out of reach. Run again in 60 seconds.",
    ),
    "other/repo": (None, "refuses access to 'other/repo'. Use a token whose owner may write to it"),
    "user/store": (Fault("PUT", 403, times=1), "refuses access to 'user/store'"),
    "user/batch": (Fault("/user/batch.git", 200, body=b"[]", times=1), "'user/batch' could not be written: "),
    "user/down": (Fault("/user/down/commit/", 500, times=1), "answers with error 500 to a request for 'user/down'"),
    "user/meanwhile": (Fault("/user/meanwhile/commit/", 412, times=1), "'user/meanwhile' changed during the upload"),
}


def test_each_failure_is_one_line_and_leaves_no_file(hub, uhl_many, file):
    hub.faults = [fault for fault, _ in FAILURES.values() if fault is not None]
    calls = [["push", file, repo, "--yes"] for repo in FAILURES]
    for (repo, (_, words)), each in zip(FAILURES.items(), uhl_many(*calls, HF_TOKEN=TOKEN), strict=True):
        assert words in refused(each), repo
    assert len(hub.repos) == 4, "a repository where none may be made"
    assert all("adapter.safetensors" not in each.files() for each in hub.repos.values())
    again = uhl_many(*calls, HF_TOKEN=TOKEN)
    assert [each.code for each in again] == [int(repo == "other/repo") for repo in FAILURES]


def test_without_a_valid_token_nothing_goes_up(hub, uhl, file):
    for token, words in (
        ("", "The hub asks for a token for 'user/repo'. Run `hf auth login` or set HF_TOKEN."),
        (f"{TOKEN}x", "The hub refuses the token for 'user/repo'. Check HF_TOKEN, or run `hf auth login` again."),
    ):
        assert words in refused(pushed(uhl, file, "user/repo", "--yes", token=token))
    assert hub.repos == {}


def test_the_hub_may_refuse_the_card(hub, uhl, file):
    said = refused(pushed(uhl, file, "user/repo", "--yes", "--license", "no-such"))
    assert "The hub refuses the model card for 'user/repo': " in said
    assert '"license" must be one of' in said


def test_names_that_are_none_and_files_that_are_none_reach_no_network(hub, uhl_many, file, here):
    repos = ["repo", "a/b/c", "user/re--po", "../repo", "user/repo\x1b[31m"]
    (here / "damaged.safetensors").write_bytes(file.read_bytes()[:-1])
    others = {
        "no name of a branch": [file, "user/repo", "--revision", "../x"],
        "there is no file": ["none.safetensors", "user/repo"],
        "--license has no effect here": [file, "user/repo", "--no-card", "--license", "mit"],
        "not a whole safetensors file": ["damaged.safetensors", "user/repo", "--yes"],
    }
    calls = [["push", file, repo, "--yes"] for repo in repos] + [["push", *words] for words in others.values()]
    called = uhl_many(*calls, HF_TOKEN=TOKEN)
    for each in called[: len(repos)]:
        assert "is no id of a repository. Pass one as user/name." in each.error
        assert each.error.isprintable()
    for words, each in zip(others, called[len(repos) :], strict=True):
        assert words in each.error
    assert hub.asked == []


SCRIPT = """
import sys
from uhl_cli import UniversalAdapter
from uhl_cli.errors import UhlError

adapter = UniversalAdapter.load("adapter.safetensors")
try:
    adapter.push_to_hub("user/repo")
except UhlError as error:
    assert "share_texts=True" in str(error), error
else:
    raise AssertionError
url = adapter.push_to_hub("user/repo", commit_message="By hand", share_texts=True, license="mit", language="en")
again = UniversalAdapter.from_pretrained("user/repo")
assert again.digest == adapter.digest
for how in ({"filename": "adapter.safetensors"}, {"revision": "main"}, {"local_files_only": True}):
    assert UniversalAdapter.from_pretrained("user/repo", **how).digest == adapter.digest
assert UniversalAdapter.from_pretrained("adapter.safetensors").digest == adapter.digest
twice = {"revision": "main"}
for name, how in (("user/repo@v9", {}), ("user/none", {}), ("./user/repo", {}), ("user/repo@main", twice)):
    try:
        UniversalAdapter.from_pretrained(name, **how)
    except UhlError as error:
        print(error)
    else:
        raise AssertionError(name)
print(url)
"""


def test_python_pushes_and_loads(hub, here, settings, file, adapter):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = kept | settings | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=here, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    revision, none, path, twice, url = done.stdout.splitlines()
    assert "The hub has no revision 'v9' of 'user/repo'" in revision
    assert "The hub has no repository 'user/none'" in none
    assert "there is no file" in path
    assert "Name it once" in twice
    assert url == f"{hub.endpoint}/user/repo"
    repo = hub.repos["user/repo"]
    assert repo.messages == ["", "By hand"]
    assert repo.files()["adapter.safetensors"] == adapter, "the file's bytes changed on the way"
    assert ModelCard(repo.files()["README.md"].decode()).data.language == ["en"]
