"""`inspect`: what is in a file, without torch and without a host."""

from __future__ import annotations

from uhl_cli.errors import OutputError, UsageError
from uhl_cli.inspect.compare import compare_files
from uhl_cli.inspect.content import describe, open_file
from uhl_cli.inspect.report import InspectOptions, InspectReport
from uhl_cli.inspect.verify import verify_file

PLOT_FORMATS = (".png", ".svg", ".pdf")


def run_inspect(options: InspectOptions) -> InspectReport:
    """Describe an adapter file, a task file or a ported adapter's folder, or verify it, or compare it with another.

    Guarantee: imports neither torch nor transformers, changes no file but `options.plot`, and writes that whole or
    not at all.

    :raises FormatError: When the file cannot be read.  With `options.verify`, only when there is no such file, or it
        is too large: other problems are in the report.
    :raises DataError: When the requested texts of a transfer set are missing.
    :raises UsageError: When the options contradict each other, or the ending of `options.plot` is unknown.
    :raises OutputError: When the figures cannot be drawn or written.
    """
    _refuse_contradictions(options)
    if options.verify:
        return verify_file(options.file)
    if options.diff is not None:
        return compare_files(open_file(options.file), open_file(options.diff))
    report = describe(open_file(options.file), anchors=options.anchors, transfer=options.transfer)
    if options.plot is not None:
        from uhl_cli.inspect.figures import draw

        draw(report, options.plot)
        report = report.model_copy(update={"plot": str(options.plot)})
    return report


def _refuse_contradictions(options: InspectOptions) -> None:
    if options.verify and options.diff is not None:
        raise UsageError("--verify and --diff cannot be used together.", "Use one at a time.")
    described = options.anchors or options.transfer or options.plot is not None
    if described and (options.verify or options.diff is not None):
        raise UsageError("--anchors, --transfer and --plot describe a file.", "Leave out --verify and --diff.")
    if options.plot is None:
        return
    if options.plot.suffix.lower() not in PLOT_FORMATS:
        raise UsageError(f"--plot {options.plot}: unknown figure format.", f"Use one of {', '.join(PLOT_FORMATS)}.")
    if options.plot.exists() and not options.overwrite:
        raise OutputError(f"{options.plot} already exists.", "Choose another --plot, or add --overwrite.")
