"""The container of all four kinds of file: same content, same bytes, and no flipped bit goes unnoticed."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from file_damage import assert_flips_are_found, header_of
from safetensors import safe_open
from safetensors.numpy import save

from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.formats.container import (
    ADAPTER,
    CHECKPOINT,
    MAX_HEADER_BYTES,
    PORTED,
    TASK,
    Contents,
    Problems,
    digest_of,
    parse,
    read,
    read_record,
    to_bytes,
    write,
)
from uhl_cli.schema import Frozen

KINDS = (ADAPTER, TASK, PORTED, CHECKPOINT)


class Note(Frozen):
    """A record of the least kind."""

    format_version: str
    text: str = ""


TENSORS = {
    "z": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.b": np.arange(5, dtype=np.int8),
    "a": np.arange(3, dtype=np.uint8),
    "none": np.zeros((0, 4), dtype=np.float32),
    "scalar": np.full((), 2.5, dtype=np.float32),
}
TORCH = {
    "half": torch.arange(6, dtype=torch.float16).reshape(3, 2).T,
    "brain": torch.arange(3, dtype=torch.bfloat16),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
}


def note(kind=ADAPTER, text="Grüße \u0007 \"quoted\" 'x'"):
    return Note(format_version=kind.version, text=text)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "file.safetensors"


@pytest.fixture(scope="module")
def valid() -> bytes:
    return to_bytes(ADAPTER, note(), TENSORS)


def refused(path: Path, data: bytes, words: str = "", error: type[FormatError] = FormatError, kinds=(ADAPTER,)) -> None:
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        read(path, *kinds)
    assert re.search(words, caught.value.message)
    assert error is FormatError or type(caught.value) is error
    assert caught.value.hint
    assert str(caught.value).isprintable()
    assert str(path) in caught.value.message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.noun)
def test_what_is_written_is_read_back(kind, path):
    size = write(path, kind, note(kind), TENSORS | TORCH)
    contents = read(path, kind)
    assert (contents.file_bytes, contents.kind, contents.version) == (size, kind, kind.version)
    assert read_record(contents, Note, Problems(path)) == note(kind)
    for name, value in TENSORS.items():
        if name in TORCH:
            continue
        found = contents.tensors[name].numpy()
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(found, value)
    for name, value in TORCH.items():
        found = contents.tensors[name].torch()
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
    assert contents.digest == digest_of(kind, note(kind), TENSORS | TORCH)
    assert contents.header_bytes + sum(tensor.nbytes for tensor in contents.tensors.values()) == size
    with pytest.raises(FormatError, match="bfloat16"):
        contents.tensors["brain"].numpy()
    again = to_bytes(kind, contents.record, contents.tensors)
    assert again == path.read_bytes()


def test_numpy_and_torch_write_the_same_bytes():
    assert to_bytes(ADAPTER, note(), {name: torch.from_numpy(value) for name, value in TENSORS.items()}) == to_bytes(
        ADAPTER, note(), TENSORS
    )


def test_same_content_gives_the_same_bytes_and_other_content_another_digest(valid):
    assert to_bytes(ADAPTER, note(), dict(reversed(TENSORS.items()))) == valid
    first = digest_of(ADAPTER, note(), TENSORS)
    others = [
        digest_of(TASK, note(), TENSORS),
        digest_of(ADAPTER, note(text="other"), TENSORS),
        digest_of(ADAPTER, note(), TENSORS | {"a": TENSORS["a"][::-1]}),
        digest_of(ADAPTER, note(), TENSORS | {"a": TENSORS["a"].view(np.int8)}),
        digest_of(ADAPTER, note(), TENSORS | {"a": TENSORS["a"][None]}),
        digest_of(ADAPTER, note(), {name: TENSORS[name] for name in TENSORS if name != "none"}),
    ]
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("tensors", [TENSORS, {}], ids=["tensors", "none"])
def test_it_is_a_safetensors_file_laid_out_as_that_library_does(tensors, path):
    write(path, ADAPTER, note(), tensors)
    with safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["uhl"])["text"] == note().text
        assert set(file.keys()) == set(tensors)
        assert all(np.array_equal(file.get_tensor(name), value) for name, value in tensors.items())
    data, theirs = (
        path.read_bytes(),
        save(dict(tensors), metadata={"uhl": header_of(path.read_bytes())["__metadata__"]["uhl"]}),
    )
    ours = header_of(data)
    del ours["__metadata__"]["sha256"]
    assert list(ours) == list(header_of(theirs))
    assert ours == header_of(theirs)


def test_every_flipped_bit_is_found(path):
    """Of the other kinds, see their own tests."""
    write(path, PORTED, note(PORTED), TENSORS | TORCH)
    assert_flips_are_found(path, lambda: read(path, PORTED), error=FormatError)


def test_every_bit_of_a_small_file_is_guarded(path):
    data = to_bytes(ADAPTER, Note(format_version="2.0"), {"a": np.arange(3, dtype=np.uint8)})
    assert parse(bytearray(data), ADAPTER, problems=Problems(path))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            parse(damaged, ADAPTER, problems=Problems(path))


def test_other_bytes_are_refused(path, valid):
    for data in (b"", b"\0", b"\0" * 8, b"PK\x03\x04" + bytes(100), random.Random(0).randbytes(5000), valid[1:]):
        refused(path, data, "not a whole")
    refused(path, valid + b"\0")
    for share in (0.0, 0.001, 0.1, 0.4, 0.7, 0.99):
        refused(path, valid[: int(share * len(valid)) + 3])
    draw = random.Random(9)
    for _ in range(100):
        first, second = sorted(draw.sample(range(len(valid)), 2))
        for data in (
            valid[:first],
            valid[:first] + valid[second:],
            valid[:second] + draw.randbytes(second - first) + valid[second:],
        ):
            refused(path, data)


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**31, 2**62, 2**64 - 1])
def test_header_length_that_lies(path, valid, size):
    refused(path, struct.pack("<Q", size) + valid[8:], "not a whole")


def join(header: object, body: bytes) -> bytes:
    text = (
        header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    )
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def test_header_that_lies_about_its_tensors(path, valid):
    header, body = header_of(valid), valid[8 + struct.unpack("<Q", valid[:8])[0] :]

    def entry(**changes: object) -> dict[str, object]:
        return {**header, "a.b": {**header["a.b"], **changes}}

    def metadata(content: object) -> dict[str, object]:
        return {**header, "__metadata__": content}

    start, end = header["a.b"]["data_offsets"]
    given = header["__metadata__"]
    lies = [
        entry(data_offsets=[start, end + 1]),
        entry(data_offsets=[end, start]),
        entry(data_offsets=[0, 2**62]),
        entry(data_offsets=[-1, end]),
        entry(data_offsets=[start]),
        entry(data_offsets="all"),
        entry(shape=[2**40, 2**40]),
        entry(shape=[1, -5]),
        entry(shape=[4]),
        entry(shape=[6]),
        entry(shape=[5.0]),
        entry(shape=[True, 5]),
        entry(shape=[1] * 100),
        entry(shape={}),
        entry(shape="5"),
        entry(shape=None),
        entry(dtype="U8"),
        entry(dtype="BOOL"),
        entry(dtype="F8_E4M3"),
        entry(dtype="I4"),
        entry(dtype="nonsense"),
        entry(dtype=["I8"]),
        entry(dtype=None),
        entry(more=1),
        {**header, "a.b": header["a"]},
        {**header, "a.b": "a"},
        {**header, "extra": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
        {name: header[name] for name in reversed(header)},
        metadata({"uhl": 1}),
        metadata(["uhl"]),
        metadata(None),
        metadata({**given, "more": "x"}),
        metadata({"uhl": given["uhl"]}),
        metadata({**given, "sha256": ""}),
        metadata({**given, "sha256": None}),
        metadata({**given, "sha256": "0" * 64}),
        metadata({"sha256": given["sha256"]}),
        metadata({**given, "uhl": "[]"}),
        metadata({**given, "uhl": "\\ud800"}),
        {},
        [],
        b"{",
        b"\xff\xff",
        b"[" * 5000,
        b'{"a":' * 5000,
        b'{"__metadata__":{"uhl":"\\ud800","sha256":""}}',
        {name: value for name, value in header.items() if name != "__metadata__"},
    ]
    assert join(header, body) == valid  # the control: the same header, written anew, is the file
    for lie in lies:
        refused(path, join(lie, body))
    refused(path, join(json.dumps(header).encode(), body), "uhl.s layout")


def test_records_that_are_none(path):
    for text in (
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
        '{"format_version": "2.0", "x": ' + "9" * 10_000 + "}",
        "{'format_version': '2.0'}",
        '{"format_version": "2"}',
        '{"format_version": "-2.0"}',
        '{"format_version": "2.0\\n"}',
        '{"format_version": "٢.٠"}',
        '{"format_version": 2.0}',
        '{"format_version": ["2.0"]}',
        "\ud800",
    ):
        try:
            data = to_bytes(ADAPTER, text, TENSORS)
        except UnicodeEncodeError:
            continue
        refused(path, data, "record")
    refused(path, to_bytes(ADAPTER, "x" * MAX_HEADER_BYTES, {}), "header does not fit")


def problems_of(contents: Contents, path: Path) -> list[str]:
    problems = Problems(path, collect=True)
    assert read_record(contents, Note, problems) is None or problems.found
    return problems.found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "", "format_version": "2.0"}', "not written as"),
        ('{"format_version":"2.0"}', "not written as"),
        ('{"format_version": "2.0"} ', "not written as"),
        ('{"format_version": "2.0", "format_version": "2.0"}', "not written as"),
        ('{"format_version": "2.0", "text": 1}', "at text"),
        ('{"format_version": "2.0", "more": 1}', "at more"),
        ('{"config": {"kind": "regression"}, "format_version": "2.0"}', "regression, which is reserved"),
        ('{"format_version": "2.0", "task": {"kind": "multi-label"}}', "multi-label, which is reserved"),
    ],
)
def test_records_that_break_a_rule(text, words, path):
    path.write_bytes(to_bytes(ADAPTER, text, {}))
    contents = read(path, ADAPTER)
    with pytest.raises(FormatError, match=words) as caught:
        read_record(contents, Note, Problems(path))
    assert caught.value.message == f"{path}: {problems_of(contents, path)[0]}."
    assert isinstance(caught.value, NewerFormatError) == ("reserved" in words)


@pytest.mark.parametrize(
    ("kind", "version", "words", "error"),
    [
        (ADAPTER, "3.0", "reads up to 2.0", NewerFormatError),
        (ADAPTER, "10.3", "reads up to 2.0", NewerFormatError),
        (ADAPTER, "1.0", "no longer reads", FormatError),
        (ADAPTER, "0.9", "no longer reads", FormatError),
        (TASK, "3.0", "reads up to", NewerFormatError),
        (TASK, "1.0", "no longer reads", FormatError),
        (PORTED, "8.0", "reads up to", NewerFormatError),
        (PORTED, "6.1", "no longer reads", FormatError),
        (CHECKPOINT, "2.0", "reads up to", NewerFormatError),
    ],
)
def test_one_rule_of_versions(kind, version, words, error, path):
    text = json.dumps({"all": "else may differ", "format_version": version})
    # Whether it has a digest or not: another version may guard its files otherwise.
    for data in (to_bytes(kind, text, {}), save({}, metadata={kind.key: text})):
        refused(path, data, words, error, (kind,))


def test_a_newer_minor_version_is_read_as_far_as_it_is_known(path):
    path.write_bytes(to_bytes(ADAPTER, '{"format_version": "2.7", "text": "x"}', {}))
    contents = read(path, ADAPTER)
    assert (contents.version, read_record(contents, Note, Problems(path))) == (
        "2.7",
        Note(format_version="2.7", text="x"),
    )
    path.write_bytes(to_bytes(ADAPTER, '{"format_version": "2.7", "news": "x"}', {}))
    with pytest.raises(NewerFormatError, match=r"format 2.7 goes beyond 2.0.*at news"):
        read_record(read(path, ADAPTER), Note, Problems(path))


def test_files_of_another_kind_are_named(path):
    for kind in KINDS:
        for other in KINDS:
            if kind is not other:
                refused(
                    path,
                    to_bytes(other, note(other), {}),
                    f"not a uhl {kind.noun} but a uhl {other.noun}",
                    kinds=(kind,),
                )
        refused(path, save(dict(TENSORS)), f"not a uhl {kind.noun}", kinds=(kind,))
        refused(path, save(dict(TENSORS), metadata={"format": "pt"}), f"not a uhl {kind.noun}", kinds=(kind,))
    path.write_bytes(to_bytes(TASK, note(TASK), {}))
    assert read(path, ADAPTER, TASK).kind is TASK


def test_missing_file_and_folder(tmp_path):
    for path, words in ((tmp_path / "none", "there is no file"), (tmp_path, "is a folder")):
        with pytest.raises(FormatError, match=words) as caught:
            read(path, ADAPTER)
        assert caught.value.hint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    program = "import sys, pathlib; from uhl_cli.formats.container import *; read(pathlib.Path(sys.argv[1]), ADAPTER)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path / "pipe")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert "is not a regular file" in done.stderr


def test_file_that_may_not_be_read(path, valid):
    path.write_bytes(valid)
    path.chmod(0)
    if os.access(path, os.R_OK):
        assert read(path, ADAPTER)  # permissions do not bind root
        return
    with pytest.raises(FormatError, match="cannot read") as caught:
        read(path, ADAPTER)
    assert caught.value.hint


def test_file_that_is_far_too_large(path):
    with path.open("wb") as file:
        file.truncate(ADAPTER.max_bytes + 1)
    with pytest.raises(FormatError, match="no adapter is larger"):
        read(path, ADAPTER)


def test_collected_problems_are_those_that_are_raised(path, valid):
    """Each rule is written once: what reading raises is the first of what collecting finds."""
    damaged = valid[:-1] + bytes([valid[-1] ^ 1])
    path.write_bytes(damaged)
    problems = Problems(path, collect=True)
    contents = read(path, ADAPTER, problems=problems)
    assert contents.tensors.keys() == TENSORS.keys()  # and it goes on
    assert len(problems.found) == 1
    refused(path, damaged, problems.found[0])


def test_numbers_and_types_of_the_header_replaced(path, valid):
    """Each decides sizes and offsets; none is trusted, whatever it is replaced by."""
    end = 8 + struct.unpack("<Q", valid[:8])[0]
    places = [index for index in range(8, end) if chr(valid[index]).isdigit()]
    for index in random.Random(4).sample(places, 60):
        for digit in b"07-":
            if valid[index] != digit:
                refused(path, valid[:index] + bytes([digit]) + valid[index + 1 :])


def test_reading_and_writing_arrays_needs_no_torch(path, valid):
    path.write_bytes(valid)
    program = (
        "import sys; from pathlib import Path; from uhl_cli.formats.container import *\n"
        f"contents = read(Path({str(path)!r}), ADAPTER)\n"
        "arrays = {name: tensor.numpy() for name, tensor in contents.tensors.items()}\n"
        f"assert to_bytes(ADAPTER, contents.record, arrays) == Path({str(path)!r}).read_bytes()\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'imported'\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
