"""`uhl budget` in scripts: exit codes, the quiet line, JSON, and nothing heavy imported without a target."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_runs import ROOT, Called, Workplace, call, imported, start
from safetensors.numpy import load_file
from tiny_hosts import save_tiny_host
from transformers import AutoConfig

from uhl_cli.budget.report import BudgetReport, TargetBudget
from uhl_cli.formats.adapter import read_adapter, write_adapter
from uhl_cli.schema import Parts


def on(place: Workplace, *more: str, target: Path | None = None) -> Called:
    given = ["--target", str(target or place.target), "--device", "cpu", "--offline", "--max-flops", "1000"]
    return call("budget", str(place.adapter), *given, *more)


def untaught(path: Path, folder: Path) -> Path:
    """The file without its transfer set, which may leave the updates out on a target."""
    content = read_adapter(path)
    assert content.transfer is not None
    parts = Parts(features=content.manifest.parts.features)
    file = folder / f"untaught-{path.name}"
    write_adapter(file, replace(content, transfer=None, manifest=content.manifest.model_copy(update={"parts": parts})))
    return file


@pytest.fixture(scope="module")
def acting(place, tmp_path_factory) -> Workplace:
    """Files whose updates act everywhere."""
    folder = tmp_path_factory.mktemp("acting")
    return replace(place, adapter=untaught(place.adapter, folder), tagger=untaught(place.tagger, folder))


def last_error(called: Called) -> str:
    """The one error line, behind the report on stdout."""
    assert called.out
    lines = [line for line in called.err.splitlines() if line.startswith("error: ")]
    assert called.err.splitlines()[-1:] == lines
    return lines[0]


def test_file_alone(place):
    size = place.adapter.stat().st_size
    called = call("budget", place.adapter, "--json")
    assert (called.code, called.err) == (0, "")
    report = BudgetReport.model_validate_json(called.out)
    assert report.file.bytes == sum(part.bytes for part in report.file.parts) == size
    assert call("budget", place.adapter, "--quiet") == Called(0, f"{size}\t-\t-\n", "")
    table = call("budget", place.adapter)
    assert (table.code, table.err) == (0, "")
    for part in report.file.parts:
        assert f"{part.part}" in table.out
        assert f"{part.bytes:,}" in table.out
    assert f"{size:,}" in table.out
    assert "within the limits" in table.out


def test_exit_codes_by_bytes(place):
    size = place.adapter.stat().st_size
    assert call("budget", place.adapter, "-q", "--max-bytes", str(size)) == Called(0, f"{size}\t-\t-\n", "")
    for form in ((), ("--quiet",), ("--json",)):
        beyond = call("budget", place.adapter, *form, "--max-bytes", str(size - 1))
        assert beyond.code == 3
        error = last_error(beyond)
        assert f"{size:,} bytes, the limit is {size - 1:,}" in error
        assert error.endswith("Raise the limit, or choose another target.")
        assert f"{size:,}" in beyond.out or str(size) in beyond.out
    assert "BEYOND the limits" in call("budget", place.adapter, "--max-bytes", "1").out


def test_errors_and_wrong_usage(place, here):
    (here / "text").write_text("no adapter")
    damaged = call("budget", here / "text")
    assert (damaged.code, damaged.error.startswith("error: ")) == (1, True)
    assert call("budget", here / "none").code == 1
    assert call("budget", place.adapter, "--target", here / "none", "--offline").code == 1
    assert call("budget", place.adapter, "--max-flops", "5").code == 2
    assert call("budget", place.adapter, "--target", "a", "--target-config", "b").code == 2
    assert call("budget", place.adapter, "--max-bytes", "0").code == 2
    assert "--max-flops" in call("budget", place.adapter, "--target", place.target, "--max-flops", "-1").error


def test_on_a_target(place):
    called = on(place, "--json", "--sequence-length", "16", "--batch-size", "2")
    assert called.code == 0
    report = BudgetReport.model_validate_json(called.out)
    target = report.target
    assert target is not None
    assert target.atoms is not None
    assert (target.model_type, target.sequence_length, target.batch_size) == ("gpt2", 16, 2)
    assert "a multiply-add" in target.flops.convention
    quiet = on(place, "--quiet", "--sequence-length", "16", "--batch-size", "2")
    wanted = f"{report.file.bytes}\t{target.flops.percent:.4f}\t{target.atoms.per_token:.4f}\n"
    assert quiet == Called(0, wanted, "")
    table = on(place, "--sequence-length", "16", "--batch-size", "2").out
    for figure in (target.flops.fvcore.host, target.flops.torch.adapter, target.memory.adapter_weights):
        assert f"{figure:,}" in table
    assert "2 x 16 tokens" in table
    assert f"{target.atoms.per_token:.2f} on" in table


@pytest.mark.integration
def test_exit_codes_by_flops_and_atoms(acting):
    report = json.loads(on(acting, "--json").out)
    atoms = report["target"]["atoms"]["per_token"]
    assert 0 < atoms <= 2
    assert on(acting, "--quiet", "--max-atoms", str(atoms + 0.01)).code == 0
    over = on(acting, "--quiet", "--max-atoms", str(atoms - 0.01))
    assert over.code == 3
    assert "active atoms per token, the limit is" in last_error(over)
    # Even the readout alone is over a thousandth of this host.
    refused = on(acting, "--quiet", "--max-flops", "0.1")
    assert refused.code == 3
    assert "the readout alone" in last_error(refused)
    assert refused.out.count("\t") == 2


@pytest.mark.integration
def test_data_of_the_task(acting):
    anchors = json.loads(on(acting, "--json").out)["target"]["atoms"]
    data = json.loads(on(acting, "--json", "--data", str(acting.data), "--limit-evaluation", "5").out)["target"][
        "atoms"
    ]
    assert (data["texts"], "anchor" in anchors["data"]) == (5, True)
    assert str(acting.data.name) in data["data"]
    assert 0 < data["per_token"] <= 2
    assert anchors["texts"] > 5
    wrong = on(acting, "--data", str(acting.conll))
    assert wrong.code == 1


def test_the_transfer_set_is_named_and_its_bytes_are_a_part(place):
    content = read_adapter(place.adapter)
    report = json.loads(call("budget", place.adapter, "--json").out)
    record = content.transfer.record
    assert report["transfer"] == record.model_dump(mode="json")
    parts = {part["part"]: (part["bytes"], part["parameters"]) for part in report["file"]["parts"]}
    tensors = load_file(place.adapter)
    for part, name in (("transfer texts", "transfer.texts"), ("transfer outputs", "transfer.outputs")):
        assert parts[part] == (tensors[name].nbytes, 0)
    table = call("budget", place.adapter, env={"COLUMNS": "300"}).out
    for words in (f"transfer set: {record.texts:,} texts", f"{record.user_texts:,} of the user's", record.teacher[:40]):
        assert words in table, words


def test_token_task(acting):
    given = ["--target", str(acting.host), "--device", "cpu", "--offline", "--max-flops", "1000", "--quiet"]
    called = call("budget", acting.tagger, *given)
    assert called.code == 0
    assert 0 < float(called.out.split("\t")[2]) <= 2


@pytest.mark.integration
def test_configuration_alone(place, here):
    file = untaught(place.adapter, here)
    given = ["--max-flops", "1000", "--json", "--align", "size"]

    def measured(adapter: Path, *target: str | Path) -> TargetBudget:
        found = BudgetReport.model_validate_json(call("budget", adapter, *target, *given).out).target
        assert found is not None
        return found

    hollow = measured(file, "--target-config", place.target / "config.json")
    real = measured(file, "--target", place.target, "--device", "cpu", "--offline")
    for counter in ("fvcore", "torch"):
        assert getattr(hollow.flops, counter) == getattr(real.flops, counter)
    # A transfer set may weaken the updates or leave them out, which takes weights to know.
    taught = measured(place.adapter, "--target", place.target, "--device", "cpu", "--offline")
    assert (hollow.strength, real.strength) == (None, None)
    assert taught.strength is not None
    if taught.strength:
        assert taught.flops == real.flops
    else:
        assert taught.flops.torch.adapter < real.flops.torch.adapter
    quiet = call("budget", place.adapter, "--target-config", place.target, "--max-flops", "1000", "--quiet")
    assert quiet.code == 0
    assert quiet.out.endswith("\t-\n")
    table = call("budget", place.adapter, "--target-config", place.target, "--max-flops", "1000")
    assert "configuration alone, no weights" in table.out


@pytest.mark.integration
def test_wall_clock_only_when_asked(place):
    assert json.loads(on(place, "--json").out)["target"]["time"] is None
    asked = on(place, "--time", "--repetitions", "3", "--sequence-length", "8")
    assert asked.code == 0
    assert "ms, median of 3" in asked.out


def test_a_length_that_the_host_does_not_take_is_said(place):
    called = on(place, "--quiet", "--sequence-length", "100")
    assert called.code == 0
    assert called.err == "warning: the target takes at most 64 tokens; counted at that length.\n"


def test_markup_in_names_is_left_alone(place, here):
    named = here / "[bold]odd[/].safetensors"
    named.parent.mkdir(parents=True, exist_ok=True)
    named.write_bytes(place.adapter.read_bytes())
    assert "[bold]odd[/].safetensors" in call("budget", named).out
    folder = save_tiny_host(here / "[red]host", "bert")
    assert "[red]host" in on(place, target=folder).out


def test_without_a_target_nothing_heavy_is_imported(place, here):
    forms = [["budget", str(place.adapter), *form] for form in ([], ["--json"], ["--quiet"])]
    assert imported(*forms, cwd=here) == [{"numpy"}] * 3
    assert imported(forms[0], cwd=here, first=("pandas",)) == [{"numpy", "pandas"}], "it would be noticed"


@pytest.mark.integration
def test_what_is_left_out_is_what_port_leaves_out(acting):
    """A limit between the least and the whole adapter."""
    given = ["budget", acting.adapter, "--target", acting.target, "--device", "cpu", "--offline"]
    whole = json.loads(call(*given, "--max-flops", "1000", "--json").out)["target"]
    assert whole["left_out"] == []
    limit = str(round(0.8 * whole["whole_percent"]))
    target = json.loads(call(*given, "--max-flops", limit, "--json").out)["target"]
    assert target["left_out"]
    assert target["memory"]["adapter_weights"] < whole["memory"]["adapter_weights"]
    arguments = ["port", acting.adapter, "--target", acting.target, "--no-score", "--max-flops", limit, "--json"]
    ported = json.loads(call(*arguments, "--device", "cpu", "--offline").out)
    assert ported["left_out"] == target["left_out"]
    words = " ".join(call(*given, "--max-flops", limit).out.split())
    assert f"left out to hold the FLOP limit: {', '.join(target['left_out'])}" in words


def test_a_task_file_is_listed_apart(place, here):
    arguments = ["tune", place.adapter, "--target", place.target, "--data", place.data, "--steps", "1", "--quiet"]
    arguments += ["--batch-size", "4", "--max-flops", "1000", "--device", "cpu", "--offline"]
    assert call(*arguments, "--output", "t.safetensors").code == 0
    report = json.loads(call("budget", place.adapter, "--task-file", "t.safetensors", "--json").out)
    parts = report["task_file"]["parts"]
    assert report["task_file"]["bytes"] == (here / "t.safetensors").stat().st_size == sum(p["bytes"] for p in parts)
    assert [part["part"] for part in parts] == ["header", "delta-theta"]
    assert report["file"]["bytes"] == place.adapter.stat().st_size
    assert "task file" in call("budget", place.adapter, "--task-file", "t.safetensors").out
    foreign = call("budget", place.tagger, "--task-file", "t.safetensors")
    assert foreign.code == 1
    assert "another adapter" in foreign.error


@pytest.mark.parametrize("tuned", [False, True])
def test_a_ported_folder(place, here, tuned):
    given = ["--target", place.target, "--max-flops", "1000", "--device", "cpu", "--offline", "--output", "kept"]
    made = ["tune", place.adapter, "--parameters", "lora", "--data", place.data, "--steps", "1", "--batch-size", "4"]
    assert call(*(made if tuned else ["port", place.adapter]), *given, "--quiet").code == 0
    alone = call("budget", "kept", "--json")
    report = BudgetReport.model_validate_json(alone.out)
    size = (here / "kept" / "ported.safetensors").stat().st_size
    assert report.file.bytes == size == sum(part.bytes for part in report.file.parts)
    assert (report.limits.bytes, report.target, report.task_file, report.transfer) == (None, None, None, None)
    assert call("budget", "kept", "--quiet", "--max-bytes", str(size - 1)).code == 3
    assert "limits" not in call("budget", "kept").out
    asked = ["--target", place.target, "--device", "cpu", "--offline", "--sequence-length", "16"]
    on_host = BudgetReport.model_validate_json(call("budget", "kept", *asked, "--max-flops", "1000", "--json").out)
    assert on_host.target is not None
    assert on_host.target.atoms is None
    assert on_host.target.flops.torch.adapter > 0
    file = ["budget", place.adapter, *asked, "--max-flops", "1000", "--json", *(["--task-file", "kept"] * tuned)]
    assert BudgetReport.model_validate_json(call(*file).out).target.flops == on_host.target.flops
    configured = ["--target-config", place.target, *asked[4:], "--max-flops", "1000", "--json"]
    counted = BudgetReport.model_validate_json(call("budget", "kept", *configured).out).target
    assert (counted.weights_loaded, counted.flops.torch) == (False, on_host.target.flops.torch)
    wrong = call("budget", "kept", "--target", "builtin:tiny", "--offline")
    assert (wrong.code, "was made for" in wrong.error) == (1, True)


def test_a_ported_folder_takes_what_it_can_use(place, here):
    given = ["--target", place.target, "--max-flops", "1000", "--device", "cpu", "--offline"]
    assert call("port", place.adapter, *given, "--output", "kept", "--quiet").code == 0
    asked = ["budget", "kept", *given]
    for idle in (["--task-file", place.adapter], ["--align", "size"]):
        refused = call(*asked, *idle)
        assert (refused.code, f"{idle[0]} has no effect here" in refused.error) == (2, True)
    unknown = call(*asked, "--max-atoms", "0.5")
    assert (unknown.code, "--data" in unknown.error) == (2, True)
    counted = call(*asked, "--data", place.data, "--json")
    assert json.loads(counted.out)["target"]["atoms"]["texts"] > 0


def test_a_process_of_its_own_gives_the_code(place, here):
    called = start("budget", place.adapter, "--quiet", "--max-bytes", "9", cwd=here)
    assert (called.code, called.out) == (3, f"{place.adapter.stat().st_size}\t-\t-\n")
    assert len(called.err.splitlines()) == 1
    assert last_error(called)


@pytest.mark.integration
def test_a_shell_script_keeps_the_files_within_budget(place, here):
    """Exit code 0 keeps a file, 3 drops it, anything else stops the script."""
    sizes = {path: path.stat().st_size for path in (place.adapter, place.tagger)}
    small, large = sorted(sizes, key=sizes.__getitem__)
    assert sizes[small] < sizes[large]
    uhl = shlex.join([sys.executable, "-m", "uhl_cli"])
    script = f"""
    for file in "$@"; do
        code=0
        line=$({uhl} budget $file --quiet --max-bytes {sizes[small]} 2>errors) || code=$?
        case $code in
            0) echo "$file $line" ;;
            3) ;;
            *) cat errors; exit $code ;;
        esac
    done
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*files: Path) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euc", script, "script", *(str(file) for file in files)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run(large, small)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{small} {sizes[small]}\t-\t-\n"
    stopped = run(here / "none", small)
    assert (stopped.returncode, stopped.stdout[:7]) == (1, "error: ")


@pytest.mark.integration
@pytest.mark.slow
def test_a_fused_type_is_counted_by_its_configuration(place, tmp_path):
    """Two billion parameters, of which none is made."""
    width, inner, layers, keys = 4096, 12288, 8, 1024
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(AutoConfig.for_model("qwen3", **sizes, **heads).to_json_string())
    called = call(
        "budget", untaught(place.adapter, tmp_path), "--target-config", tmp_path / "config.json", "--json",
        "--dtype", "auto", "--sequence-length", "64"
    )  # fmt: skip
    assert called.code == 0
    found = BudgetReport.model_validate_json(called.out).target
    assert found is not None
    linear = 2 * (2 * width * width + 2 * width * keys + 3 * width * inner)
    assert found.flops.fvcore.host == pytest.approx(64 * layers * (linear + 4 * 64 * width), rel=0.01)
    assert found.flops.torch.host == pytest.approx(found.flops.fvcore.host, rel=0.01)
    assert 2.1e9 < found.parameters < 2.2e9
    assert (found.model_type, found.num_hidden_layers, found.weights_loaded) == ("qwen3", layers, False)
    # The plan of a map of all layers updates attention and the feed-forward part; routing alone costs less.
    assert found.left_out == ()
    assert found.flops.torch.adapter > 2 * 64 * layers * (2 * width + 2 * inner)
