"""What `uhl tune` makes in a target, a LoRA folder or a low-rank task file: `port`, `inspect` and `budget` of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_runs import Workplace, call, imported, port_arguments
from tiny_hosts import SENTENCES, tiny_tokenizer
from transformers import AutoModel

from uhl_cli import UniversalAdapter, load_ported
from uhl_cli.formats.folder import FILE_NAME

WIDE = {"COLUMNS": "160"}


def tuned_by(place: Workplace, output: Path, *more: str | Path) -> dict[str, Any]:
    """The report of a run of three steps."""
    given = ["tune", place.adapter, "--target", place.target, "--steps", "3", "--batch-size", "4", "--output", output]
    given += ["--max-flops", "1000", "--device", "cpu", "--offline", "--learning-rate", "0.05", "--json"]
    called = call(*given, *more)
    assert called.code == 0, called.err
    return json.loads(called.out)


@pytest.fixture(scope="module")
def lora(place, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("lora") / "folder"
    more = ["--parameters", "lora", "--rank", "2", "--data", place.data]
    return output, tuned_by(place, output, *more)


@pytest.fixture(scope="module")
def low_rank(place, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("low-rank") / "a.task.safetensors"
    return output, tuned_by(place, output, "--score-data", place.data)


def ported_with(place: Workplace, path: Path, *more: str) -> dict[str, Any]:
    called = call(*port_arguments(place.adapter, place.target, place.data), "--task-file", path, "--json", *more)
    assert called.code == 0, called.err
    return json.loads(called.out)


def test_port_uses_a_loras_folder(place, lora):
    path, report = lora
    found = ported_with(place, path)
    assert found["scores"]["ported"] == report["scores"]["tuned"]
    assert (found["parameters"], found["supervision"]) == ("lora", "labels")
    # What needs updates, or another readout, is left out.
    assert set(found["scores"]) == {"ported", "majority_class"}
    assert (found["left_out"], found["calibration"], found["quality"]) == ([], None, [])
    assert found["flops"]["percent"] > 0
    assert found["bytes"] == (path / FILE_NAME).stat().st_size
    table = call(*port_arguments(place.adapter, place.target, place.data), "--task-file", path, env=WIDE).out
    assert "ported, a LoRA tuned by labels" in table
    assert "no label and no gradient" not in table
    assert "--controls" not in table, "there are none"
    given = [*port_arguments(place.adapter, place.target, place.data), "--task-file", path]
    assert "--controls has no effect here" in call(*given, "--controls").error


def test_port_uses_a_low_rank_task_file(place, low_rank):
    path, report = low_rank
    found = ported_with(place, path)
    assert found["scores"]["ported"] == report["scores"]["tuned"]
    assert (found["parameters"], found["supervision"]) == ("low-rank", "transfer set")
    assert set(found["scores"]) == {"ported", "majority_class"}
    controlled = ported_with(place, path, "--controls")["scores"]
    assert controlled.items() >= found["scores"].items()
    assert set(controlled) == {"ported", "majority_class", "readout_only", "head_only"}
    assert found["left_out"] == []
    tight = [*port_arguments(place.adapter, place.target, place.data), "--no-score", "--json"]
    tight[tight.index("--max-flops") + 1] = "20"
    zero_shot = json.loads(call(*tight).out)["left_out"]
    assert zero_shot
    assert not any(part.startswith("depth") for part in zero_shot)
    assert json.loads(call(*tight, "--task-file", path).out)["left_out"] == []


def test_a_kept_port_is_what_it_was_made_from(place, lora, low_rank, here):
    model, tokenizer = AutoModel.from_pretrained(place.target).eval(), tiny_tokenizer("gpt2")
    universal = UniversalAdapter.load(place.adapter)
    for path, _ in (lora, low_rank):
        given = [*port_arguments(place.adapter, place.target, place.data), "--no-score", "--task-file", path]
        assert call(*given, "--output", here / path.name, "--json").code == 0
        wanted = universal.port(model, tokenizer, task=path, max_flops=1000.0)(SENTENCES[:4])
        for kept in (here / path.name, path):
            if kept.is_dir():
                assert bool((load_ported(kept, model, tokenizer)(SENTENCES[:4]) == wanted).all())
        assert not bool((universal.port(model, tokenizer, max_flops=1000.0)(SENTENCES[:4]) == wanted).all())
    kept = here / lora[0].name / FILE_NAME
    assert kept.read_bytes() == (lora[0] / FILE_NAME).read_bytes()


def test_inspect_tells_of_either(place, lora, low_rank):
    path, report = lora
    called = call("inspect", path, env=WIDE)
    assert (called.code, called.err) == (0, "")
    for words in ("rank 2 on", "LoRA", "readout", "tuned by", "labels", "uhl tune", "adapter's SHA-256"):
        assert words in called.out, words
    found = json.loads(call("inspect", path, "--json").out)
    assert found["ported"]["lora"]["bytes"] == report["lora_bytes"]
    readout = sum(part["bytes"] for part in found["ported"]["parts"] if part["group"] == "readout")
    assert readout == report["readout_bytes"]
    assert found["ported"]["record"]["tuned"]["score"] == report["scores"]["tuned"]
    assert call("inspect", path, "--verify").code == 0
    assert call("inspect", low_rank[0], "--verify").code == 0
    called = call("inspect", low_rank[0], env=WIDE)
    for words in ("numbers of a low-rank update", "tuned by", "transfer set"):
        assert words in called.out, words
    assert "an adapter and a ported adapter" in call("inspect", place.adapter, "--diff", path).error


def test_inspect_and_budget_need_no_torch(place, lora, here):
    shutil.copy(place.adapter, here / "a.safetensors")
    folder = str(lora[0])
    calls = [["inspect", folder], ["inspect", folder, "--verify"], ["inspect", "a.safetensors", "--transfer"]]
    calls += [["budget", "a.safetensors", "--task-file", folder]]
    assert imported(*calls, cwd=here) == [{"numpy"}] * len(calls)


def test_an_adapter_is_found_beside_the_folder(place, lora, here):
    shutil.copytree(lora[0], here / "folder")
    shutil.copy(place.adapter, here / "mine.safetensors")
    assert json.loads(call("inspect", "folder", "--json").out)["ported"]["adapter"] == "mine.safetensors"
    assert "mine.safetensors, next to the folder" in call("inspect", "folder", env=WIDE).out
    assert json.loads(call("inspect", lora[0], "--json").out)["ported"]["adapter"] is None


def test_figures_of_a_folder(lora, here):
    pytest.importorskip("matplotlib")
    called = call("inspect", lora[0], "--plot", "a.svg")
    assert called.code == 0, called.err
    assert "LoRA" in Path("a.svg").read_text()


def test_budget_counts_either(place, lora, low_rank):
    given = ["budget", place.adapter, "--max-flops", "1000"]
    there = ["--target", place.target, "--device", "cpu", "--offline"]
    hollow = ["--target-config", place.target]
    for path, report in (lora, low_rank):
        file = path / FILE_NAME if path.is_dir() else path
        found = [json.loads(call(*given, *on, "--task-file", path, "--json").out) for on in (there, hollow)]
        for each in found:
            sizes, target = each["task_file"], each["target"]
            assert sizes["bytes"] == file.stat().st_size == sum(part["bytes"] for part in sizes["parts"])
            assert each["file"]["bytes"] == place.adapter.stat().st_size
            assert 0 < target["flops"]["lora"] < target["flops"]["torch"]["adapter"]
            assert target["flops"]["adapter_difference_percent"] == pytest.approx(0, abs=1)
            assert (target["left_out"], target["atoms"]) == ([], None)
        for counter in ("fvcore", "torch", "lora"):
            assert found[0]["target"]["flops"][counter] == found[1]["target"]["flops"][counter]
        assert found[0]["target"]["flops"]["torch"]["adapter"] == report["flops"]["adapter"]
        table = call(*given, *there, "--task-file", path, env=WIDE).out
        assert "merged into the host's weights it takes none" in table
    alone = json.loads(call(*given[:2], "--task-file", lora[0], "--json").out)["task_file"]
    assert {part["part"]: part["bytes"] for part in alone["parts"]}["LoRA"] == lora[1]["lora_bytes"]


def test_a_folder_in_place_of_the_adapter_says_where_it_goes(place, lora):
    folder = lora[0]
    on = ["--target", place.target, "--offline", "--device", "cpu"]
    for given in (["port", folder, *on], ["tune", folder, *on], ["export", folder, *on, "--output", "new"]):
        error = call(*given).error
        assert f"{folder} is the folder of a ported adapter" in error
        assert f"--task-file {folder}" in error
        assert f"`uhl predict {folder}` labels texts" in error
    mistaken = call("port", folder / FILE_NAME, *on).error
    assert "not a uhl adapter but a uhl ported adapter. Give an adapter here" in mistaken
    assert "a ported adapter to `uhl predict`" in mistaken


def test_a_folder_that_does_not_fit_is_one_line(place, lora, here):
    port = port_arguments(place.adapter, place.host, place.data)
    unfit = call(*port, "--task-file", lora[0]).error
    assert "was made for" in unfit
    assert "uhl tune ADAPTER --target HOST --parameters lora" in unfit, "how it is made again"
    assert "was made for" in call("budget", place.adapter, "--target", place.host, "--task-file", lora[0]).error
    config = ["budget", place.adapter, "--target-config", place.host, "--task-file", lora[0]]
    assert "was made for" in call(*config).error
    other = call(*port_arguments(place.tagger, place.target, place.conll), "--task-file", lora[0])
    assert "was tuned on another adapter file" in other.error
    assert "tuned on another adapter" in call("budget", place.tagger, "--task-file", lora[0]).error
    (here / "empty").mkdir()
    assert "is a folder" in call(*port, "--task-file", here / "empty").error
    bare = here / "bare"
    target = [*port_arguments(place.adapter, place.target, place.data), "--no-score"]
    assert call(*target, "--output", bare).code == 0
    assert "ported and not tuned" in call(*target, "--task-file", bare).error
    assert call("inspect", bare).code == 0
