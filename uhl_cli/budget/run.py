"""`uhl budget`: what an adapter file costs, in bytes and, on a target, in FLOPs, memory, atoms and time.

Without a target neither torch nor transformers is imported.
"""

from __future__ import annotations

from uhl_cli.budget.report import (
    MAX_ATOMS,
    MAX_BYTES,
    MAX_FLOPS,
    BudgetOptions,
    BudgetReport,
    Limits,
    TargetBudget,
)
from uhl_cli.budget.sizes import FileSizes, file_sizes, ported_sizes
from uhl_cli.codes.layout import parameter_shapes
from uhl_cli.errors import FormatError, UsageError
from uhl_cli.formats.adapter import AdapterFile, read_adapter
from uhl_cli.formats.folder import is_ported, ported_path, read_ported, read_tuned
from uhl_cli.formats.task import TaskFile, read_task, task_parameter_shapes
from uhl_cli.reports import Reporter, silent
from uhl_cli.schema import TransferRecord


def run_budget(options: BudgetOptions, reporter: Reporter = silent) -> BudgetReport:
    """Measure a file or a ported adapter's folder, and on a target if one is named; `beyond` has the limits exceeded.

    :raises UsageError: When options contradict each other, or there is nothing to compare a limit with.
    :raises UhlError: Any other of its kinds.
    """
    _refuse_contradictions(options)
    if is_ported(options.adapter):
        return _of_folder(options, reporter)
    content = read_adapter(options.adapter)
    sizes = file_sizes(options.adapter, parameter_shapes(content.manifest.config))
    task, task_sizes = _task(options, content.digest)
    _refuse_unknowable(options, (content.manifest.config if task is None else task.record.config).top_k)
    target = _target(options, content, task, reporter)
    transfer = content.manifest.parts.transfer
    return _report(options, sizes, target, max_bytes=options.max_bytes or MAX_BYTES, task=task_sizes, transfer=transfer)


def _of_folder(options: BudgetOptions, reporter: Reporter) -> BudgetReport:
    """The same of a ported adapter's folder, which is already aligned and holds no texts to measure atoms on."""
    idle = {"task_file": "holds what was tuned", "strategy": "is aligned already"}
    options.refuse_given({name: f"{options.adapter} {why}" for name, why in idle.items()})
    file = read_ported(ported_path(options.adapter))
    sizes, target = ported_sizes(file.contents), None
    if not options.data_asked and options.max_atoms is not None and options.max_atoms < file.record.structure.top_k:
        raise UsageError(
            "--max-atoms cannot be checked: a folder holds no texts to count active atoms on.",
            "Name data with --data.",
        )
    if (named := options.target or options.target_config) is not None:
        from uhl_cli.budget.target import folder_budget

        target = folder_budget(file.record.task, options, named, reporter)
    return _report(options, sizes, target, max_bytes=options.max_bytes)


def _report(
    options: BudgetOptions,
    sizes: FileSizes,
    target: TargetBudget | None,
    *,
    max_bytes: int | None,
    task: FileSizes | None = None,
    transfer: TransferRecord | None = None,
) -> BudgetReport:
    limits = Limits(
        bytes=max_bytes,
        flops_percent=None if target is None else options.max_flops or MAX_FLOPS,
        atoms_per_token=_atoms_limit(options, target),
    )
    return BudgetReport(
        adapter=str(options.adapter),
        file=sizes,
        task_file=task,
        transfer=transfer,
        target=target,
        limits=limits,
        beyond=tuple(_beyond(sizes, target, limits)),
    )


def _refuse_contradictions(options: BudgetOptions) -> None:
    if options.target is not None and options.target_config is not None:
        raise UsageError("--target and --target-config name two targets.", "Give one of them.")
    if options.target is None and options.target_config is None and options.max_flops is not None:
        raise UsageError(
            "--max-flops cannot be checked without a target.", "Name a host with --target or --target-config."
        )
    if options.target is not None:
        return
    needing_weights = {"--time": options.time, "--data and --task": options.data_asked}
    for option, asked in needing_weights.items():
        if asked:
            raise UsageError(f"{option} cannot be measured without a host's weights.", "Name a host with --target.")


def _refuse_unknowable(options: BudgetOptions, top_k: int) -> None:
    """Refuse a limit of atoms that cannot be checked: without weights only the possible maximum is known."""
    if options.target is None and options.max_atoms is not None and options.max_atoms < top_k:
        raise UsageError(
            "--max-atoms cannot be checked without weights: the file allows more active atoms per token.",
            "Name a host with --target.",
        )


def _task(options: BudgetOptions, digest: str) -> tuple[TaskFile | None, FileSizes | None]:
    """The task file (None for a LoRA folder), and the sizes of what `options.task_file` names."""
    if options.task_file is None:
        return None, None
    if is_ported(options.task_file):
        folder, _ = read_tuned(ported_path(options.task_file), digest)
        return None, ported_sizes(folder.contents)
    task = read_task(options.task_file)
    if task.record.adapter != digest:
        raise FormatError(
            f"{options.task_file} was tuned on another adapter file.", "Give the adapter that it was made from."
        )
    return task, file_sizes(options.task_file, task_parameter_shapes(task.record))


def _target(
    options: BudgetOptions, content: AdapterFile, task: TaskFile | None, reporter: Reporter
) -> TargetBudget | None:
    target = options.target or options.target_config
    if target is None:
        return None
    # Imported late: both need torch.
    from uhl_cli.api import UniversalAdapter
    from uhl_cli.budget.target import target_budget

    adapter = UniversalAdapter.from_file(content)
    if task is not None:
        adapter = adapter.with_task(task)
    return target_budget(adapter, options, target, reporter)


def _atoms_limit(options: BudgetOptions, target: TargetBudget | None) -> float | None:
    if target is None or target.atoms is None:
        return options.max_atoms
    return MAX_ATOMS if options.max_atoms is None else options.max_atoms


def _beyond(sizes: FileSizes, target: TargetBudget | None, limits: Limits) -> list[str]:
    found = []
    if limits.bytes is not None and sizes.bytes > limits.bytes:
        found.append(f"{sizes.bytes:,} bytes, the limit is {limits.bytes:,}")
    if target is None:
        return found
    if target.refused is not None:
        found.append(target.refused)
    elif limits.flops_percent is not None and target.flops.percent > limits.flops_percent:
        found.append(f"{target.flops.percent:.2f} % FLOPs, the limit is {limits.flops_percent:g} %")
    atoms, limit = target.atoms, limits.atoms_per_token
    if atoms is not None and limit is not None and atoms.per_token > limit:
        found.append(f"{atoms.per_token:.2f} active atoms per token, the limit is {limit:g}")
    return found
