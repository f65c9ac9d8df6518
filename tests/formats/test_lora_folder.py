"""The folder of a LoRA: the same logits bit for bit, for its own host and its own adapter alone, or an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from file_damage import assert_flips_are_found, problems_of, record_of
from safetensors.torch import load
from tiny_adapters import SMALL, meta_twin, random_lora, tiny_universal, tuned_record
from tiny_hosts import SENTENCES, save_tiny_host, tiny_host, tiny_model, tiny_tokenizer

from uhl_cli.api import UniversalAdapter
from uhl_cli.errors import FingerprintError, FormatError, UhlError, UsageError
from uhl_cli.formats.container import PORTED, to_bytes
from uhl_cli.formats.folder import FILE_NAME, read_ported, read_tuned
from uhl_cli.formats.ported import load_ported, save_ported
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.inspect.report import InspectOptions
from uhl_cli.inspect.run import run_inspect
from uhl_cli.ported.model import PortedModel
from uhl_cli.schema import AdapterConfig, HostRecord

TOKENS = SMALL.model_copy(update={"kind": "tokens"})
DIGEST, OTHER = "a" * 64, "b" * 64


def tuned_to(
    host: Host, folder: Path, config: AdapterConfig = SMALL, *, tuned: bool = True, rank: int = 3
) -> tuple[UniversalAdapter, PortedModel]:
    """An adapter, and a LoRA of random values on its ported readout, kept in a folder."""
    universal = tiny_universal(host, config, digest=DIGEST)
    ported = universal.port(host, max_flops=1000.0)
    ported = ported.with_adapter(ported.adapter.without_updates().with_lora(random_lora(host, rank=rank)))
    target = HostRecord(name=host.name, fingerprint=host.fingerprint)
    save_ported(folder, ported, target, tuned_record(universal) if tuned else None)
    return universal, ported


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("lora")
    tuned_to(tiny_host("bert"), folder)
    return (folder / FILE_NAME).read_bytes()


def place(folder: Path, data: bytes) -> Path:
    (folder / FILE_NAME).write_bytes(data)
    return folder


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_loaded_is_saved_bit_for_bit(tmp_path, family):
    host = tiny_host(family)
    universal, ported = tuned_to(host, tmp_path)
    assert problems_of(tmp_path) == ()
    wanted = ported(SENTENCES[:5])
    loaded = load_ported(tmp_path, tiny_model(family, tokenizer=tiny_tokenizer(family)), tiny_tokenizer(family))
    for model in (
        loaded,
        universal.port(host, task=tmp_path),
        universal.port(host, task=tmp_path / FILE_NAME),
        universal.port(universal.align(host, max_flops=1000.0), task=str(tmp_path)),
    ):
        assert torch.equal(model(SENTENCES[:5]), wanted)
        assert not model.adapter.updates
        assert model.adapter.lora is not None
        assert model.adapter.lora.rank == 3
    assert not torch.equal(universal.port(host, max_flops=1000.0)(SENTENCES[:5]), wanted)
    again = tmp_path / "again"
    record = read_ported(tmp_path / FILE_NAME).record
    save_ported(again, loaded, record.target, record.tuned)
    assert (again / FILE_NAME).read_bytes() == (tmp_path / FILE_NAME).read_bytes()


def test_factors_take_two_bytes_where_that_loses_nothing_and_all_bits_elsewhere(tmp_path):
    host = tiny_host("bert")
    _, ported = tuned_to(host, tmp_path)
    lora = [value.dtype for name, value in load((tmp_path / FILE_NAME).read_bytes()).items() if "lora." in name]
    assert set(lora) == {torch.float16}
    finer = ported.adapter.mapped(lambda name, value: value * 1.0001 if "lora." in name else value)
    finer = ported.with_adapter(finer)
    save_ported(tmp_path, finer, HostRecord(name=host.name, fingerprint=host.fingerprint))
    assert torch.equal(load_ported(tmp_path, host.model, tiny_tokenizer("bert"))(SENTENCES[:3]), finer(SENTENCES[:3]))
    assert not torch.equal(finer(SENTENCES[:3]), ported(SENTENCES[:3]))


def test_a_token_task_comes_back(tmp_path):
    host = tiny_host("bert")
    universal, ported = tuned_to(host, tmp_path, TOKENS)
    assert universal.port(host, task=tmp_path).predict(SENTENCES[:3]) == ported.predict(SENTENCES[:3])


def test_the_host_is_found_by_its_name(tmp_path):
    host = load_host(str(save_tiny_host(tmp_path / "host", "bert")), device="cpu")
    _, ported = tuned_to(host, tmp_path / "folder")
    assert torch.equal(load_ported(tmp_path / "folder")(SENTENCES[:3]), ported(SENTENCES[:3]))


@pytest.mark.parametrize("options", [{"seed": 1}, {"hidden_size": 16}, {"num_hidden_layers": 3}])
def test_another_host_is_refused(tmp_path, saved, options):
    universal = tiny_universal(tiny_host("bert"), digest=DIGEST)
    with pytest.raises(FingerprintError, match="was made for tiny-bert, not for tiny-bert") as caught:
        universal.port(tiny_host("bert", **options), task=place(tmp_path, saved))
    assert caught.value.hint


def test_another_adapter_is_refused(tmp_path, saved):
    host = tiny_host("bert")
    with pytest.raises(FormatError, match="tuned on another adapter file") as caught:
        tiny_universal(host, digest=OTHER).port(host, task=place(tmp_path, saved))
    assert "made from" in caught.value.hint


def test_a_folder_that_was_not_tuned_is_no_task_file(tmp_path):
    host = tiny_host("bert")
    universal, ported = tuned_to(host, tmp_path, tuned=False)
    with pytest.raises(FormatError, match="was ported and not tuned") as caught:
        universal.port(host, task=tmp_path)
    assert f"`uhl predict {tmp_path}`" in caught.value.hint
    assert torch.equal(load_ported(tmp_path, host.model, tiny_tokenizer("bert"))(SENTENCES[:2]), ported(SENTENCES[:2]))


def test_a_folder_fits_one_model_and_is_no_task_of_an_adapter(tmp_path, saved):
    with pytest.raises(UsageError, match="fits only one model") as caught:
        tiny_universal(tiny_host("bert"), digest=DIGEST).with_task(place(tmp_path, saved))
    assert "task=folder" in caught.value.hint


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_host_without_weights_has_its_shapes(tmp_path, family):
    host = tiny_host(family)
    universal, ported = tuned_to(host, tmp_path)
    hollow = universal.port(meta_twin(host), task=tmp_path)
    wanted = {name: tuple(value.shape) for name, value in ported.adapter.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in hollow.adapter.state_dict().items()} == wanted
    with pytest.raises(UhlError):
        universal.port(meta_twin(tiny_host(family, num_hidden_layers=3)), task=tmp_path)


def refused(folder: Path, data: bytes, words: str = "") -> None:
    """Refused on loading; whatever needs no host to be seen is seen by `--verify` and on reading, too."""
    with pytest.raises(FormatError, match=words) as caught:
        load_ported(place(folder, data), tiny_model("bert"), tiny_tokenizer("bert"))
    assert caught.value.hint
    assert str(caught.value).isprintable()


def written(record: object, tensors: dict[str, torch.Tensor]) -> bytes:
    return to_bytes(PORTED, json.dumps(record, sort_keys=True, ensure_ascii=False), tensors)


def first(saved: bytes, side: str) -> str:
    # By name, as safetensors gives the tensors in another order in each process.
    return min(name for name in load(saved) if name.startswith(f"lora.{side}."))


BAD_TENSORS = [
    ("down", lambda value: value[:2], "has shape .2, 32.; the rank is 3"),
    ("up", lambda value: value[:, :2], "the rank is 3"),
    ("down", lambda value: value[:, 0], "the rank is 3"),
    ("down", lambda value: value[:, :5], "do not fit its host"),
    ("up", lambda value: value[:5], "do not fit its host"),
    ("up", lambda value: value * torch.nan, "not finite"),
    ("down", lambda value: value * torch.inf, "not finite"),
    ("down", lambda value: value.to(torch.bfloat16) * torch.nan, "not finite"),
    ("up", lambda value: value.to(torch.int8), "not finite floating-point"),
    ("up", lambda value: value.to(torch.uint8), "not finite floating-point"),
    ("down", lambda value: value.double(), "not finite floating-point"),
]


@pytest.mark.parametrize(("side", "change", "words"), BAD_TENSORS)
def test_bad_tensors(tmp_path, saved, side, change, words):
    tensors, name = load(saved), first(saved, side)
    tensors[name] = change(tensors[name]).contiguous()
    refused(tmp_path, written(record_of(saved), tensors), words)
    if "host" not in words:
        assert len(problems_of(tmp_path)) == 1


def test_factors_without_their_other_half_are_refused(tmp_path, saved):
    tensors = load(saved)
    for name in [name for name in tensors if name.startswith("lora.")]:
        left = {key: value for key, value in tensors.items() if key != name}
        refused(tmp_path, written(record_of(saved), left), "its other half is missing")
    pair = {"lora.down.nowhere": torch.zeros(3, 4), "lora.up.nowhere": torch.zeros(4, 3)}
    refused(tmp_path, written(record_of(saved), tensors | pair), "do not fit its host")
    refused(tmp_path, written(record_of(saved), tensors | {"lora.side.x": torch.zeros(3, 4)}), "not a part of a LoRA")
    bare = {name: value for name, value in tensors.items() if not name.startswith("lora.")}
    refused(tmp_path, written(record_of(saved), bare), "states a LoRA of rank 3; the file contains 0 of its parts")


@pytest.mark.parametrize(
    ("way", "value", "words"),
    [
        ("structure.lora_rank", 4, "the rank is 4"),
        ("structure.lora_rank", 0, "it was tuned and has no LoRA"),
        ("structure.lora_rank", 5000, "at structure.lora_rank"),
        ("tuned.adapter", "short", "at tuned.adapter"),
        ("tuned.supervision", "hearsay", "at tuned.supervision"),
        ("tuned.label_counts", [1], "number of labels differs"),
        ("tuned.label_counts", [1, 2, -3], "at tuned.label_counts"),
        ("tuned.more", 1, "at tuned.more"),
        ("tuned.score.value", None, "at tuned.score.value"),
    ],
)
def test_bad_record(tmp_path, saved, way, value, words):
    record = record_of(saved)
    *outer, last = way.split(".")
    place_of = record
    for step in outer:
        place_of = place_of[step]
    place_of[last] = value
    refused(tmp_path, written(record, load(saved)), words)
    assert [line for line in problems_of(tmp_path) if words in line]


def test_verify_lists_all_that_is_wrong(tmp_path, saved):
    record, tensors = record_of(saved), load(saved)
    record["target"]["fingerprint"]["digest"] = "x"
    record["tuned"]["score"]["low"] = 0.95
    tensors[first(saved, "up")] *= torch.nan
    tensors["readout.out_bias"] *= torch.inf
    place(tmp_path, written(record, tensors))
    found = problems_of(tmp_path)
    for words in ("lora.up", "readout.out_bias", "fingerprint.digest", "tuned.score"):
        assert sum(words in line for line in found) == 1, (words, found)
    assert len(found) == 4


def test_every_flipped_bit_is_found(tmp_path, saved):
    path = place(tmp_path, saved) / FILE_NAME
    assert_flips_are_found(path, lambda: read_tuned(path, DIGEST), error=FormatError, count=400)


def test_reading_and_inspecting_need_no_torch(tmp_path, saved):
    program = (
        "import sys; from pathlib import Path\n"
        "from uhl_cli.inspect.run import run_inspect; from uhl_cli.inspect.report import InspectOptions\n"
        f"found = run_inspect(InspectOptions(file=Path({str(place(tmp_path, saved))!r}))).ported\n"
        "assert found.lora.rank == 3\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'imported'\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inspect_tells_what_is_in_it_to_the_byte(tmp_path, saved):
    report = run_inspect(InspectOptions(file=place(tmp_path, saved)))
    found = report.ported
    assert (report.kind, report.bytes) == ("ported", len(saved))
    tensors = load(saved)
    assert sum(part.bytes for part in found.parts) == len(saved)
    assert {part.name: part.bytes for part in found.parts if part.group != "header"} == {
        name: value.nbytes for name, value in tensors.items()
    }
    lora = [value for name, value in tensors.items() if name.startswith("lora.")]
    assert (found.lora.rank, found.lora.modules) == (3, len(lora) // 2)
    assert found.lora.parameters == sum(value.numel() for value in lora)
    assert found.lora.bytes == sum(value.nbytes for value in lora)
    assert {part.group for part in found.parts} == {"header", "LoRA", "readout", "updates"}  # its threshold
    assert found.record.tuned.supervision == "transfer set"
    for asked in ({"anchors": True}, {"transfer": True}):
        with pytest.raises(UsageError, match="no anchors and no transfer set"):
            run_inspect(InspectOptions(file=tmp_path, **asked))


def test_two_folders_are_compared(tmp_path, saved):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    tensors, name = load(saved), first(saved, "up")
    tensors[name] = 2 * tensors[name]
    place(folders[0], saved)
    place(folders[1], written(record_of(saved), tensors))
    found = run_inspect(InspectOptions(file=folders[0], diff=folders[1])).comparison
    assert [(part.name, part.relative) for part in found.parts] == [(name, 0.5)]
    assert found.same_parts == len(tensors) - 1
    assert run_inspect(InspectOptions(file=folders[0], diff=folders[0])).comparison.identical
