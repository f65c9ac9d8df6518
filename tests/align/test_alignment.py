"""The law of alignment: a host that holds the same in another basis is found again, and only by its anchors."""

from dataclasses import replace

import torch
from tiny_adapters import fake_states

from uhl_cli.align.alignment import align_anchors, align_size, cosine_basis
from uhl_cli.align.bank import build_bank
from uhl_cli.align.states import WordStates
from uhl_cli.align.texts import choose_anchors, general_texts

WORDS, RANK, DEPTH = 400, 16, 4
KNOTS = (0.0, 0.5, 1.0)


def source():
    anchors = choose_anchors(general_texts(), num_words=WORDS, origin="general")
    states = fake_states(WORDS, width=24, depth=DEPTH, rank=RANK)
    return build_bank(anchors, states, knots=KNOTS, canonical_size=RANK), states


def in_other_basis(states, *, width=40, seed=1):
    """The same states seen by a host of another width: rotated and shifted."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, 24, generator=generator)).Q.T
    shift = 2 * torch.randn(width, generator=generator)
    return WordStates(
        *(tuple(state @ rotation + shift for state in part) for part in (states.stream, states.attention, states.mlp)),
        states.present,
    )


def correlation(left, right):
    """Mean absolute correlation of matching columns."""
    left, right = left - left.mean(0), right - right.mean(0)
    return float(((left * right).sum(0) / (left.norm(dim=0) * right.norm(dim=0))).abs().mean())


def read_z(alignment, states, depth):
    maps = alignment.layers[depth]
    return (states.stream[depth] - maps.mean) @ maps.read.T


def features(alignment, states):
    return (
        sum(states.stream[depth] @ weight.T for depth, weight in alignment.depth_weights.items()) + alignment.depth_bias
    )


def test_another_basis_is_found_by_the_anchors():
    bank, states = source()
    other = in_other_basis(states)
    found = align_anchors(bank, other)
    assert (found.strategy, found.width, found.num_hidden_layers) == ("anchors", 40, DEPTH)
    assert min(found.quality) > 0.9
    assert min(found.knot_quality) > 0.9
    for depth in range(DEPTH + 1):
        assert correlation(read_z(found, other, depth), bank.at_depth(depth / DEPTH)) > 0.95
    wanted = bank.coordinates.permute(1, 0, 2).reshape(WORDS, -1)
    assert correlation(features(found, other), wanted) > 0.95
    error = (features(found, other) - wanted).square().mean() / wanted.square().mean()
    assert error < 0.1


def test_size_alone_does_not_find_it():
    bank, states = source()
    other = in_other_basis(states)
    blind = align_size(bank, hidden_size=40, num_hidden_layers=DEPTH)
    assert blind.quality == blind.knot_quality == ()
    for depth in range(DEPTH + 1):
        assert correlation(read_z(blind, other, depth), bank.at_depth(depth / DEPTH)) < 0.35
    assert torch.equal(
        blind.layers[0].read, align_size(bank, hidden_size=40, num_hidden_layers=2).layers[1].read
    )  # it knows the width and nothing else


def test_shuffled_words_do_not_align():
    bank, states = source()
    other = in_other_basis(states)
    order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(2))
    shuffled = WordStates(
        *(tuple(state[order] for state in part) for part in (other.stream, other.attention, other.mlp)), other.present
    )
    found = align_anchors(bank, shuffled)
    assert max(found.quality) < 0.1
    assert max(found.knot_quality) < 0.1


def test_write_maps_lead_back_into_the_stream():
    bank, states = source()
    other = in_other_basis(states)
    found = align_anchors(bank, other)
    for depth in range(DEPTH + 1):
        maps, stream = found.layers[depth], other.stream[depth]
        z = read_z(found, other, depth)
        spread = (stream - stream.mean(0)).square().sum()
        error = (z @ maps.write_stream.T + maps.mean - stream).square().sum() / spread
        assert error < 0.12
        wrong = (z.roll(1, dims=0) @ maps.write_stream.T + maps.mean - stream).square().sum() / spread
        assert wrong > 0.5
    for depth in range(DEPTH):
        maps = found.layers[depth]
        assert maps.write_attention is not maps.write_stream  # here attention reads something else
        for place, write in ((other.attention, maps.write_attention), (other.mlp, maps.write_mlp)):
            centred = place[depth] - place[depth].mean(0)
            assert (bank.at_depth(depth / DEPTH) @ write.T - centred).square().sum() / centred.square().sum() < 0.25
            assert not torch.allclose(write, maps.write_stream, atol=0.1)


def test_words_that_a_host_never_saw_take_no_part():
    bank, states = source()
    other = in_other_basis(states)
    present = torch.ones(WORDS, dtype=torch.bool)
    present[100:180] = False
    rubbish = tuple(torch.where(present[:, None], state, 1e6) for state in other.stream)
    found = align_anchors(bank, replace(other, stream=rubbish, present=present))
    assert min(found.quality) > 0.9
    assert max(align_anchors(bank, replace(other, stream=rubbish)).quality) < 0.9  # the control


def test_another_depth_is_aligned_by_normalised_depth():
    bank, states = source()
    other = in_other_basis(states)
    half = WordStates(other.stream[::2], other.attention[::2], other.mlp[::2], other.present)
    found = align_anchors(bank, half)
    assert [maps.depth for maps in found.layers] == [0.0, 0.5, 1.0]
    assert min(found.quality) > 0.9


def test_only_the_depths_asked_for_are_read():
    bank, states = source()
    other = in_other_basis(states)
    assert set(align_anchors(bank, other, readout_depths=(0, 2, 4)).depth_weights) <= {0, 2, 4}
    single = align_anchors(bank, other, readout_depths=(3,))
    assert set(single.depth_weights) == {3}
    assert single.depth_bias.shape == (3 * RANK,)
    assert correlation(features(single, other), bank.coordinates.permute(1, 0, 2).reshape(WORDS, -1)) > 0.95


def test_knots_may_choose_their_own_depth_or_all():
    """What only the sum of two depths shows is read from both; noise elsewhere makes one depth the better choice."""
    generator = torch.Generator().manual_seed(3)
    anchors = choose_anchors(general_texts(), num_words=WORDS, origin="general")
    latent = torch.randn(WORDS, 8, generator=generator)
    full = fake_states(WORDS, width=8, depth=1, rank=8, latent=latent)
    bank = build_bank(anchors, full, knots=(1.0,), canonical_size=8)
    halves = replace(full, stream=(torch.cat([latent[:, :4]] * 2, dim=1), torch.cat([latent[:, 4:]] * 2, dim=1)))
    joint = align_anchors(bank, halves)
    assert set(joint.depth_weights) == {0, 1}
    assert joint.knot_quality[0] > 0.9 > align_anchors(bank, halves, readout_depths=(1,)).knot_quality[0]
    noisy = replace(full, stream=(torch.randn(WORDS, 150, generator=generator)[:, :8], full.stream[1]))
    assert set(align_anchors(bank, noisy).depth_weights) == {1}


def test_cosine_basis_is_orthonormal():
    for rows, columns in ((5, 12), (12, 5), (8, 8)):
        basis = cosine_basis(rows, columns)
        rank = min(rows, columns)
        torch.testing.assert_close(basis[:rank] @ basis[:rank].T, torch.eye(rank), atol=1e-5, rtol=0)
        assert not basis[rank:].any()
