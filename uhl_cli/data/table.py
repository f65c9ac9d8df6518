"""One split as rows and columns: all that the rest of the package asks of a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Table:
    """A split of `datasets` and the name to call it by in messages.

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
        """The values of a column, as Python objects; of the rows at `indices` if given."""
        # One column only: other columns may need decoders (images, audio) that are not installed.
        dataset = self.dataset.select_columns([name])
        if indices is not None:
            dataset = dataset.select(indices)
        return list(dataset[:][name])
