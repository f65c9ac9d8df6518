"""The canonical adapter: nothing at its start, mixing by depth and type, routing of at most k atoms."""

import pytest
import torch
from tiny_adapters import SMALL, random_adapter

from uhl_cli.adapter.canonical import CanonicalAdapter, mix, route, size_gains
from uhl_cli.codes.layout import BITS, bits_of, parameter_shapes
from uhl_cli.schema import UPDATE_TYPES


def logits(tokens=40, atoms=7, seed=0):
    return torch.randn(tokens, atoms, generator=torch.Generator().manual_seed(seed))


def test_a_new_adapter_updates_nothing():
    adapter = CanonicalAdapter(SMALL)
    assert adapter.updates_are_zero
    with torch.no_grad():
        adapter.get_parameter("atoms_u")[3, 4] = 1e-8
    assert not adapter.updates_are_zero


def test_parameters_are_those_of_the_layout_and_follow_the_seed():
    adapter, again, other = CanonicalAdapter(SMALL), CanonicalAdapter(SMALL), CanonicalAdapter(SMALL, seed=1)
    assert {name: tuple(value.shape) for name, value in adapter.named_parameters()} == parameter_shapes(SMALL)
    assert all(torch.equal(value, again.get_parameter(name)) for name, value in adapter.named_parameters())
    assert not torch.equal(adapter.get_parameter("atoms_v"), other.get_parameter("atoms_v"))
    frozen = {name for name, value in adapter.named_parameters() if not value.requires_grad}
    assert frozen == {"delta_theta", "head_weight", "head_bias"}
    assert "readout_pool" not in parameter_shapes(SMALL.model_copy(update={"kind": "tokens"}))


def test_stored_values_have_few_levels_and_pass_gradients():
    adapter = random_adapter()
    stored = adapter.stored()
    for name, value in stored.items():
        rows = value.detach().reshape(-1, value.shape[-1])
        assert max(len(row.abs().unique()) for row in rows) <= 2 ** (bits_of(name) - 1), name
    assert not torch.equal(stored["mixer_out_weight"], adapter.get_parameter("mixer_out_weight"))
    stored["atoms_u"].sum().backward()
    assert torch.equal(adapter.get_parameter("atoms_u").grad, torch.ones(7, 9))
    assert set(BITS) <= set(stored)


def test_mixing_changes_with_depth_and_type():
    stored = {name: value.detach() for name, value in random_adapter().stored().items()}
    base = mix(stored, 0.25, "q")
    assert base.shape == (7,)
    for depth, update_type in ((0.75, "q"), (0.25, "k"), (0.25, "readout")):
        assert (mix(stored, depth, update_type) - base).abs().max() > 0.01
    assert torch.equal(mix(stored, 0.25, "q"), base)


def test_delta_theta_shifts_its_own_type_alone():
    adapter = random_adapter()
    before = {name: value.detach() for name, value in adapter.stored().items()}
    with torch.no_grad():
        adapter.get_parameter("delta_theta").zero_()
        adapter.get_parameter("delta_theta")[UPDATE_TYPES.index("v")] = 0.5
    after = {name: value.detach() for name, value in adapter.stored().items()}
    plain = {**before, "delta_theta": torch.zeros_like(before["delta_theta"])}
    torch.testing.assert_close(mix(after, 0.3, "v"), mix(plain, 0.3, "v") + 0.5)
    torch.testing.assert_close(mix(after, 0.3, "q"), mix(plain, 0.3, "q"))


@pytest.mark.parametrize("width", [8, 128, 768, 8192])
def test_size_gains_are_positive_and_one_at_the_start(width):
    fresh = {name: value.detach() for name, value in CanonicalAdapter(SMALL).stored().items()}
    for gain in size_gains(fresh, width):
        torch.testing.assert_close(gain, torch.ones(9))
    wild = {name: 5 * value.detach() for name, value in random_adapter().stored().items()}
    read, write = size_gains(wild, width)
    assert read.shape == write.shape == (9,)
    assert min(read.min(), write.min()) > 0
    assert not torch.allclose(read, write)
    assert not torch.allclose(read, size_gains(wild, width * 2)[0])


@pytest.mark.parametrize("top_k", [1, 2])
def test_at_most_k_atoms_are_chosen_and_they_are_the_best(top_k):
    values = logits()
    routing = route(values, torch.full((top_k,), 0.8))
    assert routing.indices.shape == routing.weights.shape == (40, top_k)
    assert torch.equal(routing.indices[:, 0], values.argmax(1))
    fires = values.gather(1, routing.indices) > 0.8
    assert torch.equal(routing.weights > 0, fires)
    assert torch.equal(routing.fires, fires.float())
    assert {0.0, 1.0} <= set(routing.fires.flatten().tolist())


def test_no_atom_fires_below_its_threshold_and_all_fire_above():
    none = route(logits(), torch.tensor([50.0, 50.0]))
    assert not none.weights.any()
    assert not none.fires.any()
    both = route(logits(), torch.tensor([-50.0, -50.0]))
    torch.testing.assert_close(both.weights.sum(1), torch.ones(40))
    assert both.fires.all()
    assert bool((both.weights[:, 0] > both.weights[:, 1]).all())
    first = route(logits(), torch.tensor([-50.0, 50.0]))
    assert first.fires.eq(torch.tensor([1.0, 0.0])).all()
    assert torch.equal(first.weights[:, 0], both.weights[:, 0])  # the softmax is over the chosen, fire or not


def test_gates_pass_gradients_to_threshold_and_logits():
    values, threshold = logits().requires_grad_(), torch.tensor([0.5, 0.5], requires_grad=True)
    routing = route(values, threshold)
    hard = route(values.detach(), threshold.detach())
    assert torch.equal(routing.fires.detach().round(), hard.fires)
    torch.testing.assert_close(routing.weights.detach(), hard.weights)
    routing.fires.sum().backward()
    assert bool((threshold.grad < 0).all())  # a higher threshold, fewer atoms
    assert values.grad.any()
