"""Checked parts of an adapter file: tensors of a known type, scales, and texts with the words chosen in them.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from uhl_cli.adapter.packing import compress_text, decompress_text
from uhl_cli.align.texts import AnchorTexts, word_spans
from uhl_cli.errors import FormatError
from uhl_cli.schema import AnchorRecord, FeatureRecord

MAX_TEXT_BYTES = 4_000_000
MAX_VALUE = 1e6
_HINT = "The file is damaged or was not written by uhl; get it again from its source."

Floats = npt.NDArray[np.float32]


def of_type(name: str, value: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """The tensor itself.

    :raises FormatError: When it has another type.
    """
    if value.dtype != dtype:
        raise FormatError(f"{name} is {value.dtype}; it must be {np.dtype(dtype)}.", _HINT)
    return value


def finite_scales(name: str, value: np.ndarray, shape: tuple[int, ...]) -> Floats:
    """The scales themselves.

    :raises FormatError: When their shape or a value breaks the format.
    """
    scales: Floats = of_type(name, value, np.float32)
    if scales.shape != shape:
        raise FormatError(f"{name} has shape {scales.shape}; it must be {shape}.", _HINT)
    if not np.isfinite(scales).all() or float(scales.min(initial=0)) < 0 or float(scales.max(initial=0)) > MAX_VALUE:
        raise FormatError(f"{name} holds a value that is not finite, negative or absurdly large.", _HINT)
    return scales


def text_tensors(part: str, anchors: AnchorTexts) -> dict[str, np.ndarray]:
    """The tensors `part.texts` and `part.words`."""
    texts = compress_text("\n".join(anchors.texts))
    return {f"{part}.texts": texts, f"{part}.words": np.packbits(_word_mask(anchors))}


def read_texts(
    part: str, record: AnchorRecord | FeatureRecord, origin: str, tensors: Mapping[str, np.ndarray]
) -> AnchorTexts:
    """The texts of a part and the words chosen in them.

    :raises FormatError: When they cannot be read or differ from their record.
    """
    packed = of_type(f"{part}.texts", tensors[f"{part}.texts"], np.uint8)
    texts = tuple(decompress_text(packed, limit=MAX_TEXT_BYTES, name=f"{part}.texts").split("\n"))
    counts = [len(word_spans(text)) for text in texts]
    bits = of_type(f"{part}.words", tensors[f"{part}.words"], np.uint8)
    if bits.ndim != 1 or len(bits) != (sum(counts) + 7) // 8:
        raise FormatError(f"{part}.words does not fit the {part}' texts.", _HINT)
    mask = np.unpackbits(bits, count=sum(counts)).astype(np.bool_)
    chosen, start = [], 0
    for count in counts:
        chosen.append(tuple(int(ordinal) for ordinal in np.flatnonzero(mask[start : start + count])))
        start += count
    anchors = AnchorTexts(texts, tuple(chosen), origin)
    if len(texts) != record.texts or anchors.num_words != record.words or anchors.digest != record.digest:
        raise FormatError(f"the {part}' texts differ from what the manifest says of them.", _HINT)
    return anchors


def _word_mask(anchors: AnchorTexts) -> npt.NDArray[np.bool_]:
    """bool [words of all texts]: True at anchor words."""
    parts = []
    for text, ordinals in zip(anchors.texts, anchors.chosen, strict=True):
        mask = np.zeros(len(word_spans(text)), dtype=np.bool_)
        mask[list(ordinals)] = True
        parts.append(mask)
    return np.concatenate(parts)
