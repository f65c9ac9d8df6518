"""Which texts go into a file's transfer set, the teacher's outputs for them, and how many fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from uhl_cli.align.texts import read_texts
from uhl_cli.codes.packing import squeeze
from uhl_cli.commands.options import PretrainOptions
from uhl_cli.commands.texts import ships_with_uhl
from uhl_cli.data import Examples, TaskData
from uhl_cli.errors import BudgetError, DataError, UsageError
from uhl_cli.formats.transfer import MAX_TEXT_BYTES, StoredTransfer, transfer_tensors
from uhl_cli.metrics import Score
from uhl_cli.ported.model import Progress
from uhl_cli.schema import AdapterConfig, GeneralRecord, TransferRecord
from uhl_cli.transfer.general import record_of, transfer_texts
from uhl_cli.transfer.texts import (
    TransferTexts,
    count_examples,
    quantised_log_odds,
    single_lines,
    without_contained,
)

# Spans per text, besides the whole text: a span only costs its outputs (figures: tests/benchmarks/README.md).
SPANS = 5
# Fewer texts are not worth their bytes.
MIN_TEXTS = 32
# Longer texts are cut: a target reads no more of them, and two texts teach more than a long one.
MAX_WORDS = 64
MAX_TEXTS = 50_000
# Estimated bytes of a prediction's outputs; the exact number is only known after training.
_BYTES_PER_OUTPUT = {"sequence": 0.45, "tokens": 0.12}
# Maximum size of the feature bank.
FEATURE_BYTES = 330_000
# Names and the record in the manifest.
_OVERHEAD_BYTES = 1500


class Teacher(Protocol):
    """A model that gives logits of the classes."""

    def logits_of(
        self,
        examples: Examples,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Logits float32 [predictions, labels] of every example, in order."""


def transfer_room(room: int, options: PretrainOptions) -> int:
    """The transfer set's share of the bytes `room` that the anchors leave free; the feature bank gets the rest."""
    if options.transfer_set == "0":
        return 0
    reserved = 0 if options.feature_words == 0 else min(FEATURE_BYTES, room // 2)
    return max(room - reserved, 0)


@dataclass(frozen=True)
class Wanted:
    """Texts for a transfer set, best first, and where they come from."""

    texts: TransferTexts
    general: GeneralRecord | None
    user_texts: bool


def wanted_texts(data: TaskData, options: PretrainOptions, config: AdapterConfig, *, room: int) -> Wanted | None:
    """As many texts as are asked for and may fit; None if none are wanted.

    :param room: Bytes that the transfer set may take.
    :raises UsageError: When `--transfer-set` names neither a number nor a file.
    :raises DataError: When the file holds no text, or the package's own texts are asked for and the task is on pairs.
    :raises BudgetError: When texts were asked for and there is no room.
    """
    choice = options.transfer_set
    asked = choice != "auto"
    if choice == "auto" and options.anchors is not None:
        choice = "general" if options.anchors == "general" and data.task.pair_column is None else options.anchors
    if choice == "0" or (choice == "general" and not asked and data.task.pair_column is not None):
        return None
    limit, general, origin = MAX_TEXTS, None, f"training texts of {data.task.name}"
    assert data.train is not None  # pretrain has checked it
    words, pairs = data.task.kind == "tokens", None
    if choice == "general":
        if data.task.pair_column is not None:
            raise DataError(
                f"{data.task.name} is on pairs of texts, and the package has none.", "Use --transfer-set 0."
            )
        general = record_of(data.train.texts)
        texts, origin = transfer_texts(general), "general"
    elif choice == "auto" or choice.isdecimal():
        limit = int(choice) if choice.isdecimal() else MAX_TEXTS
        texts = single_lines(data.train.texts)
        if data.train.pairs is not None:
            pairs = single_lines(data.train.pairs)
    else:
        path = Path(choice)
        if not path.is_file():
            raise UsageError(
                f"--transfer-set {choice}: there is no such file.", "Give a number, general, 0, or a file of texts."
            )
        texts, origin = single_lines(read_texts(path, encoding=options.data.encoding)), f"file {path.name}"
    if general is None:
        texts, pairs = _chosen(texts, pairs, words=words, seed=options.training.seed)
    spans = 0 if words else SPANS
    found = TransferTexts(tuple(texts), None if pairs is None else tuple(pairs), spans, words, origin)
    fitting = _fitting(found.first(limit), config, room=room, in_file=general is None)
    if fitting is None:
        if asked:
            raise BudgetError(
                f"{max(room, 0):,} bytes are too few for a transfer set.",
                "Raise --max-bytes, or use fewer --num-anchors.",
            )
        return None
    theirs = general is None and not (ships_with_uhl(options) and origin.startswith("training"))
    return Wanted(fitting, general, theirs)


def _chosen(texts: list[str], pairs: list[str] | None, *, words: bool, seed: int) -> tuple[list[str], list[str] | None]:
    """Distinct texts in random order, without those that a longer one contains: its spans replace them."""
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    if pairs is not None:
        both = {(texts[index], cut_text(pairs[index])): None for index in order if texts[index] and pairs[index]}
        return [first for first, _ in both], [second for _, second in both]
    cut = list(dict.fromkeys(text if words else cut_text(text) for text in (texts[index] for index in order) if text))
    return [cut[index] for index in without_contained(cut)], None


def cut_text(text: str) -> str:
    """The text as a transfer set of a sequence task holds it: its first words."""
    return " ".join(text.split(" ")[:MAX_WORDS])


def _fitting(texts: TransferTexts, config: AdapterConfig, *, room: int, in_file: bool) -> TransferTexts | None:
    """The first texts, as many as may take at most `room` bytes."""

    def bytes_of(count: int) -> float:
        some = texts.first(count)
        _, predictions = count_examples(some)
        outputs = predictions * (config.num_labels - 1) * _BYTES_PER_OUTPUT[config.kind]
        joined = "\n".join((*some.texts, *(some.pairs or ()))).encode() if in_file else b""
        if len(joined) > MAX_TEXT_BYTES:
            return float("inf")
        return _OVERHEAD_BYTES + outputs + len(squeeze(joined))

    low, high = 0, min(len(texts), MAX_TEXTS)
    while low < high:  # the size grows with every text
        middle = (low + high + 1) // 2
        if bytes_of(middle) <= room:
            low = middle
        else:
            high = middle - 1
    return texts.first(low) if low >= min(MIN_TEXTS, len(texts)) and low else None


def make_transfer_set(
    wanted: Wanted,
    teacher: Teacher,
    name: str,
    score: Score | None,
    *,
    room: int,
    batch_size: int,
    max_length: int | None,
    progress: Progress | None = None,
) -> StoredTransfer:
    """The transfer set of texts with the teacher's outputs, cut to at most `room` bytes."""
    texts = wanted.texts
    logits = teacher.logits_of(texts.examples(), batch_size=batch_size, max_length=max_length, progress=progress)
    codes = quantised_log_odds(torch.cat(logits).numpy())
    stored = _stored(wanted, codes, name, score)
    while (
        sum(tensor.nbytes for tensor in transfer_tensors(stored).values()) > room - _OVERHEAD_BYTES and len(texts) > 1
    ):
        texts = texts.first(int(0.97 * len(texts)))
        wanted = replace(wanted, texts=texts)
        stored = _stored(wanted, codes[: count_examples(texts)[1]], name, score)
    return stored


def _stored(wanted: Wanted, codes: np.ndarray, name: str, score: Score | None) -> StoredTransfer:
    texts = wanted.texts
    examples, predictions = count_examples(texts)
    record = TransferRecord(
        origin=texts.origin[:200],
        texts=len(texts),
        user_texts=len(texts) if wanted.user_texts else 0,
        pairs=texts.pairs is not None,
        spans=texts.spans,
        examples=examples,
        predictions=predictions,
        digest=texts.digest,
        general=wanted.general,
        teacher=name[:500],
        teacher_score=score,
    )
    return StoredTransfer(record, codes, None if wanted.general else texts, words=texts.words)
