"""`uhl pretrain`: train an adapter file on a frozen host and a task."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.align.bank import AnchorBank, build_bank
from uhl_cli.align.features import FeatureBank
from uhl_cli.align.states import word_states
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.packing import pack_levels
from uhl_cli.commands.feature_bank import feature_bank
from uhl_cli.commands.options import PretrainOptions
from uhl_cli.commands.outputs import claimed_run
from uhl_cli.commands.own_teacher import soft_targets, teacher_task
from uhl_cli.commands.scoring import (
    Predictor,
    depth_quality,
    flop_report,
    host_record,
    load,
    references_of,
    versions,
)
from uhl_cli.commands.teachers import TeacherMaker, held_for_teachers
from uhl_cli.commands.texts import anchor_texts, more_texts, ships_with_uhl
from uhl_cli.commands.transfer_set import transfer_room, wanted_texts
from uhl_cli.cost.flops import count_flops
from uhl_cli.cost.plan import plan_for
from uhl_cli.data import Examples, TaskData, load_task
from uhl_cli.errors import BudgetError, DataError
from uhl_cli.formats.adapter import FORMAT_VERSION, AdapterFile, to_bytes, write_adapter
from uhl_cli.formats.checkpoint import run_digest
from uhl_cli.formats.convert import to_file
from uhl_cli.formats.transfer import StoredTransfer
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.running import bare
from uhl_cli.metrics import Score, score
from uhl_cli.ported.aligned import AlignedHost, align_host
from uhl_cli.reports import PretrainReport, Reporter, phase, silent
from uhl_cli.schema import AnchorRecord, FeatureRecord, Manifest, Parts, TrainingRecord
from uhl_cli.train.classifier import Classifier, load_classifier
from uhl_cli.train.head import fit_head
from uhl_cli.train.loop import StepReport, accelerator_for, total_steps, train
from uhl_cli.train.run_files import RunFiles


def run_pretrain(options: PretrainOptions, reporter: Reporter = silent) -> PretrainReport:
    """Load what the options name, train, and write the file.

    :raises UhlError: Any of its kinds; nothing half-written is left.
    """
    with claimed_run(options.output, resume=options.resume, overwrite=options.overwrite) as files:
        return _run(options, files, reporter)


def _run(options: PretrainOptions, files: RunFiles, reporter: Reporter) -> PretrainReport:
    accelerator = accelerator_for(options.host.device, options.training.mixed_precision)
    chosen = str(accelerator.device) if options.host.device == "auto" else options.host.device
    teacher: Classifier | None = None
    if options.classifier is not None:
        how = options.host.model_dump(include={"dtype", "offline", "trust_remote_code", "tokenizer"})
        teacher = load_classifier(options.classifier, device=chosen, **how)
    options = options.with_defaults(None if teacher is None else teacher.base_name)
    if teacher is not None:
        teacher, data = teacher_task(teacher, options)
    host = load(options.host.model_copy(update={"device": chosen}))
    if teacher is None:
        data = load_task(
            str(options.data.task),
            offline=options.host.offline,
            seed=options.training.seed,
            **options.data.model_dump(exclude={"task"}),
        )
    try:
        return pretrain(host, data, options, teacher=teacher, accelerator=accelerator, files=files, reporter=reporter)
    finally:
        accelerator.end_training()  # leaves the process group, where there are several processes


def pretrain(
    host: Host,
    data: TaskData,
    options: PretrainOptions,
    *,
    teacher: Classifier | None = None,
    accelerator: Accelerator,
    files: RunFiles | None = None,
    reporter: Reporter = silent,
) -> PretrainReport:
    """Train on loaded objects and write `options.output`.

    :param teacher: Gives the classes of the training examples in place of their labels; see `own_teacher.teacher_task`.
    :raises BudgetError: Before training, when the file or the FLOPs exceed their limits.
    :raises TrainingError: When training diverges or the checkpoint does not fit.
    """
    started = time.monotonic()
    if data.train is None or len(data.train) == 0:
        raise DataError("there is no training example.", "Check --data and --limit-train.")
    told, targets = data.train, None
    if teacher is not None:
        batch_size = options.evaluation_batch_size
        told, targets = soft_targets(teacher, data.train, batch_size=batch_size, progress=phase(reporter, "teacher"))
        data = replace(data, train=told)
    examples, judges = held_for_teachers(told, options)
    training = options.training
    prepared = prepare(host, data, options, reporter)
    config = options.adapter.model_copy(update={"num_labels": len(data.task.labels), "kind": data.task.kind})
    adapter = CanonicalAdapter(config, seed=training.seed).to(accelerator.device)
    steps = total_steps(len(examples), training)
    manifest = manifest_of(host, data, options, adapter, prepared.bank, examples, steps)
    file_bytes = refuse_too_large(to_file(adapter, prepared.bank, manifest), options.max_bytes)
    room = options.max_bytes - file_bytes
    shared = transfer_room(room, options)
    wanted = wanted_texts(data, options, config, room=shared)
    if wanted is None:
        shared = 0
    texts = more_texts(data, options, prepared.bank.anchors, config, room=room - shared)

    def on_step(report: StepReport) -> None:
        note = f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}  atoms/token {report.atoms:.2f}"
        reporter("training", report.step, report.steps, note)

    identity = options.deciding() | {
        "config": config.model_dump(mode="json"),
        "host": host.fingerprint.model_dump(mode="json"),
        "train_digest": manifest.training.train_digest,
        "anchor_digest": prepared.bank.anchors.digest,
        "steps": steps,
        "processes": accelerator.num_processes,
    }
    reporter("training", 0, steps)
    train(
        adapter,
        prepared.aligned,
        examples,
        training,
        accelerator=accelerator,
        targets=targets,
        files=files,
        digest=run_digest(identity),
        resume=options.resume,
        save_every=options.save_every,
        on_step=on_step,
    )
    weight, bias = fit_head(
        host,
        prepared.aligned.alignment,
        examples,
        num_labels=config.num_labels,
        seed=training.seed,
        max_length=training.max_length,
        progress=phase(reporter, "head-only control"),
    )
    with torch.no_grad():
        adapter.get_parameter("head_weight").copy_(weight)
        adapter.get_parameter("head_bias").copy_(bias)
    made = Made(adapter, prepared.bank)
    features = None
    if texts is not None:
        loaded = UniversalAdapter.from_file(made.file(manifest))
        own = prepared.aligned.alignment
        features = feature_bank(loaded, loaded.port(prepared.aligned), own, texts, reporter, room=room - shared)
    if features is not None:
        record = FeatureRecord(
            texts=len(features.anchors.texts),
            words=features.anchors.num_words,
            digest=features.anchors.digest,
            word_rule=features.anchors.word_rule,
        )
        manifest = manifest.model_copy(update={"parts": Parts(features=record)})
        made = replace(made, features=features)
    loaded = UniversalAdapter.from_file(made.file(manifest))
    aligned = loaded.align(host, max_flops=options.max_flops, progress=phase(reporter, "aligning"))
    teachers: dict[str, Score] = {}
    if wanted is not None:
        ported, digest = loaded.port(aligned), run_digest(identity)
        maker = TeacherMaker(ported, teacher, examples, judges, data, options, accelerator, files, digest, reporter)
        speaker, teachers = maker.teacher()
        left = options.max_bytes - len(to_bytes(made.file(manifest)))
        transfer = maker.transfer_set(wanted, speaker, room=left)
        manifest = manifest.model_copy(
            update={"parts": manifest.parts.model_copy(update={"transfer": transfer.record})}
        )
        made = replace(made, transfer=transfer)
    report = _finish(made, manifest, aligned, data, options, accelerator, reporter)
    return report.model_copy(update={"teachers": teachers, "seconds": time.monotonic() - started})


@dataclass(frozen=True)
class Made:
    """Everything that the file will hold, except the manifest."""

    adapter: CanonicalAdapter
    bank: AnchorBank
    features: FeatureBank | None = None
    transfer: StoredTransfer | None = None

    def file(self, manifest: Manifest) -> AdapterFile:
        """The file's content."""
        return to_file(self.adapter, self.bank, manifest, self.features, self.transfer)

    def user_texts(self, options: PretrainOptions) -> int:
        """The number of different texts in the file that are not this package's own."""
        texts: set[str] = set()
        if options.anchors != "general":
            texts |= {*self.bank.anchors.texts, *(self.features.anchors.texts if self.features is not None else ())}
        if self.transfer is not None and self.transfer.record.general is None:
            held = self.transfer.whole().texts
            texts |= {*held.texts, *(held.pairs or ())}
        return 0 if ships_with_uhl(options) else len(texts)


def _finish(
    made: Made,
    manifest: Manifest,
    aligned: AlignedHost,
    data: TaskData,
    options: PretrainOptions,
    accelerator: Accelerator,
    reporter: Reporter,
) -> PretrainReport:
    """Score the quantised codes, exactly as a reader of the file gets them, and write the file."""
    loaded, host = UniversalAdapter.from_file(made.file(manifest)), aligned.host
    ported = loaded.port(aligned)
    scores: dict[str, Score] = {}
    atoms, truncated = None, 0
    if data.evaluation is not None and len(data.evaluation):
        predictor = Predictor(loaded, data.evaluation, batch_size=options.evaluation_batch_size, reporter=reporter)
        classes, atoms, truncated = predictor.predicted(ported, "adapter")
        found = {
            "adapter": classes,
            "readout_only": predictor.readout_only(ported),
            "head_only": predictor.head_only(host, aligned.alignment),
        }
        references = references_of(data.evaluation)
        scores = {name: score(data.task.metric, rows, references, data.task.labels) for name, rows in found.items()}
    atoms = None if atoms is None else round(atoms, 6)
    update = {"score": scores.get("adapter"), "atoms_per_token": atoms}
    content = made.file(manifest.model_copy(update=update))
    file_bytes = refuse_too_large(content, options.max_bytes)
    if accelerator.is_main_process:
        write_adapter(options.output, content)
    accelerator.wait_for_everyone()
    record = manifest.parts.transfer
    return PretrainReport(
        output=str(options.output),
        bytes=file_bytes,
        source=manifest.source,
        task=data.task.name,
        train_examples=manifest.training.train_examples,
        steps=manifest.training.steps,
        seconds=0.0,
        score=scores.get("adapter"),
        head_only=scores.get("head_only"),
        readout_only=scores.get("readout_only"),
        teacher=None if record is None else record.teacher,
        teacher_score=None if record is None else record.teacher_score,
        teachers={},
        atoms_per_token=atoms,
        truncated=truncated,
        quality=depth_quality(aligned.alignment),
        anchor_words=made.bank.anchors.num_words,
        feature_words=0 if made.features is None else made.features.anchors.num_words,
        transfer_texts=0 if record is None else record.texts,
        transfer_examples=0 if record is None else record.examples,
        user_texts=made.user_texts(options),
        flops=flop_report(ported, aligned.host_flops),
    )


@dataclass(frozen=True)
class Prepared:
    """What training needs: the bank, and the source aligned to it."""

    bank: AnchorBank
    aligned: AlignedHost


def prepare(host: Host, data: TaskData, options: PretrainOptions, reporter: Reporter) -> Prepared:
    """Choose anchors, define canonical space by the host, and align the host to it.

    :raises BudgetError: When the FLOP limit leaves nothing.
    :raises AlignmentError: When there are too few anchors or the host's states are degenerate.
    """
    config = options.adapter
    host_flops = count_flops(host, None)
    plan = plan_for(host, config, host_flops, options.max_flops)
    anchors = anchor_texts(data, options)
    with bare(host.map.base):
        states = word_states(host, anchors, progress=phase(reporter, "anchors"))
    if not bool(states.present.all()):  # texts longer than the host's limit
        anchors, states = anchors.keep(states.present.tolist()), states.present_only()
    reporter("aligning", 0, 1)
    bank = build_bank(anchors, states, knots=config.knots, canonical_size=config.canonical_size)
    own = align_host(host, bank, config.strategy, plan=plan, states=states)
    bank = bank.spread(options.num_anchors)
    reporter("aligning", 1, 1)
    return Prepared(bank, AlignedHost(host, bank.digest, own, plan, host_flops))


def manifest_of(
    host: Host,
    data: TaskData,
    options: PretrainOptions,
    adapter: CanonicalAdapter,
    bank: AnchorBank,
    examples: Examples,
    steps: int,
) -> Manifest:
    """The manifest with all that is known before training, so without the score."""
    return Manifest(
        format_version=FORMAT_VERSION,
        config=adapter.config,
        task=data.task,
        label_counts=examples.label_counts(len(data.task.labels)),
        source=host_record(host),
        training=TrainingRecord(
            command=options.command(),
            config=options.training,
            steps=steps,
            train_examples=len(examples),
            train_digest=examples.digest(),
            data=data.source[:1000],
        ),
        anchors=AnchorRecord(
            origin=bank.anchors.origin,
            texts=len(bank.anchors.texts),
            words=bank.anchors.num_words,
            digest=bank.anchors.digest,
            word_rule=bank.anchors.word_rule,
        ),
        versions=versions(),
        licence=options.licence,
    )


def refuse_too_large(content: AdapterFile, max_bytes: int) -> int:
    """The file's size in bytes.

    :raises BudgetError: When it exceeds the limit; the hint gives a number of anchors that would fit.
    """
    file_bytes = len(to_bytes(content))
    if file_bytes > max_bytes:
        per_anchor = len(pack_levels(content.coordinates.codes)) / content.manifest.anchors.words
        # Other anchors come with other texts of unknown size; 3 % fewer anchors leave room for them.
        fitting = math.floor(0.97 * (content.manifest.anchors.words - (file_bytes - max_bytes) / per_anchor))
        hint = f"Use --num-anchors {fitting}." if fitting >= 32 else "Raise --max-bytes."
        raise BudgetError(f"the adapter file would hold {file_bytes:,} bytes; the limit is {max_bytes:,}.", hint)
    return file_bytes
