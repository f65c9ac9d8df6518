"""The task file: the same bytes for the same content, and no file can do more than be refused."""

from __future__ import annotations

import json
import os
import random
import struct

import numpy as np
import pytest
from safetensors.numpy import load, save
from tiny_adapters import SMALL, random_adapter, tiny_anchors, tiny_manifest

from uhl_cli.codes.layout import bits_of
from uhl_cli.codes.quantise import codes_and_scales
from uhl_cli.errors import FormatError, NewerFormatError, UhlError
from uhl_cli.formats.adapter import Quantised
from uhl_cli.formats.convert import dequantised
from uhl_cli.formats.task import (
    TaskFile,
    TaskRecord,
    read_task,
    task_parameter_shapes,
    task_to_bytes,
    write_task,
)


def task_file(*, own_task: bool = True, seed: int = 0) -> TaskFile:
    """A task file with random content."""
    manifest = tiny_manifest(SMALL, tiny_anchors())
    record = TaskRecord(
        adapter="0" * 64,
        config=SMALL,
        task=manifest.task,
        label_counts=manifest.label_counts,
        own_task=own_task,
        target=manifest.source,
        training=manifest.training,
        versions={},
    )
    adapter = random_adapter(SMALL, seed=seed)
    parameters = {}
    for name in task_parameter_shapes(record):
        codes, scales = codes_and_scales(adapter.get_parameter(name), bits_of(name))
        parameters[name] = Quantised(codes.numpy(), scales.numpy())
    return TaskFile(record, parameters)


@pytest.fixture(scope="module", params=[True, False], ids=["own task", "new task"])
def valid(request) -> bytes:
    return task_to_bytes(task_file(own_task=request.param))


def header_of(data: bytes) -> dict:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size])


def refused(path, data: bytes, words: str, kind: type[UhlError] = FormatError) -> None:
    path.write_bytes(data)
    with pytest.raises(kind, match=words) as caught:
        read_task(path)
    assert caught.value.hint


@pytest.mark.parametrize("own_task", [True, False])
def test_what_is_written_is_read_back(own_task, tmp_path):
    content = task_file(own_task=own_task)
    size = write_task(tmp_path / "a", content)
    assert (tmp_path / "a").stat().st_size == size
    read = read_task(tmp_path / "a")
    assert read.record == content.record
    assert read.parameters.keys() == content.parameters.keys()
    before, after = dequantised(content.parameters), dequantised(read.parameters)
    assert all(bool((before[name] == after[name]).all()) for name in before)
    assert task_to_bytes(read) == task_to_bytes(content)
    assert task_to_bytes(task_file(own_task=own_task, seed=1)) != task_to_bytes(content)


def test_the_own_tasks_file_holds_delta_theta_alone(tmp_path):
    tensors = load(task_to_bytes(task_file()))
    assert set(tensors) == {"delta_theta", "delta_theta.scale"}
    types, atoms = task_file().parameters["delta_theta"].codes.shape
    assert tensors["delta_theta"].nbytes == types * atoms // 2


def test_damaged_files_are_refused(valid, tmp_path):
    path = tmp_path / "task.safetensors"
    with pytest.raises(FormatError, match="no file"):
        read_task(tmp_path / "absent")
    refused(path, b"", "not a whole")
    refused(path, valid[: len(valid) // 2], "not a whole")
    refused(path, save({"a": np.zeros(3, np.float32)}), "not a uhl task file")
    metadata = header_of(valid)["__metadata__"]
    tensors = load(valid)
    for name in tensors:
        refused(path, save({k: v for k, v in tensors.items() if k != name}, metadata=metadata), "lacks or adds")
    refused(path, save({**tensors, "more": np.zeros(1, np.float32)}, metadata=metadata), "lacks or adds")
    scale = tensors["delta_theta.scale"].copy()
    for value in (np.nan, np.inf, -1.0, 1e9):
        scale[0] = value
        refused(path, save({**tensors, "delta_theta.scale": scale}, metadata=metadata), "not finite|absurdly")
    refused(path, save({**tensors, "delta_theta": tensors["delta_theta"][:-1]}, metadata=metadata), "bytes")
    refused(path, save({**tensors, "delta_theta": tensors["delta_theta"] * 0}, metadata=metadata), "code outside")


def test_records_that_break_the_format_are_refused(valid, tmp_path):
    path, tensors = tmp_path / "task.safetensors", load(valid)
    record = json.loads(header_of(valid)["__metadata__"]["uhl-task"])

    def changed(**changes: object) -> bytes:
        return save(tensors, metadata={"uhl-task": json.dumps(record | changes)})

    refused(path, changed(format_version="2.0"), "format 2.0", NewerFormatError)
    refused(path, changed(adapter="short"), "adapter")
    refused(path, changed(label_counts=[1]), "number of labels")
    refused(path, changed(own_task="perhaps"), "own_task")
    refused(path, changed(unknown=1), "unknown")
    refused(path, save(tensors, metadata={"uhl-task": "{"}), "not readable")
    refused(path, save(tensors, metadata={"uhl-task": "[" * 100_000}), "not readable")


def test_no_change_of_bytes_does_more_than_be_refused(valid, tmp_path):
    """Flipped, cut and repeated bytes: either a typed error, or content within the format."""
    path = tmp_path / "task.safetensors"
    draw = random.Random(7)
    refusals = 0
    for _ in range(int(os.environ.get("UHL_FUZZ", "400"))):
        data = bytearray(valid)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            data[place : place + draw.choice((0, 1, 1, 1))] = bytes([draw.randrange(256)])
        size = draw.choice((len(data), len(data), draw.randrange(len(data))))
        path.write_bytes(bytes(data[:size]))
        try:
            content = read_task(path)
        except UhlError:
            refusals += 1
            continue
        assert all(np.isfinite(part.scales).all() for part in content.parameters.values())
    assert refusals > 0
