"""Half bytes and texts: what goes in comes out, and nothing else does."""

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from uhl_cli.adapter.packing import (
    compress_text,
    decompress_text,
    pack_nibbles,
    pack_pairs,
    unpack_nibbles,
    unpack_pairs,
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
@given(arrays(np.int8, array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=7), elements=st.integers(0, 3)))
def test_pairs_come_back(values):
    codes = (2 * values - 3).astype(np.int8)
    packed = pack_pairs(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == ((codes.size + 3) // 4,)
    again = unpack_pairs(packed, codes.shape, name="x")
    assert again.dtype == np.int8
    np.testing.assert_array_equal(again, codes)


def test_first_pair_stands_in_the_lowest_bits():
    assert pack_pairs(np.array([-1, 3, -3, 1, 3], dtype=np.int8)).tolist() == [1 + 3 * 4 + 2 * 64, 3]


@pytest.mark.parametrize(
    ("packed", "shape"), [([0] * 2, (4,)), ([], (1,)), ([0], (0,)), ([[0, 0]], (8,)), ([0b00010000], (2,)), ([4], (1,))]
)
def test_wrong_pairs_are_refused(packed, shape):
    with pytest.raises(FormatError, match="some part") as caught:
        unpack_pairs(np.array(packed, dtype=np.uint8), shape, name="some part")
    assert caught.value.hint


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
