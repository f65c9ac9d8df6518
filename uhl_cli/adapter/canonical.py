"""The canonical adapter: everything that is trained, in coordinates that do not depend on a host.

See docs/method.md, "Canonical adapter".  No tensor depends on a host's width.  `adapter.fold` combines it with an
alignment into the maps of one host.  Parameters are kept in float32; `stored()` returns them quantised as in the file,
with straight-through gradients, and all computation uses these values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.codes.layout import bits_of, parameter_shapes
from uhl_cli.codes.quantise import fake_quantise
from uhl_cli.schema import UPDATE_TYPES, AdapterConfig


@dataclass(frozen=True)
class Routing:
    """Which atoms act on which token.  T tokens, k = top_k.

    `indices` int64 [T, k]; `weights` [T, k], zero where an atom does not fire; `fires` [T, k], one where it does,
    with the gradient of the gates.
    """

    indices: Tensor
    weights: Tensor
    fires: Tensor


class CanonicalAdapter(nn.Module):
    """Atoms, mixer, router, hyper-MLP, readout and delta-theta, all of canonical shape.

    A new adapter changes nothing: its atoms' U is zero.  The `head_*` parameters are the head-only control.  They are
    fitted separately on the frozen source and never trained with the rest (docs/method.md, "Controls").
    """

    def __init__(self, config: AdapterConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        for name, shape in parameter_shapes(config).items():
            self.register_parameter(name, nn.Parameter(_initial(name, shape, generator)))
        self.freeze_untrained()

    def freeze_untrained(self) -> None:
        """Freeze what pretraining does not train: delta-theta (for `tune`) and the head-only control."""
        for name in ("delta_theta", "head_weight", "head_bias"):
            self.get_parameter(name).requires_grad_(False)

    def forward(self, states: Tensor, *, depth: float, update_type: str, written: Tensor | None = None) -> Tensor:
        """The update of one module in canonical space: the sum over active atoms j of g_j(t, m) p_j f_j (v_j . z) u_j.

        This is the definition (docs/method.md, "Update").  A host never runs it: `adapter.fold` multiplies the same
        parameters with the host's maps once, and `adapter.attach` adds what P_out makes of this sum, for the few atoms
        that act.

        :param states: z [..., d0], the canonical coordinates of the stream that enters the layer, times the reading
            gains.  They choose the atoms, and a reader's atoms respond to them.
        :param depth: t of the layer; 1 for the readout.
        :param update_type: m, one of `UPDATE_TYPES`.
        :param written: Of a writer: P_in y [..., d0] of its own output y, to which its atoms respond.
        :returns: [..., d0]; the host's writing gains and map P_out turn it into an edit.
        """
        stored = self.stored()
        flat = states.reshape(-1, states.shape[-1])
        bias = stored["task_router"] @ stored["task_embedding"]
        routing = route(functional.linear(flat, stored["router"], bias), stored["threshold"])
        read = flat if written is None else written.reshape(flat.shape)
        responses = (read @ stored["atoms_v"].T).gather(1, routing.indices)
        weights = routing.weights * responses * mix(stored, depth, update_type)[routing.indices]
        return (weights.unsqueeze(-1) * stored["atoms_u"][routing.indices]).sum(1).view(states.shape)

    def stored(self) -> dict[str, Tensor]:
        """Every parameter as the file holds it, differentiable by straight-through."""
        return {name: fake_quantise(value, bits_of(name)) for name, value in self.named_parameters()}

    @property
    def updates_are_zero(self) -> bool:
        """True when no update can change a host."""
        return not bool(self.stored()["atoms_u"].any())


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initial values; zero for names that are not listed."""
    if name == "atoms_v":
        return functional.normalize(torch.randn(shape, generator=generator), dim=1)
    if name == "router":
        return torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    if name in ("task_router", "task_embedding"):
        return 0.1 * torch.randn(shape, generator=generator)
    if name == "threshold":
        return torch.full(shape, -1.0)
    if name == "mixer_in_weight":  # different frequencies over depth, and phases over types
        return torch.randn(shape, generator=generator) * 1.5
    if name == "mixer_out_weight":
        return torch.randn(shape, generator=generator) * 0.1
    if name in ("readout_in_weight", "readout_out_weight", "size_in_weight"):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    return torch.zeros(shape)


def mix(stored: dict[str, Tensor], depth: float, update_type: str) -> Tensor:
    """Mixing weights g(t, type) [M]: one plus a two-layer sine network plus delta-theta.

    See docs/method.md, "Canonical adapter".
    """
    index = UPDATE_TYPES.index(update_type)
    weight = stored["mixer_in_weight"]
    hidden = torch.sin(weight[:, 0] * depth + weight[:, 1 + index] + stored["mixer_in_bias"])
    mixed = stored["mixer_out_weight"] @ hidden + stored["mixer_out_bias"]
    return 1.0 + mixed + stored["delta_theta"][index]


def size_gains(stored: dict[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Gains s(log10 d) for reading and for writing, each [d0] and positive (docs/method.md, "Canonical adapter").

    The logarithm is centred on a width of 100 to 1,000 so that one hidden layer resolves it.
    """
    hidden = functional.silu(stored["size_in_weight"][:, 0] * (math.log10(width) - 2.5) + stored["size_in_bias"])
    gains = torch.exp(stored["size_out_weight"] @ hidden + stored["size_out_bias"])
    canonical = gains.shape[0] // 2
    return gains[:canonical], gains[canonical:]


def route(logits: Tensor, threshold: Tensor) -> Routing:
    """Choose at most k atoms per token from logits [T, M]; `threshold` [k] holds one threshold per rank.

    Weights are the softmax over the chosen k.  An atom fires when its logit exceeds its threshold; the gradient is that
    of a sigmoid gate.
    """
    values, indices = logits.topk(threshold.shape[0], dim=-1)
    shares = functional.softmax(values, dim=-1)
    if not values.requires_grad:
        fires = (values > threshold).to(shares.dtype)
        return Routing(indices, shares * fires, fires)
    gates = torch.sigmoid(values - threshold)
    fires = (values > threshold).to(gates.dtype) + gates - gates.detach()
    return Routing(indices, shares * fires, fires)
