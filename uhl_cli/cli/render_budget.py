"""The report of `budget` as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from uhl_cli.budget.report import BudgetReport, FlopCount, TargetBudget


def render_budget(report: BudgetReport) -> None:
    """Print the file's parts and, where there is a target, what the adapter costs there."""
    console = Console()
    _line(console, report.adapter)
    table = Table()
    for name in ("part", "bytes", "share", "parameters"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in report.file.parts:
        share = f"{100 * part.bytes / report.file.bytes:.1f} %"
        table.add_row(part.part, f"{part.bytes:,}", share, f"{part.parameters:,}" if part.parameters else "-")
    table.add_section()
    table.add_row("the file", f"{report.file.bytes:,}", "100.0 %", f"{report.file.parameters:,}")
    if report.task_file is not None:
        table.add_row("task file, apart", f"{report.task_file.bytes:,}", "", f"{report.task_file.parameters:,}")
    console.print(table)
    if report.target is not None:
        _render_target(console, report.target)
    limits = [f"{report.limits.bytes:,} bytes"]
    if report.limits.flops_percent is not None:
        limits.append(f"{report.limits.flops_percent:g} % FLOPs")
    if report.limits.atoms_per_token is not None:
        limits.append(f"{report.limits.atoms_per_token:g} atoms per token")
    verdict = "within" if not report.beyond else "BEYOND"
    _line(console, f"{verdict} the limits: {', '.join(limits)}")


def _render_target(console: Console, target: TargetBudget) -> None:
    shape = f"{target.model_type}, {target.num_hidden_layers} x {target.hidden_size}"
    weights = "" if target.weights_loaded else "; configuration alone, no weights"
    tokens = f"{target.batch_size} x {target.sequence_length} tokens"
    _line(console, f"on {target.name} ({shape}{weights}): {tokens}, {target.dtype}")
    table = Table()
    table.add_column("one pass")
    for name in ("host", "adapter adds", "overhead"):
        table.add_column(name, justify="right")
    table.add_row("FLOPs by fvcore", *_counted(target.flops.fvcore))
    table.add_row("FLOPs by torch", *_counted(target.flops.torch))
    difference = (target.flops.host_difference_percent, target.flops.adapter_difference_percent)
    table.add_row("  fvcore minus torch", *(f"{value:+.3f} %" for value in difference), "")
    memory = target.memory
    table.add_row("bytes of weights", *_overhead(memory.host_weights, memory.adapter_weights))
    table.add_row("peak bytes besides", *_overhead(memory.host_peak, memory.adapter_peak))
    if target.time is not None:
        time = target.time
        added = time.attached_seconds - time.host_seconds
        table.add_row(
            f"ms, median of {time.repetitions}",
            f"{1000 * time.host_seconds:.2f}",
            f"{1000 * added:+.2f}",
            f"x {time.ratio:.3f} [{time.ratio_low:.3f}, {time.ratio_high:.3f}]",
        )
    console.print(table)
    lines = [f"counted: {target.flops.convention}"]
    if target.atoms is not None:
        lines.append(
            f"active atoms per token: {target.atoms.per_token:.2f} on {target.atoms.texts:,} texts, {target.atoms.data}"
        )
    if target.left_out:
        lines.append(
            f"left out to hold the FLOP limit: {', '.join(target.left_out)} (whole: {target.whole_percent:.2f} %)"
        )
    if target.refused is not None:
        lines.append(f"`uhl port` refuses this target ({target.refused}); counted with nothing left out")
    for line in lines:
        _line(console, line)


def _line(console: Console, text: str) -> None:
    """One line as it stands: names are others', so that nothing in them is taken for markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _counted(count: FlopCount) -> tuple[str, str, str]:
    return f"{count.host:,}", f"{count.adapter:,}", f"{count.percent:.2f} %"


def _overhead(host: int, adapter: int) -> tuple[str, str, str]:
    return f"{host:,}", f"{adapter:,}", f"{100 * adapter / host:.2f} %"
