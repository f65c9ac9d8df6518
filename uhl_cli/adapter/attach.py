"""Attaching: the only module that changes a host, and restores it.

Guarantees: every hook is removed when the context exits, also by an exception or an interrupt; weights are never
changed; one thread at a time uses a host, and others wait; an adapter whose updates are zero leaves the host's output
unchanged, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.adapter.canonical import Routing, route
from uhl_cli.adapter.module import (
    READERS,
    WRITERS,
    PortedAdapter,
    PortedLayer,
    PortedReadout,
    edit_name,
    linear_modules,
)
from uhl_cli.adapter.sparse import Bags, chosen, row_responses, row_sums, row_values, spread
from uhl_cli.errors import HostError
from uhl_cli.host.hostmap import HostMap, TargetModule, read_layer_input
from uhl_cli.host.running import use_of

# Key of the readout's gains, beside the layers' indices.
_READOUT = -1


@dataclass(frozen=True)
class AlignmentNoise:
    """Gaussian noise on z in standard deviations: another host's alignment error (docs/method.md, "Pretraining")."""

    readout: float
    updates: float
    generator: torch.Generator

    def sample(self, rows: int, noise_map: Tensor, strength: float) -> Tensor:
        """Noise [rows, outputs]: noise on z, mapped by `noise_map` [outputs, coordinates]."""
        device = noise_map.device
        noise = torch.randn(rows, noise_map.shape[1], generator=self.generator, device=device)
        return strength * (noise @ noise_map.T)


@dataclass(frozen=True)
class _Routed:
    """What a layer's target modules share: the routing, the layer's `read`, the chosen atoms' `gains` [types, T * k],
    and their weights on a reader, p_j (v_j . z) g_j [types, T * k].  Rows are in the order of the layer's gains."""

    routing: Routing
    read: Tensor
    gains: Tensor
    weights: Tensor


@contextmanager
def attach(
    host_map: HostMap,
    adapter: PortedAdapter,
    *,
    name: str = "an adapter",
    dense: bool = False,
    noise: AlignmentNoise | None = None,
) -> Iterator[Attachment]:
    """Context manager: inside it the adapter is attached to the host, and only this thread uses the host.

    Inside an attachment of the same adapter it yields the outer one and changes nothing, so an adapter is never applied
    twice.

    A generator, not a class: Python closes a generator even if an interrupt comes between `__enter__` and the block.

    :param name: Name of the adapter in errors.
    :param dense: Compute updates with dense products (training) in place of gathered rows (inference).
    :raises HostError: Another adapter is attached to the host, or the two are on different devices.
    """
    use = use_of(host_map.base)
    with use.lock:
        outer = use.attached
        if isinstance(outer, Attachment) and outer.adapter is adapter:
            yield outer
            return
        if outer is not None:
            raise HostError(
                f"{outer} is already attached to this model, so {name} cannot be.",
                "Leave its `attached()` context first, or port to a copy of the model.",
            )
        refuse_elsewhere(adapter, host_map)
        attachment = Attachment(host_map, adapter, name, dense=dense, noise=noise)
        interrupt: KeyboardInterrupt | None = None
        try:
            use.attached = attachment
            attachment.add_hooks()
            yield attachment
        finally:
            while use.attached is attachment:
                try:
                    attachment.remove_hooks()
                    use.attached = None
                except KeyboardInterrupt as error:  # raised again below, after all hooks are removed
                    interrupt = error
            if interrupt is not None:
                raise interrupt


class Attachment:
    """An adapter while `attach` has it attached to a host, with the state of the current forward pass."""

    def __init__(
        self, host_map: HostMap, adapter: PortedAdapter, name: str, *, dense: bool, noise: AlignmentNoise | None
    ) -> None:
        self.adapter = adapter
        self._host_map = host_map
        self._name = name
        self._dense = dense
        self._noise = noise
        self._layers = adapter.by_layer
        self._depth_weights = adapter.readout.by_depth
        # Gains of all types of a layer, [types, M], in the order of its `gains`.
        self._gains = {
            index: torch.stack([gain for _, gain in layer.gains.items()])
            for index, layer in (*self._layers.items(), (_READOUT, adapter.readout.layer))
            if layer is not None
        }
        self._routed: _Routed | None = None
        self._features: Tensor | None = None
        self._fired: list[Tensor] = []
        self._bags: Bags | None = None

    def __str__(self) -> str:
        return self._name

    def add_hooks(self) -> None:
        """Register all hooks; called by `attach`."""
        for layer in self._host_map.layers:
            folded = self._layers.get(layer.index)
            # The first layer always gets a hook: it marks the start of a forward pass.
            if layer.index == 0 or folded is not None or layer.index in self._depth_weights:
                hook = self._owned(self._layer_hook(layer.index, folded))
                layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            for name, linear in layer.target_modules.items():
                if folded is not None and name in folded.gains:
                    self._add_module_hook(linear, folded)
        if self.adapter.lora is not None:
            factors = self.adapter.lora.by_module
            for name, linear in linear_modules(self._host_map).items():
                if name in factors:
                    linear.module.register_forward_hook(self._owned(_lora_hook(*factors[name])))

    def remove_hooks(self) -> None:
        """Remove all hooks, found by their owner: an interrupt may have lost a handle.  Safe to repeat."""
        target_modules = {linear.module for layer in self._host_map.layers for linear in layer.target_modules.values()}
        for module in (*target_modules, *(layer.module for layer in self._host_map.layers)):
            _remove_owned(self, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            _remove_owned(self, module._forward_hooks, module._forward_hooks_with_kwargs)

    def _owned(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        hook.owner = self  # type: ignore[attr-defined]
        return hook

    @property
    def readout(self) -> PortedReadout:
        """The readout of the attached adapter."""
        return self.adapter.readout

    def _start(self) -> None:
        """Drop the state of the previous forward pass; the first layer's hook calls this."""
        self._routed = self._features = None
        self._fired = []
        self._bags = None

    def readout_features(self, final_state: Tensor) -> Tensor:
        """Input of the readout's activation, float32 [batch, tokens, readout_size], after a forward pass."""
        readout = self.adapter.readout
        self._read_depth(self._host_map.num_hidden_layers, final_state)
        assert (
            self._features is not None
        )  # _read_depth or the layers' hooks have set it: a readout always reads some depth
        features = self._features + (readout.bias if readout.shift is None else readout.bias + readout.shift)
        flat = final_state.reshape(-1, final_state.shape[-1])
        if self._noise is not None:
            noise_map = self.adapter.noise_maps["readout"]
            features = features + self._noise.sample(len(flat), noise_map, self._noise.readout).view_as(features)
        if readout.layer is not None:
            routed, before = self._respond(readout.layer, self._gains[_READOUT], final_state), features
            features = self._added(before, routed, routed.weights[0], readout.layer.edits["readout"])
        self._features = None
        return features

    def active_atoms(self, mask: Tensor) -> Tensor:
        """Mean number of atoms that fire, over the tokens of `mask` [batch, tokens] and all routers; a scalar."""
        if not self._fired:
            return torch.zeros((), device=mask.device)
        seen = mask.reshape(-1).to(self._fired[0].dtype)
        counts = torch.stack(self._fired).sum(-1)
        return (counts * seen).sum() / (seen.sum().clamp_min(1) * len(self._fired))

    def _layer_hook(
        self, index: int, folded: PortedLayer | None
    ) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            state = read_layer_input(args, kwargs)
            if index == 0:
                self._start()
            self._read_depth(index, state)
            self._routed = None if folded is None else self._respond(folded, self._gains[index], state)

        return hook

    def _read_depth(self, index: int, state: Tensor) -> None:
        weight = self._depth_weights.get(index)
        if weight is not None:
            part = (state @ row_values(weight, state.dtype).T).float()
            self._features = part if self._features is None else self._features + part

    def _respond(self, folded: PortedLayer, gains: Tensor, state: Tensor) -> _Routed:
        """Routing of a stream state [batch, tokens, d], and the chosen atoms' responses to it; `gains` [types, M]."""
        flat = state.reshape(-1, state.shape[-1])
        read = row_values(folded.read, flat.dtype)
        logits = functional.linear(flat, row_values(folded.router, flat.dtype), folded.router_bias)
        noise = None
        if self._noise is not None and self._noise.updates > 0:
            maps = self.adapter.noise_maps
            both = torch.cat([maps["router"], maps["read"]])
            noise = self._noise.sample(len(flat), both, self._noise.updates)
            logits = logits + noise[:, : len(logits[0])]
        routing = route(logits.float(), self.adapter.threshold.float())
        self._fired.append(routing.fires)
        responses = self._responses(flat, read, routing.indices) + chosen(folded.read_bias, routing.indices)
        if noise is not None:
            responses = responses + noise[:, len(logits[0]) :].gather(1, routing.indices)
        # All types at once: several small operators for each type would cost as much as the sums.
        gains = gains.index_select(1, routing.indices.view(-1))
        return _Routed(routing, read, gains, gains * (routing.weights * responses.float()).view(-1))

    def _responses(self, flat: Tensor, read: Tensor, indices: Tensor) -> Tensor:
        if self._dense:
            return (flat @ read.T).gather(1, indices)
        return row_responses(flat, read, indices, self._bags_of(indices))

    def _bags_of(self, indices: Tensor) -> Bags:
        """The bags of this forward pass; they are the same for every layer."""
        if self._bags is None or self._bags.owner.shape[0] != indices.numel():
            self._bags = Bags.of(indices.shape[0], indices.shape[1], indices.device)
        return self._bags

    def _added(self, to: Tensor, routed: _Routed, weights: Tensor, edit: Tensor) -> Tensor:
        """`to` [..., columns] plus the sum over the chosen atoms of `weights` [T * k] times edit row."""
        indices = routed.routing.indices
        if self._dense:
            table = row_values(edit, weights.dtype)
            return to + (spread(weights.view_as(indices), indices, len(table)) @ table).view_as(to).to(to.dtype)
        change = row_sums(edit, indices, weights, self._bags_of(indices)).view_as(to).to(to.dtype)
        # In place, because allocating memory costs more than the sum.
        return to + change if torch.is_grad_enabled() else change.add_(to)

    def _add_module_hook(self, linear: TargetModule, folded: PortedLayer) -> None:
        edit, row = folded.edits[edit_name(linear)], list(folded.gains).index(linear.type)
        if linear.type in READERS and not linear.fused:
            linear.module.register_forward_pre_hook(self._owned(self._input_hook(edit, row)))
        else:
            linear.module.register_forward_hook(self._owned(self._output_hook(linear, edit, row)))

    def _input_hook(
        self, edit: Tensor, row: int
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._routed is None:
                return None
            changed = self._added(args[0], self._routed, self._routed.weights[row], edit)
            return (changed, *args[1:])

        return hook

    def _output_hook(
        self, linear: TargetModule, edit: Tensor, row: int
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        writer = linear.type in WRITERS

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            routed = self._routed
            if routed is None:
                return output
            if writer:
                flat = output.reshape(-1, output.shape[-1])
                responses = self._responses(flat, routed.read, routed.routing.indices)
                weights = (routed.routing.weights * responses.float()).view(-1) * routed.gains[row]
            else:
                weights = routed.weights[row]
            own = output[..., linear.columns] if linear.fused else output
            part = self._added(own, routed, weights, edit)
            if not linear.fused:
                return part
            changed = output.clone()
            changed[..., linear.columns] = part
            return changed

        return hook


def _lora_hook(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = functional.linear(args[0].to(down.dtype), down)
        return output + functional.linear(inner, up).to(output.dtype)

    return hook


def refuse_elsewhere(adapter: PortedAdapter, host_map: HostMap) -> None:
    """Check that adapter and host are on one device.

    :raises HostError: They are not; the hint tells how to move one of them.
    """
    here, there = adapter.threshold.device, host_map.embeddings.weight.device
    if here != there:
        raise HostError(
            f"the adapter is on {here}, its host on {there}.",
            f"Move the model as well with model.to('{here}'), or the adapter back with ported.to('{there}').",
        )


def _remove_owned(owner: Attachment, hooks: dict[int, Callable[..., Any]], with_kwargs: dict[int, bool]) -> None:
    for key in [key for key, hook in hooks.items() if getattr(hook, "owner", None) is owner]:
        with_kwargs.pop(key, None)
        del hooks[key]
