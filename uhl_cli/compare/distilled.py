"""Methods that learn on the target from the texts of a transfer set, without labels or with those of the same texts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

from uhl_cli.commands.options import TuneOptions
from uhl_cli.commands.scoring import Classes
from uhl_cli.commands.transfer_set import cut_text
from uhl_cli.commands.tune_student import distillation_data, tune_student
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.costs import ported_costs
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.outcome import Outcome, curve_of_log, evaluation_of, refuse_other_labels, train_of
from uhl_cli.compare.resources import AlignedFile, Resources
from uhl_cli.compare.results import RunFolder, Search
from uhl_cli.data import Examples, TaskData
from uhl_cli.errors import DataError
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import phase
from uhl_cli.train.loop import RunFiles, accelerator_for
from uhl_cli.train.student import Student, Trained
from uhl_cli.transfer.texts import single_lines


def distilled(run: RunConfig, resources: Resources, data: TaskData, searches: dict[str, Search]) -> Outcome:
    """Do a run of this kind.

    :raises UsageError: When the adapter has other labels.
    :raises DataError: When there is nothing to learn from.
    """
    adapter, path = resources.adapter(run)
    refuse_other_labels(run, adapter, data)
    host = resources.bare_host(run.host)
    labels = None
    if run.method == "lora-same-texts":
        texts = distillation_data(adapter.transfer_set(), host).examples
        labels = replace(data, train=labelled_texts(texts, train_of(data)), evaluation=None)
    aligned = resources.aligned_file(run).aligned
    folder, delta = RunFolder(resources.results, run.run_id).path, _trained(run) == "delta-theta"
    files = RunFiles(folder / "tuning.uhl-run")
    output = folder / ("tuned.task.safetensors" if delta else "tuned.lora")
    options = TuneOptions(
        adapter=path,
        target=resources.host_options(run.host),
        parameters=_trained(run),
        rank=run.training.rank,
        training=run.tuning(),
        max_length=run.training.max_length,
        max_flops=run.budget.max_flops,
        evaluation_batch_size=run.evaluation.batch_size,
        output=output,
        overwrite=True,
        resume=files.checkpoint.exists(),
        cache=False,
    )
    report = tune_student(
        adapter,
        host,
        labels,
        options,
        accelerator=accelerator_for(resources.device, run.training.mixed_precision),
        files=files,
        reporter=resources.reporter,
        aligned=aligned,
    )
    ported = adapter.port(aligned, task=output)
    predictions = _classes(run, resources, ported, data, run.method)
    before = _classes(run, resources, adapter.port(aligned), data, "zero-shot")
    stored = path.stat().st_size + report.bytes if delta else report.lora_bytes + report.readout_bytes
    costs = ported_costs(ported, host, run.evaluation, file_bytes=stored, atoms=None)
    curve, seconds = tuple(curve_of_log(files.log)), _seconds(files)
    shutil.rmtree(files.folder)  # its checkpoint is no longer needed
    if not delta:
        shutil.rmtree(output)
    return Outcome(predictions, costs, seconds, None, curve, before, adapter, examples=report.train_examples)


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


def _classes(run: RunConfig, resources: Resources, model: PortedModel, data: TaskData, label: str) -> Classes:
    found = model.classes_of(
        evaluation_of(data),
        batch_size=run.evaluation.batch_size,
        max_length=min(run.training.max_length, model.host.max_length),
        progress=phase(resources.reporter, f"scoring: {label}"),
    )
    return found.for_metric(data.task.kind)


def _seconds(files: RunFiles) -> float:
    """Seconds of the steps, since the last checkpoint that a training went on from."""
    return float(json.loads(files.log.read_text(encoding="utf-8").splitlines()[-1])["seconds"])
