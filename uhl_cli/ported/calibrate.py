"""Calibrates a ported adapter on its transfer set: class offsets, and the strength of the updates.

On another host the updates transfer only in part, and that part pushes all texts towards one class.  The teacher's
outputs tell how far: for each strength, fit the class offsets that bring the ported model's probabilities nearest to
the teacher's.  Keep the updates only if the best strength is nearer than no updates by more than chance (`CLEARLY`);
on the source itself they are always kept.  No label and no gradient of the host is used.  The fit is bias-corrected
temperature scaling (Guo et al., 2017, section 4.2) with the temperature fixed at one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.data.examples import Examples

# Strengths to try; 1 is the strength at which the adapter was trained.
STRENGTHS = (0.0, 0.5, 1.0)
# A strength's paired gain over no updates must be at least this many standard errors: texts are few and differ, and
# updates without a gain only cost time.
CLEARLY = 2.0
# Number of whole texts to read, from the beginning of the transfer set.
TEXTS = 384
_STEPS = 30
# Ridge on the offsets, so that a class that is rare in the texts keeps an offset near zero.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Calibration:
    """Result of calibrating a ported adapter on the transfer set.

    :param strength: The strength of the updates that is nearest to the teacher; zero unless its gain is clear.
    :param offsets: float32 [labels], to add to the logits, for every strength that was tried.
    :param cross_entropy: Of the teacher's probabilities and the ported model's, with these offsets, in nats.
    """

    strength: float
    offsets: dict[float, Tensor]
    cross_entropy: dict[float, float]
    texts: int

    def applied(self, adapter: PortedAdapter, strength: float | None = None) -> PortedAdapter:
        """The adapter with a strength (by default the chosen one; 0 if it has no updates) and its offsets."""
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
        """Calibrate an adapter as folded; with `at_home`, on the host it was trained on, updates have full strength."""
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
        """Whether the mean of the gains [predictions] is `CLEARLY` standard errors above zero, clustered by text."""
        words = self.examples.words
        counts = [1] * len(self.examples) if words is None else [len(row) for row in words]
        mean = gains.mean()
        sums = torch.stack([part.sum() for part in torch.split(gains - mean, counts)])
        return float(mean) > CLEARLY * float(sums.square().sum().sqrt()) / len(gains)


def class_offsets(logits: Tensor, wanted: Tensor) -> Tensor:
    """Offsets [labels] of mean zero that bring the logits [P, labels] nearest to the wanted probabilities.

    Newton's method on the cross entropy, which is convex in the offsets.
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
