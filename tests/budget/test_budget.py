"""What `budget` reports is what the file holds and what the injected model does, with weights or without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_adapters import SMALL, random_adapter, tiny_file, tiny_task_file, tiny_universal
from tiny_hosts import SENTENCES, SWEEP, save_tiny_host, tiny_host
from toy_runs import TINY_LIMIT

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.align import features
from uhl_cli.api import UniversalAdapter
from uhl_cli.budget import target as budget_measure
from uhl_cli.budget.report import BudgetOptions, TargetBudget
from uhl_cli.budget.run import run_budget
from uhl_cli.budget.target import anchor_examples, measure
from uhl_cli.commands.options import DataOptions, HostOptions
from uhl_cli.cost.flops import count_flops
from uhl_cli.data import Examples
from uhl_cli.errors import (
    BudgetError,
    FormatError,
    HostError,
    HostMapError,
    HostNotFoundError,
    UnknownModelTypeError,
    UsageError,
)
from uhl_cli.formats.adapter import read_adapter, write_adapter
from uhl_cli.formats.convert import to_file
from uhl_cli.formats.task import write_task
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.config_only import load_config_host
from uhl_cli.schema import AdapterConfig

BERT_LARGE = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
}
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, tiny_file())
    return path


def options_for(file: Path, **changes: object) -> BudgetOptions:
    return BudgetOptions(adapter=file, **changes)


def target(folder: Path | str) -> HostOptions:
    return HostOptions(name=str(folder), device="cpu", offline=True)


def write_config(folder: Path, content: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def measured(host: Host, adapter: UniversalAdapter | None = None, **changes: object) -> TargetBudget:
    adapter = adapter or tiny_universal(host)
    options = options_for(Path("none"), **{"max_flops": TINY_LIMIT, **changes})
    return measure(adapter, host, options, examples=anchor_examples(adapter), source="anchors")


def test_file_alone(file):
    report = run_budget(options_for(file))
    assert report.target is None
    assert report.file.bytes == file.stat().st_size == sum(part.bytes for part in report.file.parts)
    assert (report.limits.flops_percent, report.limits.atoms_per_token) == (None, None)
    assert report.beyond == ()


def test_bytes_at_and_beyond_the_limit(file):
    size = file.stat().st_size
    assert run_budget(options_for(file, max_bytes=size)).beyond == ()
    (beyond,) = run_budget(options_for(file, max_bytes=size - 1)).beyond
    assert f"{size:,} bytes" in beyond


@pytest.mark.parametrize("family", SWEEP)
def test_report_of_a_host(family):
    host = tiny_host(family)
    adapter = tiny_universal(host)
    report = measured(host, adapter, batch_size=2, sequence_length=24)
    ported = adapter.port(host, max_flops=TINY_LIMIT)
    bare, attached = (count_flops(host, folded, sequence_length=24, batch_size=2) for folded in (None, ported.adapter))
    for count in (report.flops.torch, report.flops.fvcore):
        assert (count.host, count.adapter) == (bare, attached - bare)
        assert count.percent == pytest.approx(100 * (attached - bare) / bare)
    assert report.flops.host_difference_percent == report.flops.adapter_difference_percent == 0
    assert report.memory.host_weights == 4 * report.parameters
    assert report.memory.adapter_weights > 0
    assert report.memory.adapter_peak > 0
    assert (report.sequence_length, report.batch_size, report.weights_loaded) == (24, 2, True)
    assert report.left_out == ()
    assert report.refused is None
    assert report.time is None


def test_a_pass_is_no_longer_than_the_host_takes():
    host = tiny_host("bert")
    assert measured(host, sequence_length=4096).sequence_length == host.max_length == 64


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
def test_active_atoms_are_measured_on_the_texts(kind):
    host = tiny_host("bert")
    config = SMALL.model_copy(update={"kind": kind})
    adapter = tiny_universal(host, config)
    atoms = measured(host, adapter).atoms
    ported = adapter.port(host, max_flops=TINY_LIMIT)
    texts = adapter.bank.anchors.texts
    assert atoms is not None
    assert (atoms.data, atoms.texts) == ("anchors", len(texts))
    # One text at a time, the routers' own figures, weighted by the tokens that they saw.
    total = tokens = 0.0
    for text in texts:
        inputs = host.tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        content = 1 - inputs.pop("special_tokens_mask")
        with torch.inference_mode(), ported.attached() as attachment:
            state = host.model(**inputs).last_hidden_state
            attachment.readout_features(state)
            total += float(attachment.active_atoms(content)) * int(content.sum())
        tokens += int(content.sum())
    assert atoms.per_token == pytest.approx(total / tokens, rel=1e-4)
    assert 0 < atoms.per_token < 2


@pytest.mark.parametrize(("threshold", "expected"), [(-1e4, 2.0), (1e4, 0.0)])
def test_atoms_follow_the_thresholds(threshold, expected):
    host = tiny_host("bert")
    adapter = tiny_universal(host)
    stored = {**adapter.stored, "threshold": torch.full((2,), threshold)}
    atoms = measured(host, replace(adapter, stored=stored)).atoms
    assert atoms is not None
    assert atoms.per_token == expected


def saved(host: Host, path: Path, config: AdapterConfig = SMALL, *, featured: bool = False) -> UniversalAdapter:
    """The adapter of `tiny_universal`, written to a file."""
    adapter = tiny_universal(host, config, featured=featured)
    canonical: CanonicalAdapter = random_adapter(config)
    write_adapter(path, to_file(canonical, adapter.bank, adapter.manifest, adapter.features))
    return adapter


def test_file_on_a_host_and_each_limit(tmp_path):
    folder = save_tiny_host(tmp_path / "host", "bert")
    file = tmp_path / "adapter.safetensors"
    saved(tiny_host("bert"), file)
    report = run_budget(options_for(file, target=target(folder), max_flops=TINY_LIMIT, sequence_length=32))
    found = report.target
    assert found is not None
    assert found.atoms is not None
    assert (found.name, found.model_type) == ("host", "bert")
    assert report.beyond == ()
    assert report.limits.atoms_per_token == 2.0
    below = found.atoms.per_token - 0.01
    tight = run_budget(
        options_for(
            file, target=target(folder), max_flops=TINY_LIMIT, sequence_length=32, max_atoms=below, max_bytes=1000
        )
    )
    by_bytes, by_atoms = tight.beyond
    assert by_bytes.endswith("bytes, the limit is 1,000")
    assert by_atoms.endswith(f"active atoms per token, the limit is {below:g}")


def test_what_port_leaves_out_is_left_out_and_named():
    host = tiny_host("bert", hidden_size=64, num_hidden_layers=4)
    adapter = tiny_universal(host)
    whole = measured(host, adapter)
    limit = 0.8 * whole.whole_percent
    report = measured(host, adapter, max_flops=limit)
    assert report.left_out == adapter.align(host, max_flops=limit).plan.left_out != ()
    assert report.whole_percent == whole.whole_percent
    assert report.flops.percent <= limit < whole.flops.percent
    assert whole.left_out == ()


def test_a_host_that_port_refuses_is_reported_and_beyond(tmp_path):
    folder = save_tiny_host(tmp_path / "host", "bert")
    file = tmp_path / "adapter.safetensors"
    adapter = saved(tiny_host("bert"), file)
    with pytest.raises(BudgetError) as refused:
        adapter.port(tiny_host("bert"), max_flops=0.1)
    for named in ("target", "target_config"):
        report = run_budget(options_for(file, max_flops=0.1, **{named: target(folder)}))
        assert report.target is not None
        assert report.beyond == (refused.value.message.rstrip("."),) == (report.target.refused,)
        assert report.target.left_out == ()
        assert report.target.flops.percent > 0.1


@pytest.mark.integration
def test_a_longer_pass_is_held_against_the_limit_too(tmp_path):
    """The plan is made at the host's 64 tokens; a token task's pooling costs more in a larger batch."""
    host = tiny_host("bert", hidden_size=64)
    config = SMALL.model_copy(update={"kind": "tokens"})
    folder = save_tiny_host(tmp_path / "host", "bert", hidden_size=64)
    file = tmp_path / "adapter.safetensors"
    saved(host, file, config)
    limit = run_budget(options_for(file, target_config=target(folder), max_flops=TINY_LIMIT)).target.whole_percent * 1.1
    within = run_budget(options_for(file, target_config=target(folder), max_flops=limit))
    beyond = run_budget(options_for(file, target_config=target(folder), max_flops=limit, batch_size=64))
    assert within.beyond == ()
    assert beyond.target.left_out == within.target.left_out == ()
    assert "% FLOPs" in beyond.beyond[0]


@pytest.mark.parametrize("family", SWEEP)
def test_configuration_alone_counts_as_the_model_does(family, tmp_path):
    host = tiny_host(family)
    folder = save_tiny_host(tmp_path / "host", family)
    (folder / "model.safetensors").unlink()
    file = tmp_path / "adapter.safetensors"
    adapter = saved(host, file)
    real = measured(host, adapter, strategy="size", sequence_length=32)
    hollow = run_budget(
        options_for(file, target_config=target(folder), strategy="size", sequence_length=32, max_flops=TINY_LIMIT)
    ).target
    assert hollow is not None
    assert hollow.flops.torch == real.flops.torch
    assert hollow.flops.fvcore == real.flops.fvcore
    assert hollow.memory.host_weights == real.memory.host_weights
    assert hollow.memory.adapter_weights == real.memory.adapter_weights
    assert (hollow.parameters, hollow.model_type, hollow.hidden_size) == (real.parameters, real.model_type, 32)
    assert (hollow.atoms, hollow.weights_loaded, hollow.device) == (None, False, "meta")
    assert load_config_host(str(folder)).max_length == host.max_length
    # A wider host costs more, so equal figures say something.
    wide = save_tiny_host(tmp_path / "wide", family, hidden_size=48)
    other = run_budget(options_for(file, target_config=target(wide), strategy="size", max_flops=TINY_LIMIT)).target
    assert other.flops.torch.host > hollow.flops.torch.host


@pytest.mark.integration
def test_configuration_alone_counts_the_depths_that_a_feature_bank_listens_to(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_REGRESSORS", 4 * 32)
    host = tiny_host("bert", num_hidden_layers=6)
    folder = save_tiny_host(tmp_path / "host", "bert", num_hidden_layers=6)
    file, bare = tmp_path / "adapter.safetensors", tmp_path / "bare.safetensors"
    adapter = saved(host, file, featured=True)
    saved(host, bare)
    assert len(adapter.port(host, max_flops=TINY_LIMIT).adapter.readout.depth_weights) == 4
    real = measured(host, adapter)
    hollow, joint = (
        run_budget(options_for(path, target_config=target(folder), max_flops=TINY_LIMIT)).target
        for path in (file, bare)
    )
    assert hollow.flops.torch == real.flops.torch
    assert hollow.memory.adapter_weights == real.memory.adapter_weights
    assert joint.flops.torch.adapter > hollow.flops.torch.adapter  # without a bank at any of the seven depths


@pytest.mark.integration
def test_bert_large_by_its_configuration(file, tmp_path):
    path = write_config(tmp_path / "large", BERT_LARGE)
    found = run_budget(options_for(file, target_config=target(path), batch_size=2)).target
    d, f, layers, tokens = 1024, 4096, 24, 128
    by_hand = 2 * (tokens * layers * (8 * d * d + 4 * d * f + 4 * tokens * d) + 2 * d * d)
    assert found.flops.fvcore.host == pytest.approx(by_hand, rel=0.01)
    assert found.flops.torch.host == pytest.approx(by_hand, rel=0.01)
    assert found.parameters == pytest.approx(335_000_000, rel=0.01)
    assert found.memory.host_weights == 4 * found.parameters
    assert (found.name, found.num_hidden_layers) == ("large", layers)
    k, atoms, readout = 2, SMALL.num_atoms, SMALL.readout_size
    route = 2 * atoms * d + 2 * k * d
    layer = route + 2 * k * (4 * d) + 2 * (4 * k * d)
    added = layers * layer + route + 2 * k * readout + 2 * readout * d * (layers + 1) + 2 * readout
    assert found.flops.fvcore.adapter == pytest.approx(2 * tokens * added, rel=0.01)


@pytest.mark.integration
def test_eight_billion_parameters_by_their_configuration(file, tmp_path):
    write_config(tmp_path / "llama-8b", LLAMA_8B)
    options = HostOptions(name=str(tmp_path / "llama-8b"), dtype="auto")
    found = run_budget(options_for(file, target_config=options, sequence_length=256)).target
    d, f, layers, tokens, key_value = 4096, 14336, 32, 256, 1024
    linear = 2 * (2 * d * d + 2 * d * key_value + 3 * d * f)
    by_hand = tokens * layers * (linear + 4 * tokens * d)
    assert found.flops.fvcore.host == pytest.approx(by_hand, rel=0.01)
    assert found.flops.torch.host == pytest.approx(by_hand, rel=0.01)
    # Without the language-model head, which is no part of the base model.
    assert found.parameters == 128256 * d + layers * (2 * d * d + 2 * d * key_value + 3 * d * f + 2 * d) + d
    assert (found.dtype, found.memory.host_weights) == ("bfloat16", 2 * found.parameters)
    assert found.flops.percent < 1


def test_configurations_that_serve_no_count(file, tmp_path):
    def refused(path: Path | str, kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            run_budget(options_for(file, target_config=target(path)))

    unknown = write_config(tmp_path / "none", {"model_type": "no-such-type"})
    refused(unknown, UnknownModelTypeError, "no-such-type")
    streamless = write_config(tmp_path / "xlm", {"model_type": "xlm", "emb_dim": 64, "n_layers": 2, "n_heads": 4})
    refused(streamless, HostMapError, "not found without weights: No list of layers")
    broken = write_config(tmp_path / "heads", {**BERT_LARGE, "num_attention_heads": 7})
    refused(broken, HostError, "heads")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", HostError, "has no config.json")
    refused(tmp_path / "none.json", HostNotFoundError, "no file")
    refused("./none", HostNotFoundError, "no file")
    refused("nobody/no-such-model", HostNotFoundError, "not in the cache")
    refused("builtin:none", HostNotFoundError, "builtin")
    text = tmp_path / "text.json"
    text.write_text("no json")
    refused(text, HostError, "cannot be read")
    with pytest.raises(UsageError, match="dtype"):
        load_config_host(str(unknown), dtype="int3")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target": HostOptions(name="a"), "target_config": HostOptions(name="b")}, "two targets"),
        ({"max_flops": 5.0}, "--max-flops"),
        ({"max_atoms": 1.5}, "--max-atoms"),
        ({"target_config": HostOptions(name="b"), "max_atoms": 1.5}, "--max-atoms"),
        ({"time": True}, "--time"),
        ({"target_config": HostOptions(name="b"), "time": True}, "--time"),
        ({"data": DataOptions(task="reviews")}, "--data"),
    ],
)
def test_what_cannot_be_known_is_refused(file, changes, match):
    with pytest.raises(UsageError, match=match):
        run_budget(options_for(file, **changes))


def test_a_limit_that_the_file_cannot_pass_needs_no_weights(file):
    assert SMALL.top_k == 2
    report = run_budget(options_for(file, max_atoms=2.0))
    assert (report.limits.atoms_per_token, report.beyond) == (2.0, ())


def test_damaged_files_are_refused(file, tmp_path):
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError):
        run_budget(options_for(file))
    with pytest.raises(FormatError, match="no file"):
        run_budget(options_for(tmp_path / "none"))


@pytest.mark.parametrize("own_task", [True, False])
def test_a_task_file_is_listed_apart_and_its_readout_counted(own_task, tmp_path):
    folder = save_tiny_host(tmp_path / "host", "bert")
    file = tmp_path / "adapter.safetensors"
    adapter = saved(tiny_host("bert"), file)
    config = SMALL if own_task else SMALL.model_copy(update={"num_labels": 30})
    labels = tuple(f"label {index}" for index in range(config.num_labels))
    changes = {
        "config": config,
        "task": adapter.manifest.task.model_copy(update={"labels": labels}),
        "label_counts": (1,) * config.num_labels,
    }
    manifest = adapter.manifest.model_copy(update=changes)
    content = tiny_task_file(manifest, adapter=read_adapter(file).digest, own_task=own_task)
    tuned = tmp_path / "tuned.task.safetensors"
    write_task(tuned, content)
    reports = {
        task_file: run_budget(
            options_for(file, target=target(folder), max_flops=TINY_LIMIT, strategy="size", task_file=task_file)
        )
        for task_file in (None, tuned)
    }
    sizes = reports[tuned].task_file
    assert sizes.bytes == tuned.stat().st_size == sum(part.bytes for part in sizes.parts)
    parts = ["header", "delta-theta"] if own_task else ["header", "delta-theta", "readout"]
    assert [part.part for part in sizes.parts] == parts
    assert sizes.parameters == sum(parameter.codes.size for parameter in content.parameters.values())
    assert reports[tuned].file == reports[None].file
    assert reports[None].task_file is None
    # A readout of 27 more labels costs a product of five inputs for each.
    added = reports[tuned].target.flops.torch.adapter - reports[None].target.flops.torch.adapter
    assert added == (0 if own_task else 2 * 27 * SMALL.readout_size)
    write_task(tuned, replace(content, record=content.record.model_copy(update={"adapter": "0" * 64})))
    with pytest.raises(FormatError, match="another adapter"):
        run_budget(options_for(file, task_file=tuned))


def test_time_is_taken_by_turns(monkeypatch):
    host = tiny_host("bert")
    adapter = tiny_universal(host)
    ran: list[str] = []
    durations = {"alone": iter([9.0, 9.0, 9.0, 1.0, 2.0, 1.0]), "attached": iter([1.0, 1.0, 1.0, 1.5, 4.0, 1.0])}

    def seconds(_map: object, folded: object, _shape: object) -> float:
        ran.append("alone" if folded is None else "attached")
        return next(durations[ran[-1]])

    monkeypatch.setattr(budget_measure, "_seconds", seconds)
    time = measured(host, adapter, time=True, repetitions=3).time
    assert ran == ["alone", "attached"] * 6
    assert time is not None
    # Ratios 1.5, 2 and 1; the passes before, which would give 1/9, are left out.
    assert (time.ratio_low, time.ratio, time.ratio_high) == (1.25, 1.5, 1.75)
    assert (time.host_seconds, time.attached_seconds, time.repetitions) == (1.0, 1.5, 3)


def test_time_runs_the_real_passes():
    host = tiny_host("bert")
    time = measured(host, time=True, repetitions=3).time
    assert time is not None
    assert 0 < time.ratio_low <= time.ratio <= time.ratio_high
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.model.modules())


def test_anchor_examples_are_the_files_texts():
    host = tiny_host("bert")
    sequence = anchor_examples(tiny_universal(host))
    tokens = anchor_examples(tiny_universal(host, SMALL.model_copy(update={"kind": "tokens"})))
    assert set(sequence.texts) <= set(SENTENCES)
    assert isinstance(tokens, Examples)
    assert tokens.words is not None
    words = [text[slice(*span)] for text, spans in zip(tokens.texts, tokens.words, strict=True) for span in spans]
    assert "".join(words) == "".join(tokens.texts).replace(" ", "")
