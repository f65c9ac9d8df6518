"""Calibrates a ported adapter by its transfer set, in closed form: class offsets, and how strongly the updates act.

On another host the updates arrive in part, and what arrives pushes all texts towards one class.  The teacher's outputs
say how far: for each strength the class offsets are fitted that bring the ported model's probabilities nearest to the
teacher's.  The updates are left out unless, at the strength that is nearest, they come nearer than without them by more
than chance would have it (`CLEARLY`); on the source itself they always act.  No label and no gradient of the host is
used.  The fit is that of bias-corrected temperature scaling (Guo et al., 2017, section 4.2) with the temperature left
at one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.data.examples import Examples

# The adapter's own strength is one.
STRENGTHS = (0.0, 0.5, 1.0)
# Standard errors of its paired gain over no updates that a strength must have.  Texts are few and differ, and updates
# that bring nothing cost time.
CLEARLY = 2.0
# Whole texts that are read, from the transfer set's first on.
TEXTS = 384
_STEPS = 30
# Pull towards no offset, so that a class which the texts hardly show keeps its own.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Calibration:
    """What the transfer set says of a ported adapter.

    :param strength: The strength of the updates that is nearest to the teacher; zero unless it is so clearly.
    :param offsets: float32 [labels], what is added to the logits, at every strength that was tried.
    :param cross_entropy: Of the teacher's probabilities and the ported model's, with these offsets, in nats.
    """

    strength: float
    offsets: dict[float, Tensor]
    cross_entropy: dict[float, float]
    texts: int

    def applied(self, adapter: PortedAdapter, strength: float | None = None) -> PortedAdapter:
        """The adapter with a strength (0 where it has no updates), by default the chosen one, and its offsets."""
        strength = self.strength if strength is None else strength
        strength = strength if strength in self.offsets else 0.0
        return adapter.with_strength(strength).with_offsets(self.offsets[strength])


@dataclass(frozen=True)
class Judge:
    """The transfer set's texts on one host.

    :param logits_of: Logits [predictions, labels] of an adapter on the host for the texts.
    :param examples: The texts.
    :param odds: The teacher's log-odds [predictions, labels] on them.
    """

    logits_of: Callable[[PortedAdapter], Tensor]
    examples: Examples
    odds: Tensor

    def calibration(self, adapter: PortedAdapter, *, at_home: bool = False) -> Calibration:
        """The calibration of an adapter as folded; on the host that it was trained on the updates act in full."""
        strengths = STRENGTHS if adapter.updates else STRENGTHS[:1]
        fits = {strength: self._fit(adapter.with_strength(strength)) for strength in strengths}
        offsets = {strength: found for strength, (found, _) in fits.items()}
        losses = {strength: float(rows.mean()) for strength, (_, rows) in fits.items()}
        best = min(strengths, key=lambda strength: losses[strength])
        if not self._clear(fits[0.0][1] - fits[best][1]):
            best = 0.0
        if at_home:
            best = strengths[-1]
        return Calibration(best, offsets, losses, len(self.examples))

    def with_offsets(self, adapter: PortedAdapter) -> PortedAdapter:
        """The adapter with the class offsets that fit it."""
        return adapter.with_offsets(self._fit(adapter)[0])

    def offsets(self, logits: Tensor) -> Tensor:
        """The class offsets, float32 [labels], that fit these logits [predictions, labels] of the texts."""
        return class_offsets(logits.double(), self.odds.double().softmax(-1)).float()

    def _fit(self, adapter: PortedAdapter) -> tuple[Tensor, Tensor]:
        """Class offsets, and the cross entropy [predictions] with them."""
        logits = self.logits_of(adapter)
        offsets = self.offsets(logits)
        return offsets, functional.cross_entropy(logits + offsets, self.odds.softmax(-1), reduction="none")

    def _clear(self, gains: Tensor) -> bool:
        """Whether the mean of the gains [predictions] is above zero by `CLEARLY` standard errors, drawn by texts."""
        words = self.examples.words
        counts = [1] * len(self.examples) if words is None else [len(row) for row in words]
        mean = gains.mean()
        sums = torch.stack([part.sum() for part in torch.split(gains - mean, counts)])
        return float(mean) > CLEARLY * float(sums.square().sum().sqrt()) / len(gains)


def class_offsets(logits: Tensor, wanted: Tensor) -> Tensor:
    """Offsets [labels], of mean zero, whose sum with the logits [P, labels] is nearest to the wanted probabilities.

    Newton's method on the cross entropy, which is convex in them.
    """
    labels = logits.shape[1]
    offsets = torch.zeros(labels, dtype=logits.dtype)
    ridge = _RIDGE * torch.eye(labels, dtype=logits.dtype)
    for _ in range(_STEPS):
        found = (logits + offsets).softmax(-1)
        slope = (found - wanted).mean(0) + _RIDGE * offsets
        curvature = torch.diag(found.mean(0)) - found.T @ found / len(found) + ridge
        step = torch.linalg.solve(curvature, slope)
        offsets = offsets - step.clamp(-1.0, 1.0)
        if float(step.abs().max()) < 1e-9:
            break
    return offsets - offsets.mean()
