"""Find the training and evaluation splits for a name or a path.

If the data has no evaluation split, or only one whose labels are kept secret, a seeded tenth of the training rows is
held out, and the description mentions it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from uhl_cli.data.files import EVALUATION_STEMS, READERS, TRAIN_STEMS, data_files, read_files, split_files
from uhl_cli.data.hub import read_hub
from uhl_cli.data.table import Table
from uhl_cli.data.tasks import TASKS, TaskRow
from uhl_cli.errors import DataError, UsageError

HELD_OUT = 0.1
_HUB_EVALUATION = ("validation", "dev", "valid", "eval", "test")


@dataclass(frozen=True)
class Splits:
    """Tables to read from; with `held_out`, both parts come from `train`.

    :param train: Rows for training, or to hold out from; None if not requested.
    :param evaluation: Rows for evaluation; None if not requested or held out.
    :param unlabelled: Name of an evaluation split that is not used because it has no labels.
    """

    train: Table | None
    evaluation: Table | None
    held_out: bool = False
    unlabelled: str | None = None

    @property
    def tables(self) -> list[Table]:
        """The tables in use, each once."""
        return [table for table in (self.train, self.evaluation) if table is not None]


@dataclass(frozen=True)
class Wanted:
    """The caller's request: the parts needed, the names of splits if given, and the encoding of text files.

    :param labelled: Whether a table has labels.  An evaluation split without is not used, unless it is named or the
        only data.
    """

    train: bool
    evaluation: bool
    train_split: str | None = None
    evaluation_split: str | None = None
    encoding: str | None = None
    labelled: Callable[[Table], bool] = lambda _: True


def local_source(name: str, data: str | None = None) -> Path | None:
    """The local file or folder that `data`, or otherwise `name`, refers to; None if it is on the hub.

    The name of a task in the table never refers to a local folder of that name: write `./sst2` for that.  A builtin
    task's folder is the package's own.

    :raises DataError: If it can only be a path, and does not exist.
    """
    if data is None and name in TASKS:
        return TASKS[name].folder
    given = name if data is None else data
    try:
        path = Path(given).expanduser()
        if given and path.exists():  # Path("") is the current folder
            return path
    except (OSError, RuntimeError):  # a name too long for a file, or the home of a user who does not exist
        path = Path(given)
    looks_local = given.startswith((".", "~", "/")) or given.count("/") > 1 or "\\" in given
    if looks_local or path.suffix.casefold() in READERS or not given:
        raise DataError(f"There is no file or folder {given!r}.", "Check the path.")
    return None


def local_splits(path: Path, wanted: Wanted) -> Splits:
    """The splits of a local file or folder.

    :raises DataError: If the files of a required split are missing.
    :raises UsageError: If a split is named for a single file.
    """
    if path.is_file():
        if wanted.train_split or wanted.evaluation_split:
            raise UsageError(
                f"{path.name} is one file and has no splits to choose from.",
                "Give the folder, or leave out --train-split and --evaluation-split.",
            )
        table = read_files([path], wanted.encoding)
        if not wanted.train:
            return Splits(None, table)
        return Splits(table, None, held_out=wanted.evaluation)
    train_files = split_files(path, _stems(wanted.train_split, TRAIN_STEMS))
    evaluation_files = split_files(path, _stems(wanted.evaluation_split, EVALUATION_STEMS))
    missing = None
    if wanted.train and not train_files:
        missing = wanted.train_split or "training"
    if wanted.evaluation and not evaluation_files and (wanted.evaluation_split or not train_files):
        missing = missing or wanted.evaluation_split or "evaluation"
    if missing is not None:
        found = ", ".join(file.name for file in data_files(path)[:20]) or "no data files"
        raise DataError(
            f"The folder {path.name} has no {missing} split; it holds {found}.",
            "Name the files train.* and dev.* (or valid, test), or use --train-split and --evaluation-split.",
        )
    return _splits(
        wanted,
        (lambda: read_files(train_files, wanted.encoding)) if train_files else None,
        (lambda: read_files(evaluation_files, wanted.encoding)) if evaluation_files else None,
    )


def _splits(wanted: Wanted, train: Callable[[], Table] | None, evaluation: Callable[[], Table] | None) -> Splits:
    """The splits of what reads them, at least one that is wanted or can be held out from."""
    scored = evaluation() if wanted.evaluation and evaluation is not None else None
    unlabelled: str | None = None
    if scored is not None and train is not None and wanted.evaluation_split is None and not wanted.labelled(scored):
        unlabelled, scored = scored.origin, None
    held_out = wanted.evaluation and scored is None
    trained = train() if train is not None and (wanted.train or held_out) else None
    return Splits(trained, scored, held_out, unlabelled)


def hub_splits(
    hub: str, config: str | None, revision: str | None, row: TaskRow | None, wanted: Wanted, offline: bool
) -> Splits:
    """The splits of a dataset of the hub.

    :param row: The task's row, whose splits are used if the data has them.
    :raises DataError: If the dataset or a required split is missing.
    :raises UsageError: If an encoding is named.
    """
    if wanted.encoding is not None:
        raise UsageError("--encoding belongs to local text files; the data is on the hub.", "Leave it out.")
    loaded = read_hub(hub, config, revision, offline)
    train = _choose(hub, loaded, wanted.train_split, ((row.train_split,) if row else ()) + ("train",))
    evaluation = _choose(
        hub, loaded, wanted.evaluation_split, ((row.evaluation_split,) if row else ()) + _HUB_EVALUATION
    )
    if (wanted.train and train is None) or (wanted.evaluation and evaluation is None and train is None):
        raise _no_split(hub, loaded, "training" if wanted.train else "evaluation")

    def reader(name: str | None) -> Callable[[], Table] | None:
        return None if name is None else lambda: Table(loaded[name], f"{hub} ({name})")

    return _splits(wanted, reader(train), reader(evaluation))


def _stems(given: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    return usual if given is None else (given.casefold(),)


def _choose(hub: str, names: Collection[str], given: str | None, usual: tuple[str, ...]) -> str | None:
    if given is not None:
        if given not in names:
            raise _no_split(hub, names, given)
        return given
    return next((name for name in usual if name in names), None)


def _no_split(hub: str, names: Collection[str], split: str) -> DataError:
    return DataError(
        f"{hub} has no {split} split; it has {', '.join(names)}.",
        "Name one with --train-split or --evaluation-split.",
    )
