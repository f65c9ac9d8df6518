"""What uhl reads and edits of a model: its layers, and in each the linear modules by what they do.

`discover` finds a map, `proof` proves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uhl_cli.errors import HostMapError
from uhl_cli.schema import Degree

MODULE_TYPES = ("q", "k", "v", "o", "up", "down", "gate")
"""Linear modules of a layer; the adapter's eighth type, the readout, is not a module of the host."""

READER_TYPES = frozenset({"q", "k", "v", "up", "gate"})
"""Modules whose input is the stream (or a normalised copy of it)."""

WRITER_TYPES = frozenset({"o", "down"})
"""Modules whose output is added to the stream."""

GROUPS = (("q", "k", "v", "o"), ("up", "down", "gate"))
"""Modules that are found, proved and kept together."""


MAP_HINT = "Open an issue that names the model type; `uhl hosts` prints what was found."
"""What to do about a model whose map is not found or not proved."""


def group_of(kind: str) -> tuple[str, ...]:
    """The types of the group that a module type belongs to."""
    return GROUPS[0] if kind in GROUPS[0] else GROUPS[1]


def dense(weight: Tensor) -> Tensor:
    """A weight as a plain detached tensor; quantised ones (tensor subclasses, as from torchao) are dequantised."""
    weight = weight.detach()
    if type(weight) is Tensor:
        return weight
    values: Tensor = weight.dequantize()  # type: ignore[no-untyped-call, unused-ignore]
    return values


@dataclass(frozen=True, eq=False)
class TargetModule:
    """A linear module of a layer, or a part of a fused one, that the adapter edits.

    :param type: One of `MODULE_TYPES`; "other" for a linear module without a role that is known.
    :param name: Qualified name from the base model.
    :param in_features: Width of its input.
    :param out_features: Width of its output; for a part of a fused module, of that part alone.
    :param columns: The target module's features among the module's output features: a slice, or int64 indices.
    :param transposed: The module stores its weight [in, out].
    :param space: What its edit is added to: the "stream", or the input of "attention" or of the "mlp".  In hosts that
        normalise after the layer, attention reads the stream itself.
    :param call: Number of this call among the module's `calls` in one pass, from 0: layers may share a module.
    :param written: Of a writer: name and module whose output is added to the stream, where the host normalises what
        the writer gives before it adds it; None if that is the writer itself.
    :param scale: Of a writer: the host multiplies what it writes by this before adding it.  An edit is a part of what
        it writes, so it needs no correction.
    :param matrix: False for a whole block of experts, which has no weight of its own.
    """

    type: str
    name: str
    module: nn.Module
    in_features: int
    out_features: int
    columns: slice | Tensor
    transposed: bool
    space: str
    call: int = 0
    calls: int = 1
    written: tuple[str, nn.Module] | None = None
    scale: float = 1.0
    matrix: bool = True

    def weight(self) -> Tensor:
        """Its weight as a detached [out_features, in_features] tensor; a view of the module's own where possible."""
        weight = dense(self.module.get_parameter("weight"))
        return (weight.T if self.transposed else weight)[self.columns]

    @property
    def module_features(self) -> int:
        """Output features of the whole module, which is wider than the target module when it is fused."""
        if not self.matrix:
            return self.out_features
        return int(self.module.get_parameter("weight").shape[1 if self.transposed else 0])

    @property
    def fused(self) -> bool:
        """Whether it is a part of a wider module."""
        return self.out_features != self.module_features

    def bias(self) -> Tensor | None:
        """Its bias as a detached [out_features] view, or None where the module has none."""
        bias = getattr(self.module, "bias", None)
        return bias.detach()[self.columns] if isinstance(bias, Tensor) else None

    def whole(self) -> TargetModule:
        """The module that it is, or is a part of, without a role."""
        total = self.module_features
        return replace(self, type="other", out_features=total, columns=slice(0, total), space="stream", written=None)

    @property
    def edited(self) -> nn.Module:
        """The module whose output an edit of this one's output is added to."""
        return self.module if self.written is None else self.written[1]


@dataclass(frozen=True, eq=False)
class HostLayer:
    """One layer and its target modules by module type.

    :param name: Qualified name from the base model.
    :param call: Number of this layer's call among the module's `calls` in one pass; layers may share their module.
    :param problem: Why the layer lacks target modules; empty if it has attention and a feed-forward part.
    :param others: Other linear modules, of layers that lack target modules: a LoRA can go on them.
    """

    index: int
    name: str
    module: nn.Module
    target_modules: Mapping[str, TargetModule]
    call: int = 0
    calls: int = 1
    problem: str = ""
    others: tuple[TargetModule, ...] = ()


@dataclass(frozen=True, eq=False)
class HostMap:
    """The modules of one model that uhl reads or edits.

    :param decoder: Attention is causal.
    :param pooler: Name of a module that does not affect the hidden states; checkpoints may lack its weights.
    :param positions: Longest input that the model has positions for; None where nothing limits it.
    """

    base: nn.Module
    hidden_size: int
    layers: tuple[HostLayer, ...]
    embeddings: nn.Embedding
    decoder: bool
    pooler: str | None
    positions: int | None

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, each call of a shared one counted."""
        return len(self.layers)

    @property
    def degree(self) -> Degree:
        """What can be edited: "all" layers, with attention and feed-forward part; "some" parts of layers; or no module
        of any layer, the "stream" alone."""
        whole = all({"q", "down"} <= layer.target_modules.keys() for layer in self.layers)
        return "all" if whole else "some" if any(layer.target_modules for layer in self.layers) else "stream"

    def on(self, base: nn.Module) -> HostMap:
        """The same map of a copy of the model."""
        names = {module: name for name, module in self.base.named_modules()}

        def moved(linear: TargetModule) -> TargetModule:
            written = None if linear.written is None else (linear.written[0], base.get_submodule(linear.written[0]))
            return replace(linear, module=base.get_submodule(linear.name), written=written)

        layers = tuple(
            replace(
                layer,
                module=base.get_submodule(layer.name),
                target_modules={kind: moved(linear) for kind, linear in layer.target_modules.items()},
                others=tuple(map(moved, layer.others)),
            )
            for layer in self.layers
        )
        embeddings: Any = base.get_submodule(names[self.embeddings])
        return replace(self, base=base, layers=layers, embeddings=embeddings)


def not_finite_hint(host_map: HostMap) -> str:
    """What to do about values of a host that are not finite: a wider type, unless it has that already."""
    wide = host_map.embeddings.weight.dtype == torch.float32
    return "Check the checkpoint." if wide else "Load it with --dtype float32."


def read_layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The stream that enters a layer, from the arguments of a `forward_pre_hook(with_kwargs=True)`.

    :returns: [batch, tokens, hidden_size].
    :raises HostMapError: The first floating-point argument is no such tensor.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.dim() == 3:
                return value
            break
    raise HostMapError("A layer was called without a [batch, tokens, hidden_size] stream.", MAP_HINT)
