"""Figures of a comparison, drawn with matplotlib (the extra `compare`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uhl_cli.compare.aggregate import Comparison, GroupSummary
from uhl_cli.compare.methods import METHODS, Role
from uhl_cli.compare.results import Predicted, RunMetrics
from uhl_cli.errors import UsageError
from uhl_cli.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours for colour-blind readers (Okabe and Ito), by a method's role; further methods begin again.
_PALETTES: dict[Role, tuple[str, ...]] = {
    "proposed": ("#0072b2", "#56b4e9", "#009e73", "#004d7a", "#7fd1b9", "#0a7d5a"),
    "baseline": ("#d55e00", "#e69f00", "#cc79a7", "#f0e442", "#8c3d00"),
    "control": ("#999999", "#777777", "#bbbbbb", "#555555", "#333333"),
}
_MARKS = "oDs^vPX<>dph*8H"


def _looks() -> tuple[dict[str, str], dict[str, str]]:
    """Colour and marker of each method."""
    colours: dict[str, str] = {}
    for role, palette in _PALETTES.items():
        mine = [name for name, method in METHODS.items() if method.role == role]
        colours |= dict(zip(mine, cycle(palette), strict=False))
    return colours, dict(zip(METHODS, cycle(_MARKS), strict=False))


COLOURS, _MARKERS = _looks()
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
    """Loss and accuracy of a run's training batches over its steps, and dev scores in training, if there are any."""
    with _figure(path, (7, 3.2)) as figure:
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            steps = [point.step for point in run.curve]
            values = [getattr(point, name) for point in run.curve]
            axes.plot(steps, values, marker=_dot(steps), color=COLOURS[run.method], label="training")
            if name == "accuracy" and run.score.metric == "accuracy":
                axes.axhline(run.score.value, color="black", linestyle="--", label="dev, at the end")
            if name == "accuracy" and run.dev_curve:
                steps = [point.step for point in run.dev_curve]
                values = [point.score for point in run.dev_curve]
                axes.plot(steps, values, marker="o", color="black", linewidth=0.8, label=f"dev {run.score.metric}")
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


@dataclass(frozen=True)
class _Panel:
    """The part of a figure for one data set and host."""

    axes: Axes
    groups: list[GroupSummary]
    runs: list[RunMetrics]


def draw_comparison(comparison: Comparison, folder: Path) -> None:
    """Draw all figures of the comparison into `folder`."""
    _draw_bars(comparison, folder / "comparison_accuracy_bar_chart.pdf")
    _draw_bytes(comparison, folder / "comparison_score_vs_bytes.pdf")
    _draw_curves(comparison, folder / "comparison_learning_curves.pdf")
    _draw_boxes(comparison, folder / "comparison_seeds_box_plot.pdf")


@contextmanager
def _panels(comparison: Comparison, path: Path, title: str | None = None) -> Iterator[list[_Panel]]:
    """A figure with one panel per data set and host; data sets are rows if they all have the same hosts."""
    places = list(dict.fromkeys((group.task, group.host) for group in comparison.groups))
    columns = len(dict.fromkeys(host for _, host in places))
    rows = -(-len(places) // columns)
    with _figure(path, (max(7.0, 3.4 * columns), max(3.4, 2.9 * rows + 0.8))) as figure:
        drawn: list[Axes] = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for spare in drawn[len(places) :]:
            spare.set_visible(False)
        panels = []
        for axes, place in zip(drawn, places, strict=False):
            groups = [group for group in comparison.groups if (group.task, group.host) == place]
            runs = [run for run in comparison.runs if (run.task, run.host) == place]
            axes.set(title=f"{place[0]}: {place[1]}", ylabel=groups[0].metric)
            panels.append(_Panel(axes, groups, runs))
        yield panels
        entries: dict[str, Any] = {}
        for panel in panels:
            handles, labels = panel.axes.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        columns = min(5, 1 + len(panels))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8)
        if title is not None:
            figure.suptitle(title)


def _look(method: str) -> dict[str, Any]:
    return {"color": COLOURS[method], "label": METHODS[method].label}


def _draw_bars(comparison: Comparison, path: Path) -> None:
    title = "dev score, 95 % over examples of the first seed; hatched: beyond the budget"
    with _panels(comparison, path, title) as panels:
        for panel in panels:
            for place, group in enumerate(panel.groups):
                below, above = max(0.0, group.mean - group.low), max(0.0, group.high - group.mean)
                panel.axes.bar(
                    place,
                    group.mean,
                    yerr=[[below], [above]],
                    hatch="" if group.within_budget else "//",
                    error_kw={"elinewidth": 1, "capsize": 2},
                    **_look(group.method),
                )
            panel.axes.set(xticks=[], ylim=(0, 1))


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of (bytes, score), by bytes."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((size, value))
    return front


def _draw_bytes(comparison: Comparison, path: Path) -> None:
    stored = [group.adapter_bytes / 1e6 for group in comparison.groups if group.adapter_bytes > 0]
    # All panels share the axis; at least a factor of ten around 1 MB keeps its labels apart.
    limits = (min([0.1, *stored]) * 0.7, max([10.0, *stored]) * 1.4)
    with _panels(comparison, path) as panels:
        for panel in panels:
            points = {group.method: (group.adapter_bytes / 1e6, group.mean) for group in panel.groups}
            points = {method: point for method, point in points.items() if point[0] > 0}
            for method, point in points.items():
                panel.axes.scatter(*point, marker=_MARKERS[method], zorder=3, **_look(method))
            front = pareto([point for method, point in points.items() if METHODS[method].role != "control"])
            if front:
                sizes, values = zip(*front, strict=True)
                panel.axes.step(sizes, values, where="post", color="black", linewidth=0.8, label="Pareto front")
            panel.axes.axvline(1.0, color="red", linestyle=":", linewidth=0.8, label="1 MB")
            panel.axes.set(xscale="log", xlim=limits, xlabel="stored bytes (MB)")
            panel.axes.xaxis.set_major_formatter("{x:g}")


def _draw_curves(comparison: Comparison, path: Path) -> None:
    with _panels(comparison, path) as panels:
        for panel in panels:
            first = min(run.seed for run in panel.runs)
            for run in panel.runs:
                if run.curve and run.seed == first:
                    steps = [point.step for point in run.curve]
                    losses = _smooth([point.loss for point in run.curve])
                    panel.axes.plot(steps, losses, marker=_dot(steps), **_look(run.method))
            panel.axes.set(xlabel="step", ylabel="training loss (smoothed)")


def _dot(steps: list[int]) -> str:
    """A marker for a curve of one point, where a line is invisible."""
    return "o" if len(steps) == 1 else ""


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Running means over the last `width` points, fewer at the beginning."""
    return [float(np.mean(values[max(0, index + 1 - width) : index + 1])) for index in range(len(values))]


def _draw_boxes(comparison: Comparison, path: Path) -> None:
    with _panels(comparison, path, "dev scores of all seeds") as panels:
        for panel in panels:
            for place, group in enumerate(panel.groups):
                values = [run.score.value for run in panel.runs if run.method == group.method]
                panel.axes.boxplot(values, positions=[place], widths=0.6, medianprops={"color": COLOURS[group.method]})
                panel.axes.scatter([place] * len(values), values, s=12, zorder=3, **_look(group.method))
            panel.axes.set(xticks=[])
