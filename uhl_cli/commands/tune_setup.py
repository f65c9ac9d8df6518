"""Setup and training of `uhl tune`; a search repeats both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import TuneOptions
from uhl_cli.commands.scoring import (
    Predictor,
    host_record,
    versions,
)
from uhl_cli.data import TaskData
from uhl_cli.errors import DataError, UsageError
from uhl_cli.formats.checkpoint import run_digest
from uhl_cli.formats.task import TaskRecord
from uhl_cli.host.checkpoint import Host
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import Reporter, phase
from uhl_cli.schema import TrainingRecord
from uhl_cli.train.loop import StepReport, total_steps, train
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.task_adapter import TaskAdapter


@dataclass(frozen=True)
class TuningSetup:
    """What is known before the first step: the task file's record and the target's alignment."""

    adapter: UniversalAdapter
    host: Host
    data: TaskData
    options: TuneOptions
    record: TaskRecord
    aligned: AlignedHost
    reporter: Reporter

    def ported(self, parameters: dict[str, Tensor]) -> PortedModel:
        """The target with these parameters in place of the adapter's own."""
        return self.adapter.with_parameters(self.record, parameters).port(self.aligned)

    def identity(self) -> dict[str, object]:
        """Everything that affects the result of a run: options, and digests of what they name."""
        return self.options.deciding() | {
            "training": self.record.training.config.model_dump(mode="json"),
            "adapter": self.record.adapter,
            "config": self.record.config.model_dump(mode="json"),
            "host": self.host.fingerprint.model_dump(mode="json"),
            "train_digest": self.record.training.train_digest,
        }

    def predictor(self) -> Predictor | None:
        """A predictor on the evaluation examples, or None without any."""
        if self.data.evaluation is None or len(self.data.evaluation) == 0:
            return None
        tuned = self.adapter.with_parameters(self.record, {})
        batch_size = self.options.evaluation_batch_size
        return Predictor(tuned, self.data.evaluation, batch_size=batch_size, reporter=self.reporter)


def prepare(
    adapter: UniversalAdapter,
    host: Host,
    data: TaskData,
    options: TuneOptions,
    reporter: Reporter,
    aligned: AlignedHost | None = None,
) -> TuningSetup:
    """Align the host and make the task file's record.

    :param aligned: The alignment to this host of the adapter with this task's readout, if it is known.
    :raises DataError: When there is nothing to train on.
    :raises UsageError: When more active atoms are asked for than the adapter has.
    :raises AlignmentError: When the host cannot be aligned.
    :raises BudgetError: When the FLOP limit leaves nothing.
    """
    examples, own = data.train, adapter.manifest.task
    if examples is None or len(examples) == 0:
        raise DataError("there is no training example.", "Check --data and --limit-train.")
    own_task = (data.task.name, data.task.kind, data.task.labels) == (own.name, own.kind, own.labels)
    config = adapter.manifest.config
    if not own_task:
        config = config.model_copy(update={"num_labels": len(data.task.labels), "kind": data.task.kind})
    if options.top_k is not None:
        if options.top_k > config.top_k:
            raise UsageError(f"this adapter has {config.top_k} active atom per token.", "Leave --top-k out.")
        config = config.model_copy(update={"top_k": options.top_k})
    training = options.training.with_defaults("labels").model_copy(
        update={"max_length": options.max_length or adapter.max_length}
    )
    record = TaskRecord(
        adapter=adapter.digest,
        config=config,
        task=data.task,
        label_counts=examples.label_counts(len(data.task.labels)),
        own_task=own_task,
        target=host_record(host),
        training=TrainingRecord(
            command=options.command(data.task.name),
            config=training,
            steps=total_steps(len(examples), training),
            train_examples=len(examples),
            train_digest=examples.digest(),
            data=data.source[:1000],
        ),
        versions=versions(),
    )
    # The plan depends on the kind of task, so it is made for the adapter with the new task's readout.
    if aligned is None:
        aligned = adapter.with_parameters(record, {}).align(
            host,
            strategy=options.strategy,
            max_flops=options.max_flops,
            progress=phase(reporter, "aligning"),
            cache=options.cache,
        )
    return TuningSetup(adapter, host, data, options, record, aligned, reporter)


def train_task(
    trained: TaskAdapter,
    setup: TuningSetup,
    accelerator: Accelerator,
    files: RunFiles | None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train in place, as the record says.

    :param after_step: Called with the number of finished steps after each step.
    :raises TrainingError: When training diverges or the checkpoint does not fit.
    """
    record, options = setup.record, setup.options
    training = record.training.config
    assert setup.data.train is not None  # `prepare` has checked it

    def on_step(report: StepReport) -> None:
        note = f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}  atoms/token {report.atoms:.2f}"
        setup.reporter("tuning", report.step, report.steps, note)

    setup.reporter("tuning", 0, record.training.steps)
    shift = setup.adapter.shift(setup.aligned) if record.own_task else None
    train(
        trained,
        setup.aligned,
        setup.data.train,
        training,
        accelerator=accelerator,
        shift=shift,
        files=files,
        digest=run_digest(setup.identity() | {"processes": accelerator.num_processes}),
        resume=options.resume,
        save_every=options.save_every,
        on_step=on_step,
        after_step=after_step,
    )
