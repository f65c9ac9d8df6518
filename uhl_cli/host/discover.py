"""Find a host map by running the model, without a row of `families` and without known module names.

One pass of 2 x 5 tokens is traced.  The layers are the list of modules whose calls hand a [batch, tokens, width] stream
from one to the next; one module may be several layers.  In a layer, noise on one token of the stream tells modules
before the mixing of tokens from those after it.  Gradients of what the attention's output projection reads tell q, k
and v apart, feature by feature, so fused and interleaved projections need no special case.  Doubling tells up from
gate.  A shift of what a module writes tells how it arrives in the stream.

What is found here is a claim: `proof.prove_map` checks it on every layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uhl_cli.errors import HostMapError, first_line
from uhl_cli.host.families import MODULE_TYPES
from uhl_cli.host.hostmap import HostLayer, HostMap, TargetModule, positions_of
from uhl_cli.host.trace import Alone, Call, Edit, Key, Tracer, instead, plus, times
from uhl_cli.host.untrusted import FOREIGN

_BATCH, _TOKENS, _MIDDLE = 2, 5, 2
_HINT = "Open an issue that names the model type; `uhl hosts` prints what was found."
# A position table has more rows than this; smaller tables that are read at 0, 1, 2 ... count something else.
_FEWEST_POSITIONS = 16


# What is normalised together with the stream changes by a factor at least this share of what it changes by a shift.
SHARE_OF_SHIFT = 0.1
# Modules that are found, proved and kept together.
GROUPS = (("q", "k", "v", "o"), ("up", "down", "gate"))


def group_of(kind: str) -> tuple[str, ...]:
    """The types of the group that a module type belongs to."""
    return GROUPS[0] if kind in GROUPS[0] else GROUPS[1]


class NotFound(HostMapError):
    """Something that a host must have was not found; the message says what, and where."""

    def __init__(self, message: str) -> None:
        super().__init__(message, _HINT)


@dataclass(frozen=True)
class _Found:
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
class _Layer:
    """What was found in a layer, and why something was not."""

    modules: dict[str, _Found] = field(default_factory=dict)
    problem: str = ""
    others: tuple[_Found, ...] = ()


def discover(base: nn.Module) -> HostMap:
    """The map of a base model in eval mode, found by running it on the device it is on; to be proved.

    The model is unchanged.  Layers without attention as in a transformer get no target modules, and say why.

    :raises HostMapError: No list of layers hands a stream of states on, or the result is no such state.
    """
    return _Search(base).map()


def rows_of(state: Tensor, batch: int, tokens: int) -> Tensor | None:
    """[batch, tokens, features] of a state in this or a flat [batch * tokens, features] form; None for other shapes."""
    if state.dim() == 3 and state.shape[:2] == (batch, tokens):
        return state
    if state.dim() == 4 and state.shape[0] == batch and state.numel() == batch * tokens * state.shape[-1]:
        return state.reshape(batch, tokens, -1)
    if state.dim() == 2 and len(state) == batch * tokens:
        return state.reshape(batch, tokens, -1)
    return None


def near(actual: Tensor, expected: Tensor, tolerance: float = 0.01) -> bool:
    """Whether the difference is within a share of the expected norm."""
    return actual.shape == expected.shape and bool((actual - expected).norm() <= tolerance * expected.norm() + 1e-6)


def other_size(written: Tensor, stream: Tensor) -> float:
    """A factor that gives what a module writes the size of the stream, or twice its own if it has that.

    So it changes the sum of both, whichever is larger.
    """
    factor = float(stream.float().pow(2).mean().sqrt() / written.float().pow(2).mean().sqrt().clamp_min(1e-12))
    return 2.0 if 0.7 < factor < 1.4 else factor


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


def _probe_ids(base: nn.Module, device: torch.device) -> Tensor:
    """Token ids away from the first ones of the vocabulary, which are often special."""
    rows = int(getattr(getattr(base, "config", None), "vocab_size", 0) or 0) or 64
    generator = torch.Generator().manual_seed(0)
    return torch.randint(rows // 3, max(rows - 1, rows // 3 + 1), (_BATCH, _TOKENS), generator=generator).to(device)


class _Search:
    """The search in one model; each step reads what the earlier ones found."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.names = {module: name for name, module in base.named_modules()}
        parameter = next(base.parameters(), None)
        if parameter is None:
            raise NotFound(f"{type(base).__name__} has no weights.")
        device = parameter.device
        self.ids = _probe_ids(base, device)
        self.tracer = Tracer(base, self.ids)
        self.generator = torch.Generator().manual_seed(1)
        try:
            with torch.no_grad():
                final, self.calls = self.tracer.run()
                self.table = embedding_of(base, self.ids)
        except FOREIGN as error:
            raise NotFound(f"{type(base).__name__} does not run on token ids: {first_line(error)}") from error
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
            positions=self._positions(),
            by_structure=True,
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

    def _positions(self) -> int | None:
        """Rows of the position table that a text can use; without such a table what the configuration says."""
        reads = _TableReads(self.table)
        with torch.no_grad(), reads:
            self.tracer.final()
        tables = [rows - first for first, rows in reads.found if rows > _FEWEST_POSITIONS]
        if tables:
            return min(tables)
        return positions_of(getattr(self.base, "config", None))

    # Layers.

    def _layers(self) -> list[_Layer]:
        """What each layer holds; layers of the same class and shapes are searched once."""
        searched: dict[tuple[Any, ...], _Layer] = {}
        found = []
        for block in self.blocks:
            shapes = tuple((name, tuple(value.shape)) for name, value in block.module.named_parameters())
            kind = (type(block.module), shapes)
            if kind not in searched:
                searched[kind] = _Block(self, block).search()
            found.append(searched[kind])
        return found

    def _others(self, layer: _Layer, block: Call, counts: dict[nn.Module, int]) -> tuple[TargetModule, ...]:
        """The other linear modules, but for those that another layer of its kind runs and this one does not."""
        found = []
        for other in layer.others:
            try:
                found.append(self._target_module("other", other, block, counts))
            except NotFound:
                continue
        return tuple(found)

    def _target_module(self, kind: str, found: _Found, block: Call, counts: dict[nn.Module, int]) -> TargetModule:
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

    def rows(self, state: Tensor) -> Tensor | None:
        """See `rows_of`, for the traced pass."""
        return rows_of(state, _BATCH, _TOKENS)


class _TableReads(TorchFunctionMode):
    """Notes (first row, rows) of every table but one that is read at consecutive rows, one for each token."""

    def __init__(self, besides: nn.Embedding) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []
        self._besides = besides

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is torch.nn.functional.embedding:
            index = args[0]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            rows = index.reshape(-1)[:_TOKENS]
            consecutive = index.shape[-1:] == (_TOKENS,) and bool((rows[1:] - rows[:-1] == 1).all())
            if consecutive and weight is not self._besides.weight:
                self.found.append((int(index.min()), len(weight)))
        return func(*args, **kwargs)


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


class _Block:
    """The search in one layer."""

    def __init__(self, search: _Search, block: Call) -> None:
        self.search_of = search
        self.block = block
        self.width = search.width
        self.inside = {module: name for name, module in block.module.named_modules()}
        self.calls = {key: call for key, call in search.calls.items() if call.within(block)}
        self.label = type(block.module).__name__
        self._alone = Alone(search.tracer, block, search.calls)
        self.matrices: dict[Key, bool] = {}
        # Modules with a weight matrix that is not applied to every token: experts.
        self.some_tokens: list[Key] = []

    def search(self) -> _Layer:
        """Target modules of attention and of the feed-forward part, each whole or not at all, with the reason."""
        self._find_matrices()
        local, mixed = self._moved_by_one_token()
        order = [key for key in self.calls if key in self.matrices and (key in local or key in mixed)]
        output = next((key for key in order if self._writes(key) and key in mixed), None)
        modules: dict[str, _Found] = {}
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
        others: tuple[_Found, ...] = ()
        if problems:
            used = {found.path for found in modules.values()}
            others = tuple(
                self._found(key) for key in order if self.inside[key[0]] not in used and self._index(key) == 0
            )
        return _Layer(modules, "; ".join(problems), others)

    def _feed_forward(self, rest: list[Key], moved: set[Key], taken: set[Key], output: Key | None) -> dict[str, _Found]:
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
        noise = torch.randn(shape, generator=self.search_of.generator) * scale
        return noise.to(device=like.device, dtype=like.dtype)

    def _find_matrices(self) -> None:
        """Calls whose output is the input times the module's weight, by whether the weight is stored [in, out]."""
        for key, call in self.calls.items():
            weight = key[0]._parameters.get("weight")
            if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(key[0], nn.Embedding):
                continue
            if not (call.usual and call.single):  # a router also returns what it chose by its logits
                continue
            given, result = self.search_of.rows(call.input), self.search_of.rows(call.output)
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
            new, old = self.search_of.rows(call.input), self.search_of.rows(self.calls[key].input)
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

    def _attention_roles(self, readers: list[Key], output: Key) -> dict[str, list[tuple[Key, tuple[int, ...]]]]:
        """Features of each reader by role, from the gradient of what the output projection reads at the last token.

        Values of earlier tokens matter, and so does a lone token's own value.  Keys of earlier tokens matter, but a
        lone token's own does not: its attention weight is one.  Queries matter at their own token alone, and not to a
        lone token.  What matters at its own token alone, and to a lone token too, is a gate of the output.
        """
        alone, own, others = {}, {}, {}
        for tokens in (1, _TOKENS):
            try:
                gradients = self._gradients(readers, output, tokens)
            except (RuntimeError, ValueError, IndexError):
                if tokens == _TOKENS:
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
        roles: dict[str, list[tuple[Key, tuple[int, ...]]]] = {"q": [], "k": [], "v": [], "attention gate": []}
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
        """|d (what the output projection reads at the last token) / d (output of each reader)|, [tokens, features]."""
        leaves: dict[Key, Tensor] = {}

        def leaf_at(key: Key) -> Edit:
            def edit(value: Tensor) -> Tensor:
                leaves[key] = value.detach().clone().requires_grad_()
                return leaves[key]

            return edit

        ids = self.search_of.ids[:1, :tokens]
        with torch.enable_grad():
            _, calls = self.search_of.tracer.run(
                ids=ids, outputs={key: leaf_at(key) for key in readers}, stop=output, watched=(), copied=False
            )
            read = rows_of(calls[output].input, 1, tokens)
            if read is None or not leaves or not read.requires_grad:
                return {}
            direction = self._noise(read, read.shape[-1])
            found = torch.autograd.grad((read[0, -1] * direction).sum(), list(leaves.values()), allow_unused=True)
        gradients = {}
        for (key, leaf), gradient in zip(leaves.items(), found, strict=True):
            rows = rows_of(torch.zeros_like(leaf) if gradient is None else gradient, 1, tokens)
            if rows is not None:
                gradients[key] = rows[0].abs()
        return gradients

    def _attention_sinks(self, roles: dict[str, list[tuple[Key, tuple[int, ...]]]], output: Key) -> None:
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

    def _attention_modules(self, roles: dict[str, list[tuple[Key, tuple[int, ...]]]], output: Key) -> dict[str, _Found]:
        modules: dict[str, _Found] = {"o": self._found(output)}
        read: Tensor | None = None
        sizes: dict[str, int] = {}
        for role in ("q", "k", "v"):
            key, columns = max(roles[role], key=lambda part: len(part[1]))
            total, heads = self.calls[key].output.shape[-1], self.calls[output].input.shape[-1]
            alone = all(other != key for each in roles if each != role for other, _ in roles[each])
            if alone and heads % total == 0:  # a feature without a gradient to speak of has this role, too
                columns = tuple(range(total))
            sizes[role] = len(columns)
            state = self.search_of.rows(self.calls[key].input)
            if state is None or (read is not None and not torch.equal(state, read)):
                raise NotFound(f"{self.label}: q and {role} read different states")
            read = state
            same = torch.equal(state, self.block.input)
            modules[role] = self._found(key, columns, space="stream" if same else "attention")
        if sizes["q"] % sizes["k"] != 0:  # a head of keys serves one head of queries, or several
            raise NotFound(f"{self.label}: {sizes['q']} features act as queries and {sizes['k']} as keys")
        return modules

    def _found(self, key: Key, columns: tuple[int, ...] | None = None, *, space: str = "stream") -> _Found:
        total = self.calls[key].output.shape[-1]
        whole = columns is None or len(columns) == total
        return _Found(self.inside[key[0]], self._index(key), None if whole else columns, self.matrices[key], space)

    def _index(self, key: Key) -> int:
        return [other for other in self.calls if other[0] is key[0]].index(key)

    def _up_and_down(self, rest: list[Key], down: Key) -> dict[str, _Found]:
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

    def _experts(self, experts: list[str], moved: set[Key], output: Key | None) -> dict[str, _Found]:
        """The outermost module that holds every expert and maps the stream to the stream, edited at both its ends."""
        best: Call | None = None
        for key in self.calls:
            call, name = self.calls[key], self.inside[key[0]]
            given, result = self.search_of.rows(call.input), self.search_of.rows(call.output)
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
        block = _Found(self.inside[best.module], self._index(best.key), matrix=False)
        return {"up": replace(block, space="mlp"), "down": block}

    def _adds_to_stream(self, call: Call) -> bool:
        """Whether a module normalises what it gets, and adds what it makes of it to what it gets, as in T5."""
        doubled = self._run(inputs={call.key: times(2)}, watched=[call.module])
        given, result, after = map(self.search_of.rows, (call.input, call.output, doubled[call.key].output))
        return given is not None and result is not None and after is not None and near(after, result + given)

    def _arrival(self, kind: str, modules: dict[str, _Found]) -> _Found:
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
        output = self.calls[key].output
        shift = 0.5 * self._noise(output, output.shape[-1])
        calls = self._run(outputs={key: plus(shift), **held}, watched=[self.block.module])
        change = calls[self.block.key].output - self.block.output
        wanted = shift.expand_as(change)
        scale = float((change * wanted).sum() / wanted.pow(2).sum())
        size = float(change.norm())
        if near(change, wanted):
            return 1.0, size
        return (scale if abs(scale) > 1e-3 and near(change, scale * wanted, 0.02) else None), size

    def _key(self, found: _Found) -> Key:
        module = self.block.module.get_submodule(found.path)
        return [key for key in self.calls if key[0] is module][found.index]


def _doubled(value: Tensor, columns: tuple[int, ...] | None) -> Tensor:
    if columns is None:
        return 2 * value
    value = value.clone()
    value[..., list(columns)] *= 2
    return value
