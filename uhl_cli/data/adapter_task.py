"""The data of an adapter's task.  An adapter file is untrusted: a name in it opens no connection and no file.

The only exception is a task of this package, whose data is where `TASKS` states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uhl_cli.data.examples import TaskData
from uhl_cli.data.load import load_task
from uhl_cli.data.tasks import TASKS, Task
from uhl_cli.errors import DataError, UsageError

_LABELLED = {"sequence": "whole texts", "tokens": "words"}


def name_to_load(task: Task, asked: Mapping[str, Any]) -> str:
    """The task to load: the one that the user named, otherwise the adapter's own.

    :param asked: The user's options; `task` and `data` are used, each None if not given.
    :raises UsageError: If only the adapter's file names the data, and its task is not of this package.
    """
    if asked["task"] is not None:
        return str(asked["task"])
    if asked["data"] is None and task.name not in TASKS:
        raise UsageError(
            f"the adapter's task {task.name!r} is not a task of this package, and a name in a file is not looked up.",
            "Give its data with --data, or name a task with --task.",
        )
    return task.name


def evaluation_data(task: Task, asked: Mapping[str, Any], *, offline: bool, seed: int) -> TaskData:
    """Evaluation examples in the labels of an adapter's task, at least one.

    :param asked: The user's options: `task` and options of `load_task`, each None if not given.
    :raises UsageError: See `name_to_load`; also if options contradict each other.
    :raises DataError: If the data cannot be found or read, or does not fit the task's kind or labels.
    """
    name = name_to_load(task, asked)
    options = {option: value for option, value in asked.items() if option != "task"}
    if name == task.name and name not in TASKS:
        # The columns that the adapter was trained on are the best guess for more data of a user's own task.
        for column in ("text_column", "pair_column", "label_column", "tokens_column"):
            options[column] = options[column] or getattr(task, column)
    data = load_task(name, labels=task.labels, offline=offline, seed=seed, need_train=False, **options)
    hint = "Give evaluation data of the adapter's own task with --data."
    if data.task.kind != task.kind:
        raise DataError(f"the data labels {_LABELLED[data.task.kind]}, the adapter {_LABELLED[task.kind]}.", hint)
    if not data.evaluation:
        raise DataError("the data has no evaluation example.", hint)
    return data
