"""The comparison of `inspect --diff` as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from uhl_cli.cli.inspect_tables import plain
from uhl_cli.inspect.report import Comparison, InspectReport

_MAX_VALUE = 60


def render_comparison(console: Console, report: InspectReport, comparison: Comparison) -> None:
    """Print what differs between two files, and what they share."""
    console.print(plain(f"first:  {report.file} ({report.bytes:,} bytes)"))
    console.print(plain(f"second: {comparison.other} ({comparison.other_bytes:,} bytes)"))
    if comparison.identical:
        console.print("the files are identical, byte for byte")
        return
    if comparison.fields:
        table = Table(title=f"header fields that differ: {len(comparison.fields)}", title_justify="left")
        for name in ("field", "first", "second"):
            table.add_column(name, overflow="fold")
        for field in comparison.fields:
            table.add_row(plain(field.name), plain(_short(field.first)), plain(_short(field.second)))
        console.print(table)
    else:
        console.print("no header field differs")
    if comparison.parts:
        table = Table(
            title=f"parts that differ: {len(comparison.parts)}; equal: {comparison.same_parts}",
            title_justify="left",
            caption="relative: Euclidean norm of the difference over the larger of both norms (at most 2)",
            caption_justify="left",
        )
        table.add_column("part")
        for name in ("first", "second", "relative"):
            table.add_column(name, justify="right")
        for part in comparison.parts:
            relative = "-" if part.relative is None else f"{part.relative:.4f}"
            table.add_row(part.name, _shape(part.first), _shape(part.second), relative)
        console.print(table)
    else:
        console.print(f"all {comparison.same_parts} parts hold the same values")
    if comparison.anchors is not None:
        anchors = comparison.anchors
        relative = "not comparable" if anchors.relative is None else f"{anchors.relative:.4f} apart (relative)"
        console.print(
            f"anchors in common: {anchors.common_texts:,} texts (of {anchors.first_texts:,} and "
            f"{anchors.second_texts:,}), {anchors.common_words:,} words (of {anchors.first_words:,} and "
            f"{anchors.second_words:,}); their coordinates: {relative}"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(str(size) for size in shape)


def _short(value: str | None) -> str:
    if value is None:
        return "missing"
    return value if len(value) <= _MAX_VALUE else f"{value[: _MAX_VALUE - 3]}..."
