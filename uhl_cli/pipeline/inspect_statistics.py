"""Numbers about the parts of an adapter file, in numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from uhl_cli.adapter.store import Quantised
from uhl_cli.pipeline.inspect_report import AtomStatistics, MixingWeights, RowStatistics, Similarity
from uhl_cli.schema import UPDATE_TYPES

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Normalised depths of the heat map; the file belongs to no host, so to no number of layers.
DEPTHS = tuple(step / 10 for step in range(11))


def values_of(entry: Quantised) -> Floats:
    """float32 values of integer codes [..., columns] with one scale a row; a vector is one row.

    Guarantee: bit for bit what `convert.dequantised` gives to torch.
    """
    codes = entry.codes
    rows = codes.reshape(-1, codes.shape[-1]).astype(np.float32) * entry.scales[:, None]
    values: Floats = rows.reshape(codes.shape)
    return values


def mixing_weights(parameters: Mapping[str, Quantised], depths: Sequence[float] = DEPTHS) -> Floats:
    """Mixing weights g(t, type), float32 [depths, types, atoms]; `canonical.mix` in numpy.

    :param depths: Normalised depths t in [0, 1].
    """
    names = ("mixer_in_weight", "mixer_in_bias", "mixer_out_weight", "mixer_out_bias", "delta_theta")
    weight, bias, out_weight, out_bias, delta = (values_of(parameters[name]) for name in names)
    steps = np.asarray(depths, dtype=np.float32)[:, None, None]
    # Column 0 takes the depth, the others are one for each type: [depths, types, hidden].
    hidden = np.sin(weight[:, 0] * steps + weight[:, 1:].T + bias)
    mixed: Floats = np.float32(1) + hidden @ out_weight.T + out_bias + delta
    return mixed


def mixing_summary(parameters: Mapping[str, Quantised], unused: Sequence[int]) -> MixingWeights:
    """Mean and standard deviation of the mixing weights over the used atoms, or over all where none is used."""
    weights = mixing_weights(parameters).astype(np.float64)
    used = np.setdiff1d(np.arange(weights.shape[2]), unused)
    if len(used):
        weights = weights[:, :, used]
    return MixingWeights(
        depths=DEPTHS, types=UPDATE_TYPES, mean=_rows(weights.mean(2)), deviation=_rows(weights.std(2))
    )


def atom_statistics(parameters: Mapping[str, Quantised]) -> AtomStatistics:
    """Norms, closest pairs and unused atoms of the dictionary."""
    u, v = (values_of(parameters[name]).astype(np.float64) for name in ("atoms_u", "atoms_v"))
    used = np.flatnonzero(u.any(1))
    cosines_u, cosines_v = _cosines(u[used]), _cosines(v[used])
    return AtomStatistics(
        count=len(u),
        unused=tuple(int(index) for index in np.flatnonzero(~u.any(1))),
        u=_row_statistics(u, used, cosines_u),
        v=_row_statistics(v, used, cosines_v),
        update=_closest(cosines_u * cosines_v, used),
    )


def root_mean_square(values: Floats) -> tuple[float, ...]:
    """Root mean square of every row of `values` [rows, columns]."""
    return tuple(float(value) for value in np.sqrt(np.square(values, dtype=np.float64).mean(1)))


def _row_statistics(rows: Doubles, used: npt.NDArray[np.int64], cosines: Doubles) -> RowStatistics:
    norms = np.linalg.norm(rows, axis=1)
    kept = norms[used] if len(used) else norms
    return RowStatistics(
        norms=tuple(float(norm) for norm in norms),
        minimum=float(kept.min()),
        median=float(np.median(kept)),
        maximum=float(kept.max()),
        closest=_closest(cosines, used),
    )


def _cosines(rows: Doubles) -> Doubles:
    """Cosines between all rows [rows, rows]; NaN where a row is zero, which has no direction."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.full_like(rows, np.nan), where=norms > 0)
    cosines: Doubles = unit @ unit.T
    return cosines


def _closest(cosines: Doubles, used: npt.NDArray[np.int64]) -> Similarity | None:
    """The pair whose cosine is largest in magnitude: an atom's mirror image is as superfluous as its double."""
    first, second = np.triu_indices(len(cosines), 1)
    pairs = cosines[first, second]
    if not np.isfinite(pairs).any():
        return None
    best = int(np.nanargmax(np.abs(pairs)))
    return Similarity(
        cosine=float(np.clip(pairs[best], -1.0, 1.0)), first=int(used[first[best]]), second=int(used[second[best]])
    )


def _rows(values: Doubles) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in values)
