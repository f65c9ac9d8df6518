"""A ported adapter: the result of `fold` for one host, as a module of buffers.

It does not contain the host.  `.to`, `deepcopy`, `state_dict` and `buffers` work as in torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.adapter.sparse import is_packed, pack_rows
from uhl_cli.codes.layout import TAIL_BYTES, is_table
from uhl_cli.errors import HostError
from uhl_cli.host.hostmap import HostMap, TargetModule
from uhl_cli.schema import Structure

READERS = ("q", "k", "v", "up", "gate")
WRITERS = ("o", "down")


class Buffers(nn.Module):
    """Named buffers with the interface of a read-only mapping."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and tensors, in the order in which they were given."""
        return [(name, self[name]) for name in self]


class PortedLayer(nn.Module):
    """Maps of one layer of a host of width d; M atoms.

    `router` [M, d] and `router_bias` [M] give the logits of a stream state; `read` [M, d] and `read_bias` [M]
    the atoms' responses v_j . z.  Types with `gains[type]` [M], which is g(t, type), are edited: the rows of
    `edits[edit_name(linear)]`, times routing weight, response and gain, are added

    * to the input of a reader, [M, d] (W (x + delta) is dW = W Delta, and needs no weight of the host);
    * to the output of a writer, [M, d]; its response is computed from its own output;
    * to the output of a part of a fused module, [M, out_features], because its parts share one input but not the gain.

    Gains are stored separately because only they differ between the task files of one adapter.  `router`, `read` and
    the edits are tables, see `sparse`.
    """

    router: Tensor
    router_bias: Tensor
    read: Tensor
    read_bias: Tensor

    def __init__(
        self,
        router: Tensor,
        router_bias: Tensor,
        read: Tensor,
        read_bias: Tensor,
        edits: Mapping[str, Tensor],
        gains: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.register_buffer("router", router)
        self.register_buffer("router_bias", router_bias)
        self.register_buffer("read", read)
        self.register_buffer("read_bias", read_bias)
        self.edits = Buffers(edits)
        self.gains = Buffers(gains)

    def with_gains(self, gains: Mapping[str, Tensor]) -> PortedLayer:
        """The same layer with other gains; all else is shared."""
        return PortedLayer(self.router, self.router_bias, self.read, self.read_bias, dict(self.edits.items()), gains)

    def scaled(self, strength: float) -> PortedLayer:
        """The same layer with all gains times `strength`."""
        return self.with_gains({name: strength * gain for name, gain in self.gains.items()})


class PortedReadout(nn.Module):
    """The canonical readout on a host: a weight [readout_size, d] for each depth it reads, and the layers after them.

    `layer` routes the readout's own update from the final state; None without that update.  Its single edit "readout"
    is [M, readout_size].  `pool` is None for token tasks.  `shift` [readout_size], if any, is added to the features
    while updates are on (see `ported.shift`).
    """

    bias: Tensor
    pool: Tensor | None
    out_weight: Tensor
    out_bias: Tensor
    shift: Tensor | None

    def __init__(
        self,
        depth_weights: Mapping[int, Tensor],
        bias: Tensor,
        layer: PortedLayer | None,
        pool: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.depth_weights = Buffers({str(depth): weight for depth, weight in depth_weights.items()})
        self.register_buffer("bias", bias)
        self.layer = layer
        self.register_buffer("pool", pool)
        self.register_buffer("out_weight", out_weight)
        self.register_buffer("out_bias", out_bias)
        self.register_buffer("shift", shift)

    @property
    def by_depth(self) -> dict[int, Tensor]:
        """The weights by depth, 0 to L."""
        return {int(depth): weight for depth, weight in self.depth_weights.items()}

    def changed(self, *, layer: PortedLayer | None, shift: Tensor | None) -> PortedReadout:
        """The same readout with another update (`layer`) and another shift; all else is shared."""
        return PortedReadout(self.by_depth, self.bias, layer, self.pool, self.out_weight, self.out_bias, shift)

    def logits(self, features: Tensor, content_mask: Tensor, words: Tensor | None) -> Tensor:
        """Logits of the canonical readout (docs/method.md, "Readout").

        :param features: [batch, tokens, readout_size], see `Attachment.readout_features`.
        :param content_mask: bool [batch, tokens]; the attention pool sees these tokens only.
        :param words: For token tasks, averaging weights [words, batch * tokens].
        :returns: [batch, labels] for sequence tasks, [words, labels] for token tasks.
        """
        hidden = functional.gelu(features)
        if self.pool is not None:
            scores = (hidden @ self.pool.to(hidden.dtype)).masked_fill(~content_mask, -torch.inf)
            hidden = (functional.softmax(scores, dim=1).unsqueeze(-1) * hidden).sum(1)
        logits = hidden @ self.out_weight.to(hidden.dtype).T
        if self.pool is None:
            assert words is not None
            # Averaging commutes with the linear layer; after it there are fewer columns to average.
            logits = words.to(logits.dtype) @ logits.reshape(-1, logits.shape[-1])
        return logits + self.out_bias.to(hidden.dtype)


class LoraFactors(nn.Module):
    """LoRA (Hu et al., 2021, section 4.1): a module's output gains B A x.  Scaling by alpha / r is part of B.

    :param factors: A [r, in_features] and B [out_features, r] of each linear module, by its name from the base model.
        A module that holds several target modules has one pair.
    """

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        keys = {name: name.replace(".", "/") for name in factors}  # torch allows no dot in a buffer's name
        self.down = Buffers({keys[name]: down for name, (down, _) in factors.items()})
        self.up = Buffers({keys[name]: up for name, (_, up) in factors.items()})

    @property
    def by_module(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B by the name of the module."""
        return {key.replace("/", "."): (self.down[key], self.up[key]) for key in self.down}

    @property
    def rank(self) -> int:
        """r, the same for all modules."""
        return next(int(down.shape[0]) for _, down in self.down.items())


class PortedAdapter(nn.Module):
    """An adapter in the shape of one host; `attach` attaches it, and a ported folder stores it.

    `noise_maps` map an error of z to routers, responses and readout; only training uses them.  `lora` is the LoRA that
    `tune` adds to the host's linear modules, if any.
    """

    threshold: Tensor
    lora: LoraFactors | None

    def __init__(
        self,
        threshold: Tensor,
        layers: Mapping[int, PortedLayer],
        readout: PortedReadout,
        noise_maps: Mapping[str, Tensor] | None = None,
        lora: LoraFactors | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)
        self.lora = lora
        self.layers = nn.ModuleDict({str(index): layer for index, layer in layers.items()})
        self.readout = readout
        self.noise_maps = dict(noise_maps or {})

    @property
    def by_layer(self) -> dict[int, PortedLayer]:
        """The layers that carry updates, by index."""
        return {int(index): layer for index, layer in self.layers.items()}  # type: ignore[misc]

    @property
    def kind(self) -> str:
        """Kind of the readout's task: "tokens" or "sequence"."""
        return "tokens" if self.readout.pool is None else "sequence"

    @property
    def updates(self) -> bool:
        """Whether the adapter has any update, in a layer or in the readout."""
        return len(self.layers) > 0 or self.readout.layer is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, in their own precision."""
        return sum(int(buffer.nbytes) for buffer in self.buffers())

    @property
    def is_finite(self) -> bool:
        """Whether all tensors are finite; for packed tables, whether their steps and offsets are."""
        tails = (
            buffer[:, -TAIL_BYTES:].contiguous().view(torch.float32) if is_packed(buffer) else buffer
            for buffer in self.buffers()
        )
        return all(bool(torch.isfinite(values).all()) for values in tails)

    def with_shift(self, shift: Tensor | None) -> PortedAdapter:
        """The same adapter whose readout adds `shift` [readout_size] to its features."""
        readout = self.readout.changed(layer=self.readout.layer, shift=shift)
        return PortedAdapter(self.threshold, self.by_layer, readout, self.noise_maps, self.lora)

    def with_lora(self, lora: LoraFactors | None) -> PortedAdapter:
        """The same adapter with another LoRA, or none."""
        return PortedAdapter(self.threshold, self.by_layer, self.readout, self.noise_maps, lora)

    def with_strength(self, strength: float) -> PortedAdapter:
        """The same adapter with its updates, and their shift, scaled by `strength`."""
        if strength == 0.0:
            return self.without_updates()
        if strength == 1.0:
            return self
        own, shift = self.readout.layer, self.readout.shift
        readout = self.readout.changed(
            layer=None if own is None else own.scaled(strength), shift=None if shift is None else strength * shift
        )
        layers = {index: layer.scaled(strength) for index, layer in self.by_layer.items()}
        return PortedAdapter(self.threshold, layers, readout, self.noise_maps, self.lora)

    def with_offsets(self, offsets: Tensor) -> PortedAdapter:
        """The same adapter with `offsets` [labels] added to its logits."""
        own = self.readout
        bias = own.out_bias + offsets.to(own.out_bias)
        readout = PortedReadout(own.by_depth, own.bias, own.layer, own.pool, own.out_weight, bias, own.shift)
        return PortedAdapter(self.threshold, self.by_layer, readout, self.noise_maps, self.lora)

    def without_updates(self) -> PortedAdapter:
        """The readout alone."""
        return PortedAdapter(self.threshold, {}, self.readout.changed(layer=None, shift=None))

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> PortedAdapter:
        """The same structure with `change(name, tensor)` in place of each buffer, and without noise maps."""
        found = _mapped(self, "", change)
        found.noise_maps = {}
        return found

    def for_inference(self, device: torch.device, dtype: torch.dtype) -> PortedAdapter:
        """The same adapter detached and on a device: tables packed, all other tensors in `dtype`."""

        def change(name: str, value: Tensor) -> Tensor:
            if is_table(name):
                return pack_rows(value).to(device)
            return value.detach().to(device=device, dtype=dtype).contiguous()

        return self.mapped(change)

    @property
    def structure(self) -> Structure:
        """The adapter's structure: layers, types, depths and sizes, without tensors."""
        own = self.readout.layer
        some = [*self.by_layer.values(), *([] if own is None else [own])]
        return Structure(
            num_atoms=max((len(layer.read_bias) for layer in some), default=1),
            top_k=len(self.threshold),
            readout_size=len(self.readout.bias),
            layers={index: tuple(layer.gains) for index, layer in self.by_layer.items()},
            readout_depths=tuple(self.readout.by_depth),
            readout_update=own is not None,
            shift=self.readout.shift is not None,
            lora_rank=0 if self.lora is None else self.lora.rank,
        )

    @classmethod
    def empty(cls, structure: Structure, host_map: HostMap, *, kind: str, num_labels: int) -> PortedAdapter:
        """The packed adapter of this structure on a host: its shapes, on the meta device, in the host's dtype.

        :raises KeyError: The host has no such layer, module type or depth.
        """
        width, atoms, readout_size = host_map.hidden_size, structure.num_atoms, structure.readout_size
        dtype = host_map.embeddings.weight.dtype

        def values(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def table(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns + TAIL_BYTES, dtype=torch.uint8, device="meta")

        def layer(edits: Mapping[str, int], types: Iterable[str]) -> PortedLayer:
            tables = {name: table(atoms, columns) for name, columns in edits.items()}
            gains = {name: values(atoms) for name in types}
            return PortedLayer(table(atoms, width), values(atoms), table(atoms, width), values(atoms), tables, gains)

        places = {place.index: place.target_modules for place in host_map.layers}
        layers = {
            index: layer(edit_columns([places[index][name] for name in types], width), types)
            for index, types in structure.layers.items()
        }
        beyond = set(structure.readout_depths).difference(range(host_map.num_hidden_layers + 1))
        if beyond:
            raise KeyError(f"depth {min(beyond)}")
        readout = PortedReadout(
            {depth: table(readout_size, width) for depth in structure.readout_depths},
            values(readout_size),
            layer({"readout": readout_size}, ("readout",)) if structure.readout_update else None,
            values(readout_size) if kind == "sequence" else None,
            values(num_labels, readout_size),
            values(num_labels),
            values(readout_size) if structure.shift else None,
        )
        rank, factors = structure.lora_rank, {}
        for name, module in linear_modules(host_map).items():
            factors[name] = (values(rank, module.in_features), values(module.module_features, rank))
        return cls(values(structure.top_k), layers, readout, lora=LoraFactors(factors) if rank else None)


def linear_modules(host_map: HostMap) -> dict[str, TargetModule]:
    """The linear modules of all layers by name, each with one of its target modules; fused or shared ones once."""
    return {
        linear.name: linear
        for layer in host_map.layers
        for linear in (*layer.target_modules.values(), *layer.others)
        if linear.matrix
    }


def tuned_modules(host_map: HostMap) -> dict[str, TargetModule]:
    """The linear modules that get a LoRA.

    :raises HostError: There is none.
    """
    found = linear_modules(host_map)
    if not found:
        raise HostError(
            f"{type(host_map.base).__name__} has no linear module in its layers, so nothing in it can be tuned.",
            "Use `uhl port`: it needs none.",
        )
    return found


def edit_name(linear: TargetModule) -> str:
    """Name of the layer's edit for a module: the edit of its space, or its own if it is a part of a fused module."""
    return linear.type if linear.fused else linear.space


def edit_columns(target_modules: Iterable[TargetModule], width: int) -> dict[str, int]:
    """Number of columns of each edit that these target modules of one layer use, on a host of this width."""
    return {edit_name(linear): linear.out_features if linear.fused else width for linear in target_modules}


def _mapped(module: nn.Module, prefix: str, change: Callable[[str, Tensor], Tensor]) -> PortedAdapter:
    found = copy.copy(module)
    found.__dict__["_buffers"] = {
        name: None if value is None else change(prefix + name, value) for name, value in module._buffers.items()
    }
    found.__dict__["_modules"] = {
        name: None if part is None else _mapped(part, f"{prefix}{name}.", change)
        for name, part in module._modules.items()
    }
    return found  # type: ignore[return-value]
