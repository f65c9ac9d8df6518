"""Load a task's data: a name of the table, a hub id, or a local file or folder."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from uhl_cli.data.columns import ColumnFlags, Columns, find_column, has_labels, resolve_columns, unlabelled_columns
from uhl_cli.data.examples import Examples, TaskData, split_indices, subset_indices, token_examples
from uhl_cli.data.files import read_files, read_lines
from uhl_cli.data.labels import LabelMap, as_iob2, map_labels
from uhl_cli.data.splits import HELD_OUT, Splits, Wanted, hub_splits, local_source, local_splits
from uhl_cli.data.table import Table, quiet_datasets
from uhl_cli.data.tasks import TASKS, Kind, Metric, Task, TaskRow
from uhl_cli.errors import DataError, NoLabelsError, UhlWarning, UsageError

# As many different labels as a table with one in most rows needs for a warning.
_MANY = 10
# Labels that a warning lists.
_SHOWN = 10
_ENTITY_TAG = re.compile(r"O|[BIES]-.+", re.DOTALL)


def load_task(
    name: str,
    *,
    data: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    evaluation_split: str | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    tokens_column: str | None = None,
    labels: Sequence[str] | None = None,
    offline: bool = False,
    limit_train: int | None = None,
    limit_evaluation: int | None = None,
    encoding: str | None = None,
    seed: int = 0,
    need_train: bool = True,
    need_evaluation: bool = True,
) -> TaskData:
    """The examples of a task, the same for the same data, options and seed.

    Rows without a label are left out, and null texts are empty ones.  IOB1's tags become IOB2's.  Warns (`UhlWarning`)
    of rows left out, of an evaluation split without labels, of classes that the training part lacks, and of labels that
    are nearly all different.

    :param name: A task of the table, a hub id, or a local file or folder.
    :param data: Location of the data if `name` is not it: a local path or a hub id.
    :param config: The configuration of a hub dataset; `revision` its branch, tag or commit.
    :param train_split: The split to train on; in a local folder, how the file's name begins.
    :param labels: Names that the data's labels must map to, such as an adapter's.
    :param offline: Open no connection; use caches only.
    :param limit_train: Maximum number of training examples, a seeded random subset.
    :param encoding: Encoding of local text files; None is UTF-8.
    :param seed: For subsets, and for the tenth held out if there is no evaluation split.
    :param need_train: Whether to read training examples; if not, `train` is None.
    :raises DataError: If the data cannot be found or read, or is not a classification task.
    :raises LabelError: If the labels of the data are not among the known ones.
    :raises UsageError: If options contradict each other, or there is no such encoding.
    """
    if not (need_train or need_evaluation):
        raise UsageError("Neither training nor evaluation data is asked for.", "Ask for one of them.")
    row = TASKS.get(name)
    flags = ColumnFlags(text_column, pair_column, label_column, tokens_column)
    wanted = Wanted(
        need_train, need_evaluation, train_split, evaluation_split, encoding, lambda table: _labelled(table, row, flags)
    )
    path = local_source(name, data)
    with quiet_datasets():
        if path is not None:
            if config is not None or revision is not None:
                raise UsageError(
                    "--config and --revision belong to hub datasets; the data is local.", "Leave them out."
                )
            splits = local_splits(path, wanted)
        else:
            hub = data or name
            if row is not None and row.hub is not None and data in (None, row.hub):
                # A flag overrides the row; the row's config and revision belong to its own dataset only.
                hub, config, revision = row.hub, config or row.config, revision or row.revision
            splits = hub_splits(hub, config, revision, row, wanted, offline)
        splits, columns = _columns(splits, row, flags)
        known = tuple(labels) if labels is not None else row.labels if row is not None else None
        label_map = _label_map(splits, columns, known)
        if known is None:
            _warn_of_ids(splits, columns, label_map)
        task = _task(_label(name, data) if row is None else name, row, columns, label_map.names)
        notes: list[str] = []
        parts = _parts(splits, columns, label_map, wanted, seed, notes)
        limits = {"train": limit_train, "evaluation": limit_evaluation}
        read: dict[str, Examples] = {}
        for part, (table, indices) in parts.items():
            chosen = [indices[each] for each in subset_indices(len(indices), limits[part], seed)]
            if len(chosen) < len(indices):
                notes.append(f"{part} limited to {len(chosen)} of {len(indices)} (seed {seed})")
            read[part] = _read_rows(table, columns, label_map, chosen)
    if limit_train is None:
        _warn_of_unseen(read, task)
    source = "; ".join([", ".join(table.origin for table in splits.tables), *notes])
    return TaskData(task, read.get("train"), read.get("evaluation"), source)


@dataclass(frozen=True)
class Unlabelled:
    """Texts without labels, as examples with placeholder classes (all 0).

    :param columns: Where they were read from; `label` is empty.
    :param source: The same for display.
    """

    name: str
    examples: Examples
    columns: Columns
    source: str


def load_unlabelled(
    name: str,
    *,
    kind: Kind,
    data: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    tokens_column: str | None = None,
    offline: bool = False,
    limit: int | None = None,
    encoding: str | None = None,
    seed: int = 0,
) -> Unlabelled | None:
    """The texts of unlabelled data; None if the data has labels, so that `load_task` can read it.

    A .txt file has one text per line; for a token task it may be in CoNLL's columns, and is then labelled.  Empty texts
    are left out.  Texts that are not split into words are split at spaces.

    :param kind: The kind of task that the texts are for; other parameters are those of `load_task`.
    :raises DataError: If the data cannot be found or read, or holds no text.
    :raises UsageError: If options contradict each other.
    """
    row = TASKS.get(name)
    path = local_source(name, data)
    flags = ColumnFlags(text_column, pair_column, label_column, tokens_column)
    wanted = Wanted(train=True, evaluation=False, train_split=train_split, encoding=encoding)
    shown = _label(name, data) if row is None else name
    columns, pairs = Columns(label="", text="text"), None
    with quiet_datasets():
        if path is not None and path.is_file() and path.suffix.casefold() == ".txt":
            if kind == "tokens" and _reads_as_conll(path, encoding):
                return None
            origin = f"{path.absolute().parent.name}/{path.name}"
            texts: list[Any] = read_lines(path, encoding)
        else:
            if path is not None:
                table = local_splits(path, wanted).train
            else:
                hub = data or name
                if row is not None and row.hub is not None and data in (None, row.hub):
                    hub, config, revision = row.hub, config or row.config, revision or row.revision
                table = hub_splits(hub, config, revision, row, wanted, offline).train
            assert table is not None  # it is wanted
            found = unlabelled_columns(table, row, flags)
            if found is None:
                return None
            columns, origin, everything = found, table.origin, range(len(table))
            if columns.tokens is not None:
                texts = _sentences(table, columns.tokens, everything)
            else:
                assert columns.text is not None  # unlabelled_columns gives either tokens or text
                texts = list(_texts(table, columns.text, everything))
                pairs = None if columns.pair is None else _texts(table, columns.pair, everything)
    kept = [index for index, text in enumerate(texts) if (text if isinstance(text, list) else text.strip())]
    chosen = [kept[index] for index in subset_indices(len(kept), limit, seed)]
    if not chosen:
        raise DataError(f"{origin} holds no text.", "Give a file with one text a line, or a table with a text column.")
    texts = [texts[index] for index in chosen]
    examples = unlabelled_examples(texts, None if pairs is None else [pairs[index] for index in chosen], kind=kind)
    return Unlabelled(shown, examples, columns, f"{origin}, {len(chosen)} texts without labels")


def unlabelled_examples(
    texts: Sequence[str | Sequence[str]], pairs: Sequence[str] | None = None, *, kind: Kind
) -> Examples:
    """Examples of texts, or of their words, with placeholder classes (all 0); for a token task, pairs are left out.

    Texts are split into words at spaces.
    """
    if kind == "tokens":
        words = [text.split() if isinstance(text, str) else list(text) for text in texts]
        return token_examples(words, [[0] * len(row) for row in words])
    whole = tuple(text if isinstance(text, str) else " ".join(text) for text in texts)
    return Examples(whole, None if pairs is None else tuple(pairs), labels=(0,) * len(whole))


def _reads_as_conll(path: Path, encoding: str | None) -> bool:
    try:
        read_files([path], encoding)
    except DataError:
        return False
    return True


def _labelled(table: Table, row: TaskRow | None, flags: ColumnFlags) -> bool:
    """Whether a split has a label; one whose column cannot be told has, so that the error is that of its columns."""
    if not has_labels(table, row, flags):
        return False
    try:
        columns = resolve_columns(table, row, flags)
        map_labels(_tags_or_labels(table, columns), table.class_names(columns.label), None, table.origin)
    except NoLabelsError:
        return False
    except DataError:
        return True
    return True


def _columns(splits: Splits, row: TaskRow | None, flags: ColumnFlags) -> tuple[Splits, Columns]:
    """The columns of the first split, and all splits with its columns' names.

    :raises DataError: A split has no row, lacks a column, or the columns cannot be told.
    """
    for table in splits.tables:
        if len(table) == 0:
            raise DataError(f"{table.origin} has no rows.", "Give data with labelled rows.")
    columns = resolve_columns(splits.tables[0], row, flags)
    if splits.train is None or splits.evaluation is None:
        return splits, columns
    found = {name: find_column(splits.evaluation, name) for name in columns.used}
    missing = [name for name, own in found.items() if own is None]
    if missing:
        raise DataError(
            f"{splits.evaluation.origin} lacks the column(s) {', '.join(missing)} of {splits.train.origin}.",
            "Give training and evaluation data the same column names.",
        )
    names = {own: name for name, own in found.items() if own is not None and own != name}
    return replace(splits, evaluation=splits.evaluation.renamed(names)), columns


def _label_map(splits: Splits, columns: Columns, known: tuple[str, ...] | None) -> LabelMap:
    values = chain.from_iterable(_tags_or_labels(table, columns, known) for table in splits.tables)
    origin = " and ".join(table.origin for table in splits.tables)
    words = columns.kind == "tokens"
    return map_labels(values, splits.tables[0].class_names(columns.label), known, origin, words=words)


def _tags_or_labels(table: Table, columns: Columns, known: Sequence[str] | None = None) -> Iterator[object]:
    """The values of the label column, of a token task those in its lists."""
    for value in _labels(table, columns, known):
        if columns.kind == "tokens" and isinstance(value, list):
            yield from value
        else:
            yield value


def _labels(
    table: Table, columns: Columns, known: Sequence[str] | None, indices: Sequence[int] | None = None
) -> Iterator[object]:
    """The values of the label column, lists of IOB1's tags as IOB2's."""
    for value in table.column(columns.label, indices):
        yield as_iob2(value, known) if columns.kind == "tokens" and isinstance(value, list) else value


def _label(name: str, data: str | None) -> str:
    """The task's name in adapter files, which are shared: it contains no local path.

    With `data`, the name is only a name, and may come from an untrusted file: no file is searched for.
    """
    if data is not None:
        return PurePath(name).name or name if name.startswith(("/", ".", "~", "\\")) else name
    path = Path(name).expanduser()
    if path.is_file():
        return path.absolute().stem
    return path.absolute().name if path.exists() or name.startswith(".") else name


def metric_of(kind: Kind, names: Sequence[str]) -> Metric:
    """The default metric of a task: entity F1 if all labels are entity tags, otherwise accuracy."""
    return "entity_f1" if kind == "tokens" and all(_ENTITY_TAG.fullmatch(each) for each in names) else "accuracy"


def _task(name: str, row: TaskRow | None, columns: Columns, names: tuple[str, ...]) -> Task:
    metric: Metric = metric_of(columns.kind, names)
    try:
        return Task(
            name=name,
            kind=columns.kind,
            labels=names,
            metric=metric if row is None else row.metric,
            text_column=columns.text,
            pair_column=columns.pair,
            label_column=columns.label,
            tokens_column=columns.tokens,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise DataError(
            f"{name!r} makes no task: {where} {problem['msg']}.", "Choose other columns or labels."
        ) from error


def _parts(
    splits: Splits, columns: Columns, label_map: LabelMap, wanted: Wanted, seed: int, notes: list[str]
) -> dict[str, tuple[Table, list[int]]]:
    """The rows of each part that is needed, as indices into its table."""
    parts: dict[str, tuple[Table, list[int]]] = {}
    if splits.unlabelled is not None:
        notes.append(f"{splits.unlabelled} has no labels")
        _warn(f"{splits.unlabelled} has no labels: the scores are of training rows that are held out.")
    for part, table in (("train", splits.train), ("evaluation", splits.evaluation)):
        if table is None:
            continue
        indices = _labelled_rows(table, columns, label_map)
        if len(indices) < len(table):
            left_out = f"{len(table) - len(indices)} unlabelled or empty rows of {table.origin} left out"
            notes.append(left_out)
            _warn(f"{left_out}, of {len(table)}.")
        if not splits.held_out:
            parts[part] = (table, indices)
            continue
        rest, held_out = split_indices(len(indices), HELD_OUT, seed)
        notes.append(f"{len(held_out)} of its rows held out for evaluation (seed {seed})")
        if wanted.train:
            parts["train"] = (table, [indices[each] for each in rest])
        parts["evaluation"] = (table, [indices[each] for each in held_out])
    return parts


def _labelled_rows(table: Table, columns: Columns, label_map: LabelMap) -> list[int]:
    """Indices of the rows that have a label; for token tasks, of the sentences that have words and tags.

    :raises DataError: If there are none, or a sentence has tags on some of its words only.
    """
    indices = []
    for index, value in enumerate(_labels(table, columns, label_map.names)):
        if columns.kind == "sequence":
            if label_map.ids[value] is not None:
                indices.append(index)
            continue
        if value is None:
            continue
        if not isinstance(value, list):
            raise _bad(table.origin, index, columns.label, "a list of tags", value)
        tagged = [label_map.ids[tag] is not None for tag in value]
        if any(tagged) and not all(tagged):
            raise DataError(
                f"Row {index + 1} of {table.origin} has words without a tag.",
                "Tag each word; write O outside.",
            )
        if any(tagged):
            indices.append(index)
    if not indices:
        raise DataError(
            f"No row of {table.origin} has a label.",
            "Choose another split (the labels of test splits are often hidden) or another --label-column.",
        )
    return indices


def _read_rows(table: Table, columns: Columns, label_map: LabelMap, indices: Sequence[int]) -> Examples:
    """The examples in the rows at `indices`, all of which have labels.

    :raises DataError: If a text is not text, no text holds anything, or words and tags differ in number.
    """
    raw_labels = list(_labels(table, columns, label_map.names, indices))
    if columns.tokens is None:
        assert columns.text is not None  # resolve_columns gives either tokens or text
        texts = _texts(table, columns.text, indices)
        if not any(text.strip() for text in texts):
            raise DataError(
                f"Column {columns.text!r} of {table.origin} holds no text.", "Choose another --text-column."
            )
        return Examples(
            texts=texts,
            pairs=None if columns.pair is None else _texts(table, columns.pair, indices),
            labels=tuple(_class_id(label_map, value) for value in raw_labels),
        )
    words: list[list[str]] = []
    tags: list[list[int]] = []
    sentences = _sentences(table, columns.tokens, indices)
    for index, sentence, row in zip(indices, sentences, raw_labels, strict=True):
        assert isinstance(row, list)  # _labelled_rows took no other
        if len(sentence) != len(row):
            raise DataError(
                f"Row {index + 1} of {table.origin} has {len(sentence)} words but {len(row)} tags.",
                "Give one tag a word.",
            )
        words.append(sentence)
        tags.append([_class_id(label_map, tag) for tag in row])
    return token_examples(words, tags)


def _sentences(table: Table, column: str, indices: Sequence[int]) -> list[list[str]]:
    return sentences_of(zip(indices, table.column(column, indices), strict=True), column, table.origin)


def _texts(table: Table, column: str, indices: Sequence[int]) -> tuple[str, ...]:
    values = table.column(column, indices)
    if None in values:
        _warn(f"{values.count(None)} null texts in column {column!r} of {table.origin} were read as empty.")
    return tuple(texts_of(zip(indices, values, strict=True), column, table.origin))


def sentences_of(values: Iterable[tuple[int, object]], column: str, origin: str) -> list[list[str]]:
    """The values of a column of words, given with their indices, after checking that they are lists of words.

    :raises DataError: If one is not; names its row.
    """
    sentences: list[list[str]] = []
    for index, sentence in values:
        if not isinstance(sentence, list):
            raise _bad(origin, index, column, "a list of words", sentence)
        if not all(isinstance(word, str) for word in sentence):
            raise DataError(
                f"Column {column!r} is not a list of words alone in row {index + 1} of {origin}.",
                "Write each word as text, not null or a number.",
            )
        sentences.append(sentence)
    return sentences


def texts_of(values: Iterable[tuple[int, object]], column: str, origin: str) -> list[str]:
    """The values of a column of texts, given with their indices, after checking that they are texts; null is empty.

    :raises DataError: If one is not; names its row.
    """
    texts: list[str] = []
    for index, value in values:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            value = ""
        if not isinstance(value, str):
            raise _bad(origin, index, column, "text", value)
        texts.append(value)
    return texts


def _warn(text: str) -> None:
    warnings.warn(text, UhlWarning, stacklevel=2)


def _warn_of_ids(splits: Splits, columns: Columns, label_map: LabelMap) -> None:
    """Warn when most rows of a table have a label of their own, as a column of ids has."""
    rows = sum(len(table) for table in splits.tables)
    if columns.kind == "sequence" and len(label_map.names) >= _MANY and 2 * len(label_map.names) > rows:
        _warn(
            f"column {columns.label!r} of {splits.tables[0].origin} has {len(label_map.names)} different labels in "
            f"{rows} rows, like ids; another column may be the label's (--label-column)."
        )


def _warn_of_unseen(read: Mapping[str, Examples], task: Task) -> None:
    """Warn of classes in the evaluation part that the training part lacks, so that they cannot be learnt."""
    if len(read) == 2:
        train, scored = (part.label_counts(len(task.labels)) for part in (read["train"], read["evaluation"]))
        unseen = [name for name, own, other in zip(task.labels, train, scored, strict=True) if other and not own]
        if unseen:
            more = f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else ""
            _warn(f"no training example has the label {', '.join(unseen[:_SHOWN])}{more}, but evaluation examples do.")


def _class_id(label_map: LabelMap, value: object) -> int:
    label = label_map.ids[value]
    assert label is not None  # _labelled_rows took no other
    return label


def _bad(origin: str, index: int, column: str, wanted: str, value: object) -> DataError:
    found = "null" if value is None else f"of type {type(value).__name__}"
    return DataError(
        f"Column {column!r} is {found} in row {index + 1} of {origin}, not {wanted}.",
        "Repair or remove the row, or choose another column.",
    )
