"""Symmetric quantisation in torch: integer codes with scales, and the straight-through version for training.

Guarantee: `fake_quantise(x)` equals, bit for bit, what is read back after storing `codes_and_scales(x)`, so a
score computed in training is the score of the file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest_code(bits: int) -> int:
    """Largest code of a symmetric quantiser: 7 for 4 bits, 127 for 8."""
    return int(2 ** (bits - 1) - 1)


def codes_and_scales(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [rows, columns] and one scale float32 [rows] per row; a vector is a single row.

    The scale maps a row's largest magnitude to the largest code; a row of zeros has scale zero.
    """
    rows = values.detach().float().reshape(-1, values.shape[-1])
    scales = rows.abs().amax(1) / largest_code(bits)
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = torch.round(rows / safe[:, None]).clamp(-largest_code(bits), largest_code(bits))
    return codes.to(torch.int8).reshape(values.shape), scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 values of codes [..., columns] with one scale per row."""
    rows = codes.reshape(-1, codes.shape[-1]).float() * scales[:, None]
    return rows.reshape(codes.shape)


def fake_quantise(values: Tensor, bits: int) -> Tensor:
    """Values as they will be after storing, with the gradient of the identity (straight-through estimator)."""
    stored = dequantise(*codes_and_scales(values, bits))
    return values + (stored - values).detach() if values.requires_grad else stored


def quantise_columns(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [rows, columns] and one scale per COLUMN, each scale the best of a grid by squared error.

    Anchors' coordinates have long tails; clipping a few of them buys a finer step for the rest.  At 2 bits codes are
    -3, -1, 1 and 3, see `_quantise_pairs`.
    """
    if bits == 2:
        return _quantise_pairs(values)
    top = largest_code(bits)
    peak = values.abs().amax(0)
    best_error = torch.full_like(peak, torch.inf)
    best_scale = torch.zeros_like(peak)
    for share in (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0):
        scale = peak * share / top
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        rounded = torch.round(values / safe).clamp(-top, top) * scale
        error = (rounded - values).square().sum(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    safe = torch.where(best_scale > 0, best_scale, torch.ones_like(best_scale))
    return torch.round(values / safe).clamp(-top, top).to(torch.int8), best_scale


# The step of the best uniform quantiser of four levels, in standard deviations of a Gaussian (Max, 1960).
_STEP = 0.996


def _quantise_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Four levels a column, without a level at zero, about which the values [rows, columns] should be centred.

    The scale makes the levels regress on the values with slope one, so that a map fitted on the codes shrinks nothing.
    """
    step = _STEP * values.std(0, correction=0)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    codes = (2 * torch.floor(values / safe) + 1).clamp(-3, 3)
    along = (values * codes).sum(0)
    scales = torch.where(along > 0, values.square().sum(0) / along.clamp_min(1e-30), torch.zeros_like(along))
    return codes.to(torch.int8), scales
