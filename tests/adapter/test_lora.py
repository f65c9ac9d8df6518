"""LoRA by hooks: what peft's layers compute, nothing when B is zero, and the host as before afterwards."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from test_attach import hooks_of, output_of, parameters_of
from tiny_adapters import meta_twin, random_lora, tiny_folded
from tiny_hosts import FAMILIES, SENTENCES, tiny_host
from torch import Tensor, nn

from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.low_rank import RANK, Expansion
from uhl_cli.adapter.module import LoraFactors, PortedAdapter, linear_modules
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import encode

COUNT = 1024
GOLDEN = {
    "bert": "93dd49bfa312f77bc0a89283fb2ac888d95ea80c4fb5fd89f390692289237014",
    "gpt2": "86384128357fb137d1a4b77e08e70021105db56537d0d197df8eeac6420a7efb",
    "llama": "40e3f696d3afab220e98c61e994254d170391cc387c98762e102af11248f3b9e",
}


def aligned_file(host: Host, lora: LoraFactors) -> PortedAdapter:
    """The readout alone with the LoRA, as a tuned host carries it."""
    return tiny_folded(host)[0].without_updates().with_lora(lora)


def by_peft(host: Host, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of the host with peft's LoRA layers, which hold these A and B."""
    config = LoraConfig(r=3, lora_alpha=3, target_modules=list(factors), lora_dropout=0.0)
    model = get_peft_model(copy.deepcopy(host.model), config).eval()
    layers = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert set(layers) == set(factors)
    with torch.no_grad():
        for name, (down, up) in factors.items():
            layers[name].lora_A["default"].weight.copy_(down)
            layers[name].lora_B["default"].weight.copy_(up)
    return model


def states_of(model: nn.Module, host: Host) -> Tensor:
    with torch.inference_mode():
        return model(**encode(host, SENTENCES[:6]).model_inputs()).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_that_of_pefts_layers(family):
    host = tiny_host(family)
    factors = random_lora(host).by_module
    bare = output_of(host)
    with attach(host.map, aligned_file(host, LoraFactors(factors))):
        found = output_of(host)
    torch.testing.assert_close(found, states_of(by_peft(host, factors), host), rtol=0, atol=1e-5)
    assert float((found - bare).abs().max()) > 1e-2
    # The control: a single module whose B is another is seen.
    name = next(iter(factors))
    other = factors | {name: (factors[name][0], 2 * factors[name][1])}
    assert float((found - states_of(by_peft(host, other), host)).abs().max()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_it_can_be_merged_into_the_weights(family):
    host, merged = tiny_host(family), tiny_host(family)
    factors = random_lora(host).by_module
    with attach(host.map, aligned_file(host, LoraFactors(factors))):
        found = output_of(host)
    with torch.no_grad():
        for name, linear in linear_modules(merged.map).items():
            down, up = factors[name]
            change = up @ down
            linear.module.get_parameter("weight").add_(change.T if linear.transposed else change)
    torch.testing.assert_close(output_of(merged), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_b_leaves_the_host_bit_for_bit(family):
    host = tiny_host(family)
    before = output_of(host)
    adapter = aligned_file(host, random_lora(host, zero=True))
    for dense in (False, True):
        with attach(host.map, adapter, dense=dense):
            assert hooks_of(host) >= len(linear_modules(host.map))
            assert torch.equal(output_of(host), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_is_as_before_afterwards(family):
    host = tiny_host(family)
    adapter = aligned_file(host, random_lora(host))
    before, parameters, hooks = output_of(host), parameters_of(host), hooks_of(host)
    with attach(host.map, adapter):
        changed = output_of(host)
        assert hooks_of(host) > hooks
    assert not torch.allclose(changed, before, atol=1e-3)

    def fail():
        with attach(host.map, adapter):
            output_of(host)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert hooks_of(host) == hooks
    assert torch.equal(output_of(host), before)
    after = host.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in parameters.items())
    assert not any(value.grad is not None for value in host.model.parameters())


def test_it_stays_with_the_adapter_and_goes_with_the_updates():
    host = tiny_host("gpt2")
    adapter = tiny_folded(host)[0].with_lora(random_lora(host))
    assert adapter.structure.lora_rank == 3
    for same in (adapter.with_shift(None), adapter.with_strength(0.5), adapter.with_offsets(torch.zeros(3))):
        assert same.lora is adapter.lora
    assert adapter.without_updates().lora is None
    assert adapter.with_lora(None).structure.lora_rank == 0
    assert adapter.nbytes - adapter.with_lora(None).nbytes == sum(value.nbytes for value in adapter.lora.buffers())


# delta-theta as a low-rank update.  Its expansion is part of the format of task files.


def digest_of(expansion: Expansion) -> str:
    """SHA-256 of names, places, factors and A, as little-endian bytes."""
    found = hashlib.sha256("\n".join(expansion.names).encode())
    for parts, dtype in ((expansion.places, "<i8"), (expansion.factors, "<f4"), (expansion.down, "<f4")):
        for part in parts:
            found.update(part.numpy().astype(dtype).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("family", "digest"), GOLDEN.items())
def test_the_expansion_is_frozen(family, digest):
    expansion = Expansion.of(tiny_host(family).map, COUNT)
    assert digest_of(expansion) == digest
    assert digest_of(Expansion.of(tiny_host(family, seed=1).map, COUNT)) == digest, "weights play no part"
    assert digest_of(Expansion.of(tiny_host(family).map, COUNT - 1)) != digest


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_b_is_made_of_the_numbers_and_all_weigh_the_same(family):
    host = tiny_host(family)
    expansion = Expansion.of(host.map, COUNT)
    numbers = torch.randn(8, COUNT // 8, generator=torch.Generator().manual_seed(0))
    lora = expansion.factors_of(numbers)
    assert lora.rank == RANK
    target_modules = linear_modules(host.map)
    assert set(lora.by_module) == set(target_modules)
    for name, (down, up) in lora.by_module.items():
        assert (down.shape, up.shape) == (
            (RANK, target_modules[name].in_features),
            (target_modules[name].module_features, RANK),
        )
        torch.testing.assert_close(down.norm(dim=1), torch.ones(RANK))
    # An isometry: B as a whole is as long as the numbers, those that no entry takes left out.
    used = torch.zeros(COUNT, dtype=torch.bool)
    used[torch.cat(expansion.places)] = True
    total = sum(float(up.square().sum()) for _, up in lora.by_module.values())
    assert total == pytest.approx(float(numbers.reshape(-1)[used].square().sum()), rel=1e-5)
    assert all(not bool(up.any()) for _, up in expansion.factors_of(torch.zeros(COUNT)).by_module.values())


def test_it_follows_the_gradient_and_counts_without_weights():
    host = tiny_host("bert")
    numbers = torch.zeros(COUNT, requires_grad=True)
    lora = Expansion.of(host.map, COUNT).factors_of(numbers)
    torch.stack([up.sum() for _, up in lora.by_module.values()]).sum().backward()
    assert numbers.grad is not None
    assert bool(numbers.grad.any())
    hollow = Expansion.of(meta_twin(host).map, COUNT).factors_of(torch.zeros(COUNT, device="meta"))
    assert {name: tuple(up.shape) for name, (_, up) in hollow.by_module.items()} == {
        name: tuple(up.shape) for name, (_, up) in lora.by_module.items()
    }
