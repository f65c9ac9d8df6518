"""Weights of builtin hosts on disk: matrices in 8 bits with one scale a row, vectors in float16.

For each matrix W, a folder's `model.safetensors` contains its codes `W` (int8) and `W.scale` (float32, one per row).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from uhl_cli.codes.quantise import codes_and_scales, dequantise
from uhl_cli.errors import HostError

_KEY = "uhl-builtin"
_BITS = 8


def pack(state: dict[str, Tensor]) -> bytes:
    """The bytes of a packed weight file."""
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.dim() == 2:
            packed[name], packed[f"{name}.scale"] = codes_and_scales(value, _BITS)
        else:
            packed[name] = value.to(torch.float16)
    content: bytes = save({name: packed[name].contiguous() for name in sorted(packed)}, metadata={_KEY: "int8 rows"})
    return content


def unpack(path: Path) -> dict[str, Tensor]:
    """Every weight in float32.

    :raises HostError: When the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise HostError(f"the builtin weights {path} cannot be read.", "Install uhl again.") from error
    return {
        name: dequantise(value, stored[f"{name}.scale"]) if value.dtype == torch.int8 else value.float()
        for name, value in stored.items()
        if not name.endswith(".scale")
    }
