"""Resolve a family row against a model: find its modules and check their shapes (`proof` checks what they do)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uhl_cli.errors import HostMapError, UnknownFamilyError
from uhl_cli.host.families import READER_TYPES, WRITER_TYPES, Family, TargetModuleRule, family_of
from uhl_cli.host.inner import base_of
from uhl_cli.schema import Degree

_WEIGHT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_UP_TO_NUMBER = re.compile(r"^.*?\.\d+\.")
_HINT = "Use an unmodified checkpoint of a known model type, or open an issue that names this one."


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

    :param type: One of `families.MODULE_TYPES`; "other" for a linear module without a role that is known.
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

    @property
    def name_in_layer(self) -> str:
        """Its name from the layer, of a map by a row: there, layers are numbered."""
        return _UP_TO_NUMBER.sub("", self.name)

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
    :param by_structure: The map was found by running the model; otherwise by a row of `families`.
    """

    base: nn.Module
    hidden_size: int
    layers: tuple[HostLayer, ...]
    embeddings: nn.Embedding
    decoder: bool
    pooler: str | None
    positions: int | None
    by_structure: bool = False

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
    raise HostMapError("A layer was called without a [batch, tokens, hidden_size] stream.", _HINT)


def find_map(model: nn.Module) -> HostMap:
    """The map of a model, after checking its shapes against its family's row.

    The map is of its base model, see `inner.base_of`.  Only shapes are read, so models on the meta device can be
    resolved; `proof.resolve` also runs the model.

    :raises UnknownFamilyError: The model's type has no row.
    :raises HostMapError: The row does not fit the model.
    """
    base = base_of(model)
    config = getattr(base, "config", None)
    family = family_of(config, type(base))
    layers = _module(base, family.layers, "list of layers")
    if not isinstance(layers, nn.ModuleList) or len(layers) != config.num_hidden_layers:  # type: ignore[union-attr]
        raise HostMapError(f"'{family.layers}' is not a list of the configuration's number of layers.", _HINT)
    embeddings = _module(base, family.embeddings, "input embedding")
    if not isinstance(embeddings, nn.Embedding):
        raise HostMapError(f"'{family.embeddings}' is not an nn.Embedding.", _HINT)
    hidden_size = int(config.hidden_size)  # type: ignore[union-attr]
    if hidden_size < 1 or not len(layers) or embeddings.num_embeddings < 1:
        raise HostMapError(f"{type(base).__name__} has no layers, no embeddings, or a width of {hidden_size}.", _HINT)
    _check_embeddings(base, family, embeddings, hidden_size)
    return HostMap(
        base=base,
        hidden_size=hidden_size,
        layers=tuple(_layer(family, index, layer, hidden_size) for index, layer in enumerate(layers)),
        embeddings=embeddings,
        decoder=family.decoder or bool(getattr(config, "is_decoder", False)),
        pooler=family.pooler,
        positions=positions_of(config),
    )


def positions_of(config: Any) -> int | None:  # noqa: ANN401 - any family's configuration class
    """Longest input that a configuration's positions allow; None if it names no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    try:
        after_padding = family_of(config).positions_after_padding
    except UnknownFamilyError:
        after_padding = False
    pad = config.pad_token_id if after_padding else None
    return positions - (pad + 1 if isinstance(pad, int) else 0)


def _module(root: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise HostMapError(f"{type(root).__name__} has no {what} at '{path}'.", _HINT) from None


def _check_embeddings(base: nn.Module, family: Family, embeddings: nn.Embedding, hidden_size: int) -> None:
    """Check that embeddings have the hidden size, directly or after the row's projection."""
    if embeddings.embedding_dim == hidden_size:
        return
    if family.embedding_projection is not None:
        projection = _module(base, family.embedding_projection, "embedding projection")
        if tuple(getattr(projection, "weight", torch.empty(0)).shape) == (
            hidden_size,
            embeddings.embedding_dim,
        ):
            return
    raise HostMapError(f"Embeddings have width {embeddings.embedding_dim} and no projection to {hidden_size}.", _HINT)


def _layer(family: Family, index: int, layer: nn.Module, hidden_size: int) -> HostLayer:
    target_modules = {
        kind: _target_module(family, kind, rule, index, layer) for kind, rule in family.target_modules.items()
    }
    for kind, linear in target_modules.items():
        width = linear.in_features if kind in READER_TYPES else linear.out_features
        verb = "reads" if kind in READER_TYPES else "writes"
        if kind in READER_TYPES | WRITER_TYPES and width != hidden_size:
            raise HostMapError(f"'{linear.name}' ({kind}) {verb} {width} features, not {hidden_size}.", _HINT)
    _check_widths(target_modules)
    _check_parts(target_modules)
    return HostLayer(index, f"{family.layers}.{index}", layer, target_modules)


def _target_module(family: Family, kind: str, rule: TargetModuleRule, index: int, layer: nn.Module) -> TargetModule:
    module = _module(layer, rule.path, f"module of type {kind}")
    name = f"{family.layers}.{index}.{rule.path}"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in _WEIGHT_DTYPES:
        raise HostMapError(
            f"'{name}' ({type(module).__name__}) has no floating-point weight matrix.",
            "Load the checkpoint without quantisation, or use an unquantised one.",
        )
    total, in_features = reversed(weight.shape) if rule.transposed else weight.shape
    part, parts = rule.slice or (0, 1)
    if total % parts != 0 or not 0 <= part < parts:
        raise HostMapError(f"'{name}' has no part {part} of {parts} equal parts of {total}.", _HINT)
    out_features = total // parts
    return TargetModule(
        type=kind,
        name=name,
        module=module,
        in_features=in_features,
        out_features=out_features,
        columns=slice(part * out_features, (part + 1) * out_features),
        transposed=rule.transposed,
        space=_space(family, kind),
    )


def _space(family: Family, kind: str) -> str:
    if kind in ("up", "gate"):
        return "mlp"
    return "attention" if kind in READER_TYPES and family.pre_norm else "stream"


def _check_widths(target_modules: Mapping[str, TargetModule]) -> None:
    """Check that widths agree inside attention (grouped queries allowed) and inside the feed-forward part."""
    q, k, v, o, up, down = (target_modules[kind] for kind in ("q", "k", "v", "o", "up", "down"))
    attention = q.out_features == o.in_features and k.out_features == v.out_features
    grouped = k.out_features > 0 and q.out_features % k.out_features == 0
    gate = target_modules.get("gate", up)
    if not (attention and grouped):
        raise HostMapError(f"The widths of q, k, v and o do not fit each other at '{q.name}'.", _HINT)
    if not up.out_features == gate.out_features == down.in_features:
        raise HostMapError(f"The widths of up, gate and down do not fit each other at '{up.name}'.", _HINT)


def _check_parts(target_modules: Mapping[str, TargetModule]) -> None:
    """Check that target modules that share a module split its output without overlap or remainder."""
    columns: dict[str, list[tuple[int, int]]] = {}
    for linear in target_modules.values():
        part: Any = linear.columns  # a row's parts are slices
        columns.setdefault(linear.name, []).append((part.start, part.stop))
    for linear in target_modules.values():
        weight: Any = linear.module.weight
        end = 0
        for start, stop in sorted(columns[linear.name]):
            if start != end:
                raise HostMapError(f"The parts of '{linear.name}' overlap or leave a gap.", _HINT)
            end = stop
        if end != weight.shape[1 if linear.transposed else 0]:
            raise HostMapError(f"The parts of '{linear.name}' do not cover its output.", _HINT)
