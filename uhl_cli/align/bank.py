"""Anchor bank: the canonical coordinates that the source host gives to the anchor words.

Canonical space is the space of the source host's own word states, rotated to their principal directions
(one rotation for all depths, so that coordinates of neighbouring depths can be interpolated) and divided by
the standard deviation at each depth knot.  It is stored in steps of `STEP` standard deviations, entropy-coded, with
one scale per coordinate and knot: 2.5 bits a coordinate (figures: tests/benchmarks/README.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from uhl_cli.align.states import WordStates
from uhl_cli.align.texts import AnchorTexts
from uhl_cli.codes.quantise import quantise_columns
from uhl_cli.errors import AlignmentError

# Quantiser step of a coordinate, in standard deviations.
STEP = 0.75


@dataclass(frozen=True)
class AnchorBank:
    """Anchor texts with quantised canonical coordinates.

    `codes` int8 [knots, N, d0], within -7..7; `scales` float32 [knots, d0]; `knots` the normalised depths.
    """

    anchors: AnchorTexts
    knots: tuple[float, ...]
    codes: Tensor
    scales: Tensor

    @property
    def coordinates(self) -> Tensor:
        """float32 [knots, N, d0]: the dequantised coordinates."""
        return self.codes.float() * self.scales[:, None, :]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of codes and scales; it identifies the canonical space that they define."""
        content = hashlib.sha256(self.codes.numpy().tobytes())
        content.update(self.scales.numpy().tobytes())
        return content.hexdigest()

    def spread(self, num_words: int) -> AnchorBank:
        """A smaller bank of about `num_words` words: whole texts, evenly spaced over this bank's texts."""
        anchors = self.anchors
        if num_words >= anchors.num_words:
            return self
        texts = max(1, round(len(anchors.texts) * num_words / anchors.num_words))
        picked = np.linspace(0, len(anchors.texts) - 1, texts).round().astype(np.int64)
        words = torch.from_numpy(np.isin(anchors.groups(), picked))
        some = replace(
            anchors,
            texts=tuple(anchors.texts[index] for index in picked),
            chosen=tuple(anchors.chosen[index] for index in picked),
        )
        return AnchorBank(some, self.knots, self.codes[:, words], self.scales)

    def at_depth(self, depth: float) -> Tensor:
        """float32 [N, d0]: coordinates at a normalised depth, linear between the two neighbouring knots."""
        coordinates = self.coordinates
        if depth <= self.knots[0]:
            return coordinates[0]
        for index in range(1, len(self.knots)):
            low, high = self.knots[index - 1], self.knots[index]
            if depth <= high:
                share = (depth - low) / (high - low)
                return coordinates[index - 1] * (1 - share) + coordinates[index] * share
        return coordinates[-1]


def depth_index(knot: float, num_hidden_layers: int) -> int:
    """The depth, 0 to L, nearest to a knot."""
    return int(knot * num_hidden_layers + 0.5)


def build_bank(
    anchors: AnchorTexts, states: WordStates, *, knots: tuple[float, ...], canonical_size: int, step: float = STEP
) -> AnchorBank:
    """Define canonical space from the source host's word states and quantise the anchors' coordinates.

    A host narrower than `canonical_size` fills the first `d` coordinates; the others stay zero.

    :param step: Step of the quantiser, in standard deviations of a coordinate.
    :raises AlignmentError: When all states are constant.
    """
    if not bool(states.present.all()) or anchors.num_words != len(states.present):
        raise ValueError("states must be those of the anchors, all of them present")
    depth = states.num_hidden_layers
    centred = []
    for knot in knots:
        state = states.stream[depth_index(knot, depth)].double()
        centred.append(state - state.mean(0))
    # Each knot has the same weight: in some hosts the scales of the depths differ by orders of magnitude.
    pooled = torch.cat([state / state.square().mean().sqrt().clamp_min(1e-12) for state in centred])
    eigenvalues, vectors = torch.linalg.eigh(pooled.T @ pooled)
    if float(eigenvalues[-1]) <= 0:
        raise AlignmentError("the source host's states are the same for all anchor words.", "Check the checkpoint.")
    basis = vectors.flip(1)[:, :canonical_size]
    # The sign of a principal direction is arbitrary; fixing it makes the file's bytes reproducible.
    signs = torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))
    basis = basis * signs
    codes = torch.zeros(len(knots), anchors.num_words, canonical_size, dtype=torch.int8)
    scales = torch.zeros(len(knots), canonical_size)
    for index, state in enumerate(centred):
        projected = state @ basis
        deviation = projected.std(0, correction=0)
        floor = 1e-6 * deviation.max()
        whitened = torch.where(deviation > floor, projected / deviation.clamp_min(1e-300), torch.zeros_like(projected))
        width = whitened.shape[1]
        codes[index, :, :width], scales[index, :width] = quantise_columns(whitened.float(), step)
    return AnchorBank(anchors, knots, codes, scales)
