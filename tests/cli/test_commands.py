"""What the commands print where, what they write, and that they do in a process what they do in this one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import pandas
import pytest
from accelerate.state import AcceleratorState
from command_runs import (
    PROGRESS,
    ROOT,
    Called,
    call,
    port_arguments,
    pretrain_arguments,
    start,
    without_the_hubs_settings,
    write_data,
)
from tiny_hosts import SENTENCES, save_tiny_host

from uhl_cli import __version__
from uhl_cli.api import UniversalAdapter
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.formats.ported import load_ported
from uhl_cli.host.checkpoint import load_host

COLOUR = re.compile(r"\x1b\[[\d;]*3\d[\d;]*m")
# fsspec up to 2024.6, which datasets 3 asks for, does not list the links of a snapshot.
needs_links = pytest.mark.skipif(
    tuple(int(part) for part in version("fsspec").split(".")[:2]) < (2024, 10),
    reason="this fsspec does not list symbolic links",
)


def test_version():
    assert call("--version") == Called(0, f"uhl {__version__}\n", "")


def test_module_runs_as_a_script(here):
    called = start("--help", cwd=here)
    assert called.code == 0
    assert "pretrain" in called.out


def test_json_is_all_of_stdout_and_progress_is_on_stderr(place, here):
    called = call(*pretrain_arguments(place.host, place.data, "out.safetensors"), "--json")
    assert called.code == 0
    report = json.loads(called.out)
    assert report["bytes"] == (here / "out.safetensors").stat().st_size
    assert report["steps"] == 2
    lines = called.err.splitlines()
    assert lines
    assert all(PROGRESS.fullmatch(line) for line in lines)
    assert {line.split(":")[0] for line in lines} >= {"anchors", "aligning", "training", "head-only control"}
    called = call(*port_arguments("out.safetensors", place.target, place.data), "--json")
    ported = json.loads(called.out)
    assert "size" not in ported["scores"]
    controlled = json.loads(
        call(*port_arguments("out.safetensors", place.target, place.data), "--json", "--controls").out
    )
    assert controlled["scores"].items() >= ported["scores"].items()
    ported = controlled
    assert ported["source_score"] == report["score"]
    assert ported["bytes"] == report["bytes"]
    always = {"ported", "readout_only", "majority_class", "random_update", "head_only", "size"}
    off = ported["calibration"]["strength"] == 0
    assert set(ported["scores"]) == always | ({"full_updates"} if off else set())
    assert all(PROGRESS.fullmatch(line) for line in called.err.splitlines())


def test_quiet_prints_one_line(place, here):
    called = call(*pretrain_arguments(place.host, place.data, "out.safetensors"), "--quiet")
    assert called == Called(0, "out.safetensors\n", "")
    score = json.loads(call(*port_arguments("out.safetensors", place.target, place.data), "--json").out)
    called = call(*port_arguments("out.safetensors", place.target, place.data), "-q")
    assert called == Called(0, f"{score['scores']['ported']['value']:.6f}\n", "")
    called = call(*port_arguments("out.safetensors", place.target, place.data), "-q", "--no-score")
    assert called == Called(0, "not-scored\n", "")


def test_tables_for_people(place, here):
    called = call(*pretrain_arguments(place.host, place.data, "out.safetensors"), env={"COLUMNS": "160"})
    for words in ("accuracy on the source (12 examples)", "readout only", "bytes", "FLOP overhead", "anchor words"):
        assert words in called.out
    port, hint = port_arguments("out.safetensors", place.target, place.data), "--controls scores"
    plain = call(*port, env={"COLUMNS": "160"})
    called = call(*port, "--controls", env={"COLUMNS": "160"})
    for words in ("ported (zero-shot)", "control: majority class", "R^2", "FLOP overhead"):
        assert words in plain.out
        assert words in called.out
    for words in ("control: head only", "control: --align size"):
        assert words in called.out
        assert words not in plain.out
    assert (plain.out.count(hint), called.out.count(hint)) == (1, 0)
    assert "\x1b" not in called.out + called.err


@pytest.mark.parametrize("arguments", [["--help"], ["port", "missing.safetensors", "--target", "x"]])
def test_no_color_is_heard(here, arguments):
    coloured = call(*arguments, env={"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": None})
    plain = call(*arguments, env={"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "1"})
    piped = call(*arguments, env={"NO_COLOR": "1", "FORCE_COLOR": None})
    assert COLOUR.search(coloured.out + coloured.err)
    assert not COLOUR.search(plain.out + plain.err)
    assert "\x1b" not in piped.out + piped.err


def test_adapter_without_data_is_ported_and_says_why_it_is_not_scored(place, here):
    data = write_data(here / "mine")
    arguments = pretrain_arguments(place.host, data, "out.safetensors")
    arguments[arguments.index("--task") + 1] = "mine"
    assert call(*arguments).code == 0
    shutil.rmtree(data)
    arguments = port_arguments("out.safetensors", place.target, "x")
    del arguments[arguments.index("--data") : arguments.index("--data") + 2]
    called = call(*arguments)
    assert called.code == 0
    assert "not scored: " in called.out
    assert json.loads(call(*arguments, "--json").out)["scores"] == {}


@pytest.mark.integration
def test_a_home_that_cannot_be_written_is_named(place, here):
    """As in a container; the data are there, so that "not scored" would be wrong."""
    home = here / "home"
    home.write_text("")
    data = here / "dev.parquet"
    pandas.DataFrame({"sentence": SENTENCES, "label": [0, 1] * (len(SENTENCES) // 2)}).to_parquet(data)
    arguments = port_arguments(place.adapter, place.target, data)
    called = start(*arguments, cwd=here, env={"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")})
    assert called.code == 1
    assert f"cannot write to the cache {home}" in called.error
    assert "HF_HOME" in called.error
    assert sorted(here.iterdir()) == [data, home]


def test_nothing_is_overwritten_unasked(place, here):
    arguments = pretrain_arguments(place.host, place.data, "out.safetensors")
    assert call(*arguments).code == 0
    first = (here / "out.safetensors").read_bytes()
    for more in ([], ["--resume"]):
        called = call(*arguments, "--seed", "5", *more)
        assert called.code == 1
        assert "--overwrite" in called.error
        assert (here / "out.safetensors").read_bytes() == first
    assert call(*arguments, "--seed", "5", "--overwrite").code == 0
    assert (here / "out.safetensors").read_bytes() != first
    assert [path.name for path in here.iterdir()] == ["out.safetensors"]


def interrupted(arguments: list[str]) -> Called:
    """The call, interrupted when only the file is left to write."""

    def interrupt(*_arguments: object) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uhl_cli.commands.pretrain._finish", interrupt)
        return call(*arguments)


def test_unfinished_run_is_not_begun_anew_unasked(place, here):
    arguments = pretrain_arguments(place.host, place.data, "out.safetensors")
    called = interrupted(arguments)
    assert called.code == 130
    assert "--resume" in called.error
    for more, words in (([], "--resume"), (["--resume", "--seed", "5"], "other options")):
        called = call(*arguments, *more)
        assert called.code == 1
        assert words in called.error
    assert call(*arguments, "--resume").code == 0
    assert (here / "out.safetensors").read_bytes() == place.adapter.read_bytes()
    assert [path.name for path in here.iterdir()] == ["out.safetensors"]


def test_starting_over_takes_nothing_from_the_unfinished_run(place, here):
    arguments = pretrain_arguments(place.host, place.data, "out.safetensors")
    interrupted([*arguments, "--seed", "5"])
    called = interrupted([*arguments, "--overwrite"])
    assert called.code == 130
    assert call(*arguments, "--resume").code == 0
    assert (here / "out.safetensors").read_bytes() == place.adapter.read_bytes()


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint"])
def test_damaged_checkpoint_says_how_to_begin_anew(place, here, damage):
    arguments = pretrain_arguments(place.host, place.data, "out.safetensors")
    interrupted(arguments)
    (here / "out.safetensors.uhl-run" / "checkpoint.safetensors").write_bytes(damage)
    called = call(*arguments, "--resume")
    assert called.code == 1
    assert "without --resume" in called.error


def test_kept_folder_gives_the_same_logits_and_is_not_overwritten_unasked(place, here):
    arguments = [*port_arguments(place.adapter, place.target, place.data), "--output", "ported"]
    assert call(*arguments).code == 0
    host = load_host(str(place.target), device="cpu")
    direct = UniversalAdapter.load(place.adapter).port(host, max_flops=1000)
    kept = load_ported("ported")
    assert kept(list(SENTENCES)).equal(direct(list(SENTENCES)))
    before = (here / "ported" / "ported.safetensors").read_bytes()
    called = call(*arguments, "--align", "size")
    assert called.code == 1
    assert "--overwrite" in called.error
    assert (here / "ported" / "ported.safetensors").read_bytes() == before
    assert call(*arguments, "--align", "size", "--overwrite").code == 0
    assert (here / "ported" / "ported.safetensors").read_bytes() != before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_every_precision_trains_and_ports(place, here, dtype):
    called = call(*pretrain_arguments(place.host, place.data, "out.safetensors"), "--dtype", dtype, "--json")
    assert called.code == 0
    called = call(*port_arguments("out.safetensors", place.target, place.data), "--dtype", dtype, "--json")
    assert called.code == 0
    assert 0 <= json.loads(called.out)["scores"]["ported"]["value"] <= 1


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(place, here, precision, fresh_accelerate):
    called = call(*pretrain_arguments(place.host, place.data, "out.safetensors"), "--mixed-precision", precision, "-q")
    assert called == Called(0, "out.safetensors\n", "")
    assert read_adapter(here / "out.safetensors").manifest.training.config.mixed_precision == precision


def test_options_reach_the_file(place, here):
    (here / "texts.txt").write_text("\n".join(f"{sentence} indeed" for sentence in SENTENCES))
    arguments = pretrain_arguments(place.host, place.data, "out.safetensors")
    more = ["--anchors", "texts.txt", "--align", "size", "--licence", "MIT", "--seed", "7", "--no-updates"]
    assert call(*arguments, *more, "--limit-train", "9").code == 0
    manifest = read_adapter(here / "out.safetensors").manifest
    assert manifest.anchors.origin == "file texts.txt"
    assert manifest.config.strategy == "size"
    assert manifest.licence == "MIT"
    assert (manifest.training.config.seed, manifest.training.config.updates) == (7, False)
    assert manifest.training.train_examples == 9
    assert str(here.parent) not in manifest.model_dump_json()
    for name in ("--anchors texts.txt", "--align size", "--licence MIT", "--seed 7", "--no-updates"):
        assert name in manifest.training.command


def test_command_in_the_manifest_makes_the_same_file(place, here):
    for name in ("host", "data"):
        shutil.copytree(getattr(place, name), here / name)
    arguments = [*pretrain_arguments("host", "data", "first.safetensors"), "--seed", "3", "--noise", "0.5"]
    assert call(*arguments).code == 0
    first = (here / "first.safetensors").read_bytes()
    again = shlex.split(read_adapter(here / "first.safetensors").manifest.training.command)[1:]
    assert call(*again, "--output", "second.safetensors", "--device", "cpu").code == 0
    assert (here / "second.safetensors").read_bytes() == first


def hub_cache(home: Path) -> None:
    """What the hub leaves on disk: blobs, and snapshots of links to them, of two models and a data set."""
    import datasets

    for name, family in (("name", "bert"), ("name2", "llama")):
        base = home / "hub" / f"models--org--{name}"
        snapshot = base / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (base / "refs").mkdir()
        (base / "refs" / "main").write_text("a" * 40)
        save_tiny_host(base / "blobs", family)
        for blob in sorted((base / "blobs").iterdir()):
            (snapshot / blob.name).symlink_to(Path("..", "..", "blobs", blob.name))
    base = home / "hub" / "datasets--org--data"
    snapshot = base / "snapshots" / ("b" * 40) / "data"
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("b" * 40)
    (base / "blobs").mkdir()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["without", "with"])}
    )
    rows = {"text": list(SENTENCES), "label": [int("w" in text) for text in SENTENCES]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(base / "blobs" / split))
        link = snapshot / f"{split}-00000-of-00001.parquet"
        link.symlink_to(os.path.relpath(base / "blobs" / split, snapshot))


BOTH = """
import json, sys
from uhl_cli.cli.main import app
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except SystemExit as left:
        assert not left.code, left.code
    print("----")
"""


@pytest.mark.integration
@needs_links
def test_names_of_the_hub_work_offline_in_a_process_of_their_own(tmp_path, here):
    home = tmp_path / "huggingface"
    hub_cache(home)
    first = pretrain_arguments("org/name", "x", "out.safetensors")
    del first[first.index("--data") : first.index("--data") + 2]
    first[first.index("--task") + 1] = "org/data"
    second = port_arguments("out.safetensors", "org/name2", "x")
    second[second.index("--data") : second.index("--data") + 2] = ["--task", "org/data"]
    calls = json.dumps([[*first, "--json"], [*second, "--json", "--output", "ported"]])
    kept = without_the_hubs_settings()
    kept |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(home)}
    command = [sys.executable, "-c", BOTH, calls]
    done = subprocess.run(command, cwd=here, env=kept, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    report, ported = (json.loads(part) for part in done.stdout.split("----\n")[:2])
    assert report["source"]["name"] == "org/name"
    assert report["source"]["revision"] == "a" * 40
    assert (report["task"], report["train_examples"]) == ("org/data", 24)
    assert ported["target"]["name"] == "org/name2"
    assert ported["data"].startswith("org/data")
    assert ported["scores"]["ported"]["examples"] == 24
    assert (here / "ported" / "ported.safetensors").is_file()


def test_a_process_of_its_own_gives_one_error_line_and_the_code(here):
    called = start("inspect", "missing.safetensors", cwd=here)
    assert called.code == 1
    assert called.error.startswith("error: there is no file missing.safetensors.")
