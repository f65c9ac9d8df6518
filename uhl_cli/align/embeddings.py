"""Input-embedding rows of the anchor words: what the `embeddings` strategy aligns by, with no forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from uhl_cli.align.states import pooling_matrix
from uhl_cli.align.texts import AnchorTexts
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import encode


@torch.inference_mode()
def embedding_rows(host: Host, anchors: AnchorTexts, *, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Mean embedding rows float32 [N, d] of the anchor words, and which words the host takes in [N].

    Rows pass through the family's embedding norm and projection where it has them, since that is the stream's
    own scale; position and type embeddings stay out.
    """
    family, base = host.map.family, host.map.base
    rows, seen = [], []
    for start in range(0, len(anchors.texts), batch_size):
        indices = range(start, min(start + batch_size, len(anchors.texts)))
        encoded = encode(host, [anchors.texts[index] for index in indices])
        weights, present = pooling_matrix(encoded, [anchors.spans(index) for index in indices])
        embedded = host.map.embeddings(encoded.input_ids.to(host.device))
        if family.embedding_norm:
            embedded = base.get_submodule(family.embedding_norm)(embedded)
        if family.embedding_projection and embedded.shape[-1] != host.hidden_size:
            embedded = base.get_submodule(family.embedding_projection)(embedded)
        rows.append(weights @ embedded.reshape(-1, embedded.shape[-1]).float().cpu())
        seen.append(present)
    return torch.cat(rows), torch.cat(seen)
