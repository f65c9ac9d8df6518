"""The forward pass for measuring FLOPs, memory and time: a host on dummy tokens, with or without an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uhl_cli.adapter.attach import Attachment, attach
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.running import MetaGroups, bare, evaluating

SEQUENCE_LENGTH = 128


@dataclass(frozen=True)
class PassShape:
    """Number of sequences in one pass, and of tokens in each."""

    batch_size: int
    tokens: int


class ForwardPass(nn.Module):
    """One forward pass of a host and, where an adapter is attached, of its readout.

    It is a module, because fvcore traces modules; its only submodule is the host's base model.
    """

    def __init__(self, host_map: HostMap, attachment: Attachment | None = None) -> None:
        super().__init__()
        self.base = host_map.base
        self._attachment = attachment

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """All outputs of the host, followed by the logits of the adapter.

        :param ids: int64 [batch, tokens], without padding.  For a token task every token counts as a word.
        """
        # No mask: models read its values, which do not exist on the meta device.  The FLOPs are the same.
        mask = None if ids.is_meta else torch.ones_like(ids)
        output = self.base(input_ids=ids, attention_mask=mask)
        # Return everything, a pooler's result too: a trace drops operators whose result is not returned.
        given = tuple(value for value in output.values() if isinstance(value, Tensor))
        if self._attachment is None:
            return given
        readout = self._attachment.readout
        features = self._attachment.readout_features(output.last_hidden_state)
        seen = torch.ones_like(ids, dtype=torch.bool)
        words = torch.eye(ids.numel(), device=ids.device) if readout.pool is None else None
        return (*given, readout.logits(features, seen, words))


@contextmanager
def forward_pass(
    host_map: HostMap, adapter: PortedAdapter | None, shape: PassShape
) -> Iterator[tuple[ForwardPass, Tensor]]:
    """Context manager that yields the pass and its input; inside it the adapter, if any, is attached, in eval mode."""
    device = host_map.embeddings.weight.device
    ids = torch.arange(shape.batch_size * shape.tokens, device=device) * 7919 % host_map.embeddings.num_embeddings
    ids = ids.view(shape.batch_size, shape.tokens)
    with MetaGroups() if ids.is_meta else nullcontext():
        if adapter is None:
            with bare(host_map.base):
                yield ForwardPass(host_map), ids
            return
        with evaluating(host_map.base), attach(host_map, adapter) as attachment:
            yield ForwardPass(host_map, attachment), ids
