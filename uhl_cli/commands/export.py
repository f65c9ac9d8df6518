"""`uhl export`: make a standard classifier, which needs no uhl, from an adapter file and a target."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.agreement import agreement_of
from uhl_cli.commands.export_data import (
    export_data,
    labelled_data,
    refuse_other_labels,
    refuse_untaught,
    starts_from_lora,
)
from uhl_cli.commands.options import ExportOptions
from uhl_cli.commands.outputs import claimed_run
from uhl_cli.commands.scoring import Classes, host_record, load, versions
from uhl_cli.commands.transfer_set import Teacher
from uhl_cli.commands.tune_student import DistillationData, compared, score_data
from uhl_cli.data import Examples, TaskData
from uhl_cli.data.tasks import Task
from uhl_cli.errors import OutputError, first_line
from uhl_cli.files import atomic_folder
from uhl_cli.formats.card import model_card
from uhl_cli.formats.checkpoint import run_digest
from uhl_cli.formats.export import BASE_FOLDER, CARD_FILE, RECORD_FILE, ExportRecord, is_export
from uhl_cli.formats.folder import is_ported, ported_path, read_tuned
from uhl_cli.host.builtin import PREFIX
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.loading import quiet
from uhl_cli.host.standalone import refuse_other_ids, save_standalone, standalone_tokenizer
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import PortedModel, encode_examples
from uhl_cli.reports import ExportReport, Reporter, RoundingReport, phase, silent
from uhl_cli.schema import TrainingConfig, TrainingRecord
from uhl_cli.train.loop import StepReport, accelerator_for, run_steps, total_steps
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.standard import StandardClassifier, refuse_headless, refuse_misread_padding, save_base

# Texts on which the saved tokenizer is compared with uhl's.
_COMPARED = 256


def run_export(options: ExportOptions, reporter: Reporter = silent) -> ExportReport:
    """Load what the options name, train, and write the folder.

    :raises UhlError: Any of its kinds; nothing half-written is left.
    """
    options.refuse_idle()
    adapter = UniversalAdapter.load(options.adapter)
    output = options.output
    RunFiles.beside(output)  # `.` and `/` are refused first
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not is_export(output)):
        raise OutputError(f"{output} already exists and is not an export of uhl.", "Choose another --output.")
    shown_by = output / RECORD_FILE
    with claimed_run(output, shown_by=shown_by, resume=options.resume, overwrite=options.overwrite) as files:
        return _run(adapter, options, files, reporter)


def _run(adapter: UniversalAdapter, options: ExportOptions, files: RunFiles, reporter: Reporter) -> ExportReport:
    carried = _carried(adapter, options)
    refuse_untaught(carried, options, labelled=options.labelled)
    accelerator = accelerator_for(options.target.device, options.training.mixed_precision)
    chosen = str(accelerator.device) if options.target.device == "auto" else options.target.device
    evaluation = score_data(carried, options)
    host = load(options.target.model_copy(update={"device": chosen, "dtype": "float32"}), cache=options.cache)
    refuse_headless(host, carried.manifest.task)
    data = labelled_data(carried.manifest.task, options) if options.labelled else None
    try:
        return export(
            adapter,
            host,
            data,
            options,
            evaluation=evaluation,
            accelerator=accelerator,
            files=files,
            reporter=reporter,
        )
    finally:
        accelerator.end_training()  # leaves the process group, where there are several processes


def export(
    adapter: UniversalAdapter,
    host: Host,
    data: TaskData | None,
    options: ExportOptions,
    *,
    evaluation: TaskData | None = None,
    accelerator: Accelerator,
    files: RunFiles | None = None,
    reporter: Reporter = silent,
    aligned: AlignedHost | None = None,
) -> ExportReport:
    """Train a standard classifier with the weights of a loaded host, which is not changed, and write its folder.

    :param data: Labelled examples to learn from as well, in the adapter's labels.
    :param evaluation: Data to score on if there are no labels.
    :param aligned: The adapter's alignment to this host, if it is known already.
    :raises HostError: When transformers has no standard head for the family, or one that misreads its padding.
    :raises DataError: When there is nothing to learn from, or the labels differ from the adapter's.
    :raises TrainingError: When training diverges or the checkpoint does not fit.
    :raises OutputError: When the folder cannot be written.
    """
    started = time.monotonic()
    evaluation = evaluation if data is None else data
    carried = _carried(adapter, options)
    task = carried.manifest.task
    refuse_headless(host, task)
    refuse_misread_padding(host, task)
    refuse_untaught(carried, options, labelled=data is not None)
    if data is not None:
        refuse_other_labels(task, data)
    length = min(options.max_length or carried.max_length, host.max_length)
    tokenizer = standalone_tokenizer(host, length)
    judged = _ported(adapter, carried, host, options, reporter, aligned)
    distillation, teachers = export_data(carried, host, judged, data, options, length, reporter)
    config = options.training.with_defaults("lora").model_copy(update={"max_length": length, "noise": 0.0})
    reading = replace(host, tokenizer=tokenizer, max_length=length)
    some = distillation.examples.select(range(min(_COMPARED, len(distillation.examples))))
    refuse_other_ids(tokenizer, host, some.texts, some.pairs, max_length=length)
    start = judged["tuned"].adapter.lora if starts_from_lora(options) else None
    classifier = StandardClassifier(reading, task, rank=options.rank, seed=config.seed, start=start)
    identity = options.deciding() | {
        "training": config.model_dump(mode="json"),
        "adapter": adapter.digest,
        "host": host.fingerprint.model_dump(mode="json"),
        "distillation": distillation.digest,
        "task_file": None if options.task_file is None else _digest(options.task_file),
        "processes": accelerator.num_processes,
    }
    _train(classifier, reading, distillation, config, run_digest(identity), options, accelerator, files, reporter)
    if options.format == "merged":
        classifier.merge()
    judges = _Judges(
        some if distillation.held is None else distillation.held,
        None if evaluation is None else evaluation.evaluation,
        length,
    )
    found = {name: judges.logits(model, options, reporter, name) for name, model in judged.items()}
    found["export"] = judges.logits(classifier, options, reporter, "export")
    rounding = None
    if options.dtype != "float32":
        classifier.round_to(getattr(torch, options.dtype))
        exact, found["export"] = found["export"], judges.logits(classifier, options, reporter, options.dtype)
        rounding = _rounding(options.dtype, exact, found["export"])
    agreement = {}
    if distillation.held is not None:
        for name, each in found.items():
            agreement[name] = agreement_of(task, classes_of_logits(each.held, task), distillation.held)
    predictions = (
        {} if judges.scored is None else {name: classes_of_logits(each.scored, task) for name, each in found.items()}
    )
    scores, gains = compared(predictions, evaluation, "export")
    base, revision = _base(options, host) if options.format == "peft" else (None, None)
    arguments = {} if base is None else _arguments(classifier, host)
    record = ExportRecord(
        format=options.format,
        adapter=adapter.digest,
        task=task,
        target=host_record(host),
        dtype=options.dtype,
        rank=classifier.rank,
        max_length=length,
        base=Path(base).name if base is not None and Path(base).is_absolute() else base,
        revision=revision,
        teachers=tuple(teachers),
        training=TrainingRecord(
            command=options.command(),
            config=config,
            steps=total_steps(len(distillation.examples), config),
            train_examples=len(distillation.examples),
            train_digest=distillation.digest,
            data="; ".join(teachers)[:1000],
        ),
        versions=versions(),
        agreement=agreement,
        scores=scores,
    )
    if accelerator.is_main_process:
        _write(options.output, record, classifier, host, tokenizer, base, arguments)
    accelerator.wait_for_everyone()
    sizes = {
        str(path.relative_to(options.output)): path.stat().st_size
        for path in sorted(options.output.rglob("*"))
        if path.is_file()
    }
    return ExportReport(
        output=str(options.output),
        format=options.format,
        adapter=str(options.adapter),
        target=record.target,
        task=task.name,
        base=None if options.format == "merged" else base or str(options.output / BASE_FOLDER),
        arguments=arguments,
        files=sizes,
        bytes=sum(sizes.values()),
        rank=record.rank,
        teachers=record.teachers,
        train_examples=len(distillation.examples),
        unread=distillation.unread,
        steps=record.training.steps,
        seconds=time.monotonic() - started,
        agreement=agreement,
        scores=scores,
        gains=gains,
        truncated=judges.truncated(reading),
        rounding=rounding,
    )


def _carried(adapter: UniversalAdapter, options: ExportOptions) -> UniversalAdapter:
    """The adapter with the task file, if one is named; a LoRA folder is only checked.

    :raises FormatError: When it cannot be read or was tuned from another adapter.
    """
    if options.task_file is None:
        return adapter
    if starts_from_lora(options):
        read_tuned(ported_path(options.task_file), adapter.digest)
        return adapter
    return adapter.with_task(options.task_file)


def _ported(
    adapter: UniversalAdapter,
    carried: UniversalAdapter,
    host: Host,
    options: ExportOptions,
    reporter: Reporter,
    aligned: AlignedHost | None,
) -> dict[str, PortedModel]:
    """The models that the export is compared with: the ported adapter, and the one tuned by the task file."""
    aligned = aligned or carried.align(
        host,
        strategy=options.strategy,
        max_flops=options.max_flops,
        progress=phase(reporter, "aligning"),
        cache=options.cache,
    )
    found = {"zero_shot": adapter.port(aligned)} if carried.own_task else {}
    if options.task_file is not None:
        found["tuned"] = (
            adapter.port(host, task=options.task_file) if starts_from_lora(options) else carried.port(aligned)
        )
    return found


def _train(
    classifier: StandardClassifier,
    host: Host,
    distillation: DistillationData,
    config: TrainingConfig,
    digest: str,
    options: ExportOptions,
    accelerator: Accelerator,
    files: RunFiles | None,
    reporter: Reporter,
) -> None:
    """Train the LoRA and the head.

    The head starts at random: fitting it first on the bare host's outputs ends worse (SST-2 on minilm-l3: agreement
    with the teacher 0.844 instead of 0.861).
    """

    def on_step(report: StepReport) -> None:
        reporter("exporting", report.step, report.steps, f"loss {report.loss:.3f}  agreement {report.accuracy:.3f}")

    reporter("exporting", 0, total_steps(len(distillation.examples), config))
    run_steps(
        classifier,
        classifier.trained,
        classifier.optimizer(config),
        host,
        distillation.examples,
        config,
        accelerator=accelerator,
        targets=distillation.targets,
        files=files,
        digest=digest,
        resume=options.resume,
        save_every=options.save_every,
        on_step=on_step,
    )


@dataclass(frozen=True)
class _Said:
    """Logits of the held-out examples and of those that are scored."""

    held: list[Tensor]
    scored: list[Tensor]


@dataclass(frozen=True)
class _Judges:
    """The examples that models are compared on: held-out texts of the teacher, and evaluation data.

    :param held: Without a teacher, some of the training examples; these only serve to measure differences.
    """

    held: Examples
    scored: Examples | None
    max_length: int

    def logits(self, model: Teacher, options: ExportOptions, reporter: Reporter, name: str) -> _Said:
        """A model's logits of them."""
        progress = phase(reporter, f"scoring: {name.replace('_', '-')}")
        batch_size = options.evaluation_batch_size
        found = [
            []
            if not examples
            else model.logits_of(examples, batch_size=batch_size, max_length=self.max_length, progress=progress)
            for examples in (self.held, self.scored)
        ]
        return _Said(*found)

    def truncated(self, host: Host) -> int:
        """How many of the scored examples are cut."""
        found, chunk = 0, 256
        for start in range(0, len(self.scored or ()), chunk):
            assert self.scored is not None
            rows = range(start, min(start + chunk, len(self.scored)))
            found += encode_examples(host, self.scored, rows, max_length=self.max_length)[0].truncated
        return found


def classes_of_logits(logits: Sequence[Tensor], task: Task) -> Classes:
    """The most probable classes, in the form that `metrics.score` takes.

    :param logits: Of every example [predictions, labels].
    """
    rows = [part.argmax(-1).tolist() for part in logits]
    return rows if task.kind == "tokens" else [row[0] for row in rows]


def _rounding(dtype: str, exact: _Said, rounded: _Said) -> RoundingReport:
    """:raises OutputError: The outputs exceed the range of the smaller type."""
    first, second = (torch.cat([*said.held, *said.scored]) for said in (exact, rounded))
    if not second.isfinite().all():
        hint = "Choose another --dtype, and continue with --resume."
        raise OutputError(f"in {dtype} the outputs are not finite numbers.", hint)
    return RoundingReport(
        dtype=dtype,
        predictions=len(first),
        largest=float((first - second).abs().max()),
        moved=int((first.argmax(-1) != second.argmax(-1)).sum()),
    )


def _base(options: ExportOptions, host: Host) -> tuple[str | None, str | None]:
    """Name of the base, None where it is written into the folder, and its revision on the hub."""
    if options.base is not None and options.base != "copy":
        return options.base, None
    local = Path(host.name).expanduser()
    if options.base == "copy" or host.name.startswith(PREFIX) or (host.revision is None and not local.is_dir()):
        return None, None
    return (str(local.absolute()), None) if local.is_dir() else (host.name, host.revision)


def _arguments(classifier: StandardClassifier, host: Host) -> dict[str, Any]:
    """Arguments of `from_pretrained` that give the original base the export's labels and padding."""
    theirs: Any = host.model.config
    ours: Any = classifier.config
    found: dict[str, Any] = {}
    if dict(theirs.id2label) != dict(ours.id2label):
        found = {"num_labels": len(ours.id2label), "id2label": ours.id2label, "label2id": ours.label2id}
    if theirs.pad_token_id != ours.pad_token_id:
        found["pad_token_id"] = ours.pad_token_id
    return found


def _write(
    output: Path,
    record: ExportRecord,
    classifier: StandardClassifier,
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    base: str | None,
    arguments: dict[str, Any],
) -> None:
    """Write the folder, whole or not at all.

    :param base: The base that peft's configuration names; None if it is written into the folder.
    :param arguments: Arguments that loading needs besides the folder, for the card.
    :raises OutputError: When it cannot be written.
    """
    try:
        with quiet(), atomic_folder(output) as folder:
            if record.format == "peft" and base is None:
                save_base(host, record.task, folder / BASE_FOLDER, getattr(torch, record.dtype))
                assert host.tokenizer is not None  # training needs a tokenizer
                save_standalone(host.tokenizer, folder / BASE_FOLDER)
                base = str((output / BASE_FOLDER).absolute())
            classifier.save(folder, base=base, revision=record.revision)
            save_standalone(tokenizer, folder)
            (folder / CARD_FILE).write_text(model_card(record, arguments), encoding="utf-8")
            (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except SafetensorError as error:
        raise OutputError(f"cannot write {output}: {first_line(error)}.", "Free some space, then --resume.") from error


def _digest(path: Path) -> str:
    """Digest of a task file's or a LoRA's content."""
    return hashlib.sha256((ported_path(path) if is_ported(path) else path).read_bytes()).hexdigest()
