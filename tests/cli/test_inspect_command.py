"""`uhl inspect`: what it prints where, its exit codes, and that it needs neither torch nor transformers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_runs import Called, call, imported, start

from uhl_cli.codes.layout import parameter_shapes
from uhl_cli.formats.adapter import read_adapter, write_adapter

BACKGROUND = re.compile(r"\x1b\[[\d;]*(?:4[0-7]|48|10[0-7])[\d;]*m")
COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": None}
WIDE = {"COLUMNS": "160"}


@pytest.fixture
def adapter(place, here) -> Path:
    path = here / "a.safetensors"
    path.write_bytes(place.adapter.read_bytes())
    return Path(path.name)


@pytest.fixture(scope="session")
def tuned(place, tmp_path_factory) -> Path:
    """A task file that `uhl tune` made for the workplace's adapter."""
    output = tmp_path_factory.mktemp("tuned") / "a.sst2.task.safetensors"
    arguments = ["tune", place.adapter, "--target", place.target, "--data", place.data, "--steps", "3", "--quiet"]
    arguments += ["--batch-size", "4", "--max-flops", "1000", "--device", "cpu", "--offline", "--output", output]
    assert call(*arguments).code == 0
    return output


def rewrite(path: Path, **changes: object) -> None:
    """The file with other manifest fields."""
    content = read_adapter(path)
    write_adapter(path, replace(content, manifest=content.manifest.model_copy(update=changes)))


def test_it_imports_neither_torch_nor_transformers(adapter, tuned, here):
    (here / tuned.name).write_bytes(tuned.read_bytes())
    forms = [[], ["--json"], ["--quiet"], ["--verify"]]
    calls = [["inspect", name, *form] for name in (str(adapter), tuned.name) for form in forms]
    calls += [["inspect", str(adapter), "--anchors"], ["inspect", str(adapter), "--diff", str(adapter)]]
    assert imported(*calls, cwd=here) == [{"numpy"}] * len(calls)
    assert imported(calls[0], cwd=here, first=("pandas",)) == [{"numpy", "pandas"}], "it would be noticed"


@pytest.mark.integration
def test_figures_bring_matplotlib_alone(adapter, here):
    pytest.importorskip("matplotlib")
    assert imported(["inspect", str(adapter), "--plot", "a.svg"], cwd=here) == [{"numpy", "matplotlib"}]


def test_tables_say_what_is_in_an_adapter(adapter, tuned, here):
    (here / tuned.name).write_bytes(tuned.read_bytes())
    called = call("inspect", adapter, env=WIDE)
    assert (called.code, called.err) == (0, "")
    size = adapter.stat().st_size
    assert re.search(rf"in all +{size:,} +100.00 %", called.out)
    manifest = read_adapter(adapter).manifest
    for words in (
        f"{size:,} bytes",
        "uhl pretrain --host",
        "closest pair",
        "mixing weights",
        "training examples",
        "licence",
        manifest.anchors.digest,
        tuned.name,
    ):
        assert words in called.out, words
    assert all(name in called.out for name in parameter_shapes(manifest.config))
    assert "\x1b" not in called.out
    plain = call("inspect", adapter, env={"COLUMNS": "80"}).out
    assert all(name in plain for name in parameter_shapes(manifest.config))
    assert max(len(line) for line in plain.splitlines() if "safetensors" not in line) <= 120


def test_tables_say_what_is_in_a_task_file(adapter, tuned, here):
    (here / tuned.name).write_bytes(tuned.read_bytes())
    called = call("inspect", tuned.name, env=WIDE)
    assert (called.code, called.err) == (0, "")
    for words in (
        "task file",
        "before tuning",
        "a.safetensors, next to it",
        "uhl tune",
        "delta_theta",
        "the adapter's",
    ):
        assert words in called.out, words
    assert call("inspect", tuned.name, "--quiet") == Called(0, f"{tuned.stat().st_size}\t2.1\n", "")
    assert json.loads(call("inspect", tuned.name, "--json").out)["kind"] == "task"


def test_json_is_the_report_and_quiet_is_one_line(adapter):
    called = call("inspect", adapter, "--json")
    assert (called.code, called.err) == (0, "")
    report = json.loads(called.out)
    assert report["bytes"] == sum(part["bytes"] for part in report["adapter"]["parts"]) == adapter.stat().st_size
    assert report["adapter"]["manifest"] == read_adapter(adapter).manifest.model_dump(mode="json")
    assert report["adapter"]["anchors"]["entries"] is None
    with_texts = json.loads(call("inspect", adapter, "--json", "--anchors").out)
    assert len(with_texts["adapter"]["anchors"]["entries"]) == report["adapter"]["anchors"]["texts"]
    assert call("inspect", adapter, "--quiet") == Called(0, f"{adapter.stat().st_size}\t2.0\n", "")


def heat_map(out: str) -> list[str]:
    """Numbers of the heat map, row by row."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    rows = [line for line in plain.splitlines() if re.match(r"│ \d\.\d +│", line)]
    return [number for row in rows for number in re.findall(r"-?\d+\.\d{3}", row)]


def test_heat_map_is_coloured_and_read_without_colour_too(adapter):
    plain = call("inspect", adapter, env={**COLOURS, "NO_COLOR": "1"}).out
    coloured = call("inspect", adapter, env=COLOURS).out
    assert len(set(BACKGROUND.findall(coloured))) > 5
    assert not BACKGROUND.search(plain)
    report = json.loads(call("inspect", adapter, "--json").out)
    numbers = [f"{value:.3f}" for row in report["adapter"]["mixing"]["mean"] for value in row]
    assert heat_map(plain) == heat_map(coloured) == numbers
    assert len(numbers) == 11 * 8


def test_anchor_words_are_marked(adapter):
    called = call("inspect", adapter, "--anchors")
    anchors = read_adapter(adapter).anchors
    lines = called.out.splitlines()
    for index, text in enumerate(anchors.texts):
        marked = text
        for start_at, end in reversed(anchors.spans(index)):
            marked = f"{marked[:start_at]}[{marked[start_at:end]}]{marked[end:]}"
        assert marked in lines
    assert "brackets" not in call("inspect", adapter).out


def test_the_transfer_set_is_told_of_and_its_texts_are_printed(adapter, place):
    content = read_adapter(adapter)
    record, examples = content.transfer.record, content.transfer.whole().whole(content.transfer.record.texts)[0]
    plain = call("inspect", adapter, env=WIDE).out
    for words in ("transfer set", record.teacher[:60], f"{record.user_texts:,}", f"{record.examples:,}", record.digest):
        assert words in plain, words
    assert "most probable" not in plain
    lines = call("inspect", adapter, "--transfer").out.splitlines()
    labels = content.manifest.task.labels
    for text, label in zip(examples.texts, examples.labels, strict=True):
        assert f"{labels[label]}: {text}" in lines
    found = json.loads(call("inspect", adapter, "--json", "--transfer").out)["adapter"]["transfer"]
    assert [entry["text"] for entry in found["entries"]] == list(examples.texts)
    assert sum(found["label_counts"]) == record.predictions
    tagged = json.loads(call("inspect", place.tagger, "--json", "--transfer").out)["adapter"]["transfer"]["entries"]
    assert all(len(entry["labels"]) == len(entry["text"].split()) for entry in tagged)
    assert "--transfer" in call("inspect", adapter, "--verify", "--transfer").error


def test_verify_says_yes_in_one_line(adapter, place):
    called = call("inspect", adapter, "--verify")
    assert (called.code, called.err) == (0, "")
    assert called.out == (f"a.safetensors: every invariant of format 2.0 holds ({adapter.stat().st_size:,} bytes)\n")
    assert call("inspect", adapter, "--verify", "-q") == Called(0, f"{adapter.stat().st_size}\t2.0\n", "")
    assert json.loads(call("inspect", adapter, "--verify", "--json").out)["verification"] == {"problems": []}
    assert call("inspect", place.tagger, "--verify").code == 0


def test_verify_lists_what_is_wrong_and_exits_1(adapter):
    training = read_adapter(adapter).manifest.training
    rewrite(adapter, training=training.model_copy(update={"train_digest": "x", "train_examples": 3}))
    wanted = [
        "the label counts sum to 24; the training had 3 examples",
        "training.train_digest is not a SHA-256 digest",
    ]
    for more in ([], ["--quiet"]):
        called = call("inspect", adapter, "--verify", *more)
        assert called.code == 1
        assert called.out.splitlines() == wanted
        assert called.err == ("error: a.safetensors breaks the format in 2 ways. Get the file again from its source.\n")
    called = call("inspect", adapter, "--verify", "--json")
    assert called.code == 1
    assert json.loads(called.out)["verification"]["problems"] == wanted
    adapter.write_bytes(b"nothing")
    called = call("inspect", adapter, "--verify")
    assert called.code == 1
    assert len(called.out.splitlines()) == len(called.err.splitlines()) == 1
    assert "not a whole safetensors file" in called.out


def test_diff_exits_0_whatever_it_finds(adapter, place, here):
    called = call("inspect", adapter, "--diff", place.adapter)
    assert (called.code, called.err) == (0, "")
    assert "identical, byte for byte" in called.out
    assert call("inspect", adapter, "--diff", place.adapter, "-q") == Called(0, "identical\n", "")
    rewrite(adapter, licence="MIT")
    called = call("inspect", adapter, "--diff", place.adapter, env=WIDE)
    assert called.code == 0
    for words in ("licence", '"MIT"', '"unspecified"', "parts hold the same values", "anchors in common"):
        assert words in called.out, words
    assert call("inspect", adapter, "--diff", place.adapter, "-q") == Called(0, "different\n", "")
    called = call("inspect", adapter, "--diff", place.tagger, "--json")
    assert called.code == 0
    parts = {part["name"] for part in json.loads(called.out)["comparison"]["parts"]}
    assert {"atoms_u", "readout_pool"} <= parts


def test_plot_says_where_it_drew(adapter):
    pytest.importorskip("matplotlib")
    called = call("inspect", adapter, "--plot", "figures/a.png")
    assert (called.code, called.err) == (0, "")
    assert called.out.endswith("drawn in figures/a.png\n")
    assert Path("figures/a.png").read_bytes().startswith(b"\x89PNG")
    assert "--overwrite" in call("inspect", adapter, "--plot", "figures/a.png").error


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.safetensors"], 1, "there is no file missing.safetensors"),
        (["missing.safetensors", "--verify"], 1, "there is no file missing.safetensors"),
        (["a.safetensors", "--diff", "missing"], 1, "there is no file missing"),
        (["."], 1, "is a folder"),
        (["a.safetensors", "--plot", "a.bmp"], 2, "unknown figure format"),
        (["a.safetensors", "--verify", "--diff", "a.safetensors"], 2, "cannot be used together"),
    ],
)
def test_errors_are_one_line(arguments, code, words, adapter):
    called = call("inspect", *arguments)
    assert called.code == code
    assert words in called.error


def test_it_runs_in_a_process_of_its_own(adapter, here):
    called = start("inspect", adapter, cwd=here)
    assert (called.code, called.err) == (0, "")
    assert "mixing weights" in called.out
    called = start("inspect", adapter, "--verify", cwd=here)
    assert called.code == 0
