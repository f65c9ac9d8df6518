"""One pass of a model, traced call by call: what each module got and gave, with edits at chosen calls.

It knows no module by name, so it serves any model whose modules pass tensors to one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
Key = tuple[nn.Module, int]
"""A module and the number of its call within the pass, from 0."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module.

    :param number: Number of this module's call within the pass.
    :param input: Its first floating-point argument; `output`: the first such value that it returns.  Copies, because
        some models add in place.
    :param usual: The input is the first positional argument and the output is the result or its first part, so that a
        hook finds both.
    :param start: When it began; `end`: when it returned.  Calls between them are inside it.
    """

    module: nn.Module
    number: int
    input: Tensor
    output: Tensor
    start: int
    end: int
    usual: bool

    @property
    def key(self) -> Key:
        """The module with the number of the call."""
        return (self.module, self.number)

    def within(self, other: Call) -> bool:
        """Whether it happens inside another call."""
        return other.start < self.start and self.end < other.end


class Stopped(Exception):
    """Ends a pass at a chosen call."""


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


def replaced(output: Any, old: Tensor, new: Tensor) -> Any:  # noqa: ANN401
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


class Tracer:
    """Runs a base model over the same token ids, again and again.

    :param base: In eval mode.
    :param ids: int64 [batch, tokens].
    """

    def __init__(self, base: nn.Module, ids: Tensor) -> None:
        self.base = base
        self.ids = ids
        self.modules = [module for module in base.modules() if not isinstance(module, nn.ModuleList | nn.ModuleDict)]

    def final(self, ids: Tensor | None = None) -> Tensor:
        """The final state [batch, tokens, width] of a pass that is not traced."""
        ids = self.ids if ids is None else ids
        # No mask where there are no values: models read it.
        mask = None if ids.is_meta else torch.ones_like(ids)
        state: Tensor = self.base(input_ids=ids, attention_mask=mask)[0]
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
        inputs, outputs = inputs or {}, outputs or {}
        wanted = self.modules if watched is None else list(watched)
        named = [*inputs, *outputs, *([] if stop is None else [stop])]
        traced = dict.fromkeys([*wanted, *(module for module, _ in named)])
        with _Recording(traced, inputs, outputs, stop, copied) as recording:
            try:
                final: Tensor | None = self.final(ids)
            except Stopped:
                final = None
        return final, {call.key: call for call in sorted(recording.calls, key=lambda call: call.start)}


class _Recording:
    """Hooks of one traced pass; a context manager that removes them."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        inputs: Mapping[Key, Edit],
        outputs: Mapping[Key, Edit],
        stop: Key | None,
        copied: bool,
    ) -> None:
        self.calls: list[Call] = []
        self._modules, self._inputs, self._outputs, self._stop, self._copied = modules, inputs, outputs, stop, copied
        self._clock = 0
        self._counts: dict[nn.Module, int] = {}
        self._open: dict[nn.Module, list[tuple[int, int, Tensor | None, bool]]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Recording:
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _kept(self, value: Tensor) -> Tensor:
        return value.clone() if self._copied else value

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._clock += 1
        number = self._counts[module] = self._counts.get(module, -1) + 1
        key = (module, number)
        given = first_tensor(args)
        given = first_tensor(kwargs) if given is None else given
        if key in self._inputs and given is not None:
            old, given = given, self._inputs[key](given)
            args = replaced(args, old, given)
            kwargs = {name: given if value is old else value for name, value in kwargs.items()}
        if key == self._stop and given is not None:
            self.calls.append(Call(module, number, given, given, self._clock, self._clock, True))
            raise Stopped
        kept = None if given is None else self._kept(given)
        first = bool(args) and args[0] is given
        self._open.setdefault(module, []).append((number, self._clock, kept, first))
        return args, kwargs

    def _after(self, module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401
        self._clock += 1
        number, start, given, first = self._open[module].pop()
        result = first_tensor(output)
        if result is not None and (module, number) in self._outputs:
            old, result = result, self._outputs[module, number](result)
            output = replaced(output, old, result)
        if given is not None and result is not None:
            usual = first and (output is result or (isinstance(output, tuple | list) and output[0] is result))
            self.calls.append(Call(module, number, given, self._kept(result), start, self._clock, usual))
        return output
