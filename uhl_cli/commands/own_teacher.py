"""The task taught by the user's own classifier: it gives labels, kind and the classes of the data's texts.

Labels of the data are used for scores only.  Of data of another kind of task only the texts are used: a text is split
into words at white space, and words are joined into a text.  Without any data, the package's own texts are used.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from uhl_cli.commands.options import PretrainOptions
from uhl_cli.data import Examples, Task, TaskData, load_task
from uhl_cli.data.examples import subset_indices
from uhl_cli.data.load import load_unlabelled, metric_of, unlabelled_examples
from uhl_cli.errors import LabelError
from uhl_cli.schema import GeneralRecord
from uhl_cli.train.classifier import Classifier, Progress
from uhl_cli.train.loop import Targets
from uhl_cli.transfer.general import VERSION, transfer_texts


def teacher_task(teacher: Classifier, options: PretrainOptions) -> tuple[Classifier, TaskData]:
    """The classifier, with the data's class names if it has none of its own, and the task with its examples.

    Classes of the training examples have no meaning until `soft_targets` sets them; those of evaluation examples
    are the data's, as the classifier's ids.

    :raises DataError: The data cannot be found or read, or holds no text.
    :raises LabelError: Its labels differ from the classifier's.
    """
    asked, seed, offline = options.data, options.training.seed, options.host.offline
    if asked.task is None and asked.data is None:
        # Texts are split into words at white space, so for words their punctuation is set apart.
        texts = transfer_texts(GeneralRecord(version=VERSION, lower=False, apart=teacher.kind == "tokens"))
        texts = [texts[index] for index in subset_indices(len(texts), asked.limit_train, seed)]
        task = _task(teacher, teacher.name.rsplit("/", 1)[-1])
        return teacher, TaskData(task, unlabelled_examples(texts, kind=teacher.kind), None, "the package's own texts")
    name, data = (asked.task, asked.data) if asked.task is not None else (str(asked.data), None)
    given = asked.model_dump(exclude={"task", "data", "evaluation_split", "limit_train", "limit_evaluation"})
    bare = load_unlabelled(
        name, kind=teacher.kind, data=data, limit=asked.limit_train, seed=seed, offline=offline, **given
    )
    if bare is not None:
        task = _task(teacher, bare.name, bare.columns.text, bare.columns.pair, bare.columns.tokens)
        return teacher, TaskData(task, bare.examples, None, bare.source)
    found = load_task(name, data=data, seed=seed, offline=offline, **asked.model_dump(exclude={"task", "data"}))
    assert found.train is not None  # training data was requested
    if found.task.kind != teacher.kind:
        task = _task(teacher, found.task.name, found.task.text_column, found.task.pair_column)
        examples = unlabelled_examples(found.train.texts, found.train.pairs, kind=teacher.kind)
        return teacher, TaskData(task, examples, None, f"{found.source}; texts alone, its labels are of another kind")
    if not teacher.named and len(teacher.labels) == len(found.task.labels):
        teacher = teacher.with_labels(found.task.labels)
    ids = _ids(found.task, teacher)
    evaluation = None if found.evaluation is None else _renumbered(found.evaluation, ids)
    task = found.task.model_copy(update={"labels": teacher.labels})
    return teacher, TaskData(task, found.train, evaluation, found.source)


def soft_targets(
    teacher: Classifier, examples: Examples, *, batch_size: int, progress: Progress | None = None
) -> tuple[Examples, Targets]:
    """The examples with the classifier's most probable classes, and its probabilities as targets."""
    logits = teacher.logits_of(examples, batch_size=batch_size, progress=progress)
    probabilities = [part.softmax(-1) for part in logits]
    classes = [tuple(part.argmax(-1).tolist()) for part in logits]

    def targets(rows: list[int]) -> Tensor:
        return torch.cat([probabilities[row] for row in rows])

    if examples.words is None:
        return replace(examples, labels=tuple(row[0] for row in classes)), targets
    return replace(examples, tags=tuple(classes)), targets


def _task(
    teacher: Classifier, name: str, text: str | None = None, pair: str | None = None, tokens: str | None = None
) -> Task:
    if teacher.kind == "tokens":
        return Task(
            name=name[:200],
            kind="tokens",
            labels=teacher.labels,
            metric=metric_of("tokens", teacher.labels),
            tokens_column=tokens or "tokens",
            label_column="tags",
        )
    return Task(
        name=name[:200],
        kind="sequence",
        labels=teacher.labels,
        metric="accuracy",
        text_column=text or "text",
        pair_column=pair,
        label_column="label",
    )


def _ids(task: Task, teacher: Classifier) -> list[int]:
    """The classifier's id of each label of the data: by name, then by name ignoring case, then by number.

    :raises LabelError: They differ from the classifier's.
    """
    labels, known = task.labels, teacher.labels
    for shown in (str, str.casefold):
        places = {shown(label): index for index, label in enumerate(known)}
        if len(places) == len(known) and all(shown(label) in places for label in labels):
            return [places[shown(label)] for label in labels]
    if labels == ("false", "true") and len(known) == 2:
        return [0, 1]
    if all(label.isdecimal() and int(label) < len(known) for label in labels):
        return [int(label) for label in labels]
    raise LabelError(
        f"{task.name} has the labels {', '.join(labels[:20])}; those of '{teacher.name}' are {', '.join(known[:20])}.",
        "Rename the labels of the data, or remove their column: the teacher only needs texts.",
    )


def _renumbered(examples: Examples, ids: list[int]) -> Examples:
    if examples.labels is not None:
        return replace(examples, labels=tuple(ids[label] for label in examples.labels))
    return replace(examples, tags=tuple(tuple(ids[tag] for tag in row) for row in examples.tags or ()))
