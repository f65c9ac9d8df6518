"""Which texts go into an adapter file: anchor words and, if there is room, texts for a feature bank."""

from __future__ import annotations

from pathlib import Path

from uhl_cli.align.texts import (
    AnchorTexts,
    choose_anchors,
    choose_feature_texts,
    general_texts,
    in_style_of,
    read_texts,
)
from uhl_cli.codes.packing import compress_text
from uhl_cli.commands.options import PretrainOptions
from uhl_cli.data import TaskData, load_task
from uhl_cli.data.tasks import TASKS
from uhl_cli.errors import BudgetError, DataError
from uhl_cli.schema import AdapterConfig
from uhl_cli.transfer.general import opinions

# With so few words, a map to the features is no better than the one through the canonical bank's 2,048 words.
MIN_WORDS = 2048
# Names, scales and means of the parts, the manifest's record of them, and the score that is written last.
OVERHEAD_BYTES = 3000
# Bits of a code, known only after training: the least that was measured, and a safe estimate.
_FEWEST_BITS = 1.2
_MANY_BITS = 2.0
# Words that define canonical space on the source.
FRAME_WORDS = 2048
# More words do not improve a readout (figures: tests/benchmarks/README.md).
FEATURE_WORDS = 22_000


def feature_texts(data: TaskData, options: PretrainOptions, anchors: AnchorTexts) -> AnchorTexts | None:
    """Texts for the feature bank, from the same source as the anchors' but different; None if there are none."""
    texts, origin = _texts(data, options)
    if options.anchors == "general":
        reviews = load_task("reviews", need_evaluation=False).train
        assert reviews is not None  # it ships with the package
        texts += _like_the_tasks([*opinions(), *reviews.texts], data)
    return choose_feature_texts(
        texts,
        exclude=set(anchors.texts),
        num_words=options.feature_words or FEATURE_WORDS,
        seed=options.training.seed,
        origin=origin,
    )


def anchor_texts(data: TaskData, options: PretrainOptions) -> AnchorTexts:
    """Words that define canonical space, spread over texts of the task, of this package, or of the user's file.

    They are more than the file holds: aligning a target needs fewer words than defining the space.
    """
    texts, origin = _texts(data, options)
    return choose_anchors(
        texts, num_words=max(FRAME_WORDS, options.num_anchors), seed=options.training.seed, origin=origin
    )


def ships_with_uhl(options: PretrainOptions) -> bool:
    """Whether the training texts are this package's own, so that no text of the user is involved."""
    row = TASKS.get(options.data.task or "")
    return row is not None and row.folder is not None and options.data.data is None


def _texts(data: TaskData, options: PretrainOptions) -> tuple[list[str], str]:
    """Anchor texts and their origin: the task's training texts by default, the package's own, or a file's."""
    if options.anchors is None:
        assert data.train is not None  # pretrain has checked it
        return [*data.train.texts, *(data.train.pairs or ())], f"training texts of {data.task.name}"
    if options.anchors == "general":
        return _like_the_tasks(general_texts(), data), "general"
    path = Path(options.anchors)
    return read_texts(path, encoding=options.data.encoding), f"file {path.name}"


def _like_the_tasks(texts: list[str], data: TaskData) -> list[str]:
    assert data.train is not None  # pretrain has checked it
    return in_style_of(texts, data.train.texts)


def more_texts(
    data: TaskData, options: PretrainOptions, anchors: AnchorTexts, config: AdapterConfig, *, room: int
) -> AnchorTexts | None:
    """Texts for a feature bank that fit in the remaining bytes.

    :raises DataError: When a bank was asked for and there is too little text.
    :raises BudgetError: When a bank was asked for and there is too little room.
    """
    if options.feature_words == 0 or config.strategy != "anchors":
        return None
    try:
        return texts_that_fit(feature_texts(data, options, anchors), config, room=room)
    except (DataError, BudgetError):
        if options.feature_words is not None:
            raise
        return None


def texts_that_fit(texts: AnchorTexts | None, config: AdapterConfig, *, room: int) -> AnchorTexts:
    """As many texts as may fit in the file with their features; `feature_bank` keeps those that do.

    :param room: Bytes of the limit that the file's other parts leave free.
    :raises DataError: When the texts hold fewer than `MIN_WORDS` words.
    :raises BudgetError: When they do not fit.
    """
    if texts is None or texts.num_words < MIN_WORDS:
        raise DataError(
            f"besides the anchors there are only {0 if texts is None else texts.num_words} words of text for a feature "
            f"bank; at least {MIN_WORDS} are needed.",
            "Leave out --feature-words, or give more text with --anchors.",
        )
    columns, room = config.readout_size + config.num_labels, room - OVERHEAD_BYTES
    surely = _fitting(texts, columns * _MANY_BITS, room)
    if surely is None or surely.num_words < MIN_WORDS:
        raise BudgetError(
            f"the anchors leave {max(room, 0):,} bytes of the limit, too few for a feature bank.",
            "Raise --max-bytes, use fewer --num-anchors, or leave out --feature-words.",
        )
    return _fitting(texts, columns * _FEWEST_BITS, room) or surely


def _fitting(texts: AnchorTexts, bits_per_word: float, room: int) -> AnchorTexts | None:
    """The first texts, as many as take at most `room` bytes in a file."""
    low, high = 0, len(texts.texts)
    while low < high:  # the size grows with every text
        middle = (low + high + 1) // 2
        some = texts.first(middle)
        if some.num_words * bits_per_word / 8 + text_bytes(some) <= room:
            low = middle
        else:
            high = middle - 1
    return texts.first(low) if low else None


def text_bytes(texts: AnchorTexts) -> int:
    return sum(texts.counts()) // 8 + 1 + len(compress_text("\n".join(texts.texts)))
