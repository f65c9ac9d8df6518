"""What is printed where: nobody's string is markup or a command to the terminal, and a stream may be closed or full."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runs import ROOT, Called, call, port_arguments, write_data
from file_damage import rebuilt
from rich.errors import MarkupError
from rich.text import Text
from tiny_hosts import save_rebuilt_host, save_tiny_host

from uhl_cli.cli.output import Output
from uhl_cli.formats.adapter import read_adapter, write_adapter
from uhl_cli.formats.container import ADAPTER
from uhl_cli.host.checkpoint import load_host
from uhl_cli.metrics import Difference, Score
from uhl_cli.progress import progress_bar
from uhl_cli.reports import ExportReport

# Markup that is not opened, two kinds of escape, a bidirectional override, and every kind of line break.
HOSTILE = "x [/red] y\x1b[2J\x9b31m\u202egnp\r\nerror: z\u2028\t."
SEEN = "x [/red] y?[2J?31m?gnp error: z ."


def harmless(called: Called) -> bool:
    """Whether nothing but printable lines was printed."""
    return all(letter.isprintable() or letter in "\n\t" for letter in called.out + called.err)


def test_the_string_would_do_harm():
    """What the tests below would find if a string were printed as it is."""
    assert not harmless(Called(0, HOSTILE, ""))
    with pytest.raises(MarkupError):
        Text.from_markup(HOSTILE)


@pytest.fixture
def hostile(place, here) -> Path:
    """An adapter of which every free text is hostile."""
    content = read_adapter(place.adapter)
    manifest = content.manifest
    task = manifest.task.model_copy(update={"name": HOSTILE, "labels": (HOSTILE, "positive")})
    source = manifest.source.model_copy(update={"name": HOSTILE, "revision": HOSTILE})
    training = manifest.training.model_copy(update={"command": HOSTILE, "data": HOSTILE})
    versions = {HOSTILE: HOSTILE}
    anchors = manifest.anchors.model_copy(update={"origin": HOSTILE})
    changes = {"task": task, "source": source, "training": training, "versions": versions, "anchors": anchors}
    write_adapter(
        here / "a.safetensors", replace(content, manifest=manifest.model_copy(update={**changes, "licence": HOSTILE}))
    )
    return Path("a.safetensors")


@pytest.fixture
def labelled(here) -> Path:
    """Data in the hostile adapter's labels."""
    folder = write_data(here / "data")
    for path in folder.glob("*.tsv"):
        _, *rows = path.read_text().splitlines()
        names = {"0": json.dumps(HOSTILE), "1": '"positive"'}
        lines = [
            json.dumps({"sentence": text})[:-1] + f', "label": {names[label]}}}'
            for text, label in (row.split("\t") for row in rows)
        ]
        path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
        path.unlink()
    return folder


@pytest.fixture
def target(here) -> Path:
    """A host in a folder of a hostile name."""
    return save_tiny_host(here / HOSTILE.replace("/", "|"), "gpt2", hidden_size=48)


ON_HOST = ["--max-flops", "1000", "--device", "cpu", "--offline"]
COLUMNS = ["--text-column", "sentence", "--label-column", "label"]


@pytest.mark.parametrize("form", [[], ["--anchors"], ["--quiet"], ["--verify"], ["--diff"]])
def test_inspect(form, hostile, place):
    form = [*form, str(place.tagger)] if form == ["--diff"] else form
    called = call("inspect", hostile, *form)
    assert called.code in (0, 1)
    assert harmless(called)
    if form in ([], ["--anchors"]):
        assert called.out.count(SEEN) >= 8


def test_inspect_lists_a_part_that_does_not_belong(place, here):
    data = place.adapter.read_bytes()
    (here / "a.safetensors").write_bytes(rebuilt(ADAPTER, data, **{HOSTILE: np.zeros(3, np.int8)}))
    for form in ([], ["--verify"]):
        called = call("inspect", "a.safetensors", *form)
        assert called.code == 1
        assert harmless(called)
        assert "[/red]" in called.out + called.err


def test_port_and_budget(hostile, labelled, target):
    given = ["--target", target, "--data", labelled, *COLUMNS, *ON_HOST]
    called = call("port", hostile, *given)
    assert called.code == 0, called.err
    assert harmless(called)
    assert SEEN in called.out
    assert SEEN.replace("/", "|") in called.out
    called = call("port", hostile, "--target", target, *ON_HOST)
    assert harmless(called)
    called = call("budget", hostile, *given)
    assert called.code == 0, called.err
    assert harmless(called)
    assert SEEN.replace("/", "|") in called.out


def test_tune(hostile, labelled, target):
    given = ["--target", target, "--data", labelled, *COLUMNS, *ON_HOST, "--steps", "1", "--batch-size", "4"]
    called = call("tune", hostile, *given, "--output", "t.safetensors")
    assert called.code == 0, called.err
    assert harmless(called)
    assert SEEN in called.out
    called = call("inspect", "t.safetensors")
    assert called.code == 0
    assert harmless(called)


def test_predict(hostile, target, here, monkeypatch):
    (here / "in.jsonl").write_text(json.dumps({"text": HOSTILE, HOSTILE: HOSTILE}) + "\n")
    given = ["predict", hostile, "--target", target, "--input", "in.jsonl", *ON_HOST]
    called = call(*given)
    assert called.code == 0, called.err
    assert harmless(called)
    (row,) = [json.loads(line) for line in called.out.splitlines()]
    assert row["text"] == row[HOSTILE] == HOSTILE
    assert set(row) == {"text", HOSTILE, "label", f"probability_{HOSTILE}", "probability_positive"}
    for more in (["--quiet"], ["--output", "out.csv"]):
        assert harmless(call(*given, *more))
    monkeypatch.setattr("uhl_cli.cli.output._Stdout.isatty", lambda _: True)
    table = re.sub(r"\x1b\[[\d;]*m", "", call(*given, env={"COLUMNS": "300", "TERM": "xterm"}).out)  # bold and not
    assert harmless(Called(0, table, ""))
    assert table.count(SEEN) >= 2
    assert harmless(call("predict", hostile, "--target", target, "--input", HOSTILE))


def test_errors(place, here, hostile):
    """A file, a host, a column and a label that are named in an error; the traceback of one, too."""
    data = here / "d"
    data.mkdir()
    (data / "dev.jsonl").write_text(json.dumps({HOSTILE: "a", "label": HOSTILE}) + "\n")
    others = here / "others.jsonl"
    others.write_text(json.dumps({"sentence": "a", "label": "unknown"}) + "\n")
    for called in (
        call("inspect", HOSTILE),
        call("budget", HOSTILE),
        call("port", place.adapter, "--target", HOSTILE, "--offline"),
        call(*port_arguments(place.adapter, place.target, HOSTILE)),
        call(*port_arguments(place.adapter, place.target, data)),
        call(*port_arguments(place.adapter, place.target, data), "--text-column", HOSTILE),
        call(*port_arguments(place.adapter, place.target, data), "--text-column", "label"),
        call(*port_arguments(hostile, place.target, others), *COLUMNS),
        call("inspect", hostile, "--plot", HOSTILE),
    ):
        assert called.code in (1, 2)
        assert harmless(called)
        assert "?" in called.error
    assert harmless(call("inspect", HOSTILE, "--debug"))


def test_json_says_the_same_with_escapes(hostile):
    called = call("inspect", hostile, "--json")
    assert called.code == 0
    assert harmless(called)
    manifest = json.loads(called.out)["adapter"]["manifest"]
    assert manifest["licence"] == HOSTILE
    assert manifest["task"]["labels"] == [HOSTILE, "positive"]


def test_a_warning_about_wrong_results_is_printed_once_with_quiet_too(place, here):
    target = save_rebuilt_host(here / "target", "roberta")
    arguments = ("predict", place.adapter, "--target", target, "--max-flops", "1000", "--quiet", "a text")
    called, chosen = call(*arguments), call(*arguments, "--tokenizer", "file")
    assert (called.code, called.out) == (chosen.code, chosen.out)
    lines = [line for line in called.err.splitlines() if line.startswith("warning: the tokenizer class of ")]
    # Releases of transformers before 5 run tokenizer.json, so there both give the same tokens.
    assert len(lines) == (load_host(str(target), device="cpu", tokenizer="file").tokenizer_source is not None)
    assert [line for line in called.err.splitlines() if line not in lines] == chosen.err.splitlines()


@pytest.mark.parametrize(
    ("agreement", "gain", "words"),
    [
        ((0.85, 0.80), (-0.02, 0.01), ""),  # within what chance does
        ((0.85, 0.77), (-0.02, 0.01), "agreement with the teacher 0.850 before and 0.770 now; try more --steps."),
        ((0.85, 0.86), (-0.09, -0.01), "accuracy 0.900 before and 0.850 now; try more --steps."),
    ],
)
def test_a_result_that_is_worse_than_its_start_is_a_warning(agreement, gain, words, capsys):
    def record(value: float, low: float, high: float) -> dict[str, Any]:
        return {"metric": "accuracy", "value": value, "low": low, "high": high, "examples": 500}

    names = ("zero_shot", "export")
    report = ExportReport.model_construct(
        output="e1",
        agreement={
            name: Score(**record(each, each - 0.05, each + 0.05)) for name, each in zip(names, agreement, strict=True)
        },
        scores={name: Score(**record(each, 0, 1)) for name, each in zip(names, (0.9, 0.85), strict=True)},
        gains={"zero_shot": Difference(**record(-0.05, *gain))},
    )
    Output().warn_worse(report, made="export", before="zero_shot")
    said = f"warning: e1 is worse than the port that it started from: {words}\n" if words else ""
    assert capsys.readouterr().err == said


def test_the_sink_is_the_only_way_out():
    """No other file of the command line prints, or knows rich's markup."""
    for path in sorted((ROOT / "uhl_cli" / "cli").glob("*.py")):
        if path.name == "output.py":
            continue
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert "print" not in names, path
        # Help texts are ours, and typer takes them for markup.
        assert {each for each in modules if each and each.split(".")[0] in ("rich", "sys")} <= {"rich.markup"}, path


def run(*arguments: str, stdout: object = subprocess.PIPE, **more: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "uhl_cli", *arguments]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, env=environment, text=True, check=False, **more
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["budget"], 141), (["budget", "--json"], 141), (["budget", "--max-bytes", "1"], 3), (["--help"], 141)],
)
def test_a_reader_that_leaves_is_exit_code_141(place, arguments, code):
    """`uhl budget FILE | true`; an error keeps its own code."""
    reader, writer = os.pipe()
    os.close(reader)
    given = arguments if "--help" in arguments else [*arguments, str(place.adapter)]
    done = run(*given, stdout=writer)
    os.close(writer)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (1 if code == 3 else 0)
    assert "Traceback" not in done.stderr


def test_progress_and_errors_that_nobody_reads(place):
    reader, writer = os.pipe()
    os.close(reader)
    script = [sys.executable, "-m", "uhl_cli", "budget", "missing"]
    done = subprocess.run(
        script, stdout=subprocess.PIPE, stderr=writer, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["inspect", "--quiet"], ["--help"]])
def test_a_full_disk_is_one_line_and_exit_code_1(place, arguments):
    given = [*arguments, str(place.adapter)] if "--help" not in arguments else arguments
    with Path("/dev/full").open("w") as full:
        done = run(*given, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to stdout: No space left on device.")
    assert len(done.stderr.splitlines()) == 1


def test_a_stdout_that_was_closed_before_the_start(place):
    done = run("inspect", str(place.adapter), stdout=None, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


def test_an_encoding_without_the_signs(hostile, monkeypatch):
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    for form in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "uhl_cli", "inspect", str(hostile), *form],
            env=os.environ | environment,
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode("ascii")


def test_help_in_an_encoding_without_the_signs():
    """On a narrow terminal, an ellipsis cuts the help of long options."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "uhl_cli", "pretrain", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "\\u2026" in done.stdout.decode("ascii")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_progress_on_a_terminal_of_any_encoding(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding, errors="strict", write_through=True))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(quiet=False) as bar:
        bar("reading", 1, 3)
        bar("reading", 3, 3)
    assert "reading" in written.getvalue().decode(encoding)


def test_long_lines_are_not_folded_for_a_pipe(hostile, place, here):
    long = "word " * 60
    content = read_adapter(place.adapter)
    write_adapter(
        here / "b.safetensors", replace(content, manifest=content.manifest.model_copy(update={"licence": long}))
    )
    called = call("inspect", "b.safetensors", env={"COLUMNS": None})
    assert long.strip() in called.out
    narrow = call("inspect", "b.safetensors", env={"COLUMNS": "80"})
    assert long.strip() not in narrow.out, "a width that is asked for is kept"
