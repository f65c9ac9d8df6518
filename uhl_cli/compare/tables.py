"""The comparison as a table: CSV, Markdown and LaTeX of the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from uhl_cli.compare.aggregate import GroupSummary, Verdict
from uhl_cli.compare.methods import METHODS

HEADER = (
    "data set",
    "host",
    "method",
    "metric",
    "score",
    "± over seeds",
    "seeds",
    "95 % low",
    "95 % high",
    "zero-shot",
    "F1 Score",
    "Accuracy",
    "bytes",
    "FLOP overhead (%)",
    "Memory overhead (MB)",
    "wall-clock %",
    "Active atoms per token",
    "training s",
    "within budget",
    "made on",
)


def rows_of(groups: list[GroupSummary]) -> list[list[str]]:
    """One row per method, data set and host; the best ones are not marked here."""
    return [
        [
            group.task,
            group.host,
            METHODS[group.method].label,
            group.metric,
            f"{group.mean:.3f}",
            _number(group.standard_error, 3),
            str(len(group.seeds)),
            f"{group.low:.3f}",
            f"{group.high:.3f}",
            _number(group.zero_shot, 3),
            f"{group.f1:.3f}",
            f"{group.accuracy:.3f}",
            str(group.adapter_bytes),
            f"{group.flops_percent:.2f}",
            f"{group.memory_mb:.2f}",
            _number(group.wall_clock_percent, 0),
            _number(group.atoms_per_token, 2),
            _number(group.training_seconds, 0),
            "yes" if group.within_budget else "no",
            " and ".join(group.devices) or "–",
        ]
        for group in groups
    ]


def as_csv(groups: list[GroupSummary]) -> str:
    """Comma-separated, with a header line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(rows_of(groups))
    return buffer.getvalue()


def as_markdown(groups: list[GroupSummary]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows_of(groups)]
    return "\n".join(lines) + "\n"


def as_latex(groups: list[GroupSummary]) -> str:
    """A LaTeX tabular, for the booktabs package."""
    alignment = "lll" + "l" + "r" * (len(HEADER) - 5) + "l"
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", _latex_row(list(HEADER)), r"\midrule"]
    lines += [_latex_row(row) for row in rows_of(groups)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def short_markdown(groups: list[GroupSummary]) -> str:
    """Methods by hosts, one table per data set: mean score, ± its standard error over seeds, * beyond the budget."""
    tables = []
    for task in dict.fromkeys(group.task for group in groups):
        mine = [group for group in groups if group.task == task]
        cells = {(METHODS[group.method].label, group.host): _cell(group) for group in mine}
        tables.append(_by_host(f"**{task}** ({mine[0].metric})", cells))
    return "\n\n".join(tables) + "\n"


def paired_markdown(verdicts: Sequence[Verdict]) -> str:
    """Every proposed method compared with the others: one table per data set, hosts as columns.

    A cell is the mean difference over seeds with a 95 % interval over examples, and `better` or `worse` if it is
    significant after Holm's correction over the whole comparison.
    """
    tables = []
    for task in dict.fromkeys(each.task for each in verdicts):
        mine = [each for each in verdicts if each.task == task]
        cells = {
            (f"{METHODS[each.proposed].label} minus {METHODS[each.other].label}", each.host): _paired_cell(each)
            for each in mine
        }
        tables.append(_by_host(f"**{task}**, difference in {mine[0].difference.metric}", cells))
    return "\n\n".join(tables) + "\n"


def _by_host(title: str, cells: Mapping[tuple[str, str], str]) -> str:
    """A table of the cells by (row, host), in the given order."""
    rows, hosts = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    lines = [title, "", "| | " + " | ".join(hosts) + " |", "|---" * (1 + len(hosts)) + "|"]
    lines += [f"| {row} | " + " | ".join(cells.get((row, host), "–") for host in hosts) + " |" for row in rows]
    return "\n".join(lines)


def _paired_cell(verdict: Verdict) -> str:
    found = verdict.difference
    said = "" if verdict.outcome == "open" else f" {verdict.outcome}"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{said}"


def _cell(group: GroupSummary) -> str:
    spread = "" if group.standard_error is None else f" ± {group.standard_error:.3f}"
    return f"{group.mean:.3f}{spread}" + ("" if group.within_budget else " *")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


_SPECIAL = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--"}


def _latex_row(cells: list[str]) -> str:
    return " & ".join("".join(_SPECIAL.get(letter, letter) for letter in cell) for cell in cells) + r" \\"
