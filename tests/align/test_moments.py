"""Ridge from moments: what a regression over all rows at once gives, whatever the batches."""

import pytest
import torch

from uhl_cli.align.moments import STRENGTHS, Moments, fit_moments


def rows(count, *, width=12, outputs=3, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, outputs, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, width, generator=generator) * torch.linspace(0.1, 30, width) + 50
    return x, x @ weight + 7 + noise * torch.randn(count, outputs, generator=generator)


def moments_of(x, y, *, batch=17):
    found = Moments()
    for start in range(0, len(x), batch):
        found.add(x[start : start + batch], y[start : start + batch])
    return found


@pytest.mark.parametrize("batch", [1, 17, 1000])
def test_equals_the_regression_over_all_rows(batch):
    x, y = rows(400)
    held_x, held_y = rows(100, seed=1)
    weight, offset, r2 = fit_moments(moments_of(x, y, batch=batch), moments_of(held_x, held_y, batch=batch))
    # Rows without noise to speak of want the weakest ridge; this is its closed form, standardised like the code says.
    every_x, every_y = torch.cat([x, held_x]).double(), torch.cat([y, held_y]).double()
    spread = x.double().std(0, correction=0)
    centred = (every_x - every_x.mean(0)) / spread
    gram = centred.T @ centred + STRENGTHS[0] * len(every_x) * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(gram, centred.T @ (every_y - every_y.mean(0))) / spread[:, None]
    torch.testing.assert_close(weight, expected.float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(held_x @ weight + offset, held_y, atol=2.0, rtol=0.05)
    assert bool((r2 > 0.99).all())


def test_strength_is_chosen_for_every_output():
    x, y = rows(60, width=40, outputs=2, noise=0.0)
    held_x, held_y = rows(60, width=40, outputs=2, noise=0.0, seed=1)
    generator = torch.Generator().manual_seed(5)
    noise, held_noise = torch.randn(60, 1, generator=generator), torch.randn(60, 1, generator=generator)
    weight, offset, r2 = fit_moments(
        moments_of(x, torch.cat([y, noise], 1)), moments_of(held_x, torch.cat([held_y, held_noise], 1))
    )
    assert bool((r2[:2] > 0.5).all())
    assert float(r2[2]) < 0.1  # noise cannot be predicted
    fitted = held_x @ weight + offset
    assert float(fitted[:, 2].std()) < 0.7 * float(held_noise.std())  # so it is shrunk towards its mean


def test_part_is_the_moments_of_those_inputs():
    x, y = rows(200)
    held_x, held_y = rows(80, seed=1)
    whole = fit_moments(moments_of(x, y).part(slice(2, 7)), moments_of(held_x, held_y).part(slice(2, 7)))
    alone = fit_moments(moments_of(x[:, 2:7], y), moments_of(held_x[:, 2:7], held_y))
    for one, other in zip(whole, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_a_constant_input_and_a_constant_output_are_no_trouble():
    x, y = rows(100)
    x[:, 3], y[:, 1] = 4.0, -2.0
    held_x, held_y = rows(50, seed=1)
    held_x[:, 3], held_y[:, 1] = 4.0, -2.0
    weight, offset, r2 = fit_moments(moments_of(x, y), moments_of(held_x, held_y))
    assert torch.isfinite(weight).all()
    assert not weight[3].any()
    torch.testing.assert_close((held_x @ weight + offset)[:, 1], held_y[:, 1], atol=1e-3, rtol=0)
    assert float(r2[1]) == pytest.approx(0.0, abs=1e-3)


def test_shrinks_towards_a_prior_that_helps_and_past_one_that_does_not():
    width = 40
    truth = torch.randn(width, 3, generator=torch.Generator().manual_seed(99))
    x, y = rows(80, width=width, noise=300.0)
    held_x, held_y = rows(80, width=width, noise=300.0, seed=1)
    few = moments_of(x, y), moments_of(held_x, held_y)
    errors = {}
    for name, prior in (("none", None), ("true", truth), ("wrong", -truth)):
        weight, offset, _ = fit_moments(*few, prior=prior)
        new_x, new_y = rows(500, width=width, noise=0.0, seed=2)
        errors[name] = float((new_x @ weight + offset - new_y).square().mean())
    assert errors["true"] < 0.3 * errors["none"]  # noisy rows: the prior is worth more than they are
    assert errors["none"] < errors["wrong"]
    x, y = rows(4000, width=width)
    held_x, held_y = rows(1000, width=width, seed=1)
    many = moments_of(x, y), moments_of(held_x, held_y)
    weight, _, _ = fit_moments(*many, prior=-truth)
    torch.testing.assert_close(weight, truth, atol=0.05, rtol=0.05)  # rows enough undo a wrong one
