"""Mutations of the files that uhl reads: blind ones of bytes, structured ones of JSON, of tensors, of packed parts.

Every mutant of a uhl file is resealed: its checksum is computed again, so that the readers' rules are what is tested,
and not the checksum.  All draws come from the `Random` that is given, so a case is its seed.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from file_damage import header_of, record_of
from safetensors.numpy import load, save

from uhl_cli.align.texts import AnchorTexts
from uhl_cli.codes.packing import compress_text, pack_levels, squeeze
from uhl_cli.formats.container import Kind, to_bytes

_DIGEST = b'"sha256":"'
_DTYPES = ("int64", "float64", "float32", "int32", "float16", "int16", "int8", "uint8")
_TEXTS = (
    "",
    " ",
    "\x00",
    "\n",
    "2.0",
    "9.9",
    "0" * 64,
    "f" * 64,
    "../../x",
    "a" * 20_000,
    "\u202e\u200b\ufeff",
    "\U0001f600" * 300,
    "sequence",
    "tokens",
    "low-rank",
    "regression",
)
_INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 4, 7, 16, 255, 1000, 1024, 10_000, 50_000_000, 2**31, 2**63, 10**12, 10**30)
_FLOATS = (float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 1e-30, 0.5, 1e9, 1e38, 1e308)
_SINGLES = (*_FLOATS, 100.0, 1e4, -100.0, 3e38)


@dataclass(frozen=True)
class Seed:
    """A sound file of one kind, taken apart once: a case changes a copy of the parts."""

    kind: Kind
    data: bytes
    record: str
    tensors: dict[str, np.ndarray]
    sealed: bool = True

    @classmethod
    def of(cls, kind: Kind, data: bytes, *, sealed: bool = True) -> Seed:
        """The parts of a file that uhl wrote.

        :param sealed: Whether its format has a checksum.
        """
        return cls(kind, data, json.dumps(record_of(data)), load(data), sealed)


def mutant(seed: Seed, draw: Random) -> bytes:
    """The seed changed by one to three mutations of one way, with the right checksum."""
    way = draw.choices((_of_bytes, _of_header, _of_content), (15, 10, 75))[0]
    return way(seed, draw)


def resealed(data: bytes) -> bytes:
    """The same file with the checksum of its bytes; unchanged where it has no place for one."""
    place = data.find(_DIGEST)
    if place < 0 or len(data) < place + len(_DIGEST) + 64:
        return data
    start = place + len(_DIGEST)
    zeros = data[:start] + b"0" * 64 + data[start + 64 :]
    return data[:start] + hashlib.sha256(zeros).hexdigest().encode() + data[start + 64 :]


def blind(data: bytes, draw: Random, *, start: int = 0) -> bytes:
    """Bits flipped, bytes set, cut, inserted, repeated or moved at random places from `start`."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(start, len(found)), len(found) + 1)
        some = draw.choice((1, 1, 2, 4, 8, 64))
        what = draw.randrange(7)
        if what == 0 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif what == 1:
            found[place : place + some] = bytes([draw.choice((0, 1, 127, 128, 255))]) * some
        elif what == 2:
            found[place : place + some] = draw.randbytes(some)
        elif what == 3:
            found[place:place] = draw.randbytes(some)
        elif what == 4:
            del found[place : place + some]
        elif what == 5:
            other = draw.randrange(len(found) + 1)
            found[place : place + some] = found[other : other + some]
        elif draw.random() < 0.2:
            del found[place:]
    return bytes(found)


def _of_bytes(seed: Seed, draw: Random) -> bytes:
    length = int.from_bytes(seed.data[:8], "little")
    data = blind(seed.data, draw, start=draw.choice((0, 8, 8 + length, 8 + length)))
    if draw.random() < 0.1:
        data = draw.choice((0, 1, 2, length - 8, length + 8, 2**20, 2**63)).to_bytes(8, "little") + data[8:]
    return resealed(data)


def _of_header(seed: Seed, draw: Random) -> bytes:
    """Dtypes, shapes, offsets and names of the safetensors header; the tensors' bytes stay."""
    header, start = header_of(seed.data), 8 + int.from_bytes(seed.data[:8], "little")
    body = seed.data[start:]
    for name in draw.sample(list(header), draw.randint(1, 2)):
        if name not in header:  # the change before took it away
            continue
        entry = header[name]
        what = draw.randrange(5)
        if what == 0 and isinstance(entry, dict) and name in seed.tensors:
            entry["shape"] = draw.choice(
                ([], [0], [1] * 9, [2**62, 4], [-1], [True], "7", None, [3, 5], [*seed.tensors[name].shape, 1])
            )
        elif what == 1 and isinstance(entry, dict):
            entry["dtype"] = draw.choice(("F16", "BF16", "F32", "I8", "U8", "I64", "F8_E4M3", "BOOL", 3, None))
        elif what == 2 and isinstance(entry, dict):
            entry["data_offsets"] = draw.choice(([0, 0], [0, 2**63], [-8, 8], [8, 0], [], None))
        elif what == 3:
            header[draw.choice(("x", "", "a" * 1000, "\u202e", "anchors.codes", "lora.up.x"))] = header.pop(name)
        else:
            changed_json(header, draw)
    text = to_text(header, draw, canonical=draw.random() < 0.8).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return resealed(len(text).to_bytes(8, "little") + text + body)


def _of_content(seed: Seed, draw: Random) -> bytes:
    """A sound container around a record or tensors that were changed."""
    record, tensors = json.loads(seed.record), dict(seed.tensors)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        what = draw.choices((0, 1, 2), (45, 40, 15))[0]
        if what == 0:
            changed_json(record, draw)
        elif what == 1:
            _change_tensor(tensors, draw)
        else:
            _change_packed(record, tensors, draw)
    text = to_text(record, draw, canonical=draw.random() < 0.95)
    try:
        if not seed.sealed:
            return save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, {seed.kind.key: text})
        return to_bytes(seed.kind, text, tensors)
    except (UnicodeEncodeError, KeyError):  # a name or a type that no container can hold
        return seed.data


def to_text(content: object, draw: Random, *, canonical: bool) -> str:
    """JSON as uhl writes it; otherwise with a key twice, a deep nesting, or other white space."""
    if canonical:
        try:
            return json.dumps(content, sort_keys=True, ensure_ascii=False)
        except TypeError:  # keys of two types
            return json.dumps(content, ensure_ascii=False)
    text = json.dumps(content)
    place = draw.choice([index for index, letter in enumerate(text) if letter in ":,{["] or [0])
    depth = draw.choice((10, 100, 300, 500, 900, 950, 990, 1000, 3000, 100_000))
    some = draw.choice(
        (
            "[" * depth + "]" * depth + ",",
            '{"a":' * depth + "1" + "}" * depth + ",",
            '"format_version":"2.0",',
            " \n\t",
            "1" * 5000 + ",",
            "1e999,",
            "-NaN,",
            '"\\ud800",',
            "\ufeff",
        )
    )
    return text[: place + 1] + some + text[place + 1 :]


def changed_json(content: Any, draw: Random) -> None:
    """Change one value of nested JSON in place: another value, deleted, renamed, repeated, or one more."""
    places: list[tuple[Any, Any]] = []

    def collect(part: Any) -> None:
        keys = part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        for key in keys:
            places.append((part, key))
            collect(part[key])

    collect(content)
    if not places:
        return
    part, key = draw.choice(places)
    what = draw.randrange(10)
    if what < 6:
        part[key] = _other(part[key], draw)
    elif what == 6:
        del part[key]
    elif what == 7 and isinstance(part, dict):
        part[draw.choice(("x", "", "kind", "required", "format_version", "\u202e"))] = part.pop(key)
    elif what == 8 and isinstance(part, list):
        part[key:key] = [part[key]] * draw.choice((1, 1, 2, 1000))
    else:
        other, name = draw.choice(places)
        part[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None


def _other(value: Any, draw: Random) -> Any:
    """A value of the same type at its extremes; one time in four of another type."""
    if draw.random() < 0.25:
        choices: tuple[Any, ...] = (
            None,
            True,
            False,
            [],
            {},
            "",
            "1",
            0,
            1,
            1.5,
            float("nan"),
            [[]],
            {"a": 1},
            _deep(200),
        )
        return draw.choice(choices)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, 2 * value, -value, draw.choice(_INTEGERS), draw.choice(_INTEGERS)))
    if isinstance(value, float):
        return draw.choice((-value, value * 1e6, draw.choice(_FLOATS)))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1], value.upper(), value * 50, draw.choice(_TEXTS)))
    if isinstance(value, list):
        return draw.choice(([], value[:-1], value[::-1], value + value, value * draw.choice((3, 2000)), [value]))
    if isinstance(value, dict):
        return draw.choice(({}, None, [], {**value, "x": 1}, {str(index): index for index in range(3000)}))
    return draw.choice((0, "x", {}))


def _deep(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def _change_tensor(tensors: dict[str, np.ndarray], draw: Random) -> None:
    """Change one tensor: its values, its shape, its type, its name, or its being there."""
    if not tensors:
        return
    name = draw.choice(list(tensors))
    array = tensors[name]
    what = draw.choices(range(8), (40, 15, 15, 8, 6, 4, 6, 6))[0]
    if what == 0 and array.size:
        tensors[name] = _other_values(array, draw)
    elif what == 1 and array.size:
        raw = bytearray(array.tobytes())
        for _ in range(draw.randint(1, 8)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        tensors[name] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    elif what == 2 and array.size:
        tensors[name] = np.full_like(array, draw.choice((0, 1, 127, array.reshape(-1)[0])))
    elif what == 3:
        tensors[name] = draw.choice(_reshaped(array))
    elif what == 4:
        with np.errstate(all="ignore"):
            tensors[name] = array.astype(draw.choice(_DTYPES))
    elif what == 5:
        del tensors[name]
    elif what == 6:
        new = draw.choice(("x", "x.y", "features.mean", "transfer.texts", "lora.up.x", "threshold", "a" * 300))
        tensors[new] = array if draw.random() < 0.5 else tensors.pop(name)
    else:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _reshaped(array: np.ndarray) -> tuple[np.ndarray, ...]:
    """Other shapes of the values, or fewer of them."""
    flat = np.atleast_1d(array)
    return (array.reshape(-1), array[None], flat[:0], flat[:-1], array.T, flat[::-1])


def _other_values(array: np.ndarray, draw: Random) -> np.ndarray:
    """The array with some, a row or all of its values at extremes."""
    found = array.copy()
    flat = found.reshape(-1)
    if array.dtype.kind == "f":
        value = draw.choice(_SINGLES)
    elif (
        array.itemsize == 1 and array.ndim == 2 and array.shape[1] > 8 and draw.random() < 0.5
    ):  # a packed table's tail
        value = draw.choice(_SINGLES)
        with np.errstate(all="ignore"):
            found[draw.randrange(len(found)), draw.choice((slice(-8, -4), slice(-4, None)))] = np.frombuffer(
                np.float32(value).tobytes(), np.uint8
            ).view(array.dtype)
        return found
    else:
        bounds = np.iinfo(array.dtype)
        value = draw.choice((bounds.min, bounds.max, 0, 1, draw.randrange(int(bounds.min), int(bounds.max) + 1)))
    with np.errstate(all="ignore"):
        if draw.random() < 0.5:
            flat[draw.randrange(flat.size)] = value
        elif draw.random() < 0.5 and found.ndim > 1:
            found[draw.randrange(len(found))] = value
        else:
            flat[:] = value
    return found


def _dict_in(record: dict[str, Any], key: str) -> dict[str, Any]:
    """What a record has there, or nothing: an earlier mutation may have replaced it."""
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _change_packed(record: dict[str, Any], tensors: dict[str, np.ndarray], draw: Random) -> None:
    """Change what is inside a compressed part, and pack it again, with its digest; or put a bomb in its place."""
    packed = [name for name in tensors if name.rpartition(".")[2] in ("texts", "codes", "outputs", "words")]
    if not packed:
        return
    name = draw.choice(packed)
    if draw.random() < 0.25:
        tensors[name] = np.frombuffer(draw.choice(_bombs()), np.uint8)
        return
    pack = {"texts": _packed_texts, "codes": _packed_codes, "outputs": _packed_outputs}.get(name.rpartition(".")[2])
    if pack is not None:
        pack(name, record, tensors, draw)
    else:
        tensors[name] = np.frombuffer(draw.randbytes(tensors[name].size), np.uint8)


_TINY_TEXTS: tuple[Callable[[str, Random], str], ...] = (
    lambda text, draw: text.replace("\n", "\x00", 1),
    lambda text, draw: text[: draw.randrange(len(text) + 1)],
    lambda text, draw: text.replace(" ", "\u2028"),
    lambda text, draw: text.replace("a", draw.choice(("\u0301", "\U0001f600", "\ud55c", "\u202e", "[SEP]", "\x00"))),
    lambda text, draw: text.replace(" ", ""),
    lambda text, draw: "\n" * draw.choice((1, 100, 50_000)),
    lambda text, draw: "x" * draw.choice((1, 2000, 100_000)),
    lambda text, draw: "a " * draw.choice((1, 2000, 100_000)),
    lambda text, draw: text + "\n" + text,
    lambda text, draw: "".join(draw.sample(text, len(text))),
)


_LONGEST_TEXT = 1_000_000


def _packed_texts(name: str, record: dict[str, Any], tensors: dict[str, np.ndarray], draw: Random) -> None:
    """Other texts, with numbers and digest of the record to match."""
    part = name.partition(".")[0]
    raw = tensors[name].tobytes()
    try:
        text = (bz2.decompress(raw) if part == "transfer" else zlib.decompress(raw)).decode()
    except (OSError, ValueError, EOFError, zlib.error):  # an earlier mutation has damaged it
        return
    if len(text) > _LONGEST_TEXT:  # a bomb that an earlier mutation put there
        return
    text = draw.choice(_TINY_TEXTS)(text, draw)
    tensors[name] = squeeze(text.encode()) if part == "transfer" else compress_text(text)
    own = record.get(part) if part == "anchors" else _dict_in(record, "parts").get(part)
    if not isinstance(own, dict) or draw.random() < 0.2:
        return
    lines = text.split("\n")
    own["texts"] = len(lines) // (2 if own.get("pairs") is True else 1)
    if part == "transfer":
        content = text + f"\0{own.get('spans')}\0{_dict_in(record, 'config').get('kind') == 'tokens'}"
        own["digest"] = hashlib.sha256(content.encode()).hexdigest()
        return
    from uhl_cli.align.texts import count_words

    counts = [count_words(line) for line in lines]
    if sum(counts) > 300_000:
        return
    mask = np.zeros(sum(counts), bool)
    number = own.get("words")
    mask[: number if isinstance(number, int) and number >= 0 else 0] = True
    tensors[f"{part}.words"] = np.packbits(mask)
    chosen, start = [], 0
    for count in counts:
        chosen.append(tuple(np.flatnonzero(mask[start : start + count]).tolist()))
        start += count
    own["digest"] = AnchorTexts(tuple(lines), tuple(chosen), "").digest


def _packed_codes(name: str, record: dict[str, Any], tensors: dict[str, np.ndarray], draw: Random) -> None:
    """Other codes of the coordinates or the features: all zero, all at the bound, or random; sometimes too many."""
    config, part = record.get("config"), name.partition(".")[0]
    own = record.get(part) if part == "anchors" else _dict_in(record, "parts").get(part)
    try:
        columns = len(config["knots"]) * config["canonical_size"]
        columns = columns if part == "anchors" else config["readout_size"] + config["num_labels"]
        count = own["words"] * columns + draw.choice((0, 0, 0, 0, 1, -1))
        if type(count) is not int or not 0 <= count < 100_000:
            return
    except (TypeError, KeyError):
        return
    largest = draw.choice((0, 1, 7, 7))
    codes = np.random.default_rng(draw.randrange(2**32)).integers(-largest, largest, count, np.int8, endpoint=True)
    if draw.random() < 0.3:
        codes[:] = largest
    tensors[name] = pack_levels(codes)


def _packed_outputs(name: str, record: dict[str, Any], tensors: dict[str, np.ndarray], draw: Random) -> None:
    """Other outputs of the teacher: one class, random ones, or codes beyond the bound."""
    try:
        raw = np.frombuffer(bz2.decompress(tensors[name].tobytes()), np.uint8).copy()
    except (OSError, ValueError, EOFError):
        return
    raw[:] = draw.choice((1, 8, 15, 0, 255))
    if draw.random() < 0.3:
        raw = np.frombuffer(draw.randbytes(raw.size + draw.choice((0, 1))), np.uint8) % 15 + 1
    tensors[name] = squeeze(raw.tobytes())


_BOMBS: list[bytes] = []


def _bombs() -> list[bytes]:
    """A few kilobytes or less that unpack to 50 MB, by each of the formats in use."""
    if not _BOMBS:
        zeros = bytes(50_000_000)
        raw = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        _BOMBS.extend((zlib.compress(zeros, 9), bz2.compress(zeros), b"\x07" + raw.compress(zeros) + raw.flush()))
        _BOMBS.extend((b"", b"\x00", zlib.compress(b""), bz2.compress(b"")))
    return _BOMBS
