"""Half bytes and texts: what goes in comes out, and nothing else does."""

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from uhl_cli.codes.packing import (
    compress_text,
    decompress_text,
    pack_levels,
    pack_nibbles,
    unpack_levels,
    unpack_nibbles,
)
from uhl_cli.errors import FormatError

CODES = arrays(np.int8, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7), elements=st.integers(-7, 7))


@settings(max_examples=150, deadline=None)
@given(CODES)
def test_nibbles_come_back(codes):
    packed = pack_nibbles(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == ((codes.size + 1) // 2,)
    again = unpack_nibbles(packed, codes.shape, name="x")
    assert again.dtype == np.int8
    np.testing.assert_array_equal(again, codes)


def test_first_code_stands_in_the_low_half():
    assert pack_nibbles(np.array([-7, 7, 0], dtype=np.int8)).tolist() == [1 + 15 * 16, 8 + 8 * 16]


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        ([0x88] * 3, (2, 4)),
        ([0x88] * 5, (2, 4)),
        ([], (1,)),
        ([0x88], (0,)),
        ([[0x88, 0x88]], (4,)),
        ([0x98], (1,)),  # the half byte behind the end is 1, not 0
        ([0x08], (2,)),  # code -8 in the high half
        ([0x80], (2,)),  # and in the low half
        ([0x80], (1,)),
    ],
)
def test_wrong_nibbles_are_refused(packed, shape):
    with pytest.raises(FormatError, match="some part") as caught:
        unpack_nibbles(np.array(packed, dtype=np.uint8), shape, name="some part")
    assert caught.value.hint


@settings(max_examples=150, deadline=None)
@given(CODES, st.integers(0, 7))
def test_levels_come_back(codes, largest):
    codes = codes.clip(-largest, largest)
    packed = pack_levels(codes)
    assert packed.dtype == np.uint8
    assert packed[0] == np.abs(codes).max(initial=0)
    again = unpack_levels(packed, codes.shape, name="x")
    assert again.dtype == np.int8
    np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize(("step", "largest"), [(0.4, 7), (0.75, 7), (1.0, 4), (1.5, 3), (2.0, 2), (2.0, 1)])
def test_levels_take_little_more_than_they_tell(step, largest):
    values = np.random.default_rng(0).normal(size=200_000)
    codes = np.round(values / step).clip(-largest, largest).astype(np.int8)
    shares = np.bincount(codes + largest) / codes.size
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    assert entropy < 8 * len(pack_levels(codes)) / codes.size < 1.03 * entropy + 0.01


def test_first_level_is_the_least_digit():
    packed = pack_levels(np.array([1, -2, 2, 0], dtype=np.int8))
    assert packed[0] == 2
    # Three digits of base 5 a byte, 2 added to each; behind the end stand zeros.
    assert list(zlib.decompress(packed[1:].tobytes(), -15)) == [3 + 0 * 5 + 4 * 25, 2 + 2 * 5 + 2 * 25]


def coded(*joined, largest=1):
    """Levels as they are stored, of the given joined digits."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return [largest, *coder.compress(bytes(joined)), *coder.flush()]


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        ([], (1,)),
        ([1], (5,)),
        ([8, *coded(0)[1:]], (2,)),  # codes beyond 7
        ([255, *coded(0)[1:]], (2,)),
        (coded(0), (6,)),
        (coded(0, 0), (5,)),
        (coded(0), (0,)),
        (coded(243), (5,)),  # no five digits of base 3
        (coded(121 - 81), (4,)),  # the digit behind the end is 0, which stands for -1
        (coded(0)[:-1], (5,)),
        ([*coded(0), 0], (5,)),
        ([1, 255, 255, 255], (5,)),
        ([coded(0)], (5,)),
    ],
)
def test_wrong_levels_are_refused(packed, shape):
    with pytest.raises(FormatError, match="some part") as caught:
        unpack_levels(np.array(packed, dtype=np.uint8), shape, name="some part")
    assert caught.value.hint


def test_levels_that_would_blow_up_are_never_held():
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = np.array([1, *coder.compress(bytes(50_000_000)), *coder.flush()], dtype=np.uint8)
    tracemalloc.start()
    with pytest.raises(FormatError):
        unpack_levels(bomb, (100,), name="x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=200))
def test_texts_come_back(text):
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return
    assert decompress_text(compress_text(text), limit=max(size, 1) + 1, name="x") == text


def test_text_longer_than_the_limit_is_refused():
    packed = compress_text("a" * 1000)
    assert decompress_text(packed, limit=1001, name="x") == "a" * 1000
    with pytest.raises(FormatError):
        decompress_text(packed, limit=999, name="x")


@pytest.mark.parametrize("size", [1, 15, 16, 255, 256, 1000, 65536])
def test_limit_itself_is_allowed(size):
    text = "".join(chr(97 + (7 * index * index) % 26) for index in range(size))
    assert decompress_text(compress_text(text), limit=size, name="x") == text


def test_a_bomb_is_refused_within_the_limit():
    limit = 1_000_000
    bomb = np.frombuffer(zlib.compress(bytes(100 * limit), 9), dtype=np.uint8)
    assert len(bomb) < limit // 5
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="texts is longer than") as caught:
            decompress_text(bomb, limit=limit, name="texts")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * limit
    assert caught.value.hint


def test_damaged_texts_are_refused():
    packed = compress_text("some text, long enough to be cut " * 20)
    flipped = packed.copy()
    flipped[-2] ^= 1  # in the checksum
    for bad in (
        packed[:-1],
        packed[:5],
        packed[:0],
        np.append(packed, np.uint8(0)),
        np.concatenate([packed, packed]),
        flipped,
        np.frombuffer(b"no zlib at all", dtype=np.uint8),
        np.frombuffer(zlib.compress(b"\xff\xfe"), dtype=np.uint8),
    ):
        with pytest.raises(FormatError) as caught:
            decompress_text(bad, limit=10_000, name="x")
        assert caught.value.hint
