"""Searches on held-out training examples: of a learning rate, or by optuna of a space of settings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock

from uhl_cli.commands.scoring import Classes, references_of
from uhl_cli.commands.search import Space, refuse_no_optuna, search
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.results import Search, SearchTrial
from uhl_cli.compare.sections import OptunaSection, SearchSection, TrainingSection
from uhl_cli.data.examples import Examples
from uhl_cli.data.tasks import Task
from uhl_cli.errors import FormatError, TrainingError
from uhl_cli.files import write_text
from uhl_cli.metrics import score
from uhl_cli.reports import Trial
from uhl_cli.train.run_files import RunFiles


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


Split = Callable[[int], tuple[Examples, Callable[[TrainingSection], Classes]]]


def search_once(run: RunConfig, task: Task, searches: dict[str, Search], split: Split, folder: Path) -> Search | None:
    """The run's search: done once for all seeds, with seed 0; None if none is asked for.

    :param split: Takes the most examples to hold out, and gives the held-out examples, and what says their classes
        after a training on the rest.
    :param folder: Where finished trials of optuna are saved until the search is finished.
    """
    if not run.asks_for_search:
        return None
    section: SearchSection | OptunaSection = run.optuna or run.search
    steps = section.steps or run.training.steps
    # The warm-up keeps its share of the steps.
    warmup = round(run.training.warmup_steps * steps / run.training.steps)
    changes = {"steps": steps, "warmup_steps": warmup, "seed": 0, "eval_steps": None}
    short = run.training.model_copy(update=changes)
    trained = short.model_dump_json(exclude={"learning_rate"} if run.optuna is None else None)
    # A retrained method has no adapter, whatever a grid's defaults say.
    adapter = None if METHODS[run.method].kind == "retrained" else run.plain_adapter
    other = () if adapter is None else (adapter.model_dump_json(),)
    key = "/".join((run.method, *run.group, section.model_dump_json(), run.dataset.model_dump_json(), trained, *other))
    if key not in searches:
        held, attempt = split(section.held_out)
        references = references_of(held)

        def scored(values: Mapping[str, float]) -> float:
            predictions = attempt(short.model_copy(update=dict(values)))
            return score(task.metric, predictions, references, task.labels).value

        if isinstance(section, OptunaSection):
            start = run.model_copy(update={"training": short})
            files = RunFiles(folder / "search.uhl-run")
            searches[key] = search_space(section, start, scored, len(held), files=files, identity=key)
        else:
            searches[key] = search_rate(section, lambda rate: scored({"learning_rate": rate}), len(held))
    return searches[key]


def chosen_training(run: RunConfig, search: Search | None) -> TrainingSection:
    """The run's training with what its search chose."""
    if search is None:
        return run.training
    values = {} if search.best is None else search.trials[search.best].values
    return run.training.model_copy(update={"learning_rate": search.rate, **values})


# Names of `reports.Trial` that differ from those of `training`.
_IN_TRIALS = {"lambda_F": "active_weight", "lambda_Q": "delta_weight"}


def search_space(
    section: OptunaSection,
    run: RunConfig,
    attempt: Callable[[Mapping[str, float]], float],
    held_out: int,
    *,
    files: RunFiles,
    identity: str,
) -> Search:
    """Try the trials of the section.  The first has the run's own values, or the nearest ones in the space.

    :param attempt: Returns the score of a trial's values; a trial whose training diverges scores zero.
    :param files: Where finished trials are saved; those that are there are not done again.
    :param identity: Everything else that affects the result.
    :raises UsageError: When optuna is not installed.
    """
    refuse_no_optuna()
    ranges, choices = section.space()
    training, tuning = run.training, run.tuning()
    own = training.model_dump() | {"lambda_F": tuning.active_weight, "lambda_Q": tuning.delta_weight}
    first: dict[str, float] = {name: min(max(own.get(name, high), low), high) for name, (low, high) in ranges.items()}
    for name, values in choices.items():
        wanted = own.get(name, max(values))
        first[name] = min(values, key=lambda value: abs(value - wanted))

    def values_of(trial: Trial) -> dict[str, float]:
        return {name: getattr(trial, _IN_TRIALS.get(name, name)) for name in first}

    space = Space(
        ranges={_IN_TRIALS.get(name, name): ends for name, ends in ranges.items()},
        choices={_IN_TRIALS.get(name, name): values for name, values in choices.items()},
        steps=training.steps,
        held_out=held_out,
        identity={"search": identity},
        score=lambda trial, _: attempt(values_of(trial)),
        widen=False,
    )
    start = {"learning_rate": training.learning_rate} | first
    trial = Trial(number=0, score=0.0, **{_IN_TRIALS.get(name, name): value for name, value in start.items()})
    found = search(space, trial, section.n_trials, seed=training.seed, files=files, resume=True)
    shutil.rmtree(files.folder, ignore_errors=True)
    return Search(
        rate=found.trials[found.best].learning_rate,
        scores={},
        held_out=held_out,
        steps=training.steps,
        trials=tuple(SearchTrial(values=values_of(each), score=each.score) for each in found.trials),
        best=found.best,
    )


class KeptSearches(dict[str, Search]):
    """Searches by key, saved in a file for a resumed experiment.

    Entries that another process writes meanwhile are kept, even if both write at once.

    :raises FormatError: When the file is damaged.
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
    """The searches of a file; none if there is no file.

    :raises FormatError: When it is damaged.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {key: Search.model_validate(row) for key, row in rows.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise FormatError(f"{path} holds no searches.", "Delete it; its searches are then made again.") from error
