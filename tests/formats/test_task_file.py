"""The task file: the same bytes for the same content, and no file can do more than be refused.

What it shares with the adapter file, its parameters and its container, is tested there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from file_damage import assert_flips_are_found, problems_of, rebuilt, setting
from safetensors.numpy import load
from tiny_adapters import SMALL, tiny_anchors, tiny_file, tiny_manifest, tiny_task_file, tiny_universal
from tiny_hosts import tiny_host

from uhl_cli.api import UniversalAdapter
from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.formats.adapter import read_adapter, write_adapter
from uhl_cli.formats.container import TASK
from uhl_cli.formats.convert import dequantised
from uhl_cli.formats.task import read_task, task_to_bytes, write_task
from uhl_cli.schema import AdapterConfig


@pytest.fixture(params=[True, False], ids=["own task", "new task"])
def valid(request) -> bytes:
    return task_to_bytes(tiny_task_file(own_task=request.param))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "moods.task.safetensors"


def assert_refused(path: Path, data: bytes, words: str, error: type[FormatError] = FormatError) -> None:
    """Refused by the reader for what `--verify` names first."""
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words) as caught:
        read_task(path)
    assert type(caught.value) is error
    assert caught.value.hint
    assert caught.value.message == f"{path}: {problems_of(path)[0]}."


@pytest.mark.parametrize("own_task", [True, False])
def test_what_is_written_is_read_back(own_task, path):
    content = tiny_task_file(own_task=own_task)
    assert path.parent.exists()
    assert write_task(path, content) == path.stat().st_size
    assert problems_of(path) == ()
    read = read_task(path)
    assert read.record == content.record
    assert read.parameters.keys() == content.parameters.keys()
    before, after = dequantised(content.parameters), dequantised(read.parameters)
    assert all(bool((before[name] == after[name]).all()) for name in before)
    assert task_to_bytes(read) == task_to_bytes(content) == path.read_bytes()
    assert task_to_bytes(tiny_task_file(own_task=own_task, seed=1)) != task_to_bytes(content)


def test_the_own_tasks_file_holds_delta_theta_alone():
    tensors = load(task_to_bytes(tiny_task_file()))
    assert set(tensors) == {"delta_theta", "delta_theta.scale"}
    types, atoms = tiny_task_file().parameters["delta_theta"].codes.shape
    assert tensors["delta_theta"].nbytes == types * atoms // 2


def test_files_of_format_2_0_held_gains_tuned_by_labels(valid, path):
    def older(record):
        del record["parameters"], record["supervision"]
        record["format_version"] = "2.0"

    path.write_bytes(rebuilt(TASK, valid, older))
    record = read_task(path).record
    assert problems_of(path) == ()
    assert (record.parameters, record.supervision) == ("gains", "labels")


def test_a_low_rank_update_has_the_adapters_readout(path):
    own, new = (task_to_bytes(tiny_task_file(own_task=own_task)) for own_task in (True, False))
    path.write_bytes(rebuilt(TASK, own, setting("parameters", "low-rank")))
    assert read_task(path).record.parameters == "low-rank"
    assert problems_of(path) == ()
    assert_refused(path, rebuilt(TASK, new, setting("parameters", "low-rank")), "has no readout for a task of its own")


def test_it_fits_the_adapter_that_it_names_alone(path, tmp_path):
    adapters = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for seed, adapter in enumerate(adapters):
        write_adapter(adapter, tiny_file(seed=seed))
    content = read_adapter(adapters[0])
    write_task(path, tiny_task_file(content.manifest, adapter=content.digest))
    assert UniversalAdapter.load(adapters[0]).with_task(path).stored["delta_theta"].any()
    with pytest.raises(FormatError, match="tuned on another adapter"):
        UniversalAdapter.load(adapters[1]).with_task(path)
    with pytest.raises(FormatError, match="tuned on another adapter"):  # one that never was a file
        tiny_universal(tiny_host("bert")).with_task(path)


@pytest.mark.parametrize(
    ("way", "value", "words"),
    [
        ("adapter", "short", "at adapter"),
        ("label_counts", [1], "number of labels differs"),
        ("config.kind", "tokens", "kind of task differs"),
        ("own_task", "perhaps", "at own_task"),
        ("parameters", "everything", "at parameters"),
        ("supervision", "hearsay", "at supervision"),
        ("unknown", 1, "at unknown"),
        ("before.value", float("nan"), "at before.value"),
        ("config.num_atoms", 9, "delta_theta holds 28 bytes"),
        ("task.kind", "regression", "regression, which is reserved"),
    ],
)
def test_bad_record(valid, way, value, words, path):
    error = NewerFormatError if "reserved" in words else FormatError
    assert_refused(path, rebuilt(TASK, valid, setting(way, value)), words, error)


def test_bad_tensors(valid, path):
    for name in load(valid):
        assert_refused(path, rebuilt(TASK, valid, **{name: None}), f"the part {name} is missing")
    assert_refused(path, rebuilt(TASK, valid, more=np.zeros(1, np.float32)), "the part more does not belong")
    for value in (np.nan, np.inf, -1.0, 15.0):
        scale = load(valid)["delta_theta.scale"]
        scale[0] = value
        assert_refused(path, rebuilt(TASK, valid, delta_theta__scale=scale), "not finite or not within 0")
    assert_refused(path, rebuilt(TASK, valid, delta_theta=lambda array: array[:-1]), "holds 27 bytes")
    assert_refused(path, rebuilt(TASK, valid, delta_theta=lambda array: array * 0), "a code outside")


def test_sizes_are_bounded_by_their_product(path):
    config = AdapterConfig(num_atoms=1024, canonical_size=1024, readout_size=1024, knots=(0.0, 0.25, 0.5, 0.75, 1.0))
    changed = rebuilt(
        TASK, task_to_bytes(tiny_task_file()), lambda record: record["config"].update(config.model_dump(mode="json"))
    )
    assert_refused(path, rebuilt(TASK, changed, setting("config.num_labels", 3)), "at most 8,000,000")


@pytest.mark.parametrize("own_task", [True, False])
def test_every_flipped_bit_is_found(own_task, path):
    write_task(path, tiny_task_file(tiny_manifest(SMALL, tiny_anchors()), own_task=own_task))
    assert_flips_are_found(path, lambda: read_task(path), error=FormatError, count=500, seed=int(own_task))
