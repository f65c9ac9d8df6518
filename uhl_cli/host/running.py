"""Running a host: one thread at a time, in eval mode, with at most one adapter attached.

The lock and the attached adapter belong to the base model, so two hosts of one model share them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from uhl_cli.errors import HostError


@dataclass(eq=False)
class Use:
    """State of use of a base model: its lock, and the adapter attached to it, if any."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    attached: object | None = None


_USES: WeakKeyDictionary[nn.Module, Use] = WeakKeyDictionary()
_USES_LOCK = threading.Lock()


def use_of(base: nn.Module) -> Use:
    """The one `Use` of a base model."""
    with _USES_LOCK:
        return _USES.setdefault(base, Use())


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """Context manager: inside it only this thread uses the model, in eval mode; training flags are restored at exit.

    An interrupt during the restoration is raised after it, as in all contexts of uhl that change a model: the clean-up
    loop ends when its work is done, not at an interrupt.
    """
    with use_of(base).lock:
        training = [module for module in base.modules() if module.training]
        interrupt: KeyboardInterrupt | None = None
        try:
            _set_training(training, False)
            yield
        finally:
            while not all(module.training for module in training):
                try:
                    _set_training(training, True)
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt


@contextmanager
def bare(base: nn.Module) -> Iterator[None]:
    """`evaluating`, for passes that need the model without an adapter.

    :raises HostError: An adapter is attached to it.
    """
    with evaluating(base):
        attached = use_of(base).attached
        if attached is not None:
            raise HostError(f"{attached} is attached to this model.", "Leave its `attached()` context first.")
        yield


@contextmanager
def frozen(base: nn.Module) -> Iterator[None]:
    """Context manager: inside it no parameter of the model requires a gradient; the flags are restored at exit."""
    trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
    interrupt: KeyboardInterrupt | None = None
    try:
        _set_trainable(trainable, False)
        yield
    finally:
        while not all(parameter.requires_grad for parameter in trainable):
            try:
                _set_trainable(trainable, True)
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


class MetaGroups(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Context manager for passes on the meta device: inside it products by groups, of experts, run in any precision.

    torch's own meta kernel takes bfloat16 alone; the kernels of devices take others.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - the signature is torch's
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func.name() == "aten::_grouped_mm" and args[0].is_meta and args[0].dim() == 2 and args[1].dim() == 3:
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


def _set_training(modules: Iterable[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training


def _set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)
