"""Injection: the only place where a host is changed, and where it is put back.

Guarantees: weights are never touched, every hook is gone when the context is left (also by an exception), and
an adapter whose updates are zero leaves the host's output as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from uhl_cli.adapter.canonical import Routing, route
from uhl_cli.adapter.folding import WRITERS, FoldedAdapter, FoldedLayer, FoldedReadout
from uhl_cli.errors import HostError
from uhl_cli.host.hostmap import HostMap, Site, read_layer_input


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


class Injection:
    """Context manager that attaches a folded adapter to a host.

    :param dense: Compute updates with dense products (training) in place of gathered rows (inference).
    """

    def __init__(
        self,
        host_map: HostMap,
        folded: FoldedAdapter,
        *,
        dense: bool = False,
        noise: AlignmentNoise | None = None,
    ) -> None:
        self._host_map = host_map
        self._folded = folded
        self._dense = dense
        self._noise = noise
        self._handles: list[RemovableHandle] = []
        self._routing: tuple[Routing, Tensor] | None = None
        self._features: Tensor | None = None
        self._active: list[Tensor] = []

    def __enter__(self) -> Injection:
        if self._handles:
            raise HostError("this adapter is attached already.", "Leave the first context before entering it again.")
        try:
            for layer in self._host_map.layers:
                folded = self._folded.layers.get(layer.index)
                # The first layer always gets a hook: it marks the start of a forward pass.
                if layer.index == 0 or folded is not None or layer.index in self._folded.readout.taps:
                    hook = self._layer_hook(layer.index)
                    self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
                if folded is not None:
                    for module, sites in _by_module(layer.sites, folded).items():
                        self._handles.append(module.register_forward_hook(self._site_hook(sites, folded)))
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
        self._start()

    @property
    def readout(self) -> FoldedReadout:
        """The readout of the attached adapter."""
        return self._folded.readout

    def _start(self) -> None:
        """Forget the forward pass before; the first layer's hook calls it, so that nothing piles up."""
        self._routing = self._features = None
        self._active = []

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
            routing, strength = self._respond(readout.layer, final_state)
            edits, gain = self._apart(readout.layer, "readout")
            features = features + self._edit(routing, strength, edits, gain).view_as(features)
        self._features = None
        return features

    def active_atoms(self, mask: Tensor) -> Tensor:
        """Mean number of atoms that fire, over the tokens of `mask` [batch, tokens] and all routers; a scalar."""
        if not self._active:
            return torch.zeros((), device=mask.device)
        chosen = mask.reshape(-1).to(self._active[0].dtype)
        counts = torch.stack(self._active)
        return (counts * chosen).sum() / (chosen.sum().clamp_min(1) * len(self._active))

    def _layer_hook(self, index: int) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        folded = self._folded.layers.get(index)

        def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            state = read_layer_input(args, kwargs)
            if index == 0:
                self._start()
            self._tap(index, state)
            self._routing = None if folded is None else self._respond(folded, state)

        return hook

    def _tap(self, index: int, state: Tensor) -> None:
        tap = self._folded.readout.taps.get(index)
        if tap is not None:
            part = (state @ tap.T).float()
            self._features = part if self._features is None else self._features + part

    def _respond(self, folded: FoldedLayer, state: Tensor) -> tuple[Routing, Tensor]:
        """Routing of a stream state [batch, tokens, d], and p_j (v_j . z) for the chosen atoms [T, k]."""
        flat = state.reshape(-1, state.shape[-1])
        logits = flat @ folded.router.T + folded.router_bias
        noise = None
        if self._noise is not None and self._noise.updates > 0:
            maps = self._folded.noise_maps
            both = torch.cat([maps["router"], maps["read"]])
            noise = self._noise.sample(len(flat), both, self._noise.updates)
            logits = logits + noise[:, : len(logits[0])]
        routing = route(logits.float(), self._folded.threshold.float())
        self._active.append(routing.active)
        responses = self._responses(flat, folded.read, routing.indices) + folded.read_bias[routing.indices]
        if noise is not None:
            responses = responses + noise[:, len(logits[0]) :].gather(1, routing.indices)
        return routing, routing.weights * responses.float()

    def _responses(self, flat: Tensor, read: Tensor, indices: Tensor) -> Tensor:
        if self._dense:
            return (flat @ read.T).gather(1, indices)
        return torch.bmm(read[indices], flat.unsqueeze(-1)).squeeze(-1)

    def _apart(self, folded: FoldedLayer, name: str) -> tuple[Tensor, Tensor | None]:
        """Edit and gain of one type; in training the gain is multiplied in, and None is left."""
        return (folded.gained(name), None) if self._dense else (folded.edits[name], folded.gains[name])

    def _edits_of(self, sites: list[Site], folded: FoldedLayer) -> tuple[Tensor, Tensor | None]:
        """Edits [M, module's out_features] of all sites of one module; columns of no edited site are zero.

        Sites of a fused module have a gain each, so there it is multiplied in, and None is left.
        """
        if len(sites) == 1 and sites[0].out_features == sites[0].module_features:
            return self._apart(folded, sites[0].type)
        first = folded.edits[sites[0].type]
        joined = first.new_zeros(first.shape[0], sites[0].module_features)
        for site in sites:
            joined[:, site.columns] = folded.gained(site.type)
        return joined, None

    def _edit(self, routing: Routing, strength: Tensor, edits: Tensor, gain: Tensor | None) -> Tensor:
        """Sum over the chosen atoms of strength times gain times edit row: [T, out_features]."""
        if gain is not None:
            strength = strength * gain[routing.indices]
        if self._dense:
            spread = torch.zeros(len(strength), len(edits), dtype=strength.dtype, device=strength.device)
            return spread.scatter(1, routing.indices, strength) @ edits
        return functional.embedding_bag(routing.indices, edits, per_sample_weights=strength.to(edits.dtype), mode="sum")

    def _site_hook(
        self, sites: list[Site], folded: FoldedLayer
    ) -> Callable[[nn.Module, tuple[object, ...], Tensor], Tensor]:
        writer = sites[0].type in WRITERS
        edits, gain = self._edits_of(sites, folded)

        def hook(_module: nn.Module, _args: tuple[object, ...], output: Tensor) -> Tensor:
            if self._routing is None:
                return output
            routing, strength = self._routing
            if writer:
                flat = output.reshape(-1, output.shape[-1])
                strength = routing.weights * self._responses(flat, folded.read, routing.indices).float()
            change = self._edit(routing, strength, edits, gain)
            return output + change.view_as(output).to(output.dtype)

        return hook


def _by_module(sites: Mapping[str, Site], folded: FoldedLayer) -> dict[nn.Module, list[Site]]:
    """Edited sites grouped by module: a fused projection is one module with several sites."""
    grouped: dict[nn.Module, list[Site]] = {}
    for name, site in sites.items():
        if name in folded.edits:
            grouped.setdefault(site.module, []).append(site)
    return grouped
