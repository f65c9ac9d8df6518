"""Tuning: 512 bytes change and nothing else does; they score what training showed; other tasks get a readout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_hosts import SWEEP, tiny_host
from toy_runs import TINY_LIMIT, carry, make_adapter, pair_data, sequence_data, token_data

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, TuneOptions, tuning_defaults
from uhl_cli.commands.tune import tune
from uhl_cli.errors import FormatError, OutputError
from uhl_cli.formats.adapter import Quantised
from uhl_cli.formats.task import TaskFile, read_task, write_task
from uhl_cli.reports import TuneReport
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.task_adapter import TaskAdapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A file whose updates are not zero, for a task on single texts."""
    path = tmp_path_factory.mktemp("tune") / "adapter.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path, max_steps=30)
    return path


def run(adapter: Path, host, data, output: Path, *, files=None, reporter=None, **changes) -> TuneReport:
    resume = changes.pop("resume", False)
    training = {"max_steps": 6, "batch_size": 8, "learning_rate": 0.05} | changes
    options = TuneOptions(
        adapter=adapter,
        target=HostOptions(name="tiny", device="cpu"),
        data=DataOptions(task=data.task.name),
        training=tuning_defaults().model_copy(update=training),
        max_flops=TINY_LIMIT,
        output=output,
        resume=resume,
        save_every=3,
    )
    loaded = UniversalAdapter.load(adapter)
    more = {} if reporter is None else {"reporter": reporter}
    return tune(loaded, host, data, options, accelerator=Accelerator(cpu=True), files=files, **more)


@pytest.mark.integration
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_file_with_a_feature_bank_is_tuned_and_scores_what_training_showed(family, tmp_path):
    path, task = tmp_path / "adapter.safetensors", tmp_path / "task.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path, max_steps=30, anchors="general", feature_words=3000)
    host = tiny_host(family, hidden_size=40, num_hidden_layers=3, seed=1)
    report = run(path, host, sequence_data(), task, max_steps=12)
    assert read_task(task).parameters["delta_theta"].codes.any(), "nothing was trained"
    _, zero_shot = carry(path, host, sequence_data())
    assert zero_shot.feature_quality is not None
    assert zero_shot.scores["ported"] == report.scores["zero_shot"]
    tuned = UniversalAdapter.load(path).with_task(task).port(host, max_flops=TINY_LIMIT)
    plain = UniversalAdapter.load(path).port(host, max_flops=TINY_LIMIT)
    # The shift that is taken back is that of the file, not of what was tuned.
    assert torch.equal(tuned.adapter.readout.shift, plain.adapter.readout.shift)
    rows = tuned.classes_of(sequence_data().evaluation).for_metric("sequence")
    right = sum(a == b for a, b in zip(rows, sequence_data().evaluation.labels, strict=True)) / len(rows)
    assert right == report.scores["tuned"].value
    # A task of its own has a readout that the bank knows nothing of.
    other = run(path, host, token_data(), task.with_name("tokens.safetensors"), max_steps=12)
    assert other.own_task is False
    tokens = UniversalAdapter.load(path).with_task(task.with_name("tokens.safetensors"))
    assert tokens.features is None
    assert tokens.port(host, max_flops=TINY_LIMIT).adapter.readout.shift is None


@pytest.mark.parametrize("family", SWEEP)
def test_512_bytes_of_the_own_task_on_every_family(family, adapter, tmp_path):
    host = tiny_host(family, hidden_size=40, num_hidden_layers=3, seed=1)
    before = {name: value.clone() for name, value in host.map.base.state_dict().items()}
    bytes_before = adapter.read_bytes()
    path = tmp_path / "task.safetensors"
    report = run(adapter, host, sequence_data(), path)
    assert all(torch.equal(value, before[name]) for name, value in host.map.base.state_dict().items())
    assert adapter.read_bytes() == bytes_before
    assert (report.delta_bytes, report.readout_bytes, report.own_task) == (512, 0, True)
    assert report.bytes == path.stat().st_size
    content = read_task(path)
    assert set(content.parameters) == {"delta_theta"}
    assert content.parameters["delta_theta"].codes.any(), "nothing was trained"
    assert content.record.score == report.scores["tuned"]
    tuned = UniversalAdapter.load(adapter).with_task(path).port(host, max_flops=TINY_LIMIT)
    rows = tuned.classes_of(sequence_data().evaluation).for_metric("sequence")
    right = sum(a == b for a, b in zip(rows, sequence_data().evaluation.labels, strict=True)) / len(rows)
    assert right == report.scores["tuned"].value
    _, carried = carry(adapter, host, sequence_data())
    assert carried.scores["ported"] == report.scores["zero_shot"]


def test_a_zero_delta_is_the_adapter_itself_and_another_is_not(adapter, tmp_path):
    host = tiny_host("distilbert", hidden_size=48)
    texts = list(sequence_data().evaluation.texts)
    run(adapter, host, sequence_data(), tmp_path / "task.safetensors")
    content = read_task(tmp_path / "task.safetensors")
    shape = content.parameters["delta_theta"].codes.shape
    zero = Quantised(np.zeros(shape, np.int8), np.zeros(shape[0], np.float32))
    write_task(tmp_path / "zero.safetensors", TaskFile(content.record, {"delta_theta": zero}))
    loaded = UniversalAdapter.load(adapter)
    plain = loaded.port(host, max_flops=TINY_LIMIT)(texts)
    assert torch.equal(loaded.with_task(tmp_path / "zero.safetensors").port(host, max_flops=TINY_LIMIT)(texts), plain)
    tuned = loaded.with_task(tmp_path / "task.safetensors").port(host, max_flops=TINY_LIMIT)(texts)
    assert not torch.equal(tuned, plain)


def test_only_delta_theta_is_trained_and_the_rest_is_the_file(adapter):
    loaded = UniversalAdapter.load(adapter)
    own = TaskAdapter(loaded.stored, loaded.manifest.config, new_readout=False)
    assert [name for name, _ in own.named_parameters()] == ["delta_theta"]
    assert own.stored().keys() == loaded.stored.keys()
    assert all(torch.equal(value, loaded.stored[name]) for name, value in own.stored().items())
    new = TaskAdapter(loaded.stored, loaded.manifest.config, new_readout=True)
    trained = {name for name, _ in new.named_parameters()}
    assert trained == {"delta_theta"} | {name for name in loaded.stored if name.startswith("readout_")}
    assert not torch.equal(new.stored()["readout_in_weight"], loaded.stored["readout_in_weight"])
    assert torch.equal(new.stored()["atoms_u"], loaded.stored["atoms_u"])


@pytest.mark.integration
@pytest.mark.parametrize("data", [pair_data, token_data], ids=["pairs", "tokens"])
def test_another_task_gets_a_readout_of_its_own(data, adapter, tmp_path):
    host = tiny_host("llama", hidden_size=40, num_hidden_layers=3)
    path = tmp_path / "task.safetensors"
    report = run(adapter, host, data(), path, readout_learning_rate=0.02, max_steps=40)
    assert not report.own_task
    assert report.readout_bytes > 0
    assert "zero_shot" not in report.scores
    content = read_task(path)
    expected = sum(
        part.codes.size + part.scales.nbytes for name, part in content.parameters.items() if name != "delta_theta"
    )
    assert report.readout_bytes == expected
    tuned = UniversalAdapter.load(adapter).with_task(path)
    assert tuned.manifest.task == data().task
    predicted = tuned.port(host, max_flops=TINY_LIMIT).classes_of(data().evaluation).classes
    assert len(predicted) == len(data().evaluation)
    assert len({each for row in predicted for each in row}) > 1, "the readout has learnt nothing but one class"


@pytest.mark.integration
def test_a_run_that_is_cut_off_and_resumed_ends_with_the_same_file(adapter, tmp_path):
    host = tiny_host("electra", hidden_size=40)

    class Stop(Exception):
        pass

    def stop(label: str, done: int, total: int, note: str = "") -> None:
        if label == "tuning" and done == 20:
            raise Stop

    settings = {"max_steps": 40, "batch_size": 4}
    run(adapter, host, sequence_data(), tmp_path / "whole", files=RunFiles(tmp_path / "a"), **settings)
    files = RunFiles(tmp_path / "b")
    with pytest.raises(Stop):
        run(adapter, host, sequence_data(), tmp_path / "cut", files=files, reporter=stop, **settings)
    assert not (tmp_path / "cut").exists()
    assert files.checkpoint.exists()
    run(adapter, host, sequence_data(), tmp_path / "cut", files=files, resume=True, **settings)
    whole, cut = read_task(tmp_path / "whole"), read_task(tmp_path / "cut")
    assert whole.record == cut.record
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()
    run(adapter, host, sequence_data(), tmp_path / "other", files=None, seed=5, **settings)
    assert (tmp_path / "other").read_bytes() != (tmp_path / "whole").read_bytes()


def test_a_task_file_fits_its_own_adapter_alone(adapter, tmp_path):
    host = tiny_host("bert")
    other = tmp_path / "other.safetensors"
    make_adapter(host, sequence_data(), other, max_steps=4)
    run(adapter, host, sequence_data(), tmp_path / "task.safetensors")
    with pytest.raises(FormatError, match="another adapter"):
        UniversalAdapter.load(other).with_task(tmp_path / "task.safetensors")


def test_an_output_that_is_there_is_not_replaced(adapter, tmp_path):
    from uhl_cli.commands.outputs import refuse_overwriting

    there = tmp_path / "task.safetensors"
    there.write_bytes(b"mine")
    with pytest.raises(OutputError, match="already exists"):
        refuse_overwriting(there, RunFiles(tmp_path / "run"), resume=False, overwrite=False)
    refuse_overwriting(there, RunFiles(tmp_path / "run"), resume=False, overwrite=True)


def test_the_default_output_names_task_and_target(adapter):
    options = TuneOptions(adapter=Path("somewhere/a.safetensors"), target=HostOptions(name="org/bert-tiny"))
    assert options.output_path("sst2") == Path("somewhere/a.sst2.bert-tiny.task.safetensors")
    options = TuneOptions(adapter=Path("a.safetensors"), target=HostOptions(name="builtin:small"))
    assert options.output_path("reviews") == Path("a.reviews.builtin-small.task.safetensors")
