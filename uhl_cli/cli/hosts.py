"""`uhl hosts`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table

if TYPE_CHECKING:
    from uhl_cli.commands.options import HostsOptions
    from uhl_cli.reports import HostReport, LayerReport, ModuleReport

_DEGREES = {
    "all": "updates on every layer",
    "some": "updates on a part of the layers or of their modules",
    "stream": "no updates: the readout alone",
}


def _record() -> type[HostsOptions]:
    from uhl_cli.commands.options import HostsOptions

    return HostsOptions


@command(
    _record,
    example="uhl hosts answerdotai/ModernBERT-base",
    metavars={"name": "MODEL"},
    interrupted="Nothing was written.",
)
def hosts(options: HostsOptions, output: Output) -> None:
    """Show what uhl finds in a model: its layers, their modules by role, and what an adapter can edit there.

    Everything shown was checked by running the model. Attach it to a bug report about a model that does not load or
    ports badly. With --quiet, print one line for scripts: degree (all, some or stream), layers and hidden size, tab
    separated.
    """
    from uhl_cli.commands.hosts import run_hosts

    with output.progress() as reporter:
        report = run_hosts(options, reporter)
    shape = report.fingerprint
    output.result(report, quiet=[(report.degree, shape.num_hidden_layers, shape.hidden_size)], table=_table)


def _table(output: Output, report: HostReport) -> None:
    shape = report.fingerprint
    size = f"{shape.num_hidden_layers} x {shape.hidden_size}"
    output.line(f"{report.host} ({shape.model_type}, {size}): {_DEGREES[report.degree]}")
    kind = "decoder" if report.decoder else "encoder"
    reads = f"{kind}, at most {report.max_length:,} tokens, embedding '{report.embeddings}'"
    output.line(f"{reads}; found in {report.seconds:.1f} s")
    table = Table(left=["layers", "type", "module", "its features", "edit goes to"])
    for first, last in _alike(report.layers):
        name = str(first.index) if first is last else f"{first.index}-{last.index}"
        for type_, module in first.modules.items():
            table.row(name, type_, _short(module, first), module.features or "all", _place(module, first))
            name = ""
        if not first.modules:
            table.row(name, "-", "", "", "")
    output.table(table)
    for first, last in _alike(report.layers):
        if first.problem:
            which = f"layer {first.index}" if first is last else f"layers {first.index}-{last.index}"
            output.line(f"{which}: {first.problem}")


def _alike(layers: tuple[LayerReport, ...]) -> list[tuple[LayerReport, LayerReport]]:
    """(first, last) of runs of layers with the same modules."""
    runs: list[tuple[LayerReport, LayerReport]] = []
    for layer in layers:
        if runs and _signature(runs[-1][0]) == _signature(layer):
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _signature(layer: LayerReport) -> list[tuple[str, str, str | None, str]]:
    return [
        (type_, _short(module, layer), module.features, _place(module, layer))
        for type_, module in layer.modules.items()
    ]


def _short(module: ModuleReport, layer: LayerReport) -> str:
    """A module's name from its layer."""
    name = module.name.removeprefix(f"{layer.name}.")
    return f"{name} (experts)" if module.experts else name


def _place(module: ModuleReport, layer: LayerReport) -> str:
    place = module.space if module.space == "stream" else f"{module.space} input"
    if module.added_by is not None:
        place += f", after {module.added_by.removeprefix(f'{layer.name}.')}"
    return place if module.scale == 1.0 else f"{place}, x {module.scale:.3g}"
