"""`uhl inspect`: describe an adapter, a task file or a folder, check it, or compare two of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Span, Table, interval
from uhl_cli.errors import FormatError

if TYPE_CHECKING:
    from uhl_cli.inspect.report import (
        AdapterContent,
        AnchorSummary,
        AnchorText,
        AtomStatistics,
        Comparison,
        InspectOptions,
        InspectReport,
        MixingWeights,
        Part,
        PortedContent,
        ReadoutSummary,
        RowStatistics,
        Similarity,
        TaskContent,
        TaskFileSummary,
        TransferSummary,
    )
    from uhl_cli.metrics import Score
    from uhl_cli.schema import HostRecord, TrainingRecord

_MAX_LABELS = 20
_MAX_UNUSED = 20
_MAX_VALUE = 60


def _record() -> type[InspectOptions]:
    from uhl_cli.inspect.report import InspectOptions

    return InspectOptions


@command(_record, example="uhl inspect adapter.safetensors --verify", panels={"Output": ("plot",), "Hub": ("offline",)})
def inspect(options: InspectOptions, output: Output) -> None:
    """Show what is in a file, check it, or compare it with another; needs no host, no data and no torch.

    With --quiet, print one line: bytes and format version, tab separated; with --diff, identical or different.
    """
    from uhl_cli.inspect.run import run_inspect

    report = run_inspect(options)
    problems = report.verification.problems if report.verification is not None else ()
    quiet: list[tuple[object, ...]] = [(report.bytes, report.format_version)]
    if report.comparison is not None:
        quiet = [("identical" if report.comparison.identical else "different",)]
    elif problems:
        quiet = [(problem,) for problem in problems]
    output.result(report, quiet=quiet, table=_table)
    if problems:
        count = f"{len(problems)} {'way' if len(problems) == 1 else 'ways'}"
        raise FormatError(f"{options.file} breaks the format in {count}.", "Get the file again from its source.")


def _table(output: Output, report: InspectReport) -> None:
    """Print what `inspect` found: a description, a verdict or a comparison."""
    if report.verification is not None:
        holds = f"{report.file}: every invariant of format {report.format_version} holds ({report.bytes:,} bytes)"
        for line in report.verification.problems or (holds,):
            output.line(line)
    elif report.comparison is not None:
        _comparison(output, report, report.comparison)
    elif report.adapter is not None:
        _adapter(output, report, report.adapter)
    elif report.task is not None:
        _task(output, report, report.task)
    elif report.ported is not None:
        _ported(output, report, report.ported)
    if report.plot is not None:
        output.line(f"drawn in {report.plot}")


def _adapter(output: Output, report: InspectReport, content: AdapterContent) -> None:
    manifest = content.manifest
    atoms_per_token = "-" if manifest.atoms_per_token is None else f"{manifest.atoms_per_token:.2f}"
    _facts(
        output,
        f"{report.file}: adapter, format {report.format_version}, {report.bytes:,} bytes",
        {
            "task": f"{manifest.task.name} ({manifest.task.kind})",
            "source host": _host(manifest.source),
            "score on the source": _scored(manifest.score),
            "active atoms per token": atoms_per_token,
            "alignment": f"--align {manifest.config.strategy}",
            **_training(manifest.training, manifest.versions),
            "licence": manifest.licence,
            "SHA-256": content.digest,
        },
    )
    output.table(_parts(content.parts, report.bytes))
    output.table(_atoms(content.atoms))
    output.table(_heat_map(content.mixing))
    _anchors(output, content.anchors)
    if content.transfer is not None:
        _transfer(output, content.transfer, content.readout.labels)
    output.table(_readout(content.readout))
    if content.task_files:
        output.table(_task_files(content.task_files))
    else:
        output.line("no task file next to it belongs to it")
    if content.unreadable:
        output.line(f"next to it, named like task files but invalid: {', '.join(content.unreadable)}")
    if content.anchors.entries is not None:
        output.line("anchor texts and those of the feature bank, [words that the file knows] in brackets:")
        for entry in content.anchors.entries:
            output.line(_marked(entry))
    if content.transfer is not None and content.transfer.entries is not None:
        output.line("texts of the transfer set, after the teacher's most probable label:")
        for text in content.transfer.entries:
            pair = "" if text.pair is None else f" | {text.pair}"
            output.line([Span(f"{' '.join(text.labels)}: ", "bold green"), Span(f"{text.text}{pair}")])


def _task(output: Output, report: InspectReport, content: TaskContent) -> None:
    record = content.record
    _facts(
        output,
        f"{report.file}: task file, format {report.format_version}, {report.bytes:,} bytes",
        {
            "task": f"{record.task.name} ({record.task.kind})",
            "target host": _host(record.target),
            "before tuning": _scored(record.before),
            "tuned": _scored(record.score),
            "tuned by": record.supervision,
            "readout": "the adapter's own" if record.own_task else "its own, in this file",
            **_training(record.training, record.versions),
            "adapter": f"{content.adapter}, next to it" if content.adapter else "not next to it",
            "adapter's SHA-256": record.adapter,
            "SHA-256": content.digest,
        },
    )
    output.table(_parts(content.parts, report.bytes))
    title = "delta-theta: what it adds to the mixing weights, over atoms"
    if record.parameters == "low-rank":
        title = "delta-theta: numbers of a low-rank update of the host's linear modules"
    table = Table(
        title,
        left=["type"],
        right=["smallest", "largest", "root mean square"],
    )
    for name, row, square in zip(content.types, content.delta_theta, content.root_mean_square, strict=True):
        table.row(name, f"{min(row):+.4f}", f"{max(row):+.4f}", f"{square:.4f}")
    output.table(table)
    if content.readout is not None:
        output.table(_readout(content.readout))


def _ported(output: Output, report: InspectReport, content: PortedContent) -> None:
    record, tuned, lora = content.record, content.record.tuned, content.lora
    facts = {"task": f"{record.task.name} ({record.task.kind})", "target host": _host(record.target)}
    facts["alignment"] = f"--align {record.strategy}"
    if lora is not None:
        facts["LoRA"] = f"rank {lora.rank} on {lora.modules} modules, {lora.parameters:,} parameters"
    if tuned is not None:
        beside = f"{content.adapter}, next to the folder" if content.adapter else "not next to the folder"
        facts |= {"before tuning": _scored(tuned.before), "tuned": _scored(tuned.score), "tuned by": tuned.supervision}
        facts |= _training(tuned.training, tuned.versions)
        facts |= {"adapter": beside, "adapter's SHA-256": tuned.adapter}
    facts["SHA-256"] = content.digest
    what = "ported adapter" if tuned is None else "LoRA and readout, tuned,"
    _facts(output, f"{report.file}: {what} format {report.format_version}, {report.bytes:,} bytes", facts)
    output.table(_parts(content.parts, report.bytes, members=False))


def _facts(output: Output, title: str, facts: dict[str, str]) -> None:
    table = Table(title, left=["what", "value"], form="list")
    for name, value in facts.items():
        table.row(name, value)
    output.table(table)


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


def _parts(parts: Sequence[Part], total: int, *, members: bool = True) -> Table:
    """Parts grouped, with the sum of each group; fits eighty columns."""
    table = Table(
        "parts, scales included",
        left=["part", "dtype"],
        right=["bits", "shape", "scales", "bytes", "share"],
        form="compact",
    )
    for group in dict.fromkeys(part.group for part in parts):
        some = [part for part in parts if part.group == group]
        num_bytes = sum(part.bytes for part in some)
        table.row(group, "", "", "", "", f"{num_bytes:,}", _share(num_bytes / total), style="bold")
        for part in some if members and group != "header" else ():
            table.row(
                f"  {part.name}",
                part.dtype,
                "-" if part.bits is None else f"{part.bits:g}",
                " x ".join(str(size) for size in part.shape),
                f"{part.scales:,}" if part.scales else "-",
                f"{part.bytes:,}",
                _share(part.share),
            )
    table.section()
    summed = sum(part.bytes for part in parts)
    table.row("in all", "", "", "", "", f"{summed:,}", _share(summed / total), style="bold")
    return table


def _share(share: float) -> str:
    return f"{100 * share:.2f} %"


def _atoms(atoms: AtomStatistics) -> Table:
    """Norms and closest pairs of the dictionary; unused atoms are listed below."""
    unused = ", ".join(str(index) for index in atoms.unused[:_MAX_UNUSED])
    if len(atoms.unused) > _MAX_UNUSED:
        unused += ", ..."
    table = Table(
        f"atoms: {atoms.count:,}, of them unused (row of U zero): {len(atoms.unused):,}",
        left=["rows of"],
        right=["smallest norm", "median", "largest", "closest pair, cosine"],
        note=f"unused: {unused}" if unused else "",
    )
    for name, rows in (("U", atoms.u), ("V", atoms.v)):
        table.row(name, *_norms(rows), _pair(rows.closest))
    table.row("updates u v^T", "", "", "", _pair(atoms.update))
    return table


def _norms(rows: RowStatistics) -> tuple[str, str, str]:
    return f"{rows.minimum:.3g}", f"{rows.median:.3g}", f"{rows.maximum:.3g}"


def _pair(pair: Similarity | None) -> str:
    return "-" if pair is None else f"{pair.cosine:+.3f} (atoms {pair.first}, {pair.second})"


def _heat_map(mixing: MixingWeights) -> Table:
    """Mean mixing weights; every block shows its number, so that no colour is needed."""
    table = Table(
        "mixing weights g(t, type), mean over used atoms",
        left=[" depth t "],
        right=mixing.types,
        note="1 is an atom's own strength; red above, blue below. Deviation: over atoms, mean over depths.",
        form="blocks",
    )
    reach = max(abs(value - 1) for row in mixing.mean for value in row) or 1.0
    for depth, row in zip(mixing.depths, mixing.mean, strict=True):
        table.row(f" {depth:.1f} ", *([_block(value, (value - 1) / reach)] for value in row))
    table.section()
    columns = zip(*mixing.deviation, strict=True)
    table.row(" deviation ", *(f"{sum(column) / len(column):.3f}" for column in columns))
    return table


def _block(value: float, strength: float) -> Span:
    """A number on a colour from blue (-1) over white (0) to red (1)."""
    fade = round(255 * (1 - abs(strength)))
    red, green, blue = (255, fade, fade) if strength > 0 else (fade, fade, 255)
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"
    return Span(f" {value:.3f} ", f"{ink} on rgb({red},{green},{blue})")


def _anchors(output: Output, anchors: AnchorSummary) -> None:
    _facts(
        output,
        "anchors",
        {
            "origin": anchors.origin,
            "texts": f"{anchors.texts:,}",
            "words": f"{anchors.words:,} ({anchors.words_per_text:.1f} a text)",
            "feature bank": f"{anchors.feature_words:,} words in {anchors.feature_texts:,} other texts",
            "depth knots": ", ".join(f"{knot:g}" for knot in anchors.knots),
            "SHA-256": anchors.digest,
        },
    )


def _transfer(output: Output, transfer: TransferSummary, labels: Sequence[str]) -> None:
    record, general = transfer.record, transfer.record.general
    whose = f"uhl's own, version {general.version}, not in the file" if general is not None else "in the file"
    predicted = zip(labels[:_MAX_LABELS], transfer.label_counts, strict=False)
    _facts(
        output,
        "transfer set",
        {
            "origin": record.origin,
            "texts": f"{record.texts:,} {'pairs' if record.pairs else 'texts'}, {whose}",
            "texts of the user's in the file": f"{record.user_texts:,}",
            "examples": f"{record.examples:,} (at most {record.spans} spans of each text)",
            "predictions": f"{record.predictions:,}: " + ", ".join(f"{name} {count:,}" for name, count in predicted),
            "teacher": record.teacher,
            "score of the teacher": _scored(record.teacher_score),
            "SHA-256": record.digest,
        },
    )


def _marked(entry: AnchorText) -> list[Span]:
    """The text with every anchor word in brackets and bold."""
    marked, done = [], 0
    for start, end in entry.spans:
        marked += [Span(entry.text[done:start]), Span(f"[{entry.text[start:end]}]", "bold green")]
        done = end
    return [*marked, Span(entry.text[done:])]


def _readout(readout: ReadoutSummary) -> Table:
    """Sizes of the readout and its first labels."""
    table = Table(
        f"readout ({readout.kind}): {readout.inputs:,} -> {readout.hidden:,} -> {len(readout.labels):,}, "
        f"{readout.parameters:,} parameters in {readout.bytes:,} bytes",
        left=["label"],
        right=["training words" if readout.kind == "tokens" else "training examples"],
    )
    for label, count in list(zip(readout.labels, readout.label_counts, strict=True))[:_MAX_LABELS]:
        table.row(label, f"{count:,}")
    if len(readout.labels) > _MAX_LABELS:
        table.row(f"and {len(readout.labels) - _MAX_LABELS:,} more (--json)")
    return table


def _task_files(files: Iterable[TaskFileSummary]) -> Table:
    """Task files that belong to an adapter, with their scores before and after."""
    table = Table("task files next to it", left=["file", "task", "target"], right=["before", "tuned", "bytes"])
    for entry in files:
        task = entry.task if entry.own_task else f"{entry.task} (new readout)"
        scores = interval(entry.before), interval(entry.score)
        table.row(entry.file, task, entry.target.name, *scores, f"{entry.bytes:,}")
    return table


def _comparison(output: Output, report: InspectReport, comparison: Comparison) -> None:
    """Print what differs between two files, and what they share."""
    output.line(f"first:  {report.file} ({report.bytes:,} bytes)")
    output.line(f"second: {comparison.other} ({comparison.other_bytes:,} bytes)")
    if comparison.identical:
        output.line("the files are identical, byte for byte")
        return
    if comparison.fields:
        table = Table(f"header fields that differ: {len(comparison.fields)}", left=["field", "first", "second"])
        for each in comparison.fields:
            table.row(each.name, _short(each.first), _short(each.second))
        output.table(table)
    else:
        output.line("no header field differs")
    if comparison.parts:
        table = Table(
            f"parts that differ: {len(comparison.parts)}; equal: {comparison.same_parts}",
            left=["part"],
            right=["first", "second", "relative"],
            note="relative: Euclidean norm of the difference over the larger of both norms (at most 2)",
        )
        for part in comparison.parts:
            relative = "-" if part.relative is None else f"{part.relative:.4f}"
            table.row(part.name, _shape(part.first), _shape(part.second), relative)
        output.table(table)
    else:
        output.line(f"all {comparison.same_parts} parts hold the same values")
    if comparison.anchors is not None:
        anchors = comparison.anchors
        relative = "not comparable" if anchors.relative is None else f"{anchors.relative:.4f} apart (relative)"
        output.line(
            f"anchors in common: {anchors.common_texts:,} texts (of {anchors.first_texts:,} and "
            f"{anchors.second_texts:,}), {anchors.common_words:,} words (of {anchors.first_words:,} and "
            f"{anchors.second_words:,}); their coordinates: {relative}"
        )
    if comparison.transfer is not None:
        texts = comparison.transfer
        common = (
            "unknown, this uhl lacks their texts" if texts.common_texts is None else f"{texts.common_texts:,} texts"
        )
        output.line(f"transfer sets in common: {common} (of {texts.first_texts:,} and {texts.second_texts:,})")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(str(size) for size in shape)


def _short(value: str | None) -> str:
    if value is None:
        return "missing"
    return value if len(value) <= _MAX_VALUE else f"{value[: _MAX_VALUE - 3]}..."
