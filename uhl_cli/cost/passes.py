"""The pass whose FLOPs, memory and time are measured: a host over made-up tokens, with or without an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uhl_cli.adapter.attach import Attachment, attach
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.running import bare, evaluating

SEQUENCE_LENGTH = 128


@dataclass(frozen=True)
class PassShape:
    """How many sequences one pass takes, and tokens in each."""

    batch_size: int
    tokens: int


class ForwardPass(nn.Module):
    """One forward pass of a host and, where an adapter is attached, of its readout.

    A module, because that is what fvcore traces; the host's base is its only part.
    """

    def __init__(self, host_map: HostMap, attachment: Attachment | None = None) -> None:
        super().__init__()
        self.base = host_map.base
        self._attachment = attachment

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """All that the host gives out and, after it, the logits of the adapter.

        :param ids: int64 [batch, tokens], all of them real tokens.  Of a token task every token counts as a word.
        """
        # Models look at their mask's values, which the meta device has none of; the FLOPs are the same without.
        mask = None if ids.is_meta else torch.ones_like(ids)
        output = self.base(input_ids=ids, attention_mask=mask)
        # Everything is handed on, a pooler's result too: a trace leaves out what leads to no result.
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
    """The pass and its input; within it the host is in eval mode and the adapter, if any, is attached to it."""
    device = host_map.embeddings.weight.device
    ids = torch.arange(shape.batch_size * shape.tokens, device=device) * 7919 % host_map.embeddings.num_embeddings
    ids = ids.view(shape.batch_size, shape.tokens)
    if adapter is None:
        with bare(host_map.base):
            yield ForwardPass(host_map), ids
        return
    with evaluating(host_map.base), attach(host_map, adapter) as attachment:
        yield ForwardPass(host_map, attachment), ids
