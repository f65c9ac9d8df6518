"""Memory at run time, measured: bytes that a folded adapter's tensors hold, and the peak that a pass allocates."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uhl_cli.adapter.fold import FoldedAdapter, FoldedLayer
from uhl_cli.adapter.sparse import CompactRows, Rows
from uhl_cli.cost.passes import PassShape, forward_pass
from uhl_cli.host.hostmap import HostMap


def adapter_bytes(folded: FoldedAdapter) -> int:
    """Bytes of all tensors that a folded adapter adds to the host's weights, in their own precision."""
    return sum(int(tensor.nbytes) for tensor in _tensors(folded))


def _tensors(folded: FoldedAdapter) -> Iterator[Tensor]:
    readout = folded.readout
    yield folded.threshold
    for layer in (*folded.layers.values(), readout.layer):
        if layer is not None:
            yield from _of_layer(layer)
    yield from map(_held, readout.taps.values())
    yield from (readout.bias, readout.out_weight, readout.out_bias)
    yield from (part for part in (readout.pool, readout.shift) if part is not None)
    for merged in folded.merged.values():
        yield from (merged.weight, merged.bias)


def _of_layer(layer: FoldedLayer) -> Iterator[Tensor]:
    yield from map(_held, (layer.router, layer.read, *layer.edits.values()))
    yield from (layer.router_bias, layer.read_bias)
    yield from layer.gains.values()


def _held(table: Rows) -> Tensor:
    return table.packed if isinstance(table, CompactRows) else table


@torch.inference_mode()
def peak_bytes(host_map: HostMap, folded: FoldedAdapter | None, shape: PassShape) -> int:
    """The most bytes that one pass holds at a time, beyond the weights and the adapter's own tensors.

    Measured on the running model, on any device: every tensor that an operator gives out counts from then until it
    is freed, and so does what attaching the adapter makes.  What an operator uses inside itself (the work space of
    a matrix product), and what an allocator rounds up, is not seen.
    """
    with PeakMemory() as meter, forward_pass(host_map, folded, shape) as (module, ids):
        module(ids)
    peak: int = meter.peak
    return peak


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Within it, bytes of the storages that operators make are added up until they are freed; `peak` is the most."""

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
            # A view, or an operator in place, gives out a storage that it was given.
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
