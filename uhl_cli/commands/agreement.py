"""How far a model agrees with the transfer set's teacher on held-out texts, and what accuracy that promises.

No label is used.  `uhl port` judges a port by it, `uhl tune` and `uhl export` report it before and after training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from uhl_cli.commands.scoring import Classes, references_of
from uhl_cli.data import Examples
from uhl_cli.data.tasks import Task
from uhl_cli.errors import DataError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import takes_in
from uhl_cli.metrics import Score, score
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import AgreementReport, ExpectedScore, Reporter, Verdict, phase
from uhl_cli.schema import Manifest
from uhl_cli.transfer.texts import TransferSet

Shares = npt.NDArray[np.float64]

# Texts of the transfer set that are held out to measure agreement with the teacher.
HELD_OUT, MOST_HELD_OUT = 0.05, 500
# A port is judged on at most so many of them, because judging must cost little beside the port; with fewer than
# `LEAST_JUDGED` an interval over texts means nothing.
MOST_JUDGED, LEAST_JUDGED = 100, 10
# A port that agrees with the teacher on this share of its answers is good enough.
GOOD = 0.9
# Expected accuracy = chance + (teacher - chance) kappa^EXPONENT, and half the width of its 95 % interval.  Made by
#     python tests/benchmarks/agreement.py FILE adapters/*.safetensors --shared SHARED \
#         --output tests/benchmarks/results/agreement.json
# where FILE is that of `uhl compare --config upwards-minilm-l3`.
EXPONENT, RESIDUAL = 0.67, 0.059


@dataclass(frozen=True)
class PartedTransfer:
    """A transfer set, parted into texts to learn from and held-out texts, each with all its spans.

    :param examples: All texts and spans, with the teacher's classes.
    :param owners: The number of the text that each example is from; -1 for those that the host cannot read.
    :param held_texts: The numbers of the held-out texts.
    """

    examples: Examples
    owners: tuple[int, ...]
    held_texts: frozenset[int]

    @property
    def fitted_rows(self) -> list[int]:
        """The examples to learn from."""
        return [row for row, owner in enumerate(self.owners) if owner >= 0 and owner not in self.held_texts]

    @property
    def held_rows(self) -> list[int]:
        """The held-out examples."""
        return [row for row, owner in enumerate(self.owners) if owner in self.held_texts]

    @property
    def unread(self) -> int:
        """How many examples the host cannot read."""
        return self.owners.count(-1)


def parted(transfer: TransferSet, host: Host | None = None) -> PartedTransfer:
    """Hold out a part of a transfer set's texts: always the same ones for the same host.

    :param host: Examples without any token that its tokenizer knows are in neither part.
    :raises DataError: When there are fewer than two texts that the host can read.
    """
    examples = transfer.examples()
    known = [True] * len(examples) if host is None else takes_in(host, examples.texts, examples.pairs)
    owners = [owner if taken else -1 for owner, taken in zip(transfer.texts.owners(), known, strict=True)]
    return PartedTransfer(examples, tuple(owners), frozenset(_held_out(set(owners) - {-1}, host)))


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples with the teacher's classes, and the number of the text that each is from."""

    examples: Examples
    owners: tuple[int, ...]


def judges(transfer: TransferSet, host: Host) -> HeldOut:
    """`MOST_JUDGED` of the texts that `parted` holds out, with their spans; all of them if there are no more.

    Only what is needed is read by the host's tokenizer, so it takes a fraction of the time of `parted`.

    :raises DataError: When fewer than `LEAST_JUDGED` are held out, or the host can read fewer than two texts.
    """
    examples, owners = transfer.examples(), transfer.texts.owners()

    def readable(rows: Sequence[int]) -> list[int]:
        some = examples.select(rows)
        return [row for row, taken in zip(rows, takes_in(host, some.texts, some.pairs), strict=True) if taken]

    whole = readable([row for row, owner in enumerate(owners) if row == 0 or owners[row - 1] != owner])
    texts = {owners[row] for row in whole}
    # A span of a text that cannot be read as a whole may still be readable, and then counts.
    rest = [row for row, owner in enumerate(owners) if owner not in texts]
    texts |= {owners[row] for row in readable(rest)} if rest else set()
    chosen = set(_held_out(texts, host)[:MOST_JUDGED])
    if len(chosen) < LEAST_JUDGED:
        raise DataError(
            f"of the transfer set's {len(texts):,} texts {len(chosen)} are held out, and {LEAST_JUDGED} are needed.",
            "Score the port on labelled data with --data.",
        )
    rows = readable([row for row, owner in enumerate(owners) if owner in chosen])
    return HeldOut(examples.select(rows), tuple(owners[row] for row in rows))


def _held_out(readable: set[int], host: Host | None) -> list[int]:
    """The held-out ones of the texts that the host can read, in random order."""
    texts = sorted(readable)
    if host is not None and not texts:
        raise DataError(
            f"the tokenizer of {host.name} knows no token of the transfer set's texts.",
            "Give labels with --task or --data, or choose a target that was trained on texts of this language.",
        )
    if len(texts) < 2:
        raise DataError("there is a single text in the transfer set.", "Give labels with --task or --data.")
    number = min(MOST_HELD_OUT, max(1, int(HELD_OUT * len(texts))))
    return [texts[place] for place in np.random.default_rng(0).permutation(len(texts))[:number]]


def agreement_of(task: Task, classes: Classes, held: Examples) -> Score:
    """The task's metric of predicted classes against the teacher's most probable ones.

    :raises DataError: When there are no examples, or classes of other ones.
    """
    return score(task.metric, classes, references_of(held), task.labels)


def shares_of(classes: Classes, num_labels: int) -> Shares:
    """The share of each class among all answers, float64 [labels]."""
    answers = _by_text(classes, [0] * len(classes))[0]
    return np.bincount(answers, minlength=num_labels) / len(answers)


def beyond_chance(agreement: float, chance: float) -> float:
    """Kappa (Cohen, 1960): 1 where all answers agree, 0 where no more than by chance, and where chance is certain."""
    return 0.0 if chance >= 1 else (agreement - chance) / (1 - chance)


def expected_accuracy(kappa: float, *, chance: float, teacher: float, exponent: float = EXPONENT) -> float:
    """Accuracy on the task to expect: the teacher's at a kappa of 1, that of chance at 0 and below."""
    return float(chance + (teacher - chance) * max(kappa, 0.0) ** exponent)


def judged(manifest: Manifest, classes: Classes, held: HeldOut) -> AgreementReport:
    """Judge predictions for held-out examples.

    Intervals are over texts, since the answers on a text and its spans are related.

    :raises DataError: When there are no examples, or classes of other ones.
    """
    task, references = manifest.task, references_of(held.examples)
    same = score("accuracy", _by_text(classes, held.owners), _by_text(references, held.owners), task.labels)
    found = same if task.metric == "accuracy" else agreement_of(task, classes, held.examples)
    answers, taught = (shares_of(each, len(task.labels)) for each in (classes, references))
    by_chance = float(answers @ taught)
    kappa, low, high = (beyond_chance(value, by_chance) for value in (same.value, same.low, same.high))
    transfer = manifest.parts.transfer
    teacher = None if transfer is None else transfer.teacher_score
    expected, verdict = None, _verdict(found.value, useless=low <= 0)
    if task.kind == "sequence" and teacher is not None and teacher.metric == "accuracy":
        labels = np.array(manifest.label_counts) / sum(manifest.label_counts)
        chance = float(answers @ labels)
        middle, lowest, highest = (
            expected_accuracy(each, chance=chance, teacher=teacher.value) for each in (kappa, low, high)
        )
        expected = ExpectedScore(
            value=middle,
            low=max(0.0, middle - math.hypot(middle - lowest, RESIDUAL)),
            high=min(1.0, middle + math.hypot(highest - middle, RESIDUAL)),
            chance=chance,
            constant=float(labels.max()),
            teacher=teacher.value,
        )
        # A teacher that leads a constant answer by less than the residual would fail by the residual alone, however
        # well a port agrees with it.
        floor = expected.low if teacher.value - RESIDUAL > expected.constant else lowest
        verdict = _verdict(found.value, useless=floor <= expected.constant)
        if teacher.low <= expected.constant:
            verdict = "pretrain"
    return AgreementReport(
        score=found,
        texts=len(set(held.owners)),
        kappa=kappa,
        expected=expected,
        verdict=verdict,
    )


def _verdict(agreement: float, *, useless: bool) -> Verdict:
    if useless:
        return "unusable"
    return "good" if agreement >= GOOD else "tune"


def judge(
    manifest: Manifest,
    transfer: TransferSet,
    ported: PortedModel,
    *,
    batch_size: int,
    reporter: Reporter,
) -> AgreementReport:
    """Judge a port by `MOST_JUDGED` held-out texts of the transfer set at most.

    :raises DataError: As `judges` does.
    """
    held = judges(transfer, ported.host)
    found = ported.classes_of(held.examples, batch_size=batch_size, progress=phase(reporter, "held-out texts"))
    return judged(manifest, found.for_metric(ported.task.kind), held)


def _by_text(classes: Classes, owners: Sequence[int]) -> list[list[int]]:
    """The classes of all examples of each text, in one list a text."""
    found: dict[int, list[int]] = {}
    rows: Sequence[int | list[int]] = classes
    for owner, row in zip(owners, rows, strict=True):
        found.setdefault(owner, []).extend(row if isinstance(row, list) else [row])
    return list(found.values())
