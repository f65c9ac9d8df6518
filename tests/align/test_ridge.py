"""Ridge regression: closed form, strength by held-out groups, honest R^2."""

import numpy as np
import pytest
import torch

from uhl_cli.align.ridge import STRENGTHS, fit_ridge, fit_ridges
from uhl_cli.errors import AlignmentError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_exact_linear_map_is_recovered():
    x, weight = normal(500, 6), normal(6, 3, seed=1)
    fit = fit_ridge(x + 5, x @ weight - 2, torch.arange(500))
    assert fit.strengths.tolist() == pytest.approx([min(STRENGTHS)] * 3)
    torch.testing.assert_close(fit.weight, weight, atol=0.01, rtol=0.01)
    predicted = (normal(9, 6, seed=2) + 5 - fit.input_mean) @ fit.weight + fit.output_mean
    torch.testing.assert_close(predicted, normal(9, 6, seed=2) @ weight - 2, atol=0.02, rtol=0.02)
    assert fit.r2.min() > 0.999


@pytest.mark.parametrize(("rows", "features"), [(60, 10), (30, 80), (40, 40)])
def test_map_is_the_closed_form_solution(rows, features):
    x = normal(rows, features) * torch.linspace(0.1, 30, features) + 4
    y = x[:, :4] @ normal(4, 5, seed=3) + normal(rows, 5, seed=4)
    fit = fit_ridge(x, y, torch.arange(rows))
    standard = x.double().numpy()
    mean, deviation = standard.mean(0), standard.std(0)
    standard = (standard - mean) / deviation
    target = y.double().numpy() - y.double().numpy().mean(0)
    gram = standard.T @ standard

    def solution(output, factor):
        # The strength is relative to the mean eigenvalue of the smaller of the two Gram matrices.
        penalty = factor * float(fit.strengths[output]) * np.trace(gram) / min(rows, features)
        return np.linalg.solve(gram + penalty * np.eye(features), standard.T @ target[:, output]) / deviation

    for output in range(5):
        np.testing.assert_allclose(fit.weight[:, output].numpy(), solution(output, 1), rtol=1e-4, atol=1e-6)
        assert not np.allclose(fit.weight[:, output].numpy(), solution(output, 1.1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fit.input_mean.numpy(), mean, rtol=1e-5)


def test_each_output_gets_the_strength_that_serves_it():
    x = normal(80, 40)
    law, faint = x[:, :1] * 2, x[:, 1:2] * 0.3 + normal(80, 1, seed=1)
    both = fit_ridge(x, torch.cat([law, faint], dim=1), torch.arange(80))
    assert both.strengths[0] < both.strengths[1]
    alone = fit_ridge(x, faint, torch.arange(80))
    torch.testing.assert_close(both.weight[:, 1], alone.weight[:, 0])
    forced = fit_ridge(x, faint, torch.arange(80), strengths=(float(both.strengths[0]),))
    assert forced.r2[0] < both.r2[1]


@pytest.mark.parametrize(("rows", "features"), [(400, 10), (100, 200), (100, 90)])
def test_several_outputs_are_fitted_as_each_alone(rows, features):
    x, groups = normal(rows, features), torch.arange(rows) // 3
    several = [x[:, :2] @ normal(2, 3, seed=1), normal(rows, 7, seed=2), x[:, :1] + normal(rows, 1, seed=3)]
    for found, outputs in zip(fit_ridges(x, several, groups), several, strict=True):
        alone = fit_ridge(x, outputs, groups)
        for name in ("weight", "input_mean", "output_mean", "r2", "strengths"):
            assert torch.equal(getattr(found, name), getattr(alone, name)), name


@pytest.mark.parametrize(("rows", "features"), [(400, 10), (100, 200)])
def test_r2_tells_a_law_from_noise(rows, features):
    x = normal(rows, features)
    law = x[:, :1] * torch.tensor([1.0, -2.0]) if features < rows else normal(rows, 3, seed=6)
    if features > rows:  # many features that carry few directions
        x = law @ normal(3, features, seed=7)
    fit = fit_ridge(x, torch.cat([law, normal(rows, 3, seed=5)], dim=1), torch.arange(rows) // 4)
    signal, noise = fit.r2[: law.shape[1]], fit.r2[law.shape[1] :]
    assert signal.min() > 0.8
    assert noise.abs().max() < 0.2
    assert fit_ridge(x, law, torch.arange(rows) // 4).r2.min() > 0.99


def test_rows_of_a_group_stay_together():
    groups = torch.arange(240) // 6
    x, y = normal(40, 60)[groups], normal(40, 4, seed=1)[groups]
    assert fit_ridge(x, y, groups).r2.max() <= 0.1
    # Control: with groups torn apart, the held-out rows have been seen and noise looks like a law.
    assert fit_ridge(x, y, torch.arange(240)).r2.min() > 0.5


def test_a_single_group_is_split_by_rows():
    x = normal(80, 3)
    assert fit_ridge(x, x @ normal(3, 2, seed=1), torch.zeros(80, dtype=torch.long)).r2.min() > 0.99


def test_constant_feature_gets_no_weight():
    x = normal(50, 4)
    x[:, 2] = 7.0
    fit = fit_ridge(x, x[:, :2], torch.arange(50))
    assert not fit.weight[2].any()
    assert bool((fit.weight[[0, 1]].abs().amax(1) > 0.5).all())


def test_constant_output_has_no_quality_and_no_map():
    x = normal(50, 4)
    y = torch.cat([x[:, :1], torch.full((50, 1), 3.0)], dim=1)
    fit = fit_ridge(x, y, torch.arange(50))
    assert fit.r2[1] == 0
    assert fit.r2[0] > 0.99
    torch.testing.assert_close(x @ fit.weight[:, 1] + fit.output_mean[1], torch.full((50,), 3.0))


@pytest.mark.parametrize("features", [5, 90])
def test_predictions_do_not_depend_on_a_features_scale(features):
    x = normal(60, features)
    y = x[:, :3] @ normal(3, 2, seed=1) + 0.3 * normal(60, 2, seed=2)
    scaled = x.clone()
    scaled[:, 1] *= 1000
    plain, large = fit_ridge(x, y, torch.arange(60)), fit_ridge(scaled, y, torch.arange(60))
    assert torch.equal(plain.strengths, large.strengths)
    torch.testing.assert_close(
        (x - plain.input_mean) @ plain.weight, (scaled - large.input_mean) @ large.weight, atol=1e-4, rtol=1e-4
    )
    assert (plain.weight[1] / large.weight[1]).mean() == pytest.approx(1000, rel=1e-2)


def test_outputs_of_any_scale_count_alike():
    x = normal(100, 30)
    y = x[:, :2] @ normal(2, 3, seed=1) + normal(100, 3, seed=2)
    plain = fit_ridge(x, y, torch.arange(100))
    scaled = fit_ridge(x, y * torch.tensor([1, 1e4, 1e-4]), torch.arange(100))
    assert torch.equal(plain.strengths, scaled.strengths)
    torch.testing.assert_close(plain.r2, scaled.r2)


def test_bad_rows_are_refused():
    with pytest.raises(AlignmentError, match="7 anchor words") as caught:
        fit_ridge(normal(7, 2), normal(7, 2), torch.arange(7))
    assert caught.value.hint
    with pytest.raises(AlignmentError, match="same for all") as caught:
        fit_ridge(torch.full((20, 3), 2.5), normal(20, 2), torch.arange(20))
    assert caught.value.hint
    assert fit_ridge(normal(8, 2), normal(8, 2), torch.arange(8)).weight.isfinite().all()
