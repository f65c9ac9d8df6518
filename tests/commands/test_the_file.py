"""What the file promises: same bytes for the same run, the score that training reported, limits held early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_hosts import SENTENCES, tiny_host
from toy_runs import TINY_LIMIT, carry, make_adapter, sequence_data

from uhl_cli.align.texts import general_texts
from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, PretrainOptions, TuneOptions
from uhl_cli.commands.pretrain import run_pretrain
from uhl_cli.commands.scoring import host_record
from uhl_cli.commands.texts import MIN_WORDS
from uhl_cli.data import load_task
from uhl_cli.errors import BudgetError, DataError, FingerprintError, OutputError
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.formats.ported import load_ported, save_ported
from uhl_cli.host.encode import encode
from uhl_cli.schema import TrainingConfig
from uhl_cli.transfer.general import opinions


@pytest.mark.integration
def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    files = []
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        path = tmp_path / f"{name}.safetensors"
        make_adapter(tiny_host("bert"), sequence_data(), path, seed=seed)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.integration)])
def test_the_score_of_the_file_is_the_score_that_training_reported(family, tmp_path):
    path = tmp_path / "adapter.safetensors"
    report = make_adapter(tiny_host(family), sequence_data(), path, max_steps=12)
    _, carried = carry(path, tiny_host(family), sequence_data())
    manifest = read_adapter(path).manifest
    assert carried.scores["ported"] == report.score == manifest.score
    assert carried.scores["readout_only"] == report.readout_only
    assert carried.scores["head_only"] == report.head_only
    assert round(carried.atoms_per_token, 6) == manifest.atoms_per_token
    assert manifest.source == host_record(tiny_host(family))


@pytest.mark.integration
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_feature_bank_fills_the_file_and_its_score_is_the_reported_one(family, tmp_path):
    path = tmp_path / "adapter.safetensors"
    settings = {"anchors": "general", "max_bytes": 400_000, "max_steps": 12}
    report = make_adapter(tiny_host(family), sequence_data(), path, feature_words=100_000, **settings)
    content = read_adapter(path)
    features = content.features
    assert features is not None
    assert content.manifest.parts.features is not None
    assert report.feature_words == features.anchors.num_words == content.manifest.parts.features.words
    assert features.anchors.num_words >= MIN_WORDS
    assert not set(features.anchors.texts) & set(content.anchors.texts)
    # As there is room for, less the words that this host of 64 positions cuts off; no byte more than allowed.
    assert 350_000 < report.bytes == path.stat().st_size <= 400_000
    assert set(features.anchors.texts) <= {*opinions(), *general_texts(), *load_task("reviews").train.texts}
    _, carried = carry(path, tiny_host(family), sequence_data())
    assert carried.feature_quality is not None
    assert carried.scores["ported"] == report.score == content.manifest.score
    assert carried.scores["readout_only"] == report.readout_only
    assert carried.scores["head_only"] == report.head_only


@pytest.mark.integration
def test_a_readout_by_its_feature_bank_is_the_readout_of_the_source(tmp_path):
    """On the source itself, the maps that the bank gives are those through canonical space, near enough."""
    host, path = tiny_host("bert"), tmp_path / "adapter.safetensors"
    make_adapter(host, sequence_data(), path, anchors="general", feature_words=12_000, max_steps=12)
    adapter = UniversalAdapter.load(path)
    assert adapter.features is not None
    outputs = {}
    shuffled = replace(adapter.features, codes=adapter.features.codes.flip(0))
    for name, features in (("bank", adapter.features), ("none", None), ("shuffled", shuffled)):
        ported = replace(adapter, features=features).port(host, max_flops=TINY_LIMIT)
        with torch.inference_mode(), ported.attached() as attachment:
            encoded = encode(host, list(SENTENCES))
            final = host.map.base(**encoded.model_inputs()).last_hidden_state
            outputs[name] = attachment.readout_features(final)[encoded.content_mask]
    spread = (outputs["none"] - outputs["none"].mean(0)).square().mean()
    assert float((outputs["bank"] - outputs["none"]).square().mean() / spread) < 0.1
    assert float((outputs["shuffled"] - outputs["none"]).square().mean() / spread) > 0.5  # the control


@pytest.mark.integration
def test_a_feature_bank_is_made_unasked_where_there_is_text_and_room(tmp_path):
    host = tiny_host("bert")
    words = {}
    for name, settings in (
        ("text and room", {"anchors": "general", "max_bytes": 300_000}),
        ("no room", {"anchors": "general", "max_bytes": 190_000}),
        ("no text", {}),
    ):
        path = tmp_path / f"{name}.safetensors"
        report = make_adapter(host, sequence_data(), path, feature_words=None, **settings)
        words[name] = report.feature_words
        assert report.bytes <= settings.get("max_bytes", 1_000_000)
        assert (read_adapter(path).features is not None) == (report.feature_words > 0)
    assert words["text and room"] >= MIN_WORDS
    assert (words["no room"], words["no text"]) == (0, 0)


def test_no_feature_bank_where_none_is_wanted(tmp_path):
    host, path = tiny_host("bert"), tmp_path / "adapter.safetensors"
    report = make_adapter(host, sequence_data(), path, anchors="general")
    content = read_adapter(path)
    assert (report.feature_words, content.features, content.manifest.format_version) == (0, None, "2.0")
    _, carried = carry(path, host, sequence_data())
    assert carried.feature_quality is None
    assert carried.scores["ported"] == report.score


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, DataError, "words of text for a feature bank"),
        ({"anchors": "general", "max_bytes": 190_000}, BudgetError, "too few for a feature bank"),
    ],
)
def test_a_feature_bank_that_cannot_be_is_refused_before_training(settings, error, words, tmp_path, monkeypatch):
    monkeypatch.setattr("uhl_cli.commands.pretrain.train", lambda *_, **__: pytest.fail("training began"))
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(error, match=words) as caught:
        make_adapter(tiny_host("bert"), sequence_data(), path, feature_words=30_000, **settings)
    assert caught.value.hint
    assert not path.exists()


@pytest.mark.integration
def test_anchors_come_from_the_task_from_the_package_or_from_a_file(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{sentence} indeed" for sentence in SENTENCES))
    words = {}
    for name, anchors in (("task", None), ("general", "general"), ("file", str(texts))):
        path = tmp_path / f"{name}.safetensors"
        make_adapter(tiny_host("bert"), sequence_data(), path, anchors=anchors)
        content = read_adapter(path)
        assert content.manifest.anchors.digest == content.anchors.digest
        words[name] = content.anchors
    assert words["task"].origin == "training texts of toy"
    assert set(words["task"].texts) <= set(sequence_data().train.texts)
    assert words["general"].origin == "general"
    assert not set(words["general"].texts) & set(SENTENCES)
    assert words["file"].origin == "file texts.txt"
    assert all(text.endswith("indeed") for text in words["file"].texts)


def test_a_missing_anchor_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no-such-file"):
        make_adapter(tiny_host("bert"), sequence_data(), tmp_path / "a.safetensors", anchors="no-such-file.txt")


def test_too_many_bytes_are_refused_before_training_with_a_number_that_fits(tmp_path, monkeypatch):
    path = tmp_path / "adapter.safetensors"
    monkeypatch.setattr("uhl_cli.commands.pretrain.train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(BudgetError, match="the limit is 180,000") as caught:
        make_adapter(tiny_host("bert"), sequence_data(), path, max_bytes=180_000, num_anchors=256)
    assert not path.exists()
    monkeypatch.undo()
    fitting = int(caught.value.hint.rstrip(".").rsplit(" ", 1)[1])
    report = make_adapter(tiny_host("bert"), sequence_data(), path, max_bytes=180_000, num_anchors=fitting)
    assert report.bytes <= 180_000


def test_too_many_flops_are_refused_before_training(tmp_path):
    with pytest.raises(BudgetError, match="FLOPs"):
        make_adapter(tiny_host("bert"), sequence_data(), tmp_path / "a.safetensors", max_flops=1.0)


def test_parts_are_left_out_to_hold_a_middling_limit(tmp_path):
    path = tmp_path / "adapter.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path)
    wide = tiny_host("bert", hidden_size=64)
    _, full = carry(path, wide, sequence_data())
    _, held = carry(path, wide, sequence_data(), max_flops=full.flops.percent * 0.8)
    assert full.left_out == ()
    assert held.left_out[0] == "module up"
    assert held.flops.percent <= full.flops.percent * 0.8


def test_a_kept_ported_adapter_gives_the_same_logits_without_aligning(tmp_path, monkeypatch):
    path = tmp_path / "adapter.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path)
    target = tiny_host("gpt2", hidden_size=40)
    ported, _ = carry(path, target, None)
    save_ported(tmp_path / "ported", ported, host_record(target))
    monkeypatch.setattr("uhl_cli.ported.aligned.word_states", lambda *_, **__: pytest.fail("aligned again"))
    again = load_ported(tmp_path / "ported", target.model, target.tokenizer)
    assert (again(list(SENTENCES)) == ported(list(SENTENCES))).all()
    other = tiny_host("gpt2", hidden_size=40, seed=5)
    with pytest.raises(FingerprintError):
        load_ported(tmp_path / "ported", other.model, other.tokenizer)


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_text("precious")
    options = PretrainOptions(host=HostOptions(name="x"), data=DataOptions(task="sst2"), output=path)
    with pytest.raises(OutputError, match="already exists"):
        run_pretrain(options)
    assert path.read_text() == "precious"


def test_the_command_in_the_manifest_names_what_decides_the_file_and_nothing_else():
    options = PretrainOptions(
        host=HostOptions(name="/secret/disk/bert", offline=True),
        data=DataOptions(task="sst2", data="/secret/disk/sst2"),
        training=TrainingConfig(max_steps=7, seed=3, updates=False),
        anchors="general",
        resume=True,
    )
    command = options.command()
    assert command == (
        "uhl pretrain --host bert --task sst2 --data sst2 --anchors general --max-steps 7 --no-updates --seed 3"
    )


def test_a_runs_identity_names_every_option_but_those_that_decide_nothing():
    pretraining = PretrainOptions(host=HostOptions(name="a"), data=DataOptions(task="b"))
    tuning = TuneOptions(adapter="a.safetensors", target=HostOptions(name="a"))
    nothing = {"data", "output", "resume", "overwrite", "save_every", "evaluation_batch_size"}
    for options, host, apart in (
        (pretraining, "host", {"licence"}),
        (tuning, "target", {"adapter", "optimise", "score_data", "cache"}),
    ):
        assert set(type(options).model_fields) - set(options.deciding()) == nothing | apart | {host}
        for changes in ({"max_flops": 9.0}, {host: HostOptions(name="a", dtype="bfloat16")}):
            assert options.model_copy(update=changes).deciding() != options.deciding()
        other = {"resume": True, host: HostOptions(name="c"), "output": Path("c")}
        assert options.model_copy(update=other).deciding() == options.deciding()
