"""`uhl tune --optimise N`: hyper-parameters chosen by optuna on a held-out part of the training set."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from accelerate import Accelerator
from pydantic import ValidationError

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import TuneOptions
from uhl_cli.commands.scoring import references_of
from uhl_cli.commands.tune_setting import Setting, settle, train_task
from uhl_cli.data import Examples, TaskData
from uhl_cli.errors import DataError, TrainingError, UsageError
from uhl_cli.files import write_bytes
from uhl_cli.formats.checkpoint import run_digest
from uhl_cli.host.checkpoint import Host
from uhl_cli.metrics import score
from uhl_cli.reports import Reporter, SearchReport, Trial, silent
from uhl_cli.schema import Frozen
from uhl_cli.train.loop import RunFiles
from uhl_cli.train.task_adapter import TaskAdapter

Ranges = dict[str, tuple[float, float]]

# Delta-theta moves gains of about one, so its rate is far above what weights take: below 1e-3 the 500 steps move
# next to nothing (tests/benchmarks/results/tuning_choices.json).
RANGES: Ranges = {"learning_rate": (1e-3, 0.5), "active_weight": (0.01, 0.1), "delta_weight": (1e-6, 1e-4)}
READOUT_RANGES: Ranges = {"readout_learning_rate": (3e-4, 3e-2)}
# Values that no widening passes.
LOWEST, HIGHEST = 1e-8, 1.0
# A best value in this share of its range (on a log scale) lies on the edge; so few trials say nothing about it.
EDGE, LEAST_TRIALS = 0.1, 4
HELD_OUT, MOST_HELD_OUT = 0.2, 2000


def optimise(
    adapter: UniversalAdapter,
    host: Host,
    data: TaskData,
    options: TuneOptions,
    *,
    accelerator: Accelerator,
    files: RunFiles | None = None,
    reporter: Reporter = silent,
) -> tuple[TuneOptions, SearchReport]:
    """The options with the best of `options.optimise` trials in place, and all trials.

    Every trial tunes on four fifths of the training set and scores on the rest (at most 2,000 examples); the
    evaluation data is not read.  The first trial is the options as they are.  With `files` a finished trial is kept,
    and `options.resume` goes on behind the last one, with the same trials as an uninterrupted search.

    :raises UsageError: When optuna is not installed, or there are several processes.
    :raises DataError: When the training set is too small to hold a part of it out.
    :raises TrainingError: When the kept trials belong to other settings.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("--optimise needs optuna.", "Run `pip install 'uhl[optimise]'`.")
    if accelerator.num_processes > 1:
        raise UsageError("--optimise runs in one process.", "Search first, then tune with the values that it prints.")
    fit, held = _held_out(data.train, options.training.seed)
    part = TaskData(data.task, fit, held, data.source)
    settings: dict[int, Setting] = {}

    def setting_for(top_k: int) -> Setting:
        if top_k not in settings:
            changed = options.model_copy(update={"top_k": top_k, "resume": False})
            settings[top_k] = settle(adapter, host, part, changed, silent)
        return settings[top_k]

    most = options.top_k or adapter.manifest.config.top_k
    first = setting_for(most)
    ranges = RANGES | ({} if first.record.own_task else READOUT_RANGES)
    settled = options.training.settled("labels")
    start = {name: float(getattr(settled, name)) for name in ranges}
    ranges = {name: (min(low, start[name]), max(high, start[name])) for name, (low, high) in ranges.items()}
    kept = _KeptTrials(files, _digest(first, ranges), resume=options.resume)
    trials = kept.read()
    while len(trials) < options.optimise:
        number = len(trials)
        asked = Trial(number=0, top_k=most, score=0.0, **start)
        if number:
            asked = _ask(trials, widened(ranges, trials), range(1, most + 1), seed=options.training.seed)
        best = max((each.score for each in trials), default=None)
        steps = first.record.training.steps
        report = partial(_shown, reporter, number=number, steps=steps, trials=options.optimise, best=best)
        found = _score(setting_for(asked.top_k), asked, accelerator, report)
        trials.append(asked.model_copy(update={"score": found}))
        kept.write(trials)
    best_trial = max(trials, key=lambda each: (each.score, -each.number))
    report_of_search = SearchReport(
        trials=tuple(trials), best=best_trial.number, held_out=len(held), ranges=widened(ranges, trials)
    )
    return with_trial(options, best_trial), report_of_search


def with_trial(options: TuneOptions, trial: Trial) -> TuneOptions:
    """The options with a trial's values in place."""
    training = options.training.model_copy(update=_values(trial))
    return options.model_copy(update={"training": training, "top_k": trial.top_k, "optimise": 0})


def _values(trial: Trial) -> dict[str, float]:
    """A trial's values of `TrainingConfig`."""
    values = {name: getattr(trial, name) for name in {**RANGES, **READOUT_RANGES}}
    return {name: value for name, value in values.items() if value is not None}


def widened(ranges: Ranges, trials: Sequence[Trial]) -> Ranges:
    """The ranges after these trials: a side on whose edge the best trial so far lay moves out by a factor of ten."""
    found = dict(ranges)
    for count in range(LEAST_TRIALS, len(trials) + 1):
        best = max(trials[:count], key=lambda each: (each.score, -each.number))
        for name, (low, high) in found.items():
            value = getattr(best, name)
            place = math.log(value / low) / math.log(high / low)
            low = max(low / 10, LOWEST) if place < EDGE else low
            high = min(high * 10, HIGHEST) if place > 1 - EDGE else high
            found[name] = (low, high)
    return found


def _held_out(examples: Examples | None, seed: int) -> tuple[Examples, Examples]:
    count = 0 if examples is None else len(examples)
    if examples is None or count < 10:
        raise DataError(f"{count} training examples are too few to hold some out.", "Tune without --optimise.")
    return examples.split(min(HELD_OUT, MOST_HELD_OUT / count), seed=seed)


def _score(setting: Setting, trial: Trial, accelerator: Accelerator, report: Callable[[int], None]) -> float:
    """Metric of one trial on the held-out examples; NaN-free, or the worst there is for a run that diverged."""
    options, data = with_trial(setting.options, trial), setting.data
    training = setting.record.training.config.model_copy(update=_values(trial))
    record = setting.record.model_copy(
        update={"training": setting.record.training.model_copy(update={"config": training})}
    )

    def on_progress(label: str, done: int, total: int, note: str = "") -> None:
        if label == "tuning":
            report(done)

    setting = replace(setting, options=options, record=record, reporter=on_progress)
    trained = TaskAdapter(
        setting.adapter.stored, record.config, new_readout=not record.own_task, seed=options.training.seed
    )
    trained.to(accelerator.device)
    try:
        train_task(trained, setting, accelerator, None)
    except TrainingError:
        return 0.0
    predictor = setting.predictor()
    assert predictor is not None  # the held-out part is never empty
    assert data.evaluation is not None
    classes = predictor.carried(setting.ported(trained.trained_values()), "held out").classes
    return score(data.task.metric, classes, references_of(data.evaluation), data.task.labels).value


def _shown(reporter: Reporter, done: int, *, number: int, steps: int, trials: int, best: float | None) -> None:
    note = f"trial {number + 1} of {trials}" + ("" if best is None else f"  best {best:.3f}")
    reporter("searching", number * steps + done, trials * steps, note)


def _ask(trials: Sequence[Trial], ranges: Ranges, top_k: Sequence[int], *, seed: int) -> Trial:
    """The next trial by optuna's tree-structured Parzen estimator; a function of its arguments alone."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [*ranges, "top_k"]
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(low, high, log=True) for name, (low, high) in ranges.items()
    }
    space["top_k"] = CategoricalDistribution(list(top_k))
    number = len(trials)
    # A seed a trial, so that a resumed search draws what an uninterrupted one draws.
    sampler = optuna.samplers.TPESampler(seed=1000 * seed + number, n_startup_trials=5)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for each in trials:
        values = {name: getattr(each, name) for name in names}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=space, value=each.score))
    return Trial(number=number, score=0.0, **study.ask(fixed_distributions=space).params)


def _digest(setting: Setting, ranges: Ranges) -> str:
    return run_digest(setting.identity() | {"ranges": ranges})


class _KeptTrials:
    """The finished trials on disk, one JSON file written whole after each; nothing is kept without `files`."""

    def __init__(self, files: RunFiles | None, digest: str, *, resume: bool) -> None:
        self._path = None if files is None else files.search
        self._digest = digest
        self._resume = resume

    def read(self) -> list[Trial]:
        """The trials to go on from.

        :raises TrainingError: When they belong to other settings, or cannot be read.
        """
        if self._path is None or not self._resume or not self._path.exists():
            return []
        try:
            kept = _Kept.model_validate_json(self._path.read_bytes())
        except ValidationError as error:
            raise TrainingError(f"{self._path} holds no trials.", "Begin anew with --overwrite.") from error
        if kept.digest != self._digest:
            raise TrainingError(
                f"the trials in {self._path} were made with other settings.",
                "Give the same options, or begin anew with --overwrite.",
            )
        return list(kept.trials)

    def write(self, trials: Sequence[Trial]) -> None:
        """Keep all of these."""
        if self._path is not None:
            kept = _Kept(digest=self._digest, trials=tuple(trials))
            write_bytes(self._path, kept.model_dump_json(indent=1).encode())


class _Kept(Frozen):
    digest: str
    trials: tuple[Trial, ...]
