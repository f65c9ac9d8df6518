"""A folded edit is the update of DESIGN 2.6, computed here by hand from what it was folded from."""

import pytest
import torch
from tiny_adapters import SMALL, all_depths, host_bank, random_adapter, tiny_folded, unpacked
from tiny_hosts import FAMILIES, SENTENCES, tiny_host

from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.canonical import mix, size_gains
from uhl_cli.adapter.fold import fold
from uhl_cli.adapter.module import WRITERS
from uhl_cli.align.alignment import align_anchors
from uhl_cli.host.encode import encode
from uhl_cli.host.hostmap import read_layer_input
from uhl_cli.host.running import frozen
from uhl_cli.ported.model import forward


def run(host, folded, **options):
    """Logits and active atoms of a few sentences."""
    encoded = encode(host, SENTENCES[:5])
    with torch.inference_mode(), attach(host.map, folded, **options) as attachment:
        return forward(host, attachment, encoded, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_gathered_agree(family):
    host = tiny_host(family)
    folded, _, _ = tiny_folded(host)
    gathered, active = run(host, folded)
    dense, dense_active = run(host, folded, dense=True)
    torch.testing.assert_close(dense, gathered, atol=1e-5, rtol=1e-5)
    assert float(active) == pytest.approx(float(dense_active))
    assert 0 < float(active) < 2
    silent, _, _ = tiny_folded(host, zero=True)
    assert not torch.allclose(run(host, silent)[0], gathered, atol=1e-3)  # the control: updates matter


def observe(host, folded, kind, layer_index):
    """Stream entering a layer, and a linear's raw and changed output, [T, features] each, in one attached pass."""
    layer = host.map.layers[layer_index]
    linear = layer.target_modules[kind]
    seen = {}

    def stream(_module, args, kwargs):
        seen["stream"] = read_layer_input(args, kwargs).detach().clone()

    def keep(name):
        def hook(_module, _args, output):
            seen[name] = output[..., linear.columns].detach().clone()

        return hook

    def read(_module, args):
        weight, bias = linear.weight(), linear.bias()
        seen["raw"] = torch.nn.functional.linear(args[0], weight, bias).detach().clone()

    # Hooks run in the order of their registration, so one sees the input before the edit, and one the output after it.
    handles = [
        layer.module.register_forward_pre_hook(stream, with_kwargs=True),
        linear.module.register_forward_pre_hook(read),
    ]
    with torch.inference_mode(), attach(host.map, folded):
        handles.append(linear.module.register_forward_hook(keep("changed")))
        host.model(**encode(host, SENTENCES[:4]).model_inputs())
    for handle in handles:
        handle.remove()
    return {name: value.flatten(0, 1) for name, value in seen.items()}


def route_by_hand(stored, z):
    """Chosen atoms and weights of one token."""
    logits = stored["router"] @ z + stored["task_router"] @ stored["task_embedding"]
    best = sorted(range(len(logits)), key=lambda atom: -float(logits[atom]))[:2]
    shares = torch.softmax(logits[best], dim=0)
    return [
        (atom, float(share))
        for rank, (atom, share) in enumerate(zip(best, shares, strict=True))
        if logits[atom] > stored["threshold"][rank]
    ]


@pytest.mark.parametrize("family", ["bert", "electra", "llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["q", "k", "v", "o", "up", "down", "gate"])
def test_edit_equals_the_construction_by_hand(family, kind):
    host = tiny_host(family)
    if kind not in host.map.layers[1].target_modules:
        assert kind == "gate"
        return
    folded, alignment, stored = tiny_folded(host)
    seen = observe(host, folded, kind, layer_index=1)
    maps, linear = alignment.layers[1], host.map.layers[1].target_modules[kind]
    read_gain, write_gain = size_gains(stored, host.hidden_size)
    inward = read_gain[:, None] * maps.read
    write = {"o": maps.write_stream, "down": maps.write_stream, "up": maps.write_mlp, "gate": maps.write_mlp}
    outward = write.get(kind, maps.write_attention) * write_gain
    gain = mix(stored, maps.depth, kind)
    fired = []
    expected = torch.zeros_like(seen["raw"])
    for token, state in enumerate(seen["stream"]):
        z = inward @ (state - maps.mean)
        chosen = route_by_hand(stored, z)
        fired.append(len(chosen))
        edited = inward @ seen["raw"][token] if kind in WRITERS else z  # a writer's own output is a direction
        delta = torch.zeros(host.hidden_size)
        for atom, share in chosen:
            response = stored["atoms_v"][atom] @ edited
            delta += gain[atom] * share * response * (outward @ stored["atoms_u"][atom])
        expected[token] = delta if kind in WRITERS else linear.weight() @ delta
    change = seen["changed"] - seen["raw"]
    scale = float(expected.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(change, expected, atol=2e-4 * scale + 1e-5, rtol=1e-3)
    assert {0, 1, 2} & set(fired) != {0}
    assert not torch.allclose(change, expected.roll(1, dims=0), atol=0.1 * scale)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_readout_equals_the_construction_by_hand(family):
    host = tiny_host(family)
    folded, alignment, stored = tiny_folded(host)
    encoded = encode(host, SENTENCES[:1])
    states = []
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _module, args, kwargs: states.append(read_layer_input(args, kwargs)), with_kwargs=True
        )
        for layer in host.map.layers
    ]
    with torch.inference_mode(), attach(host.map, folded) as attachment:
        final = host.model(**encoded.model_inputs()).last_hidden_state
        found = attachment.readout_features(final)[0]
    for handle in handles:
        handle.remove()
    states.append(final)
    read_gain, _ = size_gains(stored, host.hidden_size)
    gain, maps = mix(stored, 1.0, "readout"), alignment.layers[-1]
    for token in range(len(found)):
        z = (
            sum(weight @ states[depth][0, token] for depth, weight in alignment.depth_weights.items())
            + alignment.depth_bias
        )
        z = z * read_gain.repeat(3)
        own = read_gain * (maps.read @ (final[0, token] - maps.mean))
        # The update edits the canonical coordinates of the last knot themselves.
        for atom, share in route_by_hand(stored, own):
            z[-9:] += gain[atom] * share * (stored["atoms_v"][atom] @ own) * stored["atoms_u"][atom]
        expected = stored["readout_in_weight"] @ z + stored["readout_in_bias"]
        torch.testing.assert_close(found[token], expected, atol=1e-4, rtol=1e-3)


def test_folding_leaves_out_what_it_is_told_to():
    host = tiny_host("llama")
    bank, states = host_bank(host)
    alignment = align_anchors(bank, states)
    stored = {name: value.detach() for name, value in random_adapter().stored().items()}
    some = fold(stored, alignment, host.map, layers=(1,), types=("q", "down"))
    assert set(some.by_layer) == {1}
    assert set(some.by_layer[1].gains) == {"q", "down"}
    assert set(some.by_layer[1].edits) == {"attention", "stream"}
    assert some.readout.layer is None
    full = fold(stored, alignment, host.map)
    assert set(full.by_layer) == {0, 1}
    assert set(full.by_layer[0].gains) == {"q", "k", "v", "o", "up", "down", "gate"}
    assert set(full.by_layer[0].edits) == {"attention", "mlp", "stream"}
    assert full.readout.layer is not None
    none = fold(stored, alignment, host.map, updates=False)
    assert not none.layers
    assert none.readout.layer is None
    assert set(none.readout.depth_weights) == set(full.readout.depth_weights)
    assert not fold(stored, alignment, host.map, types=("readout",)).layers


def test_folding_carries_gradients_to_the_parameters_and_none_to_the_host():
    host = tiny_host("bert")
    bank, states = host_bank(host)
    adapter = random_adapter()
    folded = fold(adapter.stored(), all_depths(align_anchors(bank, states)), host.map)
    with frozen(host.map.base), attach(host.map, folded, dense=True) as attachment:
        logits, active = forward(host, attachment, encode(host, SENTENCES[:5]), None)
    (logits.square().sum() + active).backward()
    untouched = {name for name, value in adapter.named_parameters() if value.grad is None or not value.grad.any()}
    assert untouched == {"delta_theta", "head_weight", "head_bias"}
    assert all(value.grad is None for value in host.model.parameters())


def test_moving_detaches_and_casts():
    adapter, host = random_adapter(), tiny_host("bert")
    bank, states = host_bank(host)
    folded = fold(adapter.stored(), align_anchors(bank, states), host.map)
    assert folded.by_layer[0].router.requires_grad
    assert folded.noise_maps
    moved = unpacked(folded, torch.bfloat16)
    assert list(moved.state_dict()) == list(folded.state_dict())
    assert all(part.dtype == torch.bfloat16 and not part.requires_grad for part in moved.buffers())
    assert not moved.noise_maps
    assert moved.kind == "sequence"
    tokens = random_adapter(SMALL.model_copy(update={"kind": "tokens"})).stored()
    assert fold(tokens, align_anchors(bank, states), host.map).kind == "tokens"
