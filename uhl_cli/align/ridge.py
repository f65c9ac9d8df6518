"""Ridge regression in closed form; the strength is chosen per output on held-out texts.

Guarantee: each column w of the returned map minimises `|y - x w|^2 + strength |w|^2` over the given rows, inputs
standardised by column.  `r2` is measured on rows whose group took no part in the fit that predicted them; the map
itself is then refitted on all rows.  The strength is chosen on the same rows, among few values, so `r2` is slightly
optimistic.

A strength for each output matters: leading coordinates are predicted well and need little shrinkage; trailing
ones are hardly predictable and are best left near their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Eigenvectors of the smaller Gram matrix of the inputs; in their basis, solving for a strength is one division.

    `weight(strength) = basis @ (moment / (eigenvalues + strength * scale))`, with `basis` [inputs, n],
    `moment` [n, outputs], `eigenvalues` [n].
    """

    basis: Tensor
    vectors: Tensor
    eigenvalues: Tensor

    @classmethod
    def of_gram(cls, gram: Tensor) -> _Spectrum:
        """From the float64 product x'x [inputs, inputs] of the centred rows; its moments are of x'y."""
        eigenvalues, vectors = torch.linalg.eigh(gram)
        return cls(vectors, vectors, eigenvalues.clamp_min(0.0))

    @classmethod
    def of_rows(cls, inputs: Tensor) -> _Spectrum:
        """From centred float64 inputs [rows, inputs], by x x' [rows, rows]; its moments are of the centred outputs."""
        eigenvalues, vectors = torch.linalg.eigh(inputs @ inputs.T)
        return cls(inputs.T @ vectors, vectors, eigenvalues.clamp_min(0.0))

    def moment(self, products: Tensor) -> Tensor:
        """In the eigenbasis: x'y [inputs, outputs], or the centred outputs [rows, outputs]."""
        return self.vectors.T @ products

    def coefficients(self, moment: Tensor, strength: float | Tensor) -> Tensor:
        """Solution in the eigenbasis [n, outputs]; pass a tensor for one strength per output."""
        scale = self.eigenvalues.mean().clamp_min(1e-12)
        return moment / (self.eigenvalues[:, None] + strength * scale)


class _Fit:
    """One of the outputs, float64 [rows, outputs]: its errors so far, for every strength."""

    def __init__(self, outputs: Tensor, strengths: tuple[float, ...], inputs: Tensor, *, by_columns: bool) -> None:
        self.mean = outputs.mean(0)
        self.y = outputs - self.mean
        self.cross = inputs.T @ self.y if by_columns else None
        self._strengths = strengths
        self._errors = torch.zeros(len(strengths), outputs.shape[1], dtype=torch.float64)
        self._total = torch.zeros(outputs.shape[1], dtype=torch.float64)

    def judge(self, spectrum: _Spectrum, moment: Tensor, projected: Tensor, y_held: Tensor) -> None:
        """Add the errors on held-out rows, which the basis of a fold takes to `projected` [held, n]."""
        for index, strength in enumerate(self._strengths):
            predicted = projected @ spectrum.coefficients(moment, strength).float()
            self._errors[index] += predicted.sub_(y_held).square_().sum(0)
        self._total += y_held.square().sum(0)

    def chosen(self) -> tuple[Tensor, Tensor]:
        """The strength that serves each output best, and its R^2."""
        best = self._errors.argmin(0)
        # A constant coordinate has R^2 zero instead of a division by zero.
        unexplained = self._errors.gather(0, best[None])[0] / self._total.clamp_min(1e-300)
        r2 = torch.where(self._total > 0, 1.0 - unexplained, torch.zeros_like(self._total))
        return torch.tensor(self._strengths, dtype=torch.float64)[best], r2


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
    return fit_ridges(inputs, [outputs], groups, strengths=strengths, folds=folds)[0]


def fit_ridges(
    inputs: Tensor,
    outputs: Sequence[Tensor],
    groups: Tensor,
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    folds: int = 4,
) -> list[RidgeMap]:
    """What `fit_ridge` gives for each of several outputs, bit for bit; the inputs are decomposed once for all.

    :raises AlignmentError: When there are fewer than 8 rows or all inputs are constant.
    """
    if len(inputs) < 8:
        raise AlignmentError(
            f"only {len(inputs)} anchor words are left to align with; at least 8 are needed.",
            "Use an adapter with more anchors.",
        )
    x_all = inputs.double()
    x_mean = x_all.mean(0)
    x_std = x_all.std(0, correction=0)
    if float(x_std.max()) < 1e-12:
        raise AlignmentError("the host's states are the same for all anchor words.", "Check the checkpoint.")
    x_std = torch.where(x_std < 1e-6 * x_std.max(), torch.inf, x_std)  # a constant column gets weight zero
    x_all = (x_all - x_mean) / x_std

    rows, columns = x_all.shape
    # A fold's products are those of all rows minus those of its held-out rows, which are fewer.
    whole = x_all.T @ x_all if columns <= rows else None
    fits = [_Fit(each.double(), strengths, x_all, by_columns=whole is not None) for each in outputs]
    fold = _fold_of(groups, folds)
    for part in range(folds):
        held = fold == part
        if not held.any() or held.all():
            continue
        x_held = x_all[held]
        fit_rows = rows - len(x_held)
        # All rows together have mean zero, so the sum over the fitted rows is minus the sum over the held-out ones.
        shift_x = x_held.sum(0) / -fit_rows
        by_columns = whole is not None and columns <= fit_rows
        if whole is not None and by_columns:
            spectrum = _Spectrum.of_gram((whole - x_held.T @ x_held).addr_(shift_x, shift_x, alpha=-fit_rows))
        else:
            spectrum = _Spectrum.of_rows(x_all[~held] - shift_x)
        projected = ((x_held - shift_x) @ spectrum.basis).float()
        for fit in fits:
            y_held = fit.y[held]
            shift_y = y_held.sum(0) / -fit_rows
            if fit.cross is not None and by_columns:
                products = (fit.cross - x_held.T @ y_held).addr_(shift_x, shift_y, alpha=-fit_rows)
            else:
                products = fit.y[~held] - shift_y
            # Single precision is enough to tell strengths apart, at half the cost of the most expensive products.
            fit.judge(spectrum, spectrum.moment(products), projected, (y_held - shift_y).float())
    spectrum = _Spectrum.of_rows(x_all) if whole is None else _Spectrum.of_gram(whole)
    found = []
    for fit in fits:
        chosen, r2 = fit.chosen()
        moment = spectrum.moment(fit.y if fit.cross is None else fit.cross)
        weight = spectrum.basis @ spectrum.coefficients(moment, chosen) / x_std[:, None]
        found.append(RidgeMap(weight.float(), x_mean.float(), fit.mean.float(), r2.float(), chosen.float()))
    return found


def _fold_of(groups: Tensor, folds: int) -> Tensor:
    """A fold number for each row, the same for all rows of a group, folds of nearly equal size."""
    _, compact = torch.unique(groups, return_inverse=True)
    order = torch.randperm(int(compact.max()) + 1, generator=torch.Generator().manual_seed(0))
    if len(order) < folds:  # a single text: fall back to splitting its words
        return torch.arange(len(groups)) % folds
    return (order % folds)[compact]
