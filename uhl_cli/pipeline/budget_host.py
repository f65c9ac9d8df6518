"""`budget` on a loaded host: the adapter is ported as `port` does it, then counted and measured."""

from __future__ import annotations

from uhl_cli.adapter.flops import count_flops
from uhl_cli.adapter.flops_pass import PassShape
from uhl_cli.adapter.plan import PortPlan, full_plan
from uhl_cli.adapter.ported import PortedModel
from uhl_cli.align.alignment import Alignment
from uhl_cli.align.texts import word_spans
from uhl_cli.api import UniversalAdapter, align
from uhl_cli.data import TASKS, Examples, load_task
from uhl_cli.errors import BudgetError, DataError
from uhl_cli.host.checkpoint import Host
from uhl_cli.pipeline.budget_measure import (
    measure_flops,
    measure_memory,
    measure_time,
    plan_tokens,
    whole_percent,
)
from uhl_cli.pipeline.budget_report import MAX_FLOPS, AtomsBudget, BudgetOptions, TargetBudget
from uhl_cli.pipeline.common import host_record, load
from uhl_cli.pipeline.options import HostOptions
from uhl_cli.reports import Reporter, phase, silent

# Texts a batch when active atoms are measured; the figure does not depend on it.
_TEXTS_PER_BATCH = 32


def host_budget(options: BudgetOptions, target: HostOptions, reporter: Reporter = silent) -> TargetBudget:
    """Load file and host, port, and measure what the options ask for.

    :raises HostError: When the host cannot be loaded.
    :raises AlignmentError: When it cannot be aligned.
    :raises DataError: When the data that was asked for cannot be had.
    """
    adapter = UniversalAdapter.load(options.adapter)
    if options.task_file is not None:
        adapter = adapter.with_task(options.task_file)
    examples, source = _examples(adapter, options, offline=target.offline)
    host = load(target)
    return measure_host(adapter, host, options, examples=examples, source=source, reporter=reporter)


def measure_host(
    adapter: UniversalAdapter,
    host: Host,
    options: BudgetOptions,
    *,
    examples: Examples,
    source: str,
    reporter: Reporter = silent,
) -> TargetBudget:
    """The same for a loaded adapter, a loaded host and the examples that active atoms are measured on.

    :param source: What the examples are, for the report.
    """
    alignment, plan, host_flops, refused = _align(adapter, host, options, reporter)
    ported = adapter.inject(host, alignment, plan, host_flops)
    shape = PassShape(options.batch_size, min(options.sequence_length, host.max_length))
    flops = measure_flops(host.map, ported.folded, shape, phase(reporter, "counting"))
    memory = measure_memory(host.map, ported.folded, shape)
    atoms = _atoms(adapter, ported, examples, source, reporter)
    seconds = None
    if options.time:
        seconds = measure_time(
            host.map,
            ported.folded,
            shape,
            repetitions=options.repetitions,
            progress=phase(reporter, "timing"),
        )
    record = host_record(host)
    tokens = plan_tokens(host.max_length)
    return TargetBudget(
        name=record.name,
        model_type=record.fingerprint.model_type,
        hidden_size=host.hidden_size,
        num_hidden_layers=host.num_hidden_layers,
        parameters=sum(parameter.numel() for parameter in host.model.parameters()),
        weights_loaded=True,
        dtype=str(host.map.embeddings.weight.dtype).removeprefix("torch."),
        device=str(host.device),
        sequence_length=shape.tokens,
        batch_size=shape.batch_size,
        flops=flops,
        memory=memory,
        atoms=atoms,
        time=seconds,
        left_out=plan.left_out,
        whole_percent=whole_percent(host.map, adapter.manifest.config, host_flops / tokens),
        refused=refused,
    )


def _align(
    adapter: UniversalAdapter, host: Host, options: BudgetOptions, reporter: Reporter
) -> tuple[Alignment, PortPlan, int, str | None]:
    """What `port` would align by; where it would refuse, everything, and why it would."""
    progress = phase(reporter, "aligning")
    try:
        alignment, plan, host_flops = adapter.align(
            host, strategy=options.strategy, max_flops=options.max_flops or MAX_FLOPS, progress=progress
        )
    except BudgetError as error:
        plan = full_plan(host.map)
        strategy = options.strategy or adapter.manifest.config.strategy
        alignment = align(host, adapter.bank, strategy, plan=plan, progress=progress)
        return alignment, plan, count_flops(host, None), error.message.rstrip(".")
    return alignment, plan, host_flops, None


def _atoms(
    adapter: UniversalAdapter, ported: PortedModel, examples: Examples, source: str, reporter: Reporter
) -> AtomsBudget:
    predictions = ported.predict(
        examples,
        batch_size=_TEXTS_PER_BATCH,
        max_length=min(adapter.manifest.training.config.max_length, ported.host.max_length),
        progress=phase(reporter, "active atoms"),
    )
    return AtomsBudget(per_token=predictions.atoms_per_token, data=source, texts=len(examples))


def _examples(adapter: UniversalAdapter, options: BudgetOptions, *, offline: bool) -> tuple[Examples, str]:
    """The data that was asked for, else the anchor texts; with what they are, for the report."""
    task = adapter.manifest.task
    if not options.data_asked:
        return anchor_examples(adapter), "the adapter's anchor texts"
    flags = options.data.model_dump(exclude={"task"})
    name = options.data.task or task.name
    if name == task.name and name not in TASKS:
        # The columns that the adapter was trained on are the best guess for more data of a user's own task.
        for column in ("text_column", "pair_column", "label_column", "tokens_column"):
            flags[column] = flags[column] or getattr(task, column)
    data = load_task(name, labels=task.labels, offline=offline, seed=options.seed, need_train=False, **flags)
    hint = "Give data of the adapter's own task with --data, or leave it out."
    if data.task.kind != task.kind:
        raise DataError(f"the data is of a {data.task.kind} task, the adapter of a {task.kind} task.", hint)
    if data.evaluation is None or len(data.evaluation) == 0:
        raise DataError("the data has no evaluation example.", hint)
    return data.evaluation, data.source


def anchor_examples(adapter: UniversalAdapter) -> Examples:
    """The file's anchor texts as examples of its task; their labels are made up and looked at by nothing."""
    texts = adapter.bank.anchors.texts
    if adapter.manifest.config.kind == "sequence":
        return Examples(texts, labels=(0,) * len(texts))
    spans = tuple(tuple(word_spans(text)) for text in texts)
    return Examples(texts, words=spans, tags=tuple((0,) * len(row) for row in spans))
