"""Load a task's data: a name of the table, a hub id, or a local file or folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from pydantic import ValidationError

from uhl_cli.data.columns import ColumnFlags, Columns, resolve_columns
from uhl_cli.data.examples import Examples, TaskData, split_indices, subset_indices
from uhl_cli.data.labels import LabelMap, map_labels
from uhl_cli.data.quiet import quiet_datasets
from uhl_cli.data.rows import labelled_rows, read_rows
from uhl_cli.data.splits import HELD_OUT, Splits, Wanted, hub_splits, local_source, local_splits
from uhl_cli.data.table import Table
from uhl_cli.data.tasks import TASKS, Metric, Task, TaskRow
from uhl_cli.errors import DataError, UsageError

__all__ = ["load_task", "local_source"]

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
    seed: int = 0,
    need_train: bool = True,
    need_evaluation: bool = True,
) -> TaskData:
    """The examples of a task, the same for the same data, options and seed.

    :param name: A task of the table, a hub id, or a local file or folder.
    :param data: Where the data lies if not where `name` says: a local path or a hub id.
    :param config: The configuration of a hub dataset; `revision` its branch, tag or commit.
    :param train_split: The split to train on; in a local folder, how the file's name begins.
    :param labels: Names that the data must map onto, such as those an adapter knows.
    :param offline: Open no connection; take what is cached.
    :param limit_train: At most so many training examples, a seeded random subset.
    :param seed: For subsets, and for the tenth held out if there is no evaluation split.
    :param need_train: Whether to read training examples; `train` is None without.
    :raises DataError: If the data cannot be found or read, or is not a classification task.
    :raises LabelError: If the labels of the data are not among the known ones.
    :raises UsageError: If options contradict each other.
    """
    if not (need_train or need_evaluation):
        raise UsageError("Neither training nor evaluation data is asked for.", "Ask for one of them.")
    row = TASKS.get(name)
    wanted = Wanted(need_train, need_evaluation, train_split, evaluation_split)
    flags = ColumnFlags(text_column, pair_column, label_column, tokens_column)
    path = local_source(name, data)
    with quiet_datasets():
        if path is not None:
            if config is not None or revision is not None:
                raise UsageError(
                    "--config and --revision belong to hub datasets; the data is local.", "Leave them out."
                )
            splits = local_splits(path, wanted)
        else:
            splits = _from_hub(row, data or name, data is not None, config, revision, wanted, offline)
        columns = _columns(splits, row, flags)
        known = tuple(labels) if labels is not None else row.labels if row is not None else None
        label_map = _label_map(splits, columns, known)
        task = _task(_label(name, data) if row is None else name, row, columns, label_map.names)
        notes: list[str] = []
        parts = _parts(splits, columns, label_map, wanted, seed, notes)
        limits = {"train": limit_train, "evaluation": limit_evaluation}
        read: dict[str, Examples] = {}
        for part, (table, indices) in parts.items():
            chosen = [indices[each] for each in subset_indices(len(indices), limits[part], seed)]
            if len(chosen) < len(indices):
                notes.append(f"{part} limited to {len(chosen)} of {len(indices)} (seed {seed})")
            read[part] = read_rows(table, columns, label_map, chosen)
    source = "; ".join([", ".join(table.origin for table in splits.tables), *notes])
    return TaskData(task, read.get("train"), read.get("evaluation"), source)


def _from_hub(
    row: TaskRow | None,
    hub: str,
    moved: bool,
    config: str | None,
    revision: str | None,
    wanted: Wanted,
    offline: bool,
) -> Splits:
    if row is not None and row.hub is not None and (not moved or hub == row.hub):
        # A flag goes before the row; the row's config and revision belong to its own dataset only.
        return hub_splits(row.hub, config or row.config, revision or row.revision, row, wanted, offline)
    return hub_splits(hub, config, revision, row, wanted, offline)


def _columns(splits: Splits, row: TaskRow | None, flags: ColumnFlags) -> Columns:
    for table in splits.tables:
        if len(table) == 0:
            raise DataError(f"{table.origin} has no rows.", "Give data with labelled rows.")
    columns = resolve_columns(splits.tables[0], row, flags)
    for table in splits.tables[1:]:
        missing = [name for name in columns.used if name not in table.names]
        if missing:
            raise DataError(
                f"{table.origin} lacks the column(s) {', '.join(missing)} of {splits.tables[0].origin}.",
                "Give training and evaluation data the same column names.",
            )
    return columns


def _label_map(splits: Splits, columns: Columns, known: tuple[str, ...] | None) -> LabelMap:
    def values() -> Iterator[object]:
        for table in splits.tables:
            for value in table.column(columns.label):
                if columns.kind == "tokens" and isinstance(value, list):
                    yield from value
                else:
                    yield value

    origin = " and ".join(table.origin for table in splits.tables)
    return map_labels(values(), splits.tables[0].class_names(columns.label), known, origin)


def _label(name: str, data: str | None) -> str:
    """The task's name in adapter files, which are given away: no path of this machine in it.

    With `data`, the name is nothing but a name, and may come out of a stranger's file: no file is looked for.
    """
    if data is not None:
        return PurePath(name).name or name if name.startswith(("/", ".", "~", "\\")) else name
    path = Path(name).expanduser()
    if path.is_file():
        return path.absolute().stem
    return path.absolute().name if path.exists() or name.startswith(".") else name


def _task(name: str, row: TaskRow | None, columns: Columns, names: tuple[str, ...]) -> Task:
    entities = columns.kind == "tokens" and all(_ENTITY_TAG.fullmatch(each) for each in names)
    metric: Metric = "entity_f1" if entities else "accuracy"
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
    for part, table in (("train", splits.train), ("evaluation", splits.evaluation)):
        if table is None:
            continue
        indices = labelled_rows(table, columns, label_map)
        if len(indices) < len(table):
            notes.append(f"{len(table) - len(indices)} unlabelled or empty rows of {table.origin} left out")
        if not splits.held_out:
            parts[part] = (table, indices)
            continue
        rest, held_out = split_indices(len(indices), HELD_OUT, seed)
        notes.append(f"{len(held_out)} of its rows held out for evaluation (seed {seed})")
        if wanted.train:
            parts["train"] = (table, [indices[each] for each in rest])
        parts["evaluation"] = (table, [indices[each] for each in held_out])
    return parts
