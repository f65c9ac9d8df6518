"""`uhl budget`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table, interval
from uhl_cli.errors import BudgetError

if TYPE_CHECKING:
    from uhl_cli.budget.report import BudgetOptions, BudgetReport, FlopCount, TargetBudget
    from uhl_cli.commands.options import HostOptions
    from uhl_cli.schema import TransferRecord


def _record() -> type[BudgetOptions]:
    from uhl_cli.budget.report import BudgetOptions

    return BudgetOptions


@command(
    _record,
    example="uhl budget adapter.safetensors --target bert-large-uncased --json",
    panels={"Limits": ("max-bytes", "max-flops", "max-atoms"), "Data": ("seed",)},
    interrupted="Nothing was written.",
)
def budget(options: BudgetOptions, output: Output) -> None:
    """Measure what a file costs: bytes, and on a target FLOPs, memory and active atoms. Exit code 3 beyond a limit.

    With --quiet, print one line for scripts: bytes, FLOP percent and active atoms, tab separated, with a dash for what
    was not measured.
    """
    from uhl_cli.budget.run import run_budget

    with output.progress() as reporter:
        report = run_budget(options, reporter)
    target, named = report.target, options.target or options.target_config
    if target is not None and target.sequence_length < options.sequence_length:
        said = f"the target takes at most {target.sequence_length} tokens; counted at that length."
        output.note(said, "warning: ")
    percent = "-" if target is None else f"{target.flops.percent:.4f}"
    atoms = "-" if target is None or target.atoms is None else f"{target.atoms.per_token:.4f}"
    output.result(report, quiet=[(report.file.bytes, percent, atoms)], table=partial(_table, named=named))
    if report.beyond:
        raise BudgetError(
            f"{options.adapter} is beyond its budget: {'; '.join(report.beyond)}.",
            "Raise the limit, or choose another target.",
        )


def _table(output: Output, report: BudgetReport, *, named: HostOptions | None) -> None:
    """Print the file's parts and, where there is a target, what the adapter costs there; `named` is what was asked."""
    output.line(report.adapter)
    table = Table(left=["part"], right=["bytes", "share", "parameters"])
    for part in report.file.parts:
        share = f"{100 * part.bytes / report.file.bytes:.1f} %"
        table.row(part.part, f"{part.bytes:,}", share, f"{part.parameters:,}" if part.parameters else "-")
    table.section()
    table.row("the file", f"{report.file.bytes:,}", "100.0 %", f"{report.file.parameters:,}")
    if report.task_file is not None:
        for part in report.task_file.parts:
            parameters = f"{part.parameters:,}" if part.parameters else "-"
            table.row(f"apart: {part.part}", f"{part.bytes:,}", "", parameters)
        table.row("task file, apart", f"{report.task_file.bytes:,}", "", f"{report.task_file.parameters:,}")
    output.table(table)
    if report.transfer is not None:
        output.line(_transfer(report.transfer))
    if report.target is not None:
        _target(output, report.target, report.target.name if named is None else named.name)
    limits = [] if report.limits.bytes is None else [f"{report.limits.bytes:,} bytes"]
    if report.limits.flops_percent is not None:
        limits.append(f"{report.limits.flops_percent:g} % FLOPs")
    if report.limits.atoms_per_token is not None:
        limits.append(f"{report.limits.atoms_per_token:g} atoms per token")
    if limits:
        output.line(f"{'BEYOND' if report.beyond else 'within'} the limits: {', '.join(limits)}")


def _transfer(record: TransferRecord) -> str:
    whose = "uhl's own texts, not in the file" if record.general is not None else record.origin
    score = "" if record.teacher_score is None else f", {interval(record.teacher_score)}"
    return (
        f"transfer set: {record.texts:,} texts ({whose}; {record.user_texts:,} of the user's in the file), "
        f"{record.examples:,} examples with their spans, {record.predictions:,} predictions of {record.teacher}{score}"
    )


def _target(output: Output, target: TargetBudget, name: str) -> None:
    shape = f"{target.model_type}, {target.num_hidden_layers} x {target.hidden_size}"
    weights = "" if target.weights_loaded else "; configuration alone, no weights"
    tokens = f"{target.batch_size} x {target.sequence_length} tokens"
    output.line(f"on {target.name} ({shape}{weights}): {tokens}, {target.dtype}")
    output.degree(target.degree, name)
    table = Table(left=["one pass"], right=["host", "adapter adds", "overhead"])
    flops = target.flops
    if flops.fvcore is not None:
        table.row("FLOPs by fvcore", *_counted(flops.fvcore))
    table.row("FLOPs by torch", *_counted(flops.torch))
    if flops.fvcore is not None:
        difference = (flops.host_difference_percent, flops.adapter_difference_percent)
        table.row("  fvcore minus torch", *(f"{value:+.3f} %" for value in difference))
    memory = target.memory
    table.row("bytes of weights", *_overhead(memory.host_weights, memory.adapter_weights))
    table.row("peak bytes besides", *_overhead(memory.host_peak, memory.adapter_peak))
    if target.time is not None:
        time = target.time
        table.row(
            f"ms, median of {time.repetitions}",
            f"{1000 * time.host_seconds:.2f}",
            f"{1000 * (time.attached_seconds - time.host_seconds):+.2f}",
            f"x {time.ratio:.3f} [{time.ratio_low:.3f}, {time.ratio_high:.3f}]",
        )
    output.table(table)
    output.line(f"counted: {flops.convention}")
    if flops.fvcore is None:
        output.line("fvcore cannot trace this target, so torch's counter alone decides")
    if target.flops.lora:
        share = 100 * target.flops.lora / target.flops.torch.host
        output.line(
            f"of these, the low-rank update takes {target.flops.lora:,} FLOPs ({share:.2f} %) by torch, unmerged; "
            "merged into the host's weights it takes none"
        )
    if target.atoms is not None:
        atoms = target.atoms
        output.line(f"active atoms per token: {atoms.per_token:.2f} on {atoms.texts:,} texts, {atoms.data}")
    if target.strength is not None:
        output.line(f"the transfer set sets the updates to strength {target.strength:g} here")
    if target.left_out:
        left_out = ", ".join(target.left_out)
        output.line(f"left out to hold the FLOP limit: {left_out} (whole: {target.whole_percent:.2f} %)")
    if target.refused is not None:
        output.line(f"`uhl port` refuses this target ({target.refused}); counted with nothing left out")


def _counted(count: FlopCount) -> tuple[str, str, str]:
    return f"{count.host:,}", f"{count.adapter:,}", f"{count.percent:.2f} %"


def _overhead(host: int, adapter: int) -> tuple[str, str, str]:
    return f"{host:,}", f"{adapter:,}", f"{100 * adapter / host:.2f} %"
