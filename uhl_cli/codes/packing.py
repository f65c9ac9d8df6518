"""Packing of small integer codes into bytes, and bounded unpacking.  Does not import torch."""

from __future__ import annotations

import bz2
import math
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from uhl_cli.errors import FormatError

Codes = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]

# Largest magnitude of a code that is stored entropy-coded.
MAX_LEVEL = 7
_BLOCK = 65_536
_HINT = "The file is damaged or was not written by uhl; get it again from its source."


def pack_nibbles(codes: Codes) -> Bytes:
    """Pack codes within -7..7, flattened, two per byte, the first in the low half; uint8 [ceil(n / 2)]."""
    flat = np.full(codes.size + codes.size % 2, 8, dtype=np.uint8)
    flat[: codes.size] = codes.reshape(-1).astype(np.int16) + 8
    packed: Bytes = np.bitwise_or(flat[0::2], np.left_shift(flat[1::2], 4), dtype=np.uint8)
    return packed


def unpack_nibbles(packed: Bytes, shape: tuple[int, ...], *, name: str) -> Codes:
    """Codes int8 of the given shape.

    :raises FormatError: When the length does not fit the shape, or a code is outside -7..7.
    """
    count = math.prod(shape)
    if packed.ndim != 1 or len(packed) != (count + 1) // 2:
        raise FormatError(f"{name} holds {packed.size} bytes; {(count + 1) // 2} are needed for {shape}.", _HINT)
    flat = np.empty(2 * len(packed), dtype=np.int8)
    np.bitwise_and(packed, 15, out=flat[0::2], casting="unsafe")
    np.right_shift(packed, 4, out=flat[1::2], casting="unsafe")
    flat -= 8
    if count % 2 and flat[-1] != 0:
        raise FormatError(f"{name} has half a byte after its end.", _HINT)
    flat = flat[:count]
    if count and int(flat.min()) < -7:
        raise FormatError(f"{name} has a code outside -7..7.", _HINT)
    return flat.reshape(shape)


def pack_levels(codes: Codes) -> Bytes:
    """Entropy-code codes within -7..7: their size in the file is close to their entropy.

    The first byte is the largest magnitude K.  Codes plus K are digits of base 2 K + 1, as many per byte as fit, the
    first one least significant.  The bytes follow as raw deflate with Huffman codes only (RFC 1951).
    """
    largest = int(np.abs(codes).max(initial=0))
    base = 2 * largest + 1
    group = _digits_in_byte(base)
    flat = np.full(-(-codes.size // group) * group, largest, dtype=np.uint8)
    flat[: codes.size] = codes.reshape(-1) + np.int8(largest)
    # The digits of a byte give a value below 256.
    joined = flat.reshape(-1, group) @ (base ** np.arange(group)).astype(np.uint8)
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    packed = bytes([largest]) + coder.compress(joined.tobytes()) + coder.flush()
    return np.frombuffer(packed, dtype=np.uint8)


def unpack_levels(packed: Bytes, shape: tuple[int, ...], *, name: str) -> Codes:
    """Codes int8 of the given shape, unpacked block by block: needs memory for the codes and one block.

    :raises FormatError: When `packed` is damaged or does not fit the shape, or a code is outside -7..7.
    """
    if packed.ndim != 1 or not len(packed) or int(packed[0]) > MAX_LEVEL:
        raise FormatError(f"{name} does not begin with the largest of its codes.", _HINT)
    largest = int(packed[0])
    base = 2 * largest + 1
    group = _digits_in_byte(base)
    count = math.prod(shape)
    codes: Codes = np.empty((-(-count // group), group), dtype=np.int8)
    # Row b: the codes in byte b.
    table = (np.arange(base**group)[:, None] // base ** np.arange(group) % base - largest).astype(np.int8)
    done = 0
    for block in _inflated(packed[1:], len(codes), name):
        joined = np.frombuffer(block, dtype=np.uint8)
        if int(joined.max()) >= len(table):
            raise FormatError(f"{name} does not fit {shape}.", _HINT)
        codes[done : done + len(joined)] = table[joined]
        done += len(joined)
    flat = codes.reshape(-1)
    if done != len(codes):
        raise FormatError(f"{name} does not fit {shape}.", _HINT)
    if flat[count:].any():
        raise FormatError(f"{name} has codes after its end.", _HINT)
    return flat[:count].reshape(shape)


def _digits_in_byte(base: int) -> int:
    """How many digits a byte holds: 8 of base 1 (all zero), 5 of base 3, 3 of base 5, 2 of base 7 to 15."""
    count = 1
    while count < 8 and base ** (count + 1) <= 256:
        count += 1
    return count


def _inflated(packed: Bytes, limit: int, name: str) -> Iterator[bytes]:
    """At most `limit` bytes of raw deflate, in blocks.

    :raises FormatError: When it is damaged, truncated, longer, or followed by other bytes.
    """
    decoder, done = zlib.decompressobj(-zlib.MAX_WBITS), 0
    for start in range(0, len(packed), _BLOCK):
        left, block = packed[start : start + _BLOCK].tobytes(), b""
        # After a full block, the decoder may still hold output of the input so far.
        while (left or len(block) == _BLOCK) and not decoder.eof:
            try:
                block = decoder.decompress(left, _BLOCK)
            except zlib.error as error:
                raise FormatError(f"{name} cannot be decompressed.", _HINT) from error
            left, done = decoder.unconsumed_tail, done + len(block)
            if done > limit:
                raise FormatError(f"{name} holds more than {limit:,} bytes.", _HINT)
            if block:
                yield block
        if decoder.eof and (decoder.unused_data or start + _BLOCK < len(packed)):
            raise FormatError(f"{name} is followed by other bytes.", _HINT)
    if not decoder.eof:
        raise FormatError(f"{name} is truncated.", _HINT)


def compress_text(text: str) -> Bytes:
    """UTF-8 bytes, compressed by zlib at its best level."""
    return np.frombuffer(zlib.compress(text.encode(), 9), dtype=np.uint8)


def decompress_text(packed: Bytes, *, limit: int, name: str) -> str:
    """The text that was compressed; needs memory for at most `limit` bytes.

    :raises FormatError: When it is damaged, longer than `limit` bytes, or not UTF-8.
    """
    decoder = zlib.decompressobj()
    try:
        content = decoder.decompress(packed.tobytes(), limit)
        if decoder.unconsumed_tail or not decoder.eof or decoder.unused_data:
            raise FormatError(f"{name} is longer than {limit} bytes or truncated.", _HINT)
        return content.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise FormatError(f"{name} cannot be decompressed.", _HINT) from error


def squeeze(content: bytes) -> Bytes:
    """Bytes compressed by bzip2: for texts the smallest of the safe formats (tests/benchmarks/README.md)."""
    return np.frombuffer(bz2.compress(content, 9), dtype=np.uint8)


def unsqueeze(packed: Bytes, *, limit: int, name: str) -> bytes:
    """The bytes that were compressed; needs memory for at most `limit` bytes, plus some 4 MB.

    :raises FormatError: When they are damaged, longer than `limit`, truncated or followed by other bytes.
    """
    decoder = bz2.BZ2Decompressor()
    try:
        content = decoder.decompress(packed.tobytes(), limit + 1)
    except (OSError, ValueError) as error:
        raise FormatError(f"{name} cannot be decompressed.", _HINT) from error
    if len(content) > limit:
        raise FormatError(f"{name} holds more than {limit:,} bytes.", _HINT)
    if not decoder.eof or decoder.unused_data:
        raise FormatError(f"{name} is truncated or followed by other bytes.", _HINT)
    return content
