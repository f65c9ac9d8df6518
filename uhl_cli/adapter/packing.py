"""Packing of small integer codes into bytes, and bounded unpacking.  Free of torch."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from uhl_cli.errors import FormatError

Codes = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]

_HINT = "The file is damaged or was not written by uhl; get it again from its source."


def pack_nibbles(codes: Codes) -> Bytes:
    """Codes within -7..7, flattened, two a byte, the first in the low half; uint8 [ceil(n / 2)]."""
    flat = np.full(codes.size + codes.size % 2, 8, dtype=np.uint8)
    flat[: codes.size] = codes.reshape(-1).astype(np.int16) + 8
    packed: Bytes = np.bitwise_or(flat[0::2], np.left_shift(flat[1::2], 4), dtype=np.uint8)
    return packed


def unpack_nibbles(packed: Bytes, shape: tuple[int, ...], *, name: str) -> Codes:
    """Codes int8 of the given shape.

    :raises FormatError: When the length does not fit the shape, or a code is outside -7..7.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if packed.ndim != 1 or len(packed) != (count + 1) // 2:
        raise FormatError(f"{name} holds {packed.size} bytes; {(count + 1) // 2} are needed for {shape}.", _HINT)
    flat = np.empty(2 * len(packed), dtype=np.int8)
    flat[0::2] = (packed & 15).astype(np.int8) - 8
    flat[1::2] = (packed >> 4).astype(np.int8) - 8
    if count % 2 and flat[-1] != 0:
        raise FormatError(f"{name} has a half byte behind its end.", _HINT)
    flat = flat[:count]
    if count and int(flat.min()) < -7:
        raise FormatError(f"{name} has a code outside -7..7.", _HINT)
    return flat.reshape(shape)


def pack_pairs(codes: Codes) -> Bytes:
    """Codes -3, -1, 1 or 3, flattened, four a byte, the first in the lowest bits; uint8 [ceil(n / 4)]."""
    flat = np.zeros(-(-codes.size // 4) * 4, dtype=np.uint8)
    flat[: codes.size] = (codes.reshape(-1) + 3) // 2
    quarters = [np.left_shift(flat[place::4], 2 * place) for place in range(4)]
    packed: Bytes = np.bitwise_or.reduce(quarters)
    return packed


def unpack_pairs(packed: Bytes, shape: tuple[int, ...], *, name: str) -> Codes:
    """Codes int8 of the given shape.

    :raises FormatError: When the length does not fit the shape, or bits are set behind the end.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if packed.ndim != 1 or len(packed) != (count + 3) // 4:
        raise FormatError(f"{name} holds {packed.size} bytes; {(count + 3) // 4} are needed for {shape}.", _HINT)
    flat = np.empty(4 * len(packed), dtype=np.int8)
    for place in range(4):
        flat[place::4] = (packed >> (2 * place)) & 3
    if flat[count:].any():
        raise FormatError(f"{name} has bits behind its end.", _HINT)
    codes: Codes = (2 * flat[:count] - 3).reshape(shape)
    return codes


def compress_text(text: str) -> Bytes:
    """UTF-8 bytes, compressed by zlib at its best level."""
    return np.frombuffer(zlib.compress(text.encode(), 9), dtype=np.uint8)


def decompress_text(packed: Bytes, *, limit: int, name: str) -> str:
    """The text that was compressed; never holds more than `limit` bytes of it.

    :raises FormatError: When it is damaged, longer than `limit` bytes, or not UTF-8.
    """
    decoder = zlib.decompressobj()
    try:
        content = decoder.decompress(packed.tobytes(), limit)
        if decoder.unconsumed_tail or not decoder.eof or decoder.unused_data:
            raise FormatError(f"{name} is longer than {limit} bytes or cut off.", _HINT)
        return content.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise FormatError(f"{name} cannot be decompressed.", _HINT) from error
