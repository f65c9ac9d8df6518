"""Texts that the builtin hosts are trained on, paragraphs of a plain text file, and the tokenizers made from them.

An encyclopaedia contains hardly any opinions.  So that the hosts still learn opinion words, our own sentences of
praise and blame (`opinions.txt`, unlabelled; no subject is shared with the task `reviews`) are added several times,
words of some paragraphs are replaced by common words of the teacher's vocabulary, and short lists of such words are
added: the teacher's states provide their meaning.

Tokenizers are byte-level BPE, lower-case for encoders, cased for decoders.  Not WordPiece: its trainer breaks ties at
random, so the same command would not give the same host.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from uhl_cli.builtin.recipes import MAX_LENGTH, VOCAB_SIZE
from uhl_cli.errors import DataError
from uhl_cli.transfer.general import opinions

MAX_WORDS = 88
MIN_WORDS = 6
COMMON_WORDS = 12_000
EXCHANGED_TEXTS = 0.3
EXCHANGED_WORDS = 0.2
LISTS = 0.25
OPINION_COPIES = 6
# Repetitions of our own opinion sentences, so that most of their words become one token.
OPINION_WEIGHT = 30
_ENCODER = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_DECODER = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


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
    """The `COMMON_WORDS` first whole lower-case words of three letters or more in a WordPiece vocabulary.

    BERT's vocabularies are ordered by frequency, in books as well as in an encyclopaedia.
    """
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return [word for word, _ in by_id if re.fullmatch(r"[a-z]{3,}", word)][:COMMON_WORDS]


def build_corpus(paragraphs: list[str], words: list[str], *, seed: int) -> list[str]:
    """Chunks, some with replaced words, and lists of words; deterministic for an input and a seed."""
    rng = np.random.default_rng(seed)
    texts = chunks(paragraphs)
    exchanged = rng.random(len(texts)) < EXCHANGED_TEXTS
    for index in np.flatnonzero(exchanged):
        parts = texts[index].split()
        for place in np.flatnonzero(rng.random(len(parts)) < EXCHANGED_WORDS):
            parts[place] = words[rng.integers(len(words))]
        texts[index] = " ".join(parts)
    lists = int(LISTS * len(texts))
    texts += opinions() * OPINION_COPIES
    for _ in range(lists):
        texts.append(" ".join(words[index] for index in rng.integers(len(words), size=rng.integers(4, 16))))
    return texts


def train_tokenizer(
    kind: Literal["encoder", "decoder"], texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` pieces for the hosts of one kind; the same for the same input."""
    special = _ENCODER if kind == "encoder" else _DECODER
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "encoder":
        tokenizer.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *(opinions() * OPINION_WEIGHT)], trainer)
    single, pair = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if kind == "encoder" else ("<s> $A", "<s> $A $B")
    framing = [(name, tokenizer.token_to_id(name)) for name in special.values() if name in single]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=single, pair=pair, special_tokens=framing),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **special)
