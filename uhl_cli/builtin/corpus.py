"""Texts that the builtin hosts are trained on: paragraphs of a plain text file, some of them disturbed.

An encyclopaedia hardly praises or blames anything.  So that the hosts learn the words for it all the same, a
quarter of the texts have some words exchanged for words of the teacher's vocabulary, and a quarter of the
number of texts is added as short lists of such words: the teacher's states say what they mean.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from uhl_cli.errors import DataError

MAX_WORDS = 88
MIN_WORDS = 6
EXCHANGED_TEXTS = 0.25
EXCHANGED_WORDS = 0.2
LISTS = 0.25


def read_paragraphs(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, gzipped or not.

    :raises DataError: When it cannot be read or holds no text.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}.", "Give a UTF-8 text file, a paragraph a line.") from error
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no text.", "Give a UTF-8 text file, a paragraph a line.")
    return lines


def chunks(paragraphs: list[str]) -> list[str]:
    """Pieces of `MIN_WORDS` to about `MAX_WORDS` words, cut at sentence ends where there are any."""
    pieces: list[str] = []
    for paragraph in paragraphs:
        kept: list[str] = []
        for sentence in re.split(r"(?<=[.!?]) +", paragraph):
            words = sentence.split()
            for start in range(0, len(words), MAX_WORDS):
                part = words[start : start + MAX_WORDS]
                if len(kept) + len(part) > MAX_WORDS:
                    pieces.append(" ".join(kept))
                    kept = []
                kept += part
        pieces.append(" ".join(kept))
    return [piece for piece in pieces if len(piece.split()) >= MIN_WORDS]


def teacher_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Whole lower-case words of three letters or more in a WordPiece vocabulary, sorted."""
    return sorted(word for word in tokenizer.get_vocab() if re.fullmatch(r"[a-z]{3,}", word))


def build_corpus(paragraphs: list[str], words: list[str], *, seed: int) -> list[str]:
    """Chunks, a share of them with words exchanged, and lists of words; the same for the same input and seed."""
    rng = np.random.default_rng(seed)
    texts = chunks(paragraphs)
    exchanged = rng.random(len(texts)) < EXCHANGED_TEXTS
    for index in np.flatnonzero(exchanged):
        parts = texts[index].split()
        for place in np.flatnonzero(rng.random(len(parts)) < EXCHANGED_WORDS):
            parts[place] = words[rng.integers(len(words))]
        texts[index] = " ".join(parts)
    for _ in range(int(LISTS * len(texts))):
        texts.append(" ".join(words[index] for index in rng.integers(len(words), size=rng.integers(4, 16))))
    return texts
