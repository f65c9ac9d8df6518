"""A host's fingerprint, to detect that a file was made for another host."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from uhl_cli.errors import HostError
from uhl_cli.host.hostmap import HostLayer, HostMap
from uhl_cli.schema import Fingerprint

__all__ = ["Fingerprint", "fingerprint"]

_EMBEDDING_ROWS = 64


def fingerprint(host_map: HostMap) -> Fingerprint:
    """The fingerprint of a resolved host; it does not depend on the device or on a model's head.

    The digest covers the sorted names and shapes of all parameters, and the values of three
    tensors (first rows of the input embedding, the first layer's q, the last layer's down; in layers without these the
    first matrix),
    rounded to bfloat16.  So loads as float32 and as bfloat16 always agree.  A load as float16
    agrees if float16 represents the checkpoint's values exactly; otherwise it may differ, since
    rounding twice is not rounding once.  A pooler is left out: checkpoints of the same weights
    exist with and without one.

    :raises HostError: The weights are on the meta device, so they have no values.
    """
    digest = hashlib.sha256(json.dumps(sorted(_shapes(host_map).items())).encode())
    digest.update(_bytes(host_map.embeddings.weight.detach()[:_EMBEDDING_ROWS]))
    for layer, kind in ((host_map.layers[0], "q"), (host_map.layers[-1], "down")):
        digest.update(_bytes(_matrix(layer, kind)))
    return shape_fingerprint(host_map).model_copy(update={"digest": digest.hexdigest()})


def shape_fingerprint(host_map: HostMap) -> Fingerprint:
    """The fingerprint of a host without weights: its digest is empty."""
    config = host_map.base.config
    return Fingerprint(
        architecture=type(host_map.base).__name__,
        model_type=str(config.model_type),  # type: ignore[union-attr]
        hidden_size=host_map.hidden_size,
        num_hidden_layers=host_map.num_hidden_layers,
        vocab_size=host_map.embeddings.num_embeddings,
        parameters=sum(torch.Size(shape).numel() for shape in _shapes(host_map).values()),
        digest="",
    )


def _matrix(layer: HostLayer, kind: str) -> Tensor:
    """The weight of a layer's target module; the first matrix of a layer that lacks it."""
    linear = layer.target_modules.get(kind)
    if linear is not None and linear.matrix:
        return linear.weight()
    return next(value.detach() for _, value in sorted(layer.module.named_parameters()) if value.dim() > 1)


def _shapes(host_map: HostMap) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name, without those of a pooler."""
    pooler = host_map.pooler
    skipped = None if pooler is None else f"{pooler}."
    return {
        name: tuple(parameter.shape)
        for name, parameter in host_map.base.named_parameters()
        if skipped is None or not name.startswith(skipped)
    }


def _bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        raise HostError("A model without weights has no fingerprint.", "Load the host's weights first.")
    # Through bfloat16 and back to float32, because numpy has no bfloat16.
    rounded = tensor.to("cpu").to(torch.bfloat16).to(torch.float32).contiguous()
    return rounded.numpy().astype("<f4").tobytes()
