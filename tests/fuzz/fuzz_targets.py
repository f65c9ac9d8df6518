"""What the fuzzer reads: every kind of file and folder that uhl takes from strangers, and what is done with it.

A `Target` makes a mutant, reads it, and runs what was accepted on a tiny random host.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from file_damage import as_1_1, header_of
from fuzz_mutations import Seed, blind, changed_json, mutant, to_text
from safetensors.numpy import load, save
from tiny_adapters import (
    SMALL,
    fake_bank,
    fake_features,
    random_adapter,
    random_lora,
    tiny_file,
    tiny_manifest,
    tiny_task_file,
    tiny_transfer,
    tiny_universal,
    tuned_record,
)
from tiny_hosts import SENTENCES, save_tiny_host, tiny_host
from torch import nn

from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.layout import parameter_shapes
from uhl_cli.data.examples import token_examples
from uhl_cli.formats import adapter as adapter_format
from uhl_cli.formats.adapter import MAX_VALUE, AdapterFile, read_adapter, values_of
from uhl_cli.formats.card import model_card
from uhl_cli.formats.checkpoint import load_checkpoint, save_checkpoint
from uhl_cli.formats.container import ADAPTER, CHECKPOINT, PORTED, TASK, Stored
from uhl_cli.formats.convert import to_file
from uhl_cli.formats.export import RECORD_FILE, ExportRecord, read_export
from uhl_cli.formats.folder import read_ported
from uhl_cli.formats.ported import load_ported, save_ported
from uhl_cli.formats.task import read_task, task_to_bytes
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.host.config_only import load_config_host
from uhl_cli.inspect.report import InspectOptions
from uhl_cli.inspect.run import run_inspect
from uhl_cli.metrics import Score
from uhl_cli.ported.model import PortedModel
from uhl_cli.schema import AdapterConfig, HostRecord, Parts

TEXTS = ("A warm, funny film.", "Anna lives in Paris")
_LIMIT = 10_000.0  # per cent of the host's FLOPs: the tiny hosts carry every part
_TOKENS = SMALL.model_copy(update={"kind": "tokens"})
_OTHER = SMALL.model_copy(update={"num_labels": 2, "knots": (0.5, 1.0), "top_k": 1, "num_atoms": 4})
_FEW = SENTENCES[:6]

Outputs = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Target:
    """One kind of input.

    :param weight: Its share of the cases.
    :param run_share: Share of the accepted mutants that are run, drawn by the case's seed.
    :param make: Writes a mutant into the folder, over that of the case before, and returns its path.
    :param read: Reads it.
    :param run: Runs what was read, and returns all numbers that a user would see.
    :param judge: The reader without a host, which is never stricter than `uhl inspect --verify`; None for files that
        `inspect` does not read.
    """

    name: str
    weight: float
    run_share: float
    make: Callable[[Path, Random], Path]
    read: Callable[[Path], Any]
    run: Callable[[Any, Path], Outputs]
    judge: Callable[[Path], Any] | None = None


def uhl_targets() -> list[Target]:
    """The targets over all kinds of files and folders.  Equal in every process: nothing in them is drawn freely."""
    host = tiny_host("bert")
    return [_adapters(host), *_tasks(host), *_ported(host), _checkpoints(), _records(), *_hosts()]


def problems_of(path: Path) -> Sequence[str]:
    """What `uhl inspect --verify` finds; an error that stops it is one problem."""
    report = run_inspect(InspectOptions(file=path, verify=True))
    assert report.verification is not None
    return report.verification.problems


def described(path: Path) -> None:
    """What `uhl inspect --anchors --transfer` reads."""
    run_inspect(InspectOptions(file=path, anchors=True))


def logits(ported: PortedModel) -> Outputs:
    """Logits of a ported model for two texts, or for their words."""
    if ported.task.kind == "sequence":
        return [ported(list(TEXTS))]
    words = [text.split() for text in TEXTS]
    return ported.logits_of(token_examples(words, [[0] * len(row) for row in words]))


def _writes(name: str, seeds: Sequence[Seed]) -> Callable[[Path, Random], Path]:
    def make(folder: Path, draw: Random) -> Path:
        path = folder / name
        path.write_bytes(mutant(draw.choice(seeds), draw))
        return path

    return make


def _small_file(config: AdapterConfig, *, parts: str = "") -> bytes:
    """An adapter file of about ten kilobytes, with features, with a transfer set, or with an unknown part."""
    bank = fake_bank(config)
    features = fake_features(config, texts=12) if "features" in parts else None
    transfer = None
    if "transfer" in parts or "pairs" in parts or "general" in parts:
        general = "general" in parts
        transfer = tiny_transfer(config, texts=_FEW, pairs="pairs" in parts, general=general)
    manifest = tiny_manifest(config, bank.anchors, features=None if features is None else features.anchors)
    record = {"features": manifest.parts.features, "transfer": None if transfer is None else transfer.record}
    if "unknown" in parts:
        record["later"] = {"required": False, "version": 3}
    manifest = manifest.model_copy(update={"parts": Parts.model_validate(record)})
    content = to_file(random_adapter(config), bank, manifest, features, transfer)
    if "unknown" in parts:
        content = replace(content, others={"later.values": Stored("uint8", (3,), memoryview(b"abc"))})
    return adapter_format.to_bytes(content)


def _adapters(host: Host) -> Target:
    files = [
        _small_file(SMALL),
        _small_file(SMALL, parts="features transfer"),
        _small_file(SMALL, parts="features unknown"),
        _small_file(SMALL, parts="pairs"),
        _small_file(_TOKENS, parts="transfer features"),
        _small_file(_OTHER, parts="general"),
        _small_file(_OTHER),
    ]
    seeds = [Seed.of(ADAPTER, data) for data in files]
    seeds += [
        Seed.of(ADAPTER, as_1_1(data), sealed=False)
        for data in (_small_file(SMALL), _small_file(_OTHER, parts="features"))
    ]

    def read(path: Path) -> AdapterFile:
        """The content, of which everything that the manifest says is true."""
        content = read_adapter(path)
        for name, shape in parameter_shapes(content.manifest.config).items():
            values = values_of(content.parameters[name])
            assert values.shape == shape
            assert np.abs(values).max(initial=0) <= MAX_VALUE * 1.001
        assert content.anchors.num_words == content.manifest.anchors.words
        return content

    def run(content: AdapterFile, _path: Path) -> Outputs:
        return logits(UniversalAdapter.from_file(content).port(host, max_flops=_LIMIT))

    return Target("adapter", 45, 0.05, _writes("a.safetensors", seeds), read, run, read_adapter)


def _tasks(host: Host) -> list[Target]:
    """Task files of the adapter's own task, of another task and with a low-rank update, for one aligned adapter."""
    base = UniversalAdapter.from_file(replace(tiny_file(), digest="a" * 64))
    aligned = base.align(host, max_flops=_LIMIT, any_task=True)

    def run(_content: Any, path: Path) -> Outputs:
        return logits(base.port(aligned, task=path))

    def file(*, own: bool, low_rank: bool = False, config: AdapterConfig = SMALL) -> bytes:
        manifest = tiny_manifest(config, base.bank.anchors)
        content = tiny_task_file(manifest, adapter="a" * 64, own_task=own)
        if low_rank:
            content = replace(content, record=content.record.model_copy(update={"parameters": "low-rank"}))
        return task_to_bytes(content)

    five = SMALL.model_copy(update={"num_labels": 5})
    tokens = SMALL.model_copy(update={"num_labels": 4, "kind": "tokens"})
    files = [
        file(own=True),
        file(own=True, low_rank=True),
        file(own=False, config=five),
        file(own=False, config=tokens),
    ]
    seeds = [Seed.of(TASK, data) for data in files]
    return [Target("task", 20, 0.05, _writes("t.safetensors", seeds), read_task, run, read_task)]


def _ported(host: Host) -> list[Target]:
    """Folders of ported adapters, and of LoRAs that `uhl tune` made, which are read with their host."""

    def read(path: Path) -> PortedModel:
        return load_ported(path.parent, host)

    def run(ported: PortedModel, _path: Path) -> Outputs:
        return logits(ported)

    def file(folder: Path, config: AdapterConfig, *, lora: bool) -> bytes:
        universal = tiny_universal(host, config, digest="a" * 64)
        ported = universal.port(host, max_flops=_LIMIT)
        if lora:
            ported = ported.with_adapter(ported.adapter.without_updates().with_lora(random_lora(host, rank=1)))
        target = HostRecord(name=host.name, fingerprint=host.fingerprint)
        return save_ported(folder, ported, target, tuned_record(universal) if lora else None).read_bytes()

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, lora in (("ported folder", False), ("LoRA folder", True)):
            seeds = [Seed.of(PORTED, file(Path(folder), config, lora=lora)) for config in (SMALL, _TOKENS, _OTHER)]
            found.append(Target(name, 15, 0.1, _writes("ported.safetensors", seeds), read, run, read_ported))
    return found


def _checkpoints() -> Target:
    """Checkpoints of training, from which a model and its optimizer are restored."""

    def fresh() -> tuple[nn.Linear, torch.optim.Optimizer]:
        model = nn.Linear(3, 4)
        nn.init.constant_(model.weight, 0.5)
        nn.init.constant_(model.bias, 0.5)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = fresh()
    model(torch.ones(3)).square().sum().backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save_checkpoint(path, model, optimizer, step=1, digest="d")
        seeds = [Seed.of(CHECKPOINT, path.read_bytes())]

    def read(path: Path) -> Outputs:
        model, optimizer = fresh()
        load_checkpoint(path, model, optimizer, digest="d")
        moments = [value for own in optimizer.state.values() for value in own.values()]
        return [*(value.detach() for value in model.parameters()), *moments]

    def run(found: Outputs, _path: Path) -> Outputs:
        return found

    return Target("training checkpoint", 4, 1.0, _writes("c.safetensors", seeds), read, run)


def _records() -> Target:
    """Records of exported folders."""
    manifest = tiny_manifest(SMALL, fake_bank(SMALL).anchors)
    score = Score(metric="accuracy", value=0.8, low=0.7, high=0.9, examples=50)
    record = ExportRecord(
        format="peft",
        adapter="a" * 64,
        task=manifest.task,
        target=manifest.source,
        dtype="float32",
        rank=8,
        max_length=64,
        base="tiny-bert",
        teachers=("nobody",),
        training=manifest.training,
        versions={"uhl": "0"},
        agreement={"export": score},
        scores={"tuned": score},
    )
    data = record.model_dump_json().encode()

    def make(folder: Path, draw: Random) -> Path:
        (folder / RECORD_FILE).write_bytes(_changed_file(data, draw))
        return folder

    def run(found: ExportRecord, _path: Path) -> Outputs:
        model_card(found, {})
        return ()

    return Target("export record", 1, 1.0, make, read_export, run)


_CONFIG_VALUES = (
    0,
    -1,
    1,
    2,
    3,
    "2",
    1.5,
    None,
    True,
    [],
    {},
    5,
    1000,
    50_000_000,
    10**9,
    10**12,
    2**63,
    10**30,
    "x",
    float("nan"),
)
_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "pad_token_id",
    "num_labels",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "hidden_act",
    "model_type",
    "architectures",
    "id2label",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "attn_implementation",
    "is_decoder",
    "add_cross_attention",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "chunk_size_feed_forward",
    "transformers_version",
    "auto_map",
)


def _hosts() -> list[Target]:
    """Checkpoint folders of one layer: configuration, tokenizer, weights; and configurations alone."""
    kept: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in ("bert", "llama"):
            path = save_tiny_host(Path(folder) / family, family, hidden_size=8, num_hidden_layers=1)
            kept[family] = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    adapter = UniversalAdapter.from_file(tiny_file())

    def make(folder: Path, draw: Random, files: Sequence[str] = ()) -> Path:
        shutil.rmtree(folder / "host", ignore_errors=True)
        (folder / "host").mkdir()
        content = dict(kept[draw.choice(sorted(kept))])
        name = draw.choice(files or sorted(content))
        if draw.random() < 0.1:
            content.pop(name)
        elif name.endswith(".json"):
            content[name] = _changed_file(content[name], draw, _FIELDS if name == "config.json" else ())
        else:
            content[name] = _changed_weights(content[name], draw)
        for key, data in content.items():
            (folder / "host" / key).write_bytes(data)
        return folder / "host"

    def read(path: Path) -> Host:
        return load_host(str(path), device="cpu", offline=True)

    def run(found: Host, _path: Path) -> Outputs:
        return logits(adapter.port(found, max_flops=_LIMIT))

    def make_config(folder: Path, draw: Random) -> Path:
        return make(folder, draw, ("config.json",))

    def read_config(path: Path) -> Host:
        return load_config_host(str(path), offline=True)

    def run_config(found: Host, _path: Path) -> Outputs:
        return adapter.port(found, max_flops=_LIMIT) and ()

    return [
        Target("host checkpoint", 0.5, 0.5, make, read, run),
        Target("host configuration", 0.5, 0.2, make_config, read_config, run_config),
    ]


def _changed_file(data: bytes, draw: Random, fields: Sequence[str] = ()) -> bytes:
    """A JSON file with other values, some of them for the given fields, or with other bytes."""
    if draw.random() < 0.1:
        return blind(data, draw)
    content = json.loads(data)
    for _ in range(draw.choice((1, 1, 2))):
        if fields and draw.random() < 0.7:
            content[draw.choice(fields)] = draw.choice(_CONFIG_VALUES)
        else:
            changed_json(content, draw)
    return to_text(content, draw, canonical=draw.random() < 0.9).encode("utf-8", "surrogatepass")


def _changed_weights(data: bytes, draw: Random) -> bytes:
    """A safetensors file with other bytes, another header, or values that are extreme."""
    what, start = draw.randrange(4), 8 + int.from_bytes(data[:8], "little")
    if what == 0:
        return blind(data, draw, start=draw.choice((0, 8, start)))
    if what == 1:
        header = header_of(data)
        changed_json(header, draw)
        text = to_text(header, draw, canonical=draw.random() < 0.9).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + data[start:]
    tensors = load(data)
    name = draw.choice(sorted(tensors))
    if what == 2:
        value = draw.choice((float("nan"), float("inf"), 1e38, 0.0, -1e30))
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[:: draw.choice((1, 7, 1000))] = value
    else:
        array = tensors.pop(name)
        new = draw.choice((name, "x", f"{name}.x"))
        tensors[new] = draw.choice((array[:-1], array.reshape(-1), array.astype("float16"), array.astype("int32")))
    return save({key: value.copy() for key, value in tensors.items()}, metadata={"format": "pt"})
