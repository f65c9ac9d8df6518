"""Tables of `inspect` and the heat map of mixing weights.

Names come out of files that others made, so none of them is taken for markup or reaches the terminal with a control
character in it: `plain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.style import Style
from rich.table import Table
from rich.text import Text

from uhl_cli.cli.render import interval
from uhl_cli.inspect.report import (
    AtomStatistics,
    MixingWeights,
    Part,
    ReadoutSummary,
    RowStatistics,
    Similarity,
    TaskFileSummary,
)

_MAX_LABELS = 20
_MAX_UNUSED = 20


def plain(text: object, style: str = "") -> Text:
    """Text as it stands on one line: no markup, and a question mark for what no terminal should be sent."""
    return Text("".join(letter if letter.isprintable() else "?" for letter in str(text)), style=style)


def parts_table(parts: Sequence[Part], total: int) -> Table:
    """Parts under the name and the sum of their group; fits eighty columns."""
    table = Table(
        title="parts, scales included",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("part", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for name in ("bits", "shape", "scales", "bytes", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in dict.fromkeys(part.group for part in parts):
        members = [part for part in parts if part.group == group]
        size = sum(part.bytes for part in members)
        table.add_row(group, "", "", "", "", f"{size:,}", _share(size / total), style="bold")
        for part in members if group != "header" else ():
            table.add_row(
                f"  {part.name}",
                part.dtype,
                "-" if part.bits is None else f"{part.bits:g}",
                " x ".join(str(size) for size in part.shape),
                f"{part.scales:,}" if part.scales else "-",
                f"{part.bytes:,}",
                _share(part.share),
            )
    table.add_section()
    summed = sum(part.bytes for part in parts)
    table.add_row("in all", "", "", "", "", f"{summed:,}", _share(summed / total), style="bold")
    return table


def _share(share: float) -> str:
    return f"{100 * share:.2f} %"


def atoms_table(atoms: AtomStatistics) -> Table:
    """Norms and closest pairs of the dictionary; unused atoms are named below."""
    unused = ", ".join(str(index) for index in atoms.unused[:_MAX_UNUSED])
    if len(atoms.unused) > _MAX_UNUSED:
        unused += ", ..."
    table = Table(
        title=f"atoms: {atoms.count:,}, of them unused (row of U zero): {len(atoms.unused):,}", title_justify="left"
    )
    table.caption = f"unused: {unused}" if unused else None
    table.add_column("rows of")
    for name in ("smallest norm", "median", "largest", "closest pair, cosine"):
        table.add_column(name, justify="right")
    for name, rows in (("U", atoms.u), ("V", atoms.v)):
        table.add_row(name, *_norms(rows), _pair(rows.closest))
    table.add_row("updates u v^T", "", "", "", _pair(atoms.update))
    return table


def _norms(rows: RowStatistics) -> tuple[str, str, str]:
    return f"{rows.minimum:.3g}", f"{rows.median:.3g}", f"{rows.maximum:.3g}"


def _pair(pair: Similarity | None) -> str:
    return "-" if pair is None else f"{pair.cosine:+.3f} (atoms {pair.first}, {pair.second})"


def heat_map(mixing: MixingWeights) -> Table:
    """Mean mixing weights: every block has its number, so that it is read without colour too."""
    table = Table(
        title="mixing weights g(t, type), mean over used atoms",
        title_justify="left",
        caption="1 is an atom's own strength; red above, blue below. Deviation: over atoms, mean over depths.",
        caption_justify="left",
        padding=0,
        collapse_padding=True,
    )
    table.add_column("depth t", justify="right")
    for name in mixing.types:
        table.add_column(name, justify="center", min_width=7)
    reach = max(abs(value - 1) for row in mixing.mean for value in row) or 1.0
    for depth, row in zip(mixing.depths, mixing.mean, strict=True):
        table.add_row(f"{depth:.1f} ", *(_block(value, (value - 1) / reach) for value in row))
    table.add_section()
    columns = zip(*mixing.deviation, strict=True)
    table.add_row("deviation ", *(f"{sum(column) / len(column):.3f}" for column in columns))
    return table


def _block(value: float, strength: float) -> Text:
    """A number on a colour from blue (-1) over white (0) to red (1)."""
    fade = round(255 * (1 - abs(strength)))
    red, green, blue = (255, fade, fade) if strength > 0 else (fade, fade, 255)
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"
    return Text(f" {value:.3f} ", style=Style(color=ink, bgcolor=f"rgb({red},{green},{blue})"))


def readout_table(readout: ReadoutSummary) -> Table:
    """Sizes of the readout and its first labels."""
    table = Table(
        title=f"readout ({readout.kind}): {readout.inputs:,} -> {readout.hidden:,} -> {len(readout.labels):,}, "
        f"{readout.parameters:,} parameters in {readout.bytes:,} bytes",
        title_justify="left",
    )
    table.add_column("label")
    table.add_column("training words" if readout.kind == "tokens" else "training examples", justify="right")
    for label, count in list(zip(readout.labels, readout.label_counts, strict=True))[:_MAX_LABELS]:
        table.add_row(plain(label), f"{count:,}")
    if len(readout.labels) > _MAX_LABELS:
        table.add_row(f"and {len(readout.labels) - _MAX_LABELS:,} more (--json)", "")
    return table


def task_files_table(files: Iterable[TaskFileSummary]) -> Table:
    """Task files that belong to an adapter, with their scores before and after."""
    table = Table(title="tuned task files beside it", title_justify="left")
    for name in ("file", "task", "target"):
        table.add_column(name, overflow="fold")
    for name in ("before", "tuned", "bytes"):
        table.add_column(name, justify="right")
    for entry in files:
        table.add_row(
            plain(entry.file),
            plain(entry.task if entry.own_task else f"{entry.task} (new readout)"),
            plain(entry.target.name),
            interval(entry.before),
            interval(entry.score),
            f"{entry.bytes:,}",
        )
    return table
