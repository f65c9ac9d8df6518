"""A ported adapter on disk: the same logits, for its own host alone, or an error."""

import json
import random

import pytest
import torch
from file_damage import assert_flips_are_found, record_of
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load, save
from tiny_adapters import SMALL, tiny_universal
from tiny_hosts import SENTENCES, save_tiny_host, tiny_host, tiny_model, tiny_tokenizer

from uhl_cli.api import UniversalAdapter
from uhl_cli.data.examples import token_examples
from uhl_cli.errors import FingerprintError, FormatError, HostNotFoundError, UsageError
from uhl_cli.formats.container import PORTED, to_bytes
from uhl_cli.formats.folder import FILE_NAME
from uhl_cli.formats.ported import load_ported, save_ported
from uhl_cli.host import locate
from uhl_cli.host.checkpoint import load_host
from uhl_cli.schema import HostRecord

TOKENS = SMALL.model_copy(update={"kind": "tokens"})


def ported_to(family, folder, config=SMALL, **options):
    host = tiny_host(family)
    ported = tiny_universal(host, config).port(host, max_flops=1000.0, **options)
    path = save_ported(folder, ported, HostRecord(name=host.name, fingerprint=host.fingerprint))
    return ported, path


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_loaded_logits_are_the_saved_ones_bit_for_bit(tmp_path, family):
    ported, path = ported_to(family, tmp_path / "folder")
    assert path == tmp_path / "folder" / FILE_NAME
    assert set(ported.adapter.by_layer) == {0, 1}
    loaded = load_ported(
        tmp_path / "folder", tiny_model(family, tokenizer=tiny_tokenizer(family)), tiny_tokenizer(family)
    )
    assert torch.equal(loaded(SENTENCES[:5]), ported(SENTENCES[:5]))
    assert loaded.task == ported.task
    assert loaded.strategy == "anchors"


def test_host_is_loaded_by_its_recorded_name(tmp_path):
    host = load_host(str(save_tiny_host(tmp_path / "host", "bert")), device="cpu")
    ported = tiny_universal(host).port(host, max_flops=1000.0)
    save_ported(tmp_path / "folder", ported, HostRecord(name=host.name, fingerprint=host.fingerprint))
    assert torch.equal(load_ported(tmp_path / "folder")(SENTENCES[:3]), ported(SENTENCES[:3]))


@pytest.mark.parametrize("options", [{}, {"offline": True}, {"offline": False}])
def test_a_recorded_name_is_fetched_when_asked_alone(tmp_path, monkeypatch, options):
    host = tiny_host("bert")
    ported = tiny_universal(host).port(host, max_flops=1000.0)
    save_ported(tmp_path, ported, HostRecord(name="org/bert", fingerprint=host.fingerprint))
    asked = []

    def fetch(name, *, local_files_only, **_options):
        asked.append((name, local_files_only))
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(locate, "snapshot_download", fetch)
    with pytest.raises(HostNotFoundError, match="'org/bert' of this ported adapter is not here") as caught:
        load_ported(tmp_path, **options)
    assert "offline=False" in caught.value.hint
    assert asked == [("org/bert", options.get("offline", True))]


def test_token_task_and_left_out_parts_come_back(tmp_path):
    words = [text.split() for text in SENTENCES[:4]]
    examples = token_examples(words, [[0] * len(row) for row in words])
    ported, _ = ported_to("bert", tmp_path, TOKENS, strategy="size")
    loaded = load_ported(tmp_path, tiny_model("bert"), tiny_tokenizer("bert"))
    assert loaded.classes_of(examples) == ported.classes_of(examples)
    assert loaded.adapter.readout.pool is None
    assert loaded.strategy == "size"
    host = tiny_host("bert")
    poor = tiny_universal(host).port(host, max_flops=2.0)
    assert not poor.adapter.by_layer
    assert poor.adapter.readout.layer is None
    save_ported(tmp_path, poor, HostRecord(name=host.name, fingerprint=host.fingerprint))
    again = load_ported(tmp_path, tiny_model("bert"), tiny_tokenizer("bert"))
    assert again.adapter.readout.layer is None
    assert torch.equal(again(SENTENCES[:3]), poor(SENTENCES[:3]))


@pytest.mark.parametrize("options", [{"seed": 1}, {"hidden_size": 16}, {"num_hidden_layers": 3}])
def test_another_host_is_refused(tmp_path, options):
    ported_to("bert", tmp_path)
    with pytest.raises(FingerprintError, match="was made for tiny-bert") as caught:
        load_ported(tmp_path, tiny_model("bert", **options), tiny_tokenizer("bert"))
    assert caught.value.hint


def test_model_without_tokenizer_is_refused(tmp_path):
    ported_to("bert", tmp_path)
    with pytest.raises(UsageError):
        load_ported(tmp_path, tiny_model("bert"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return ported_to("bert", tmp_path_factory.mktemp("ported"))[1].read_bytes()


def written(record, tensors):
    """The file of this record, a dictionary or JSON, with a digest that fits."""
    text = record if isinstance(record, str) else json.dumps(record, sort_keys=True, ensure_ascii=False)
    return to_bytes(PORTED, text, tensors)


def refused(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / FILE_NAME).write_bytes(data)
    with pytest.raises(FormatError) as caught:
        load_ported(folder, tiny_model("bert"), tiny_tokenizer("bert"))
    assert caught.value.hint


def test_missing_and_damaged_files_are_refused(tmp_path, saved):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(FormatError):
            load_ported(folder, tiny_model("bert"), tiny_tokenizer("bert"))
    for data in (
        b"",
        b"\0" * 20,
        saved[:100],
        saved[:-1],
        saved[:8] + b"x" + saved[9:],
        random.Random(0).randbytes(999),
    ):
        refused(tmp_path, data)


def test_records_that_are_not_ours_are_refused(tmp_path, saved):
    record = record_of(saved)
    for text in ("", "[]", {**record, "extra": 1}, {**record, "task": None}):
        refused(tmp_path, written(text, load(saved)))
    refused(tmp_path, save(load(saved), metadata=None))
    refused(tmp_path, save(load(saved), metadata={"format": "pt"}))


@pytest.mark.parametrize("version", ["2.0", "5.0"])
def test_an_older_format_is_refused(tmp_path, saved, version):
    (tmp_path / FILE_NAME).write_bytes(written(record_of(saved) | {"format_version": version}, load(saved)))
    with pytest.raises(FormatError, match=f"the format version is {version}, which this uhl no longer reads"):
        load_ported(tmp_path, tiny_model("bert"), tiny_tokenizer("bert"))


def test_missing_parts_are_refused(tmp_path, saved):
    tensors = load(saved)
    for name in tensors:
        refused(tmp_path, written(record_of(saved), {key: value for key, value in tensors.items() if key != name}))
    refused(
        tmp_path,
        written(record_of(saved), {key: value for key, value in tensors.items() if "depth_weights" not in key}),
    )
    refused(tmp_path, written(record_of(saved), {**tensors, "layers.2.router": tensors["layers.1.router"].clone()}))


def with_structure(saved, **changes):
    record = record_of(saved)
    record["structure"] |= changes
    return written(record, load(saved))


def test_a_structure_that_the_tensors_or_the_host_do_not_have_is_refused(tmp_path, saved):
    structure = record_of(saved)["structure"]
    layers = structure["layers"]
    assert set(layers) == {"0", "1"}
    assert structure["readout_depths"] == [0, 1, 2]
    for changes in (
        {"layers": {"0": layers["0"]}},
        {"layers": layers | {"7": ["q"]}},
        {"layers": layers | {"0": ["nonsense"]}},
        {"layers": layers | {"0": ["q", "q"]}},
        {"layers": layers | {"0": []}},
        {"layers": {"0": ["q"], "1": ["q"]}},
        {"readout_depths": [0, 1]},
        {"readout_depths": [0, 1, 2, 3]},
        {"readout_depths": [0, 1, 1]},
        {"readout_depths": [-1, 0, 1]},
        {"readout_depths": []},
        {"num_atoms": structure["num_atoms"] + 1},
        {"num_atoms": 1},
        {"num_atoms": 10**12},
        {"top_k": 1},
        {"readout_size": structure["readout_size"] + 1},
        {"readout_update": False},
        {"shift": True},
        {"more": 1},
    ):
        refused(tmp_path, with_structure(saved, **changes))
    folder = tmp_path / "as it was"
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(with_structure(saved))
    assert load_ported(folder, tiny_model("bert"), tiny_tokenizer("bert")).adapter.structure.readout_depths == (0, 1, 2)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("layers.0.router", lambda value: value[:, :5]),
        ("layers.0.router", lambda value: value[:3]),
        ("layers.0.read", lambda value: value.T),
        ("layers.0.read_bias", lambda value: value[:2]),
        ("layers.1.edits.mlp", lambda value: value[:, :7]),
        ("layers.1.edits.mlp", lambda value: value[:2]),
        ("readout.layer.edits.readout", lambda value: value[:, :2]),
        ("readout.out_weight", lambda value: value[:, :2]),
        ("readout.out_weight", lambda value: value[:1]),
        ("readout.out_bias", lambda value: value[:1]),
        ("readout.bias", lambda value: value[:2]),
        ("readout.pool", lambda value: value[:2]),
        ("readout.depth_weights.2", lambda value: value[:2]),
        ("readout.depth_weights.2", lambda value: value[:, :5]),
        ("readout.depth_weights.2", lambda value: value.float()),
        ("readout.depth_weights.2", lambda value: torch.full_like(value, 255)),
        ("threshold", lambda value: value[:0]),
        ("threshold", lambda value: value.repeat(99)),
        ("layers.0.router", lambda value: value.float()),
        ("layers.0.router", lambda value: value.to(torch.int8)),
        ("layers.0.router", lambda value: torch.full_like(value, 255)),  # steps and offsets that are no numbers
        ("readout.layer.edits.readout", lambda value: torch.full_like(value, 255)),
        ("layers.0.read_bias", lambda value: value * torch.nan),
        ("layers.0.read_bias", lambda value: value.to(torch.uint8)),
    ],
)
def test_parts_of_another_shape_or_kind_are_refused(tmp_path, saved, name, function):
    tensors = load(saved)
    tensors[name] = function(tensors[name]).contiguous()
    refused(tmp_path, written(record_of(saved), tensors))


@pytest.mark.parametrize(
    "names",
    [
        {"layers.0.router": "layers.x.router"},
        {"layers.0.edits.mlp": "layers.0.edits.nonsense"},
        {"readout.depth_weights.2": "readout.depth_weights.77"},
        {"readout.depth_weights.2": "readout.depth_weights.x"},
        {"layers.1.router": "layers.01.router"},
        {"readout.depth_weights.0": "readout.depth_weights.-1"},
        {"readout.layer.edits.readout": "readout.layer.edits.q"},
        {"readout.pool": "readout.well"},
        {"threshold": "threshhold"},
    ],
)
def test_parts_of_another_name_are_refused(tmp_path, saved, names):
    tensors = {names.get(name, name): value for name, value in load(saved).items()}
    refused(tmp_path, written(record_of(saved), tensors))


def test_every_flipped_bit_is_found(tmp_path, saved):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer("bert")
    path = tmp_path / FILE_NAME
    path.write_bytes(saved)
    assert_flips_are_found(path, lambda: load_ported(tmp_path, model, tokenizer), error=FormatError)


def test_the_limit_is_kept_and_reported():
    host = tiny_host("llama", num_hidden_layers=4)
    universal = tiny_universal(host)
    assert isinstance(universal, UniversalAdapter)
    full, poor = universal.port(host, max_flops=1000.0), universal.port(host, max_flops=3.0)
    assert full.plan.left_out == ()
    assert poor.plan.left_out
    assert not torch.equal(full(SENTENCES[:2]), poor(SENTENCES[:2]))
