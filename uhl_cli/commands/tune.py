"""`uhl tune`: tune an adapter file or a LoRA on a target, with or without labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.layout import bits_of
from uhl_cli.commands.options import TuneOptions
from uhl_cli.commands.outputs import claimed_run
from uhl_cli.commands.scoring import Classes, flop_report, load
from uhl_cli.commands.search import optimise
from uhl_cli.commands.tune_setup import prepare, train_task
from uhl_cli.commands.tune_student import compared, score_data, tune_student
from uhl_cli.data import TaskData, load_task, name_to_load
from uhl_cli.formats.folder import FILE_NAME
from uhl_cli.formats.task import TaskFile, task_to_bytes, write_task
from uhl_cli.host.checkpoint import Host
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import Reporter, TuneReport, silent
from uhl_cli.train.loop import accelerator_for
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.task_adapter import TaskAdapter


def run_tune(options: TuneOptions, reporter: Reporter = silent) -> TuneReport:
    """Load what the options name, tune, and write the task file.

    :raises UhlError: Any of its kinds; nothing half-written is left.
    """
    options.refuse_idle()
    adapter = UniversalAdapter.load(options.adapter)
    own = adapter.manifest.task
    name = name_to_load(own, options.data.model_dump()) if options.labelled else own.name
    output = options.output_path(name)
    lora = options.parameters == "lora"
    shown_by = output / FILE_NAME if lora else None
    with claimed_run(
        output, shown_by=shown_by, within=lora, resume=options.resume, overwrite=options.overwrite
    ) as files:
        return _run(adapter, name, options, files, reporter)


def _run(adapter: UniversalAdapter, name: str, options: TuneOptions, files: RunFiles, reporter: Reporter) -> TuneReport:
    own = adapter.manifest.task
    accelerator = accelerator_for(options.target.device, options.training.mixed_precision)
    chosen = str(accelerator.device) if options.target.device == "auto" else options.target.device
    search = data = evaluation = None
    if not options.labelled:
        adapter.transfer_set()  # an error before the host is loaded
        evaluation = score_data(adapter, options)
    host = load(options.target.model_copy(update={"device": chosen}), cache=options.cache)
    if options.labelled:
        data = load_task(
            name,
            labels=own.labels if name == own.name else None,
            offline=options.target.offline,
            seed=options.training.seed,
            **options.data.model_dump(exclude={"task"}),
        )
    try:
        run: dict[str, Any] = {"accelerator": accelerator, "files": files, "reporter": reporter}
        if options.optimise:
            options, search = optimise(adapter, host, data, options, **run)
        if data is None or options.parameters == "lora":
            report = tune_student(adapter, host, data, options, evaluation=evaluation, **run)
        else:
            report = tune(adapter, host, data, options, **run)
        return report.model_copy(update={"search": search})
    finally:
        accelerator.end_training()  # leaves the process group, where there are several processes


def tune(
    adapter: UniversalAdapter,
    host: Host,
    data: TaskData,
    options: TuneOptions,
    *,
    accelerator: Accelerator,
    files: RunFiles | None = None,
    reporter: Reporter = silent,
    aligned: AlignedHost | None = None,
    after_step: Callable[[int, Callable[[], PortedModel]], None] | None = None,
) -> TuneReport:
    """Tune a loaded adapter on a loaded host and write the task file.

    :param aligned: See `prepare`.
    :param after_step: Called after each step with the number of finished steps, and a function that gives the target
        as tuned so far.

    The task is the adapter's own when name, kind and labels agree; then only delta-theta is trained.

    :raises AlignmentError: When the host cannot be aligned.
    :raises BudgetError: When the FLOP limit leaves nothing.
    :raises TrainingError: When training diverges or the checkpoint does not fit.
    """
    started = time.monotonic()
    setup = prepare(adapter, host, data, options, reporter, aligned)
    record = setup.record
    trained = TaskAdapter(adapter.stored, record.config, new_readout=not record.own_task, seed=options.training.seed)
    trained.to(accelerator.device)
    predictor = setup.predictor()
    predictions: dict[str, Classes] = {}
    if predictor and record.own_task:
        # As from `port`: calibrated by the transfer set, which delta-theta with labels does not use.
        predictions["zero_shot"] = predictor.predicted(adapter.port(setup.aligned), "zero-shot").classes

    def ported_now() -> PortedModel:
        return setup.ported(trained.trained_values())

    def stepped(done: int) -> None:
        if after_step is not None:
            after_step(done, ported_now)

    train_task(trained, setup, accelerator, files, stepped)
    ported = ported_now()
    atoms, truncated = None, 0
    if predictor:
        predictions["tuned"], atoms, truncated = predictor.predicted(ported, "tuned")
        predictions["majority_class"] = predictor.majority_class()
    scores, gains = compared(predictions, data)
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
        degree=host.map.degree,
        task=data.task.name,
        own_task=record.own_task,
        parameters="delta-theta",
        supervision="labels",
        lora_bytes=0,
        agreement={},
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
        flops=flop_report(ported, setup.aligned.host_flops),
        left_out=setup.aligned.plan.left_out,
    )
