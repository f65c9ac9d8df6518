"""The adapter file: the same bytes for the same content, and no file can do more than be refused."""

import itertools
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from tiny_adapters import SMALL, fake_bank, random_adapter, tiny_file, tiny_manifest

from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.layout import parameter_shapes
from uhl_cli.codes.packing import compress_text
from uhl_cli.errors import FormatError, NewerFormatError, UhlError
from uhl_cli.formats.adapter import MAX_TEXT_BYTES, read_adapter, to_bytes, write_adapter
from uhl_cli.formats.convert import bank_of, stored_parameters, to_file
from uhl_cli.schema import AdapterConfig

TOKENS = SMALL.model_copy(update={"kind": "tokens", "num_labels": 4, "top_k": 1, "knots": (0.5, 1.0)})


@pytest.fixture(scope="module")
def valid():
    return to_bytes(tiny_file())


@pytest.fixture(scope="module")
def featured():
    return to_bytes(tiny_file(SMALL, featured=True))


def split(data):
    """Header (as an object) and body of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_tensors(data, **changes):
    """The file with other tensors; None leaves one out.  Dots in names are written as two underscores."""
    tensors = load(data)
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = np.ascontiguousarray(value(tensors[key].copy()) if callable(value) else value)
    return save(tensors, metadata=split(data)[0]["__metadata__"])


def with_manifest(data, change):
    """The file with another manifest: an object, or a string as it stands."""
    manifest = json.loads(split(data)[0]["__metadata__"]["uhl"])
    changed = change(manifest)
    text = changed if isinstance(changed, str) else json.dumps(changed)
    return save(load(data), metadata={"uhl": text})


def assert_refused(tmp_path, data, error=FormatError):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_adapter(path)
    assert type(caught.value) is error
    assert isinstance(caught.value, UhlError)
    assert caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("featured", [False, True])
@pytest.mark.parametrize("config", [SMALL, TOKENS, AdapterConfig(num_atoms=3, canonical_size=5, readout_size=2)])
def test_what_is_read_is_what_was_written(tmp_path, config, featured):
    content = tiny_file(config, featured=featured)
    path = tmp_path / "adapter.safetensors"
    assert write_adapter(path, content) == path.stat().st_size == len(to_bytes(content))
    again = read_adapter(path)
    assert again.manifest == content.manifest
    assert again.anchors == content.anchors
    assert set(again.parameters) == set(content.parameters) == set(parameter_shapes(config))
    for name, entry in [*content.parameters.items(), ("", content.coordinates)]:
        found = again.parameters[name] if name else again.coordinates
        np.testing.assert_array_equal(found.codes, entry.codes)
        np.testing.assert_array_equal(found.scales, entry.scales)
        assert (found.codes.dtype, found.scales.dtype) == (np.int8, np.float32)
    assert (again.features is not None) == featured
    if again.features is not None and content.features is not None:
        assert again.features.anchors == content.features.anchors
        np.testing.assert_array_equal(again.features.codes.codes, content.features.codes.codes)
        np.testing.assert_array_equal(again.features.codes.scales, content.features.codes.scales)
        np.testing.assert_array_equal(again.features.mean, content.features.mean)
    assert to_bytes(again) == path.read_bytes()


def test_what_is_read_is_what_training_computed_with(tmp_path):
    adapter, bank = random_adapter(), fake_bank()
    content = to_file(adapter, bank, tiny_manifest(SMALL, bank.anchors))
    write_adapter(tmp_path / "a.safetensors", content)
    loaded = UniversalAdapter.load(tmp_path / "a.safetensors")
    stored = {name: value.detach() for name, value in adapter.stored().items()}
    assert set(loaded.stored) == set(stored)
    assert all(torch.equal(loaded.stored[name], value) for name, value in stored.items())
    assert not torch.equal(loaded.stored["atoms_u"], adapter.get_parameter("atoms_u").detach())  # it was quantised
    assert torch.equal(loaded.bank.coordinates, bank.coordinates)
    assert loaded.bank.knots == bank.knots
    again = read_adapter(tmp_path / "a.safetensors")
    assert torch.equal(stored_parameters(again)["atoms_v"], stored["atoms_v"])
    assert bank_of(again).anchors == bank.anchors


def test_bytes_are_deterministic(tmp_path, valid):
    assert to_bytes(tiny_file()) == valid
    assert to_bytes(tiny_file(seed=1)) != valid
    write_adapter(tmp_path / "one", tiny_file())
    write_adapter(tmp_path / "two", tiny_file())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == valid
    program = "import sys; from tiny_adapters import *; from uhl_cli.formats.adapter import to_bytes\n"
    program += "sys.stdout.buffer.write(to_bytes(tiny_file()))"
    for seed in ("1", "2"):  # of the hashes of strings: no order of a set may reach the bytes
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        assert done.stdout == valid


def test_order_of_a_dictionary_does_not_reach_the_bytes():
    content = tiny_file()
    orders = [{"uhl": "0", "torch": "1"}, {"torch": "1", "uhl": "0"}]
    manifests = [content.manifest.model_copy(update={"versions": versions}) for versions in orders]
    one, two = (
        to_bytes(replace(content, manifest=manifest, parameters=dict(order(content.parameters.items()))))
        for manifest, order in zip(manifests, (list, reversed), strict=True)
    )
    assert one == two


def test_reading_needs_no_torch(tmp_path, valid):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(valid)
    program = (
        "import sys; from pathlib import Path; import uhl_cli.formats.adapter as store\n"
        f"content = store.read_adapter(Path({str(path)!r}))\n"
        "assert content.manifest.task.name == 'moods'\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'imported'\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_file_and_folder(tmp_path):
    for path, words in ((tmp_path / "none", "there is no file"), (tmp_path, "is a folder")):
        with pytest.raises(FormatError, match=words) as caught:
            read_adapter(path)
        assert caught.value.hint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    program = "import sys, pathlib, uhl_cli.formats.adapter as store; store.read_adapter(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path / "pipe")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert "FormatError" in done.stderr


def test_file_that_may_not_be_read(tmp_path, valid):
    path = tmp_path / "locked"
    path.write_bytes(valid)
    path.chmod(0)
    if os.access(path, os.R_OK):
        assert read_adapter(path).manifest  # permissions do not bind root
        return
    with pytest.raises(FormatError) as caught:
        read_adapter(path)
    assert caught.value.hint


def test_file_that_is_far_too_large(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64_000_001)
    with pytest.raises(FormatError, match="no adapter is larger"):
        read_adapter(path)


def test_other_bytes(tmp_path, valid):
    for data in (b"", b"\0", b"\0" * 8, b"PK\x03\x04" + bytes(100), random.Random(0).randbytes(5000)):
        assert_refused(tmp_path, data)
    assert_refused(tmp_path, valid[1:])
    assert_refused(tmp_path, valid + b"\0")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.4, 0.7, 0.99])
def test_cut_off_file(tmp_path, valid, share):
    assert_refused(tmp_path, valid[: int(share * len(valid)) + 3])
    assert_refused(tmp_path, valid[:-1])


def test_other_safetensors_files(tmp_path, valid):
    tensors = load(valid)
    assert "not a uhl adapter" in assert_refused(tmp_path, save(tensors)).message
    assert "not a uhl adapter" in assert_refused(tmp_path, save(tensors, metadata={"format": "pt"})).message
    assert_refused(tmp_path, save({}, metadata={"uhl": split(valid)[0]["__metadata__"]["uhl"]}))


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**31, 2**62, 2**64 - 1])
def test_header_length_that_lies(tmp_path, valid, size):
    assert_refused(tmp_path, struct.pack("<Q", size) + valid[8:])


def test_header_that_lies_about_its_tensors(tmp_path, valid):
    header, body = split(valid)

    def entry(**changes):
        return {**header, "atoms_u": {**header["atoms_u"], **changes}}

    start, end = header["atoms_u"]["data_offsets"]
    lies = [
        entry(data_offsets=[start, end + 1]),
        entry(data_offsets=[end, start]),
        entry(data_offsets=[0, 2**62]),
        entry(data_offsets=[-1, end]),
        entry(data_offsets=[start]),
        entry(data_offsets="all"),
        entry(shape=[2**40, 2**40]),
        entry(shape=[7, -9]),
        entry(shape=[7]),
        entry(shape=[63]),
        entry(shape=[9, 7]),
        entry(shape=[7, 9.0]),
        entry(shape=None),
        entry(dtype="U8"),
        entry(dtype="BOOL"),
        entry(dtype="F8_E4M3"),
        entry(dtype="F8_E5M2"),
        entry(dtype="F8_E8M0"),
        entry(dtype="I4"),
        entry(dtype="nonsense"),
        entry(dtype=None),
        {**header, "atoms_u": header["atoms_v"]},
        {**header, "extra": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
        {**header, "__metadata__": {"uhl": 1}},
        {**header, "__metadata__": ["uhl"]},
        {**header, "__metadata__": None},
        {},
        [],
        b"{",
        b"\xff\xff",
        b"[" * 5000,
        b'{"a":' * 5000,
        {name: value for name, value in header.items() if name != "__metadata__"},
    ]
    assert read_back(tmp_path, join(header, body))  # the control: the same header, written anew, is taken
    for lie in lies:
        assert_refused(tmp_path, join(lie, body))


def read_back(tmp_path, data):
    path = tmp_path / "again.safetensors"
    path.write_bytes(data)
    return read_adapter(path)


def deep(manifest, *keys, value):
    inner = manifest
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return manifest


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("training", "config", "noise"), float("nan")),
        (("training", "config", "noise"), float("inf")),
        (("atoms_per_token",), float("nan")),
        (("atoms_per_token",), -1.0),
        (("score",), {"metric": "accuracy", "value": float("nan"), "low": 0, "high": 1, "examples": 1}),
        (("config", "num_atoms"), 10**9),
        (("config", "num_atoms"), -7),
        (("config", "num_atoms"), "seven"),
        (("config", "num_atoms"), 8),
        (("config", "num_atoms"), 10**400),
        (("config", "canonical_size"), 1024),
        (("config", "top_k"), 3),
        (("config", "knots"), []),
        (("config", "knots"), [1.0, 0.5]),
        (("config", "knots"), [0.0, 0.5]),
        (("config", "knots"), [float("nan"), 1.0]),
        (("config", "kind"), "tokens"),
        (("config", "num_labels"), 2),
        (("config", "strategy"), "guess"),
        (("task", "labels"), ["one", "two"]),
        (("task", "labels"), ["one", "two", "two"]),
        (("task", "labels"), ["x" * 10**5, "b", "c"]),
        (("task", "metric"), "entity_f1"),
        (("task", "text_column"), None),
        (("label_counts",), [1, 2]),
        (("label_counts",), [1, 2, -3]),
        (("anchors", "digest"), "0" * 64),
        (("anchors", "digest"), "zz"),
        (("anchors", "words"), 39),
        (("anchors", "words"), 10**12),
        (("anchors", "texts"), 1),
        (("source", "fingerprint", "hidden_size"), 0),
        (("source", "name"), "x" * 10**5),
        (("format_version",), "1"),
        (("format_version",), "one"),
        (("format_version",), "-1.0"),
        (("format_version",), "1.0\n"),
        (("format_version",), 1.5),
        (("format_version",), None),
        (("format_version",), ["2.0"]),
        (("unknown",), 1),
        (("versions",), {"uhl": 1}),
        (("task",), None),
        (("config",), []),
    ],
)
def test_bad_manifest(tmp_path, valid, keys, value):
    assert_refused(tmp_path, with_manifest(valid, lambda manifest: deep(manifest, *keys, value=value)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "1",
        "{}",
        '"uhl"',
        "NaN",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format_version": "' + "9" * 10_000 + '.0"}',
        '{"format_version": "1.0", "x": ' + "9" * 10_000 + "}",
        "{'format_version': '1.0'}",
    ],
)
def test_manifest_that_is_none(tmp_path, valid, text):
    assert_refused(tmp_path, with_manifest(valid, lambda _: text))


def test_deep_nesting_inside_a_manifest(tmp_path, valid):
    nested = "[" * 50_000 + "]" * 50_000
    assert_refused(
        tmp_path, with_manifest(valid, lambda manifest: json.dumps(manifest)[:-1] + f', "licence": {nested}}}')
    )


@pytest.mark.parametrize("version", ["2.0", "10.3"])
def test_newer_format(tmp_path, valid, version):
    data = with_manifest(valid, lambda manifest: {"format_version": version, "all": "else may differ"})
    error = assert_refused(tmp_path, data, NewerFormatError)
    assert version in error.message
    assert "upgrade" in error.hint


def changed(index, value):
    def change(array):
        array.reshape(-1)[index] = value
        return array

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"atoms_u": None},
        {"atoms_u__scale": None},
        {"anchors__codes": None},
        {"anchors__texts": None},
        {"threshold": None},
        {"extra": np.zeros(3, np.uint8)},
        {"atoms_u.scale2": np.zeros(3, np.float32)},
        {"atoms_u": lambda array: array.astype(np.float32)},
        {"atoms_u": lambda array: array.view(np.uint8)},
        {"atoms_u": lambda array: array.astype(np.int64)},
        {"atoms_u": lambda array: array[:-1]},
        {"atoms_u": lambda array: array.T},
        {"atoms_u": lambda array: array[None]},
        {"atoms_u": lambda array: array.reshape(-1)},
        {"atoms_u": changed(5, -128)},
        {"delta_theta": changed(3, 0x80)},
        {"delta_theta": lambda array: array[:-1]},
        {"delta_theta": lambda array: array.view(np.int8)},
        {"delta_theta": lambda array: array[None]},
        {"mixer_out_bias": changed(-1, 0x18)},
        {"atoms_u__scale": changed(0, np.nan)},
        {"atoms_u__scale": changed(0, np.inf)},
        {"atoms_u__scale": changed(0, -np.inf)},
        {"atoms_u__scale": changed(0, -1e-9)},
        {"atoms_u__scale": changed(0, 1e30)},
        {"atoms_u__scale": lambda array: array.astype(np.float64)},
        {"atoms_u__scale": lambda array: array.astype(np.float16)},
        {"atoms_u__scale": lambda array: array[:-1]},
        {"atoms_u__scale": lambda array: array[:, None]},
        {"anchors__scale": changed(0, np.nan)},
        {"anchors__scale": lambda array: array[:-1]},
        {"anchors__scale": lambda array: array.reshape(-1)},
        {"anchors__codes": lambda array: array[:-1]},
        {"anchors__codes": changed(0, 0x08)},
        {"anchors__codes": lambda array: array.astype(np.int16)},
        {"anchors__words": lambda array: array[:-1]},
        {"anchors__words": lambda array: np.append(array, np.uint8(0))},
        {"anchors__words": changed(0, 0xFF)},
        {"anchors__words": lambda array: array * 0},
        {"anchors__words": lambda array: array[None]},
        {"anchors__texts": lambda array: array[:-3]},
        {"anchors__texts": lambda array: array[:0]},
        {"anchors__texts": lambda array: np.append(array, array)},
        {"anchors__texts": compress_text("other texts altogether")},
        {"anchors__texts": compress_text("\n" * 100_000)},
        {"anchors__texts": np.frombuffer(zlib.compress(b"\xff\xfe\xfd"), np.uint8)},
        {"anchors__texts": lambda array: array.view(np.int8)},
    ],
)
def test_bad_tensors(tmp_path, valid, changes):
    assert_refused(tmp_path, with_tensors(valid, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"features__codes": None},
        {"features__mean": None},
        {"features__codes": lambda array: array[:-1]},
        {"features__codes": lambda array: array.view(np.int8)},
        {"features__codes": lambda array: array[None]},
        {"features__scale": changed(0, np.nan)},
        {"features__scale": changed(0, -1e-9)},
        {"features__scale": lambda array: array[:-1]},
        {"features__mean": changed(0, np.nan)},
        {"features__mean": changed(0, -np.inf)},
        {"features__mean": changed(0, 1e30)},
        {"features__mean": lambda array: array[:-1]},
        {"features__mean": lambda array: array.astype(np.float64)},
        {"features__shift": None},
        {"features__shift": changed(0, np.nan)},
        {"features__shift": lambda array: array[:-1]},
        {"features__words": lambda array: array[:-1]},
        {"features__words": changed(0, 0)},
        {"features__texts": lambda array: array[:-3]},
        {"features__texts": compress_text("other texts altogether")},
        {"anchors__codes": lambda array: array[:-1]},
        {"anchors__codes": lambda array: np.append(array, array)},
    ],
)
def test_bad_features(tmp_path, featured, changes):
    assert_refused(tmp_path, with_tensors(featured, **changes))


def test_features_that_the_manifest_does_not_name_and_the_other_way_round(tmp_path, valid, featured):
    def dropped(manifest):
        del manifest["anchors"]["features"]
        return manifest

    assert_refused(tmp_path, with_manifest(featured, dropped))
    record = json.loads(split(featured)[0]["__metadata__"]["uhl"])["anchors"]["features"]
    assert_refused(
        tmp_path,
        with_manifest(valid, lambda manifest: manifest | {"anchors": manifest["anchors"] | {"features": record}}),
    )


def test_changed_anchor_text_of_the_same_shape_is_noticed(tmp_path, valid):
    texts = zlib.decompress(load(valid)["anchors.texts"].tobytes()).decode()
    same = with_tensors(valid, anchors__texts=compress_text(texts))
    assert read_back(tmp_path, same).anchors.texts == tuple(texts.split("\n"))
    other = texts.replace("e", "a", 1)
    error = assert_refused(tmp_path, with_tensors(valid, anchors__texts=compress_text(other)))
    assert "differ from what the manifest says" in error.message


def test_bomb_of_texts_is_refused_within_memory(tmp_path, valid):
    bomb = with_tensors(valid, anchors__texts=np.frombuffer(zlib.compress(bytes(50 * MAX_TEXT_BYTES), 9), np.uint8))
    tracemalloc.start()
    try:
        assert "longer than" in assert_refused(tmp_path, bomb).message
        assert tracemalloc.get_traced_memory()[1] < 5 * MAX_TEXT_BYTES
    finally:
        tracemalloc.stop()


def outcome(path, data):
    """ "refused" or "read" of a damaged file; any other exception fails the test by itself."""
    path.write_bytes(data)
    try:
        content = read_adapter(path)
    except FormatError as error:
        return "refused" if error.message and error.hint else "refused without a word"
    for name, shape in parameter_shapes(content.manifest.config).items():
        entry = content.parameters[name]
        assert entry.codes.shape == shape
        assert np.isfinite(entry.scales).all()
        assert np.abs(entry.codes.astype(np.int16)).max(initial=0) <= 127
    assert content.anchors.num_words == content.manifest.anchors.words
    return "read"


@pytest.mark.parametrize("part", range(6))
def test_flipped_bytes_are_refused_or_read(tmp_path, valid, featured, part):
    rng = random.Random(part)
    valid = featured if part >= 4 else valid
    header_end = 8 + struct.unpack("<Q", valid[:8])[0]
    found = []
    for _ in range(150):
        data = bytearray(valid)
        # Half of the damage goes into the header, which says how the rest is to be read.
        top = header_end if rng.random() < 0.5 else len(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(top)] = rng.randrange(256)
        found.append(outcome(tmp_path / "flipped", bytes(data)))
    assert {"refused", "read"} == set(found)


def test_random_cuts_inserts_and_swaps_are_refused(tmp_path, valid):
    rng = random.Random(9)
    for _ in range(100):
        first, second = sorted(rng.sample(range(len(valid)), 2))
        for data in (
            valid[:first],
            valid[:first] + valid[second:],
            valid[:second] + rng.randbytes(second - first) + valid[second:],
        ):
            assert outcome(tmp_path / "cut", data) == "refused"


def test_digits_of_the_header_replaced(tmp_path, valid):
    """Numbers in the header decide sizes and offsets: each is tried with other digits, without resizing the file."""
    end = 8 + struct.unpack("<Q", valid[:8])[0]
    places = [index for index in range(8, end) if chr(valid[index]).isdigit()]
    rng = random.Random(4)
    for index, digit in itertools.product(rng.sample(places, 60), b"07-"):
        outcome(tmp_path / "digits", valid[:index] + bytes([digit]) + valid[index + 1 :])
