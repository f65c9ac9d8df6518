"""The search of a learning rate on held-out training examples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from uhl_cli.compare.config import SearchSection
from uhl_cli.compare.results import Search
from uhl_cli.data.examples import Examples
from uhl_cli.errors import TrainingError
from uhl_cli.files import write_text


def split_for_search(examples: Examples, limit: int) -> tuple[Examples, Examples]:
    """(held out, rest) of the training examples, the same for every method.

    A tenth is held out, at most `limit`; of a small set a quarter, up to 500, since fewer would choose by chance.
    """
    order = np.random.default_rng(5).permutation(len(examples))
    held_out = max(1, min(limit, max(len(examples) // 10, min(500, len(examples) // 4))))
    return examples.select(order[:held_out].tolist()), examples.select(order[held_out:].tolist())


def search_rate(search: SearchSection, attempt: Callable[[float], float], held_out: int) -> Search:
    """Try every rate of the section; while the best is the smallest or largest, try rates beyond it.

    Among the rates within one standard error of the best, the middle one is chosen.  The error is that of a
    proportion of the held-out examples.  A search is shorter than its run, so a rate that is best by chance can be far
    too high for ten times the steps.

    :param attempt: Returns the score of a rate; a rate whose training diverges scores zero.
    :param held_out: Number of examples that a score is measured on.
    """
    rates = sorted(search.learning_rates)
    middle = rates[len(rates) // 2]
    scores: dict[float, float] = {}

    def tried(rate: float) -> None:
        try:
            scores[rate] = attempt(rate)
        except TrainingError:
            scores[rate] = 0.0

    def best() -> float:
        highest = max(scores.values())
        share = min(max(highest, 0.0), 1.0)
        error = math.sqrt(share * (1.0 - share) / held_out)
        tied = [rate for rate in sorted(scores) if scores[rate] >= highest - error]
        return min(tied, key=lambda rate: abs(math.log(rate / middle)))

    for rate in rates:
        tried(rate)
    for _ in range(search.edge_tries):
        if best() == min(scores) and len(set(scores.values())) > 1:
            tried(best() / search.edge_factor)
        elif best() == max(scores) and len(set(scores.values())) > 1:
            tried(min(1.0, best() * search.edge_factor))
        else:
            break
    named = {f"{rate:g}": scores[rate] for rate in sorted(scores)}
    return Search(rate=best(), scores=named, held_out=held_out, steps=search.steps)


class KeptSearches(dict[str, Search]):
    """Searches by key, saved in a file for a resumed experiment.

    Entries that another process writes meanwhile are kept, even if both write at once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(_read_searches(path))
        self._path = path

    def __setitem__(self, key: str, value: Search) -> None:
        super().__setitem__(key, value)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_name(f".{self._path.name}.lock")):
            rows = {name: search.model_dump() for name, search in (_read_searches(self._path) | self).items()}
            write_text(self._path, json.dumps(rows, indent=1) + "\n")


def _read_searches(path: Path) -> dict[str, Search]:
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {key: Search.model_validate(row) for key, row in rows.items()}
