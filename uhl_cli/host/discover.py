"""Find a host map by running the model, without known module names.

One pass of 2 x 5 tokens is traced.  The layers are the list of modules whose calls hand a [batch, tokens, width] stream
from one to the next; one module may be several layers.  `layer_search` finds what is in a layer.

What is found here is a claim: `proof` checks it on every layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uhl_cli.errors import HostMapError, first_line
from uhl_cli.host.hostmap import MODULE_TYPES, HostLayer, HostMap, TargetModule
from uhl_cli.host.layer_search import FoundLayer, FoundModule, NotFound, Traced, search_layer
from uhl_cli.host.positions import positions_of
from uhl_cli.host.trace import Call, Tracer, probe_ids
from uhl_cli.host.untrusted import FOREIGN

_BATCH, _TOKENS = 2, 5
_RUN_HINT = "Check that transformers runs it, in one dtype and on one device; a quantised one may need --dtype auto."


def discover(base: nn.Module) -> HostMap:
    """The map of a base model in eval mode, found by running it on the device it is on; to be proved.

    The model is unchanged.  Layers without attention as in a transformer get no target modules, and say why.

    :raises HostMapError: No list of layers hands a stream of states on, or the result is no such state.
    """
    return _Search(base).map()


def embedding_of(base: nn.Module, ids: Tensor) -> nn.Embedding:
    """The table that the model reads at the token ids.

    :raises HostMapError: No such table is read.
    """
    try:
        table = base.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    if isinstance(table, nn.Embedding):
        return table
    read: list[nn.Embedding] = []

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and args and torch.equal(args[0].reshape(-1), ids.reshape(-1)):
            read.append(module)

    handles = [module.register_forward_pre_hook(watch) for module in base.modules() if isinstance(module, nn.Embedding)]
    try:
        with torch.no_grad():
            Tracer(base, ids).final()
    finally:
        for handle in handles:
            handle.remove()
    if not read:
        raise NotFound(f"{type(base).__name__} reads no embedding at the token ids.")
    return read[0]


class _Search:
    """The search in one model; each step reads what the earlier ones found."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.names = {module: name for name, module in base.named_modules()}
        parameter = next(base.parameters(), None)
        if parameter is None:
            raise NotFound(f"{type(base).__name__} has no weights.")
        if parameter.is_meta:
            raise NotFound(f"{type(base).__name__} is on the meta device, without values.")
        self.ids = probe_ids(base, _BATCH, _TOKENS, parameter.device)
        self.tracer = Tracer(base, self.ids)
        try:
            with torch.no_grad():
                final, self.calls = self.tracer.run()
                self.table = embedding_of(base, self.ids)
        except FOREIGN as error:
            raise HostMapError(
                f"{type(base).__name__} does not run on token ids: {first_line(error)}", _RUN_HINT
            ) from error
        if final is None or final.dim() != 3 or final.shape[:2] != (_BATCH, _TOKENS):
            shape = None if final is None else tuple(final.shape)
            raise NotFound(f"{type(base).__name__} gives no [batch, tokens, width] state, but {shape}.")
        if not bool(torch.isfinite(final).all()):
            raise HostMapError("The host's hidden states are not finite numbers.", "Check the checkpoint.")
        self.final = final
        self.blocks = self._layer_list()
        self.width = self.blocks[0].input.shape[-1]
        if final.shape[-1] != self.width:
            raise NotFound(f"The final state has width {final.shape[-1]}, the layers' stream {self.width}.")

    def map(self) -> HostMap:
        """The map, with everything found."""
        found = self._layers()
        counts = {key[0]: 0 for key in self.calls}
        for module, _ in self.calls:
            counts[module] += 1
        layers = []
        for index, (block, layer) in enumerate(zip(self.blocks, found, strict=True)):
            try:
                modules = {
                    kind: self._target_module(kind, layer.modules[kind], block, counts)
                    for kind in MODULE_TYPES
                    if kind in layer.modules
                }
                problem = layer.problem
            except NotFound as error:  # the layer lacks a module that another of its kind runs
                modules, problem = {}, error.message
            layers.append(
                HostLayer(
                    index,
                    self.names[block.module],
                    block.module,
                    modules,
                    block.number,
                    counts[block.module],
                    problem,
                    self._others(layer, block, counts),
                )
            )
        return HostMap(
            base=self.base,
            hidden_size=self.width,
            layers=tuple(layers),
            embeddings=self.table,
            decoder=self._is_decoder(),
            pooler=self._pooler(),
            positions=positions_of(self.base),
        )

    # The list of layers, and the ends of the model.

    def _layer_list(self) -> list[Call]:
        """The calls of the list of modules, of all lists the one with most weights, that hands one stream on."""
        best: tuple[int, list[Call]] | None = None
        problems: list[tuple[int, str]] = []
        for group, name in self.names.items():
            if not isinstance(group, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                continue
            members = set(group.children())
            calls = [call for call in self.calls.values() if call.module in members]
            if not calls:
                continue
            weight = sum(parameter.numel() for parameter in group.parameters())
            problem = _broken(calls)
            if problem:
                problems.append((weight, f"'{name}': {problem}"))
            elif best is None or weight > best[0]:
                best = (weight, calls)
        worst = max(problems, default=None)
        if best is None or (worst is not None and worst[0] > 2 * best[0]):
            reason = "no list of modules runs" if worst is None else worst[1]
            raise NotFound(f"No list of layers of {type(self.base).__name__} hands a stream on ({reason}).")
        return best[1]

    def _is_decoder(self) -> bool:
        """Whether another last token leaves the states of all earlier ones as they are."""
        ids = self.ids.clone()
        ids[:, -1] = (ids[:, -1] + 7) % self.table.num_embeddings
        with torch.no_grad():
            other = self.tracer.final(ids)
        return bool((other[:, :-1] - self.final[:, :-1]).norm() <= 1e-5 * self.final.norm())

    def _pooler(self) -> str | None:
        """A child of the base that runs after the layers and whose output is not the final state."""
        end = self.blocks[-1].end
        for name, child in self.base.named_children():
            calls = [call for call in self.calls.values() if call.module is child]
            after = bool(calls) and all(call.start > end for call in calls)
            if after and any(True for _ in child.parameters()) and calls[0].output.shape != self.final.shape:
                return name
        return None

    # Layers.

    def _layers(self) -> list[FoundLayer]:
        """What each layer holds; layers of the same classes and shapes are searched once."""
        traced = Traced(self.tracer, self.calls, self.names, torch.Generator().manual_seed(1))
        searched: dict[tuple[Any, ...], FoundLayer] = {}
        found = []
        for block in self.blocks:
            shapes = tuple((name, value.shape, value.dtype) for name, value in block.module.named_parameters())
            kind = (tuple((name, type(module)) for name, module in block.module.named_modules()), shapes)
            if kind not in searched:
                searched[kind] = search_layer(traced, block)
            found.append(searched[kind])
        return found

    def _others(self, layer: FoundLayer, block: Call, counts: dict[nn.Module, int]) -> tuple[TargetModule, ...]:
        """The other linear modules, but for those that another layer of its kind runs and this one does not."""
        found = []
        for other in layer.others:
            try:
                found.append(self._target_module("other", other, block, counts))
            except NotFound:
                continue
        return tuple(found)

    def _target_module(self, kind: str, found: FoundModule, block: Call, counts: dict[nn.Module, int]) -> TargetModule:
        call = self._call(found.path, found.index, block)
        inside, outside = call.input.shape[-1], call.output.shape[-1]
        columns, out_features = _as_columns(found.columns, outside, call.output.device)
        written = None
        if found.written is not None:
            place = block.module.get_submodule(found.written)
            written = (self.names[place], place)
        return TargetModule(
            type=kind,
            name=self.names[call.module],
            module=call.module,
            in_features=inside,
            out_features=out_features,
            columns=columns,
            transposed=found.transposed,
            space=found.space,
            call=call.number,
            calls=counts[call.module],
            written=written,
            scale=found.scale,
            matrix=found.matrix,
        )

    def _call(self, path: str, index: int, block: Call) -> Call:
        module = block.module.get_submodule(path)
        calls = [call for call in self.calls.values() if call.module is module and call.within(block)]
        if len(calls) <= index:
            raise NotFound(f"'{self.names[module]}' does not run in its layer.")
        return calls[index]


def _broken(calls: Sequence[Call]) -> str:
    """Why these calls do not hand one stream on; empty if they do."""
    for call in calls:
        if call.input.dim() != 3 or call.input.shape != call.output.shape:
            return f"a call takes {tuple(call.input.shape)} and gives {tuple(call.output.shape)}"
        if call.input.shape[:2] != (_BATCH, _TOKENS):
            return f"its states are {tuple(call.input.shape)}, not [batch, tokens, width]"
    if all(torch.equal(first.output, second.input) for first, second in itertools.pairwise(calls)):
        return ""
    return "one call does not get what the one before it gives"


def _as_columns(columns: tuple[int, ...] | None, total: int, device: torch.device) -> tuple[slice | Tensor, int]:
    """Features as a slice where they are consecutive, and their number."""
    if columns is None:
        return slice(0, total), total
    first, last = columns[0], columns[-1]
    if columns == tuple(range(first, last + 1)):
        return slice(first, last + 1), len(columns)
    return torch.tensor(columns, device=device), len(columns)
