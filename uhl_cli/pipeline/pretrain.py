"""`uhl pretrain`: a frozen host and a task in, one adapter file out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.adapter.convert import to_file
from uhl_cli.adapter.store import write_adapter
from uhl_cli.align.texts import AnchorTexts
from uhl_cli.api import UniversalAdapter
from uhl_cli.data import TaskData, load_task
from uhl_cli.errors import DataError, UsageError
from uhl_cli.host.checkpoint import Host
from uhl_cli.metrics import Score, score
from uhl_cli.pipeline.common import (
    Predictor,
    depth_quality,
    flop_report,
    load,
    references_of,
    refuse_overwriting,
)
from uhl_cli.pipeline.features import feature_bank, more_texts
from uhl_cli.pipeline.options import PretrainOptions
from uhl_cli.pipeline.prepare import Prepared, prepare
from uhl_cli.pipeline.pretrain_file import manifest_of, refuse_too_large
from uhl_cli.reports import PretrainReport, Reporter, phase, silent
from uhl_cli.schema import FeatureRecord, Manifest
from uhl_cli.train.checkpoint import run_digest
from uhl_cli.train.head import fit_head
from uhl_cli.train.loop import RunFiles, StepReport, total_steps, train
from uhl_cli.train.processes import accelerator_for


def run_pretrain(options: PretrainOptions, reporter: Reporter = silent) -> PretrainReport:
    """Load what the options name, train, and write the file.

    :raises UhlError: Any of its kinds; nothing half-written is left.
    """
    files = RunFiles(options.output.with_name(options.output.name + ".uhl-run"))
    refuse_overwriting(options.output, files, resume=options.resume, overwrite=options.overwrite)
    accelerator = accelerator_for(options.host.device, options.training.mixed_precision)
    chosen = str(accelerator.device) if options.host.device == "auto" else options.host.device
    host = load(options.host.model_copy(update={"device": chosen}))
    # A revision is that of the source alone.
    others = [
        load(options.host.model_copy(update={"device": chosen, "name": name, "revision": None}))
        for name in options.companions
    ]
    if options.data.task is None:
        raise UsageError("there is no task to train on.", "Name one with --task.")
    data = load_task(
        options.data.task,
        offline=options.host.offline,
        seed=options.training.seed,
        **options.data.model_dump(exclude={"task"}),
    )
    try:
        return pretrain(host, data, options, companions=others, accelerator=accelerator, files=files, reporter=reporter)
    finally:
        accelerator.end_training()  # leaves the process group, where there are several processes


def pretrain(
    host: Host,
    data: TaskData,
    options: PretrainOptions,
    *,
    companions: Sequence[Host] = (),
    accelerator: Accelerator,
    files: RunFiles | None = None,
    reporter: Reporter = silent,
) -> PretrainReport:
    """Train on loaded objects and write `options.output`.

    :param companions: The hosts that `options.companions` names, loaded.
    :raises BudgetError: Before training, when the file or the FLOPs cannot hold the limits.
    :raises TrainingError: When training diverges or the checkpoint does not fit.
    """
    started = time.monotonic()
    examples, training = data.train, options.training
    if examples is None or len(examples) == 0:
        raise DataError("there is no training example.", "Check --data and --limit-train.")
    prepared = prepare(host, data, options, reporter, companions)
    config = options.adapter.model_copy(update={"num_labels": len(data.task.labels), "kind": data.task.kind})
    adapter = CanonicalAdapter(config, seed=training.seed).to(accelerator.device)
    steps = total_steps(len(examples), training)
    manifest = manifest_of(host, companions, data, options, adapter, prepared.bank, steps)
    size = refuse_too_large(to_file(adapter, prepared.bank, manifest), options.max_bytes)
    room = options.max_bytes - size
    texts = more_texts(data, options, prepared.bank.anchors, config, room=room)

    def on_step(report: StepReport) -> None:
        note = f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}  atoms/token {report.atoms:.2f}"
        reporter("training", report.step, report.steps, note)

    identity = {
        "training": training.model_dump(),
        "adapter": config.model_dump(),
        "hosts": [each.host.fingerprint.model_dump() for each in prepared.hosts],
        "data": manifest.training.train_digest,
        "anchors": prepared.bank.anchors.digest,
        "steps": steps,
        "processes": accelerator.num_processes,
    }
    reporter("training", 0, steps)
    train(
        adapter,
        prepared.hosts,
        examples,
        training,
        accelerator=accelerator,
        files=files,
        digest=run_digest(identity),
        resume=options.resume,
        save_every=options.save_every,
        on_step=on_step,
    )
    weight, bias = fit_head(
        host,
        prepared.own,
        examples,
        num_labels=config.num_labels,
        seed=training.seed,
        max_length=training.max_length,
        progress=phase(reporter, "head-only control"),
    )
    with torch.no_grad():
        adapter.get_parameter("head_weight").copy_(weight)
        adapter.get_parameter("head_bias").copy_(bias)
    return _finish(host, data, adapter, prepared, (texts, room), manifest, options, started, accelerator, reporter)


def _finish(
    host: Host,
    data: TaskData,
    adapter: CanonicalAdapter,
    prepared: Prepared,
    more_texts: tuple[AnchorTexts | None, int],
    manifest: Manifest,
    options: PretrainOptions,
    started: float,
    accelerator: Accelerator,
    reporter: Reporter,
) -> PretrainReport:
    """Score the integer codes that the file will hold, as a reader of it will, and write them.

    :param more_texts: Texts for a feature bank, if any, and the bytes that it may take.
    """
    texts, room = more_texts
    bare = to_file(adapter, prepared.bank, manifest)
    loaded = UniversalAdapter.from_file(bare)
    trained = loaded.inject(host, prepared.own, prepared.plan, prepared.host_flops)
    features = None if texts is None else feature_bank(loaded, trained, prepared.own, texts, reporter, room=room)
    if features is not None:
        record = FeatureRecord(
            texts=len(features.anchors.texts), words=features.anchors.num_words, digest=features.anchors.digest
        )
        anchors = manifest.anchors.model_copy(update={"features": record})
        manifest = manifest.model_copy(update={"anchors": anchors})
        loaded = UniversalAdapter.from_file(to_file(adapter, prepared.bank, manifest, features))
    own, plan, host_flops = loaded.align(host, max_flops=options.max_flops, progress=phase(reporter, "aligning"))
    ported = loaded.inject(host, own, plan, host_flops)
    scores: dict[str, Score] = {}
    atoms, truncated = None, 0
    if data.evaluation is not None and len(data.evaluation):
        predictor = Predictor(loaded, data.evaluation, batch_size=options.evaluation_batch_size, reporter=reporter)
        classes, atoms, truncated = predictor.carried(ported, "adapter")
        found = {
            "adapter": classes,
            "readout_only": predictor.readout_only(ported),
            "head_only": predictor.head_only(host, own),
        }
        references = references_of(data.evaluation)
        scores = {name: score(data.task.metric, rows, references, data.task.labels) for name, rows in found.items()}
    atoms = None if atoms is None else round(atoms, 6)
    update = {"score": scores.get("adapter"), "atoms_per_token": atoms}
    content = to_file(adapter, prepared.bank, manifest.model_copy(update=update), features)
    size = refuse_too_large(content, options.max_bytes)
    if accelerator.is_main_process:
        write_adapter(options.output, content)
    accelerator.wait_for_everyone()
    return PretrainReport(
        output=str(options.output),
        bytes=size,
        source=manifest.source,
        task=data.task.name,
        train_examples=manifest.training.train_examples,
        steps=manifest.training.steps,
        seconds=time.monotonic() - started,
        score=scores.get("adapter"),
        head_only=scores.get("head_only"),
        readout_only=scores.get("readout_only"),
        atoms_per_token=atoms,
        truncated=truncated,
        quality=depth_quality(own),
        anchor_words=prepared.bank.anchors.num_words,
        feature_words=0 if features is None else features.anchors.num_words,
        flops=flop_report(host, ported, prepared.host_flops),
    )
