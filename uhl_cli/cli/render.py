"""Reports as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from uhl_cli.metrics import Difference, Score
from uhl_cli.reports import DepthQuality, FlopReport, PortReport, PretrainReport, SearchReport, TuneReport

ROWS = {
    "ported": "ported (zero-shot)",
    "readout_only": "readout only, updates off",
    "untouched": "control: untouched target (majority class)",
    "random_update": "control: random updates, same norm",
    "head_only": "control: head only",
    "size": "control: --align size",
}


def interval(score: Score | Difference | None) -> str:
    """A value with its 95 % interval."""
    return "-" if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def render_pretrain(report: PretrainReport) -> None:
    """Print what `pretrain` did."""
    console = Console()
    table = Table(title=f"{report.output}: {report.task} on {report.source.name}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    metric = report.score.metric if report.score else "score"
    examples = f"{report.score.examples} examples" if report.score else "no evaluation data"
    table.add_row(f"{metric} on the source ({examples})", interval(report.score))
    table.add_row("  readout only, updates off", interval(report.readout_only))
    table.add_row("  linear head on the frozen host", interval(report.head_only))
    table.add_row("bytes", f"{report.bytes:,}")
    table.add_row(f"FLOP overhead at {report.flops.sequence_length} tokens", percent(report.flops))
    table.add_row("active atoms per token", "-" if report.atoms_per_token is None else f"{report.atoms_per_token:.2f}")
    table.add_row("anchor words", f"{report.anchor_words:,}, and {report.feature_words:,} with features")
    table.add_row("training examples, steps", f"{report.train_examples:,}, {report.steps:,}")
    table.add_row("seconds", f"{report.seconds:.0f}")
    console.print(table)


def render_port(report: PortReport) -> None:
    """Print what `port` did."""
    console = Console()
    target = report.target.fingerprint
    console.print(
        f"{report.adapter} from {report.source} to {report.target.name} "
        f"({target.model_type}, {target.num_hidden_layers} x {target.hidden_size}), --align {report.strategy}",
        highlight=False,
        soft_wrap=True,
    )
    if report.quality:
        console.print(_quality_table(report.quality, report.readout_quality))
    if report.feature_quality is not None:
        console.print(f"R2 of the readout's features by the feature bank: {report.feature_quality:.2f} (at most 0.88)")
    if report.scores:
        metric = report.scores["ported"]
        table = Table(title=f"{metric.metric} on {metric.examples} examples, 95 % intervals", title_justify="left")
        table.add_column("on the target, no label and no gradient")
        table.add_column("score", justify="right")
        table.add_column("ported minus this", justify="right")
        for name, label in ROWS.items():
            if name in report.scores:
                table.add_row(label, interval(report.scores[name]), interval(report.gains.get(name)))
        table.add_row("for comparison: the source itself", interval(report.source_score), "")
        console.print(table)
    else:
        console.print(report.data or "not scored", highlight=False, soft_wrap=True)
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    atoms = "" if report.atoms_per_token is None else f"   active atoms per token: {report.atoms_per_token:.2f}"
    console.print(
        f"bytes: {report.bytes:,}   FLOP overhead: {percent(report.flops)}{atoms}", highlight=False, soft_wrap=True
    )
    console.print(f"seconds: {seconds}", highlight=False, soft_wrap=True)
    if report.left_out:
        console.print(f"left out to hold the FLOP limit: {', '.join(report.left_out)}", highlight=False, soft_wrap=True)
    if report.output:
        console.print(f"kept in {report.output}", highlight=False, soft_wrap=True)


def render_tune(report: TuneReport) -> None:
    """Print what `tune` did."""
    console = Console()
    target = report.target.fingerprint
    shape = f"{target.model_type}, {target.num_hidden_layers} x {target.hidden_size}"
    table = Table(
        title=f"{report.output}: {report.task} on {report.target.name} ({shape})", title_justify="left", min_width=60
    )
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("tuned minus this", justify="right")
    rows = {"zero_shot": "before, zero-shot", "untouched": "untouched target (majority class)", "tuned": "tuned"}
    for name, label in rows.items():
        if name in report.scores:
            score = report.scores[name]
            what = f"{label}: {score.metric}, {score.examples} examples"
            table.add_row(what, interval(score), interval(report.gains.get(name)) if name != "tuned" else "")
    table.add_row("bytes of delta-theta", f"{report.delta_bytes:,}", "")
    if not report.own_task:
        table.add_row("bytes of the new readout", f"{report.readout_bytes:,}", "")
    table.add_row("bytes of the task file", f"{report.bytes:,}", "")
    table.add_row("active atoms per token", "-" if report.atoms_per_token is None else f"{report.atoms_per_token:.2f}")
    table.add_row(f"FLOP overhead at {report.flops.sequence_length} tokens", percent(report.flops))
    table.add_row("training examples, steps", f"{report.train_examples:,}, {report.steps:,}")
    table.add_row("seconds", f"{report.seconds:.0f}")
    console.print(table)
    if report.left_out:
        console.print(f"left out to hold the FLOP limit: {', '.join(report.left_out)}", highlight=False, soft_wrap=True)
    if report.search is not None:
        console.print(_search_table(report.search))


def _search_table(search: SearchReport) -> Table:
    """All trials, the chosen one marked."""
    table = Table(title=f"search: scores on {search.held_out:,} held-out training examples", title_justify="left")
    names = ["learning_rate", "readout_learning_rate", "active_weight", "delta_weight", "top_k", "score"]
    names = [name for name in names if getattr(search.trials[0], name) is not None]
    for name in ["trial", *names]:
        table.add_column(name.replace("_", " "), justify="right")
    for trial in search.trials:
        values = [f"{getattr(trial, name):.3g}" for name in names[:-1]]
        mark = "* " if trial.number == search.best else ""
        table.add_row(f"{mark}{trial.number + 1}", *values, f"{trial.score:.3f}")
    return table


def percent(flops: FlopReport) -> str:
    """FLOP overhead for people."""
    return f"{flops.percent:.2f} %"


def _quality_table(quality: tuple[DepthQuality, ...], readout: tuple[float, ...]) -> Table:
    table = Table(title="alignment: R^2 on held-out anchor texts", title_justify="left")
    table.add_column("depth")
    for entry in quality:
        table.add_column(f"{entry.depth}", justify="right")
    table.add_row("R^2", *(f"{entry.r2:.2f}" for entry in quality))
    if readout:
        table.caption = "readout's features at the knots: " + ", ".join(f"{value:.2f}" for value in readout)
    return table
