"""The training loop: accelerate, frozen hosts, and a state that can be resumed at any step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.codes.layout import UPDATE_PARAMETERS
from uhl_cli.data.examples import Examples
from uhl_cli.errors import DataError, OutputError, TrainingError
from uhl_cli.formats.checkpoint import load_checkpoint, save_checkpoint
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.running import frozen
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import encode_examples
from uhl_cli.schema import Schedule, TrainingConfig
from uhl_cli.train.batches import batches_from, steps_per_epoch
from uhl_cli.train.model import RANKS, Losses, TrainedModel
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.task_adapter import TaskAdapter

LOG_EVERY = 20


@dataclass(frozen=True)
class StepReport:
    """Averages over the steps since the last report; `atoms` is active atoms per token."""

    step: int
    steps: int
    loss: float
    accuracy: float
    atoms: float
    learning_rate: float
    seconds: float


def total_steps(num_examples: int, config: TrainingConfig) -> int:
    """Optimiser steps of a run."""
    if num_examples == 0:
        raise DataError("there is no training example.", "Check --data and --limit-train.")
    return config.max_steps or max(1, math.ceil(steps_per_epoch(num_examples, config.batch_size) * config.epochs))


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then a half cosine to zero."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def learning_rate_factors(schedule: Schedule | None, steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """The learning rate's factor at each step, as a share of its peak.

    :param schedule: By transformers' `get_scheduler`, whose warm-up begins at zero; None: `learning_rate_factor`.
    """
    if schedule is None:
        return partial(learning_rate_factor, steps=steps, warmup_fraction=warmup_fraction)
    from transformers import get_scheduler  # brings peft, which most training does not need

    name = "constant_with_warmup" if schedule == "constant" else schedule
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = round(steps * warmup_fraction)
    scheduler = get_scheduler(name, unused, num_warmup_steps=warmup, num_training_steps=steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def optimizer_for(adapter: CanonicalAdapter | TaskAdapter, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices only; updates and readout have separate learning rates."""
    groups = []
    for updates in (True, False):
        rate = config.learning_rate if updates else config.readout_learning_rate
        for matrices in (True, False):
            chosen = [
                parameter
                for name, parameter in adapter.named_parameters()
                if parameter.requires_grad
                and (name in UPDATE_PARAMETERS) == updates
                and (parameter.dim() > 1) == matrices
            ]
            if chosen:
                decay = config.weight_decay if matrices else 0.0
                groups.append({"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def targets_of(examples: Examples, rows: list[int]) -> list[int]:
    """Class ids of the rows, one per example or per word."""
    if examples.tags is not None:
        return [tag for row in rows for tag in examples.tags[row]]
    assert examples.labels is not None
    return [examples.labels[row] for row in rows]


Targets = Callable[[list[int]], Tensor]


def train(
    adapter: CanonicalAdapter | TaskAdapter,
    aligned: AlignedHost,
    examples: Examples,
    config: TrainingConfig,
    *,
    accelerator: Accelerator,
    shift: Tensor | None = None,
    **run: Any,  # noqa: ANN401 - see run_steps
) -> int:
    """Train `adapter` in place on a frozen host, and return the number of steps.

    :param shift: What the readout adds to its features while updates are on, see `ported.shift`.
    :param run: Further arguments of `run_steps`.
    :raises TrainingError: When the loss is no longer finite, or a checkpoint does not fit.
    """
    placed = replace(aligned, alignment=aligned.alignment.to(accelerator.device))
    model = TrainedModel(adapter, placed, config, shift=shift)
    optimizer = optimizer_for(adapter, config)
    return run_steps(model, adapter, optimizer, aligned.host, examples, config, accelerator=accelerator, **run)


def run_steps(
    model: nn.Module,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    host: Host,
    examples: Examples,
    config: TrainingConfig,
    *,
    accelerator: Accelerator,
    targets: Targets | None = None,
    files: RunFiles | None = None,
    digest: str = "",
    resume: bool = False,
    save_every: int = 200,
    on_step: Callable[[StepReport], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> int:
    """Optimise `trained` through `model(encoded, words, targets, seed) -> Losses`, and return the number of steps.

    :param trained: The part of the model whose parameters checkpoints hold.
    :param optimizer: Its groups have the peak learning rate as `base_lr`.
    :param targets: Targets of some rows: class ids, or a distribution over classes each [predictions, labels]; by
        default the examples' own classes.
    :param after_step: Called with the number of finished steps after each step.
    :raises TrainingError: When the loss is no longer finite, or a checkpoint does not fit.
    """
    steps = total_steps(len(examples), config)
    model, optimizer = accelerator.prepare(model, optimizer)
    first = 0
    if files is not None:
        if resume and files.checkpoint.exists():
            first = load_checkpoint(files.checkpoint, trained, _inner(optimizer), digest=digest)
        if accelerator.is_main_process:
            _trim_log(files.log, first)
    rank, world = accelerator.process_index, accelerator.num_processes
    window = _Window(accelerator.device)
    started = time.monotonic()
    factors = learning_rate_factors(config.schedule, steps, config.warmup_fraction)
    batches = batches_from(examples, batch_size=config.batch_size, seed=config.seed, first_step=first, last_step=steps)
    with frozen(host.map.base):
        for step, rows in batches:
            mine = rows[rank::world] or rows[:1]  # a rank without rows repeats one, so that all ranks do the step
            factor = factors(step)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            length = min(config.max_length, host.max_length)
            encoded, words, _ = encode_examples(host, examples, mine, max_length=length)
            wanted = torch.tensor(targets_of(examples, mine)) if targets is None else targets(mine)
            with accelerator.autocast():
                seed = (config.seed * 1_000_003 + step) * RANKS + rank
                losses = model(encoded.to(accelerator.device), words, wanted.to(accelerator.device), seed)
            accelerator.backward(losses.total)
            accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            window.add(losses, len(wanted))
            done = step + 1
            if done % LOG_EVERY == 0 or done == steps:
                report = window.report(
                    accelerator, done, steps, config.learning_rate * factor, time.monotonic() - started
                )
                if not math.isfinite(report.loss):
                    raise TrainingError(
                        f"the loss is {report.loss} at step {done}.",
                        "Try a smaller --learning-rate or --dtype float32.",
                    )
                if accelerator.is_main_process:
                    if files is not None:
                        _append_log(files.log, report)
                    if on_step:
                        on_step(report)
            if files is not None and accelerator.is_main_process and (done % save_every == 0 or done == steps):
                save_checkpoint(files.checkpoint, trained, _inner(optimizer), step=done, digest=digest)
            if after_step:
                after_step(done)
    accelerator.wait_for_everyone()
    return steps


class _Window:
    """Sums over the steps since the last report, on the device, so that no step waits for a transfer."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, device=device)
        self._steps = self._updated = 0

    def add(self, losses: Losses, count: int) -> None:
        """Add one step with `count` predictions."""
        new = torch.stack(
            [
                losses.task.float(),
                losses.correct.float(),
                losses.active.float(),
                losses.task.new_tensor(count),
            ]
        )
        self._sums += new.float()
        self._steps += 1
        self._updated += losses.updated

    def report(self, accelerator: Accelerator, step: int, steps: int, rate: float, seconds: float) -> StepReport:
        """Averages over all processes; starts a new window."""
        sums: Tensor = accelerator.reduce(self._sums, reduction="sum")
        loss, correct, active, count = sums.tolist()
        parts = self._steps * accelerator.num_processes
        updated = max(self._updated, 1) * accelerator.num_processes  # only steps with updates have active atoms
        self._sums.zero_()
        self._steps = self._updated = 0
        return StepReport(step, steps, loss / parts, correct / max(count, 1), active / updated, rate, seconds)


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _append_log(path: Path, report: StepReport) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(report)) + "\n")
    except OSError as error:
        raise OutputError(
            f"cannot write the log {path}: {error.strerror}.", "Free some space, then --resume."
        ) from error


def _trim_log(path: Path, first: int) -> None:
    """Drop the log's lines after the checkpoint that the run continues from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # an incomplete line of a killed run
        if entry["step"] <= first:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def accelerator_for(device: str, mixed_precision: str) -> Accelerator:
    """An accelerator in this precision, on the CPU or on the best available device.

    accelerate keeps the precision of a process's first accelerator; it is reset here, because a program may train
    several times.  The process group of several processes is kept.
    """
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=mixed_precision,
        # Steps without updates, and module types that a FLOP plan leaves out, leave parameters without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
