"""`uhl demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table, interval

if TYPE_CHECKING:
    from uhl_cli.commands.options import DemoOptions
    from uhl_cli.metrics import Difference
    from uhl_cli.reports import DemoReport
    from uhl_cli.schema import HostRecord

CONTROLS = {
    "majority_class": "always the most frequent class",
    "size": "the adapter, with a map by size alone (--align size)",
    "head_only": "a ported linear head in place of the adapter (head only)",
    "random_update": "the adapter with its updates in random directions",
}


def _record() -> type[DemoOptions]:
    from uhl_cli.commands.options import DemoOptions

    return DemoOptions


@command(
    _record,
    example="uhl demo --output demo",
    panels={"Host": ("source", "target"), "Data": ("task",), "Training": ("epochs", "tune-steps", "seed")},
    interrupted="Run it again; nothing was kept.",
)
def demo(options: DemoOptions, output: Output) -> None:
    """Train, port, tune without labels and compare, in about three minutes and without any download."""
    from uhl_cli.commands.demo import run_demo

    with output.progress() as reporter:
        report = run_demo(options, reporter)
    output.result(report, quiet=[(f"{report.port.scores['ported'].value:.6f}",)], table=_table)


def _table(output: Output, report: DemoReport) -> None:
    """Print the steps with their scores, and one sentence on each important comparison."""
    source, target = _shape(report.pretrain.source), _shape(report.port.target)
    ported = report.port.scores["ported"]
    table = Table(
        f"{report.port.task}: {ported.metric} on {ported.examples} examples, 95 % intervals",
        left=["what happened"],
        right=["score"],
    )
    table.row(f"1. trained an adapter on {source}", interval(report.pretrain.score))
    table.row(f"2. ported the file to {target}: no label, no gradient", interval(ported), style="bold")
    for name, words in CONTROLS.items():
        table.row(f"   for comparison, on the target: {words}", interval(report.port.scores[name]))
    tuned = report.tune
    table.row(
        f"3. tuned a LoRA there without labels, {tuned.steps} steps on the texts in the file",
        interval(tuned.scores["tuned"]),
        style="bold",
    )
    table.row("   the teacher that labelled these texts, on the source", interval(report.pretrain.teacher_score))
    output.table(table)
    atoms = report.port.atoms_per_token or 0.0
    gains = report.port.gains
    output.line(
        f"The file holds {report.port.bytes:,} bytes (limit {report.max_bytes:,}); it adds "
        f"{report.port.flops.percent:.2f} % FLOPs to the target (limit {report.max_flops:g} %), and {atoms:.2f} atoms "
        "(limit 2) act on a token."
    )
    output.line(f"Ported, it is {versus(gains['head_only'])} the linear head and {versus(gains['size'])} --align size.")
    output.line(f"Tuned, it is {versus(tuned.gains['zero_shot'])} the ported adapter.")
    better = {
        name: report.port.scores[name].value for name in CONTROLS if report.port.scores[name].value > ported.value
    }
    if better:
        named = ", ".join(f"{CONTROLS[name]} ({value:.3f})" for name, value in better.items())
        output.line(f"Controls that score higher than the ported file ({ported.value:.3f}): {named}.")
    else:
        output.line("No control scores higher than the ported file.")
    output.line(
        f"On the target the LoRA holds {tuned.lora_bytes:,} bytes, its readout {tuned.readout_bytes:,}. Merged, a LoRA "
        "costs nothing at run time."
    )
    kept = f" The files are in {report.output}." if report.output else ""
    output.line(f"{report.seconds:.0f} seconds in all.{kept}")
    output.line(
        "Next, on your own models: uhl pretrain --host MODEL --task TASK (or --teacher FINE_TUNED_MODEL), then "
        "uhl tune adapter.safetensors --target OTHER_MODEL --parameters lora"
    )


def _shape(host: HostRecord) -> str:
    print_of = host.fingerprint
    return f"{host.name} ({print_of.num_hidden_layers} layers x {print_of.hidden_size})"


def versus(difference: Difference) -> str:
    """A comparison of two scores in words; a difference counts only if its interval excludes zero."""
    value, low, high = difference.value, difference.low, difference.high
    if low > 0:
        return f"better by {value:.3f} [{low:.3f}, {high:.3f}] than"
    if high < 0:
        return f"worse by {-value:.3f} [{-high:.3f}, {-low:.3f}] than"
    return f"within the interval ({value:+.3f} [{low:.3f}, {high:.3f}]) of"
