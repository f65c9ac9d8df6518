"""The report of `inspect` for people: an adapter, a task file, a verdict or a comparison."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uhl_cli.cli.inspect_tables import (
    atoms_table,
    heat_map,
    parts_table,
    plain,
    readout_table,
    task_files_table,
)
from uhl_cli.cli.render import interval
from uhl_cli.cli.render_comparison import render_comparison
from uhl_cli.inspect.report import AdapterContent, AnchorText, InspectReport, TaskContent
from uhl_cli.metrics import Score
from uhl_cli.schema import HostRecord, TrainingRecord


def render_inspect(report: InspectReport) -> None:
    """Print what `inspect` found: a description, a verdict or a comparison."""
    console = Console(highlight=False, soft_wrap=True)
    if report.verification is not None:
        console.print(
            plain(f"{report.file}: every invariant of format {report.format_version} holds ({report.bytes:,} bytes)")
        )
    elif report.comparison is not None:
        render_comparison(console, report, report.comparison)
    elif report.adapter is not None:
        _render_adapter(console, report, report.adapter)
    elif report.task is not None:
        _render_task(console, report, report.task)
    if report.plot is not None:
        console.print(plain(f"drawn in {report.plot}"))


def _render_adapter(console: Console, report: InspectReport, content: AdapterContent) -> None:
    manifest = content.manifest
    table = _facts(f"{report.file}: adapter, format {report.format_version}, {report.bytes:,} bytes")
    _add_facts(
        table,
        {
            "task": f"{manifest.task.name} ({manifest.task.kind})",
            "source host": _host(manifest.source),
            "score on the source": _scored(manifest.score),
            "active atoms per token": "-" if manifest.atoms_per_token is None else f"{manifest.atoms_per_token:.2f}",
            "alignment": f"--align {manifest.config.strategy}",
            **_training(manifest.training, manifest.versions),
            "licence": manifest.licence,
            "SHA-256": content.digest,
        },
    )
    console.print(table)
    console.print(parts_table(content.parts, report.bytes))
    console.print(atoms_table(content.atoms))
    console.print(heat_map(content.mixing))
    anchors = content.anchors
    table = _facts("anchors")
    _add_facts(
        table,
        {
            "origin": anchors.origin,
            "texts": f"{anchors.texts:,}",
            "words": f"{anchors.words:,} ({anchors.words_per_text:.1f} a text)",
            "feature bank": f"{anchors.feature_words:,} words in {anchors.feature_texts:,} other texts",
            "depth knots": ", ".join(f"{knot:g}" for knot in anchors.knots),
            "SHA-256": anchors.digest,
        },
    )
    console.print(table)
    console.print(readout_table(content.readout))
    if content.task_files:
        console.print(task_files_table(content.task_files))
    else:
        console.print("no tuned task file beside it belongs to it")
    if content.unreadable:
        console.print(plain(f"beside it, no task files in spite of their names: {', '.join(content.unreadable)}"))
    if anchors.entries is not None:
        console.print("anchor texts and those of the feature bank, [words that the file knows] in brackets:")
        for entry in anchors.entries:
            console.print(_marked(entry))


def _render_task(console: Console, report: InspectReport, content: TaskContent) -> None:
    record = content.record
    table = _facts(f"{report.file}: task file, format {report.format_version}, {report.bytes:,} bytes")
    beside = f"{content.adapter}, beside it" if content.adapter else "not beside it"
    _add_facts(
        table,
        {
            "task": f"{record.task.name} ({record.task.kind})",
            "target host": _host(record.target),
            "before tuning": _scored(record.before),
            "tuned": _scored(record.score),
            "readout": "the adapter's own" if record.own_task else "its own, in this file",
            **_training(record.training, record.versions),
            "adapter": beside,
            "adapter's SHA-256": record.adapter,
            "SHA-256": content.digest,
        },
    )
    console.print(table)
    console.print(parts_table(content.parts, report.bytes))
    table = Table(title="delta-theta: what it adds to the mixing weights, over atoms", title_justify="left")
    table.add_column("type")
    for name in ("smallest", "largest", "root mean square"):
        table.add_column(name, justify="right")
    for name, row, square in zip(content.types, content.delta_theta, content.root_mean_square, strict=True):
        table.add_row(name, f"{min(row):+.4f}", f"{max(row):+.4f}", f"{square:.4f}")
    console.print(table)
    if content.readout is not None:
        console.print(readout_table(content.readout))


def _facts(title: str) -> Table:
    table = Table(title=plain(title), title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    return table


def _add_facts(table: Table, facts: dict[str, str]) -> None:
    for name, value in facts.items():
        table.add_row(name, plain(value))


def _host(host: HostRecord) -> str:
    fingerprint = host.fingerprint
    revision = f" at {host.revision}" if host.revision else ""
    return (
        f"{host.name}{revision} ({fingerprint.architecture}, {fingerprint.num_hidden_layers} x "
        f"{fingerprint.hidden_size}, {fingerprint.parameters:,} parameters)"
    )


def _scored(score: Score | None) -> str:
    return "-" if score is None else f"{interval(score)} {score.metric}, {score.examples:,} examples"


def _training(training: TrainingRecord, versions: dict[str, str]) -> dict[str, str]:
    return {
        "command": training.command,
        "data": f"{training.data} ({training.train_examples:,} training examples)",
        "steps, seed": f"{training.steps:,}, {training.config.seed}",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    }


def _marked(entry: AnchorText) -> Text:
    """The text with every anchor word in brackets and bold."""
    marked, done = Text(), 0
    for start, end in entry.spans:
        marked.append_text(plain(entry.text[done:start]))
        marked.append_text(plain(f"[{entry.text[start:end]}]", style="bold green"))
        done = end
    return marked.append_text(plain(entry.text[done:]))
