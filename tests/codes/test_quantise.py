"""Quantisation in training is quantisation in the file."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uhl_cli.codes.packing import pack_levels
from uhl_cli.codes.quantise import (
    codes_and_scales,
    dequantise,
    fake_quantise,
    largest_code,
    quantise_columns,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_largest_code():
    assert (largest_code(4), largest_code(8)) == (7, 127)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.integers(-20, 20), st.booleans())
def test_what_training_sees_is_what_the_file_gives(seed, bits, exponent, vector):
    values = random(33, seed=seed) if vector else random(5, 9, seed=seed)
    values = values * 10.0**exponent
    codes, scales = codes_and_scales(values, bits)
    assert codes.dtype == torch.int8
    assert codes.shape == values.shape
    assert scales.shape == ((1,) if vector else (5,))
    assert int(codes.abs().max()) == largest_code(bits)
    stored = fake_quantise(values, bits)
    assert torch.equal(stored, dequantise(codes, scales))
    assert torch.equal(stored, (codes.reshape(len(scales), -1).float() * scales[:, None]).reshape(values.shape))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 8]))
def test_quantising_twice_changes_nothing(seed, bits):
    once = fake_quantise(random(6, 11, seed=seed), bits)
    assert torch.equal(fake_quantise(once, bits), once)
    assert torch.equal(codes_and_scales(once, bits)[0], codes_and_scales(random(6, 11, seed=seed), bits)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_step(bits):
    values = random(20, 50)
    _, scales = codes_and_scales(values, bits)
    error = (fake_quantise(values, bits) - values).abs()
    assert bool((error <= 0.5001 * scales[:, None]).all())
    assert error.max() > 0.4 * scales.max()
    assert error.max() < 0.6 * values.abs().max() / largest_code(bits)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_value_with_gradient_is_the_stored_value(requires_grad):
    values = random(4, 7).requires_grad_(requires_grad)
    stored = dequantise(*codes_and_scales(values, 8))
    assert torch.equal(fake_quantise(values, 8).detach(), stored)


def test_gradient_passes_straight_through():
    values = random(4, 7).requires_grad_()
    weight = random(4, 7, seed=1)
    (fake_quantise(values, 4) * weight).sum().backward()
    assert torch.equal(values.grad, weight)


def test_rows_of_zeros_stay_zero_beside_others():
    values = random(3, 5)
    values[1] = 0
    codes, scales = codes_and_scales(values, 4)
    assert scales[1] == 0
    assert not codes[1].any()
    assert fake_quantise(values, 4).isfinite().all()
    assert not fake_quantise(torch.zeros(3, 5), 8).any()


def test_small_rows_keep_their_own_scale():
    values = torch.stack([random(8), 1e-6 * random(8)])
    assert fake_quantise(values, 8)[1].any()
    torch.testing.assert_close(fake_quantise(values, 8)[1] * 1e6, fake_quantise(values[1] * 1e6, 8))


@pytest.mark.parametrize(("step", "error", "bits"), [(0.4, 0.02, 3.45), (0.75, 0.06, 2.6), (2.0, 0.5, 1.3)])
def test_columns_keep_slope_and_err_by_their_step(step, error, bits):
    values = random(4000, 5) * torch.tensor([0.01, 1, 5, 100, 0])
    values = values - values.mean(0)
    codes, scales = quantise_columns(values, step)
    stored = (codes.float() * scales)[:, :4]
    centred = values[:, :4]
    slope = (centred * stored).sum(0) / centred.square().sum(0)
    torch.testing.assert_close(slope, torch.ones(4), atol=1e-4, rtol=0)
    assert bool(((stored - centred).square().mean(0) / centred.square().mean(0) < error).all())
    assert 8 * len(pack_levels(codes[:, :4].numpy())) / stored.numel() < bits
    assert scales[4] == 0
    assert not codes[:, 4].any()  # a constant column stays what it is


def test_tails_are_clipped():
    values = random(300, 12) ** 3
    codes, _ = quantise_columns(values, 0.3)
    assert int(codes.abs().max()) == 7


def test_columns_of_zeros():
    values = random(10, 3)
    values[:, 1] = 0
    codes, scales = quantise_columns(values, 0.75)
    assert scales[1] == 0
    assert not codes[:, 1].any()
    assert bool((scales[[0, 2]] > 0).all())
