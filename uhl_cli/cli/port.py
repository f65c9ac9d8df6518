"""`uhl port`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table, interval

if TYPE_CHECKING:
    from uhl_cli.commands.options import PortOptions
    from uhl_cli.reports import PortReport

ROWS = {
    "ported": "ported (zero-shot)",
    "readout_only": "readout only, updates off",
    "full_updates": "updates at full strength (not chosen)",
    "majority_class": "control: majority class",
    "random_update": "control: random updates, same norm",
    "head_only": "control: head only",
    "size": "control: --align size",
}


def _record() -> type[PortOptions]:
    from uhl_cli.commands.options import PortOptions

    return PortOptions


@command(
    _record,
    example="uhl port adapter.safetensors --target distilbert-base-uncased --controls",
    panels={"Data": ("score", "controls")},
    interrupted="Nothing was written.",
)
def port(options: PortOptions, output: Output) -> None:
    """Port an adapter file to another model and score it there, without labels or gradients."""
    from uhl_cli.commands.port import run_port

    with output.progress() as reporter:
        _, report = run_port(options, reporter)
    output.warn_truncated(report.truncated)
    ported = report.scores.get("ported")
    output.result(
        report,
        quiet=[("not-scored" if ported is None else f"{ported.value:.6f}",)],
        table=partial(_table, target=options.target.name, controls=options.controls),
    )


def _table(output: Output, report: PortReport, *, target: str, controls: bool) -> None:
    """Print what `port` did; `target` is the name that the user gave, `controls` whether all were scored."""
    shape = report.target.fingerprint
    output.line(
        f"{report.adapter} from {report.source} to {report.target.name} "
        f"({shape.model_type}, {shape.num_hidden_layers} x {shape.hidden_size}), --align {report.strategy}"
    )
    output.degree(report.degree, target)
    if report.quality:
        knots = ", ".join(f"{value:.2f}" for value in report.readout_quality)
        table = Table(
            "alignment: R^2 on held-out anchor texts",
            left=["depth"],
            right=[f"{entry.depth}" for entry in report.quality],
            note=f"readout's features at the knots: {knots}" if knots else "",
        )
        table.row("R^2", *(f"{entry.r2:.2f}" for entry in report.quality))
        output.table(table)
    if report.feature_quality is not None:
        output.line(f"R2 of the readout's features by the feature bank: {report.feature_quality:.2f} (at most 0.88)")
    if report.calibration is not None:
        found = report.calibration
        offsets = ", ".join(f"{value:+.2f}" for value in found.offsets[:9])
        output.line(
            f"set by {found.texts} texts of the transfer set: updates at strength {found.strength:g}, "
            f"class offsets {offsets}"
        )
    if report.scores:
        metric = report.scores["ported"]
        table = Table(
            f"{metric.metric} on {metric.examples} examples, 95 % intervals",
            left=["on the target, no label and no gradient" if report.parameters is None else "on the target"],
            right=["score", "ported minus this"],
        )
        rows = ROWS
        if report.parameters is not None:
            what = {"lora": "a LoRA", "low-rank": "a low-rank update"}.get(report.parameters, "gains of atoms")
            rows = ROWS | {"ported": f"ported, {what} tuned by {report.supervision}"}
        for name, label in rows.items():
            if name in report.scores:
                table.row(label, interval(report.scores[name]), interval(report.gains.get(name)))
        table.row("for comparison: the source itself", interval(report.source_score))
        output.table(table)
        if not controls and report.parameters != "lora":
            output.line("--controls scores the readout alone, random updates and others, each by another pass")
    else:
        output.line(report.data or "not scored")
    cached = " (cached)" if report.alignment_cached else ""
    times = {name: f"{value:.1f}{cached if name == 'align' else ''}" for name, value in report.seconds.items()}
    seconds = ", ".join(f"{name} {value}" for name, value in times.items())
    atoms = "" if report.atoms_per_token is None else f"   active atoms per token: {report.atoms_per_token:.2f}"
    output.line(f"bytes: {report.bytes:,}   FLOP overhead: {report.flops.percent:.2f} %{atoms}")
    output.line(f"seconds: {seconds}")
    if report.left_out:
        output.line(f"left out to hold the FLOP limit: {', '.join(report.left_out)}")
    if report.output:
        output.line(f"kept in {report.output}")
