"""What `inspect` says of a file is what is in it, to the byte; what is wrong with a file is found, all of it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from tiny_adapters import SMALL, random_adapter, tiny_file

from uhl_cli.adapter.canonical import mix
from uhl_cli.codes.layout import bits_of
from uhl_cli.codes.quantise import codes_and_scales
from uhl_cli.errors import FormatError, OutputError, UhlError, UsageError
from uhl_cli.formats.adapter import AdapterFile, Quantised, read_adapter, to_bytes, write_adapter
from uhl_cli.formats.convert import dequantised, stored_parameters
from uhl_cli.formats.task import (
    TaskFile,
    TaskRecord,
    adapter_digest,
    read_task,
    task_parameter_shapes,
    write_task,
)
from uhl_cli.inspect.content import atom_statistics, mixing_weights
from uhl_cli.inspect.figures import GROUP_COLOURS
from uhl_cli.inspect.report import AdapterContent, Comparison, Group, InspectOptions, TaskContent
from uhl_cli.inspect.run import run_inspect
from uhl_cli.metrics import Score
from uhl_cli.schema import UPDATE_TYPES, AdapterConfig

TOKENS = SMALL.model_copy(update={"kind": "tokens", "num_labels": 4, "top_k": 1, "knots": (0.5, 1.0)})
SHIPPED = sorted((Path(__file__).parents[2] / "adapters").glob("*.safetensors"))


def sound(config: AdapterConfig = SMALL, *, seed: int = 0, featured: bool = False) -> AdapterFile:
    """A tiny file whose counts agree with each other too."""
    content = tiny_file(config, seed=seed, featured=featured)
    training = content.manifest.training.model_copy(update={"train_examples": sum(content.manifest.label_counts)})
    return replace(content, manifest=content.manifest.model_copy(update={"training": training}))


def task_of(adapter: Path, *, own_task: bool = True, seed: int = 0) -> TaskFile:
    """A tiny task file that belongs to the adapter at `adapter`."""
    manifest = read_adapter(adapter).manifest
    record = TaskRecord(
        adapter=adapter_digest(adapter),
        config=manifest.config,
        task=manifest.task,
        label_counts=manifest.label_counts,
        own_task=own_task,
        target=manifest.source,
        training=manifest.training,
        versions={},
        before=Score(metric="accuracy", value=0.5, low=0.4, high=0.6, examples=10),
        score=Score(metric="accuracy", value=0.7, low=0.6, high=0.8, examples=10),
    )
    trained = random_adapter(manifest.config, seed=seed)
    parameters = {}
    for name in task_parameter_shapes(record):
        codes, scales = codes_and_scales(trained.get_parameter(name), bits_of(name))
        parameters[name] = Quantised(codes.numpy(), scales.numpy())
    return TaskFile(record, parameters)


@pytest.fixture
def adapter(tmp_path) -> Path:
    write_adapter(tmp_path / "a.safetensors", sound())
    return tmp_path / "a.safetensors"


@pytest.fixture
def task(adapter) -> Path:
    path = adapter.with_name("a.moods.task.safetensors")
    write_task(path, task_of(adapter))
    return path


def described(path: Path, **more: object) -> AdapterContent:
    report = run_inspect(InspectOptions(file=path, **more))
    assert report.adapter is not None
    return report.adapter


def described_task(path: Path) -> TaskContent:
    report = run_inspect(InspectOptions(file=path))
    assert report.task is not None
    return report.task


def problems(path: Path) -> tuple[str, ...]:
    report = run_inspect(InspectOptions(file=path, verify=True))
    assert report.verification is not None
    return report.verification.problems


def compared(path: Path, other: Path) -> Comparison:
    report = run_inspect(InspectOptions(file=path, diff=other))
    assert report.comparison is not None
    return report.comparison


@pytest.mark.parametrize("featured", [False, True])
@pytest.mark.parametrize("config", [SMALL, TOKENS, AdapterConfig(num_atoms=3, canonical_size=5, readout_size=2)])
def test_parts_are_the_files_tensors_and_sum_to_its_size(config, featured, tmp_path):
    path = tmp_path / "a.safetensors"
    size = write_adapter(path, sound(config, featured=featured))
    parts = {part.name: part for part in described(path).parts}
    assert sum(part.bytes for part in parts.values()) == size == path.stat().st_size
    assert sum(part.share for part in parts.values()) == pytest.approx(1)
    stored = load(path.read_bytes())
    for name, value in stored.items():
        if name.endswith(".scale"):
            continue
        scale_name = f"{name.split('.')[0]}.scale" if name.endswith(".codes") else f"{name}.scale"
        scale = stored.get(scale_name, np.zeros(0, np.float32))
        assert parts[name].bytes == value.nbytes + scale.nbytes
        assert (parts[name].dtype, parts[name].scales) == (str(value.dtype), scale.size)
    assert set(parts) == {"header", *(name for name in stored if not name.endswith("scale"))}
    assert (parts["atoms_u"].shape, parts["atoms_u"].bits) == ((config.num_atoms, config.canonical_size), 8)
    assert (parts["delta_theta"].bits, parts["anchors.words"].bits, parts["anchors.texts"].bits) == (4, 1, None)
    coded = 8 * (parts["anchors.codes"].bytes - 4 * parts["anchors.codes"].scales)
    assert parts["anchors.codes"].bits == round(coded / math.prod(parts["anchors.codes"].shape), 2)
    assert ("features.codes" in parts) == featured
    if featured:
        assert parts["features.codes"].group == "features"
        assert 1 < parts["features.codes"].bits < 2
        assert parts["features.codes"].shape[1] == config.readout_size + config.num_labels


@pytest.mark.parametrize("own_task", [True, False])
def test_parts_of_a_task_file_sum_to_its_size(own_task, adapter, tmp_path):
    path = tmp_path / "t.task.safetensors"
    size = write_task(path, task_of(adapter, own_task=own_task))
    content = described_task(path)
    assert sum(part.bytes for part in content.parts) == size
    assert {part.name for part in content.parts} - {"header"} == set(read_task(path).parameters)
    assert (content.readout is None) == own_task
    values = dequantised(read_task(path).parameters)["delta_theta"]
    assert torch.equal(torch.tensor(content.delta_theta), values)
    assert content.root_mean_square == pytest.approx(values.square().mean(1).sqrt().tolist())


@pytest.mark.parametrize("config", [SMALL, TOKENS])
def test_values_are_those_of_torch_bit_for_bit(config):
    content = tiny_file(config)
    for name, value in stored_parameters(content).items():
        np.testing.assert_array_equal(values_of(content.parameters[name]), value.numpy())


@pytest.mark.parametrize("config", [SMALL, AdapterConfig()])
def test_mixing_weights_are_those_that_a_host_gets(config):
    content = tiny_file(config)
    stored, depths = stored_parameters(content), (0.0, 1 / 3, 0.5, 1.0)
    found = mixing_weights(content.parameters, depths)
    wanted = torch.stack([torch.stack([mix(stored, depth, name) for name in UPDATE_TYPES]) for depth in depths])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
    # Every part of the mixer counts: without it the weights are others.
    for name in ("mixer_in_weight", "mixer_in_bias", "mixer_out_weight", "mixer_out_bias", "delta_theta"):
        entry = content.parameters[name]
        silenced = {**content.parameters, name: Quantised(np.zeros_like(entry.codes), entry.scales)}
        assert np.abs(mixing_weights(silenced, depths) - found).max() > 1e-3


def with_row(content: AdapterFile, name: str, index: int, codes: np.ndarray, scale: float) -> AdapterFile:
    entry = content.parameters[name]
    changed = Quantised(entry.codes.copy(), entry.scales.copy())
    changed.codes[index], changed.scales[index] = codes, scale
    return replace(content, parameters={**content.parameters, name: changed})


def test_unused_atoms_and_closest_pairs_are_found():
    content = sound()
    u, v = content.parameters["atoms_u"], content.parameters["atoms_v"]
    before = atom_statistics(content.parameters)
    assert before.unused == ()
    assert before.u.closest is not None
    assert abs(before.u.closest.cosine) < 0.99
    np.testing.assert_allclose(before.u.norms, np.linalg.norm(values_of(u).astype(np.float64), axis=1))
    changed = with_row(content, "atoms_u", 2, np.zeros(9, np.int8), 0.0)
    changed = with_row(changed, "atoms_u", 5, u.codes[1], 3 * float(u.scales[1]))  # another length, the same direction
    changed = with_row(changed, "atoms_v", 5, -v.codes[1], float(v.scales[1]))
    found = atom_statistics(changed.parameters)
    assert found.unused == (2,)
    assert found.u.norms[2] == 0
    assert found.u.minimum > 0
    for pair, cosine in ((found.u.closest, 1), (found.v.closest, -1), (found.update, -1)):
        assert pair is not None
        assert (pair.first, pair.second) == (1, 5)
        assert pair.cosine == pytest.approx(cosine)


def test_an_adapter_that_changes_nothing_has_no_pairs_and_is_described(tmp_path):
    content = sound()
    for index in range(SMALL.num_atoms):
        content = with_row(content, "atoms_u", index, np.zeros(9, np.int8), 0.0)
    write_adapter(tmp_path / "a.safetensors", content)
    found = described(tmp_path / "a.safetensors")
    assert len(found.atoms.unused) == SMALL.num_atoms
    assert (found.atoms.u.closest, found.atoms.update) == (None, None)
    np.testing.assert_allclose(found.mixing.mean, mixing_weights(content.parameters).mean(2), rtol=1e-5)


def test_mixing_summary_leaves_unused_atoms_out(tmp_path):
    content = with_row(sound(), "atoms_u", 2, np.zeros(9, np.int8), 0.0)
    write_adapter(tmp_path / "a.safetensors", content)
    found = described(tmp_path / "a.safetensors").mixing
    weights = mixing_weights(content.parameters)
    np.testing.assert_allclose(found.mean, np.delete(weights, 2, axis=2).mean(2), rtol=1e-5)
    np.testing.assert_allclose(found.deviation, np.delete(weights, 2, axis=2).std(2), rtol=1e-4)
    assert np.abs(np.array(found.mean) - weights.mean(2)).max() > 1e-3


def test_anchor_texts_are_given_only_when_asked_for(adapter):
    assert described(adapter).anchors.entries is None
    summary = described(adapter, anchors=True).anchors
    anchors = read_adapter(adapter).anchors
    assert summary.entries is not None
    assert [entry.text for entry in summary.entries] == list(anchors.texts)
    assert [list(entry.spans) for entry in summary.entries] == [anchors.spans(i) for i in range(len(anchors.texts))]
    assert summary.words == sum(len(entry.spans) for entry in summary.entries) == anchors.num_words
    assert summary.digest == anchors.digest
    assert (summary.feature_texts, summary.feature_words) == (0, 0)


def test_texts_of_the_feature_bank_are_given_behind_the_anchors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, sound(featured=True))
    content, summary = read_adapter(path), described(path, anchors=True).anchors
    assert content.features is not None
    assert summary.entries is not None
    assert [entry.text for entry in summary.entries] == [*content.anchors.texts, *content.features.anchors.texts]
    assert summary.feature_texts == len(content.features.anchors.texts)
    assert summary.feature_words == content.features.anchors.num_words


def test_readout_counts_the_parameters_that_are_stored(adapter):
    readout = described(adapter).readout
    stored = {name: value for name, value in read_adapter(adapter).parameters.items() if name.startswith("readout")}
    assert readout.parameters == sum(entry.codes.size for entry in stored.values())
    assert (readout.inputs, readout.hidden, len(readout.labels)) == stored_sizes(stored)
    assert readout.label_counts == (1, 2, 3)


def stored_sizes(stored: dict[str, Quantised]) -> tuple[int, int, int]:
    hidden, inputs = stored["readout_in_weight"].codes.shape
    return inputs, hidden, stored["readout_out_weight"].codes.shape[0]


def test_task_files_beside_an_adapter_are_those_that_name_it(adapter, task, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_adapter(other / "b.safetensors", sound(seed=1))
    write_task(tmp_path / "b.task.safetensors", task_of(other / "b.safetensors"))
    (tmp_path / "broken.task.safetensors").write_bytes(b"none")
    shutil.copy(task, tmp_path / "not-named-like-one.safetensors")
    found = described(adapter)
    assert [entry.file for entry in found.task_files] == [task.name]
    assert found.unreadable == ("broken.task.safetensors",)
    entry = found.task_files[0]
    assert (entry.bytes, entry.task, entry.own_task) == (task.stat().st_size, "moods", True)
    assert entry.before is not None
    assert entry.score is not None
    assert (entry.before.value, entry.score.value) == (0.5, 0.7)


def test_a_task_file_knows_the_adapter_beside_it(adapter, task, tmp_path):
    assert described_task(task).adapter == "a.safetensors"
    write_adapter(adapter, sound(seed=1))
    assert described_task(task).adapter is None


def test_what_is_neither_is_refused(tmp_path):
    for path, words in ((tmp_path / "absent", "no file"), (tmp_path, "folder"), (tmp_path / "b", "not a whole")):
        if path.name == "b":
            path.write_bytes(b"nothing")
        with pytest.raises(FormatError, match=words):
            run_inspect(InspectOptions(file=path))
    (tmp_path / "c").write_bytes(save({"a": np.zeros(3, np.float32)}))
    with pytest.raises(FormatError, match="not a uhl adapter"):
        run_inspect(InspectOptions(file=tmp_path / "c"))


# --verify


@pytest.mark.parametrize("featured", [False, True])
@pytest.mark.parametrize("config", [SMALL, TOKENS])
def test_sound_files_have_no_problem(config, featured, tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, sound(config, featured=featured))
    assert problems(path) == ()
    for own_task in (True, False):
        write_task(tmp_path / "t", task_of(path, own_task=own_task))
        assert problems(tmp_path / "t") == ()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_have_no_problem(path):
    assert problems(path) == ()


def rewritten(data: bytes, manifest: dict[str, object] | None = None, **changes: np.ndarray | None) -> bytes:
    """The file with other manifest fields (dotted names) and tensors (two underscores for a dot; None: left out)."""
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    key = next(iter(header))
    fields = json.loads(header[key])
    for name, value in (manifest or {}).items():
        *way, last = name.split(".")
        place = fields
        for step in way:
            place = place[step]
        place[last] = value
    tensors = load(data)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = np.ascontiguousarray(tensor)
    # As the writer writes it, so that nothing but the change is wrong.
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    return save({name: tensors[name] for name in sorted(tensors)}, metadata={key: text})


def tensors_of(content: AdapterFile) -> dict[str, np.ndarray]:
    return load(to_bytes(content))


GOOD = tensors_of(sound())
ODD_SCALE = GOOD["router.scale"].copy()
ODD_SCALE[1] = np.nan


@pytest.mark.parametrize(
    ("manifest", "tensors", "words"),
    [
        ({"label_counts": [1, 2, 4]}, {}, "label counts sum to 7; the training had 6"),
        ({"source.fingerprint.digest": "short"}, {}, "source.fingerprint.digest is not a SHA-256"),
        ({"source.fingerprint.architecture": " "}, {}, "source.fingerprint.architecture is empty"),
        ({"source.fingerprint.hidden_size": 0}, {}, "source.fingerprint.hidden_size"),
        ({"training.train_digest": "0"}, {}, "train_digest is not a SHA-256"),
        ({"anchors.digest": "0" * 64}, {}, "digest of the anchors"),
        ({"anchors.texts": 3}, {}, "says 3 anchor texts"),
        ({"atoms_per_token": 2.5}, {}, "atoms_per_token is 2.5, more than top_k, 2"),
        (
            {"score": {"metric": "accuracy", "value": 0.5, "low": 0.8, "high": 0.7, "examples": 1}},
            {},
            "upside down",
        ),
        (
            {"score": {"metric": "accuracy", "value": 1.5, "low": 0.6, "high": 0.7, "examples": 1}},
            {},
            "not within 0 and 1",
        ),
        ({"format_version": "2.0"}, {}, "format version is 2.0"),
        ({"unknown": 1}, {}, "breaks the format at unknown"),
        ({"config.top_k": 3}, {}, "breaks the format at config.top_k"),
        ({}, {"router__scale": ODD_SCALE}, "router.scale holds a value that is not finite"),
        ({}, {"anchors__scale": -1 - GOOD["anchors.scale"]}, "anchors.scale holds a value that is not finite"),
        ({}, {"anchors__scale": GOOD["anchors.scale"].T}, "anchors.scale is float32"),
        ({}, {"delta_theta": GOOD["delta_theta"] * 0}, "delta_theta has a code outside -7..7"),
        ({}, {"anchors__codes": GOOD["anchors.codes"] * 0 + 9}, "anchors.codes does not begin with the largest"),
        ({}, {"anchors__codes": GOOD["anchors.codes"][:-1]}, "anchors.codes holds"),
        ({}, {"atoms_u": np.full_like(GOOD["atoms_u"], -128)}, "atoms_u has a code outside -127..127"),
        ({}, {"atoms_u": GOOD["atoms_u"].astype(np.int16)}, "atoms_u is int16"),
        ({}, {"anchors__texts": GOOD["anchors.texts"][:-9]}, "anchors.texts"),
        ({}, {"anchors__words": GOOD["anchors.words"][:-1]}, "anchors.words holds"),
        ({}, {"anchors__words": GOOD["anchors.words"].astype(np.int64)}, "anchors.words is int64"),
        ({}, {"head_bias": None}, "the part head_bias is missing"),
        ({}, {"more": GOOD["router"]}, "the part more does not belong"),
    ],
)
def test_every_broken_invariant_is_named(manifest, tensors, words, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(rewritten(to_bytes(sound()), manifest, **tensors))
    found = problems(path)
    assert [line for line in found if words in line], found
    assert not [line for line in found if "\n" in line]


FEATURED = tensors_of(sound(SMALL, featured=True))


@pytest.mark.parametrize(
    ("manifest", "tensors", "words"),
    [
        ({"anchors.features.digest": "0" * 64}, {}, "digest of the features"),
        ({"anchors.features.texts": 3}, {}, "says 3 feature texts"),
        ({"anchors.features.words": 0}, {}, "breaks the format at anchors.features.words"),
        ({"anchors.features": None}, {}, "the part features.codes does not belong"),
        ({}, {"features__codes": None}, "the part features.codes is missing"),
        ({}, {"features__codes": FEATURED["features.codes"][:-1]}, "features.codes holds"),
        ({}, {"features__scale": FEATURED["features.scale"] * np.nan}, "features.scale holds a value"),
        ({}, {"features__mean": FEATURED["features.mean"][1:]}, "features.mean has another shape"),
        (
            {},
            {"features__shift": FEATURED["features.shift"] + np.float32(np.inf)},
            "features.shift has another shape, or a value",
        ),
        ({}, {"features__words": FEATURED["features.words"][:-1]}, "features.words holds"),
        ({}, {"features__texts": FEATURED["features.texts"][:-9]}, "features.texts"),
        ({}, {"anchors__codes": FEATURED["anchors.codes"][:-1]}, "anchors.codes holds"),
    ],
)
def test_every_broken_invariant_of_a_feature_bank_is_named(manifest, tensors, words, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(rewritten(to_bytes(sound(SMALL, featured=True)), manifest, **tensors))
    found = problems(path)
    assert [line for line in found if words in line], found


def test_it_goes_on_after_the_first_problem(tmp_path):
    path = tmp_path / "a.safetensors"
    changes = {"label_counts": [1, 2, 4], "anchors.digest": "0" * 64, "source.fingerprint.digest": "x"}
    tensors = {
        "router__scale": ODD_SCALE,
        "router": GOOD["router"].astype(np.int16),
        "delta_theta": GOOD["delta_theta"] * 0,
        "head_bias": None,
        "more": GOOD["router"],
    }
    path.write_bytes(rewritten(to_bytes(sound()), changes, **tensors))
    found = problems(path)
    for words in (
        "label counts",
        "digest of the anchors",
        "fingerprint.digest",
        "router.scale",
        "router is int16",
        "delta_theta",
        "head_bias is missing",
        "more does not belong",
    ):
        assert sum(words in line for line in found) == 1, (words, found)
    assert len(found) == 8


def test_parts_are_checked_though_the_manifest_is_broken(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(rewritten(to_bytes(sound()), {"licence": 3}, delta_theta=GOOD["delta_theta"] * 0))
    found = problems(path)
    assert any("licence" in line for line in found)
    assert any("delta_theta" in line for line in found)


def test_size_is_checked(tmp_path):
    content = sound(AdapterConfig(num_atoms=1024, canonical_size=512))
    path = tmp_path / "a.safetensors"
    size = write_adapter(path, content)
    assert problems(path) == (f"the file holds {size:,} bytes; at most 1,000,000 are allowed",)
    with path.open("wb") as file:
        file.truncate(65_000_000)
    assert problems(path) == ("the file holds 65,000,000 bytes; no adapter is larger than 64,000,000",)


def test_only_what_the_writer_writes_is_canonical(tmp_path):
    path = tmp_path / "a.safetensors"
    data = to_bytes(sound())
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    for changed in (
        save(load(data), metadata={"uhl": header["uhl"] + " "}),
        save(load(data), metadata={**header, "more": "x"}),
        rewritten(
            data,
            anchors__words=GOOD["anchors.words"]
            | np.append(np.zeros(len(GOOD["anchors.words"]) - 1), 1).astype(np.uint8),
        ),
    ):
        path.write_bytes(changed)
        read_adapter(path)  # no reader minds
        assert [line for line in problems(path) if "other bytes" in line]
    # Another build of zlib may compress the same texts to other bytes.
    texts = zlib.compress(zlib.decompress(GOOD["anchors.texts"].tobytes()), 1)
    path.write_bytes(rewritten(data, anchors__texts=np.frombuffer(texts, np.uint8)))
    assert path.read_bytes() != data
    assert problems(path) == ()


def test_problems_of_a_task_file_are_named(adapter, task):
    data = task.read_bytes()
    for changes, tensors, words in (
        ({"label_counts": [1, 2, 4]}, {}, "label counts"),
        ({"target.fingerprint.digest": "x"}, {}, "target.fingerprint.digest"),
        ({"before.low": 0.9}, {}, "before: 0.5"),
        ({"adapter": "x"}, {}, "breaks the format at adapter"),
        ({}, {"delta_theta": load(data)["delta_theta"] * 0}, "delta_theta has a code"),
        ({}, {"more": load(data)["delta_theta"]}, "more does not belong"),
    ):
        task.write_bytes(rewritten(data, changes, **tensors))
        assert [line for line in problems(task) if words in line], words
    task.write_bytes(data)
    assert problems(task) == ()


def test_a_file_that_is_not_ours_is_a_problem_and_a_missing_one_an_error(tmp_path):
    (tmp_path / "a").write_bytes(b"nothing")
    assert "not a whole safetensors file" in problems(tmp_path / "a")[0]
    (tmp_path / "b").write_bytes(save({"a": np.zeros(3, np.float32)}))
    assert "neither" in problems(tmp_path / "b")[0]
    with pytest.raises(FormatError, match="no file"):
        problems(tmp_path / "absent")


def test_names_of_parts_cannot_command_a_terminal(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(rewritten(to_bytes(sound()), **{"\x1b[31m\nred": GOOD["router"]}))
    found = problems(path)
    assert [line for line in found if "red does not belong" in line]
    assert all(line.isprintable() for line in found)


@pytest.mark.parametrize("kind", ["adapter", "task"])
def test_nothing_that_a_reader_refuses_is_called_sound(kind, adapter, task):
    """Flipped, cut and repeated bytes: a report, never an exception, and never milder than the reader."""
    path = adapter if kind == "adapter" else task
    valid, draw, refusals = path.read_bytes(), random.Random(11), 0
    read = read_adapter if kind == "adapter" else read_task
    for _ in range(int(os.environ.get("UHL_FUZZ", "300"))):
        data = bytearray(valid)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data))
            data[place : place + draw.choice((0, 1, 1, 1))] = bytes([draw.randrange(256)])
        path.write_bytes(bytes(data))
        found = problems(path)
        try:
            read(path)
        except UhlError:
            refusals += 1
            assert found
    assert refusals > 0


# --diff


def test_a_file_differs_from_itself_in_nothing(adapter, task, tmp_path):
    for path in (adapter, task):
        found = compared(path, shutil.copy(path, tmp_path / "copy"))
        assert found.identical
        assert (found.fields, found.parts) == ((), ())
        assert found.same_parts > 0
    anchors = compared(adapter, adapter).anchors
    assert anchors is not None
    assert (anchors.common_words, anchors.relative) == (anchors.first_words, 0.0)


def test_difference_is_told_by_field_part_and_anchor(adapter, tmp_path):
    content = sound()
    router = content.parameters["router"]
    changed = replace(
        content,
        manifest=content.manifest.model_copy(update={"licence": "MIT", "versions": {"torch": "1"}}),
        parameters={**content.parameters, "router": Quantised(router.codes, router.scales * 2)},
        coordinates=Quantised(content.coordinates.codes, content.coordinates.scales * 4),
    )
    other = tmp_path / "b.safetensors"
    write_adapter(other, changed)
    found = compared(adapter, other)
    assert not found.identical
    fields = {entry.name: (entry.first, entry.second) for entry in found.fields}
    assert fields == {
        "licence": ('"unspecified"', '"MIT"'),
        "versions.torch": (None, '"1"'),
        "versions.uhl": ('"0"', None),
    }
    assert [(entry.name, entry.relative) for entry in found.parts] == [("router", pytest.approx(0.5))]
    assert found.same_parts == len(content.parameters) - 1
    assert found.anchors is not None
    assert found.anchors.relative == pytest.approx(0.75)


def test_difference_of_a_feature_bank_is_one_more_part(adapter, tmp_path):
    one, other = sound(featured=True), sound(featured=True)
    assert one.features is not None
    assert other.features is not None
    paths = [tmp_path / "one", tmp_path / "other"]
    write_adapter(paths[0], one)
    codes = Quantised(-other.features.codes.codes, other.features.codes.scales)
    write_adapter(paths[1], replace(other, features=replace(other.features, codes=codes)))
    shape = one.features.codes.codes.shape
    found = compared(*paths).parts
    assert [(entry.name, entry.first, entry.second) for entry in found] == [("features.codes", shape, shape)]
    assert found[0].relative is not None
    assert found[0].relative > 0.5
    missing = compared(adapter, paths[0]).parts
    assert [(entry.name, entry.first, entry.second) for entry in missing] == [("features.codes", None, shape)]
    assert "features.codes" not in [entry.name for entry in compared(paths[0], paths[0]).parts]


def test_files_of_other_shape_and_kind_are_compared_as_far_as_that_goes(adapter, tmp_path):
    other = tmp_path / "b.safetensors"
    write_adapter(other, sound(TOKENS))
    found = compared(adapter, other)
    parts = {entry.name: entry for entry in found.parts}
    assert (parts["readout_pool"].first, parts["readout_pool"].second) == ((5,), None)
    assert parts["readout_in_weight"].relative is None
    assert "config.knots" in {entry.name for entry in found.fields}
    assert found.anchors is not None
    assert found.anchors.common_texts == found.anchors.first_texts
    assert found.anchors.relative is None  # other knots


def test_an_adapter_and_a_task_file_are_not_compared(adapter, task):
    with pytest.raises(FormatError, match="an adapter and a task file"):
        compared(adapter, task)


# --plot


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figures_are_drawn_in_every_format(ending, magic, adapter, task, tmp_path):
    pytest.importorskip("matplotlib")
    featured = tmp_path / "featured.safetensors"
    write_adapter(featured, sound(featured=True))
    for path in (adapter, task, featured):
        plot = tmp_path / f"{path.stem}.{ending}"
        report = run_inspect(InspectOptions(file=path, plot=plot))
        assert report.plot == str(plot)
        assert plot.read_bytes().startswith(magic)
        first = plot.read_bytes()
        run_inspect(InspectOptions(file=path, plot=plot, overwrite=True))
        assert plot.read_bytes() == first
        if ending == "svg":
            assert "bytes by part" in first.decode()
            assert "module type" in first.decode()


def test_every_group_of_parts_has_a_colour_of_its_own():
    assert set(GROUP_COLOURS) == set(get_args(Group))
    assert len(set(GROUP_COLOURS.values())) == len(GROUP_COLOURS)


def test_figures_are_written_whole_or_not_at_all(adapter, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    plot = tmp_path / "a.png"
    plot.write_bytes(b"old")
    with pytest.raises(OutputError, match="there already"):
        run_inspect(InspectOptions(file=adapter, plot=plot))

    def full(self: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="No space left") as caught:
        run_inspect(InspectOptions(file=adapter, plot=plot, overwrite=True))
    assert "--plot" in caught.value.hint
    assert plot.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib_it_says_what_to_install(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError) as caught:
        run_inspect(InspectOptions(file=adapter, plot=tmp_path / "a.png"))
    assert 'pip install "uhl[figures]"' in caught.value.hint
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"plot": Path("a.bmp")},
        {"plot": Path("a")},
        {"verify": True, "diff": Path("b")},
        {"verify": True, "anchors": True},
        {"diff": Path("b"), "plot": Path("a.png")},
    ],
)
def test_options_that_contradict_each_other_are_refused(more, adapter):
    with pytest.raises(UsageError):
        run_inspect(InspectOptions(file=adapter, **more))


def test_a_task_file_has_no_anchors_to_print(task):
    with pytest.raises(UsageError, match="no anchors"):
        run_inspect(InspectOptions(file=task, anchors=True))
