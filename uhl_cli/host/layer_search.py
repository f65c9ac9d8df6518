"""Search one layer: its linear modules by what they do, from traced passes of the layer alone.

Noise on one token of the stream tells modules before the mixing of tokens from those after it.  Gradients of what the
attention's output projection reads tell q, k and v apart, feature by feature, so fused and interleaved projections need
no special case.  Doubling tells up from gate.  A shift of what a module writes tells how it arrives in the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from uhl_cli.errors import HostMapError
from uhl_cli.host.hostmap import MAP_HINT, dense, group_of
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
    probe_ids,
    rows_of,
    times,
)

# The token that gets the noise, so there are tokens before it and after it.
_MIDDLE = 2
# Largest root mean square of what readers give while q, k and v are told apart.
_READER_SIZE = 0.5
# Texts whose gradients tell q, k and v apart.
_TEXTS = 8
# Share of a module's features from which on all of them have the role.
_MOSTLY = 0.9
Roles = dict[str, list[tuple[Key, tuple[int, ...]]]]
"""Role in attention -> calls, with the output features that play it."""


class NotFound(HostMapError):
    """Something that a host must have was not found; the message says what, and where."""

    def __init__(self, message: str) -> None:
        super().__init__(message, MAP_HINT)


@dataclass(frozen=True)
class FoundModule:
    """A target module as found in one layer, named from the layer's module, so that it can be looked up in others.

    :param index: Which of the module's calls within the layer; `written_index` likewise.
    :param columns: Its output features; None for all.
    """

    path: str
    index: int
    columns: tuple[int, ...] | None = None
    transposed: bool = False
    space: str = "stream"
    written: str | None = None
    scale: float = 1.0
    matrix: bool = True


@dataclass
class FoundLayer:
    """What was found in a layer, and why something was not."""

    modules: dict[str, FoundModule] = field(default_factory=dict)
    problem: str = ""
    others: tuple[FoundModule, ...] = ()


@dataclass(frozen=True, eq=False)
class Traced:
    """A pass of a whole model, of [batch, tokens] ids.

    :param calls: Every call in the pass.
    :param names: Qualified names of the model's modules.
    """

    tracer: Tracer
    calls: dict[Key, Call]
    names: dict[nn.Module, str]
    generator: torch.Generator

    @property
    def ids(self) -> Tensor:
        """int64 [batch, tokens]."""
        return self.tracer.ids

    def rows(self, state: Tensor) -> Tensor | None:
        """See `rows_of`, for this pass."""
        return rows_of(state, *self.ids.shape)


def search_layer(traced: Traced, block: Call) -> FoundLayer:
    """What is found in the layer of that call; a group of modules that is not found as a whole is left out."""
    return _Block(traced, block).search()


class _Block:
    """The search in one layer."""

    def __init__(self, traced: Traced, block: Call) -> None:
        self.traced = traced
        self.block = block
        self.width = block.input.shape[-1]
        self.inside = {module: name for name, module in block.module.named_modules()}
        self.calls = {key: call for key, call in traced.calls.items() if call.within(block)}
        self.label = type(block.module).__name__
        self._alone = Alone(traced.tracer, block, traced.calls)
        self.matrices: dict[Key, bool] = {}
        # Modules with a weight matrix that is not applied to every token: experts.
        self.some_tokens: list[Key] = []

    def search(self) -> FoundLayer:
        """Target modules of attention and of the feed-forward part, each whole or not at all, with the reason."""
        self._find_matrices()
        local, mixed = self._moved_by_one_token()
        order = [key for key in self.calls if key in self.matrices and (key in local or key in mixed)]
        output = next((key for key in order if self._writes(key) and key in mixed), None)
        modules: dict[str, FoundModule] = {}
        problems = []
        taken: set[Key] = set() if output is None else {output}
        try:
            if output is None:
                raise NotFound(f"{self.label}: no linear module writes what other tokens said")
            before = [key for key in order if key in local and self.calls[key].start < self.calls[output].start]
            early = [key for key in before if self.calls[key].input.shape[-1] == self.width]
            if not early:  # then tokens are mixed without weights, and what writes after that is no part of it
                taken = set()
            roles = self._attention_roles(early, output)
            modules |= self._attention_modules(roles, output)
            taken |= {key for parts in roles.values() for key, _ in parts}
        except NotFound as error:
            problems.append(error.message)
        try:
            modules |= self._feed_forward([key for key in order if key not in taken], local | mixed, taken, output)
        except NotFound as error:
            problems.append(error.message)
        for kind in ("o", "down"):
            if kind not in modules:
                continue
            try:
                modules[kind] = self._arrival(kind, modules)
            except NotFound as error:
                problems.append(error.message)
                modules = {name: found for name, found in modules.items() if name not in group_of(kind)}
        others: tuple[FoundModule, ...] = ()
        if problems:
            used = {found.path for found in modules.values()}
            others = tuple(
                self._found(key) for key in order if self.inside[key[0]] not in used and self._index(key) == 0
            )
        return FoundLayer(modules, "; ".join(problems), others)

    def _feed_forward(
        self, rest: list[Key], moved: set[Key], taken: set[Key], output: Key | None
    ) -> dict[str, FoundModule]:
        start = min((self.calls[key].start for key in taken), default=0)
        writers = [key for key in rest if self._writes(key) and self.calls[key].start > start]
        down = max(writers, key=lambda key: (self.calls[key].input.shape[-1], self.calls[key].start), default=None)
        experts = self._expert_names()
        if down is None or experts:
            return self._experts(experts, moved, output)
        return self._up_and_down(rest, down)

    def _writes(self, key: Key) -> bool:
        return self.calls[key].output.shape[-1] == self.width

    def _run(self, **edits: Any) -> dict[Key, Call]:  # noqa: ANN401
        with torch.no_grad():
            return self._alone.run(**edits)[1]

    def _noise(self, like: Tensor, *shape: int) -> Tensor:
        scale = like.float().std().item() or 1.0
        noise = torch.randn(shape, generator=self.traced.generator) * scale
        return noise.to(device=like.device, dtype=like.dtype)

    def _find_matrices(self) -> None:
        """Calls whose output is the input times the module's weight, by whether the weight is stored [in, out]."""
        for key, call in self.calls.items():
            stored = key[0]._parameters.get("weight")
            if not isinstance(stored, Tensor) or stored.dim() != 2 or isinstance(key[0], nn.Embedding):
                continue
            if not (call.usual and call.single):  # a router also returns what it chose by its logits
                continue
            if not stored.is_floating_point():
                raise HostMapError(
                    f"'{self.traced.names[key[0]]}' ({type(key[0]).__name__}) has no floating-point weight matrix.",
                    "Load the checkpoint without quantisation, or use an unquantised one.",
                )
            weight = dense(stored)
            given, result = self.traced.rows(call.input), self.traced.rows(call.output)
            if given is None or result is None:
                self.some_tokens.append(key)
                continue
            bias = getattr(key[0], "bias", None)
            offset = bias if isinstance(bias, Tensor) else 0
            for transposed in (False, True):
                matrix = weight.T if transposed else weight
                fits = matrix.shape == (result.shape[-1], given.shape[-1])
                if fits and near(result, given @ matrix.T.to(given.dtype) + offset):
                    self.matrices[key] = transposed
                    break

    def _moved_by_one_token(self) -> tuple[set[Key], set[Key]]:
        """Calls whose input changes at that token alone, and at others too, when one token of the stream changes."""

        def at_token(state: Tensor) -> Tensor:
            state = state.clone()
            state[0, _MIDDLE] += self._noise(state, self.width)
            return state

        noisy = self._run(inputs={self.block.key: at_token})
        local: set[Key] = set()
        mixed: set[Key] = set()
        still: set[Key] = set()
        for key, call in noisy.items():
            if key not in self.calls or self.calls[key].input.shape != call.input.shape:
                continue
            if torch.equal(call.input, self.calls[key].input):
                still.add(key)
                continue
            new, old = self.traced.rows(call.input), self.traced.rows(self.calls[key].input)
            if new is None or old is None:
                continue
            moved = (new - old).norm(dim=-1) > 1e-5 * (old.norm(dim=-1) + 1e-9)
            if moved[1].any():  # these are not the batch's rows: an expert happened to get as many tokens
                self.matrices.pop(key, None)
                self.some_tokens.append(key)
                continue
            others = moved[0].clone()
            others[_MIDDLE] = False
            if others.any():
                mixed.add(key)
            elif moved[0, _MIDDLE]:
                local.add(key)
        # Tables of relative positions are no part of the stream: their input stays as it was.
        self.some_tokens = [key for key in self.some_tokens if key not in still and self.calls[key].input.numel()]
        return local, mixed

    def _attention_roles(self, readers: list[Key], output: Key) -> Roles:
        """Features of each reader by role, from the gradient of what the output projection reads at the last token.

        Values of earlier tokens matter, and so does a lone token's own value.  Keys of earlier tokens matter, but a
        lone token's own does not: its attention weight is one.  Queries matter at their own token alone, and not to a
        lone token.  What matters at its own token alone, and to a lone token too, is a gate of the output.
        """
        alone, own, others = {}, {}, {}
        most = self.traced.ids.shape[1]
        for tokens in (1, most):
            try:
                gradients = self._gradients(readers, output, tokens)
            except (RuntimeError, ValueError, IndexError):
                if tokens == most:
                    raise
                continue  # the model takes no single token
            for key, gradient in gradients.items():
                if tokens == 1:
                    alone[key] = gradient[0]
                else:
                    own[key], others[key] = gradient[-1], gradient[:-1].amax(0)
        if not own:
            raise NotFound(f"{self.label}: no linear module reads the stream before the tokens are mixed")
        small = 1e-6 * max(float(value.max()) for value in (*own.values(), *others.values()))
        # What a lone token's queries and keys get is no exact zero, but rounding of what its values get.
        rounding = 1e-5 * max((float(value.max()) for value in alone.values()), default=0.0)
        roles: Roles = {"q": [], "k": [], "v": [], "attention gate": []}
        for key in own:
            lone = alone.get(key, torch.zeros_like(own[key])) > max(small, rounding)
            far, near_by = others[key] > small, own[key] > small
            masks = {
                "v": far & lone,
                "k": far & ~lone,
                "q": near_by & ~far & ~lone,
                "attention gate": near_by & ~far & lone,
            }
            for role, mask in masks.items():
                if mask.any():
                    roles[role].append((key, tuple(mask.nonzero().flatten().tolist())))
        self._attention_sinks(roles, output)
        if not roles["q"] or not roles["k"] or not roles["v"]:
            names = ", ".join(f"'{self.inside[key[0]]}'" for key in readers)
            raise NotFound(f"{self.label}: queries, keys and values are not told apart among {names}")
        return roles

    def _gradients(self, readers: list[Key], output: Key, tokens: int) -> dict[Key, Tensor]:
        """|d (what the output projection reads at the last token) / d (output of each reader)|, [tokens, features].

        The largest of several texts, because a feature may have none at a token.
        """
        leaves: dict[Key, Tensor] = {}

        def leaf_at(key: Key) -> Edit:
            def edit(value: Tensor) -> Tensor:
                # Large queries and keys make heads that attend to one token alone, where no gradient passes.
                size = value.detach().float().pow(2).mean().sqrt().clamp_min(_READER_SIZE)
                leaves[key] = (value.detach() * (_READER_SIZE / size)).to(value.dtype).requires_grad_()
                return leaves[key]

            return edit

        ids = probe_ids(self.traced.tracer.base, _TEXTS, tokens, self.traced.ids.device)
        with torch.enable_grad():
            _, calls = self.traced.tracer.run(
                ids=ids, outputs={key: leaf_at(key) for key in readers}, stop=output, watched=(), copied=False
            )
            read = rows_of(calls[output].input, _TEXTS, tokens)
            if read is None or not leaves or not read.requires_grad:
                return {}
            direction = self._noise(read, _TEXTS, read.shape[-1])
            found = torch.autograd.grad((read[:, -1] * direction).sum(), list(leaves.values()), allow_unused=True)
        gradients = {}
        for (key, leaf), gradient in zip(leaves.items(), found, strict=True):
            rows = rows_of(torch.zeros_like(leaf) if gradient is None else gradient, _TEXTS, tokens)
            if rows is not None:
                gradients[key] = rows.abs().amax(0)
        return gradients

    def _attention_sinks(self, roles: Roles, output: Key) -> None:
        """With attention sinks a lone token's key matters; doubling the values doubles what the output reads."""
        if roles["k"] or len(roles["v"]) < 2:
            return
        before = self.calls[output].input
        for part in list(roles["v"]):
            after = self._run(outputs={part[0]: times(2)}, watched=[output[0]])[output].input
            if not near(after, 2 * before):
                roles["v"].remove(part)
                roles["k"].append(part)
        if not roles["q"]:
            roles["q"], roles["attention gate"] = roles["attention gate"], []

    def _attention_modules(self, roles: Roles, output: Key) -> dict[str, FoundModule]:
        modules: dict[str, FoundModule] = {"o": self._found(output)}
        read: Tensor | None = None
        sizes: dict[str, int] = {}
        for role in ("q", "k", "v"):
            key, columns = max(roles[role], key=lambda part: len(part[1]))
            total, heads = self.calls[key].output.shape[-1], self.calls[output].input.shape[-1]
            # In a module of its own, few features look otherwise: those of a head that attends to one token alone.
            if len(columns) >= _MOSTLY * total and heads % total == 0:
                columns = tuple(range(total))
            sizes[role] = len(columns)
            state = self.traced.rows(self.calls[key].input)
            if state is None or (read is not None and not torch.equal(state, read)):
                raise NotFound(f"{self.label}: q and {role} read different states")
            read = state
            same = torch.equal(state, self.block.input)
            modules[role] = self._found(key, columns, space="stream" if same else "attention")
        if sizes["q"] % sizes["k"] != 0:  # a head of keys serves one head of queries, or several
            raise NotFound(f"{self.label}: {sizes['q']} features act as queries and {sizes['k']} as keys")
        return modules

    def _found(self, key: Key, columns: tuple[int, ...] | None = None, *, space: str = "stream") -> FoundModule:
        total = self.calls[key].output.shape[-1]
        whole = columns is None or len(columns) == total
        return FoundModule(self.inside[key[0]], self._index(key), None if whole else columns, self.matrices[key], space)

    def _index(self, key: Key) -> int:
        return [other for other in self.calls if other[0] is key[0]].index(key)

    def _up_and_down(self, rest: list[Key], down: Key) -> dict[str, FoundModule]:
        """down, and what acts on it: up, or up and gate, which may be parts of one module."""
        modules = {"down": self._found(down)}
        before, size = self.calls[down].input, self.calls[down].input.shape[-1]

        def read_after(key: Key, edit: Edit) -> Tensor:
            return self._run(outputs={key: edit}, watched=[down[0]])[down].input

        def linear(key: Key, columns: tuple[int, ...] | None = None) -> bool:
            after = read_after(key, lambda value: _doubled(value, columns))
            return near(after, 2 * before) or near(after, before)  # a norm before down takes a doubling out again

        acting = []
        for key in rest:
            call = self.calls[key]
            fits = call.input.shape[-1] == self.width and call.output.shape[-1] in (size, 2 * size)
            if key == down or call.start > self.calls[down].start or not fits:
                continue
            noise = self._noise(call.output, *call.output.shape)
            if not torch.equal(read_after(key, plus(noise)), before):
                acting.append(key)
        if len(acting) == 1 and self.calls[acting[0]].output.shape[-1] == size:
            modules["up"] = self._found(acting[0], space="mlp")
        elif len(acting) == 1:
            both = range(2 * size)
            halves = (both[:size], both[size:], both[::2], both[1::2])
            for half in halves:
                if linear(acting[0], tuple(half)):
                    gate = tuple(sorted(set(both) - set(half)))
                    modules["up"] = self._found(acting[0], tuple(half), space="mlp")
                    modules["gate"] = self._found(acting[0], gate, space="mlp")
                    break
        elif len(acting) == 2:
            straight = [linear(key) for key in acting]
            if sum(straight) == 1:
                modules["up"] = self._found(acting[straight.index(True)], space="mlp")
                modules["gate"] = self._found(acting[straight.index(False)], space="mlp")
        if "up" not in modules:
            names = ", ".join(f"'{self.inside[key[0]]}'" for key in acting)
            raise NotFound(f"{self.label}: up and gate are not told apart among {names or 'no modules'}")
        return modules

    def _expert_names(self) -> list[str]:
        """Names of experts' weights in the layer: matrices applied to some tokens, or stacks of matrices."""
        stacks = [
            name
            for name, value in self.block.module.named_parameters()
            if value.dim() > 2 and value.numel() > self.width * self.width
        ]
        return stacks + [self.inside[key[0]] for key in self.some_tokens]

    def _experts(self, experts: list[str], moved: set[Key], output: Key | None) -> dict[str, FoundModule]:
        """The outermost module that holds every expert and maps the stream to the stream, edited at both its ends."""
        best: Call | None = None
        for key in self.calls:
            call, name = self.calls[key], self.inside[key[0]]
            given, result = self.traced.rows(call.input), self.traced.rows(call.output)
            if key not in moved or given is None or result is None or not experts:
                continue
            widths = given.shape[-1] == result.shape[-1] == self.width
            holds = all(expert.startswith(f"{name}.") for expert in experts)
            mixes = output is not None and any(output[0] is module for module in key[0].modules())
            if not (widths and holds and call.usual) or mixes or call.key == self.block.key:
                continue
            if (best is None or call.end - call.start > best.end - best.start) and not self._adds_to_stream(call):
                best = call
        if best is None:
            raise NotFound(f"{self.label}: no feed-forward part was found")
        block = FoundModule(self.inside[best.module], self._index(best.key), matrix=False)
        return {"up": replace(block, space="mlp"), "down": block}

    def _adds_to_stream(self, call: Call) -> bool:
        """Whether a module normalises what it gets, and adds what it makes of it to what it gets, as in T5."""
        doubled = self._run(inputs={call.key: times(2)}, watched=[call.module])
        given, result, after = map(self.traced.rows, (call.input, call.output, doubled[call.key].output))
        return given is not None and result is not None and after is not None and near(after, result + given)

    def _arrival(self, kind: str, modules: dict[str, FoundModule]) -> FoundModule:
        """The writer with how an edit of it arrives at the layer's end, the other writer held still."""
        found = modules[kind]
        key = self._key(found)
        held: dict[Key, Edit] = {}
        if kind == "o" and "down" in modules:
            other = self._key(modules["down"])
            still = self.calls[other].output
            held = {other: instead(still)}
        scale, change = self._arriving(key, held)
        if scale is not None:
            return replace(found, scale=scale)
        factor = other_size(self.calls[key].output, self.block.input)
        after = self._run(outputs={key: times(factor), **held}, watched=[self.block.module])
        scaled = after[self.block.key].output - self.block.output
        if scaled.norm() > SHARE_OF_SHIFT * change:
            return found  # it is normalised together with the stream, after it was added
        # It is normalised alone: the norm's output is what is added.
        for norm in self.calls:
            call = self.calls[norm]
            follows = call.start > self.calls[key].end and torch.equal(call.input, self.calls[key].output)
            if follows and call.output.shape == call.input.shape:
                scale, _ = self._arriving(norm, held)
                if scale is not None:
                    return replace(found, written=self.inside[norm[0]], scale=scale)
        raise NotFound(f"{self.label}: what '{found.path}' writes is normalised, and no module gives the result")

    def _arriving(self, key: Key, held: dict[Key, Edit]) -> tuple[float | None, float]:
        """(c, |change|) of a shift at the layer's end, which should be c times the shift; c is None if it is not."""
        output, stream = self.calls[key].output, self.block.output
        # As large as the stream, so that its rounding in half precision does not hide the shift.
        like = max((output, stream), key=lambda value: float(value.float().pow(2).mean()))
        shift = self._noise(like, output.shape[-1]).to(output.dtype)
        calls = self._run(outputs={key: plus(shift), **held}, watched=[self.block.module])
        change = calls[self.block.key].output - self.block.output
        wanted = shift.expand_as(change)
        scale = float((change * wanted).sum() / wanted.pow(2).sum())
        size = float(change.norm())
        if near(change, wanted):
            return 1.0, size
        return (scale if abs(scale) > 1e-3 and near(change, scale * wanted, 0.02) else None), size

    def _key(self, found: FoundModule) -> Key:
        module = self.block.module.get_submodule(found.path)
        return [key for key in self.calls if key[0] is module][found.index]


def _doubled(value: Tensor, columns: tuple[int, ...] | None) -> Tensor:
    if columns is None:
        return 2 * value
    value = value.clone()
    value[..., list(columns)] *= 2
    return value
