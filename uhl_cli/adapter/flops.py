"""FLOPs of a forward pass, counted on the real model as it runs.

Convention: a multiply-add is two FLOPs; matrix products, attention products and gathered weighted sums count;
element-wise work does not, in the host as in the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from uhl_cli.adapter.folding import FoldedAdapter
from uhl_cli.adapter.inject import Injection
from uhl_cli.adapter.ported import readout_logits
from uhl_cli.host.checkpoint import Host

SEQUENCE_LENGTH = 128


Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_rest: object, **_options: object) -> int:
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[-2] * (size + value[-1])


def _embedding_bag(weight: Shape, indices: Shape, *_rest: object, **_options: object) -> int:
    return 2 * math.prod(indices) * weight[1]


# What torch's counter leaves out.
_COUNTED: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_embedding_bag": _embedding_bag,
    "_embedding_bag_forward_only": _embedding_bag,
}


def _handlers() -> dict[Any, Any]:
    """Handlers by operator; one that this version of torch lacks is skipped."""
    operators = torch.ops.aten
    return {getattr(operators, name): count for name, count in _COUNTED.items() if hasattr(operators, name)}


@torch.inference_mode()
def count_flops(host: Host, folded: FoldedAdapter | None, *, sequence_length: int = SEQUENCE_LENGTH) -> int:
    """FLOPs of one forward pass over one sequence: of the host alone, or with the adapter attached."""
    length = min(sequence_length, host.max_length)
    vocabulary = host.map.embeddings.num_embeddings
    ids = (torch.arange(length, device=host.device) * 7919 % vocabulary).unsqueeze(0)
    mask = torch.ones_like(ids)
    with FlopCounterMode(display=False, custom_mapping=_handlers()) as counter:
        if folded is None:
            host.map.base(input_ids=ids, attention_mask=mask)
        else:
            with Injection(host.map, folded) as injection:
                output = host.map.base(input_ids=ids, attention_mask=mask)
                features = injection.readout_features(output.last_hidden_state)
                words = torch.eye(length, device=host.device) if folded.kind == "tokens" else None
                readout_logits(folded.readout, features, mask.bool(), words)
    return int(counter.get_total_flops())
