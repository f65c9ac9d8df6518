"""Ridge regression from moments: rows are added batch by batch, so all states never have to be in memory at once.

Guarantee: `fit_moments` returns, for each output, the minimiser of `|y - x w|^2 + strength |w - prior|^2` over all rows
added, inputs standardised, with the strength that predicts the held-out rows best; `r2` is the R^2 of that prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the number of rows, which is the mean eigenvalue of the standardised inputs' Gram matrix.
STRENGTHS: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, 100.0)


# Rows are buffered until this many are there: fewer and larger products, and fewer sums of D x D.
_HELD_ROWS = 1024


class Moments:
    """Moments of inputs [rows, D] and outputs [rows, F], float64 on the CPU, about the first rows' means."""

    def __init__(self) -> None:
        self.rows = 0
        self._centre: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, ...] = ()
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows; products are in float32 within some thousand rows."""
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
        # The joined tensors are copies, so they can be centred in place.
        x, y = inputs.sub_(self._centre[0]), outputs.sub_(self._centre[1])
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum(0))
        if not self._sums:
            self._sums = tuple(torch.zeros(value.shape, dtype=torch.float64) for value in new)
        for total, value in zip(self._sums, new, strict=True):
            total.add_(value.cpu())

    def part(self, span: slice) -> Moments:
        """The moments of some of the inputs."""
        found = Moments()
        self._flush()
        if self._centre is not None:
            x, y, xx, xy, yy = self._sums
            found.rows, found._centre = self.rows, (self._centre[0][span], self._centre[1])
            found._sums = tuple(part.clone() for part in (x[span], y, xx[span, span], xy[span], yy))
        return found

    def recentre(self, x_mean: Tensor, y_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments xx [D, D], xy [D, F] and yy [F] about the given means, which become the new centre.

        The returned tensors are not copies (no second D x D is allocated): the next change of the moments changes them.
        """
        self._flush()
        x, y, xx, xy, yy = self._sums
        (x_centre, y_centre) = self._centres
        dx, dy = x_centre - x_mean, y_centre - y_mean
        moved_x, moved_y = x + self.rows * dx, y + self.rows * dy
        # A rank-two update: x dx' + dx (x + rows dx)'.
        left = torch.stack([x, dx], 1)
        xx.addmm_(left, torch.stack([dx, moved_x]))
        xy.addmm_(left, torch.stack([dy, moved_y]))
        yy += 2 * dy * y + self.rows * dy.square()
        self._centre, self._sums = (x_mean, y_mean), (moved_x, moved_y, xx, xy, yy)
        return xx, xy, yy

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

    Memory: the moments, and one D x D matrix at a time.

    :param fitted: Rows to fit with each strength; `held`: rows to select the strength on.  The final fit uses both.
    :param prior: Weight [D, F] that the ridge shrinks towards; zero by default.
    """
    x_mean, y_mean = fitted.means
    xx, xy, _ = fitted.recentre(x_mean, y_mean)
    held_xx, held_xy, held_yy = held.recentre(x_mean, y_mean)
    variance = (xx.diagonal() / fitted.rows).clamp_min(0)
    varies = variance >= 1e-12 * variance.max()  # a constant input gets weight zero
    # Inputs are standardised by a penalty in proportion to their variance: the solution is the same.
    penalty = torch.where(varies, variance, variance.max())
    start = torch.zeros_like(xy)
    if prior is not None:
        start = torch.where(varies[:, None], prior.double(), start)
    missing = torch.where(varies[:, None], xy - xx @ start, torch.zeros_like(xy))
    raised = torch.empty_like(xx).mT  # column-major, as LAPACK needs it: otherwise it makes copies
    errors = []
    for strength in STRENGTHS:
        weight = start + _solve(raised.copy_(xx), missing, varies, strength * fitted.rows * penalty)
        errors.append(held_yy - 2 * (weight * held_xy).sum(0) + (weight * (held_xx @ weight)).sum(0))
    best = torch.stack(errors).min(0)
    r2 = torch.where(held_yy > 0, 1 - best.values / held_yy.clamp_min(1e-300), torch.zeros_like(held_yy))
    rows = fitted.rows + held.rows
    held_x, held_y = held.means
    share = held.rows / rows
    x_all, y_all = x_mean + share * (held_x - x_mean), y_mean + share * (held_y - y_mean)
    xx, xy, _ = fitted.recentre(x_all, y_all)
    held_xx, held_xy, _ = held.recentre(x_all, y_all)
    missing = xy + held_xy - xx @ start - held_xx @ start
    missing = torch.where(varies[:, None], missing, torch.zeros_like(missing))
    weight = torch.zeros_like(missing)
    for index, strength in enumerate(STRENGTHS):
        columns = best.indices == index
        if bool(columns.any()):
            torch.add(xx, held_xx, out=raised)
            solved = _solve(raised, missing[:, columns], varies, strength * rows * penalty)
            weight[:, columns] = start[:, columns] + solved
    return weight.float(), (y_all - x_all @ weight).float(), r2.float()


def _solve(gram: Tensor, moment: Tensor, varies: Tensor, penalty: Tensor) -> Tensor:
    """Solve (gram + diag(penalty)) w = moment for a positive semi-definite gram, which is overwritten.

    Inputs that do not vary (`varies` False) get zero.  Cholesky's accuracy does not depend on the inputs' scales.
    """
    gram.diagonal().add_(penalty)
    torch.linalg.cholesky(gram, out=gram)
    half = torch.linalg.solve_triangular(gram, moment, upper=False)
    solved = torch.linalg.solve_triangular(gram.mT, half, upper=True)
    return torch.where(varies[:, None], solved, torch.zeros_like(solved))
