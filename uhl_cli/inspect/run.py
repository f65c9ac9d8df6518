"""`inspect`: what is in a file, without torch and without a host."""

from __future__ import annotations

from pathlib import Path

from uhl_cli.errors import FormatError, OutputError, UsageError
from uhl_cli.formats.adapter import MAX_FILE_BYTES, AdapterFile, read_adapter, read_tensors
from uhl_cli.formats.task import TaskFile, read_task
from uhl_cli.inspect.compare import compare_anchors, different_fields, different_parts
from uhl_cli.inspect.content import adapter_content, task_content
from uhl_cli.inspect.report import Comparison, FileKind, InspectOptions, InspectReport, Verification
from uhl_cli.inspect.verify import find_problems

PLOT_FORMATS = (".png", ".svg", ".pdf")


def run_inspect(options: InspectOptions) -> InspectReport:
    """Describe an adapter file or a task file, or verify it, or compare it with another.

    Guarantee: imports neither torch nor transformers, changes no file but `options.plot`, and writes that whole or
    not at all.

    :raises FormatError: When the file cannot be read.  Under `options.verify`, only when there is no such file:
        what is wrong with it is in the report.
    :raises UsageError: When the options contradict each other, or the ending of `options.plot` is unknown.
    :raises OutputError: When the figures cannot be drawn or written.
    """
    _refuse_contradictions(options)
    if options.verify:
        return _verified(options.file)
    if options.diff is not None:
        return _compared(options.file, options.diff)
    content = read_file(options.file)
    data = _bytes(options.file)
    if isinstance(content, AdapterFile):
        described = adapter_content(options.file, content, data, anchors=options.anchors)
        report = InspectReport(
            file=str(options.file),
            kind="adapter",
            format_version=content.manifest.format_version,
            bytes=len(data),
            adapter=described,
        )
    else:
        if options.anchors:
            raise UsageError(f"{options.file} is a task file, which has no anchors.", "Leave out --anchors.")
        report = InspectReport(
            file=str(options.file),
            kind="task",
            format_version=content.record.format_version,
            bytes=len(data),
            task=task_content(options.file, content, data),
        )
    if options.plot is not None:
        from uhl_cli.inspect.figures import draw

        draw(report, options.plot)
        report = report.model_copy(update={"plot": str(options.plot)})
    return report


def read_file(path: Path) -> AdapterFile | TaskFile:
    """An adapter file or a task file, whichever `path` is.

    :raises FormatError: When it is neither, or is damaged.
    """
    metadata, _ = read_tensors(path, key="uhl-task")
    return read_task(path) if "uhl-task" in metadata and "uhl" not in metadata else read_adapter(path)


def _refuse_contradictions(options: InspectOptions) -> None:
    if options.verify and options.diff is not None:
        raise UsageError("--verify and --diff are two questions.", "Ask one at a time.")
    if (options.verify or options.diff is not None) and (options.anchors or options.plot is not None):
        raise UsageError("--anchors and --plot describe a file.", "Leave out --verify and --diff.")
    if options.plot is None:
        return
    if options.plot.suffix.lower() not in PLOT_FORMATS:
        raise UsageError(f"--plot {options.plot}: no such kind of figure.", f"Use one of {', '.join(PLOT_FORMATS)}.")
    if options.plot.exists() and not options.overwrite:
        raise OutputError(f"{options.plot} is there already.", "Choose another --plot, or add --overwrite.")


def _verified(path: Path) -> InspectReport:
    kind: FileKind | None = None
    version: str | None = None
    size = path.stat().st_size if path.is_file() else 0
    problems: tuple[str, ...]
    if size > MAX_FILE_BYTES:  # too large to be read for nothing
        problems = (f"the file holds {size:,} bytes; no adapter is larger than {MAX_FILE_BYTES:,}",)
    else:
        data = _bytes(path)
        size = len(data)
        kind, version, problems = find_problems(path, data)
    return InspectReport(
        file=str(path),
        kind=kind,
        format_version=version,
        bytes=size,
        verification=Verification(problems=problems),
    )


def _compared(path: Path, other: Path) -> InspectReport:
    first, second = read_file(path), read_file(other)
    data, other_data = _bytes(path), _bytes(other)
    anchors = None
    if isinstance(first, AdapterFile) and isinstance(second, AdapterFile):
        kind: FileKind = "adapter"
        version = first.manifest.format_version
        fields = different_fields(first.manifest, second.manifest)
        anchors = compare_anchors(first, second)
    elif isinstance(first, TaskFile) and isinstance(second, TaskFile):
        kind = "task"
        version = first.record.format_version
        fields = different_fields(first.record, second.record)
    else:
        raise FormatError(
            f"{path} and {other} are an adapter and a task file.", "Compare two adapters, or two task files."
        )
    parts, same_parts = different_parts(first, second)
    return InspectReport(
        file=str(path),
        kind=kind,
        format_version=version,
        bytes=len(data),
        comparison=Comparison(
            other=str(other),
            other_bytes=len(other_data),
            identical=data == other_data,
            fields=fields,
            parts=parts,
            same_parts=same_parts,
            anchors=anchors,
        ),
    )


def _bytes(path: Path) -> bytes:
    """The file's bytes; anything but a regular file is refused before it is opened.

    :raises FormatError: When it cannot be read.
    """
    if not path.is_file():
        read_tensors(path)  # says why not, in the reader's own words
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}.", "Check its permissions.") from error
