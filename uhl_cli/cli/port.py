"""`uhl port`."""

from __future__ import annotations

import shlex
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table, interval

if TYPE_CHECKING:
    from uhl_cli.commands.options import HostOptions, PortOptions
    from uhl_cli.reports import PortReport, Verdict

ROWS = {
    "ported": "ported (zero-shot)",
    "readout_only": "readout only, updates off",
    "full_updates": "updates at full strength (not chosen)",
    "majority_class": "control: majority class",
    "random_update": "control: random updates, same norm",
    "head_only": "control: head only",
    "size": "control: --align size",
}
# Depths in a row of the table, which then fits 80 columns.
A_ROW = 10
# What each verdict says, and what to run next with the file and the target.
VERDICTS: dict[Verdict, tuple[str, str]] = {
    "good": ("good enough", "label texts by uhl predict {}"),
    "tune": ("tune it first", "run uhl tune {} --parameters lora"),
    "unusable": ("unusable as it is", "run uhl tune {} --parameters lora, or choose another target"),
    "pretrain": ("its teacher is too weak", "make another file with uhl pretrain, by more steps or more examples"),
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
    """Port an adapter file to another model, and say whether it is good enough there, without labels or gradients.

    The last line compares the port with the file's teacher on held-out texts of the file.  With data (--data, or the
    file's own task) it is scored as well.
    """
    from uhl_cli.commands.port import run_port

    with output.progress() as reporter:
        _, report = run_port(options, reporter)
    output.warn_truncated(report.truncated)
    ported = report.scores.get("ported")
    output.result(
        report,
        quiet=[("not-scored" if ported is None else f"{ported.value:.6f}",)],
        table=partial(_table, target=options.target, controls=options.controls),
    )


def _table(output: Output, report: PortReport, *, target: HostOptions, controls: bool) -> None:
    """Print what `port` did; `target` is as the user gave it, `controls` whether all were scored."""
    shape = report.target.fingerprint
    output.line(
        f"{report.adapter} from {report.source} to {report.target.name} "
        f"({shape.model_type}, {shape.num_hidden_layers} x {shape.hidden_size}), --align {report.strategy}"
    )
    output.degree(report.degree, target.name)
    if report.quality:
        output.table(_depths(report))
    if report.feature_quality is not None:
        output.line(f"R^2 of the readout's features by the feature bank: {report.feature_quality:.2f} (at most 0.88)")
    if report.calibration is not None:
        found = report.calibration
        offsets = ", ".join(f"{value:+.2f}" for value in found.offsets[:9])
        output.line(
            f"chosen on {found.texts} texts of the transfer set: strength of the updates {found.strength:g}, "
            f"offsets of the classes {offsets}"
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
    output.line(_verdict(report, target))


def _depths(report: PortReport) -> Table:
    """R^2 of every depth, `A_ROW` in a row."""
    values = [entry.r2 for entry in report.quality]
    lowest = min(report.quality, key=lambda entry: entry.r2)
    knots = ", ".join(f"{value:.2f}" for value in report.readout_quality)
    table = Table(
        f"alignment: R^2 on held-out anchor texts, median {median(values):.2f}, lowest {lowest.r2:.2f} "
        f"at depth {lowest.depth}",
        left=["depths"],
        right=[f"+{place}" for place in range(min(A_ROW, len(values)))],
        note=f"readout's features at the knots: {knots}" if knots else "",
        form="compact",
    )
    for start in range(0, len(values), A_ROW):
        row = values[start : start + A_ROW]
        table.row(f"{start} to {start + len(row) - 1}", *(f"{value:.2f}" for value in row))
    return table


def _which(target: HostOptions) -> list[str]:
    """The options that make the target of the next command the same model, where they are not at their default."""
    words = [] if target.revision is None else ["--revision", target.revision]
    words += [] if target.dtype == type(target).model_fields["dtype"].default else ["--dtype", target.dtype]
    words += ["--trust-remote-code"] if target.trust_remote_code else []
    return words + ([] if target.tokenizer is None else ["--tokenizer", target.tokenizer])


def _verdict(report: PortReport, target: HostOptions) -> str:
    """One sentence: whether the port is good enough, why, and what to run next."""
    found = report.agreement
    if found is None:
        then = "" if report.scores else "; to score it on yours, add --data FILE"
        return f"not judged without labels, because {report.not_judged}{then}"
    named = shlex.join([report.adapter, "--target", target.name, *_which(target)])
    score, value = found.score, interval(found.score)
    facts = f"it agrees with the teacher on {value} of the answers to {found.texts} held-out texts"
    if score.metric != "accuracy":
        facts = f"it agrees with the teacher by an {score.metric} of {value} on {found.texts} held-out texts"
    if found.expected is not None:
        expected = found.expected
        # What was measured on labels stands in the table, and counts for more.
        said_of = "from which alone one would expect" if "ported" in report.scores else "so expect"
        facts += (
            f", {said_of} an accuracy of {expected.value:.2f} [{expected.low:.2f}, {expected.high:.2f}]; the teacher "
            f"has {expected.teacher:.2f}, a constant answer {expected.constant:.2f}"
        )
    said, then = VERDICTS[found.verdict]
    return f"{said}: {facts}; {then.format(named)}"
