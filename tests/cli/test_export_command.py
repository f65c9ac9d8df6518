"""`uhl export` as a new user calls it: what it prints, and that a wrong call is one line and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_runs import Called, Workplace, call, pretrain_arguments, start
from tiny_hosts import SENTENCES, save_tiny_host

WIDE = {"COLUMNS": "200"}


def arguments(place: Workplace, output: Path | str, *more: str | Path) -> list[str | Path]:
    """Three steps on a tiny decoder that lacks a padding token."""
    host = place.host.with_name("llama")
    if not host.exists():
        save_tiny_host(host, "llama", hidden_size=48, seed=1)
        path = host / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    given: list[str | Path] = ["export", place.adapter, "--target", host, "--output", output, "--steps", "3"]
    given += ["--batch-size", "4", "--rank", "2", "--max-flops", "1000", "--device", "cpu", "--offline"]
    return [*given, *more]


@pytest.fixture(scope="module")
def merged(place, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("export") / "folder"
    called = call(*arguments(place, output, "--data", place.data, "--json"))
    assert called.code == 0, called.err
    return output, json.loads(called.out)


def test_the_report_says_what_was_made(merged):
    output, report = merged
    assert (report["output"], report["format"], report["steps"]) == (str(output), "merged", 3)
    assert set(report["scores"]) == {"zero_shot", "export"}
    assert report["gains"]["zero_shot"]["value"] == pytest.approx(
        report["scores"]["export"]["value"] - report["scores"]["zero_shot"]["value"]
    )
    assert report["files"]["model.safetensors"] == (output / "model.safetensors").stat().st_size
    assert not list(output.parent.glob(".*")), "something is left behind"


def test_the_table_and_the_quiet_line(place, here):
    called = call(*arguments(place, "peft", "--data", place.data, "--format", "peft", "--dtype", "bfloat16"), env=WIDE)
    assert called.code == 0, called.err
    for words in (
        "a peft LoRA learnt from transfer set: the source with the adapter; labels: data/train.tsv",
        "ported, zero-shot: accuracy, 12 examples",
        "the export: accuracy, 12 examples",
        "bytes of adapter_model.safetensors",
        "predictions that move in bfloat16",
    ):
        assert words in called.out
    assert f"base: {place.host.with_name('llama')}" in called.out
    assert "README.md in peft" in called.err, "nothing says that the base lacks a padding token"
    quiet = call(*arguments(place, "merged", "--data", place.data, "--quiet"))
    assert quiet == Called(0, "merged\n", "")


def test_texts_of_the_users_own(place, here):
    Path("texts.txt").write_text("\n".join(SENTENCES))
    called = call(*arguments(place, "out", "--texts", "texts.txt", "--json"))
    assert called.code == 0, called.err
    report = json.loads(called.out)
    assert report["scores"] == {}
    assert set(report["agreement"]) == {"zero_shot", "export"}


@pytest.mark.parametrize(
    ("more", "code", "match"),
    [
        (["--texts", "nowhere.txt"], 1, "Cannot read nowhere.txt: "),
        (["--format", "onnx"], 2, "onnx"),
        (["--dtype", "int8"], 2, "int8"),
        (["--base", "x"], 2, "--base has no effect"),
        (["--rank", "0"], 2, "--rank"),
        (["--format", "peft", "--base", ""], 2, "--base"),
        (["--format", "peft", "--base", "a\nb"], 2, "--base"),
        (["--format", "peft", "--base", "x" * 5000], 2, "--base"),
        (["--output", "."], 1, ". cannot be an output"),
        (["--output", "/"], 1, "/ cannot be an output"),
        (["--output", "\udcff"], 1, "is not UTF-8. Choose another --output"),
        (["--task-file", "nothing"], 1, "nothing"),
        (["--data", "nowhere.tsv"], 1, "nowhere.tsv"),
        (["--data", "labels.tsv"], 1, "known are"),
        (["--task", "conll2003", "--data", "tagged.conll"], 1, ""),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(more, code, match, place, here):
    Path("labels.tsv").write_text("text\tlabel\n" + "".join(f"a{row}\t{'xyz'[row % 3]}\n" for row in range(12)))
    Path("tagged.conll").write_text((place.conll / "train.conll").read_text())
    called = call(*arguments(place, "out", *more))
    assert called.code == code
    assert match in (called.err if code == 2 and "Usage" in called.err else called.error)
    assert not list(here.glob("*out*"))
    assert not list(here.glob(".*"))


def test_a_file_without_a_transfer_set_says_what_to_give(place, here):
    made = call(*pretrain_arguments(place.host, place.data, "bare"), "--transfer-set", "0", "--quiet")
    assert made.code == 0, made.err
    error = call("export", "bare", *arguments(place, "out")[2:]).error
    assert "bare has no transfer set for sst2 to learn from" in error
    assert "--texts" in error
    assert not list(here.glob("*out*"))


def test_a_folder_that_is_there_is_kept(place, here, merged):
    output, _ = merged
    assert "already exists" in call(*arguments(place, output, "--data", place.data)).error
    Path("mine").mkdir()
    Path("mine/words.txt").write_text("words")
    error = call(*arguments(place, "mine", "--data", place.data, "--overwrite")).error
    assert "not an export of uhl" in error
    assert Path("mine/words.txt").read_text() == "words"
    missing = call("export", "nowhere.safetensors", "--target", place.target, "--output", "out")
    assert "nowhere.safetensors" in missing.error
    no_target = call("export", place.adapter, "--output", "out")
    assert no_target.code == 2


def test_an_export_that_was_moved_takes_its_base_along(place, here):
    made = call(*arguments(place, "made", "--data", place.data, "--format", "peft", "--base", "copy", "--quiet"))
    assert made.code == 0, made.err
    before = call("predict", "made", "a fine film", "--device", "cpu")
    Path("made").rename("moved")
    assert call("predict", "moved", "a fine film", "--device", "cpu") == before
    assert before.code == 0
    Path("moved/base").rename("base")
    assert "There is no folder" in call("predict", "moved", "a fine film").error


def test_other_commands_say_what_an_export_is(merged):
    output, _ = merged
    for name in ("budget", "inspect"):
        assert "It holds a model, which `uhl predict` takes" in call(name, output).error


@pytest.mark.integration
def test_a_process_of_its_own(place, here):
    called = start(*arguments(place, "out", "--data", place.data, "--quiet"), cwd=here)
    assert called == Called(0, "out\n", "")
