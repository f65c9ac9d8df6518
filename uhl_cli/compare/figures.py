"""Figures of a comparison, drawn with matplotlib (the extra `compare`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uhl_cli.compare.aggregate import Comparison, GroupSummary
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.results import Predicted, RunMetrics
from uhl_cli.errors import UsageError
from uhl_cli.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that people with a colour deficiency tell apart (Okabe and Ito), a method each.
_PALETTE = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#cc79a7", "#999999", "#777777", "#bbbbbb", "#555555")
COLOURS = dict(zip(METHODS, _PALETTE, strict=True))
_MARKERS = dict(zip(METHODS, "oDs^vPX<>", strict=True))
_MOST_CLASSES_WITH_NUMBERS = 12


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that is written to `path` as PDF, without a time stamp, when the block ends.

    :raises UsageError: When matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("figures need matplotlib.", 'Run `pip install "uhl[compare]"`.') from error
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "pdf.fonttype": 42}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], metadata={"CreationDate": None})


def draw_learning_curve(run: RunMetrics, path: Path) -> None:
    """Loss and accuracy of a run's training batches over its steps."""
    with _figure(path, (7, 3.2)) as figure:
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            steps = [point.step for point in run.curve]
            values = [getattr(point, name) for point in run.curve]
            axes.plot(steps, values, marker=_dot(steps), color=COLOURS[run.method], label="training")
            if name == "accuracy" and run.score.metric == "accuracy":
                axes.axhline(run.score.value, color="black", linestyle="--", label="dev, at the end")
            axes.set(xlabel="step", ylabel=f"{name}, mean of 20 batches", title=name)
            axes.legend()
        figure.suptitle(run.run_id)


def draw_confusion(run: RunMetrics, predicted: Predicted, path: Path) -> None:
    """Confusion matrix on the evaluation examples: share of each true class."""
    counts = confusion(predicted)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.6 + 0.55 * len(counts)
    with _figure(path, (size + 0.8, size)) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        ticks = list(range(len(counts)))
        axes.set_xticks(ticks, predicted.labels, rotation=45, ha="right")
        axes.set_yticks(ticks, predicted.labels)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(run.run_id, fontsize=7)
        if len(counts) <= _MOST_CLASSES_WITH_NUMBERS:
            for (row, column), share in np.ndenumerate(shares):
                colour = "white" if share > 0.6 else "black"
                axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=7)
        figure.colorbar(image, label="share of the true class")


def confusion(predicted: Predicted) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Counts [true, predicted] of examples, or of words."""
    found = np.concatenate([np.atleast_1d(row) for row in predicted.predictions])
    true = np.concatenate([np.atleast_1d(row) for row in predicted.references])
    counts = np.zeros((len(predicted.labels), len(predicted.labels)), dtype=np.int64)
    np.add.at(counts, (true, found), 1)
    return counts


def draw_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """All figures of the comparison; they lie in `folder`."""
    panels = list(dict.fromkeys((group.task, group.host) for group in comparison.groups))
    paths = {
        name: folder / f"comparison_{name}.pdf"
        for name in ("accuracy_bar_chart", "score_vs_bytes", "learning_curves", "seeds_box_plot")
    }
    _draw_bars(comparison, panels, paths["accuracy_bar_chart"])
    _draw_bytes(comparison, panels, paths["score_vs_bytes"])
    _draw_curves(comparison, panels, paths["learning_curves"])
    _draw_boxes(comparison, panels, paths["seeds_box_plot"])
    return list(paths.values())


Panels = list[tuple[str, str]]


def _grid(figure: Figure, panels: Panels) -> list[Axes]:
    """One panel a data set and host, data sets as rows where they all have the same hosts."""
    hosts = len(dict.fromkeys(host for _, host in panels))
    rows = -(-len(panels) // hosts)
    drawn: list[Axes] = figure.subplots(rows, hosts, squeeze=False).ravel().tolist()
    for spare in drawn[len(panels) :]:
        spare.set_visible(False)
    return drawn[: len(panels)]


def _size(panels: Panels, width: float = 3.4, height: float = 2.9) -> tuple[float, float]:
    hosts = len(dict.fromkeys(host for _, host in panels))
    return max(7.0, width * hosts), max(3.4, height * -(-len(panels) // hosts) + 0.8)


def _legend(figure: Figure, axes: list[Axes]) -> None:
    entries = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(5, 1 + len(axes)), fontsize=8)


def _of(comparison: Comparison, panel: tuple[str, str]) -> list[GroupSummary]:
    return [group for group in comparison.groups if (group.task, group.host) == panel]


def _draw_bars(comparison: Comparison, panels: Panels, path: Path) -> None:
    with _figure(path, _size(panels)) as figure:
        drawn = _grid(figure, panels)
        for axes, panel in zip(drawn, panels, strict=True):
            for place, group in enumerate(_of(comparison, panel)):
                below, above = max(0.0, group.mean - group.low), max(0.0, group.high - group.mean)
                axes.bar(
                    place,
                    group.mean,
                    yerr=[[below], [above]],
                    color=COLOURS[group.method],
                    label=METHODS[group.method].label,
                    hatch="" if group.within_budget else "//",
                    error_kw={"elinewidth": 1, "capsize": 2},
                )
            axes.set(title=f"{panel[0]}: {panel[1]}", ylabel=_of(comparison, panel)[0].metric, xticks=[], ylim=(0, 1))
        _legend(figure, drawn)
        figure.suptitle("dev score, 95 % over examples of the first seed; hatched: beyond the budget")


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bytes, score) that no other betters in both, by bytes."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((size, value))
    return front


def _draw_bytes(comparison: Comparison, panels: Panels, path: Path) -> None:
    stored = [group.adapter_bytes / 1e6 for group in comparison.groups if group.adapter_bytes > 0]
    # All panels share the axis; a decade at least on either side of 1 MB keeps its labels apart.
    limits = (min([0.1, *stored]) * 0.7, max([10.0, *stored]) * 1.4)
    with _figure(path, _size(panels)) as figure:
        drawn = _grid(figure, panels)
        for axes, panel in zip(drawn, panels, strict=True):
            groups = [group for group in _of(comparison, panel) if group.adapter_bytes > 0]
            for group in groups:
                axes.scatter(
                    group.adapter_bytes / 1e6,
                    group.mean,
                    color=COLOURS[group.method],
                    marker=_MARKERS[group.method],
                    label=METHODS[group.method].label,
                    zorder=3,
                )
            points = [(group.adapter_bytes / 1e6, group.mean) for group in groups if _competes(group)]
            if points:
                front = pareto(points)
                axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=0.8, label="Pareto front")
            axes.axvline(1.0, color="red", linestyle=":", linewidth=0.8, label="1 MB")
            axes.set(xscale="log", xlim=limits, xlabel="stored bytes (MB)", title=f"{panel[0]}: {panel[1]}")
            axes.set_ylabel(_of(comparison, panel)[0].metric)
            axes.xaxis.set_major_formatter("{x:g}")
        _legend(figure, drawn)


def _competes(group: GroupSummary) -> bool:
    return METHODS[group.method].role != "control"


def _draw_curves(comparison: Comparison, panels: Panels, path: Path) -> None:
    with _figure(path, _size(panels)) as figure:
        drawn = _grid(figure, panels)
        for axes, panel in zip(drawn, panels, strict=True):
            for run in comparison.runs:
                if (run.task, run.host) == panel and run.curve and run.seed == min(_seeds(comparison, panel)):
                    steps = [point.step for point in run.curve]
                    axes.plot(
                        steps,
                        _smooth([point.loss for point in run.curve]),
                        marker=_dot(steps),
                        color=COLOURS[run.method],
                        label=METHODS[run.method].label,
                    )
            axes.set(xlabel="step", ylabel="training loss (smoothed)", title=f"{panel[0]}: {panel[1]}")
        _legend(figure, drawn)


def _seeds(comparison: Comparison, panel: tuple[str, str]) -> list[int]:
    return [run.seed for run in comparison.runs if (run.task, run.host) == panel]


def _dot(steps: list[int]) -> str:
    """A marker for a curve of one point, which no line would show."""
    return "o" if len(steps) == 1 else ""


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Running means over the last `width` points, fewer at the beginning."""
    return [float(np.mean(values[max(0, index + 1 - width) : index + 1])) for index in range(len(values))]


def _draw_boxes(comparison: Comparison, panels: Panels, path: Path) -> None:
    with _figure(path, _size(panels)) as figure:
        drawn = _grid(figure, panels)
        for axes, panel in zip(drawn, panels, strict=True):
            for place, group in enumerate(_of(comparison, panel)):
                values = [
                    run.score.value
                    for run in comparison.runs
                    if (run.task, run.host, run.method) == (group.task, group.host, group.method)
                ]
                colour = COLOURS[group.method]
                axes.boxplot(values, positions=[place], widths=0.6, medianprops={"color": colour})
                spots = np.full(len(values), place)
                axes.scatter(spots, values, color=colour, s=12, zorder=3, label=METHODS[group.method].label)
            axes.set(title=f"{panel[0]}: {panel[1]}", ylabel=_of(comparison, panel)[0].metric, xticks=[])
        _legend(figure, drawn)
        figure.suptitle("dev scores of all seeds")
