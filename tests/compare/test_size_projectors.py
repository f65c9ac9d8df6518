"""Projectors that are made from the size alone: what they depend on, what is trained, and what is kept."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_runs import call
from compare_runs import at, write_data_sets, write_hosts
from recompute import differences
from tiny_adapters import SMALL, random_adapter, tiny_task
from tiny_hosts import SENTENCES, tiny_host
from toy_runs import TINY_LIMIT, sequence_data

from uhl_cli.adapter.canonical import size_gains
from uhl_cli.compare import size_projectors
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.load import load_configs
from uhl_cli.compare.size_projectors import (
    Kept,
    KeptRecord,
    SizeAdapter,
    SizeProjectors,
    generated,
    read_kept,
    size_alignment,
)
from uhl_cli.errors import FormatError
from uhl_cli.host.encode import encode
from uhl_cli.schema import HostRecord, TrainingConfig


def random_projectors(width=32):
    """Projectors that do depend on the size."""
    projectors = SizeProjectors(width, SMALL.canonical_size, 3)
    with torch.no_grad():
        projectors.out_weight.normal_(generator=torch.Generator().manual_seed(3))
    return projectors


def stored_of(projectors):
    return {name: value.detach() for name, value in projectors.stored().items()}


def kept_on(host, *, zero):
    """A random adapter with random projectors, said to be trained on the host."""
    trained = SizeAdapter(SMALL, host.hidden_size)
    with torch.no_grad():
        trained.adapter.load_state_dict(random_adapter().state_dict())
        if zero:
            trained.adapter.get_parameter("atoms_u").zero_()
    record = KeptRecord(
        config=SMALL,
        task=tiny_task(),
        source=HostRecord(name="tiny", fingerprint=host.fingerprint),
        training=TrainingConfig(noise=0),
        steps=1,
        train_examples=1,
    )
    return Kept(record, dict(trained.named_parameters()), 0)


def test_hosts_of_one_size_get_the_same_projectors_whatever_their_weights():
    first, second = tiny_host("bert"), tiny_host("bert", seed=1)
    deeper = tiny_host("bert", num_hidden_layers=3)
    assert first.fingerprint.digest != second.fingerprint.digest
    stored = stored_of(random_projectors())
    found = [size_alignment(stored, host, SMALL) for host in (first, second, deeper)]
    assert [found[0].width, found[2].width] == [32, 32]
    for name in ("read", "write_stream", "write_attention", "write_mlp", "mean"):
        own = getattr(found[0].layers[0], name)
        assert all(torch.equal(own, getattr(layer, name)) for layer in (*found[0].layers, *found[1].layers))
        assert name == "mean" or not torch.allclose(own, getattr(found[2].layers[0], name), atol=1e-3)
    assert not found[0].layers[0].mean.any()


def test_a_narrower_host_takes_the_first_coordinates_and_a_wider_one_has_no_further_ones():
    stored = stored_of(random_projectors())
    read, write = generated(stored, 10_000, 32)
    assert (tuple(read.shape), tuple(write.shape)) == ((9, 32), (32, 9))
    assert not torch.allclose(read, write.T, atol=1e-3)
    fewer, narrow = generated(stored, 10_000, 20)
    assert torch.equal(fewer, read[:, :20])
    assert torch.equal(narrow, write[:20])
    more, wide = generated(stored, 10_000, 40)
    assert torch.equal(more[:, :32], read)
    assert torch.equal(wide[:32], write)
    assert not more[:, 32:].any()
    assert not wide[32:].any()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_zero_adapter_is_the_host(family):
    host = tiny_host(family)
    encoded = encode(host, SENTENCES[:4])

    def output(ported=None):
        with torch.inference_mode():
            if ported is None:
                return host.map.base(**encoded.model_inputs()).last_hidden_state
            with ported.attached():
                return output()

    before = output()
    assert torch.equal(output(kept_on(host, zero=True).port(host, max_flops=TINY_LIMIT)), before)
    assert not torch.allclose(output(kept_on(host, zero=False).port(host, max_flops=TINY_LIMIT)), before, atol=1e-3)
    assert torch.equal(output(), before)


def run_of(steps):
    """A run of a toy task whose source and target are the tiny host of `ToyResources`."""
    pretraining = {"max_steps": steps, "batch_size": 8, "noise": 0, "update_dropout": 0.0}
    return RunConfig.model_validate(
        {
            "run_id": "toy",
            "method": "size-projectors",
            "host": {"name": "tiny"},
            "adapter": {"source": {"name": "tiny"}, "pretraining": pretraining},
            "dataset": {"task": "toy"},
            "budget": {"max_flops": TINY_LIMIT},
        }
    )


class ToyResources(size_projectors.Resources):
    """A tiny host and a toy task in place of what the names stand for."""

    def __init__(self, folder):
        super().__init__(folder, {}, device="cpu", offline=True, reporter=lambda *_: None)
        self.losses = []
        self.reporter = lambda *said: self.losses.append(said[3]) if len(said) > 3 and "loss" in said[3] else None

    def bare_host(self, _host):
        return tiny_host("bert")

    def data(self, _dataset):
        return sequence_data()


def test_source_learns_by_adapter_and_projectors_and_the_gains_stay_at_one(tmp_path):
    resources, run = ToyResources(tmp_path), run_of(60)
    trained = size_projectors.kept(run, resources)
    losses = [float(said.split()[1]) for said in resources.losses]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    assert (trained.record.steps, trained.record.train_examples) == (60, 36)
    config, values = trained.record.config, trained.part("projectors")
    start = SizeProjectors(32, config.canonical_size, config.size_hidden_size)
    for name, value in start.stored().items():
        assert not torch.allclose(values[name], value, atol=1e-4), name
    assert trained.part("adapter")["atoms_u"].any()
    for gains in size_gains(trained.part("adapter"), 32):
        assert torch.equal(gains, torch.ones(config.canonical_size))
    outcome = size_projectors.by_size_alone(run, resources, sequence_data())
    assert (outcome.source, outcome.source_score.examples) == ("tiny-bert", 12)
    references = sequence_data().evaluation.labels
    right = sum(mine == true for mine, true in zip(outcome.predictions, references, strict=True))
    assert outcome.source_score.value == pytest.approx(right / 12)  # the target is the source
    assert outcome.costs.adapter_bytes == next(tmp_path.glob("projectors/*")).stat().st_size


def test_a_damaged_file_is_refused(tmp_path):
    size_projectors.kept(run_of(1), ToyResources(tmp_path))
    (path,) = tmp_path.glob("projectors/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"Remove it|digest"):
        read_kept(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError):
        size_projectors.kept(run_of(1), ToyResources(tmp_path))


def test_an_interrupted_training_leaves_no_file_and_continues(tmp_path, monkeypatch):
    resources, steps = ToyResources(tmp_path), size_projectors.run_steps
    whole = size_projectors.kept(run_of(4), ToyResources(tmp_path / "whole"))

    def interrupted(*arguments, **options):
        def stop(done):
            if done == 2:
                raise KeyboardInterrupt

        return steps(*arguments, **options, save_every=2, after_step=stop)

    monkeypatch.setattr(size_projectors, "run_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        size_projectors.kept(run_of(4), resources)
    assert not list(tmp_path.glob("projectors/*.safetensors"))

    def resumed(*arguments, **options):
        done = []
        found = steps(*arguments, **options, after_step=done.append)
        assert done == [3, 4]
        return found

    monkeypatch.setattr(size_projectors, "run_steps", resumed)
    found = size_projectors.kept(run_of(4), resources)
    assert all(torch.equal(value, found.values[name]) for name, value in whole.values.items())


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"file": "adapter.safetensors"}, "trained on a source"),
        ({"source": {"name": "h"}}, "no alignment noise"),
    ],
)
def test_what_the_method_has_not_is_refused(section, said):
    content = {"run_id": "one", "method": "size-projectors", "host": {"name": "h"}, "dataset": {"task": "sst2"}}
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate(content | {"adapter": section})


def test_the_set_is_the_source_and_four_targets_with_the_training_of_pretrain():
    runs = load_configs(["size-projectors"])
    hosts = ["minilm-l6", "minilm-l3", "wiki-256x4", "builtin:decoder", "builtin:base"]
    assert [run.host.name for run in runs] == hosts
    for run in runs:
        assert (run.method, run.dataset.task, run.seed, run.adapter.source.name) == (
            "size-projectors",
            "sst2",
            0,
            "minilm-l6",
        )
        assert run.adapter.pretraining == TrainingConfig(mixed_precision="bf16", noise=0.0)
        assert run.evaluation.timing_repetitions == 0


def test_the_set_in_trial_mode_trains_once_and_a_resumed_call_uses_what_is_kept(tmp_path, monkeypatch):
    hosts = write_hosts(tmp_path / "hosts", {"minilm-l6": "bert", "wiki-256x4": "bert"})
    data = write_data_sets(tmp_path / "data")
    results, trainings, steps = tmp_path / "results", [], size_projectors.run_steps

    def counted(*arguments, **options):
        trainings.append(steps(*arguments, **options))
        return trainings[-1]

    monkeypatch.setattr(size_projectors, "run_steps", counted)
    arguments = ["compare", "--config", "size-projectors", "--mode", "trial", "--device", "cpu", "--offline"]
    arguments += ["--no-figures", "--json", "--results-dir", results, "--host", "minilm-l6", "--host", "wiki-256x4"]
    arguments += at(hosts | {"sst2": data["sst2"]})
    called = call(*arguments)
    assert called.code == 0, called.err
    names = ["size-projectors--minilm-l6--sst2--s0", "size-projectors--wiki-256x4--sst2--s0"]
    assert (json.loads(called.out)["made"], trainings) == (names, [2])
    (path,) = (results / "projectors").iterdir()
    before = path.stat().st_mtime_ns
    assert differences(results) == []
    metrics = [json.loads((results / name / "metrics.json").read_text()) for name in names]
    assert [each["source"] for each in metrics] == ["minilm-l6", "minilm-l6"]
    assert metrics[0]["score"] == metrics[0]["source_score"] == metrics[1]["source_score"]
    assert {each["costs"]["adapter_bytes"] for each in metrics} == {path.stat().st_size}
    assert all((each["curve"], each["training_seconds"], each["search"]) == ([], 0, None) for each in metrics)
    shutil.rmtree(results / names[1])
    again = call(*arguments, "--resume")
    assert again.code == 0, again.err
    report = json.loads(again.out)
    assert (report["made"], report["skipped"], trainings) == (names[1:], names[:1], [2])
    assert path.stat().st_mtime_ns == before
    resumed = json.loads((results / names[1] / "metrics.json").read_text())
    assert resumed["score"] == metrics[1]["score"]
    timed = call(*arguments, "--time-only")
    assert timed.code == 0, timed.err
    assert json.loads(timed.out)["timed"] == names
    assert trainings == [2]
