"""A sample of the architectures of the installed transformers, one of each kind: degree, port, and every role's edit.

`benchmarks/architectures.py` runs all of them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from tiny_adapters import random_lora, tiny_universal
from tiny_architectures import architecture_tokenizer, tiny_architecture
from tiny_hosts import SENTENCES, tiny_host
from torch import Tensor, nn

from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.low_rank import Expansion
from uhl_cli.adapter.module import (
    WRITERS,
    PortedAdapter,
    PortedLayer,
    PortedReadout,
    edit_name,
    linear_modules,
)
from uhl_cli.errors import HostError, HostMapError
from uhl_cli.host.checkpoint import wrap_host
from uhl_cli.host.hostmap import HostMap, TargetModule
from uhl_cli.host.proof import resolve

# Degree by name: encoders, decoders, encoder-decoders; rows and structure; norms before, after and around; parallel
# parts; fused, interleaved and grouped projections; shared layers; experts; windows; state-space and other hybrids.
SAMPLE = {
    "albert": "all",
    "bamba": "some",
    "bart": "all",
    "big_bird": "all",
    "bloom": "all",
    "cohere": "all",
    "ctrl": "all",
    "deberta": "all",
    "deberta-v2_full": "all",
    "deepseek_v3": "some",
    "falcon_mq": "all",
    "falcon_new": "all",
    "fnet": "some",
    "gemma3_text": "all",
    "gpt2": "all",
    "gpt_bigcode": "all",
    "gpt_neo": "all",
    "gpt_neox": "all",
    "gpt_oss": "all",
    "gptj": "all",
    "jamba": "some",
    "lfm2_moe": "some",
    "mamba": "stream",
    "mixtral": "all",
    "modernbert": "all",
    "mpnet": "all",
    "nystromformer": "all",
    "olmo2": "all",
    "opt": "all",
    "phi3": "all",
    "qwen2_moe": "all",
    "qwen3": "all",
    "recurrent_gemma": "some",
    "roformer": "all",
    "rwkv": "some",
    "stablelm_par": "all",
    "switch_transformers": "all",
    "t5_gated": "all",
    "xglm": "all",
    "zamba2": "stream",
}
REFUSED = {"xlnet": r"its states are \(5, 2, 64\)", "reformer": "does not get what|one call does not get"}
Change = Callable[[nn.Module], nn.Module]
IDS = torch.tensor([[2, 40, 55, 60, 71, 33, 90, 3], [2, 81, 12, 47, 66, 101, 23, 3]])


@pytest.fixture(scope="module")
def adapter():
    return tiny_universal(tiny_host("bert"))


def final_state(base: nn.Module) -> Tensor:
    with torch.no_grad():
        return base(input_ids=IDS, attention_mask=torch.ones_like(IDS))[0]


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if "hook" in name and hasattr(value, "__len__")
    )


@pytest.mark.parametrize("name", SAMPLE)
def test_a_port_and_a_lora_run_and_leave_the_model_bit_for_bit(adapter, name):
    model = tiny_architecture(name)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    host = wrap_host(model, architecture_tokenizer())
    assert host.map.degree == SAMPLE[name]
    before, hooks = final_state(host.map.base), hooks_of(model)
    ported = adapter.port(host, max_flops=1e9, strength=1.0)
    logits = ported(SENTENCES[:3])
    assert logits.isfinite().all()
    with ported.attached():
        assert hooks_of(model) > hooks
        edited = final_state(host.map.base)
    assert torch.equal(edited, before) == (SAMPLE[name] == "stream")
    tuned = ported.adapter.without_updates().with_lora(random_lora(host))
    factors = [factor.requires_grad_() for factor in tuned.lora.up.buffers()]
    ported.with_adapter(tuned)(SENTENCES[:3], gradients=True).square().sum().backward()
    reached = [factor.grad is not None and bool(factor.grad.any()) for factor in factors]
    assert all(reached)
    with torch.no_grad(), attach(host.map, tuned):
        assert not torch.equal(final_state(host.map.base), before)
    assert hooks_of(model) == hooks
    assert torch.equal(final_state(host.map.base), before)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_its_reason(name):
    with pytest.raises(HostMapError, match=REFUSED[name]):
        resolve(tiny_architecture(name))


def test_linear_modules_whose_role_is_not_proved_get_a_lora():
    host_map = resolve(tiny_architecture("bitnet"))
    assert host_map.degree == "stream"
    modules = {
        f"layers.0.{name}_proj"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert {linear.name for linear in host_map.layers[0].others} == modules
    assert modules <= linear_modules(host_map).keys()


def test_a_host_without_linear_modules_cannot_be_tuned():
    host_map = resolve(tiny_architecture("bitnet"))
    bare = replace(host_map, layers=tuple(replace(layer, others=()) for layer in host_map.layers))
    with pytest.raises(HostError, match="BitNetModel has no linear module in its layers"):
        Expansion.of(bare, 8)


def test_a_block_of_experts_does_not_include_the_stream():
    down = resolve(tiny_architecture("switch_transformers")).layers[1].target_modules["down"]
    assert (down.name, down.matrix) == ("block.1.layer.1.mlp", False)


# An edit of a weight in a copy of the model, beside the same edit as the adapter makes it in the model itself.


class ByCall(nn.Module):
    """A module for each of the calls of one pass."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.all = nn.ModuleList(modules)
        self._calls = itertools.count()

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.all[next(self._calls)](*args, **kwargs)


class Around(nn.Module):
    """A module without a weight of its own, with changes of its input and of its (first) output."""

    def __init__(self, module: nn.Module, *, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]):
        super().__init__()
        self.module, self.before, self.after = module, before, after

    def forward(self, states: Tensor, *args: object, **kwargs: object) -> object:
        output = self.module(self.before(states), *args, **kwargs)
        if isinstance(output, Tensor):
            return self.after(output)
        return (self.after(output[0]), *output[1:])


def unchanged(value: Tensor) -> Tensor:
    return value


def with_module(host_map: HostMap, name: str, calls: int, changes: Mapping[int, Change]) -> Tensor:
    """Final state of a copy of the model with one module changed, at some of its `calls` in a pass."""
    base = copy.deepcopy(host_map.base)
    module = base.get_submodule(name)
    parent, _, child = name.rpartition(".")
    modules = [changes[call](copy.deepcopy(module)) if call in changes else module for call in range(calls)]
    # Some models read a module's weight, so that it stays in place if it can.
    setattr(base.get_submodule(parent), child, ByCall(modules) if calls > 1 else modules[0])
    return final_state(base)


def raw_matrix(linear: TargetModule, module: nn.Module) -> Tensor:
    """The module's whole weight as an [out, in] view."""
    weight = module.get_parameter("weight").detach()
    return weight.T if linear.transposed else weight


def weight_edit(linear: TargetModule, u: Tensor, v: Tensor) -> tuple[str, Change]:
    """Name of the module to edit, and the edit of its weight: W(x + u) of a reader, (I + u v^T) W x of a writer.

    A norm after the writer, and a block of experts, have no such weight: what they write is multiplied, and what the
    block reads is shifted.
    """

    def multiplied(output: Tensor) -> Tensor:
        return output + (output @ v).unsqueeze(-1) * u

    def around(module: nn.Module) -> nn.Module:
        if linear.type in WRITERS:
            return Around(module, before=unchanged, after=multiplied)
        return Around(module, before=lambda states: states + u, after=unchanged)

    def written(module: nn.Module) -> nn.Module:
        matrix = raw_matrix(linear, module)
        matrix += torch.outer(u, v @ matrix)
        if module.bias is not None:
            module.bias.data = multiplied(module.bias.data)
        return module

    def read(module: nn.Module) -> nn.Module:
        matrix = raw_matrix(linear, module)
        bias = torch.zeros(len(matrix)) if module.bias is None else module.bias.detach().clone()
        bias[linear.columns] += (matrix @ u)[linear.columns]
        module.bias = nn.Parameter(bias)
        return module

    change = written if linear.type in WRITERS else read
    if not linear.matrix or linear.written is not None:
        change = around
    return linear.name if linear.written is None else linear.written[0], change


def edited_weight(host_map: HostMap, linear: TargetModule, u: Tensor, v: Tensor) -> Tensor:
    """Final state with the module's weight edited, in the map's own call alone."""
    name, change = weight_edit(linear, u, v)
    return with_module(host_map, name, linear.calls, {linear.call: change})


def folded(host_map: HostMap, linear: TargetModule, u: Tensor, v: Tensor) -> PortedLayer:
    """The same edit as the adapter makes it: one atom that always fires."""
    writer = linear.type in WRITERS
    rows = linear.weight() @ u if linear.fused and not writer else u
    return PortedLayer(
        router=torch.zeros(1, host_map.hidden_size),
        router_bias=torch.zeros(1),
        read=v[None] if writer else torch.zeros(1, host_map.hidden_size),
        read_bias=torch.ones(1),
        edits={edit_name(linear): rows[None]},
        gains={linear.type: torch.ones(1)},
    )


def injected(host_map: HostMap, layers: Mapping[int, PortedLayer]) -> Tensor:
    """Final state with the adapter's updates in some layers."""
    readout = PortedReadout({}, torch.zeros(1), None, None, torch.zeros(1, 1), torch.zeros(1))
    with torch.no_grad(), attach(host_map, PortedAdapter(torch.tensor([-1.0]), layers, readout)):
        return final_state(host_map.base)


def rank_one(host_map: HostMap, linear: TargetModule, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Final state with W(I + u v^T) as a reader's weight, and with the same edit by hooks.

    A fixed shift of all keys changes no attention weight where positions are not rotated, so keys take this edit too.
    """

    def changed(module: nn.Module) -> nn.Module:
        matrix = raw_matrix(linear, module)
        matrix[linear.columns] += torch.outer(matrix @ u, v)[linear.columns]
        return module

    calls = itertools.count()

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if next(calls) != linear.call:
            return output
        output = output.clone()
        output[..., linear.columns] += (args[0] @ v).unsqueeze(-1) * (linear.weight() @ u)
        return output

    handle = linear.module.register_forward_hook(hook)
    by_hook = final_state(host_map.base)
    handle.remove()
    return with_module(host_map, linear.name, linear.calls, {linear.call: changed}), by_hook


def roles_of(host_map: HostMap) -> dict[str, tuple[int, TargetModule]]:
    """The last target module of each type, with its layer."""
    return {kind: (layer.index, linear) for layer in host_map.layers for kind, linear in layer.target_modules.items()}


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm())


def same(found: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether a change is the expected one up to 1e-4 of it, and the rounding of float32."""
    return difference(found, expected) <= 1e-4 * difference(expected, before) + 1e-6 * float(before.norm())


def vectors(host_map: HostMap, seed: int = 0) -> tuple[Tensor, Tensor]:
    """u and v of an edit, of such sizes that (I + u v^T) about doubles what it changes."""
    generator = torch.Generator().manual_seed(seed)
    width = host_map.hidden_size
    return torch.randn(width, generator=generator), torch.randn(width, generator=generator) / width**0.5


@pytest.mark.parametrize("name", [name for name, degree in SAMPLE.items() if degree != "stream"])
def test_an_edit_of_each_role_is_what_the_adapter_injects(name):
    host_map = resolve(tiny_architecture(name))
    roles = roles_of(host_map)
    assert roles.keys() & {"q", "down"}
    u, v = vectors(host_map)
    before = final_state(host_map.base)
    small = 1e-3 * float(before.norm())
    found = {
        kind: injected(host_map, {index: folded(host_map, linear, u, v)}) for kind, (index, linear) in roles.items()
    }
    for kind, (_, linear) in roles.items():
        expected = edited_weight(host_map, linear, u, v)
        size = difference(expected, before)
        assert same(found[kind], expected, before), kind
        assert kind == "k" or size > small, kind
        assert all(difference(found[other], expected) > 0.01 * size for other in found if other != kind), kind
    if "k" in roles:
        by_weight, by_hook = rank_one(host_map, roles["k"][1], u, v)
        assert difference(by_weight, before) > 0.1 * small
        assert same(by_hook, by_weight, before)


@pytest.mark.parametrize("kind", ["q", "o", "up", "down"])
def test_a_shared_layer_carries_another_update_in_each_call(kind):
    host_map = resolve(tiny_architecture("albert"))
    linears = [layer.target_modules[kind] for layer in host_map.layers]
    assert len({linear.module for linear in linears}) == 1
    edits = [vectors(host_map, seed) for seed in range(4)]
    layers = [folded(host_map, linear, *edit) for linear, edit in zip(linears, edits, strict=True)]
    changes = {linear.call: weight_edit(linear, *edit)[1] for linear, edit in zip(linears, edits, strict=True)}
    before = final_state(host_map.base)
    expected = with_module(host_map, linears[0].name, 4, changes)
    assert same(injected(host_map, dict(enumerate(layers))), expected, before)
    size = difference(expected, before)
    assert difference(injected(host_map, dict(enumerate(reversed(layers)))), expected) > 0.01 * size
    # A layer without an update carries none, also after one that has one.
    some = {call: change for call, change in changes.items() if call in (0, 2)}
    expected = with_module(host_map, linears[0].name, 4, some)
    assert same(injected(host_map, {0: layers[0], 2: layers[2]}), expected, before)
    assert difference(injected(host_map, {0: layers[0], 1: layers[2]}), expected) > 0.01 * size


# A fixed shift of all relative positions' keys changes no attention weight.
@pytest.mark.parametrize(("kind", "wrong"), [("q", ((1,), (0, 1))), ("k", ((1,),))])
def test_a_module_that_runs_twice_in_a_layer_is_edited_in_one_call_alone(kind, wrong):
    host_map = resolve(tiny_architecture("deberta-v2_full"))
    linear = host_map.layers[2].target_modules[kind]
    assert (linear.call, linear.calls) == (0, 2)
    u, v = vectors(host_map)
    before = final_state(host_map.base)
    name, change = weight_edit(linear, u, v)
    found = injected(host_map, {2: folded(host_map, linear, u, v)})
    assert same(found, with_module(host_map, name, 2, {0: change}), before)
    size = difference(found, before)
    assert size > 1e-3 * float(before.norm())
    for calls in wrong:  # the second call works on the table of relative positions
        assert difference(with_module(host_map, name, 2, dict.fromkeys(calls, change)), found) > 0.01 * size
