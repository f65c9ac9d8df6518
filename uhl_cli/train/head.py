"""The head-only control: logistic regression on the frozen source's mean final state (docs/method.md, "Controls")."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from uhl_cli.align.alignment import Alignment
from uhl_cli.data.examples import Examples
from uhl_cli.host.checkpoint import Host
from uhl_cli.ported.controls import Progress, mean_final_states
from uhl_cli.train.loop import targets_of

INVERSE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)


def fit_head(
    host: Host,
    alignment: Alignment,
    examples: Examples,
    *,
    num_labels: int,
    seed: int,
    limit: int = 20_000,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight [labels, d0] and bias [labels] of the best linear head on canonical coordinates.

    Its regularisation is chosen on a held-out tenth of the (at most `limit`) training examples.
    """
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(examples))[:limit]).tolist()
    subset = examples.select(chosen)
    states, _ = mean_final_states(host, subset, max_length=max_length, progress=progress)
    maps = alignment.layers[-1]
    features = ((states - maps.mean) @ maps.read.T).numpy()
    targets = np.array(targets_of(subset, list(range(len(subset)))))
    weight, bias = np.zeros((num_labels, features.shape[1])), np.zeros(num_labels)
    if len(np.unique(targets)) < 2:  # a single class needs no regression, only its bias
        bias[targets[0]] = 1.0
        return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
    held = generator.permutation(len(targets)) < len(targets) // 10
    best, best_right = INVERSE_STRENGTHS[0], -1
    for strength in INVERSE_STRENGTHS if held.any() and len(np.unique(targets[~held])) > 1 else ():
        model = regression(features[~held], targets[~held], strength)
        right = int((model.predict(features[held]) == targets[held]).sum())
        if right > best_right:
            best, best_right = strength, right
    model = regression(features, targets, best)
    present = model.classes_
    rows, offsets = model.coef_, model.intercept_
    if len(present) == 2:  # scikit-learn keeps one row for two classes, that of the second against the first
        rows, offsets = np.concatenate([np.zeros_like(rows), rows]), np.concatenate([np.zeros_like(offsets), offsets])
    weight[present], bias[present] = rows, offsets
    # Some present class has a logit of at least 0, so a class absent from training is never predicted.
    bias[np.setdiff1d(np.arange(num_labels), present)] = offsets.min() - 10.0
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def regression(
    features: npt.NDArray[np.float32], targets: npt.NDArray[np.int64], inverse_strength: float
) -> LogisticRegression:
    """A logistic regression; without scikit-learn's warnings, as a control needs no optimum to the last digit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=inverse_strength, max_iter=500).fit(features, targets)
