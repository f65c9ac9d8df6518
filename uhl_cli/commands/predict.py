"""`uhl predict`: label texts, one chunk at a time.

Only one chunk of the texts is in memory.  Within it, texts are batched by length.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.labelled import Added, Labelled, OfTexts, OfWords
from uhl_cli.commands.options import HostOptions, PredictOptions
from uhl_cli.commands.outputs import claimed_output
from uhl_cli.commands.scoring import load
from uhl_cli.data import Examples, Task
from uhl_cli.data.columns import ColumnFlags, Columns, columns_to_label
from uhl_cli.data.load import sentences_of, texts_of, unlabelled_examples
from uhl_cli.data.parsing import Row
from uhl_cli.data.stream import STDIN, Rows, find_source, open_rows
from uhl_cli.data.tasks import Kind
from uhl_cli.data.writer import open_writer, written_form
from uhl_cli.errors import DataError, HostNotFoundError, UhlWarning, UsageError
from uhl_cli.formats.export import is_export
from uhl_cli.formats.folder import is_ported, ported_path, read_ported, read_tuned
from uhl_cli.formats.ported import load_ported
from uhl_cli.ported.model import Outputs, Progress
from uhl_cli.reports import PredictReport, Reporter, phase, silent
from uhl_cli.train.classifier import load_classifier

CHUNK_ROWS = 1024
_PAIRS = Columns(label="", text="text", pair="pair")


class Model(Protocol):
    """A model that predicts labels, such as `ported.model.PortedModel` or `train.classifier.Classifier`."""

    def outputs_of(
        self, examples: Examples, *, batch_size: int, max_length: int | None, progress: Progress | None
    ) -> Outputs:
        """Logits of every example."""


@dataclass(frozen=True)
class Opened:
    """What ADAPTER names, before its host is loaded.

    :param task: Its task; None for a transformers or peft checkpoint, which only has labels.
    :param load: Returns the model's name and the model.
    """

    kind: Kind
    labels: tuple[str, ...]
    task: Task | None
    load: Callable[[Reporter], tuple[str, Model]]

    @property
    def pairs(self) -> bool:
        """Whether it is known to take pairs of texts."""
        return self.task is not None and self.task.pair_column is not None


@dataclass(frozen=True)
class Chunk:
    """Rows of the input as read, their texts (words joined by spaces), and the examples made from them."""

    rows: list[Row]
    texts: list[str]
    examples: Examples


def run_predict(
    options: PredictOptions, reporter: Reporter = silent, show: Callable[[Labelled], bool] = lambda _: True
) -> PredictReport:
    """Label the texts that the options name, into a file or by `show`.

    The file appears only when everything is labelled.

    :param show: Without an output, takes one chunk after another; when it returns False, reading stops.
    :raises UhlError: Any of its kinds; nothing half-written is left.
    """
    if options.output is None:
        return _run(options, reporter, show)
    written_form(options.output)
    with claimed_output(options.output, overwrite=options.overwrite):
        return _run(options, reporter, show)


def _run(options: PredictOptions, reporter: Reporter, show: Callable[[Labelled], bool]) -> PredictReport:
    _refuse_idle(options)
    source = None if options.texts else find_source(_named(options), options.format)
    opened = _open(options)
    size = max(CHUNK_ROWS, options.batch_size)
    with ExitStack() as files:
        if source is None:
            rows = _arguments(options.texts, opened, size)
        else:
            words = opened.kind == "tokens"
            rows = files.enter_context(open_rows(source, size=size, words=words, encoding=options.encoding))
        columns = _columns(rows, opened, options)
        added = _added(opened, columns, options)
        chunks = _chunks(rows, columns, opened.kind, added)
        first = next(chunks)  # its errors come before the host is loaded
        if not any(text.strip() for text in first.texts):
            raise DataError(f"{rows.origin} holds no text.", "Give one with at least one text.")
        name, model = opened.load(reporter)
        started = time.monotonic()
        write = None
        if options.output is not None:
            write = files.enter_context(open_writer(options.output, rows.names, added.held, schema=rows.schema))
        texts, unsure, truncated, counts = 0, 0, 0, Counter[str]()
        chunk: Chunk | None = first
        while chunk is not None:
            outputs = model.outputs_of(
                chunk.examples,
                batch_size=options.batch_size,
                max_length=options.max_length,
                progress=_part(reporter, texts, rows.total),
            )
            predicted = added.rows(chunk.texts, chunk.examples, outputs.logits)
            texts, truncated = texts + len(predicted), truncated + outputs.truncated
            for row in predicted:
                unsure += added.labels(row).count(None)
                counts.update(added.counted(row))
            whole = [row | more for row, more in zip(chunk.rows, predicted, strict=True)]
            if write is not None:
                write(whole)
            elif not show(Labelled(chunk.texts, whole, added)):
                break
            chunk = next(chunks, None)
    return PredictReport(
        model=name,
        texts=texts,
        labels=dict(counts.most_common()),
        unsure=unsure,
        truncated=truncated,
        seconds=time.monotonic() - started,
        output=None if options.output is None else str(options.output),
    )


def _part(reporter: Reporter, before: int, total: int | None) -> Progress:
    """A reporter of a chunk that comes after `before` texts."""
    return lambda done, _: reporter("labelling", before + done, total)


def _chunks(rows: Rows, columns: Columns, kind: Kind, added: Added) -> Iterator[Chunk]:
    """One chunk after another; null texts are empty ones, and a warning at the end gives their number.

    :raises DataError: A row lacks a text or a list of words, or the input already has a column of an added name.
    """
    start = nulls = 0
    _refuse_taken(rows.names, added, rows.origin)
    for chunk in rows.chunks():
        if columns.tokens is not None:
            words = sentences_of(_values(chunk, columns.tokens, start), columns.tokens, rows.origin)
            texts = [" ".join(sentence) for sentence in words]
            examples = unlabelled_examples(words, kind=kind)
        else:
            assert columns.text is not None  # there are texts where there are no words
            texts = texts_of(_values(chunk, columns.text, start), columns.text, rows.origin)
            pairs = None
            if columns.pair is not None:
                pairs = texts_of(_values(chunk, columns.pair, start), columns.pair, rows.origin)
            examples = unlabelled_examples(texts, pairs, kind=kind)
            nulls += sum(row.get(columns.text) is None for row in chunk)
        for place, row in enumerate(chunk):
            where = f"row {start + place + 1} of {rows.origin}"
            _refuse_taken(row, added, where)
            _refuse_broken(texts[place] + (examples.pairs[place] if examples.pairs is not None else ""), where)
        yield Chunk(chunk, texts, examples)
        start += len(chunk)
    if nulls:
        warnings.warn(f"{nulls} null texts of {rows.origin} were read as empty.", UhlWarning, stacklevel=2)


def _values(chunk: Sequence[Row], column: str, start: int) -> Iterator[tuple[int, object]]:
    return ((start + place, row.get(column)) for place, row in enumerate(chunk))


def _refuse_taken(names: Collection[str], added: Added, where: str) -> None:
    for name in added.held:
        if name in names:
            raise DataError(
                f"{where} has a column {name!r} already.",
                "Rename the added columns, for example with --prefix predicted_.",
            )


def _refuse_broken(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON and arguments may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is not valid Unicode: {error.reason}.", "Write it in UTF-8.") from error


def _refuse_idle(options: PredictOptions) -> None:
    """:raises UsageError: An option has no effect, there are two inputs, or an export is the target of no adapter."""
    if options.texts and options.input is not None:
        raise UsageError(
            "both texts and --input were given; only one of them is read.", "Leave out --input, or the texts."
        )
    idle: dict[str, str] = {}
    path, target = options.adapter, options.target.name
    if not path.exists() and target is not None and is_export(Path(target)):  # then ADAPTER is the first text
        hint = f"An exported folder is a whole model: `uhl predict {target} TEXT`."
        raise UsageError(f"there is no file {path}.", hint)
    if options.texts:
        said = "the texts are on the command line"
        idle |= dict.fromkeys(("format", "encoding", "text_column", "pair_column", "tokens_column"), said)
    if is_ported(path):
        idle |= dict.fromkeys(("strategy", "max_flops"), f"{path} is already aligned")
        idle["task_file"] = f"{path} holds the tuned parameters"
    elif path.is_dir():
        names = ("target.name", "target.revision", "task_file", "strategy", "max_flops")
        idle |= dict.fromkeys(names, f"{path} is a classifier of its own")
    if options.output is None:
        idle["overwrite"] = "there is no --output"
    options.refuse_given(idle)


def _named(options: PredictOptions) -> str:
    """The input: the one that was named, or stdin if something is piped to it.

    :raises UsageError: Nothing was named, and stdin is a terminal.
    """
    if options.input is not None:
        return options.input
    if sys.stdin is not None and sys.stdin.isatty():
        raise UsageError("there is no text to label.", "Give texts after the adapter, or a file with --input.")
    return STDIN


def _arguments(texts: Sequence[str], opened: Opened, size: int) -> Rows:
    """The texts of the command line as rows."""
    given: list[Row] = [{"text": text} for text in texts]
    if opened.pairs:
        if len(texts) % 2:
            raise UsageError(
                f"the adapter takes pairs of texts, but {len(texts)} texts were given.",
                "Give two texts for each pair, or a table with --input.",
            )
        given = [{"text": text, "pair": pair} for text, pair in zip(texts[::2], texts[1::2], strict=True)]
    columns = _PAIRS if opened.pairs else Columns(label="", text="text")
    return Rows("the command line", iter(given), size=size, total=len(given), columns=columns)


def _columns(rows: Rows, opened: Opened, options: PredictOptions) -> Columns:
    flags = ColumnFlags(options.text_column, options.pair_column, None, options.tokens_column)
    if rows.columns is None or flags != ColumnFlags():
        return columns_to_label(rows, opened.kind, opened.task, flags)
    if opened.pairs and rows.columns.pair is None:
        raise DataError(
            f"{rows.origin} has one text per row, but the adapter takes pairs.",
            "Give a .tsv, .csv, .jsonl or .parquet file with a column for each.",
        )
    return rows.columns


def _added(opened: Opened, columns: Columns, options: PredictOptions) -> Added:
    prefix, threshold = options.prefix, options.threshold
    if opened.kind == "sequence":
        return OfTexts(opened.labels, prefix=prefix, top_k=options.top_k, threshold=threshold)
    options.refuse_given({"top_k": "a word only has the probability of its tag"})
    return OfWords(opened.labels, prefix=prefix, threshold=threshold, whole=columns.tokens is None)


def _open(options: PredictOptions) -> Opened:
    """What ADAPTER names: an adapter file, a ported folder, or a folder with a classifier.

    :raises UhlError: It cannot be read, or an adapter file comes without a target.
    """
    path = options.adapter
    if is_ported(path):
        return _open_ported(options)
    if path.is_dir():
        how = options.target.model_dump(include={"device", "dtype", "offline", "trust_remote_code", "tokenizer"})
        classifier = load_classifier(str(path), **how)
        return Opened(classifier.kind, classifier.labels, None, lambda _: (classifier.name, classifier))
    adapter = UniversalAdapter.load(path)
    if options.target.name is None:
        raise UsageError(f"{path} is an adapter file, which needs a model to run on.", "Name one with --target.")
    target, task, folder = HostOptions(**options.target.model_dump()), adapter.manifest.task, None
    if options.task_file is not None and is_ported(options.task_file):
        folder = options.task_file
        task = read_tuned(ported_path(folder), adapter.digest)[0].record.task
    elif options.task_file is not None:
        adapter = adapter.with_task(options.task_file)
        task = adapter.manifest.task

    def model(reporter: Reporter) -> tuple[str, Model]:
        host, how = load(target, cache=options.cache), options.strategy
        return host.name, adapter.port(
            host,
            task=folder,
            strategy=how,
            max_flops=options.max_flops,
            progress=phase(reporter, "aligning"),
            cache=options.cache,
        )

    return Opened(task.kind, task.labels, task, model)


def _open_ported(options: PredictOptions) -> Opened:
    path = ported_path(options.adapter)
    record = read_ported(path).record
    how = options.target.model_dump()
    how["tokenizer"] = how["tokenizer"] or record.tokenizer
    if options.target.name is None:  # a name that a file holds must not open a connection
        how |= {"name": record.target.name, "revision": record.target.revision, "offline": True}

    def model(_: Reporter) -> tuple[str, Model]:
        try:
            host = load(HostOptions(**how), cache=options.cache)
        except HostNotFoundError as error:
            if options.target.name is not None:
                raise
            problem = f"the host '{record.target.name}' of {options.adapter} cannot be found."
            raise HostNotFoundError(problem, "Give its path with --target.") from error
        return host.name, load_ported(path.parent, host)

    return Opened(record.task.kind, record.task.labels, record.task, model)
