"""Checkpoints of a run: parameters, AdamW moments and the step, in one safetensors file.

Nothing else is needed to go on: batches, noise and learning rate follow from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from uhl_cli.errors import TrainingError
from uhl_cli.files import write_bytes


def run_digest(parts: dict[str, object]) -> str:
    """Digest of all that decides a run's course; a checkpoint of another run is refused."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, digest: str) -> None:
    """Write the state after `step` steps.

    :raises OutputError: When it cannot be written; the checkpoint before stays.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"parameter.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    write_bytes(path, save(tensors, metadata={"step": str(step), "digest": digest}))


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, digest: str) -> int:
    """Put back the state of `save_checkpoint` and return its step.

    :raises TrainingError: When the file is damaged or belongs to another run.
    """
    hint = "Give the options of the first start, or begin anew without --resume."
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"the checkpoint {path} cannot be read.", "Begin anew without --resume.") from error
    if metadata.get("digest") != digest:
        raise TrainingError(f"the checkpoint {path} belongs to a run with other options, host or data.", hint)
    shapes = {f"parameter.{name}": parameter.shape for name, parameter in model.named_parameters()}
    if shapes != {name: value.shape for name, value in tensors.items() if name.startswith("parameter.")}:
        raise TrainingError(f"the checkpoint {path} lacks some of the adapter's parts.", "Begin anew without --resume.")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"parameter.{name}"])
            state = {
                key.split(".")[1]: value.clone()
                for key, value in tensors.items()
                if key.startswith("optimizer.") and key.split(".", 2)[2] == name
            }
            if state:
                moments = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
                optimizer.state[parameter] = moments
    return int(metadata["step"])
