"""`uhl tune --optimise N`: hyper-parameters chosen by optuna on a held-out part of the training data."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from accelerate import Accelerator
from pydantic import ValidationError

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import TuneMode, TuneOptions
from uhl_cli.commands.scoring import references_of
from uhl_cli.commands.tune_setup import TuningSetup, prepare, train_task
from uhl_cli.commands.tune_student import (
    distillation_data_for,
    student_identity,
    student_record,
    trained_student,
    training_of,
    tuned_model,
)
from uhl_cli.data import Examples, TaskData
from uhl_cli.errors import DataError, TrainingError, UsageError
from uhl_cli.files import write_bytes
from uhl_cli.formats.checkpoint import run_digest
from uhl_cli.host.checkpoint import Host
from uhl_cli.metrics import score
from uhl_cli.reports import Reporter, SearchReport, Trial, silent
from uhl_cli.schema import Frozen
from uhl_cli.train.loop import total_steps
from uhl_cli.train.run_files import RunFiles
from uhl_cli.train.task_adapter import TaskAdapter

Ranges = dict[str, tuple[float, float]]
Choices = Mapping[str, Sequence[float]]

# Delta-theta changes gains of about one, so its rate is far above that of weights: below 1e-3, 500 steps hardly change
# anything (tests/benchmarks/results/tuning_choices.json).
RANGES: Ranges = {"learning_rate": (1e-3, 0.5), "active_weight": (0.01, 0.1), "delta_weight": (1e-6, 1e-4)}
READOUT_RANGES: Ranges = {"readout_learning_rate": (3e-4, 3e-2)}
# For a student: about a factor of ten around the defaults.
STUDENT_RANGES: dict[TuneMode, Ranges] = {
    "transfer": {"learning_rate": (3e-3, 0.2)},
    "lora": {"learning_rate": (2e-4, 1e-2), "readout_learning_rate": (5e-5, 5e-3)},
}
# Bounds of widening.
LOWEST, HIGHEST = 1e-8, 1.0
# A best value this close to an end of its range (as a share, on a log scale) is on the edge; fewer trials do not tell.
EDGE, LEAST_TRIALS = 0.1, 4
HELD_OUT, MOST_HELD_OUT, LEAST_EXAMPLES = 0.2, 2000, 10


@dataclass(frozen=True)
class Space:
    """What a search tries, and how it scores a trial.

    :param ranges: Ends of each range, searched on a log scale; if both are integers, integers are tried.
    :param choices: Values to choose from, by name.
    :param widen: Whether a range is widened when the best trial is at its end.
    :param steps: Steps of one trial.
    :param held_out: Number of examples that trials are scored on.
    :param identity: Everything that affects the result of the search.
    :param score: Tunes with a trial's values and scores it on the held-out examples; takes a reporter of steps.
    """

    ranges: Ranges
    choices: Choices
    steps: int
    held_out: int
    identity: dict[str, object]
    score: Callable[[Trial, Reporter], float]
    widen: bool = True


def refuse_no_optuna() -> None:
    """Return only if optuna is installed.

    :raises UsageError: It is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("a search for hyper-parameters needs optuna.", "Run `pip install 'uhl[optimise]'`.")


def optimise(
    adapter: UniversalAdapter,
    host: Host,
    data: TaskData | None,
    options: TuneOptions,
    *,
    accelerator: Accelerator,
    files: RunFiles | None = None,
    reporter: Reporter = silent,
) -> tuple[TuneOptions, SearchReport]:
    """The options with the best of `options.optimise` trials in place, and all trials.

    Every trial tunes on four fifths of the training set, or of the transfer set's texts, and scores on the rest (at
    most 2,000 examples; a text is held out with all its spans).  The evaluation data is not read, and without `data`
    neither is any label.  The first trial uses the options as given.  With `files`, finished trials are saved, and
    `options.resume` continues after the last one with the same trials as an uninterrupted search.

    :raises UsageError: When optuna is not installed, or there are several processes.
    :raises DataError: When the training data is too small to hold a part of it out.
    :raises TrainingError: When the saved trials belong to other settings.
    """
    refuse_no_optuna()
    if accelerator.num_processes > 1:
        raise UsageError("--optimise runs in one process.", "Search first, then tune with the values that it prints.")
    if data is None or options.parameters == "lora":
        space = _students(adapter, host, data, options, accelerator)
    else:
        space = _task_adapters(adapter, host, data, options, accelerator)
    defaults = options.training.with_defaults(options.mode)
    start = {name: float(getattr(defaults, name)) for name in space.ranges}
    ranges = {name: (min(low, start[name]), max(high, start[name])) for name, (low, high) in space.ranges.items()}
    first = Trial(number=0, top_k=max(map(int, space.choices.get("top_k", ())), default=None), score=0.0, **start)
    report = search(
        replace(space, ranges=ranges),
        first,
        options.optimise,
        seed=options.training.seed,
        files=files,
        resume=options.resume,
        reporter=reporter,
    )
    return with_trial(options, report.trials[report.best]), report


def search(
    space: Space,
    first: Trial,
    count: int,
    *,
    seed: int,
    files: RunFiles | None = None,
    resume: bool = False,
    reporter: Reporter = silent,
) -> SearchReport:
    """Do `count` trials of the space, the first with the values of `first`, the others as optuna chooses.

    With `files`, finished trials are saved, and `resume` continues after the last one.

    :raises TrainingError: When the saved trials belong to another space or first trial.
    """
    kept = _KeptTrials(files, run_digest(space.identity | {"ranges": space.ranges}), resume=resume)
    trials = kept.read()
    while len(trials) < count:
        number, ranges = len(trials), _ranges(space, trials)
        asked = _ask(trials, first, ranges, space.choices, seed=seed) if number else first
        best = max((each.score for each in trials), default=None)
        shown = partial(_shown, reporter, number=number, steps=space.steps, trials=count, best=best)
        try:
            found = space.score(asked, shown)
        except TrainingError:  # diverged: the worst score
            found = 0.0
        trials.append(asked.model_copy(update={"score": found}))
        kept.write(trials)
    best_trial = max(trials, key=lambda each: (each.score, -each.number))
    return SearchReport(
        trials=tuple(trials), best=best_trial.number, held_out=space.held_out, ranges=_ranges(space, trials)
    )


def _ranges(space: Space, trials: Sequence[Trial]) -> Ranges:
    return widened(space.ranges, trials) if space.widen else space.ranges


def with_trial(options: TuneOptions, trial: Trial) -> TuneOptions:
    """The options with a trial's values in place."""
    training = options.training.model_copy(update=_values(trial))
    top_k = options.top_k if trial.top_k is None else trial.top_k
    return options.model_copy(update={"training": training, "top_k": top_k, "optimise": 0})


def _values(trial: Trial) -> dict[str, float]:
    """A trial's values of `TrainingConfig`."""
    values = {name: getattr(trial, name) for name in {**RANGES, **READOUT_RANGES}}
    return {name: value for name, value in values.items() if value is not None}


def widened(ranges: Ranges, trials: Sequence[Trial]) -> Ranges:
    """The ranges after these trials: whenever the best trial so far was at an end of a range, that end moves by ten."""
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


def _task_adapters(
    adapter: UniversalAdapter, host: Host, data: TaskData, options: TuneOptions, accelerator: Accelerator
) -> Space:
    """Delta-theta, and a new task's readout, with labels."""
    fraction = _fraction(data.train)
    assert data.train is not None  # otherwise it has too few
    fit, held = data.train.split(fraction, seed=options.training.seed)
    part = TaskData(data.task, fit, held, data.source)
    settings: dict[int, TuningSetup] = {}

    def setting_for(top_k: int) -> TuningSetup:
        if top_k not in settings:
            changed = options.model_copy(update={"top_k": top_k, "resume": False})
            settings[top_k] = prepare(adapter, host, part, changed, silent)
        return settings[top_k]

    def score_of(trial: Trial, reporter: Reporter) -> float:
        assert trial.top_k is not None  # it is searched
        setup = setting_for(trial.top_k)
        training = setup.record.training.config.model_copy(update=_values(trial))
        record = setup.record.model_copy(
            update={"training": setup.record.training.model_copy(update={"config": training})}
        )
        setup = replace(setup, options=with_trial(setup.options, trial), record=record, reporter=reporter)
        trained = TaskAdapter(
            adapter.stored, record.config, new_readout=not record.own_task, seed=options.training.seed
        ).to(accelerator.device)
        train_task(trained, setup, accelerator, None)
        predictor = setup.predictor()
        assert predictor is not None  # the held-out part is never empty
        classes = predictor.predicted(setup.ported(trained.trained_values()), "held out").classes
        return score(data.task.metric, classes, references_of(held), data.task.labels).value

    most = options.top_k or adapter.manifest.config.top_k
    first = setting_for(most)
    ranges = RANGES | ({} if first.record.own_task else READOUT_RANGES)
    steps = first.record.training.steps
    return Space(ranges, {"top_k": range(1, most + 1)}, steps, len(held), first.identity(), score_of)


def _students(
    adapter: UniversalAdapter, host: Host, data: TaskData | None, options: TuneOptions, accelerator: Accelerator
) -> Space:
    """A LoRA, or delta-theta without labels: trials are scored by agreement with the teacher on texts held out with
    all their spans, or by labelled examples where there are any."""
    whole = distillation_data_for(adapter, host, data)
    distillation, held = whole.split(_fraction(whole.examples), options.training.seed)
    aligned = adapter.align(host, strategy=options.strategy, max_flops=options.max_flops, cache=options.cache)
    zero_shot, config = adapter.port(aligned), training_of(adapter, options)
    task = adapter.manifest.task

    def score_of(trial: Trial, reporter: Reporter) -> float:
        changed = with_trial(options, trial)
        training = training_of(adapter, changed)
        student = trained_student(
            adapter, aligned, distillation, training, changed, accelerator=accelerator, files=None, reporter=reporter
        )
        record = student_record(adapter, host, distillation, training, changed)
        tuned, _ = tuned_model(adapter, aligned, zero_shot, student, record)
        classes = tuned.classes_of(held, batch_size=options.evaluation_batch_size).for_metric(task.kind)
        return score(task.metric, classes, references_of(held), task.labels).value

    identity = student_identity(adapter, host, distillation, config, options)
    steps = total_steps(len(distillation.examples), config)
    return Space(STUDENT_RANGES[options.mode], {}, steps, len(held), identity, score_of)


def _fraction(examples: Examples | None) -> float:
    """The share of the examples that trials are scored on.

    :raises DataError: When there are too few.
    """
    count = 0 if examples is None else len(examples)
    if count < LEAST_EXAMPLES:
        raise DataError(f"{count} training examples are too few to hold some out.", "Tune without --optimise.")
    return min(HELD_OUT, MOST_HELD_OUT / count)


def _shown(
    reporter: Reporter,
    label: str,
    done: int,
    total: int,
    note: str = "",
    *,
    number: int,
    steps: int,
    trials: int,
    best: float | None,
) -> None:
    """Report the steps of all trials together."""
    if label == "tuning":
        note = f"trial {number + 1} of {trials}" + ("" if best is None else f"  best {best:.3f}")
        reporter("searching", number * steps + done, trials * steps, note)


def _ask(trials: Sequence[Trial], first: Trial, ranges: Ranges, choices: Choices, *, seed: int) -> Trial:
    """The next trial by optuna's tree-structured Parzen estimator; a function of its arguments alone."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [*ranges, *choices]
    space: dict[str, BaseDistribution] = {
        name: IntDistribution(low, high, log=True)
        if isinstance(low, int) and isinstance(high, int)
        else FloatDistribution(low, high, log=True)
        for name, (low, high) in ranges.items()
    }
    space |= {name: CategoricalDistribution(list(values)) for name, values in choices.items()}
    number = len(trials)
    # One seed per trial, so that a resumed search draws the same trials as an uninterrupted one.
    sampler = optuna.samplers.TPESampler(seed=1000 * seed + number, n_startup_trials=5)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for each in trials:
        values = {name: getattr(each, name) for name in names}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=space, value=each.score))
    asked = study.ask(fixed_distributions=space).params
    return Trial(**first.model_dump() | {"number": number, "score": 0.0} | asked)


class _KeptTrials:
    """The finished trials on disk, one JSON file, rewritten after each; nothing is saved without `files`."""

    def __init__(self, files: RunFiles | None, digest: str, *, resume: bool) -> None:
        self._path = None if files is None else files.search
        self._digest = digest
        self._resume = resume

    def read(self) -> list[Trial]:
        """The trials to continue from.

        :raises TrainingError: When they belong to other settings, or cannot be read.
        """
        if self._path is None or not self._resume or not self._path.exists():
            return []
        try:
            kept = _Kept.model_validate_json(self._path.read_bytes())
        except ValidationError as error:
            raise TrainingError(f"{self._path} holds no trials.", "Start over with --overwrite.") from error
        if kept.digest != self._digest:
            raise TrainingError(
                f"the trials in {self._path} were made with other settings.",
                "Give the same options, or start over with --overwrite.",
            )
        return list(kept.trials)

    def write(self, trials: Sequence[Trial]) -> None:
        """Save all trials."""
        if self._path is not None:
            kept = _Kept(digest=self._digest, trials=tuple(trials))
            write_bytes(self._path, kept.model_dump_json(indent=1).encode())


class _Kept(Frozen):
    digest: str
    trials: tuple[Trial, ...]
