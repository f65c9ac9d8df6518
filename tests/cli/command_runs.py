"""Calling `uhl` in this process or in its own, and small data for it."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import typer.rich_utils  # decides on colours when first imported, which may not be within a call that forces them
import typer.testing
from tiny_hosts import SENTENCES

from uhl_cli.cli.main import app

ROOT = Path(__file__).parents[2]
PROGRESS = re.compile(r"[a-z][a-z :\-]*: \d+(/\d+.*)?")


@dataclass(frozen=True)
class Called:
    """What a call left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; anything else but progress on stderr, or a traceback, fails the test."""
        lines = self.err.splitlines()
        assert self.code != 0
        assert self.out == ""
        assert lines, "nothing was said"
        assert [line for line in lines[:-1] if not PROGRESS.fullmatch(line)] == []
        assert lines[-1].startswith("error: ")
        assert lines[-1].endswith("."), f"no hint: {lines[-1]}"
        return lines[-1]


def call(*arguments: str | Path, env: dict[str, str | None] | None = None, stdin: str | bytes | None = None) -> Called:
    """Run `uhl` in this process."""
    # Older releases of click mix the two streams unless asked not to.
    apart = "mix_stderr" in inspect.signature(typer.testing.CliRunner.__init__).parameters
    runner = typer.testing.CliRunner(mix_stderr=False) if apart else typer.testing.CliRunner()
    result = runner.invoke(app, [str(argument) for argument in arguments], env=env, input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Called(result.exit_code, result.stdout, result.stderr)


def without_the_hubs_settings() -> dict[str, str]:
    """This process's environment without settings of the hub and of uhl's tests; the cache is the test's own."""
    own = ("HF_", "HUGGINGFACE", "UHL_")
    return {name: value for name, value in os.environ.items() if name == "UHL_CACHE" or not name.startswith(own)}


def start(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> Called:
    """Run `python -m uhl_cli` in a process of its own, without this process's settings of the hub."""
    kept = without_the_hubs_settings()
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    command = [sys.executable, "-m", "uhl_cli", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False, timeout=240)
    return Called(done.returncode, done.stdout, done.stderr)


_IMPORTS = """
import json, sys
for name in sys.argv[2:]:
    __import__(name)
from uhl_cli.cli.main import app
wanted = {"torch", "transformers", "datasets", "accelerate", "sklearn", "pandas", "fvcore", "numpy", "matplotlib"}
found = []
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except SystemExit as left:
        assert not left.code, (arguments, left.code)
    found.append(sorted(wanted & set(sys.modules)))
sys.stderr.write(json.dumps(found))
"""


def imported(*calls: list[str], cwd: Path, first: tuple[str, ...] = ()) -> list[set[str]]:
    """Run calls one after the other in one fresh process; which large packages were imported by the end of each.

    :param first: Modules to import before them.
    """
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS, json.dumps(calls), *first],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout
    return [set(names) for names in json.loads(done.stderr)]


def write_data(folder: Path, label: str = "label") -> Path:
    """A folder of sst2's shape: whether a sentence holds the letter w."""
    folder.mkdir(parents=True)
    rows = [f"{text}\t{int('w' in text)}" for text in SENTENCES]
    (folder / "train.tsv").write_text("\n".join([f"sentence\t{label}", *rows]) + "\n")
    (folder / "dev.tsv").write_text("\n".join([f"sentence\t{label}", *rows[:12]]) + "\n")
    return folder


def write_conll(folder: Path) -> Path:
    """A folder of sentences in CoNLL's columns; capitalised words are persons."""
    folder.mkdir(parents=True)
    blocks = ["\n".join(f"{word} {'B-PER' if word[0].isupper() else 'O'}" for word in t.split()) for t in SENTENCES]
    for name in ("train", "dev"):
        (folder / f"{name}.conll").write_text("\n\n".join(blocks) + "\n")
    return folder


def pretrain_arguments(host: Path | str, data: Path | str, output: Path | str) -> list[str]:
    """A run of two steps."""
    given = ["pretrain", "--host", str(host), "--task", "sst2", "--data", str(data), "--output", str(output)]
    given += ["--max-steps", "2", "--batch-size", "4", "--num-anchors", "64", "--max-flops", "1000"]
    return [*given, "--device", "cpu", "--offline"]


def port_arguments(adapter: Path | str, target: Path | str, data: Path | str) -> list[str]:
    """A port onto a tiny host."""
    given = ["port", str(adapter), "--target", str(target), "--data", str(data)]
    return [*given, "--max-flops", "1000", "--device", "cpu", "--offline"]


@dataclass(frozen=True)
class Workplace:
    """Paths that every test may read and none may change."""

    host: Path
    target: Path
    data: Path
    conll: Path
    adapter: Path
    tagger: Path
