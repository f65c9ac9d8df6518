"""Prove a host map by running the model: check that every target module computes, and does, what the map states.

Checked on every layer:

1. each layer is called with a [batch, tokens, hidden_size] stream, as often as the map says, and hands it on to the
   next;
2. a linear's output is its input times the linear's weight, plus its bias (so the weight is not
   transposed, quantised or wrapped);
3. noise on a linear's output changes the output of its layer, which is what the next one gets;
4. q acts on its own token alone, k on later ones too, and v adds the same to each token;
5. up acts on its own token alone; where there is a gate, it is inside the activation and up outside it, so doubling up
   doubles what down reads;
6. q reads the stream itself, or a normalised copy of it, as the map says;
7. a shift of what a writer adds arrives at the layer's end as added, or is normalised there together with the stream;
8. a decoder's states do not depend on later tokens, an encoder's do.

Facts 4 and 5 tell modules of equal shape apart.  Each layer runs once more, alone: every fact has a text of its own
in the batch, and is compared with the same text of the pass without edits, so that rounding is the same.  A fact that
does not hold takes the layer's attention or its feed-forward part out of the map.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from uhl_cli.errors import HostMapError
from uhl_cli.host.discover import discover
from uhl_cli.host.hostmap import GROUPS, MAP_HINT, WRITER_TYPES, HostLayer, HostMap, TargetModule, not_finite_hint
from uhl_cli.host.inner import base_of
from uhl_cli.host.map_cache import load_map, save_map
from uhl_cli.host.running import evaluating
from uhl_cli.host.trace import (
    SHARE_OF_SHIFT,
    Alone,
    Call,
    Edit,
    Key,
    Tracer,
    instead,
    near,
    other_size,
    plus,
    rows_of,
    times,
)
from uhl_cli.host.untrusted import FOREIGN

_TOKENS = 5
_MIDDLE = 2
# One text for each fact that needs a pass of its own.
_TEXTS = ("q", "k", "v", "2v", "up", "2up", "gate", "o", "down", "o+", "down+", "2o", "2down")
# Up to the rounding of half precision and tensor cores.
_ROUNDING = 0.03
_SMALLEST_SCALE = 1e-3


def resolve(model: nn.Module, *, cached: bool = False) -> HostMap:
    """The model's map found by running it, with those parts of its layers that are proved.

    :param cached: Take the map from the cache, or put it there, see `map_cache`.  For models that were loaded from
        files: the cache does not see what was done to a model in memory.
    :raises HostMapError: The model does not run, or hands no stream of states from layer to layer.
    """
    base = base_of(model)
    if cached:
        return _kept(base)
    with evaluating(base):
        return proved_parts(discover(base))


def _kept(base: nn.Module) -> HostMap:
    """The map from the cache, if the model runs as it says; else found, proved and kept."""
    kept = load_map(base)
    if kept is not None:
        with evaluating(base), torch.no_grad(), suppress(HostMapError, *FOREIGN):
            _prove_streams(kept, _Runner(kept, {layer.module for layer in kept.layers}, texts=1))
            return kept
    found = resolve(base)
    save_map(found)
    return found


@torch.no_grad()
def proved_parts(host_map: HostMap, indices: Collection[int] | None = None) -> HostMap:
    """A map with those groups of each layer's modules whose facts hold; in eval mode.

    :param indices: The layers to prove; the others stay as they are.  All by default.
    :raises HostMapError: A fact about the whole model does not hold.
    """
    runner = _runner(host_map)
    layers = []
    for layer in host_map.layers:
        kept: dict[str, TargetModule] = {}
        others = list(layer.others)
        problems = [layer.problem] if layer.problem else []
        if indices is not None and layer.index not in indices:
            layers.append(layer)
            continue
        edited = runner.edited(layer) if layer.target_modules else None
        for group in GROUPS:
            part = {kind: layer.target_modules[kind] for kind in group if kind in layer.target_modules}
            try:
                if edited is not None and part:
                    scale = _prove_group(edited, layer, group)
                    writer = next(kind for kind in part if kind in WRITER_TYPES)
                    kept |= part | {writer: replace(part[writer], scale=scale)}
            except HostMapError as error:
                problems.append(error.message)
                others += [linear.whole() for linear in part.values() if _is_linear(runner, linear)]
        problem, some = "; ".join(problems), {linear.name: linear for linear in others}
        layers.append(replace(layer, target_modules=kept, problem=problem, others=tuple(some.values())))
    return replace(host_map, layers=tuple(layers))


def _runner(host_map: HostMap) -> _Runner:
    """The pass without edits, after the facts about the whole model are checked."""
    watched = {layer.module for layer in host_map.layers}
    for layer in host_map.layers:
        watched |= {module for linear in layer.target_modules.values() for module in (linear.module, linear.edited)}
    runner = _Runner(host_map, watched)
    _prove_streams(host_map, runner)
    _prove_direction(host_map, runner)
    return runner


def _prove_group(edited: _Edited, layer: HostLayer, group: tuple[str, ...]) -> float:
    """Check the facts of a layer's attention or feed-forward part; returns the scale of what it writes.

    :raises HostMapError: One does not hold.
    """
    linears = [layer.target_modules[kind] for kind in group if kind in layer.target_modules]
    for linear in linears:
        if linear.matrix:
            _prove_weight(edited.runner, linear)
    if "q" in group:
        _prove_norm(edited.runner, layer)
    for linear in linears:
        if not edited.changes_result(linear.type):
            raise HostMapError(f"Editing '{linear.name}' ({linear.type}) does not change the result.", MAP_HINT)
    if "q" in group:
        _prove_attention(edited, layer)
        return _arrival(edited, layer, "o")
    _prove_feed_forward(edited, layer)
    return _arrival(edited, layer, "down")


class _Runner:
    """A batch of one text per fact, its pass without edits, and passes with one layer edited."""

    def __init__(self, host_map: HostMap, watched: set[nn.Module], *, texts: int = len(_TEXTS)) -> None:
        self.host_map = host_map
        self.texts = texts
        self.watched = watched
        table = host_map.embeddings
        ids = torch.linspace(0, table.num_embeddings - 1, _TOKENS + 2)[1:-1].long()
        self.ids = ids.repeat(texts, 1).to(table.weight.device)
        self.tracer = Tracer(host_map.base, self.ids)
        self.generator = torch.Generator().manual_seed(0)
        final, self.calls = self.tracer.run(watched=watched)
        assert final is not None  # nothing stops this pass
        self.final = final

    def rows(self, value: Tensor) -> Tensor:
        """[texts, tokens, features] in float32.

        :raises HostMapError: It is no such state.
        """
        rows = rows_of(value, self.texts, _TOKENS)
        if rows is None:
            raise HostMapError(f"A module works on {tuple(value.shape)}, not on every token of every text.", MAP_HINT)
        return rows.float()

    def call(self, linear: TargetModule) -> Call:
        """The call of a target module in the pass without edits.

        :raises HostMapError: It does not run as often as the map says.
        """
        runs = sum(1 for key in self.calls if key[0] is linear.module)
        if runs != linear.calls:
            raise HostMapError(f"'{linear.name}' runs {runs} times in a pass, not {linear.calls}.", MAP_HINT)
        return self.calls[linear.module, linear.call]

    def noise(self, like: Tensor, *shape: int) -> Tensor:
        """Gaussian noise of the size of `like`'s root mean square, or 1 where that is zero."""
        scale = like.float().pow(2).mean().sqrt().item() or 1.0
        noise = torch.randn(shape, generator=self.generator) * scale
        return noise.to(device=like.device, dtype=like.dtype)

    def noisy(self, value: Tensor) -> Tensor:
        """A value with noise of its own size."""
        return value + self.noise(value, *value.shape)

    def edited(self, layer: HostLayer) -> _Edited:
        """The layer with each fact's edit on its own text."""
        linears = layer.target_modules
        edits: dict[Key, list[tuple[int, Edit]]] = {}
        shifts: dict[str, Tensor] = {}

        def add(key: Key, text: str, edit: Edit) -> None:
            edits.setdefault(key, []).append((_TEXTS.index(text), edit))

        def part(linear: TargetModule, change: Edit) -> Edit:
            def edit(value: Tensor) -> Tensor:
                value = value.clone()
                value[..., linear.columns] = change(value[..., linear.columns])
                return value

            return edit

        def at_middle(value: Tensor) -> Tensor:
            value = value.clone()
            value[_MIDDLE] += 4 * self.noise(value, value.shape[-1])
            return value

        for kind, linear in linears.items():
            call = self.call(linear)
            if kind in ("q", "k") or (kind == "up" and linear.matrix):
                add(call.key, kind, part(linear, at_middle))
            elif kind == "v":
                shift = shifts["v"] = 4 * self.noise(call.output, linear.out_features)
                add(call.key, "v", part(linear, plus(shift)))
                add(call.key, "2v", part(linear, plus(2 * shift)))
            elif linear.matrix:
                add(call.key, kind, part(linear, self.noisy))
            if kind == "up" and linear.matrix:
                add(call.key, "2up", part(linear, times(2)))
        self._add_writers(linears, add, shifts, self.calls[layer.module, layer.call].input)
        inputs: dict[Key, Edit] = {}
        experts = linears.get("up")
        if experts is not None and not experts.matrix:  # a block of experts is edited at its input
            inputs[self.call(experts).key] = self._on_texts([(_TEXTS.index("up"), self.noisy)])
        end = self.calls[layer.module, layer.call]
        output, calls = Alone(self.tracer, end, self.calls).run(
            inputs=inputs,
            outputs={key: self._on_texts(some) for key, some in edits.items()},
            watched=[module for linear in linears.values() for module in (linear.module, linear.edited)],
        )
        return _Edited(self, end.output, output, calls, shifts)

    def _add_writers(
        self,
        linears: Mapping[str, TargetModule],
        add: Callable[[Key, str, Edit], None],
        shifts: dict[str, Tensor],
        stream: Tensor,
    ) -> None:
        """Edits of what o and down write; down is held still while o is shifted."""
        for kind in ("o", "down"):
            if kind not in linears:
                continue
            linear = linears[kind]
            key = self.written(linear)
            output = self.calls[key].output
            # As large as the stream, so that its rounding in half precision does not hide the shift.
            like = max((output, stream), key=lambda value: value.float().pow(2).mean().item())
            shift = shifts[kind] = self.noise(like, output.shape[-1])
            add(key, f"{kind}+", plus(shift))
            add(key, f"2{kind}", times(other_size(output, stream)))
            if not linear.matrix:
                add(key, kind, self.noisy)
        if "down" not in linears:
            return
        down = self.written(linears["down"])
        still = self.calls[down].output
        flat = still.dim() == 2
        for text in ("o+", "2o"):
            index = _TEXTS.index(text)
            rows = still[index * _TOKENS : (index + 1) * _TOKENS] if flat else still[index]
            add(down, text, instead(rows))

    def written(self, linear: TargetModule) -> Key:
        """The call whose output an edit of a writer is added to."""
        if linear.written is None:
            return self.call(linear).key
        module = linear.written[1]
        runs = [key for key in self.calls if key[0] is module]
        if len(runs) != linear.calls:
            raise HostMapError(f"'{linear.written[0]}' does not run once for each call of '{linear.name}'.", MAP_HINT)
        return runs[linear.call]

    def _on_texts(self, edits: list[tuple[int, Edit]]) -> Edit:
        """Edits of [texts, tokens, features] or [texts * tokens, features], each on its own text."""

        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            for index, change in edits:
                span = slice(index * _TOKENS, (index + 1) * _TOKENS) if value.dim() == 2 else index
                value[span] = change(value[span])
            return value

        return edit


@dataclass(frozen=True, eq=False)
class _Edited:
    """A layer with edits: its output before them and with them; `shifts` are those of v, o and down."""

    runner: _Runner
    before: Tensor
    output: Tensor
    calls: Mapping[Key, Call]
    shifts: Mapping[str, Tensor]

    def change(self, text: str, value: Callable[[Call], Tensor], key: Key) -> tuple[Tensor, Tensor]:
        """(change, value before) of a call's input or output for the text of one fact, [tokens, features]."""
        index = _TEXTS.index(text)
        before = self.runner.rows(value(self.runner.calls[key]))[index]
        return self.runner.rows(value(self.calls[key]))[index] - before, before

    def changes_result(self, text: str) -> bool:
        """Whether that edit changes what the layer hands on."""
        index = _TEXTS.index(text)
        return not torch.equal(self.output[index], self.before[index])


def _prove_streams(host_map: HostMap, runner: _Runner) -> None:
    if not bool(torch.isfinite(runner.final).all()):
        raise HostMapError("The host's hidden states are not finite numbers.", not_finite_hint(host_map))
    for layer in host_map.layers:
        runs = sum(1 for key in runner.calls if key[0] is layer.module)
        if runs != layer.calls:
            number = "all of its layers" if runs < layer.calls else "each layer once"
            raise HostMapError(f"The model does not run {number}: '{layer.name}' runs {runs} times.", MAP_HINT)
        shape = tuple(runner.calls[layer.module, layer.call].input.shape)
        if shape != (runner.texts, _TOKENS, host_map.hidden_size):
            raise HostMapError(f"Layer {layer.index} gets {shape}, not a stream of {host_map.hidden_size}.", MAP_HINT)
    calls = [runner.calls[layer.module, layer.call] for layer in host_map.layers]
    for layer, (call, following) in zip(host_map.layers, itertools.pairwise(calls), strict=False):
        if not torch.equal(call.output, following.input):
            raise HostMapError(f"Layer {layer.index} does not hand its stream on to the next.", MAP_HINT)


def _prove_direction(host_map: HostMap, runner: _Runner) -> None:
    ids = runner.ids.clone()
    ids[:, -1] = (ids[:, -1] + 1) % host_map.embeddings.num_embeddings
    change = runner.tracer.final(ids)[:, :-1].float() - runner.final[:, :-1].float()
    # A decoder's earlier states may change by rounding alone.
    causal = bool(change.norm() <= 1e-4 * runner.final.float().norm())
    if causal != host_map.decoder:
        found = "do not depend" if causal else "depend"
        raise HostMapError(f"The host's states {found} on later tokens, unlike what the map says.", MAP_HINT)


def _prove_weight(runner: _Runner, linear: TargetModule) -> None:
    call, bias = runner.call(linear), linear.bias()
    expected = runner.rows(call.input) @ linear.weight().float().T + (0.0 if bias is None else bias.float())
    if not near(runner.rows(call.output)[..., linear.columns], expected, _ROUNDING):
        raise HostMapError(f"'{linear.name}' ({linear.type}) computes something other than its weight.", MAP_HINT)


def _is_linear(runner: _Runner, linear: TargetModule) -> bool:
    """Whether its output is its input times its weight, whatever it does in the layer."""
    try:
        if linear.matrix:
            _prove_weight(runner, linear)
    except HostMapError:
        return False
    return linear.matrix


def _prove_norm(runner: _Runner, layer: HostLayer) -> None:
    query = layer.target_modules["q"]
    stream = runner.rows(runner.calls[layer.module, layer.call].input)
    same = torch.equal(runner.rows(runner.call(query).input), stream)
    if same != (query.space == "stream"):
        found = "the stream itself" if same else "something other than the stream"
        raise HostMapError(f"Attention of layer {layer.index} reads {found}, unlike what the map says.", MAP_HINT)


def _prove_attention(edited: _Edited, layer: HostLayer) -> None:
    """q, k and v are told apart by which tokens' attention output (what o reads) they change."""
    o, v = layer.target_modules["o"], layer.target_modules["v"]
    read = edited.runner.call(o).key
    query, before = edited.change("q", lambda call: call.input, read)
    key, _ = edited.change("k", lambda call: call.input, read)
    value, _ = edited.change("v", lambda call: call.input, read)
    twice, _ = edited.change("2v", lambda call: call.input, read)
    others = [token for token in range(_TOKENS) if token != _MIDDLE]
    own_token_only = bool(query[others].norm() <= 1e-6 * before.norm() + 1e-9)
    other_tokens_too = bool(key[others].norm() > 1e-6 * before.norm())
    # Attention weights sum to one, so a shift of all values passes unchanged, once per group of queries.  With sinks or
    # a gate of the output a part of it passes: then twice the shift passes twice.
    arrived = edited.shifts["v"].float().norm() * (o.in_features / v.out_features) ** 0.5
    small = _ROUNDING * before.norm() + 1e-6
    same = bool((value - value[0]).norm() <= small + _ROUNDING * value.norm())
    whole = same and bool((value[0].norm() - arrived).abs() <= small + _ROUNDING * arrived)
    partly = near(twice, 2 * value, _ROUNDING)
    if not (own_token_only and other_tokens_too and (whole or partly)):
        raise HostMapError(f"q, k and v of layer {layer.index} do not act as such.", MAP_HINT)


def _prove_feed_forward(edited: _Edited, layer: HostLayer) -> None:
    """up acts on its own token; doubling it doubles what down reads, unless a norm before down takes that out again."""
    up, down = layer.target_modules["up"], layer.target_modules["down"]
    if not up.matrix:
        return
    read = edited.runner.call(down).key
    change, before = edited.change("up", lambda call: call.input, read)
    others = [token for token in range(_TOKENS) if token != _MIDDLE]
    own_token_only = bool(change[others].norm() <= 1e-6 * before.norm() + 1e-9)
    doubled, _ = edited.change("2up", lambda call: call.input, read)
    straight = near(doubled, before, _ROUNDING) or near(doubled + before, before, _ROUNDING)
    if not own_token_only or ("gate" in layer.target_modules and not straight):
        raise HostMapError(f"gate and up of layer {layer.index} do not act as such.", MAP_HINT)


def _arrival(edited: _Edited, layer: HostLayer, kind: str) -> float:
    """How often an edit of what a writer adds arrives at the layer's end; 1 where it is normalised with the stream.

    :raises HostMapError: It arrives otherwise.
    """
    linear = layer.target_modules[kind]
    end = (layer.module, layer.call)
    change, _ = edited.change(f"{kind}+", lambda call: call.output, end)
    wanted = edited.shifts[kind].float().expand_as(change)
    scale = float((change * wanted).sum() / wanted.pow(2).sum())
    if abs(scale) > _SMALLEST_SCALE and near(change, scale * wanted, _ROUNDING):
        return 1.0 if abs(scale - 1) < _ROUNDING else scale
    # A factor does not change what is normalised alone; it changes what is normalised with the stream, as a shift does.
    scaled, _ = edited.change(f"2{kind}", lambda call: call.output, end)
    together = linear.written is None and bool(scaled.norm() > SHARE_OF_SHIFT * change.norm())
    if not together:
        raise HostMapError(f"What '{linear.name}' ({kind}) writes does not arrive in the stream as added.", MAP_HINT)
    return 1.0
