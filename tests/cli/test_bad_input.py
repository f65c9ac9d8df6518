"""Every bad input: an exit code, one line that says what and what next, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_hosts
from command_runs import Workplace, call, port_arguments, pretrain_arguments, write_data
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_hosts import save_tiny_host

from uhl_cli.files import claimed


def files_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(here: Path, arguments: list[str], code: int, *words: str) -> str:
    before = files_in(here)
    called = call(*arguments)
    line = called.error
    assert called.code == code
    for word in words:
        assert word in line
    assert files_in(here) == before
    return line


def damaged(place: Workplace, here: Path, damage: str) -> Path:
    path = here / "adapter.safetensors"
    data = place.adapter.read_bytes()
    if damage == "missing":
        return path
    if damage == "folder":
        path.mkdir()
    elif damage == "not ours":
        shutil.copy(place.host / "model.safetensors", path)
    elif damage == "newer":
        with safe_open(place.adapter, framework="numpy") as file:
            manifest = json.loads(file.metadata()["uhl"])
        manifest["format_version"] = "3.0"
        save_file(load_file(place.adapter), path, metadata={"uhl": json.dumps(manifest)})
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "text": b"once upon a time"}[damage])
    return path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "there is no file"),
        ("empty", "not a whole safetensors file"),
        ("half", "not a whole safetensors file"),
        ("text", "not a whole safetensors file"),
        ("folder", "is a folder"),
        ("not ours", "not a uhl adapter"),
        ("newer", "pip install --upgrade"),
    ],
)
def test_adapter_file(place, here, damage, words):
    adapter = damaged(place, here, damage)
    refused(here, port_arguments(adapter, place.target, place.data), 1, words, str(adapter))


def broken_host(place: Workplace, here: Path, damage: str) -> str:
    if damage == "hub id":
        return "org/not-cached"
    folder = here / "target"
    if damage == "missing":
        return str(folder)
    shutil.copytree(place.target, folder)
    if damage == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "unknown family":
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "no-such-type"}
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "no folder"),
        ("hub id", "not in the cache"),
        ("no tokenizer", "tokenizer.json"),
        ("no weights", "model.safetensors is missing"),
        ("unknown family", "'no-such-type'"),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "port"])
def test_host(place, here, damage, words, command):
    host = broken_host(place, here, damage)
    if command == "port":
        arguments = [*port_arguments(place.adapter, host, place.data), "--output", "new/ported"]
    else:
        arguments = pretrain_arguments(host, place.data, "new/out.safetensors")
    refused(here, arguments, 1, words)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "is empty"),
        ("sentence\tlabel\n", "no rows"),
        ("sentence\tlabel\na\tx\nb\ty\nc\tz\n", "known are negative, positive"),
        ("sentence\tlabel\na\t0\nb\t1\nc\t2\n", "known are negative, positive"),
        ("sentence\tlabel\na\t0.5\nb\t1.5\n", "decimal numbers"),
        ("words\tlabel\na\t0\n", "--text-column"),
        ("sentence\ttruth\na\t0\n", "--label-column"),
        ("sentence\tlabel\na\t0\textra\n", "line 2"),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "port"])
def test_data(place, here, rows, words, command):
    data = write_data(here / "data")
    for name in ("train", "dev"):
        (data / f"{name}.tsv").write_text(rows)
    if command == "port":
        arguments = port_arguments(place.adapter, place.target, data)
    else:
        arguments = pretrain_arguments(place.host, data, "out.safetensors")
    refused(here, arguments, 1, words)


@pytest.mark.parametrize("path", ["/no/such/folder", "data.tsv", "./data"])
def test_data_that_is_not_there(place, here, path):
    refused(here, port_arguments(place.adapter, place.target, path), 1, "no file or folder")
    refused(here, pretrain_arguments(place.host, path, "out.safetensors"), 1, "no file or folder")


def test_data_of_the_other_kind(place, here):
    refused(here, port_arguments(place.tagger, place.target, place.data), 1, "no column", "sentence, label")
    refused(here, port_arguments(place.adapter, place.target, place.conll), 1, "no column", "tokens, tags")
    words = ("the data labels whole texts, the adapter words",)
    refused(here, [*port_arguments(place.tagger, place.target, place.data), "--task", "sst2"], 1, *words)


@pytest.mark.parametrize("command", ["pretrain", "port"])
def test_host_too_short_for_the_anchors(place, here, monkeypatch, command):
    monkeypatch.setattr(tiny_hosts, "MAX_POSITIONS", 8)
    short = save_tiny_host(here / "short", "bert")
    if command == "port":
        arguments = port_arguments(place.adapter, short, place.data)
    else:
        arguments = pretrain_arguments(short, place.data, "out.safetensors")
    refused(here, arguments, 1, "anchor words", "longest input")


def test_evaluation_text_longer_than_the_host_takes_is_cut_and_said(place, here):
    data = write_data(here / "data")
    (data / "dev.tsv").write_text("sentence\tlabel\n" + "word and " * 300 + "\t1\nshort\t0\n")
    called = call(*port_arguments(place.adapter, place.target, data), "--json")
    assert called.code == 0
    assert json.loads(called.out)["truncated"] == 1
    assert json.loads(called.out)["scores"]["ported"]["examples"] == 2
    warnings = [line for line in called.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "evaluation texts cut at the longest input: 1;" in warnings[0]


OUT_OF_RANGE = [
    ("pretrain", "--batch-size", "0"),
    ("pretrain", "--noise", "-1"),
    ("pretrain", "--update-noise", "-0.5"),
    ("pretrain", "--epochs", "0"),
    ("pretrain", "--max-steps", "0"),
    ("pretrain", "--learning-rate", "0"),
    ("pretrain", "--learning-rate", "nan"),
    ("pretrain", "--max-flops", "0"),
    ("pretrain", "--max-flops", "inf"),
    ("pretrain", "--num-anchors", "3"),
    ("pretrain", "--max-length", "3"),
    ("pretrain", "--save-every", "0"),
    ("pretrain", "--seed", "-1"),
    ("port", "--batch-size", "0"),
    ("port", "--limit-evaluation", "0"),
    ("tune", "--steps", "0"),
    ("demo", "--tune-steps", "0"),
    ("budget", "--max-bytes", "0"),
]


@pytest.mark.parametrize(("command", "option", "value"), OUT_OF_RANGE)
def test_number_out_of_range_names_its_option(here, command, option, value):
    needed = {"port": ["a", "--target", "x"], "tune": ["a", "--target", "x"], "budget": ["a"]}
    line = refused(here, [command, *needed.get(command, []), option, value], 2)
    assert line.startswith(f"error: {option}: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["port"],
        ["port", "a.safetensors"],
        ["pretrain", "--batch-size", "many"],
        ["tune", "a.safetensors"],
        ["port", "a.safetensors", "--target", "x", "--align", "magic"],
        ["port", "a.safetensors", "--target", "x", "--no-such-option"],
        ["fly"],
    ],
)
def test_wrong_usage_is_exit_code_2(here, arguments):
    called = call(*arguments)
    assert called.code == 2
    assert called.out == ""
    assert "Traceback" not in called.err
    assert "Error" in called.err
    assert files_in(here) == {}


@pytest.mark.parametrize(
    ("command", "more"),
    [("port", ["--target", "x"]), ("tune", ["--target", "x"]), ("inspect", []), ("budget", [])],
)
def test_no_adapter_named_and_none_in_the_folder(here, command, more):
    line = refused(here, [command, *more], 2, "there is no adapter.safetensors in this folder", "`uhl pretrain`")
    assert f"`uhl {command} FILE`" in line


def test_the_adapter_of_the_folder_is_taken(place, here):
    shutil.copy(place.adapter, here / "adapter.safetensors")
    on = ["--target", str(place.target), "--data", str(place.data), "--max-flops", "1000", "--device", "cpu"]
    for command, more in (
        ("inspect", []),
        ("budget", []),
        ("port", on),
        ("tune", [*on, "--steps", "1", "--batch-size", "4"]),
    ):
        given = ["adapter.safetensors", *more, "--quiet"]
        bare = call(command, *given[1:], *(["--overwrite"] if command == "tune" else []))
        assert (bare.code, bare.err) == (0, "")
        assert bare == call(command, *given, *(["--overwrite"] if command == "tune" else []))


def test_unusable_device(place, here):
    arguments = [*pretrain_arguments(place.host, place.data, "out.safetensors"), "--device", "toaster"]
    refused(here, arguments, 2, "'toaster'")


def test_budgets_are_refused_before_training(place, here):
    arguments = pretrain_arguments(place.host, place.data, "out.safetensors")
    refused(here, [*arguments, "--max-bytes", "1000"], 3, "the limit is 1,000", "--max-bytes")
    refused(here, [*arguments, "--max-flops", "1"], 3, "FLOPs", "--max-flops")
    refused(here, [*port_arguments(place.adapter, place.target, place.data), "--max-flops", "1"], 3, "--max-flops")


def test_number_of_anchors_that_the_message_names_works(place, here):
    arguments = [*pretrain_arguments(place.host, place.data, "out.safetensors"), "--max-bytes", "180000"]
    arguments[arguments.index("--num-anchors") + 1] = "200"
    line = refused(here, arguments, 3, "--num-anchors")
    arguments[arguments.index("--num-anchors") + 1] = line.rstrip(".").rsplit(" ", 1)[1]
    assert call(*arguments).code == 0
    assert (here / "out.safetensors").stat().st_size <= 180_000


def test_missing_anchor_file(place, here):
    arguments = [*pretrain_arguments(place.host, place.data, "out.safetensors"), "--anchors", "texts.txt"]
    refused(here, arguments, 1, "texts.txt", "--anchors general")


@pytest.mark.parametrize("output", ["file/out.safetensors", "file/deep/out.safetensors", "folder"])
def test_output_that_cannot_be_written_is_noticed_before_the_host_is_loaded(place, here, monkeypatch, output):
    (here / "file").write_text("precious")
    (here / "folder").mkdir()
    monkeypatch.setattr("uhl_cli.commands.pretrain.load", lambda _: pytest.fail("the host was loaded"))
    arguments = [*pretrain_arguments(place.host, place.data, output), "--overwrite"]
    refused(here, arguments, 1, "--output")


def test_folder_of_a_ported_adapter_that_cannot_be_made(place, here, monkeypatch):
    (here / "file").write_text("precious")
    monkeypatch.setattr("uhl_cli.commands.port.load", lambda *_, **__: pytest.fail("the host was loaded"))
    for output in ("file", "file/deep"):
        arguments = [*port_arguments(place.adapter, place.target, place.data), "--output", output]
        refused(here, arguments, 1, "--output")


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
def test_folder_without_permission(place, here):
    (here / "closed").mkdir(mode=0o500)
    arguments = pretrain_arguments(place.host, place.data, "closed/out.safetensors")
    refused(here, arguments, 1, "cannot write to closed")


def full_disk(_handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_no_half_file_and_the_old_one(place, here, monkeypatch):
    (here / "out.safetensors").write_text("precious")
    monkeypatch.setattr("uhl_cli.files.os.fsync", full_disk)
    called = call(*pretrain_arguments(place.host, place.data, "out.safetensors"), "--overwrite")
    assert called.code == 1
    assert "No space left" in called.error
    assert (here / "out.safetensors").read_text() == "precious"
    called = call(*port_arguments(place.adapter, place.target, place.data), "--output", "ported")
    assert called.code == 1
    assert "No space left" in called.error
    assert sorted(path.name for path in here.rglob("*") if path.is_file()) == ["log.jsonl", "out.safetensors"]


def test_debug_shows_the_traceback_and_the_same_line(place, here):
    arguments = port_arguments("missing.safetensors", place.target, place.data)
    plain, debugged = call(*arguments), call(*arguments, "--debug")
    assert "Traceback" not in plain.err
    assert debugged.code == plain.code == 1
    assert "Traceback" in debugged.err
    assert debugged.err.splitlines()[-1] == plain.error


@pytest.mark.parametrize("command", ["pretrain", "port"])
def test_interrupt_is_exit_code_130(place, here, monkeypatch, command):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"uhl_cli.commands.{command}.load", interrupt)
    if command == "port":
        called = call(*port_arguments(place.adapter, place.target, place.data))
    else:
        called = call(*pretrain_arguments(place.host, place.data, "new/out.safetensors"))
    assert called.code == 130
    assert called.error.startswith("error: interrupted.")
    assert "--resume" not in called.error  # there is no checkpoint yet
    assert files_in(here) == {}


@pytest.mark.parametrize("command", ["pretrain", "port", "port into", "export", "predict"])
def test_a_pipe_is_never_replaced(place, here, command):
    """Nor is a device: with --overwrite too."""
    os.mkfifo(here / "pipe.csv")
    arguments = {
        "pretrain": pretrain_arguments(place.host, place.data, "pipe.csv"),
        "port": [*port_arguments(place.adapter, place.target, place.data), "--output", "pipe.csv"],
        "port into": [*port_arguments(place.adapter, place.target, place.data), "--output", "folder"],
        "export": ["export", str(place.adapter), "--target", str(place.target), "--output", "pipe.csv"],
        "predict": ["predict", str(place.adapter), "--target", str(place.target), "x", "--output", "pipe.csv"],
    }[command]
    if command == "port into":
        (here / "folder").mkdir()
        (here / "pipe.csv").rename(here / "folder" / "ported.safetensors")
    called = call(*arguments, "--overwrite")
    assert called.code == 1
    said = ("error: cannot write to", "error: folder/ported.safetensors is not", "error: pipe.csv")
    assert called.error.startswith(said)
    (left,) = [path for path in here.rglob("*") if not path.is_dir()]
    assert left.is_fifo()


@pytest.mark.parametrize("command", ["pretrain", "port", "export", "predict", "tune"])
def test_a_second_run_of_one_output_is_refused_by_name(place, here, command):
    data, name = str(place.data), "out.csv" if command == "predict" else "out"
    arguments = {
        "pretrain": pretrain_arguments(place.host, place.data, name),
        "port": [*port_arguments(place.adapter, place.target, place.data), "--output", name],
        "export": ["export", str(place.adapter), "--target", str(place.target), "--output", name],
        "predict": ["predict", str(place.adapter), "--target", str(place.target), "x", "--output", name],
        "tune": ["tune", str(place.adapter), "--target", str(place.target), "--data", data, "--output", name],
    }[command]
    with claimed(here / name / "ported.safetensors" if command == "port" else here / name):
        refused(here, [*arguments, "--overwrite"], 1, "another run is writing", name)
