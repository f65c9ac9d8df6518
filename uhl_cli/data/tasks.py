"""The definition of a task, and the table of the tasks that uhl knows by name.

A `Task` is all that an adapter stores about its training data: enough to read other data of the same form and to score
predictions on it.  A `TaskRow` adds the location of a named task's data on the hub.  A task without a row
works as well: its columns and labels are read from the data.

This module imports neither torch nor datasets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["sequence", "tokens"]
Metric = Literal["accuracy", "f1", "entity_f1"]

# A task may come from an untrusted adapter file, so everything in it is bounded.
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class Task(BaseModel):
    """A classification task: its labels, its metric, the columns it was read from.

    `labels[i]` is the name of class id `i`.  A sequence task has a `text_column` and optionally a `pair_column`; a
    token task has a `tokens_column`.  Both have a `label_column`.

    :raises pydantic.ValidationError: If the columns do not fit the kind, there are fewer than two labels, or a label is
        duplicated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: _Name
    kind: Kind
    labels: Annotated[tuple[_Name, ...], Field(max_length=1000)]
    metric: Metric
    text_column: _Name | None = None
    pair_column: _Name | None = None
    label_column: _Name
    tokens_column: _Name | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError("a task needs two or more labels, each once")
        if self.kind == "sequence" and (self.text_column is None or self.tokens_column is not None):
            raise ValueError("a sequence task has a text_column and no tokens_column")
        if self.kind == "tokens" and (self.tokens_column is None or self.text_column or self.pair_column):
            raise ValueError("a token task has a tokens_column and neither text_column nor pair_column")
        if self.kind == "sequence" and self.metric == "entity_f1":
            raise ValueError("entity_f1 scores token tasks only")
        if self.kind == "tokens" and self.metric == "f1":
            raise ValueError("token tasks are scored by entity_f1 or accuracy")
        return self


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """A named task: location of its data, columns, labels and metric.

    The data is the hub dataset `hub`, or for a builtin task the package's own `folder`; one of them is None. `aliases`
    maps a column of the hub dataset to its names in local files, which are tried in order after the hub's own name.
    """

    name: str
    kind: Kind
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    evaluation_split: str = "validation"
    label_column: str
    labels: tuple[str, ...]
    metric: Metric
    text_column: str | None = None
    pair_column: str | None = None
    tokens_column: str | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: Path | None = None


_ROWS = (
    TaskRow(
        name="sst2",
        kind="sequence",
        hub="nyu-mll/glue",
        config="sst2",
        text_column="sentence",
        label_column="label",
        labels=("negative", "positive"),
        metric="accuracy",
        aliases={"sentence": ("text",)},
    ),
    TaskRow(
        name="boolq",
        kind="sequence",
        hub="google/boolq",
        text_column="question",
        pair_column="passage",
        label_column="answer",
        labels=("no", "yes"),
        metric="accuracy",
        aliases={"answer": ("label",)},
    ),
    TaskRow(
        name="conll2003",
        kind="tokens",
        hub="eriktks/conll2003",
        revision="refs/convert/parquet",  # the main revision is a script, which datasets no longer runs
        tokens_column="tokens",
        label_column="ner_tags",
        labels=("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"),
        metric="entity_f1",
        aliases={"tokens": ("words",), "ner_tags": ("tags", "labels")},
    ),
    TaskRow(
        name="amazon",
        kind="sequence",
        hub="fancyzhx/amazon_polarity",
        evaluation_split="test",
        text_column="title",
        pair_column="content",
        label_column="label",
        labels=("negative", "positive"),
        metric="accuracy",
        aliases={"content": ("text",)},
    ),
    TaskRow(
        name="reviews",  # sentences of our own, which ship with the package
        kind="sequence",
        evaluation_split="dev",
        text_column="text",
        label_column="label",
        labels=("negative", "positive"),
        metric="accuracy",
        folder=Path(__file__).parents[1] / "builtin" / "reviews",
    ),
)

TASKS: Mapping[str, TaskRow] = MappingProxyType({row.name: row for row in _ROWS})
