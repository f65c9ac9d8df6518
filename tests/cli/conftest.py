"""A folder with tiny hosts, data and an adapter made by the command itself, and a way to call the command."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.testing
from tiny_hosts import SENTENCES, save_tiny_host

from uhl_cli.cli.main import app

PROGRESS = re.compile(r"[a-z][a-z :\-]*: \d+/\d+.*")


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


def call(*arguments: str | Path, env: dict[str, str | None] | None = None) -> Called:
    """Run `uhl` in this process."""
    # Older releases of click mix the two streams unless asked not to.
    apart = "mix_stderr" in inspect.signature(typer.testing.CliRunner.__init__).parameters
    runner = typer.testing.CliRunner(mix_stderr=False) if apart else typer.testing.CliRunner()
    result = runner.invoke(app, [str(argument) for argument in arguments], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Called(result.exit_code, result.stdout, result.stderr)


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
    given += ["--max-steps", "2", "--batch-size", "4", "--num-anchors", "64", "--max-flops", "1000", "--views", "0"]
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
