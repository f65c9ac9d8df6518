"""The part `transfer` of an adapter file: the same bytes for the same content, every rule broken once, and no bomb."""

from __future__ import annotations

import bz2
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from file_damage import assert_flips_are_found, assert_refused, problems_of, rebuilt, record_of, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load
from tiny_adapters import SMALL, tiny_file, tiny_transfer, tiny_universal
from tiny_hosts import SENTENCES, tiny_host

from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.packing import squeeze
from uhl_cli.errors import DataError, FormatError
from uhl_cli.formats.adapter import AdapterFile, read_adapter, to_bytes
from uhl_cli.formats.container import ADAPTER
from uhl_cli.inspect.report import InspectOptions
from uhl_cli.inspect.run import run_inspect
from uhl_cli.transfer.general import VERSION

TOKENS = SMALL.model_copy(update={"kind": "tokens", "num_labels": 4})
TAUGHT = to_bytes(tiny_file(transfer=tiny_transfer()))
PAIRED = to_bytes(tiny_file(transfer=tiny_transfer(pairs=True)))
TAGGED = to_bytes(tiny_file(TOKENS, transfer=tiny_transfer(TOKENS)))
GENERAL = to_bytes(tiny_file(transfer=tiny_transfer(general=True)))
FILES = {"texts": TAUGHT, "pairs": PAIRED, "words": TAGGED, "general": GENERAL}
EACH = pytest.mark.parametrize("data", FILES.values(), ids=list(FILES))
LINES = "\n".join(SENTENCES)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "adapter.safetensors"


def read_back(path: Path, data: bytes) -> AdapterFile:
    path.write_bytes(data)
    return read_adapter(path)


@pytest.mark.parametrize(
    ("config", "options"), [(SMALL, {}), (SMALL, {"pairs": True}), (TOKENS, {}), (SMALL, {"general": True})]
)
def test_what_is_read_is_what_was_written(path, config, options):
    given = tiny_transfer(config, **options)
    data = to_bytes(tiny_file(config, transfer=given))
    found = read_back(path, data)
    assert problems_of(path) == ()
    assert found.transfer is not None
    assert found.transfer.record == found.manifest.parts.transfer == given.record
    np.testing.assert_array_equal(found.transfer.codes, given.codes)
    assert found.transfer.codes.dtype == np.int8
    assert found.transfer.whole().texts == given.whole().texts
    assert found.transfer.whole().examples() == given.whole().examples()
    assert to_bytes(found) == data
    assert ("transfer.texts" in load(data)) == ("general" not in options)
    assert to_bytes(tiny_file(config, transfer=tiny_transfer(config, seed=1, **options))) != data


def test_a_file_without_the_part_is_read_and_says_so_when_it_is_needed(path):
    data = to_bytes(tiny_file())
    assert "transfer" not in record_of(data)["parts"]
    found = read_back(path, data)
    assert found.transfer is None
    assert to_bytes(found) == data
    with pytest.raises(DataError, match="no transfer set") as caught:
        UniversalAdapter.from_file(found).transfer_set()
    assert "--task or --data" in caught.value.hint
    with pytest.raises(DataError, match="no transfer set"):
        run_inspect(InspectOptions(file=path, transfer=True))


def test_who_does_not_know_the_part_leaves_it_out_and_keeps_it(path):
    """An older uhl, to which the part is as one of a name that this one does not know."""
    tensors = {f"chorus.{name}": load(TAUGHT)[f"transfer.{name}"] for name in ("texts", "outputs")}

    def rename(record):
        record["parts"] = {"chorus": record["parts"].pop("transfer")}

    data = rebuilt(ADAPTER, TAUGHT, rename, transfer__texts=None, transfer__outputs=None, **tensors)
    found = read_back(path, data)
    assert problems_of(path) == ()
    assert found.transfer is None
    assert {name: bytes(value.data) for name, value in found.others.items()} == {
        name: value.tobytes() for name, value in tensors.items()
    }
    assert to_bytes(found) == data


@EACH
def test_every_flipped_bit_is_found(path, data):
    path.write_bytes(data)
    assert_flips_are_found(path, lambda: read_adapter(path), error=FormatError, count=250)


def cut(array):
    return array[:-1]


def planes(change):
    """The codes, unpacked, changed and packed again."""

    def apply(array):
        codes = np.frombuffer(bz2.decompress(array.tobytes()), np.uint8).copy()
        return squeeze(change(codes).tobytes())

    return apply


def at(place, value):
    def change(codes):
        codes[place] = value
        return codes

    return change


def texts_of(text):
    return squeeze(text if isinstance(text, bytes) else text.encode())


BAD_TENSORS = [
    ({"transfer__texts": None}, "the part transfer.texts is missing"),
    ({"transfer__outputs": None}, "the part transfer.outputs is missing"),
    ({"transfer__more": np.zeros(3, np.uint8)}, "the part transfer.more does not belong"),
    ({"transfer__texts": lambda array: array.view(np.int8)}, "transfer.texts has the type int8"),
    ({"transfer__outputs": lambda array: array.view(np.int8)}, "transfer.outputs has the type int8"),
    ({"transfer__outputs": lambda array: array[None]}, "transfer.outputs has the type uint8 and 2 dimensions"),
    ({"transfer__texts": cut}, "transfer.texts is truncated or followed"),
    ({"transfer__outputs": cut}, "transfer.outputs is truncated or followed"),
    ({"transfer__outputs": lambda array: np.append(array, array)}, "transfer.outputs is truncated or followed"),
    ({"transfer__outputs": lambda array: array[:0]}, "transfer.outputs is truncated"),
    ({"transfer__texts": lambda array: array[::-1]}, "transfer.texts cannot be decompressed"),
    ({"transfer__outputs": lambda array: array[::-1]}, "transfer.outputs cannot be decompressed"),
    ({"transfer__outputs": planes(lambda codes: codes[:-1])}, "codes; "),
    ({"transfer__outputs": planes(lambda codes: np.append(codes, codes[:1]))}, "transfer.outputs holds more than"),
    ({"transfer__outputs": planes(at(3, 0))}, "transfer.outputs has a code outside -7..7"),
    ({"transfer__outputs": planes(at(-1, 16))}, "transfer.outputs has a code outside -7..7"),
    ({"transfer__texts": texts_of(LINES.encode()[:-1] + b"\xff")}, "transfer.texts is not UTF-8"),
    ({"transfer__texts": texts_of(LINES + "\none more")}, "it has 25 lines"),
    ({"transfer__texts": texts_of(LINES.replace("film", ""))}, "white space other than single spaces"),
    ({"transfer__texts": texts_of(LINES.replace("The film", "The\tfilm"))}, "white space other than"),
    ({"transfer__texts": texts_of("\n".join(["", *SENTENCES[1:]]))}, "a text of the transfer set is empty"),
    ({"transfer__texts": texts_of(LINES.replace("film", "opera"))}, "digest of the transfer set is not the one"),
]


@pytest.mark.parametrize(("tensors", "words"), BAD_TENSORS, ids=[words for _, words in BAD_TENSORS])
def test_bad_tensors(path, tensors, words):
    assert_refused(path, rebuilt(ADAPTER, TAUGHT, **tensors), words)


BAD_RECORDS = [
    (TAUGHT, "texts", 23, "states 23 texts of the transfer set; it has 24 lines"),
    (TAUGHT, "texts", 0, "at parts.transfer.texts"),
    (TAUGHT, "user_texts", 25, "25 texts of the user's"),
    (GENERAL, "user_texts", 1, "1 texts of the user's"),
    (TAUGHT, "pairs", True, "it has 24 lines"),
    (PAIRED, "pairs", False, "it has 48 lines"),
    (GENERAL, "pairs", True, "own texts has no pairs"),
    (TAGGED, "pairs", True, "a transfer set of words has no pairs"),
    (TAUGHT, "spans", 2, "digest of the transfer set is not the one"),
    (TAUGHT, "spans", 17, "at parts.transfer.spans"),
    (TAUGHT, "examples", 90, "numbers of examples and predictions"),
    (TAUGHT, "predictions", 90, "transfer.outputs holds more than 180 bytes"),
    (TAUGHT, "predictions", 10**7, "at parts.transfer.predictions"),
    (TAUGHT, "digest", "0" * 64, "digest of the transfer set is not the one"),
    (TAUGHT, "digest", "short", "at parts.transfer.digest"),
    (TAUGHT, "teacher", "x" * 1000, "at parts.transfer.teacher"),
    (TAUGHT, "origin", 3, "at parts.transfer.origin"),
    (TAUGHT, "general", {"version": 1}, "at parts.transfer.general"),
    (TAUGHT, "general", {"version": 1, "lower": True, "apart": True}, "transfer.texts does not belong"),
    (GENERAL, "general", None, "the part transfer.texts is missing"),
    (TAUGHT, "teacher_score", {"metric": "accuracy"}, "at parts.transfer.teacher_score"),
    (TAUGHT, "more", 1, "at parts.transfer.more"),
]


@pytest.mark.parametrize(("data", "field", "value", "words"), BAD_RECORDS, ids=[row[3] for row in BAD_RECORDS])
def test_bad_record(path, data, field, value, words):
    assert_refused(path, rebuilt(ADAPTER, data, setting(f"parts.transfer.{field}", value)), words)


def test_tensors_that_the_manifest_does_not_name(path):
    found = assert_refused(path, rebuilt(ADAPTER, TAUGHT, setting("parts.transfer", ...)), "does not belong")
    assert len(found) == 2


def test_all_that_is_wrong_is_listed(path):
    def change(record):
        record["parts"]["transfer"] |= {"user_texts": 30}
        record["parts"]["transfer"]["teacher_score"]["value"] = 1.5

    damaged = rebuilt(ADAPTER, TAUGHT, change, transfer__outputs=planes(at(0, 0)), transfer__texts=cut)
    found = assert_refused(path, damaged, "30 texts of the user's")
    for words in ("a code outside", "transfer.texts is truncated", "parts.transfer.teacher_score: 1.5"):
        assert sum(words in line for line in found) == 1, (words, found)
    assert len(found) == 4


def test_texts_of_another_version_are_missed_where_they_are_used_alone(path):
    data = rebuilt(ADAPTER, GENERAL, setting("parts.transfer.general.version", VERSION + 1))
    found = read_back(path, data)
    assert problems_of(path) == ()
    assert to_bytes(found) == data
    report = run_inspect(InspectOptions(file=path)).adapter
    assert report.transfer.record.general.version == VERSION + 1
    adapter = UniversalAdapter.from_file(found)
    with pytest.raises(DataError) as caught:
        adapter.transfer_set()
    assert f"version {VERSION + 1}" in caught.value.message
    assert "--task or --data" in caught.value.hint
    assert str(caught.value).isprintable()
    with pytest.raises(DataError, match=f"version {VERSION + 1}"):
        run_inspect(InspectOptions(file=path, transfer=True))
    # Porting needs none of them: it is what a file without a transfer set gives.
    host = tiny_host("bert")
    bare, taught = tiny_universal(host), replace(tiny_universal(host), transfer=found.transfer)
    wanted = bare.port(host, max_flops=1000.0)(list(SENTENCES[:3]))
    assert bool((taught.port(host, max_flops=1000.0)(list(SENTENCES[:3])) == wanted).all())
    whole = replace(tiny_universal(host), transfer=read_back(path, GENERAL).transfer)
    assert not bool((whole.port(host, max_flops=1000.0)(list(SENTENCES[:3])) == wanted).all())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("digest", "0" * 64, "is not that of this package's texts"),
        ("texts", 59, "is not that of this package's texts"),
        ("examples", 61, "numbers of examples and predictions"),
    ],
)
def test_a_record_that_does_not_fit_the_packages_texts_is_noticed(path, field, value, words):
    path.write_bytes(rebuilt(ADAPTER, GENERAL, setting(f"parts.transfer.{field}", value)))
    assert [line for line in problems_of(path) if words in line]
    with pytest.raises(FormatError, match=words) as caught:
        UniversalAdapter.load(path).transfer_set()
    assert caught.value.hint


def bombed(record: dict[str, object], **tensors: np.ndarray) -> bytes:
    return rebuilt(ADAPTER, TAUGHT, lambda manifest: manifest["parts"]["transfer"].update(record), **tensors)


BOMBS = {
    "texts": (lambda: bombed({}, transfer__texts=squeeze(bytes(50_000_000))), "transfer.texts holds more than"),
    "outputs": (lambda: bombed({}, transfer__outputs=squeeze(bytes(50_000_000))), "transfer.outputs holds more than"),
    "lines": (lambda: bombed({}, transfer__texts=squeeze(b"ab\n" * 660_000)), "states 24 texts"),
    "codes": (
        lambda: bombed({"predictions": 4_000_000}, transfer__outputs=squeeze(bytes(8_000_000))),
        "has a code outside",
    ),
    "predictions": (lambda: rebuilt(ADAPTER, TAGGED, _many), "the transfer set have 99,900,000 codes"),
}


def _many(record: dict[str, dict[str, object]]) -> None:
    """A sound manifest of a hundred million codes."""
    labels = [f"label {index}" for index in range(1000)]
    record["config"]["num_labels"] = 1000
    record["task"]["labels"] = labels
    record["label_counts"] = [1] * 1000
    record["parts"]["transfer"]["predictions"] = 100_000


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_within_memory(path, name):
    make, words = BOMBS[name]
    data = make()
    assert len(data) < 100_000
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            read_adapter(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40_000_000
    assert_refused(path, data, words)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["transfer.texts", "transfer.outputs"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=4)
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, name, place, some):
    def change(array):
        start = place % array.size
        array[start : start + len(some)] = np.frombuffer(some, np.uint8)[: array.size - start]
        return array

    path = tmp_path_factory.getbasetemp() / "transfer.safetensors"
    path.write_bytes(rebuilt(ADAPTER, TAUGHT, **{name: change}))
    try:
        found = read_adapter(path)
    except FormatError:  # any other exception fails the test
        assert problems_of(path)
        return
    assert found.transfer is not None
    assert json.dumps(found.transfer.whole().texts.texts)
    assert int(np.abs(found.transfer.codes).max()) <= 7
