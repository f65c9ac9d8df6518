"""The report of `inspect` as one page of figures, drawn with matplotlib (the extra `figures`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uhl_cli.errors import OutputError
from uhl_cli.files import atomic_path
from uhl_cli.inspect.report import (
    AdapterContent,
    AnchorSummary,
    AtomStatistics,
    InspectReport,
    Part,
    PortedContent,
    ReadoutSummary,
    TaskContent,
)
from uhl_cli.metrics import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that people with a colour deficiency tell apart (Okabe and Ito).
GROUP_COLOURS = {
    "header": "#999999",
    "updates": "#0072b2",
    "size": "#56b4e9",
    "readout": "#009e73",
    "head-only control": "#e69f00",
    "anchors": "#cc79a7",
    "features": "#d55e00",
    "transfer": "#8b4513",
    "LoRA": "#000000",
    "other": "#f0e442",
}
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "uhl", "font.size": 9, "axes.titlesize": 10}
# No time stamps: the same report gives the same file.
_METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_NAME_LENGTH = 28
MOST_LABELS = 12


def draw(report: InspectReport, path: Path) -> None:
    """Draw the report of an adapter, a task file or a folder as .png (130 dots an inch), .svg or .pdf.

    :param report: A report that holds `adapter`, `task` or `ported`.
    :raises OutputError: When matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("--plot needs matplotlib.", 'Run `pip install "uhl[figures]"`.') from error
    ending = path.suffix.lower()
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(17, 8.4) if report.adapter is not None else (12, 7.2), layout="constrained")
        if report.adapter is not None:
            _draw_adapter(figure, report, report.adapter)
        elif report.task is not None:
            _draw_task(figure, report, report.task)
        elif report.ported is not None:
            _draw_ported(figure, report, report.ported)
        try:
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=ending[1:], dpi=130, metadata=_METADATA[ending])
        except OutputError as error:
            raise OutputError(error.message, "Choose another --plot, or free some space.") from error


def _draw_adapter(figure: Figure, report: InspectReport, content: AdapterContent) -> None:
    manifest = content.manifest
    axes = figure.subplots(2, 3, width_ratios=(1, 1.1, 0.8))
    _title(figure, f"{Path(report.file).name}: {manifest.task.name} on {manifest.source.name}, {report.bytes:,} bytes")
    _draw_parts(axes[0, 0], content.parts)
    _draw_norms(axes[0, 1], content.atoms)
    mixing = content.mixing
    image = _heat_map(axes[1, 0], np.array(mixing.mean), centre=1.0, unit="mean over used atoms (no unit)")
    _label_ticks(axes[1, 0], mixing.types, [f"{depth:.1f}" for depth in mixing.depths])
    for (row, column), value in np.ndenumerate(np.array(mixing.mean)):
        axes[1, 0].text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=_ink(image.to_rgba(value))
        )
    axes[1, 0].set(title="mixing weights g(t, type)", xlabel="module type", ylabel="normalised depth t")
    rows: list[tuple[str, Score | None, Score | None]] = [(f"{manifest.source.name}\n(source)", None, manifest.score)]
    rows += [(f"{file.target.name}\n{file.task}", file.before, file.score) for file in content.task_files]
    _draw_scores(axes[1, 1], rows)
    _draw_anchors(axes[0, 2], content.anchors)
    _draw_readout(axes[1, 2], content.readout)


def _draw_anchors(axis: Axes, anchors: AnchorSummary) -> None:
    """How many texts have how many anchor words."""
    counts = anchors.texts_by_words
    bars = axis.bar([str(words) for words in counts], list(counts.values()), color=GROUP_COLOURS["anchors"])
    if len(counts) <= 8:
        axis.bar_label(bars, [f"{count:,}" for count in counts.values()], fontsize=7)
    else:
        axis.set_xticks(axis.get_xticks()[:: len(counts) // 8])
    title = f"{anchors.words:,} anchor words in {anchors.texts:,} texts: {anchors.origin}"
    if anchors.feature_words:
        title += f"\n(and features of {anchors.feature_words:,} words in {anchors.feature_texts:,} others)"
    axis.set_title(_words(title), parse_math=False)
    knots = ", ".join(f"{knot:g}" for knot in anchors.knots)
    axis.set(xlabel=f"anchor words in a text (coordinates at t = {knots})", ylabel="texts")


def _draw_readout(axis: Axes, readout: ReadoutSummary) -> None:
    """Training examples by label, the first `MOST_LABELS` of them."""
    shown = list(zip(readout.labels, readout.label_counts, strict=True))[:MOST_LABELS]
    places = range(len(shown))
    bars = axis.barh(places, [count for _, count in shown], color=GROUP_COLOURS["readout"])
    axis.bar_label(bars, [f"{count:,}" for _, count in shown], fontsize=7, padding=2)
    axis.set_yticks(places, [_words(label) for label, _ in shown], fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    left_out = len(readout.labels) - len(shown)
    unit = "words" if readout.kind == "tokens" else "examples"
    axis.set(
        title=f"readout: {readout.inputs:,} features to {readout.hidden:,} to {len(readout.labels):,} labels",
        xlabel=f"training {unit} by label" + (f" ({left_out:,} more labels)" if left_out else ""),
    )


def _draw_task(figure: Figure, report: InspectReport, content: TaskContent) -> None:
    record = content.record
    grid = figure.add_gridspec(2, 2)
    _title(figure, f"{Path(report.file).name}: {record.task.name} on {record.target.name}, {report.bytes:,} bytes")
    top = figure.add_subplot(grid[0, :])
    _heat_map(top, np.array(content.delta_theta), centre=0.0, unit="added weight (no unit)")
    top.set_yticks(range(len(content.types)), content.types)
    top.set(title="delta-theta, added to the mixing weights", xlabel="atom", ylabel="module type")
    _draw_parts(figure.add_subplot(grid[1, 0]), content.parts)
    row = (f"{record.target.name}\n{record.task.name}", record.before, record.score)
    _draw_scores(figure.add_subplot(grid[1, 1]), [row])


def _draw_ported(figure: Figure, report: InspectReport, content: PortedContent) -> None:
    """Bytes by group (a host has many modules), and the scores of the tuning, if there was one."""
    record, tuned = content.record, content.record.tuned
    axes = figure.subplots(1, 2)
    _title(figure, f"{Path(report.file).name}: {record.task.name} on {record.target.name}, {report.bytes:,} bytes")
    groups = dict.fromkeys(part.group for part in content.parts)
    some = {group: [part for part in content.parts if part.group == group] for group in groups}
    merged = [
        parts[0].model_copy(update={"name": group, "bytes": sum(part.bytes for part in parts)})
        for group, parts in some.items()
    ]
    _draw_parts(axes[0], merged)
    scores = (None, None) if tuned is None else (tuned.before, tuned.score)
    _draw_scores(axes[1], [(f"{record.target.name}\n{record.task.name}", *scores)])


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(_words(text), fontsize=11, parse_math=False)


def _draw_parts(axis: Axes, parts: Iterable[Part]) -> None:
    """Horizontal bars of the parts' bytes, the largest on top, coloured by group."""
    ordered = sorted(parts, key=lambda part: part.bytes)
    places = range(len(ordered))
    axis.barh(places, [part.bytes for part in ordered], color=[GROUP_COLOURS[part.group] for part in ordered])
    for place, part in zip(places, ordered, strict=True):
        axis.text(part.bytes * 1.15, place, f"{part.bytes:,}", va="center", fontsize=6.5)
    axis.set_yticks(places, [part.name for part in ordered], fontsize=6.5)
    axis.set_xscale("log")
    axis.set_xlim(1, max(part.bytes for part in ordered) * 8)
    axis.set(title="bytes by part", xlabel="bytes (logarithmic)")
    for group, colour in GROUP_COLOURS.items():
        total = sum(part.bytes for part in ordered if part.group == group)
        if total:
            axis.barh([0], [0], color=colour, label=f"{group}: {total:,}")
    axis.legend(loc="lower right", fontsize=7, title="in all", title_fontsize=7)


def _draw_norms(axis: Axes, atoms: AtomStatistics) -> None:
    """Norms of every atom's rows; unused atoms are crosses on the axis."""
    places = np.arange(atoms.count)
    used = np.setdiff1d(places, atoms.unused)
    for rows, name, colour, marker in ((atoms.u, "U", "#0072b2", "o"), (atoms.v, "V", "#e69f00", "s")):
        label = f"{name}: median {rows.median:.3g}"
        axis.plot(used, np.array(rows.norms)[used], marker, color=colour, markersize=3.5, label=label)
    if atoms.unused:
        unused = list(atoms.unused)
        axis.plot(unused, [0.0] * len(unused), "x", color="#d55e00", label=f"unused: {len(unused)}")
    axis.set_ylim(bottom=0)
    axis.set(title="norms of the atoms' rows", xlabel="atom", ylabel="Euclidean norm, canonical coordinates")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _heat_map(axis: Axes, values: np.ndarray, *, centre: float, unit: str) -> Any:  # noqa: ANN401 - matplotlib's image
    """A heat map whose white is `centre`; red above, blue below."""
    reach = max(float(np.abs(values - centre).max()), 1e-6)
    image = axis.imshow(
        values, cmap="RdBu_r", vmin=centre - reach, vmax=centre + reach, aspect="auto", interpolation="nearest"
    )
    axis.figure.colorbar(image, ax=axis, label=unit)
    return image


def _label_ticks(axis: Axes, columns: Iterable[str], rows: Iterable[str]) -> None:
    for setter, labels in ((axis.set_xticks, list(columns)), (axis.set_yticks, list(rows))):
        setter(range(len(labels)), labels, fontsize=8)


def _ink(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is easier to read on `colour`."""
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5 else "white"


def _draw_scores(axis: Axes, rows: Iterable[tuple[str, Score | None, Score | None]]) -> None:
    """Scores with 95 % intervals, one bar group per host: before tuning, if there was any, and as stored."""
    axis.set(title="scores, 95 % intervals", ylabel="score")
    named = list(rows)
    drawn: set[str] = set()
    for place, (_, before, score) in enumerate(named):
        for entry, offset, colour, label in (
            (before, -0.12, "#56b4e9", "before tuning"),
            (score, 0.12 if before else 0.0, "#009e73", "as in the file"),
        ):
            if entry is None:
                continue
            reach = [[entry.value - entry.low], [entry.high - entry.value]]
            axis.errorbar(
                place + offset,
                entry.value,
                yerr=reach,
                fmt="o",
                color=colour,
                capsize=3,
                label=None if label in drawn else label,
            )
            axis.annotate(
                f"{entry.value:.3f}", (place + offset, entry.high), (0, 3), textcoords="offset points", ha="center"
            )
            drawn.add(label)
    labels = [_words(f"{name}\n{_measure(score or before)}") for name, before, score in named]
    crowded = len(named) > 4
    axis.set_xticks(
        range(len(named)),
        labels,
        fontsize=6.5 if crowded else 8,
        rotation=35 if crowded else 0,
        ha="right" if crowded else "center",
        parse_math=False,
    )
    axis.set_xlim(-0.6, len(named) - 0.4)
    axis.margins(y=0.35)  # leaves the legend a place of its own below
    axis.grid(axis="y", alpha=0.3)
    if drawn:
        axis.legend(loc="lower left", ncols=2, fontsize=7)
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "no score in the file", ha="center", va="center", transform=axis.transAxes)


def _measure(score: Score | None) -> str:
    return "not scored" if score is None else f"{score.metric}, {score.examples:,} examples"


def _words(text: str) -> str:
    """Names from an untrusted file, cut to a readable length."""
    lines = text.split("\n")
    return "\n".join(line if len(line) <= 3 * _NAME_LENGTH else f"{line[: 3 * _NAME_LENGTH]}…" for line in lines)
