"""Methods that learn on the target from the texts of a transfer set, without labels or with those of the same texts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from uhl_cli.commands.export import classes_of_logits, export
from uhl_cli.commands.options import ExportOptions, TuneOptions
from uhl_cli.commands.scoring import Classes
from uhl_cli.commands.transfer_set import MAX_TEXTS, SPANS, cut_text
from uhl_cli.commands.tune_student import distillation_data, tune_student
from uhl_cli.compare.baselines import Retrained, fit
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.costs import ported_costs, retrained_costs
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.outcome import Outcome, curve_of_log, evaluation_of, refuse_other_labels, train_of
from uhl_cli.compare.resources import AlignedFile, Resources
from uhl_cli.compare.results import Costs, CurvePoint, RunFolder, Search
from uhl_cli.compare.search import chosen_training, search_once
from uhl_cli.compare.sections import TrainingSection
from uhl_cli.data import Examples, TaskData
from uhl_cli.data.tasks import Task
from uhl_cli.errors import DataError
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import phase
from uhl_cli.train.classifier import load_classifier
from uhl_cli.train.loop import accelerator_for
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.student import Student, Trained
from uhl_cli.transfer.general import record_of, transfer_texts
from uhl_cli.transfer.texts import Floats, TransferSet, TransferTexts, quantised_log_odds, single_lines

FROM_SOURCE = "lora-from-source"


@dataclass(frozen=True)
class ExactOutputs(TransferSet):
    """A transfer set with the teacher's outputs as they are, which no file holds.

    :param logits: float32 [predictions, labels].
    """

    logits: Floats

    def log_odds(self) -> Floats:
        """Log-odds against the first class."""
        odds: Floats = self.logits - self.logits[:, :1]
        return odds


def distilled(run: RunConfig, resources: Resources, data: TaskData, searches: dict[str, Search]) -> Outcome:
    """Do a run of this kind.

    :raises UsageError: When the adapter has other labels.
    :raises DataError: When there is nothing to learn from.
    :raises UhlError: As `uhl tune` and `uhl export` do.
    """
    adapter, _ = resources.adapter(run)
    refuse_other_labels(run, adapter.manifest.task, data)
    if run.method == FROM_SOURCE:
        return _from_source(run, resources, data, searches)
    labels = None
    if run.method == "lora-same-texts":
        texts = distillation_data(adapter.transfer_set(), resources.bare_host(run.host)).examples
        labels = replace(data, train=labelled_texts(texts, train_of(data)), evaluation=None)
    aligned_file = resources.aligned_file(run)
    folder = RunFolder(resources.results, run.run_id).path
    files = RunFiles(folder / "tuning.uhl-run")
    if run.method == "uhl-export":
        outcome = _exported(run, resources, data, aligned_file, files)
    else:
        outcome = _tuned(run, resources, data, aligned_file, labels, files)
    before = adapter.port(aligned_file.aligned).classes_of(
        evaluation_of(data),
        **_scoring(run, resources, "zero-shot"),
        max_length=min(run.training.max_length, aligned_file.host.max_length),
    )
    return replace(outcome, zero_shot=before.for_metric(data.task.kind), adapter=adapter)


def _tuned(
    run: RunConfig,
    resources: Resources,
    data: TaskData,
    aligned_file: AlignedFile,
    labels: TaskData | None,
    files: RunFiles,
) -> Outcome:
    """`uhl tune` on the transfer set, or with these labels in place of its outputs."""
    adapter, host, delta = aligned_file.adapter, aligned_file.host, _trained(run) == "delta-theta"
    output = files.folder.parent / ("tuned.task.safetensors" if delta else "tuned.lora")
    options = TuneOptions(
        parameters=_trained(run),
        output=output,
        resume=files.checkpoint.exists(),
        **_asked(run, resources, aligned_file),
    )
    report = tune_student(
        adapter,
        host,
        labels,
        options,
        accelerator=accelerator_for(resources.device, run.training.mixed_precision),
        files=files,
        reporter=resources.reporter,
        aligned=aligned_file.aligned,
    )
    ported = adapter.port(aligned_file.aligned, task=output)
    length = min(run.training.max_length, host.max_length)
    found = ported.classes_of(evaluation_of(data), **_scoring(run, resources, run.method), max_length=length)
    stored = report.lora_bytes + report.readout_bytes
    if delta:
        stored = aligned_file.path.stat().st_size + report.bytes
    else:
        shutil.rmtree(output)
    costs = ported_costs(ported, host, run.evaluation, file_bytes=stored, atoms=None)
    return _finished(found.for_metric(data.task.kind), costs, files, report.train_examples)


def _exported(
    run: RunConfig,
    resources: Resources,
    data: TaskData,
    aligned_file: AlignedFile,
    files: RunFiles,
) -> Outcome:
    """`uhl export`, read again as transformers' own classifier.

    In use it replaces the host: it costs no FLOPs, and like a whole fine-tuned host its own size again.
    """
    output = files.folder.parent / "export"
    options = ExportOptions(output=output, resume=files.checkpoint.exists(), **_asked(run, resources, aligned_file))
    report = export(
        aligned_file.adapter,
        aligned_file.host,
        None,
        options,
        accelerator=accelerator_for(resources.device, run.training.mixed_precision),
        files=files,
        reporter=resources.reporter,
        aligned=aligned_file.aligned,
    )
    classifier = load_classifier(str(output), device=resources.device, offline=True)
    logits = classifier.logits_of(evaluation_of(data), **_scoring(run, resources, run.method))
    memory = sum(value.nbytes for value in classifier.model.parameters()) / 1e6
    costs = Costs(adapter_bytes=report.bytes, memory_mb=memory, flops_percent=0.0)
    shutil.rmtree(output)
    return _finished(classes_of_logits(logits, data.task), costs, files, report.train_examples)


def _from_source(run: RunConfig, resources: Resources, data: TaskData, searches: dict[str, Search]) -> Outcome:
    """A LoRA and a linear head from scratch, taught by the source itself on the package's own texts."""
    task, host = data.task, resources.bare_host(run.host)
    texts = package_texts(task, train_of(data)).first(run.dataset.limit_train or MAX_TEXTS)
    logits = resources.source_outputs(run, texts)
    taught = distillation_data(ExactOutputs(texts, quantised_log_odds(logits), "the source", logits), host)
    assert taught.held is not None  # a transfer set has some

    def trained(training: TrainingSection) -> tuple[Retrained, list[CurvePoint]]:
        model = Retrained("lora", resources.fresh_host(run.host), len(task.labels), training)

        def note(done: int, total: int, text: str) -> None:
            resources.reporter(f"training: {run.method}", done, total, text)

        accelerator = accelerator_for(resources.device, training.mixed_precision)
        return model, fit(
            model, taught.examples, training, accelerator=accelerator, targets=taught.targets, on_step=note
        )

    def classes(model: Retrained, examples: Examples) -> Classes:
        return model.predict(examples, **_scoring(run, resources, run.method), max_length=run.training.max_length)

    def split(limit: int) -> tuple[Examples, Callable[[TrainingSection], Classes]]:
        assert taught.held is not None
        held = taught.held.select(range(min(limit, len(taught.held))))
        return held, lambda training: classes(trained(training)[0], held)

    search = search_once(run, task, searches, split, RunFolder(resources.results, run.run_id).path)
    started = time.monotonic()
    model, curve = trained(chosen_training(run, search))
    seconds = time.monotonic() - started
    predictions, costs = classes(model, evaluation_of(data)), retrained_costs(model, host, run.evaluation)
    adapter, _ = resources.adapter(run)
    return Outcome(predictions, costs, seconds, search, tuple(curve), adapter=adapter, examples=len(taught.examples))


def package_texts(task: Task, sample: Examples) -> TransferTexts:
    """The package's own texts in the style of the sample, as `uhl pretrain --transfer-set general` takes them.

    :raises DataError: When the task is on pairs of texts.
    """
    if task.pair_column is not None:
        raise DataError(f"{task.name} is on pairs of texts, and the package has none.", f"Leave out {FROM_SOURCE}.")
    words = task.kind == "tokens"
    texts = tuple(transfer_texts(record_of(sample.texts)))
    return TransferTexts(texts, None, 0 if words else SPANS, words, "general")


def distilled_shape(run: RunConfig, aligned_file: AlignedFile) -> PortedModel:
    """What `uhl tune` gives in this run, before its first step: it costs what the tuned model costs."""
    adapter, aligned = aligned_file.adapter, aligned_file.aligned
    delta = adapter.stored["delta_theta"]
    student = Student(
        adapter.start(aligned),
        aligned.host.map,
        _trained(run),
        readout=False,
        delta_shape=(delta.shape[0], delta.shape[1]),
        rank=run.training.rank,
    )
    return adapter.port(aligned).with_adapter(student.finished(aligned.host))


def labelled_texts(examples: Examples, train: Examples) -> Examples:
    """Those of the examples whose texts stand in the training data, with their true labels.

    A training text counts up to the word at which transfer sets cut it; white space does not count.

    :param examples: Of a transfer set: a text and its spans are examples of their own.
    :raises DataError: When none of them stands there.
    """
    truth = train.labels if train.tags is None else train.tags
    assert truth is not None  # one of the two is there
    known: dict[tuple[str, ...], Any] = dict(zip(_keys(train), truth, strict=True))
    keys = _keys(examples)
    rows = [row for row, key in enumerate(keys) if key in known]
    if examples.words is not None:  # a word with white space in it is several words of a transfer set
        rows = [row for row in rows if len(known[keys[row]]) == len(examples.words[row])]
    if not rows:
        raise DataError(
            "none of the texts of the adapter's transfer set stands in the training data.",
            "Use an adapter whose transfer set holds the task's own texts: anchors: null in its section.",
        )
    found = tuple(known[keys[row]] for row in rows)
    chosen = examples.select(rows)
    return replace(chosen, labels=found) if examples.tags is None else replace(chosen, tags=found)


def _keys(examples: Examples) -> list[tuple[str, ...]]:
    """What tells an example's text, or its two texts, from others."""
    texts = single_lines(examples.texts)
    if examples.pairs is not None:
        return list(zip(texts, map(cut_text, single_lines(examples.pairs)), strict=True))
    return [(text if examples.tags is not None else cut_text(text),) for text in texts]


def _trained(run: RunConfig) -> Trained:
    return "delta-theta" if METHODS[run.method].mode == "transfer" else "lora"


def _asked(run: RunConfig, resources: Resources, aligned_file: AlignedFile) -> dict[str, Any]:
    """Options that `uhl tune` and `uhl export` share."""
    return {
        "adapter": aligned_file.path,
        "target": resources.host_options(run.host),
        "rank": run.training.rank,
        "training": run.tuning(),
        "max_length": run.training.max_length,
        "max_flops": run.budget.max_flops,
        "evaluation_batch_size": run.evaluation.batch_size,
        "overwrite": True,
        "cache": False,
    }


def _scoring(run: RunConfig, resources: Resources, label: str) -> dict[str, Any]:
    return {
        "batch_size": run.evaluation.batch_size,
        "progress": phase(resources.reporter, f"scoring: {label}"),
    }


def _finished(predictions: Classes, costs: Costs, files: RunFiles, examples: int) -> Outcome:
    """The outcome of a finished training, whose checkpoint is no longer needed.

    Its seconds are those since the last checkpoint that it went on from.
    """
    seconds = float(json.loads(files.log.read_text(encoding="utf-8").splitlines()[-1])["seconds"])
    curve = tuple(curve_of_log(files.log))
    shutil.rmtree(files.folder)
    return Outcome(predictions, costs, seconds, curve=curve, examples=examples)
