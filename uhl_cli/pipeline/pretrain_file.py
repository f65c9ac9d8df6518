"""What an adapter file says of its own making, and whether it holds its limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.adapter.packing import pack_levels
from uhl_cli.adapter.store import FORMAT_VERSION, AdapterFile, to_bytes
from uhl_cli.align.bank import AnchorBank
from uhl_cli.data import TaskData
from uhl_cli.errors import BudgetError
from uhl_cli.host.checkpoint import Host
from uhl_cli.pipeline.common import host_record, versions
from uhl_cli.pipeline.options import PretrainOptions
from uhl_cli.schema import AnchorRecord, Manifest, TrainingRecord


def manifest_of(
    host: Host,
    companions: Sequence[Host],
    data: TaskData,
    options: PretrainOptions,
    adapter: CanonicalAdapter,
    bank: AnchorBank,
    steps: int,
) -> Manifest:
    """Everything that is known before training; the score comes last."""
    assert data.train is not None  # pretrain has checked it
    return Manifest(
        format_version=FORMAT_VERSION,
        config=adapter.config,
        task=data.task,
        label_counts=data.train.label_counts(len(data.task.labels)),
        source=host_record(host),
        companions=tuple(host_record(each) for each in companions),
        training=TrainingRecord(
            command=options.command(),
            config=options.training,
            steps=steps,
            train_examples=len(data.train),
            train_digest=data.train.digest(),
            data=data.source[:1000],
        ),
        anchors=AnchorRecord(
            origin=bank.anchors.origin,
            texts=len(bank.anchors.texts),
            words=bank.anchors.num_words,
            digest=bank.anchors.digest,
        ),
        versions=versions(),
        licence=options.licence,
    )


def refuse_too_large(content: AdapterFile, max_bytes: int) -> int:
    """The file's size in bytes.

    :raises BudgetError: When that is more than the limit, with a number of anchors that would fit.
    """
    size = len(to_bytes(content))
    if size > max_bytes:
        per_anchor = len(pack_levels(content.coordinates.codes)) / content.manifest.anchors.words
        # Other anchors bring other texts, whose size is not known before; a few anchors less make room for them.
        fitting = math.floor(0.97 * (content.manifest.anchors.words - (size - max_bytes) / per_anchor))
        hint = f"Use --num-anchors {fitting}." if fitting >= 32 else "Raise --max-bytes."
        raise BudgetError(f"the adapter file would hold {size:,} bytes; the limit is {max_bytes:,}.", hint)
    return size
