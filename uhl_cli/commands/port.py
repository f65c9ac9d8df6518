"""`uhl port`: port an adapter file to a target and report on it, without labels or gradients."""

from __future__ import annotations

import time
from pathlib import Path

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.agreement import judge
from uhl_cli.commands.options import PortOptions
from uhl_cli.commands.outputs import claimed_output
from uhl_cli.commands.scoring import (
    Classes,
    Predictor,
    depth_quality,
    flop_report,
    host_record,
    load,
    references_of,
)
from uhl_cli.cost.flops import count_flops
from uhl_cli.data import TaskData, evaluation_data
from uhl_cli.errors import DataError, LabelError, UsageError
from uhl_cli.formats.folder import FILE_NAME, TunedRecord, is_ported, ported_path, read_tuned
from uhl_cli.formats.ported import save_ported
from uhl_cli.formats.task import TaskRecord, read_task
from uhl_cli.host.checkpoint import Host
from uhl_cli.metrics import paired_difference, score
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.controls import by_size
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import AgreementReport, CalibrationReport, PortReport, Reporter, phase, silent
from uhl_cli.schema import HostRecord


def run_port(options: PortOptions, reporter: Reporter = silent) -> tuple[PortedModel, PortReport]:
    """Load what the options name, port, score if the data is available, and save the result if asked.

    :raises UhlError: Any of its kinds; nothing half-written is left.
    """
    if options.output is None:
        return _run(options, reporter)
    with claimed_output(options.output / FILE_NAME, overwrite=options.overwrite):
        return _run(options, reporter)


def _run(options: PortOptions, reporter: Reporter) -> tuple[PortedModel, PortReport]:
    if _lora_folder(options) is not None:
        options.refuse_given({"controls": "a LoRA has no controls"})
    adapter = UniversalAdapter.load(options.adapter)
    tuned = None
    if options.task_file is not None:  # an error before the host is loaded
        tuned = _tuned(adapter, options.task_file)
        if isinstance(tuned, TaskRecord):
            adapter = adapter.with_task(options.task_file)
    started = time.monotonic()
    host = load(options.target, cache=options.cache)
    seconds = {"load": time.monotonic() - started}
    data, reason = _data(adapter, options)
    ported, report = port(adapter, host, options, data=data, reporter=reporter, seconds=seconds)
    report = report.model_copy(update={"data": reason if data is None else data.source})
    if tuned is not None:
        parameters = tuned.parameters if isinstance(tuned, TaskRecord) else "lora"
        report = report.model_copy(update={"parameters": parameters, "supervision": tuned.supervision})
    if options.output is not None:
        # The full name, unlike the report's, so that the folder can be loaded without naming the host again.
        record = HostRecord(name=host.name, revision=host.revision, fingerprint=host.fingerprint)
        save_ported(options.output, ported, record, tuned if isinstance(tuned, TunedRecord) else None)
        report = report.model_copy(update={"output": str(options.output)})
    return ported, report


def port(
    adapter: UniversalAdapter,
    host: Host,
    options: PortOptions,
    *,
    data: TaskData | None,
    reporter: Reporter = silent,
    seconds: dict[str, float] | None = None,
) -> tuple[PortedModel, PortReport]:
    """Port a loaded adapter to a loaded host; `data` is only ever used to score.

    Without `options.controls`, only comparisons that need no pass of their own are scored: the majority class, and
    the readout alone where calibration has left the updates out.  A LoRA folder that `options.task_file` names replaces
    the adapter's own parts.  A LoRA or low-rank update, tuned on its own alignment, has no controls with random updates
    or with `size`.

    :raises AlignmentError: When the host cannot be aligned.
    :raises BudgetError: When the FLOP limit leaves nothing.
    """
    times = dict(seconds or {})
    started = time.monotonic()
    folder = _lora_folder(options)
    file = options.adapter if folder is None else ported_path(folder)
    aligned = None
    if folder is None:
        aligned = adapter.align(
            host,
            strategy=options.strategy,
            max_flops=options.max_flops,
            progress=phase(reporter, "aligning"),
            cache=options.cache,
        )
        times["align"] = time.monotonic() - started
        started = time.monotonic()
    ported = adapter.port(host, task=folder) if aligned is None else adapter.port(aligned)
    times["inject"] = time.monotonic() - started
    started = time.monotonic()
    agreement, not_judged = _judged(adapter, ported, options, reporter)
    if agreement is not None:
        times["judge"] = time.monotonic() - started
    predictions: dict[str, Classes] = {}
    atoms, truncated = None, 0
    examples = None if data is None else data.evaluation
    if examples is not None:
        started = time.monotonic()
        predictor = Predictor(adapter, examples, batch_size=options.batch_size, reporter=reporter)
        predictions["ported"], atoms, truncated = predictor.predicted(ported, "ported")
        predictions["majority_class"] = predictor.majority_class()
        if aligned is not None:
            off = not ported.adapter.updates and ported.adapter.lora is None
            if off:
                predictions["readout_only"] = predictions["ported"]
            elif options.controls:
                predictions["readout_only"] = predictor.readout_only(ported)
            if adapter.own_task and options.controls:
                predictions["head_only"] = predictor.head_only(host, aligned.alignment)
        if aligned is not None and not adapter.low_rank and options.controls:
            full = adapter.port(aligned, strength=1.0)
            if off and full.adapter.updates:
                predictions["full_updates"] = predictor.predicted(full, "updates").classes
            predictions["random_update"] = predictor.random_update(full, options.seed)
            predictions["size"] = predictor.predicted(adapter.port(by_size(aligned, adapter.bank)), "size").classes
        times["score"] = time.monotonic() - started
    manifest = adapter.manifest
    features = None if aligned is None else aligned.alignment.features
    scores, gains = {}, {}
    if examples is not None:
        references, task = references_of(examples), manifest.task
        scores = {name: score(task.metric, rows, references, task.labels) for name, rows in predictions.items()}
        gains = {
            name: paired_difference(task.metric, predictions["ported"], rows, references, task.labels)
            for name, rows in predictions.items()
            if name != "ported"
        }
    report = PortReport(
        adapter=str(options.adapter),
        bytes=file.stat().st_size if file.exists() else 0,
        target=host_record(host),
        degree=host.map.degree,
        strategy=ported.strategy,
        task=manifest.task.name,
        source=manifest.source.name,
        source_score=manifest.score,
        alignment_cached=aligned is not None and aligned.cached,
        quality=() if aligned is None else depth_quality(aligned.alignment),
        readout_quality=() if aligned is None else aligned.alignment.knot_quality,
        feature_quality=None if features is None else features.quality,
        calibration=None if aligned is None else calibration_report(adapter, aligned),
        agreement=agreement,
        not_judged=not_judged,
        left_out=() if ported.plan is None else ported.plan.left_out,
        flops=flop_report(ported, count_flops(host, None) if aligned is None else aligned.host_flops),
        seconds=times,
        data=None if data is None else data.source,
        scores=scores,
        gains=gains,
        atoms_per_token=atoms,
        truncated=truncated,
    )
    return ported, report


def calibration_report(adapter: UniversalAdapter, aligned: AlignedHost) -> CalibrationReport | None:
    """The port's calibration by the transfer set; None for an adapter with a task file, or without a transfer set."""
    found = adapter.calibration(aligned) if adapter is adapter.own else None
    if found is None:
        return None
    return CalibrationReport(
        texts=found.texts,
        strength=found.strength,
        offsets=tuple(found.offsets[found.strength].tolist()),
        cross_entropy=found.cross_entropy,
    )


def _judged(
    adapter: UniversalAdapter, ported: PortedModel, options: PortOptions, reporter: Reporter
) -> tuple[AgreementReport | None, str | None]:
    """The port's agreement with the teacher, or None with the reason why it cannot be measured."""
    if options.task_file is not None or adapter is not adapter.own:
        return None, "it was tuned on the target; `uhl tune` reports the agreement"
    if adapter.transfer is None:
        return None, "the file has no transfer set"
    try:
        transfer = adapter.transfer_set()
        found = judge(adapter.manifest, transfer, ported, batch_size=options.batch_size, reporter=reporter)
    except DataError as error:
        return None, error.message.rstrip(".")
    return found, None


def _lora_folder(options: PortOptions) -> Path | None:
    """The folder of `uhl tune --parameters lora` that `--task-file` names, if it does not name a task file."""
    return options.task_file if options.task_file is not None and is_ported(options.task_file) else None


def _tuned(adapter: UniversalAdapter, path: Path) -> TaskRecord | TunedRecord:
    """The record of tuning in a task file or a LoRA folder.

    :raises FormatError: When it cannot be read or was tuned from another adapter.
    """
    return read_tuned(ported_path(path), adapter.digest)[1] if is_ported(path) else read_task(path).record


def _data(adapter: UniversalAdapter, options: PortOptions) -> tuple[TaskData | None, str | None]:
    """Evaluation data in the adapter's labels, or None with the reason.

    Data that was asked for must be found; the adapter's own task is scored only if its data is available.
    """
    if not options.score:
        return None, "not scored: --no-score"
    task, offline = adapter.manifest.task, options.target.offline
    try:
        return evaluation_data(task, options.data.model_dump(), offline=offline, seed=options.seed), None
    except LabelError:
        raise
    except (DataError, UsageError) as error:
        if options.data_required:
            raise
        return None, f"not scored: {error}"
