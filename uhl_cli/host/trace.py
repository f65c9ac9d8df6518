"""Trace one pass of a model call by call: each module's inputs and outputs, with edits at chosen calls.

It uses no module names, so it works for any model whose modules pass tensors to one another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
Key = tuple[nn.Module, int]
"""A module and the number of its call within the pass, from 0."""

SHARE_OF_SHIFT = 0.1
"""What is normalised together with the stream changes by a factor at least this share of what it does by a shift."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module.

    :param number: Number of this module's call within the pass.
    :param input: Its first floating-point argument; `output`: the first such value that it returns.  Copies, because
        some models add in place.
    :param usual: The input is the first positional argument and the output is the result or its first part, so that a
        hook finds both.
    :param single: The output is the result itself, not a part of it.
    :param args: Its arguments, with `kwargs`, of which `given` is the one that `input` is a copy of.
    :param start: When it began; `end`: when it returned.  Calls between them are inside it.
    """

    module: nn.Module
    number: int
    input: Tensor
    output: Tensor
    start: int
    end: int
    usual: bool
    single: bool
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    given: Tensor | None = None

    @property
    def key(self) -> Key:
        """The module with the number of the call."""
        return (self.module, self.number)

    def repeat(self) -> Any:  # noqa: ANN401 - a module's result
        """Call the module again with the same arguments.  A layer alone is run so, in place of a whole pass."""
        state = self.input.clone()  # some models add in place
        args = replaced(self.args, self.given, state)
        return self.module(
            *args, **{name: state if value is self.given else value for name, value in self.kwargs.items()}
        )

    def within(self, other: Call) -> bool:
        """Whether it happens inside another call."""
        return other.start < self.start and self.end < other.end


class Stopped(Exception):
    """Ends a pass at a chosen call."""


def probe_ids(base: nn.Module, batch: int, tokens: int, device: torch.device | None) -> Tensor:
    """int64 [batch, tokens] of token ids to trace with.

    They are away from the first ones of the vocabulary, which are often special, and never consecutive, as positions
    are.
    """
    rows = int(getattr(getattr(base, "config", None), "vocab_size", 0) or 0) or 64
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows // 3, max(rows - 1, rows // 3 + 1), (batch, tokens), generator=generator)
    return ids.sort(descending=True).values.to(device)


def plus(shift: Tensor) -> Edit:
    """An edit that adds a shift."""
    return lambda value: value + shift


def times(factor: float) -> Edit:
    """An edit that multiplies."""
    return lambda value: factor * value


def instead(given: Tensor) -> Edit:
    """An edit that gives this value in place of any."""
    return lambda _value: given.clone()


def first_tensor(values: Any) -> Tensor | None:  # noqa: ANN401 - arguments or results of any module
    """The first floating-point tensor among a module's arguments or results; None if there is none."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, Mapping):
        values = values.values()
    if isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
    return None


def replaced(output: Any, old: Tensor | None, new: Tensor) -> Any:  # noqa: ANN401
    """A module's result with one of its tensors replaced."""
    if output is old:
        return new
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(new if value is old else value for value in output)
    if isinstance(output, list):
        return [new if value is old else value for value in output]
    if isinstance(output, dict):
        for name, value in output.items():
            if value is old:
                output[name] = new
    return output


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


class Tracer:
    """Runs a base model over the same token ids, again and again.

    :param base: In eval mode.
    :param ids: int64 [batch, tokens].
    """

    def __init__(self, base: nn.Module, ids: Tensor) -> None:
        self.base = base
        self.ids = ids
        self.modules = _callable(base)
        # A cache of keys and values would grow when a layer runs again.
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}

    def final(self, ids: Tensor | None = None) -> Tensor:
        """The final state [batch, tokens, width] of a pass that is not traced."""
        ids = self.ids if ids is None else ids
        if ids.is_meta:  # without values there can be no mask, and without a cache models look for positions to mask
            found: Tensor = self.base(input_ids=ids)[0]
            return found
        state: Tensor = self.base(input_ids=ids, attention_mask=torch.ones_like(ids), **self._options)[0]
        return state

    def run(
        self,
        *,
        ids: Tensor | None = None,
        inputs: Mapping[Key, Edit] | None = None,
        outputs: Mapping[Key, Edit] | None = None,
        watched: Iterable[nn.Module] | None = None,
        stop: Key | None = None,
        copied: bool = True,
    ) -> tuple[Tensor | None, dict[Key, Call]]:
        """The final state and the calls in order of their beginning.

        :param inputs: Edits of the first tensor that a call gets; `outputs`: of the first that it returns.
        :param watched: Modules to trace; all by default.  Edited ones are always traced.
        :param stop: The pass ends where this call would begin; the final state is then None, and the call's input is
            that call's `input` and `output`.
        :param copied: False keeps the tensors themselves, for gradients.
        """
        named = [*(inputs or {}), *(outputs or {}), *([] if stop is None else [stop])]
        traced = [*(self.modules if watched is None else watched), *(module for module, _ in named)]
        with _Recording(traced, inputs or {}, outputs or {}, stop, copied) as recording:
            try:
                final: Tensor | None = self.final(ids)
            except Stopped:
                final = None
        return final, recording.in_order()


class Alone:
    """Runs one layer alone, with the arguments that it got in a pass, which takes a fraction of a pass.

    Where it then gives something else than in the pass, because it keeps a state of its own, whole passes are run.

    :param layer: Its call in the pass; `calls`: all calls of that pass.
    """

    def __init__(self, tracer: Tracer, layer: Call, calls: Mapping[Key, Call]) -> None:
        self._tracer = tracer
        self._layer = layer
        self._modules = _callable(layer.module)
        self._first = {key[0]: key[1] - 1 for key, call in reversed(list(calls.items())) if call.start >= layer.start}
        with torch.no_grad():
            again = first_tensor(layer.repeat())
        self.possible = again is not None and torch.equal(again, layer.output)

    def run(
        self,
        *,
        inputs: Mapping[Key, Edit] | None = None,
        outputs: Mapping[Key, Edit] | None = None,
        watched: Iterable[nn.Module] | None = None,
    ) -> tuple[Tensor, dict[Key, Call]]:
        """The layer's output and the calls inside it, the layer's own among them, by the keys of the whole pass.

        The parameters are those of `Tracer.run`.
        """
        wanted = [*(self._modules if watched is None else watched), self._layer.module]
        if not self.possible:
            _, calls = self._tracer.run(inputs=inputs, outputs=outputs, watched=wanted)
            return calls[self._layer.key].output, calls
        traced = [*wanted, *(module for module, _ in (*(inputs or {}), *(outputs or {})))]
        with _Recording(traced, inputs or {}, outputs or {}, None, True, self._first) as recording:
            self._layer.repeat()
        calls = recording.in_order()
        return calls[self._layer.key].output, calls


def _callable(module: nn.Module) -> list[nn.Module]:
    """The module and all in it that can be called."""
    return [each for each in module.modules() if not isinstance(each, nn.ModuleList | nn.ModuleDict)]


class _Given(NamedTuple):
    """What a call got, while it lasts."""

    number: int
    start: int
    kept: Tensor | None
    state: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recording:
    """Hooks of one traced pass; a context manager that removes them.

    :param counts: Number of the last call of each module before the pass begins.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        inputs: Mapping[Key, Edit],
        outputs: Mapping[Key, Edit],
        stop: Key | None,
        copied: bool,
        counts: Mapping[nn.Module, int] = MappingProxyType({}),
    ) -> None:
        self._calls: list[Call] = []
        self._modules = dict.fromkeys(modules)
        self._inputs, self._outputs, self._stop, self._copied = inputs, outputs, stop, copied
        self._clock = 0
        self._counts = dict(counts)
        self._open: dict[nn.Module, list[_Given]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Recording:
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def in_order(self) -> dict[Key, Call]:
        """The calls in order of their beginning."""
        return {call.key: call for call in sorted(self._calls, key=lambda call: call.start)}

    def _kept(self, value: Tensor) -> Tensor:
        return value.clone() if self._copied else value

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._clock += 1
        number = self._counts[module] = self._counts.get(module, -1) + 1
        key = (module, number)
        state = first_tensor(args)
        state = first_tensor(kwargs) if state is None else state
        if key in self._inputs and state is not None:
            old, state = state, self._inputs[key](state)
            args = replaced(args, old, state)
            kwargs = {name: state if value is old else value for name, value in kwargs.items()}
        if key == self._stop and state is not None:
            self._calls.append(Call(module, number, state, state, self._clock, self._clock, True, True))
            raise Stopped
        kept = None if state is None else self._kept(state)
        self._open.setdefault(module, []).append(_Given(number, self._clock, kept, state, args, kwargs))
        return args, kwargs

    def _after(self, module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401
        self._clock += 1
        given = self._open[module].pop()
        result = first_tensor(output)
        if result is not None and (module, given.number) in self._outputs:
            old, result = result, self._outputs[module, given.number](result)
            output = replaced(output, old, result)
        if given.kept is not None and result is not None:
            single = output is result
            first = bool(given.args) and given.args[0] is given.state
            usual = first and (single or (isinstance(output, tuple | list) and output[0] is result))
            whole = (given.args, given.kwargs, given.state) if self._copied else ()
            self._calls.append(
                Call(
                    module,
                    given.number,
                    given.kept,
                    self._kept(result),
                    given.start,
                    self._clock,
                    usual,
                    single,
                    *whole,
                )
            )
        return output
