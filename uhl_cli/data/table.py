"""Wrapper of `datasets`: a split as a table, calls without progress bars and log lines, one error type."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uhl_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Table:
    """A split of `datasets` and its name in messages.

    :param dataset: The rows, memory mapped.
    :param origin: Where they come from, such as `sst2/train.tsv`.
    """

    dataset: Dataset
    origin: str

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.dataset.column_names)

    def is_list(self, name: str) -> bool:
        """Whether the column holds a list in each row."""
        feature = self.dataset.features[name]
        # a list is [feature] or Sequence in datasets 3, List in datasets 4; the latter two have .feature
        return isinstance(feature, list) or hasattr(feature, "feature")

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """The names of the classes if the column (or the lists in it) is a ClassLabel, else None."""
        feature: Any = self.dataset.features[name]
        if isinstance(feature, list):
            feature = feature[0]
        feature = getattr(feature, "feature", feature)
        names = getattr(feature, "names", None)
        return None if names is None else tuple(str(each) for each in names)

    def column(self, name: str, indices: Sequence[int] | None = None) -> list[object]:
        """The values of a column, as Python objects, None for NaN; only of the rows at `indices` if given."""
        # One column only: other columns may need decoders (images, audio) that are not installed.
        dataset = self.dataset.select_columns([name])
        if indices is not None:
            dataset = dataset.select(indices)
        return [None if isinstance(value, float) and math.isnan(value) else value for value in dataset[:][name]]

    def renamed(self, names: Mapping[str, str]) -> Table:
        """The same rows with other names of columns, given by their names now."""
        return Table(self.dataset.rename_columns(dict(names)), self.origin) if names else self


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Context manager that turns off progress bars and logging of `datasets`, and logging of the hub."""
    import datasets
    import huggingface_hub
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    loggers = (datasets.logging, huggingface_hub.logging)
    verbosity = [logger.get_verbosity() for logger in loggers]
    disable_progress_bars()
    # Errors are reported once, by the DataError; the libraries would also log them.
    for logger in loggers:
        logger.set_verbosity(logger.CRITICAL)
    try:
        yield
    finally:
        for logger, before in zip(loggers, verbosity, strict=True):
            logger.set_verbosity(before)
        if not silent:
            enable_progress_bars()


@contextmanager
def offline_datasets() -> Iterator[None]:
    """Context manager: inside it neither `datasets` nor `huggingface_hub` opens a connection (as HF_HUB_OFFLINE=1)."""
    import datasets.config
    import huggingface_hub.constants

    # Both read the environment once, at import; afterwards they use these two names.
    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def load_failures() -> tuple[type[Exception], ...]:
    """The errors of `datasets.load_dataset` for missing, damaged or unreachable data."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library under huggingface_hub has changed twice already; the base of its own error follows it.
    http_errors: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    return (DatasetsError, OSError, ValueError, TypeError, KeyError, RuntimeError, *http_errors)


def cause(error: BaseException) -> str:
    """The first line of the root error of a chain, at most 200 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)  # without the path
    lines = said.strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def data_error(what: str, error: BaseException, hint: str) -> DataError:
    """A `DataError` that states what failed and why."""
    return DataError(f"{what}: {cause(error)}.", hint)
