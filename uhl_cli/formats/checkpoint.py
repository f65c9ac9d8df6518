"""Checkpoints of a run: parameters, AdamW moments and the step, in one file.  See `container` for the layout.

Nothing else is needed to resume: batches, noise and learning rate follow from the seed and the step.

| name | meaning |
|---|---|
| parameter.P | each parameter of the adapter |
| optimizer.M.P | each of AdamW's `MOMENTS` of each parameter in the record's `stepped` |
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from uhl_cli.errors import FormatError, TrainingError
from uhl_cli.formats import container
from uhl_cli.formats.container import CHECKPOINT, Problems
from uhl_cli.schema import Frozen

# AdamW's state for each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class CheckpointRecord(Frozen):
    """Header of a checkpoint.

    :param run: Digest of everything that determines the run, see `run_digest`.
    :param step: Number of finished steps.
    :param stepped: Parameters that the optimizer has updated, and so has moments for.
    """

    format_version: str = CHECKPOINT.version
    run: str
    step: int = Field(ge=0)
    stepped: tuple[str, ...]


def run_digest(parts: dict[str, object]) -> str:
    """Digest of everything that determines a run; a checkpoint of another run is refused."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, digest: str) -> None:
    """Write the state after `step` steps.

    :param digest: Digest of the run, see `run_digest`.
    :raises OutputError: When it cannot be written; the previous checkpoint is kept.
    """
    tensors: dict[str, Tensor] = {f"parameter.{name}": parameter for name, parameter in model.named_parameters()}
    stepped = []
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if state:
            stepped.append(name)
            tensors |= {f"optimizer.{key}.{name}": torch.as_tensor(state[key]) for key in MOMENTS}
    record = CheckpointRecord(run=digest, step=step, stepped=tuple(stepped))
    container.write(path, CHECKPOINT, record, tensors)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, digest: str) -> int:
    """Restore the state of `save_checkpoint` and return its step.  Nothing is changed unless all of it is valid.

    :raises TrainingError: When the file is damaged or belongs to another run.
    """
    try:
        problems = Problems(path, hint=CHECKPOINT.hint)
        contents = container.read(path, CHECKPOINT, problems=problems)
        record = container.read_record(contents, CheckpointRecord, problems)
        assert record is not None  # problems are raised
    except FormatError as error:
        raise TrainingError(f"the checkpoint cannot be used: {error.message}", CHECKPOINT.hint) from error
    if record.run != digest:
        raise TrainingError(
            f"the checkpoint {path} belongs to a run with other options, host or data.",
            "Give the options of the first start, or start over without --resume.",
        )
    tensors = {name: tensor.torch() for name, tensor in contents.tensors.items()}
    odd = _odd_parts(tensors, model, record)
    if odd:
        raise TrainingError(
            f"the checkpoint {path} does not fit the adapter, at {', '.join(odd[:5])[:200]}.", CHECKPOINT.hint
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"parameter.{name}"])
            if name in record.stepped:
                moments = {key: tensors[f"optimizer.{key}.{name}"].clone() for key in MOMENTS}
                # AdamW keeps its step on the CPU.
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
                }
    return record.step


def _odd_parts(tensors: dict[str, Tensor], model: nn.Module, record: CheckpointRecord) -> list[str]:
    """Names of tensors that are missing, do not belong, or have an invalid type, shape or value."""
    wanted: dict[str, tuple[torch.dtype, torch.Size]] = {}
    stepped = set(record.stepped)
    for name, parameter in model.named_parameters():
        wanted[f"parameter.{name}"] = (parameter.dtype, parameter.shape)
        if name in stepped:
            wanted |= {f"optimizer.{key}.{name}": (parameter.dtype, parameter.shape) for key in MOMENTS[1:]}
            wanted[f"optimizer.step.{name}"] = (torch.float32, torch.Size())
    odd = set(tensors) ^ set(wanted)
    for name in set(tensors) & set(wanted):
        value = tensors[name]
        sound = (value.dtype, value.shape) == wanted[name] and bool(torch.isfinite(value).all())
        if not sound or (not name.startswith(("parameter.", "optimizer.exp_avg.")) and bool((value < 0).any())):
            odd.add(name)
    return sorted(odd)
