"""The closing table of `uhl demo`: what happened, in plain words."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from uhl_cli.cli.render import interval, percent
from uhl_cli.metrics import Difference
from uhl_cli.reports import DemoReport
from uhl_cli.schema import HostRecord

CONTROLS = {
    "untouched": "always the commonest answer",
    "size": "the adapter, through a map that knows nothing of the target (--align size)",
    "head_only": "a linear head carried over in place of the adapter (head only)",
    "random_update": "the adapter with its updates turned in random directions",
}


def render_demo(report: DemoReport) -> None:
    """Print the table and one sentence on every comparison that matters."""
    console = Console()
    source, target = _shape(report.pretrain.source), _shape(report.port.target)
    ported = report.port.scores["ported"]
    table = Table(
        title=f"{report.port.task}: {ported.metric} on {ported.examples} examples, 95 % intervals", title_justify="left"
    )
    table.add_column("what happened")
    table.add_column("score", justify="right")
    table.add_row(f"1. trained an adapter on {source}", interval(report.pretrain.score))
    table.add_row(f"2. carried the file to {target}: no label, no gradient", interval(ported), style="bold")
    for name, words in CONTROLS.items():
        table.add_row(f"   for comparison, on the target: {words}", interval(report.port.scores[name]))
    table.add_row(
        f"3. tuned {report.tune.delta_bytes} bytes of it there, {report.tune.steps} steps with labels",
        interval(report.tune.scores["tuned"]),
    )
    console.print(table)
    atoms = report.port.atoms_per_token or 0.0
    gains = report.port.gains
    for line in (
        f"The file holds {report.port.bytes:,} bytes (limit {report.max_bytes:,}); it adds "
        f"{percent(report.port.flops)} FLOPs to the target (limit {report.max_flops:g} %), and {atoms:.2f} atoms "
        "(limit 2) act on a token.",
        f"Carried over, it is {versus(gains['head_only'])} the linear head and {versus(gains['size'])} --align size.",
        f"Tuned, it is {versus(report.tune.gains['zero_shot'])} what was carried over.",
        f"{report.seconds:.0f} seconds in all." + (f" The files are in {report.output}." if report.output else ""),
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _shape(host: HostRecord) -> str:
    print_of = host.fingerprint
    return f"{host.name} ({print_of.num_hidden_layers} layers x {print_of.hidden_size})"


def versus(difference: Difference) -> str:
    """How a score stands to another; only a difference whose interval leaves out zero is called one."""
    value, low, high = difference.value, difference.low, difference.high
    if low > 0:
        return f"better by {value:.3f} [{low:.3f}, {high:.3f}] than"
    if high < 0:
        return f"worse by {-value:.3f} [{-high:.3f}, {-low:.3f}] than"
    return f"within the interval ({value:+.3f} [{low:.3f}, {high:.3f}]) of"
