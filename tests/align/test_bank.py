"""The anchor bank: whitened, decorrelated, reproducible, and interpolated in depth."""

from dataclasses import replace

import pytest
import torch
from tiny_adapters import fake_states, tiny_anchors

from uhl_cli.align.bank import build_bank, depth_index
from uhl_cli.errors import AlignmentError

KNOTS = (0.0, 0.5, 1.0)


def make(*, canonical_size=8, width=16, rank=12, knots=KNOTS, seed=0, words=160):
    anchors = tiny_anchors(words)
    states = fake_states(anchors.num_words, width=width, depth=4, rank=rank, seed=seed)
    return build_bank(anchors, states, knots=knots, canonical_size=canonical_size), states


def test_coordinates_are_centred_and_whitened_at_every_knot():
    bank, _ = make()
    assert bank.coordinates.shape == (3, 160, 8)
    assert bank.coordinates.mean(1).abs().max() < 0.05
    torch.testing.assert_close(bank.coordinates.std(1), torch.ones(3, 8), atol=0.06, rtol=0)


def test_coordinates_are_decorrelated():
    bank, states = make(knots=(1.0,))
    off = torch.corrcoef(bank.coordinates[0].T) - torch.eye(8)
    assert off.abs().max() < 0.06
    # Control: the states' own coordinates are correlated.
    raw = torch.corrcoef(states.stream[4][:, :8].T) - torch.eye(8)
    assert raw.abs().max() > 0.3


def test_principal_directions_come_first():
    anchors = tiny_anchors(96)
    states = fake_states(96, width=6, depth=1, rank=6)
    strong = states.stream[1] * 1e-3
    strong[:, 3] = 5 * torch.randn(96, generator=torch.Generator().manual_seed(5))
    bank = build_bank(anchors, replace(states, stream=(strong, strong)), knots=(1.0,), canonical_size=2)
    first = torch.corrcoef(torch.stack([bank.coordinates[0, :, 0], strong[:, 3]]))[0, 1]
    assert first > 0.97  # and its sign is that of the largest component


def test_sign_of_a_direction_is_that_of_its_largest_component():
    generator = torch.Generator().manual_seed(5)
    spread = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    axes = spread * torch.randn(96, 8, generator=generator) + 1
    states = replace(fake_states(96, width=8, depth=1, rank=6), stream=(axes, axes))
    bank = build_bank(tiny_anchors(96), states, knots=(1.0,), canonical_size=8)
    # Each principal direction lies near one axis; were signs left to the solver, about half would point the other way.
    both = torch.corrcoef(torch.cat([bank.coordinates[0].T, axes.T]))[:8, 8:]
    strongest = both.gather(1, both.abs().argmax(1, keepdim=True))
    assert bool((strongest > 0.5).all())


def test_codes_are_what_the_file_can_hold():
    bank, _ = make()
    assert bank.codes.dtype == torch.int8
    assert 3 <= int(bank.codes.abs().max()) <= 7
    assert bool((bank.scales > 0).all())


def test_same_states_give_the_same_bank_and_signs_are_fixed():
    first, states = make()
    second, _ = make()
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    # Words in another order change the arithmetic's rounding, but must not flip a direction.
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    shuffled = replace(states, stream=tuple(state[order] for state in states.stream))
    moved = build_bank(first.anchors, shuffled, knots=KNOTS, canonical_size=8)
    torch.testing.assert_close(moved.coordinates, first.coordinates[:, order], atol=0.3, rtol=0)
    other, _ = make(seed=3)
    assert not torch.equal(first.codes, other.codes)


def test_narrow_host_leaves_the_rest_zero():
    bank, _ = make(canonical_size=20, width=16, rank=16)
    assert not bank.codes[:, :, 16:].any()
    assert not bank.scales[:, 16:].any()
    assert bool(bank.codes[:, :, :16].any(1).all())


def test_directions_that_hold_nothing_stay_zero():
    bank, _ = make(canonical_size=16, width=16, rank=3, knots=(1.0,))
    varied = bank.coordinates[0].std(0) > 0
    assert varied[:3].all()
    assert not varied[3:].any()


def test_depths_between_knots_are_interpolated():
    bank, _ = make()
    c = bank.coordinates
    for index, knot in enumerate(KNOTS):
        assert torch.equal(bank.at_depth(knot), c[index])
    torch.testing.assert_close(bank.at_depth(0.125), 0.75 * c[0] + 0.25 * c[1])
    torch.testing.assert_close(bank.at_depth(0.9), 0.2 * c[1] + 0.8 * c[2], atol=1e-5, rtol=0)
    late, _ = make(knots=(0.5, 1.0))
    assert torch.equal(late.at_depth(0.1), late.coordinates[0])


def test_depth_index_is_the_nearest_layer():
    assert [depth_index(knot, 4) for knot in (0.0, 0.1, 0.13, 0.5, 0.99, 1.0)] == [0, 0, 1, 2, 4, 4]
    assert depth_index(0.5, 3) == 2
    assert depth_index(1.0, 1) == 1


def test_constant_states_are_refused():
    anchors = tiny_anchors(40)
    constant = replace(fake_states(40, width=6, depth=1, rank=2), stream=(torch.ones(40, 6),) * 2)
    with pytest.raises(AlignmentError) as caught:
        build_bank(anchors, constant, knots=(1.0,), canonical_size=4)
    assert caught.value.hint


def test_states_of_other_anchors_are_refused():
    states = fake_states(30, width=6, depth=1, rank=2)
    with pytest.raises(ValueError, match="anchors"):
        build_bank(tiny_anchors(40), states, knots=(1.0,), canonical_size=4)


def test_a_finer_step_comes_closer():
    anchors = tiny_anchors(96)
    states = fake_states(anchors.num_words, width=16, depth=2, rank=6)
    exact, usual, coarse = (
        build_bank(anchors, states, knots=KNOTS, canonical_size=20, step=step) for step in (0.45, 0.75, 2.0)
    )
    varies = exact.coordinates.std(1) > 0
    assert torch.equal(varies, usual.scales > 0)
    assert int(varies.sum()) < varies.numel()  # narrower than canonical space: the rest stays zero
    spread = exact.coordinates.std(1, correction=0)[varies]
    torch.testing.assert_close(spread, torch.ones(int(varies.sum())), atol=0.05, rtol=0)
    errors = [(bank.coordinates - exact.coordinates).square().mean((0, 1)).sum() for bank in (usual, coarse)]
    total = exact.coordinates.square().mean((0, 1)).sum()
    assert errors[0] < 0.09 * total
    assert errors[0] < errors[1] < 0.6 * total
