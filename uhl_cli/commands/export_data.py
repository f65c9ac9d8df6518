"""What `export` learns from: the transfer set, texts labelled by a model, a second teacher, labels."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from uhl_cli.align.texts import read_texts
from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import ExportOptions
from uhl_cli.commands.transfer_set import SPANS
from uhl_cli.commands.tune_student import DistillationData, distillation_data
from uhl_cli.data import TaskData, load_task, name_to_load
from uhl_cli.data.tasks import Task
from uhl_cli.errors import DataError
from uhl_cli.formats.folder import is_ported
from uhl_cli.host.checkpoint import Host
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import Reporter, phase
from uhl_cli.train.loop import targets_of
from uhl_cli.transfer.texts import TransferSet, TransferTexts, quantised_log_odds, single_lines


def starts_from_lora(options: ExportOptions) -> bool:
    """Whether `--task-file` names the folder of a LoRA."""
    return options.task_file is not None and is_ported(options.task_file)


def refuse_untaught(carried: UniversalAdapter, options: ExportOptions, *, labelled: bool) -> None:
    """Return only if there is something to learn from.

    :raises DataError: The file has no readable transfer set and no other source is named, or the texts of `--texts`
        cannot be used.
    """
    task = carried.manifest.task
    if options.texts is not None:
        _own_texts(task, options.texts, options.data.encoding)
    elif carried.transfer is not None:
        carried.transfer_set()
    elif not labelled:
        raise DataError(
            f"{options.adapter} has no transfer set for {task.name} to learn from.",
            "Give texts of your own with --texts FILE, or labelled data with --data.",
        )


def labelled_data(task: Task, options: ExportOptions) -> TaskData:
    """The data that `--task` or `--data` names.

    :raises DataError: When it cannot be found or read, or its labels differ from the adapter's.
    """
    asked = options.data.model_dump()
    name = name_to_load(task, asked)
    rest = {option: value for option, value in asked.items() if option != "task"}
    return load_task(name, labels=task.labels, offline=options.target.offline, seed=options.training.seed, **rest)


def refuse_other_labels(task: Task, data: TaskData) -> None:
    """Return only if labelled data has the adapter's kind of task and labels, and training examples.

    :raises DataError: Otherwise.
    """
    if (data.task.kind, data.task.labels) != (task.kind, task.labels):
        kinds = {"sequence": "whole texts", "tokens": "words"}
        raise DataError(
            f"{data.source} labels {kinds[data.task.kind]} as {', '.join(data.task.labels[:8])}, the adapter "
            f"{kinds[task.kind]} as {', '.join(task.labels[:8])}.",
            "Give data of the adapter's own task.",
        )
    if not data.train:
        raise DataError("there is no training example.", "Check --data and --limit-train.")


def export_data(
    carried: UniversalAdapter,
    host: Host,
    judged: dict[str, PortedModel],
    data: TaskData | None,
    options: ExportOptions,
    length: int,
    reporter: Reporter,
) -> tuple[DistillationData, list[str]]:
    """What the classifier learns from, with distributions as targets, and the names of its teachers."""
    distillation: DistillationData | None = None
    teachers = []
    if options.texts is not None:
        speaker, named = ("tuned", "tuned") if "tuned" in judged else ("zero_shot", "ported")
        texts = _own_texts(carried.manifest.task, options.texts, options.data.encoding)
        said = _said(texts, judged[speaker], options, length, reporter)
        distillation = distillation_data(said, host)
        teachers.append(f"the {named} model, on {texts.origin}")
    elif carried.transfer is not None:
        distillation = distillation_data(carried.transfer_set(), host)
        teachers.append(distillation.source)
        if "tuned" in judged and not starts_from_lora(options):
            distillation = _averaged(distillation, judged["tuned"], options, length, reporter)
            teachers.append("the adapter, tuned on this target")
    if starts_from_lora(options):
        teachers.append("a LoRA tuned on this target, as the start")
    if data is not None:
        distillation = _with_labels(distillation, data)
        teachers.append(f"labels: {data.source}")
    assert distillation is not None  # see refuse_untaught
    return distillation, [teacher[:1000] for teacher in teachers]


def _own_texts(task: Task, path: Path, encoding: str | None) -> TransferTexts:
    """The texts that `--texts` names, with their spans.

    :raises DataError: When there are fewer than two different texts, or the task is on pairs.
    """
    hint = "Give a text file with two or more different texts, one per line."
    if task.pair_column is not None:
        raise DataError(f"{task.name} is on pairs of texts, and --texts has none.", "Give labelled data with --data.")
    texts = tuple(dict.fromkeys(single_lines(read_texts(path, hint, encoding=encoding))))
    if len(texts) < 2:
        raise DataError(f"{path} holds only one text.", hint)
    words = task.kind == "tokens"
    return TransferTexts(texts, None, 0 if words else SPANS, words, f"file {path.name}")


def _said(
    texts: TransferTexts, model: PortedModel, options: ExportOptions, length: int, reporter: Reporter
) -> TransferSet:
    """The texts with a model's outputs for them and for their spans."""
    logits = model.logits_of(
        texts.examples(),
        batch_size=options.evaluation_batch_size,
        max_length=length,
        progress=phase(reporter, "texts"),
    )
    return TransferSet(texts, quantised_log_odds(torch.cat(logits).numpy()), "the model itself")


def _averaged(
    distillation: DistillationData, model: PortedModel, options: ExportOptions, length: int, reporter: Reporter
) -> DistillationData:
    """The data with the mean of its targets and a second teacher's probabilities as targets."""
    first = distillation.targets
    assert first is not None
    said = model.logits_of(
        distillation.examples,
        batch_size=options.evaluation_batch_size,
        max_length=length,
        progress=phase(reporter, "second teacher"),
    )
    probabilities = [logits.softmax(-1) for logits in said]

    def targets(rows: list[int]) -> Tensor:
        return (first(rows) + torch.cat([probabilities[row] for row in rows])) / 2

    return replace(distillation, targets=targets)


def _with_labels(distillation: DistillationData | None, data: TaskData) -> DistillationData:
    """The examples with soft targets, followed by the labelled ones with one-hot targets."""
    examples, num_labels = data.train, len(data.task.labels)
    assert examples is not None  # see refuse_other_labels

    def certain(rows: list[int]) -> Tensor:
        return functional.one_hot(torch.tensor(targets_of(examples, rows), dtype=torch.long), num_labels).float()

    owners = tuple(range(len(examples)))
    if distillation is None:
        return DistillationData(examples, certain, None, examples.digest(), data.source, owners=owners)
    first, count = distillation.targets, len(distillation.examples)
    assert first is not None

    def targets(rows: list[int]) -> Tensor:
        return torch.cat([first([row]) if row < count else certain([row - count]) for row in rows])

    return replace(
        distillation,
        examples=distillation.examples.followed_by(examples),
        targets=targets,
        digest=hashlib.sha256((distillation.digest + examples.digest()).encode()).hexdigest(),
        owners=(*distillation.owners, *(max(distillation.owners) + 1 + owner for owner in owners)),
    )
