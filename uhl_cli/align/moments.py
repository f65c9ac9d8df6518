"""Ridge regression from moments: states are added batch by batch and never all held.

Guarantee: `fit_moments` gives, for each output, the minimiser of `|y - x w|^2 + strength |w - prior|^2` over all rows
added, inputs standardised, with the strength that predicts the held-out rows best; `r2` is that prediction's.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the number of rows, which is the mean eigenvalue of the standardised inputs' Gram matrix.
STRENGTHS: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, 100.0)


# Rows that are held until their products are added: fewer and larger products, and fewer sums of D x D.
_HELD_ROWS = 2048


class Moments:
    """Moments of inputs [rows, D] and outputs [rows, F], float64 on the CPU, about the first rows' means."""

    def __init__(self) -> None:
        self.rows = 0
        self._centre: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, ...] = ()
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in some rows; products are in float32 within some thousand rows."""
        if not len(inputs):
            return
        self.rows += len(inputs)
        self._waiting.append((inputs, outputs))
        if sum(len(each) for each, _ in self._waiting) >= _HELD_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        inputs, outputs = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        if self._centre is None:
            self._centre = (inputs.mean(0), outputs.mean(0))
        x, y = inputs - self._centre[0], outputs - self._centre[1]
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum(0))
        if not self._sums:
            self._sums = tuple(value.cpu().double() for value in new)
        else:
            for total, value in zip(self._sums, new, strict=True):
                total.add_(value.cpu())

    def part(self, span: slice) -> Moments:
        """The moments of some of the inputs."""
        found = Moments()
        self._flush()
        if self._centre is not None:
            x, y, xx, xy, yy = self._sums
            found.rows, found._centre = self.rows, (self._centre[0][span], self._centre[1])
            found._sums = (x[span], y, xx[span, span], xy[span], yy)
        return found

    def about(self, x_mean: Tensor, y_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments xx [D, D], xy [D, F] and yy [F] about the given means."""
        self._flush()
        x, y, xx, xy, yy = self._sums
        (x_centre, y_centre) = self._centres
        dx, dy = x_centre - x_mean, y_centre - y_mean
        # One product of rank two: x dx' + dx (x + rows dx)'.
        left, moved = torch.stack([x, dx], 1), x + self.rows * dx
        xx = torch.addmm(xx, left, torch.stack([dx, moved]))
        xy = torch.addmm(xy, left, torch.stack([dy, y + self.rows * dy]))
        return xx, xy, yy + 2 * dy * y + self.rows * dy.square()

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Means of inputs and outputs."""
        self._flush()
        x_centre, y_centre = self._centres
        return x_centre + self._sums[0] / self.rows, y_centre + self._sums[1] / self.rows

    @property
    def _centres(self) -> tuple[Tensor, Tensor]:
        assert self._centre is not None  # some rows were added
        return self._centre[0].cpu().double(), self._centre[1].cpu().double()


def fit_moments(fitted: Moments, held: Moments, *, prior: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [D, F], offset [F] with `y = x @ weight + offset`, and held-out R^2 [F]; float32.

    :param fitted: Rows that every strength is tried on; `held`: rows that judge.  The result uses both.
    :param prior: Weight [D, F] that the ridge shrinks towards; zero by default.
    """
    x_mean, y_mean = fitted.means
    xx, xy, _ = fitted.about(x_mean, y_mean)
    spread = (xx.diagonal() / fitted.rows).clamp_min(0).sqrt()
    spread = torch.where(spread < 1e-6 * spread.max(), torch.inf, spread)  # a constant input gets weight zero
    held_xx, held_xy, held_yy = held.about(x_mean, y_mean)
    scale = torch.outer(spread, spread)
    held_xx, held_xy = held_xx.div_(scale), held_xy / spread[:, None]
    gram, moment = xx.div_(scale), xy / spread[:, None]
    start = torch.zeros_like(moment)
    if prior is not None:
        start = torch.where(torch.isfinite(spread)[:, None], prior.double() * spread[:, None], start)
    errors = []
    for strength in STRENGTHS:
        weight = start + _solve(gram, moment - gram @ start, strength * fitted.rows)
        errors.append(held_yy - 2 * (weight * held_xy).sum(0) + (weight * (held_xx @ weight)).sum(0))
    best = torch.stack(errors).min(0)
    r2 = torch.where(held_yy > 0, 1 - best.values / held_yy.clamp_min(1e-300), torch.zeros_like(held_yy))
    rows = fitted.rows + held.rows
    held_x, held_y = held.means
    share = held.rows / rows
    x_all, y_all = x_mean + share * (held_x - x_mean), y_mean + share * (held_y - y_mean)
    parts = [each.about(x_all, y_all) for each in (fitted, held)]
    gram = parts[0][0].add_(parts[1][0]).div_(scale)
    moment = (parts[0][1] + parts[1][1]) / spread[:, None]
    weight = torch.zeros_like(moment)
    for index, strength in enumerate(STRENGTHS):
        columns = best.indices == index
        if bool(columns.any()):
            missing = moment[:, columns] - gram @ start[:, columns]
            weight[:, columns] = start[:, columns] + _solve(gram, missing, strength * rows)
    weight = weight / spread[:, None]
    return weight.float(), (y_all - x_all @ weight).float(), r2.float()


def _solve(gram: Tensor, moment: Tensor, strength: float) -> Tensor:
    """(gram + strength) w = moment for a positive semi-definite gram."""
    raised = gram.clone()
    raised.diagonal().add_(strength)
    solved: Tensor = torch.cholesky_solve(moment, torch.linalg.cholesky(raised))
    return solved
