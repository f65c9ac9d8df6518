"""Mutants of every file that uhl reads end in a typed error or in finite numbers; `fuzz_run` says what a finding is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest
import torch
from fuzz_mutations import resealed
from fuzz_run import fresh_state, go_on, run_case, run_chunk
from fuzz_targets import Target, uhl_targets
from tiny_adapters import SMALL, tiny_file

from uhl_cli.errors import FormatError
from uhl_cli.formats.adapter import read_adapter, to_bytes

CASES = 6000
FINE = (torch.zeros(2),)


@pytest.fixture(scope="module")
def targets() -> list[Target]:
    return uhl_targets()


@pytest.mark.slow
def test_no_mutant_is_a_finding(targets):
    state = go_on(targets, fresh_state(1), CASES)
    assert state["findings"] == []
    # The control: the mutants of every kind came through the readers often enough, and not always.
    assert set(state["counts"]) == {target.name for target in targets}
    for name, counts in state["counts"].items():
        assert counts.get("refused"), name
        assert counts.get("accepted", 0) + counts.get("run", 0) > 0.1 * counts["refused"], name
        assert counts.get("run"), name


def planted(read, run=lambda _content, _path: FINE) -> list[Target]:
    """A target of files of one byte, that is read and run like this."""

    def make(folder: Path, draw: Random) -> Path:
        (folder / "x").write_bytes(draw.randbytes(1))
        return folder / "x"

    return [Target("planted", 1, 1.0, make, read, run)]


def raising(error: BaseException):
    def read(_path):
        raise error

    return read


def greedy(_path):
    try:
        bytes(2**31)
    except MemoryError as error:
        raise FormatError("it is large", "Get a smaller one.") from error


HOLES = {
    "untyped": (planted(raising(KeyError("x"))), "KeyError"),
    "not even an Exception": (planted(raising(BaseException("a panic"))), "a panic"),
    "without a hint": (planted(raising(FormatError("it is damaged"))), "not one line with a hint"),
    "not finite": (planted(str, lambda _content, _path: (torch.tensor([0.0, float("nan")]),)), "not finite"),
    "memory": (planted(lambda _path: bytes(2**31)), "MemoryError"),
    "memory, in a typed error": (planted(greedy), "MemoryError inside"),
    "dead": (planted(lambda _path: os.abort()), "the process died (-6)"),
    "no end": (planted(lambda _path: time.sleep(60)), "no end after"),
}


@pytest.mark.integration
@pytest.mark.parametrize("hole", HOLES)
def test_a_planted_hole_is_found(hole):
    targets, words = HOLES[hole]
    found = run_chunk(targets, 0, 0, 2, hang=0.5)["findings"]
    assert [finding["case"] for finding in found] == [0, 1]
    assert all(words in finding["problem"] for finding in found)


@pytest.mark.integration
def test_a_reader_that_is_stricter_than_verify_is_found():
    def make(folder, _draw):
        (folder / "a.safetensors").write_bytes(to_bytes(tiny_file(SMALL)))
        return folder / "a.safetensors"

    strict = raising(FormatError("it is damaged", "Get it again."))
    found = run_chunk([Target("planted", 1, 0.0, make, read_adapter, str, strict)], 0, 0, 60)["findings"]
    assert found
    assert all("--verify finds nothing" in finding["problem"] for finding in found)


def test_without_a_hole_nothing_is_found():
    refused, state = FormatError("it is damaged", "Get it again."), fresh_state(0)
    assert go_on(planted(raising(refused)), state, 20)["findings"] == []
    assert go_on(planted(str), state, 40)["findings"] == []
    assert state["counts"] == {"planted": {"refused": 20, "run": 20}}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    def read(path):
        if path.read_bytes() < b"\x80":
            raise FormatError("it is small", "Get a larger one.")

    whole, parts = go_on(planted(read), fresh_state(3), 60), fresh_state(3)
    for cases in (20, 20, 60):
        go_on(planted(read), parts, cases, tmp_path / "state.json")
    assert parts["counts"] == whole["counts"]
    assert len(parts["counts"]["planted"]) == 2
    assert go_on(planted(read), fresh_state(4), 60)["counts"] != whole["counts"]


@pytest.mark.integration
def test_a_case_is_its_number(targets, tmp_path):
    def mutants(seed, folder):
        for index in range(30):
            (folder / str(index)).mkdir(parents=True)
            run_case(targets, seed, index, folder / str(index))
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first = mutants(0, tmp_path / "first")
    assert mutants(0, tmp_path / "again") == first
    assert mutants(1, tmp_path / "other") != first


def test_a_resealed_file_passes_its_checksum(tmp_path):
    data, path = to_bytes(tiny_file(SMALL)), tmp_path / "a.safetensors"
    assert resealed(data) == data
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match="digest of the content"):
        read_adapter(path)
    path.write_bytes(resealed(damaged))
    read_adapter(path)  # the last bit of a code is free
