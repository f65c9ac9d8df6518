"""A LoRA of the source, trained with labels: the teacher of the transfer set, which is then discarded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from accelerate import Accelerator

from uhl_cli.data.examples import Examples
from uhl_cli.ported.model import PortedModel
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.batches import steps_per_epoch
from uhl_cli.train.loop import StepReport, run_steps
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.student import Student, StudentModel

EPOCHS, LEAST_STEPS, MOST_STEPS = 3, 500, 3000
_RATE, _READOUT_RATE, _RANK = 1.5e-3, 5e-4, 8


def teacher_config(num_examples: int, config: TrainingConfig) -> TrainingConfig:
    """The LoRA's training configuration, given the adapter's `config`."""
    steps = EPOCHS * steps_per_epoch(num_examples, config.batch_size)
    steps = min(max(steps, LEAST_STEPS), MOST_STEPS)
    update = {
        "max_steps": min(steps, config.max_steps or steps),  # a short training also shortens the teacher's
        "learning_rate": _RATE,
        "readout_learning_rate": _READOUT_RATE,
        "weight_decay": 0.01,
    }
    return config.model_copy(update=update)


def lora_teacher(
    ported: PortedModel,
    examples: Examples,
    config: TrainingConfig,
    *,
    accelerator: Accelerator,
    files: RunFiles | None = None,
    digest: str = "",
    resume: bool = False,
    save_every: int = 200,
    on_step: Callable[[StepReport], None] | None = None,
) -> PortedModel:
    """The source with a LoRA on all linear modules and its own readout, trained from the ported adapter's readout.

    :param ported: The finished adapter on its source.
    :param config: See `teacher_config`.
    :raises TrainingError: When training diverges or the checkpoint does not fit.
    """
    host = ported.host
    student = Student(
        ported.adapter, host.map, "lora", readout=True, delta_shape=(0, 0), rank=_RANK, seed=config.seed
    ).to(accelerator.device)
    run_steps(
        StudentModel(student, host),
        student,
        student.optimizer(config),
        host,
        examples,
        config,
        accelerator=accelerator,
        files=None if files is None else replace(files, folder=files.folder / "teacher"),
        digest=digest,
        resume=resume,
        save_every=save_every,
        on_step=on_step,
    )
    return ported.with_adapter(student.finished(host))
