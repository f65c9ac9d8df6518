"""`uhl tune`: an adapter file, a target and a labelled task in, one small task file out."""

from __future__ import annotations

import time
from dataclasses import dataclass

from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from uhl_cli.adapter.layout import bits_of
from uhl_cli.adapter.plan import PortPlan
from uhl_cli.adapter.ported import PortedModel
from uhl_cli.adapter.task_store import TaskFile, TaskRecord, task_to_bytes, write_task
from uhl_cli.align.alignment import Alignment
from uhl_cli.api import UniversalAdapter
from uhl_cli.data import TaskData, load_task
from uhl_cli.errors import DataError
from uhl_cli.host.checkpoint import Host
from uhl_cli.metrics import Difference, Score, paired_difference, score
from uhl_cli.pipeline.common import (
    Classes,
    Predictor,
    flop_report,
    host_record,
    load,
    references_of,
    refuse_overwriting,
    versions,
)
from uhl_cli.pipeline.options import TuneOptions
from uhl_cli.reports import Reporter, TuneReport, phase, silent
from uhl_cli.schema import TrainingRecord
from uhl_cli.train.checkpoint import run_digest
from uhl_cli.train.loop import RunFiles, StepReport, total_steps, train
from uhl_cli.train.task_adapter import TaskAdapter


def run_tune(options: TuneOptions, reporter: Reporter = silent) -> TuneReport:
    """Load what the options name, tune, and write the task file.

    :raises UhlError: Any of its kinds; nothing half-written is left.
    """
    adapter = UniversalAdapter.load(options.adapter)
    own = adapter.manifest.task
    name = options.data.task or own.name
    output = options.output_path(name)
    files = RunFiles(output.with_name(output.name + ".uhl-run"))
    refuse_overwriting(output, files, resume=options.resume, overwrite=options.overwrite)
    accelerator = Accelerator(
        cpu=options.target.device == "cpu",
        mixed_precision=options.training.mixed_precision,
        # A module type that the FLOP plan leaves out gets no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    chosen = str(accelerator.device) if options.target.device == "auto" else options.target.device
    host = load(options.target.model_copy(update={"device": chosen}))
    data = load_task(
        name,
        labels=own.labels if name == own.name else None,
        offline=options.target.offline,
        seed=options.training.seed,
        **options.data.model_dump(exclude={"task"}),
    )
    try:
        return tune(adapter, host, data, options, accelerator=accelerator, files=files, reporter=reporter)
    finally:
        accelerator.end_training()  # leaves the process group, where there are several processes


@dataclass(frozen=True)
class _Setting:
    """What is settled before the first step: the task file's record and the target's alignment."""

    adapter: UniversalAdapter
    host: Host
    data: TaskData
    options: TuneOptions
    record: TaskRecord
    alignment: Alignment
    plan: PortPlan
    host_flops: int
    reporter: Reporter

    def ported(self, parameters: dict[str, Tensor]) -> PortedModel:
        """The target with these parameters in place of the adapter's own."""
        tuned = self.adapter.with_parameters(self.record, parameters)
        return tuned.inject(self.host, self.alignment, self.plan, self.host_flops)

    def predictor(self) -> Predictor | None:
        """A predictor on the evaluation examples, or None without any."""
        if self.data.evaluation is None or len(self.data.evaluation) == 0:
            return None
        tuned = self.adapter.with_parameters(self.record, {})
        batch_size = self.options.evaluation_batch_size
        return Predictor(tuned, self.data.evaluation, batch_size=batch_size, reporter=self.reporter)


def tune(
    adapter: UniversalAdapter,
    host: Host,
    data: TaskData,
    options: TuneOptions,
    *,
    accelerator: Accelerator,
    files: RunFiles | None = None,
    reporter: Reporter = silent,
) -> TuneReport:
    """Tune a loaded adapter on a loaded host and write the task file.

    The task is the adapter's own when name, kind and labels agree; then delta-theta is all that is trained.

    :raises AlignmentError: When the host cannot be aligned.
    :raises BudgetError: When the FLOP limit leaves nothing.
    :raises TrainingError: When training diverges or the checkpoint does not fit.
    """
    started = time.monotonic()
    setting = _settle(adapter, host, data, options, reporter)
    record = setting.record
    trained = TaskAdapter(adapter.stored, record.config, new_readout=not record.own_task, seed=options.training.seed)
    trained.to(accelerator.device)
    predictor = setting.predictor()
    predictions: dict[str, Classes] = {}
    if predictor and record.own_task:
        predictions["zero_shot"] = predictor.carried(setting.ported({}), "zero-shot").classes
    _train(trained, setting, accelerator, files)
    ported = setting.ported(trained.trained_values())
    atoms, truncated = None, 0
    if predictor:
        predictions["tuned"], atoms, truncated = predictor.carried(ported, "tuned")
        predictions["untouched"] = predictor.untouched()
    scores, gains = _compared(predictions, data)
    record = record.model_copy(update={"before": scores.get("zero_shot"), "score": scores.get("tuned")})
    content = TaskFile(record, trained.quantised())
    output = options.output_path(data.task.name)
    if accelerator.is_main_process:
        write_task(output, content)
    accelerator.wait_for_everyone()
    sizes = {name: part.codes.size * bits_of(name) // 8 for name, part in content.parameters.items()}
    scales = {name: part.scales.nbytes for name, part in content.parameters.items()}
    return TuneReport(
        output=str(output),
        adapter=str(options.adapter),
        target=record.target,
        task=data.task.name,
        own_task=record.own_task,
        delta_bytes=sizes["delta_theta"],
        readout_bytes=sum(sizes[name] + scales[name] for name in sizes if name != "delta_theta"),
        bytes=len(task_to_bytes(content)),
        train_examples=record.training.train_examples,
        steps=record.training.steps,
        seconds=time.monotonic() - started,
        scores=scores,
        gains=gains,
        atoms_per_token=atoms,
        truncated=truncated,
        flops=flop_report(host, ported, setting.host_flops),
        left_out=setting.plan.left_out,
    )


def _settle(
    adapter: UniversalAdapter, host: Host, data: TaskData, options: TuneOptions, reporter: Reporter
) -> _Setting:
    """Align the host and say what the task file will be."""
    examples, own = data.train, adapter.manifest.task
    if examples is None or len(examples) == 0:
        raise DataError("there is no training example.", "Check --data and --limit-train.")
    own_task = (data.task.name, data.task.kind, data.task.labels) == (own.name, own.kind, own.labels)
    config = adapter.manifest.config
    if not own_task:
        config = config.model_copy(update={"num_labels": len(data.task.labels), "kind": data.task.kind})
    record = TaskRecord(
        adapter=adapter.digest,
        config=config,
        task=data.task,
        label_counts=examples.label_counts(len(data.task.labels)),
        own_task=own_task,
        target=host_record(host),
        training=TrainingRecord(
            command=options.command(data.task.name),
            config=options.training,
            steps=total_steps(len(examples), options.training),
            train_examples=len(examples),
            train_digest=examples.digest(),
            data=data.source[:1000],
        ),
        versions=versions(),
    )
    # The plan depends on the kind of task, so it is made for the adapter with the new task's readout.
    alignment, plan, host_flops = adapter.with_parameters(record, {}).align(
        host, strategy=options.strategy, max_flops=options.max_flops, progress=phase(reporter, "aligning")
    )
    return _Setting(adapter, host, data, options, record, alignment, plan, host_flops, reporter)


def _train(trained: TaskAdapter, setting: _Setting, accelerator: Accelerator, files: RunFiles | None) -> None:
    record, options = setting.record, setting.options
    assert setting.data.train is not None  # _settle has checked it

    def on_step(report: StepReport) -> None:
        note = f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}  atoms/token {report.atoms:.2f}"
        setting.reporter("tuning", report.step, report.steps, note)

    plan = setting.plan
    identity = {
        "tuning": options.training.model_dump(),
        "adapter": record.adapter,
        "config": record.config.model_dump(),
        "host": setting.host.fingerprint.model_dump(),
        "data": record.training.train_digest,
        "plan": (plan.types, plan.layers, plan.tap_depths, setting.alignment.strategy),
        "processes": accelerator.num_processes,
    }
    setting.reporter("tuning", 0, record.training.steps)
    train(
        trained,
        setting.host,
        [setting.alignment],
        setting.data.train,
        options.training,
        accelerator=accelerator,
        plan=plan,
        files=files,
        digest=run_digest(identity),
        resume=options.resume,
        save_every=options.save_every,
        on_step=on_step,
    )


def _compared(predictions: dict[str, Classes], data: TaskData) -> tuple[dict[str, Score], dict[str, Difference]]:
    """Scores of all predictions, and tuned minus each of the others, paired."""
    if not predictions or data.evaluation is None:
        return {}, {}
    references, task = references_of(data.evaluation), data.task
    scores = {name: score(task.metric, rows, references, task.labels) for name, rows in predictions.items()}
    gains = {
        name: paired_difference(task.metric, predictions["tuned"], rows, references, task.labels)
        for name, rows in predictions.items()
        if name != "tuned"
    }
    return scores, gains
