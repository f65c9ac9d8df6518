"""`uhl pretrain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table, interval, is_main_process

if TYPE_CHECKING:
    from uhl_cli.commands.options import PretrainOptions
    from uhl_cli.reports import PretrainReport


def _record() -> type[PretrainOptions]:
    from uhl_cli.commands.options import PretrainOptions

    return PretrainOptions


@command(
    _record,
    example="uhl pretrain --host bert-base-uncased --task sst2 --output adapter.safetensors",
    panels={
        "Adapter": (
            "anchors",
            "num-anchors",
            "feature-words",
            "transfer-set",
            "teacher",
            "align",
            "licence",
            "max-bytes",
            "max-flops",
        ),
        "Training": ("resume", "save-every"),
    },
    interrupted="There is no checkpoint yet; run it again.",
)
def pretrain(options: PretrainOptions, output: Output) -> None:
    """Train a universal adapter on a frozen host and write one file under 1 MB."""
    from uhl_cli.commands.pretrain import run_pretrain

    with output.progress() as reporter:
        report = run_pretrain(options, reporter)
    if is_main_process():
        output.warn_truncated(report.truncated)
        output.result(report, quiet=[(report.output,)], table=_table)


def _table(output: Output, report: PretrainReport) -> None:
    """Print what `pretrain` did."""
    table = Table(f"{report.output}: {report.task} on {report.source.name}", left=["what"], right=["value"])
    metric = report.score.metric if report.score else "score"
    examples = f"{report.score.examples} examples" if report.score else "no evaluation data"
    table.row(f"{metric} on the source ({examples})", interval(report.score))
    table.row("  readout only, updates off", interval(report.readout_only))
    table.row("  linear head on the frozen host", interval(report.head_only))
    if report.teacher is not None:
        table.row(f"  the teacher: {report.teacher}", interval(report.teacher_score))
    table.row("bytes", f"{report.bytes:,}")
    table.row(f"FLOP overhead at {report.flops.sequence_length} tokens", f"{report.flops.percent:.2f} %")
    table.row("active atoms per token", "-" if report.atoms_per_token is None else f"{report.atoms_per_token:.2f}")
    table.row("anchor words", f"{report.anchor_words:,}, and {report.feature_words:,} with features")
    transfer = f"{report.transfer_texts:,} texts, {report.transfer_examples:,} examples with their spans"
    table.row("transfer set", transfer if report.transfer_texts else "none")
    table.row("training examples, steps", f"{report.train_examples:,}, {report.steps:,}")
    table.row("seconds", f"{report.seconds:.0f}")
    output.table(table)
    if report.user_texts:
        output.line(
            f"{report.user_texts:,} of your texts are in the file: check their licence before you share it. "
            "To keep them out, use --anchors general."
        )
