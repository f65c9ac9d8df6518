"""Ridge regression in closed form; the strength is chosen per output on held-out texts.

Guarantee: each column w of the returned map minimises `|y - x w|^2 + strength |w|^2` over the given rows, inputs
standardised by column.  `r2` is measured on rows whose group took no part in the fit that predicted them; the map
itself is then refitted on all rows.  The strength is chosen on the same rows, among few values, so `r2` is slightly
optimistic.

A strength for each output matters: leading coordinates are predicted well and need little shrinkage; trailing
ones are hardly predictable and are best left near their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uhl_cli.errors import AlignmentError

# Relative to the mean eigenvalue of the (column or kernel) Gram matrix.
STRENGTHS: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class RidgeMap:
    """`y = (x - input_mean) @ weight + output_mean`, float32.

    `weight` [inputs, outputs]; `r2` [outputs] held-out; `strengths` [outputs], each one of `STRENGTHS`.
    """

    weight: Tensor
    input_mean: Tensor
    output_mean: Tensor
    r2: Tensor
    strengths: Tensor


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvectors of the smaller Gram matrix; in their basis, solving for a strength is one division.

    `weight(strength) = basis @ (moment / (eigenvalues + strength * scale))`, with `basis` [inputs, n],
    `moment` [n, outputs], `eigenvalues` [n].
    """

    basis: Tensor
    moment: Tensor
    eigenvalues: Tensor

    @classmethod
    def of_moments(cls, gram: Tensor, cross: Tensor) -> _Spectrum:
        """From the float64 products x'x [inputs, inputs] and x'y [inputs, outputs] of the centred rows."""
        eigenvalues, vectors = torch.linalg.eigh(gram)
        return cls(vectors, vectors.T @ cross, eigenvalues.clamp_min(0.0))

    @classmethod
    def of_rows(cls, inputs: Tensor, outputs: Tensor) -> _Spectrum:
        """From centred float64 inputs [rows, inputs] and outputs [rows, outputs], by x x' [rows, rows]."""
        eigenvalues, vectors = torch.linalg.eigh(inputs @ inputs.T)
        return cls(inputs.T @ vectors, vectors.T @ outputs, eigenvalues.clamp_min(0.0))

    def coefficients(self, strength: float | Tensor) -> Tensor:
        """Solution in the eigenbasis [n, outputs]; pass a tensor for one strength per output."""
        scale = self.eigenvalues.mean().clamp_min(1e-12)
        return self.moment / (self.eigenvalues[:, None] + strength * scale)


def fit_ridge(
    inputs: Tensor,
    outputs: Tensor,
    groups: Tensor,
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    folds: int = 4,
) -> RidgeMap:
    """Fit outputs [rows, outputs] from inputs [rows, inputs]; rows of one group stay on one side of a split.

    :raises AlignmentError: When there are fewer than 8 rows or all inputs are constant.
    """
    if len(inputs) < 8:
        raise AlignmentError(
            f"only {len(inputs)} anchor words are left to align with; at least 8 are needed.",
            "Use an adapter with more anchors.",
        )
    x_all, y_all = inputs.double(), outputs.double()
    x_mean, y_mean = x_all.mean(0), y_all.mean(0)
    x_std = x_all.std(0, correction=0)
    if float(x_std.max()) < 1e-12:
        raise AlignmentError("the host's states are the same for all anchor words.", "Check the checkpoint.")
    x_std = torch.where(x_std < 1e-6 * x_std.max(), torch.inf, x_std)  # a constant column gets weight zero
    x_all, y_all = (x_all - x_mean) / x_std, y_all - y_mean

    rows, columns = x_all.shape
    # A fold's products are those of all rows minus those of its held-out rows, which are fewer.
    whole = (x_all.T @ x_all, x_all.T @ y_all) if columns <= rows else None
    fold = _fold_of(groups, folds)
    errors = torch.zeros(len(strengths), outputs.shape[1], dtype=torch.float64)
    total = torch.zeros(outputs.shape[1], dtype=torch.float64)
    for part in range(folds):
        held = fold == part
        if not held.any() or held.all():
            continue
        x_held, y_held = x_all[held], y_all[held]
        fit_rows = rows - len(x_held)
        # All rows together have mean zero, so the sum over the fitted rows is minus the sum over the held-out ones.
        shift_x, shift_y = x_held.sum(0) / -fit_rows, y_held.sum(0) / -fit_rows
        if whole is not None and columns <= fit_rows:
            gram = (whole[0] - x_held.T @ x_held).addr_(shift_x, shift_x, alpha=-fit_rows)
            cross = (whole[1] - x_held.T @ y_held).addr_(shift_x, shift_y, alpha=-fit_rows)
            spectrum = _Spectrum.of_moments(gram, cross)
        else:
            spectrum = _Spectrum.of_rows(x_all[~held] - shift_x, y_all[~held] - shift_y)
        # Single precision is enough to tell strengths apart, at half the cost of the most expensive products.
        y_held = (y_held - shift_y).float()
        projected = ((x_held - shift_x) @ spectrum.basis).float()
        for index, strength in enumerate(strengths):
            predicted = projected @ spectrum.coefficients(strength).float()
            errors[index] += predicted.sub_(y_held).square_().sum(0)
        total += y_held.square().sum(0)
    best = errors.argmin(0)
    # A constant coordinate has R^2 zero instead of a division by zero.
    unexplained = errors.gather(0, best[None])[0] / total.clamp_min(1e-300)
    r2 = torch.where(total > 0, 1.0 - unexplained, torch.zeros_like(total))
    chosen = torch.tensor(strengths, dtype=torch.float64)[best]
    spectrum = _Spectrum.of_rows(x_all, y_all) if whole is None else _Spectrum.of_moments(*whole)
    weight = spectrum.basis @ spectrum.coefficients(chosen) / x_std[:, None]
    return RidgeMap(weight.float(), x_mean.float(), y_mean.float(), r2.float(), chosen.float())


def _fold_of(groups: Tensor, folds: int) -> Tensor:
    """A fold number for each row, the same for all rows of a group, folds of nearly equal size."""
    _, compact = torch.unique(groups, return_inverse=True)
    order = torch.randperm(int(compact.max()) + 1, generator=torch.Generator().manual_seed(0))
    if len(order) < folds:  # a single text: fall back to splitting its words
        return torch.arange(len(groups)) % folds
    return (order % folds)[compact]
