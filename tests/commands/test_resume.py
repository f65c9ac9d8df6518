"""A run that is killed at a random moment and resumed ends with the same file as one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_runs import call
from safetensors import safe_open
from tiny_hosts import SENTENCES, save_tiny_host

STEPS = 60


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_tiny_host(folder / "host", "bert")
    rows = [f"{int('w' in text)}\t{text}" for text in SENTENCES]
    for name in ("train", "dev"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.tsv").write_text("label\tsentence\n" + "\n".join(rows) + "\n")
    return folder


def arguments(output: str, *more: str) -> list[str]:
    given = ["pretrain", "--host", "host", "--task", "sst2", "--data", "data", "--output", output]
    given += ["--max-steps", str(STEPS), "--batch-size", "4", "--num-anchors", "64", "--max-flops", "1000"]
    return [*given, "--save-every", "3", "--device", "cpu", "--offline", *more]


def start(workplace: Path, output: str, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "uhl_cli", *arguments(output, *more)],
        cwd=workplace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background ignores Ctrl-C, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_checkpoint(workplace: Path, output: str, process: subprocess.Popen[str]) -> None:
    checkpoint = workplace / f"{output}.uhl-run" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def finished(workplace: Path, output: str, *more: str) -> bytes:
    """The file of a run that is left alone; in this process, which need not be the one that began it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        called = call(*arguments(output, *more))
    assert called.code == 0, called.err
    return (workplace / output).read_bytes()


@pytest.fixture(scope="module")
def whole(workplace) -> bytes:
    return finished(workplace, "whole.safetensors")


def step_of(checkpoint: Path) -> int:
    """Step of a run's checkpoint, which is always a whole file; 0 before the first."""
    try:
        with safe_open(checkpoint, framework="numpy") as file:
            return json.loads(file.metadata()["uhl-checkpoint"])["step"]
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_is_the_same_file(workplace, whole):
    moments = random.Random(20)
    checkpoint = workplace / "killed.safetensors.uhl-run" / "checkpoint.safetensors"
    kills = 0
    more: tuple[str, ...] = ()
    for lowest in (1, 24):
        process = start(workplace, "killed.safetensors", *more)
        wanted = moments.randint(lowest, lowest + 12)
        while step_of(checkpoint) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        more = ("--resume",)
    assert kills == 2
    assert finished(workplace, "killed.safetensors", *more) == whole
    assert not (workplace / "killed.safetensors.uhl-run").exists()


@pytest.mark.slow
def test_interrupted_by_hand_says_how_to_go_on(workplace, whole, monkeypatch):
    process = start(workplace, "stopped.safetensors")
    wait_for_checkpoint(workplace, "stopped.safetensors", process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("error: interrupted.")
    assert "--resume" in last
    assert not (workplace / "stopped.safetensors").exists()
    assert not list(workplace.glob(".*tmp")), "a half-written file was left"
    # Not resumed and not overwritten: refused.  Resumed with other options: refused.
    monkeypatch.chdir(workplace)
    for more, words in (((), "unfinished run"), (("--resume", "--seed", "9"), "other options")):
        again = call(*arguments("stopped.safetensors", *more))
        assert again.code == 1
        assert words in again.error
    assert finished(workplace, "stopped.safetensors", "--resume") == whole
