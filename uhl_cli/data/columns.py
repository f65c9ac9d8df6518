"""Find the columns of the text and the labels: by flag, by the task's row, or by name when only one fits.

A name fits whatever its case and the spaces around it, unless one fits exactly.  If two columns fit, none is
chosen: the error lists the columns and names the flag that decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from uhl_cli.data.labels import MULTI_LABEL_HINT
from uhl_cli.data.parsing import shown_columns
from uhl_cli.data.tasks import TASKS, Kind, Task, TaskRow
from uhl_cli.errors import DataError, UsageError

PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "passage"),
    ("question", "sentence"),
)
TEXT_NAMES = (
    "sentence",
    "text",
    "content",
    "question",
    "review",
    "review_body",
    "comment",
    "tweet",
    "document",
    "sentence1",
    "premise",
    "question1",
)
LABEL_NAMES = ("label", "labels", "answer", "target", "class", "category", "sentiment")
TOKENS_NAMES = ("tokens", "words")
TAGS_NAMES = ("ner_tags", "tags", "labels")


class Named(Protocol):
    """The interface of a table for choosing columns; `table.Table` and `stream.Rows` implement it."""

    @property
    def origin(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    def is_list(self, name: str) -> bool: ...


@dataclass(frozen=True)
class ColumnFlags:
    """The columns that the user named; None where not given."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    tokens: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of one task: `tokens` is set for a token task, `text` for a sequence task."""

    label: str
    text: str | None = None
    pair: str | None = None
    tokens: str | None = None

    @property
    def kind(self) -> Kind:
        """The kind of task that these columns serve."""
        return "tokens" if self.tokens is not None else "sequence"

    @property
    def used(self) -> tuple[str, ...]:
        """The names of all columns in use."""
        return tuple(name for name in (self.tokens, self.text, self.pair, self.label) if name is not None)


def resolve_columns(table: Named, row: TaskRow | None, flags: ColumnFlags) -> Columns:
    """The columns of `table`: flags first, then the row with its aliases, then inference.

    :raises DataError: If a column is absent, or two fit and no flag decides.
    :raises UsageError: If the flags ask for a text task and a token task at once.
    """
    flags = _checked(table, flags)
    if row is not None:
        return _row_columns(table, row, flags)
    if flags.tokens is not None:
        return Columns(tokens=flags.tokens, label=flags.label or _only(table, TAGS_NAMES, True, "tags"))
    if flags.text is None and flags.pair is None:
        tokens = _present(table, TOKENS_NAMES, lists=True)
        tags = [flags.label] if flags.label else _present(table, TAGS_NAMES, lists=True)
        if tokens and any(table.is_list(name) for name in tags):
            if _present(table, TEXT_NAMES) and _present(table, LABEL_NAMES) and not flags.label:
                raise _problem(table, "columns for both words and texts", "--tokens-column or --text-column")
            return Columns(
                tokens=_only(table, TOKENS_NAMES, True, "tokens"),
                label=flags.label or _only(table, TAGS_NAMES, True, "tags"),
            )
    text, pair = _text_columns(table, flags)
    label = flags.label or _only(table, LABEL_NAMES, False, "label")
    return Columns(text=text, pair=pair, label=label)


def unlabelled_columns(table: Named, row: TaskRow | None, flags: ColumnFlags) -> Columns | None:
    """The columns of texts or words without labels (`label` is empty); None if there is a label column.

    :raises DataError: If a column is absent, or two fit and no flag decides.
    :raises UsageError: If the flags ask for a text task and a token task at once.
    """
    flags = _checked(table, flags)
    return None if has_labels(table, row, flags) else _texts_or_words(table, row, flags)


def has_labels(table: Named, row: TaskRow | None, flags: ColumnFlags) -> bool:
    """Whether the table has a column of labels: the one of the flag, or one with a usual name."""
    if flags.label is not None:
        return find_column(table, flags.label) is not None
    labels: tuple[str, ...] = (*LABEL_NAMES, *TAGS_NAMES)
    if row is not None:
        labels = (row.label_column, *row.aliases.get(row.label_column, ()))
    return any(find_column(table, name) is not None for name in labels)


def columns_to_label(table: Named, kind: Kind, task: Task | None, flags: ColumnFlags) -> Columns:
    """The columns of the texts, or words, for a model to label (`label` is empty).

    Order of precedence: flags, then the columns of the package's task or those that the user's own task was trained on,
    if present, then inference.

    :param kind: What the model labels: texts or words.
    :param task: Its task, if known.
    :raises DataError: If a column is absent, two fit and no flag decides, or a task on two texts finds only one.
    :raises UsageError: If the flags contradict each other or the model.
    """
    flags = _checked(table, flags)
    if kind == "tokens" and flags.pair:
        raise UsageError("The model tags words; it takes no second text.", "Leave out --pair-column.")
    row = None if task is None else TASKS.get(task.name)
    if row is not None and row.kind != kind:  # another task with the same name
        row = None
    if task is not None and row is None and flags == ColumnFlags():
        own = {name: find_column(table, getattr(task, f"{name}_column")) for name in ("text", "pair", "tokens")}
        found = {name: each for name, each in own.items() if each and table.is_list(each) == (name == "tokens")}
        flags = ColumnFlags(**found)
    columns = _texts_or_words(table, row, flags)
    if task is not None and task.pair_column is not None and columns.pair is None:
        raise _problem(table, f"one text a row, and {task.name} takes two", "--pair-column")
    return columns


def find_column(table: Named, name: str | None) -> str | None:
    """The column of this name, else the only one of this name in another case or with spaces around it, else None."""
    if name is None or name in table.names:
        return name
    found = [each for each in table.names if each.strip().casefold() == name.strip().casefold()]
    return found[0] if len(found) == 1 else None


def _texts_or_words(table: Named, row: TaskRow | None, flags: ColumnFlags) -> Columns:
    words = _present(table, TOKENS_NAMES, lists=True)
    if flags.tokens is not None or (words and flags.text is None):
        return Columns(label="", tokens=flags.tokens or _only(table, TOKENS_NAMES, True, "tokens"))
    if row is not None and row.text_column is not None and flags.text is None:
        text = _row_column(table, row, row.text_column, "--text-column")
        pair = flags.pair
        if pair is None and row.pair_column is not None:
            pair = _row_column(table, row, row.pair_column, "--pair-column")
    else:
        text, pair = _text_columns(table, flags)
    return Columns(label="", text=text, pair=pair)


def _checked(table: Named, flags: ColumnFlags) -> ColumnFlags:
    """The flags with the columns' names as in the table."""
    if flags.tokens and (flags.text or flags.pair):
        raise UsageError(
            "A tokens column and a text column exclude each other.",
            "Give --tokens-column for tagging words, --text-column for classifying texts.",
        )
    for flag in fields(flags):
        name = getattr(flags, flag.name)
        if name is not None and find_column(table, name) is None:
            raise _problem(table, f"no column {name!r}", f"--{flag.name}-column")
    return ColumnFlags(**{flag.name: find_column(table, getattr(flags, flag.name)) for flag in fields(flags)})


def _row_columns(table: Named, row: TaskRow, flags: ColumnFlags) -> Columns:
    if row.kind == "tokens":
        if flags.text or flags.pair:
            raise UsageError(f"{row.name} tags words; it has no text column.", "Give --tokens-column instead.")
        return Columns(
            tokens=flags.tokens or _row_column(table, row, row.tokens_column, "--tokens-column"),
            label=flags.label or _row_column(table, row, row.label_column, "--label-column"),
        )
    if flags.tokens:
        raise UsageError(f"{row.name} classifies texts; it has no tokens column.", "Give --text-column instead.")
    text = flags.text or _row_column(table, row, row.text_column, "--text-column")
    pair = flags.pair
    # A text column that the user chose has no pair: the row's pair belongs to the row's own text column.
    if pair is None and row.pair_column is not None and flags.text is None:
        pair = _row_column(table, row, row.pair_column, "--pair-column")
    label = flags.label or _row_column(table, row, row.label_column, "--label-column")
    return Columns(text=text, pair=pair, label=label)


def _row_column(table: Named, row: TaskRow, column: str | None, flag: str) -> str:
    assert column is not None  # the table of tasks is checked by a test
    names = (column, *row.aliases.get(column, ()))
    for name in names:
        found = find_column(table, name)
        if found is not None:
            return found
    raise _problem(table, f"no column {' or '.join(repr(name) for name in names)} for {row.name}", flag)


def _text_columns(table: Named, flags: ColumnFlags) -> tuple[str, str | None]:
    if flags.text is not None:
        return flags.text, flags.pair
    found = [name for name in _present(table, TEXT_NAMES) if name not in (flags.pair, flags.label)]
    if flags.pair is None:
        for names in PAIR_NAMES:
            text, pair = (find_column(table, name) for name in names)
            if text in found and pair is not None and set(found) <= {text, pair}:
                return text, pair
    if len(found) == 1:
        return found[0], flags.pair
    what = f"several text columns ({', '.join(found)})" if found else "no known text column"
    raise _problem(table, what, "--text-column (and --pair-column)")


def _present(table: Named, names: Sequence[str], lists: bool = False) -> list[str]:
    present = (find_column(table, name) for name in names)
    return [name for name in present if name is not None and table.is_list(name) == lists]


def _only(table: Named, names: Sequence[str], lists: bool, what: str) -> str:
    found = _present(table, names, lists)
    if len(found) == 1:
        return found[0]
    if not found and what == "label" and (listed := _present(table, names, lists=True)):
        raise DataError(f"Column {listed[0]!r} of {table.origin} holds lists: multi-label data.", MULTI_LABEL_HINT)
    problem = f"several {what} columns ({', '.join(found)})" if found else f"no known {what} column"
    raise _problem(table, problem, "--tokens-column" if what == "tokens" else "--label-column")


def _problem(table: Named, problem: str, flag: str) -> DataError:
    hint = f"Name the column with {flag}."
    if table.origin.endswith((".csv", ".tsv")):
        hint += " The first line of the file must hold the column names."
    return DataError(f"{table.origin} has {problem}; its columns are {shown_columns(table.names)}.", hint)
