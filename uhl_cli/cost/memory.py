"""Memory at run time: the measured peak that a forward pass allocates."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.cost.passes import PassShape, forward_pass
from uhl_cli.host.hostmap import HostMap


@torch.inference_mode()
def peak_bytes(host_map: HostMap, adapter: PortedAdapter | None, shape: PassShape) -> int:
    """Peak number of bytes that one pass allocates, beyond the weights and the adapter's own tensors.

    Measured on the running model, on any device.  Every tensor that an operator returns counts until it is freed, and
    so do tensors that attaching the adapter creates.  An operator's internal work space (of a matrix product, say) and
    an allocator's rounding are not included.
    """
    with PeakMemory() as meter, forward_pass(host_map, adapter, shape) as (module, ids):
        module(ids)
    peak: int = meter.peak
    return peak


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Context manager that sums the bytes of all live storages that operators create; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.peak = 0
        self._live: dict[int, int] = {}
        self._sum = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - the signature is torch's
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        given = {storage._cdata for storage in _storages((args, dict(kwargs or {})))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A view or an in-place operator returns a storage of its input.
            if storage._cdata not in given and storage._cdata not in self._live:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._live[key] = size
        self._sum += size
        self.peak = max(self.peak, self._sum)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self._sum -= self._live.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:  # noqa: ANN401 - any nest of values
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
