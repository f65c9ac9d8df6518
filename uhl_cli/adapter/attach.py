"""Injection: the only place where a host is changed, and where it is put back.

Guarantees: every hook is gone when the context is left (also by an exception), weights are never touched (a static
adapter's merged ones stand in their place until then), and an adapter whose updates are zero leaves the host's output
as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from uhl_cli.adapter.canonical import Routing, route
from uhl_cli.adapter.fold import READERS, WRITERS, FoldedAdapter, FoldedLayer, FoldedReadout, edit_name
from uhl_cli.adapter.sparse import Bags, Rows, chosen, plain, row_responses, row_sums, spread
from uhl_cli.errors import HostError
from uhl_cli.host.hostmap import HostMap, Site, read_layer_input

# Beside the layers' numbers.
_READOUT = -1


@dataclass(frozen=True)
class AlignmentNoise:
    """Gaussian noise on z in standard deviations; it stands for another host's alignment error (DESIGN 2)."""

    readout: float
    updates: float
    generator: torch.Generator

    def sample(self, rows: int, noise_map: Tensor, strength: float) -> Tensor:
        """Noise [rows, outputs] as it arrives behind `noise_map` [outputs, coordinates]."""
        device = noise_map.device
        noise = torch.randn(rows, noise_map.shape[1], generator=self.generator, device=device)
        return strength * (noise @ noise_map.T)


@dataclass(frozen=True)
class _Routed:
    """What a layer's sites share: the routing, the layer's `read`, and, with a row a type in the order of its gains,
    the chosen atoms' `gains` [types, T * k] and their weights on a reader, p_j (v_j . z) g_j [types, T * k]."""

    routing: Routing
    read: Tensor
    gains: Tensor
    weights: Tensor


Observer = Callable[[str, str, Tensor, Tensor], None]
"""Called with a module's name, the type of the site, what its update was computed from, and the update."""


class Injection:
    """Context manager that attaches a folded adapter to a host.

    :param dense: Compute updates with dense products (training) in place of gathered rows (inference).
    :param observer: Sees every update of a module, and of the readout under the name and type "readout".
    """

    def __init__(
        self,
        host_map: HostMap,
        folded: FoldedAdapter,
        *,
        dense: bool = False,
        noise: AlignmentNoise | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._host_map = host_map
        self._folded = folded
        self._dense = dense
        self._noise = noise
        self._observer = observer
        self._replaced: list[tuple[nn.Module, nn.Parameter, nn.Parameter | None]] = []
        self._handles: list[RemovableHandle] = []
        self._gains: dict[int, Tensor] = {}
        self._routed: _Routed | None = None
        self._features: Tensor | None = None
        self._fired: list[Tensor] = []
        self._bags: Bags | None = None

    def __enter__(self) -> Injection:
        if self._handles:
            raise HostError("this adapter is attached already.", "Leave the first context before entering it again.")
        try:
            self._merge()
            for layer in self._host_map.layers:
                folded = self._folded.layers.get(layer.index)
                # The first layer always gets a hook: it marks the start of a forward pass.
                if layer.index == 0 or folded is not None or layer.index in self._folded.readout.taps:
                    hook = self._layer_hook(layer.index)
                    self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
                if folded is not None:
                    self._gains[layer.index] = torch.stack(list(folded.gains.values()))
                    sites = (site for name, site in layer.sites.items() if name in folded.gains)
                    self._handles.extend(self._attach(site, folded) for site in sites)
            if self._folded.readout.layer is not None:
                self._gains[_READOUT] = torch.stack(list(self._folded.readout.layer.gains.values()))
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gains.clear()
        for module, weight, bias in self._replaced:
            module._parameters["weight"], module._parameters["bias"] = weight, bias
        self._replaced.clear()
        self._start()

    def _merge(self) -> None:
        """Put merged weights in place of the modules' own; the own parameters come back as the objects they were."""
        for name, merged in self._folded.merged.items():
            module = self._host_map.base.get_submodule(name)
            self._replaced.append((module, module.get_parameter("weight"), module._parameters["bias"]))
            module._parameters["weight"] = nn.Parameter(merged.weight, requires_grad=False)
            module._parameters["bias"] = nn.Parameter(merged.bias, requires_grad=False)

    @property
    def readout(self) -> FoldedReadout:
        """The readout of the attached adapter."""
        return self._folded.readout

    def _start(self) -> None:
        """Forget the forward pass before; the first layer's hook calls it, so that nothing piles up."""
        self._routed = self._features = None
        self._fired = []
        self._bags = None

    def readout_features(self, final_state: Tensor) -> Tensor:
        """Input of the readout's activation, float32 [batch, tokens, readout_size], after a forward pass."""
        readout = self._folded.readout
        self._tap(self._host_map.num_hidden_layers, final_state)
        assert self._features is not None  # _tap or the layers' hooks have set it: taps are never empty
        features = self._features + (readout.bias if readout.shift is None else readout.bias + readout.shift)
        flat = final_state.reshape(-1, final_state.shape[-1])
        if self._noise is not None:
            noise_map = self._folded.noise_maps["readout"]
            features = features + self._noise.sample(len(flat), noise_map, self._noise.readout).view_as(features)
        if readout.layer is not None:
            routed, before = self._respond(readout.layer, self._gains[_READOUT], final_state), features
            features = self._added(before, routed, routed.weights[0], readout.layer.edits["readout"])
            if self._observer is not None:
                self._observe("readout", "readout", final_state, features - before)
        self._features = None
        return features

    def active_atoms(self, mask: Tensor) -> Tensor:
        """Mean number of atoms that fire, over the tokens of `mask` [batch, tokens] and all routers; a scalar."""
        if not self._fired:
            return torch.zeros((), device=mask.device)
        seen = mask.reshape(-1).to(self._fired[0].dtype)
        counts = torch.stack(self._fired).sum(-1)
        return (counts * seen).sum() / (seen.sum().clamp_min(1) * len(self._fired))

    def _layer_hook(self, index: int) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        folded = self._folded.layers.get(index)

        def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            state = read_layer_input(args, kwargs)
            if index == 0:
                self._start()
            self._tap(index, state)
            self._routed = None if folded is None else self._respond(folded, self._gains[index], state)

        return hook

    def _tap(self, index: int, state: Tensor) -> None:
        tap = self._folded.readout.taps.get(index)
        if tap is not None:
            part = (state @ plain(tap, state.dtype).T).float()
            self._features = part if self._features is None else self._features + part

    def _respond(self, folded: FoldedLayer, gains: Tensor, state: Tensor) -> _Routed:
        """Routing of a stream state [batch, tokens, d], and the chosen atoms' responses to it; `gains` [types, M]."""
        flat = state.reshape(-1, state.shape[-1])
        read = plain(folded.read, flat.dtype)
        logits = functional.linear(flat, plain(folded.router, flat.dtype), folded.router_bias)
        noise = None
        if self._noise is not None and self._noise.updates > 0:
            maps = self._folded.noise_maps
            both = torch.cat([maps["router"], maps["read"]])
            noise = self._noise.sample(len(flat), both, self._noise.updates)
            logits = logits + noise[:, : len(logits[0])]
        routing = route(logits.float(), self._folded.threshold.float())
        self._fired.append(routing.fires)
        responses = self._responses(flat, read, routing.indices) + chosen(folded.read_bias, routing.indices)
        if noise is not None:
            responses = responses + noise[:, len(logits[0]) :].gather(1, routing.indices)
        # All types' at once: a handful of small operators for every site would cost as much as the sums.
        gains = gains.index_select(1, routing.indices.view(-1))
        return _Routed(routing, read, gains, gains * (routing.weights * responses.float()).view(-1))

    def _responses(self, flat: Tensor, read: Tensor, indices: Tensor) -> Tensor:
        if self._dense:
            return (flat @ read.T).gather(1, indices)
        return row_responses(flat, read, indices, self._bags_of(indices))

    def _bags_of(self, indices: Tensor) -> Bags:
        """Those of this forward pass; every layer sees as many tokens."""
        if self._bags is None or self._bags.owner.shape[0] != indices.numel():
            self._bags = Bags.of(indices.shape[0], indices.shape[1], indices.device)
        return self._bags

    def _added(self, to: Tensor, routed: _Routed, weights: Tensor, edit: Rows) -> Tensor:
        """`to` [..., columns] plus the sum over the chosen atoms of `weights` [T * k] times edit row."""
        indices = routed.routing.indices
        if self._dense:
            table = plain(edit, weights.dtype)
            return to + (spread(weights.view_as(indices), indices, len(table)) @ table).view_as(to).to(to.dtype)
        change = row_sums(edit, indices, weights, self._bags_of(indices)).view_as(to).to(to.dtype)
        # In place, because fresh memory for every site costs more than the sum.
        return to + change if torch.is_grad_enabled() else change.add_(to)

    def _attach(self, site: Site, folded: FoldedLayer) -> RemovableHandle:
        edit, row = folded.edits[edit_name(site)], list(folded.gains).index(site.type)
        if site.type in READERS and not site.fused:
            return site.module.register_forward_pre_hook(self._input_hook(site, edit, row))
        return site.module.register_forward_hook(self._output_hook(site, edit, row))

    def _observe(self, name: str, type_: str, source: Tensor, update: Tensor) -> None:
        assert self._observer is not None
        self._observer(name, type_, source.reshape(-1, source.shape[-1]), update.reshape(-1, update.shape[-1]))

    def _input_hook(
        self, site: Site, edit: Rows, row: int
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._routed is None:
                return None
            changed = self._added(args[0], self._routed, self._routed.weights[row], edit)
            if self._observer is not None:
                self._observe(site.name, site.type, args[0], changed - args[0])
            return (changed, *args[1:])

        return hook

    def _output_hook(
        self, site: Site, edit: Rows, row: int
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        writer = site.type in WRITERS

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
            own = output[..., site.columns] if site.fused else output
            part = self._added(own, routed, weights, edit)
            if self._observer is not None:
                self._observe(site.name, site.type, output if writer else args[0], part - own)
            if not site.fused:
                return part
            changed = output.clone()
            changed[..., site.columns] = part
            return changed

        return hook
