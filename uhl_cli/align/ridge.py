"""Ridge regression in closed form, its strength chosen on held-out texts.

Guarantee: the returned map minimises `|y - x W|^2 + strength |W|^2` over the given rows, inputs standardised
per feature, and `r2` was measured on rows whose group took no part in the fit that predicted them (the map
itself is then refitted on all rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uhl_cli.errors import AlignmentError

# Relative to the mean eigenvalue of the (feature or kernel) Gram matrix.
STRENGTHS: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class RidgeMap:
    """`y = (x - input_mean) @ weight + output_mean`, float32.

    `weight` [features, outputs]; `r2` [outputs] held-out; `strength` the chosen one of `STRENGTHS`.
    """

    weight: Tensor
    input_mean: Tensor
    output_mean: Tensor
    r2: Tensor
    strength: float


def _solve(inputs: Tensor, outputs: Tensor, strengths: tuple[float, ...]) -> list[Tensor]:
    """Weights [features, outputs] for each strength, of centred float64 inputs [rows, features]."""
    rows, features = inputs.shape
    primal = features <= rows
    gram = inputs.T @ inputs if primal else inputs @ inputs.T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp_min(0.0)
    scale = eigenvalues.mean().clamp_min(1e-12)
    moment = vectors.T @ (inputs.T @ outputs if primal else outputs)
    weights = []
    for strength in strengths:
        solution = vectors @ (moment / (eigenvalues + strength * scale)[:, None])
        weights.append(solution if primal else inputs.T @ solution)
    return weights


def fit_ridge(
    inputs: Tensor,
    outputs: Tensor,
    groups: Tensor,
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    folds: int = 4,
) -> RidgeMap:
    """Fit outputs [rows, outputs] from inputs [rows, features]; rows of one group stay on one side of a split.

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
    x_std = torch.where(x_std < 1e-6 * x_std.max(), torch.inf, x_std)  # a constant feature gets weight zero
    x_all, y_all = (x_all - x_mean) / x_std, y_all - y_mean

    fold = _fold_of(groups, folds)
    errors = torch.zeros(len(strengths), outputs.shape[1], dtype=torch.float64)
    total = torch.zeros(outputs.shape[1], dtype=torch.float64)
    for part in range(folds):
        held = fold == part
        if not held.any() or held.all():
            continue
        x_fit, y_fit = x_all[~held], y_all[~held]
        shift_x, shift_y = x_fit.mean(0), y_fit.mean(0)
        x_held, y_held = x_all[held] - shift_x, y_all[held] - shift_y
        for index, weight in enumerate(_solve(x_fit - shift_x, y_fit - shift_y, strengths)):
            errors[index] += (y_held - x_held @ weight).square().sum(0)
        total += y_held.square().sum(0)
    # Each output counts by its share of unexplained variance, so that outputs of any scale can be fitted together.
    best = int((errors / total.clamp_min(1e-300)).where(total > 0, 0.0).sum(1).argmin())
    # A coordinate that never varies is not predicted at all: its R^2 is zero, not a division by zero.
    r2 = torch.where(total > 0, 1.0 - errors[best] / total.clamp_min(1e-300), torch.zeros_like(total))
    (weight,) = _solve(x_all, y_all, (strengths[best],))
    weight = weight / x_std[:, None]
    return RidgeMap(weight.float(), x_mean.float(), y_mean.float(), r2.float(), strengths[best])


def _fold_of(groups: Tensor, folds: int) -> Tensor:
    """A fold number for each row, the same for all rows of a group, folds of nearly equal size."""
    _, compact = torch.unique(groups, return_inverse=True)
    order = torch.randperm(int(compact.max()) + 1, generator=torch.Generator().manual_seed(0))
    if len(order) < folds:  # a single text: fall back to splitting its words
        return torch.arange(len(groups)) % folds
    return (order % folds)[compact]
