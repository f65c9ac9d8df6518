"""`uhl tune` of a target's linear modules: without labels on the adapter's transfer set, or a LoRA with labels."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.layout import bits_of
from uhl_cli.codes.quantise import codes_and_scales
from uhl_cli.commands.agreement import agreement_of, parted
from uhl_cli.commands.options import ExportOptions, TuneOptions
from uhl_cli.commands.scoring import (
    Classes,
    Predictor,
    flop_report,
    host_record,
    references_of,
    versions,
)
from uhl_cli.data import Examples, TaskData, evaluation_data
from uhl_cli.data.examples import split_indices
from uhl_cli.data.tasks import TASKS
from uhl_cli.errors import DataError
from uhl_cli.formats.adapter import Quantised
from uhl_cli.formats.checkpoint import run_digest
from uhl_cli.formats.folder import FILE_NAME, TunedRecord
from uhl_cli.formats.ported import save_ported
from uhl_cli.formats.task import TaskFile, TaskRecord, task_to_bytes, write_task
from uhl_cli.host.checkpoint import Host
from uhl_cli.metrics import Difference, Score, paired_difference, score
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import Reporter, TuneReport, phase, silent
from uhl_cli.schema import HostRecord, TrainingConfig, TrainingRecord
from uhl_cli.train.loop import StepReport, Targets, run_steps, total_steps
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.student import Student, StudentModel
from uhl_cli.transfer.texts import TransferSet


@dataclass(frozen=True)
class DistillationData:
    """What a student learns from: examples with targets, and held-out examples.

    :param held: Held-out examples with the teacher's classes; None with labels.
    :param unread: How many examples were left out, see `distillation_data`.
    :param owners: The number of the text that each example is from.
    """

    examples: Examples
    targets: Targets | None
    held: Examples | None
    digest: str
    source: str
    unread: int = 0
    owners: tuple[int, ...] = ()

    def part(self, rows: list[int]) -> DistillationData:
        """Some of its examples."""
        targets, owners = self.targets, tuple(self.owners[row] for row in rows)
        chosen = None if targets is None else lambda some: targets([rows[row] for row in some])
        return replace(self, examples=self.examples.select(rows), targets=chosen, owners=owners)

    def split(self, fraction: float, seed: int) -> tuple[DistillationData, Examples]:
        """The data without a random part of its texts, drawn by the seed, and that part's examples.

        :raises DataError: When there are fewer than two texts.
        """
        texts = sorted(set(self.owners))
        held = {texts[place] for place in split_indices(len(texts), fraction, seed)[1]}
        rows = range(len(self.owners))
        rest = self.part([row for row in rows if self.owners[row] not in held])
        return rest, self.examples.select(row for row in rows if self.owners[row] in held)


def distillation_data(transfer: TransferSet, host: Host | None = None) -> DistillationData:
    """The transfer set as data of a distillation; a text is held out with all its spans.

    :param host: Examples without any token that its tokenizer knows are left out: they teach nothing.
    :raises DataError: When too few texts are left.
    """
    part = parted(transfer, host)
    examples, fitted, odds = part.examples, part.fitted_rows, torch.from_numpy(transfer.log_odds())
    counts = [1] * len(examples) if examples.words is None else [len(row) for row in examples.words]
    parts = torch.split(odds.softmax(-1), counts)
    chosen = [parts[row] for row in fitted]

    def targets(rows: list[int]) -> torch.Tensor:
        return torch.cat([chosen[row] for row in rows])

    return DistillationData(
        examples.select(fitted),
        targets,
        examples.select(part.held_rows),
        transfer.texts.digest,
        f"transfer set: {transfer.teacher}",
        unread=part.unread,
        owners=tuple(part.owners[row] for row in fitted),
    )


def score_data(adapter: UniversalAdapter, options: TuneOptions | ExportOptions) -> TaskData | None:
    """Evaluation data that `--score-data` names, or None.

    :raises DataError: When it cannot be found or read, or does not fit the adapter's task.
    """
    named = options.score_data
    if named is None:
        return None
    task = adapter.manifest.task
    where = {"task": named, "data": None} if named in TASKS else {"task": None, "data": named}
    asked = options.data.model_dump() | where
    return evaluation_data(task, asked, offline=options.target.offline, seed=options.training.seed)


def tune_student(
    adapter: UniversalAdapter,
    host: Host,
    data: TaskData | None,
    options: TuneOptions,
    *,
    evaluation: TaskData | None = None,
    accelerator: Accelerator,
    files: RunFiles | None = None,
    reporter: Reporter = silent,
    aligned: AlignedHost | None = None,
) -> TuneReport:
    """Tune on the transfer set, or with the labels of `data`, and write the task file or the LoRA's folder.

    :param data: Labelled examples of the adapter's own task; None for the transfer set.
    :param evaluation: Data to score on if there are no labels, see `score_data`.
    :param aligned: The adapter's alignment to this host, if it is known already.
    :raises DataError: When there is nothing to learn from.
    :raises TrainingError: When training diverges or the checkpoint does not fit.
    """
    started = time.monotonic()
    evaluation = evaluation if data is None else data
    distillation = distillation_data_for(adapter, host, data)
    if aligned is None:
        aligned = adapter.align(
            host,
            strategy=options.strategy,
            max_flops=options.max_flops,
            progress=phase(reporter, "aligning"),
            cache=options.cache,
        )
    zero_shot = adapter.port(aligned)
    config = training_of(adapter, options)
    student = trained_student(
        adapter, aligned, distillation, config, options, accelerator=accelerator, files=files, reporter=reporter
    )
    record = student_record(adapter, host, distillation, config, options)
    tuned, content = tuned_model(adapter, aligned, zero_shot, student, record)
    judged = {"zero_shot": zero_shot, "tuned": tuned}
    agreement = {} if distillation.held is None else _agreement(adapter, judged, distillation.held, options, reporter)
    predictions, atoms, truncated = _predictions(adapter, judged, evaluation, options, reporter)
    scores, gains = compared(predictions, evaluation)
    output = options.output_path(adapter.manifest.task.name)
    if accelerator.is_main_process:
        if content is not None:
            update = {"before": scores.get("zero_shot"), "score": scores.get("tuned")}
            content = replace(content, record=content.record.model_copy(update=update))
            write_task(output, content)
        else:
            save_ported(output, tuned, _full(host), _tuned_record(record, scores))
    accelerator.wait_for_everyone()
    lora = tuned.adapter.lora
    assert lora is not None  # a student has one
    return TuneReport(
        output=str(output),
        adapter=str(options.adapter),
        target=record.target,
        degree=host.map.degree,
        task=adapter.manifest.task.name,
        own_task=True,
        parameters=options.parameters,
        supervision=record.supervision,
        delta_bytes=0 if content is None else content.parameters["delta_theta"].codes.size * 4 // 8,
        lora_bytes=0 if content is not None else 2 * sum(value.numel() for value in lora.buffers()),
        readout_bytes=0 if content is not None else sum(value.nbytes for value in tuned.adapter.readout.buffers()),
        bytes=(output / FILE_NAME).stat().st_size if content is None else len(task_to_bytes(content)),
        train_examples=len(distillation.examples),
        unread=distillation.unread,
        steps=record.training.steps,
        seconds=time.monotonic() - started,
        agreement=agreement,
        scores=scores,
        gains=gains,
        atoms_per_token=atoms,
        truncated=truncated,
        flops=flop_report(tuned, aligned.host_flops),
        left_out=aligned.plan.without_updates().left_out,
    )


def distillation_data_for(adapter: UniversalAdapter, host: Host, data: TaskData | None) -> DistillationData:
    """What a student on this host learns from: labelled examples, else the adapter's transfer set.

    :raises DataError: When there is nothing to learn from, or the labels are not the adapter's own.
    """
    return distillation_data(adapter.transfer_set(), host) if data is None else _labelled(adapter, data)


def training_of(adapter: UniversalAdapter, options: TuneOptions) -> TrainingConfig:
    """The student's training configuration."""
    length = options.max_length or adapter.max_length
    return options.training.with_defaults(options.mode).model_copy(update={"max_length": length, "noise": 0.0})


def trained_student(
    adapter: UniversalAdapter,
    aligned: AlignedHost,
    distillation: DistillationData,
    config: TrainingConfig,
    options: TuneOptions,
    *,
    accelerator: Accelerator,
    files: RunFiles | None,
    reporter: Reporter,
    start: PortedAdapter | None = None,
    inner: bool = True,
) -> Student:
    """A trained student.

    :param start: What it starts from; by default the ported readout.
    :param inner: False trains the readout alone, which is the control "readout refitted".
    """
    host = aligned.host
    delta = adapter.stored["delta_theta"]
    student = Student(
        adapter.start(aligned) if start is None else start,
        host.map,
        options.parameters,
        readout=options.parameters == "lora",
        delta_shape=(delta.shape[0], delta.shape[1]),
        rank=options.rank,
        seed=config.seed,
    ).to(accelerator.device)
    if not inner:
        student.factors.requires_grad_(False)

    def on_step(report: StepReport) -> None:
        reporter("tuning", report.step, report.steps, f"loss {report.loss:.3f}  agreement {report.accuracy:.3f}")

    identity = student_identity(adapter, host, distillation, config, options) | {"processes": accelerator.num_processes}
    reporter("tuning", 0, total_steps(len(distillation.examples), config))
    run_steps(
        StudentModel(student, host),
        student,
        student.optimizer(config),
        host,
        distillation.examples,
        config,
        accelerator=accelerator,
        targets=distillation.targets,
        files=files,
        digest=run_digest(identity),
        resume=options.resume,
        save_every=options.save_every,
        on_step=on_step,
    )
    return student


def student_identity(
    adapter: UniversalAdapter, host: Host, distillation: DistillationData, config: TrainingConfig, options: TuneOptions
) -> dict[str, object]:
    """Everything that affects the result of a run: options, and digests of what they name."""
    return options.deciding() | {
        "training": config.model_dump(mode="json"),
        "adapter": adapter.digest,
        "host": host.fingerprint.model_dump(mode="json"),
        "distillation": distillation.digest,
    }


def compared(
    predictions: dict[str, Classes], data: TaskData | None, made: str = "tuned"
) -> tuple[dict[str, Score], dict[str, Difference]]:
    """Scores of all predictions, and paired differences: the prediction `made` minus each of the others."""
    if not predictions or data is None or data.evaluation is None:
        return {}, {}
    references, task = references_of(data.evaluation), data.task
    scores = {name: score(task.metric, rows, references, task.labels) for name, rows in predictions.items()}
    gains = {
        name: paired_difference(task.metric, predictions[made], rows, references, task.labels)
        for name, rows in predictions.items()
        if name != made
    }
    return scores, gains


def _labelled(adapter: UniversalAdapter, data: TaskData) -> DistillationData:
    own = adapter.manifest.task
    if data.train is None or len(data.train) == 0:
        raise DataError("there is no training example.", "Check --data and --limit-train.")
    if (data.task.kind, data.task.labels) != (own.kind, own.labels):
        raise DataError(
            f"a LoRA starts from the adapter's readout of {own.name}, whose labels are {', '.join(own.labels[:8])}.",
            "Give data with these labels, or tune with --parameters delta-theta.",
        )
    return DistillationData(
        data.train, None, None, data.train.digest(), data.source, owners=tuple(range(len(data.train)))
    )


def student_record(
    adapter: UniversalAdapter, host: Host, distillation: DistillationData, config: TrainingConfig, options: TuneOptions
) -> TaskRecord:
    """The student's record for a task file, without the scores."""
    manifest = adapter.manifest
    return TaskRecord(
        adapter=adapter.digest,
        config=manifest.config,
        task=manifest.task,
        label_counts=manifest.label_counts,
        own_task=True,
        target=host_record(host),
        training=TrainingRecord(
            command=options.command(manifest.task.name),
            config=config,
            steps=total_steps(len(distillation.examples), config),
            train_examples=len(distillation.examples),
            train_digest=distillation.digest,
            data=distillation.source[:1000],
        ),
        versions=versions(),
        parameters="low-rank",
        supervision="labels" if distillation.held is None else "transfer set",
    )


def tuned_model(
    adapter: UniversalAdapter,
    aligned: AlignedHost,
    zero_shot: PortedModel,
    student: Student,
    record: TaskRecord,
) -> tuple[PortedModel, TaskFile | None]:
    """The tuned model as its file restores it, and the task file, unless it is a LoRA folder."""
    if student.delta_theta is None:
        return zero_shot.with_adapter(student.finished(aligned.host)), None
    codes, scales = codes_and_scales(student.delta_theta.detach().cpu(), bits_of("delta_theta"))
    content = TaskFile(record, {"delta_theta": Quantised(codes.numpy(), scales.numpy())})
    return adapter.with_task(content).port(aligned), content


def _agreement(
    adapter: UniversalAdapter,
    models: dict[str, PortedModel],
    held: Examples,
    options: TuneOptions,
    reporter: Reporter,
) -> dict[str, Score]:
    """Scores against the teacher's most probable classes, on texts that the student has not seen."""
    task, found = adapter.manifest.task, {}
    for name, model in models.items():
        classes = model.classes_of(
            held, batch_size=options.evaluation_batch_size, progress=phase(reporter, "held-out texts")
        )
        found[name] = agreement_of(task, classes.for_metric(task.kind), held)
    return found


def _predictions(
    adapter: UniversalAdapter,
    models: dict[str, PortedModel],
    data: TaskData | None,
    options: TuneOptions,
    reporter: Reporter,
) -> tuple[dict[str, Classes], float | None, int]:
    """Predictions on the evaluation examples, if there are any; active atoms and cut texts of the tuned model."""
    if data is None or not data.evaluation:
        return {}, None, 0
    predictor = Predictor(adapter, data.evaluation, batch_size=options.evaluation_batch_size, reporter=reporter)
    predictions = {"zero_shot": predictor.predicted(models["zero_shot"], "zero-shot").classes}
    predictions["tuned"], atoms, truncated = predictor.predicted(models["tuned"], "tuned")
    predictions["majority_class"] = predictor.majority_class()
    return predictions, atoms, truncated


def _full(host: Host) -> HostRecord:
    """The host with its full name, so that the folder can be loaded without naming the host again."""
    return HostRecord(name=host.name, revision=host.revision, fingerprint=host.fingerprint)


def _tuned_record(record: TaskRecord, scores: dict[str, Score]) -> TunedRecord:
    return TunedRecord(
        adapter=record.adapter,
        training=record.training,
        supervision=record.supervision,
        label_counts=record.label_counts,
        versions=record.versions,
        before=scores.get("zero_shot"),
        score=scores.get("tuned"),
    )
