"""Do one run, from its configuration to its metrics and predictions; or time one again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from uhl_cli.commands.options import TuneOptions
from uhl_cli.commands.scoring import Classes, Predictor, references_of
from uhl_cli.commands.tune import tune
from uhl_cli.commands.tune_setup import prepare
from uhl_cli.compare.baselines import Retrained, fit
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.costs import nothing_costs, ported_costs, retrained_costs
from uhl_cli.compare.distilled import FROM_SOURCE, distilled, distilled_shape
from uhl_cli.compare.methods import METHODS, NEW_TASK
from uhl_cli.compare.outcome import Outcome, curve_of_log, evaluation_of, refuse_other_labels, train_of
from uhl_cli.compare.resources import AlignedFile, Resources
from uhl_cli.compare.results import (
    Costs,
    CurvePoint,
    DevPoint,
    Predicted,
    RunFolder,
    RunMetrics,
    Search,
    both_scores,
    published,
)
from uhl_cli.compare.search import chosen_training, search_once, split_for_search
from uhl_cli.compare.sections import TrainingSection
from uhl_cli.compare.size_projectors import by_size_alone, on_target, projectors_path, read_kept
from uhl_cli.data import Examples, TaskData
from uhl_cli.errors import UsageError
from uhl_cli.files import write_text
from uhl_cli.metrics import Difference, Score, paired_difference, score
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.controls import by_size
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import Reporter, phase, silent
from uhl_cli.train.loop import accelerator_for
from uhl_cli.train.run_files import RunFiles


def make_run(run: RunConfig, resources: Resources, mode: str, searches: dict[str, Search]) -> RunMetrics:
    """Do a run and write its folder.

    :param searches: Finished searches by method and group; seeds share them.
    :raises UhlError: Any of its kinds; the folder then has no metrics.
    """
    data = resources.data(run.dataset)
    kind = METHODS[run.method].kind
    if kind == "retrained":
        outcome = _retrained(run, resources, data, searches)
    elif kind == "tuned":
        outcome = _tuned(run, resources, data, searches)
    elif kind == "distilled":
        outcome = distilled(run, resources, data, searches)
    elif kind == "generated":
        outcome = by_size_alone(run, resources, data)
    else:
        outcome = _ported(run, resources, data)
    metrics = _metrics(run, data, outcome, mode, resources.device_name)
    folder = RunFolder(resources.results, run.run_id)
    predicted = Predicted(
        labels=data.task.labels,
        metric=data.task.metric,
        predictions=outcome.predictions,
        references=references_of(evaluation_of(data)),
    )
    folder.write(run, metrics, predicted)
    return metrics


def _metrics(run: RunConfig, data: TaskData, outcome: Outcome, mode: str, device: str) -> RunMetrics:
    task, references = data.task, references_of(evaluation_of(data))

    def scored(predictions: Classes) -> Score:
        return score(task.metric, predictions, references, task.labels)

    before = outcome.zero_shot
    gain: Difference | None = None
    if before is not None:
        gain = paired_difference(task.metric, outcome.predictions, before, references, task.labels)
    costs, budget = outcome.costs, run.budget
    within = costs.adapter_bytes <= budget.max_bytes and costs.flops_percent <= budget.max_flops
    manifest = None if outcome.adapter is None else outcome.adapter.manifest
    both = both_scores(outcome.predictions, references, task.labels)
    return RunMetrics(
        run_id=run.run_id,
        method=run.method,
        host=run.host.name,
        task=task.name,
        seed=run.seed,
        config_digest=run.digest,
        mode=mode,
        source=outcome.source if manifest is None else manifest.source.name,
        source_score=outcome.source_score if manifest is None else manifest.score,
        score=scored(outcome.predictions),
        f1=both.f1,
        f1_metric=both.f1_metric,
        accuracy=both.accuracy,
        published=published(costs, both),
        zero_shot=None if before is None else scored(before),
        gain=gain,
        costs=costs,
        within_budget=within and (costs.atoms_per_token or 0.0) <= budget.max_atoms,
        training_seconds=outcome.seconds,
        search=outcome.search,
        curve=outcome.curve,
        dev_curve=outcome.dev_curve,
        train_examples=_train_examples(run, data, outcome),
        device=device,
        timed_on=None if costs.wall_clock_percent is None else device,
    )


def _train_examples(run: RunConfig, data: TaskData, outcome: Outcome) -> int:
    if outcome.examples is not None:
        return outcome.examples
    return len(train_of(data)) if METHODS[run.method].trained else 0


def _ported(run: RunConfig, resources: Resources, data: TaskData) -> Outcome:
    """The ported adapter and its controls."""
    aligned_file = resources.aligned_file(run)
    adapter, host = aligned_file.adapter, aligned_file.host
    refuse_other_labels(run, adapter.manifest.task, data)
    predictor = Predictor(
        adapter, evaluation_of(data), batch_size=run.evaluation.batch_size, reporter=resources.reporter
    )
    file_bytes = aligned_file.path.stat().st_size
    if run.method == "majority-class":
        return Outcome(predictor.majority_class(), nothing_costs(), adapter=adapter)
    if run.method == "head-only":
        parameters = (
            aligned_file.adapter.stored["head_weight"].numel() + aligned_file.adapter.stored["head_bias"].numel()
        )
        costs = Costs(adapter_bytes=file_bytes, memory_mb=4e-6 * parameters, flops_percent=0.0)
        return Outcome(predictor.head_only(host, aligned_file.aligned.alignment), costs, adapter=adapter)
    ported = ported_by(run, aligned_file)
    if run.method == "random-update":
        predictions = predictor.random_update(ported, run.seed)
        costs = ported_costs(ported, host, run.evaluation, file_bytes=file_bytes, atoms=None)
        return Outcome(predictions, costs, adapter=adapter)
    found = predictor.predicted(ported, run.method)
    costs = ported_costs(ported, host, run.evaluation, file_bytes=file_bytes, atoms=found.atoms_per_token)
    return Outcome(found.classes, costs, adapter=adapter)


def ported_by(run: RunConfig, aligned_file: AlignedFile) -> PortedModel:
    """The adapter on its host; for `size-only` with that control's alignment, for random updates with full updates."""
    adapter, aligned = aligned_file.adapter, aligned_file.aligned
    if run.method == "random-update":
        return adapter.port(aligned, strength=1.0)
    return adapter.port(by_size(aligned, adapter.bank) if run.method == "size-only" else aligned)


def _tuned(run: RunConfig, resources: Resources, data: TaskData, searches: dict[str, Search]) -> Outcome:
    """`uhl tune`, after a search if one is asked for; an adapter of another task gets a new readout.

    :raises UsageError: When the file's task is the run's own and the method is that of a new task, or the reverse.
    """
    host = resources.bare_host(run.host)
    adapter, adapter_path = resources.adapter(run)
    folder = RunFolder(resources.results, run.run_id).path
    known = adapter.manifest.task
    own = (known.name, known.kind, known.labels) == (data.task.name, data.task.kind, data.task.labels)
    if run.adapter is not None and run.adapter.file is not None and own == (run.method == NEW_TASK):
        raise UsageError(
            f"run {run.run_id}: on {data.task.name}, the adapter of {known.name} is not tuned by {run.method}.",
            f"Use {'uhl-tuned' if own else NEW_TASK}, which the tables keep apart.",
        )
    dev = _DevScores(run, data)
    alignments: dict[int | None, AlignedHost] = {}

    def tuned(data: TaskData, training: TrainingSection, name: str, files: RunFiles | None) -> PortedModel:
        output = folder / f"{name}.task.safetensors"
        options = TuneOptions(
            adapter=adapter_path,
            target=resources.host_options(run.host),
            training=run.model_copy(update={"training": training}).tuning(),
            top_k=training.top_k,
            max_length=training.max_length,
            max_flops=run.budget.max_flops,
            output=output,
            overwrite=True,
            resume=files is not None and files.checkpoint.exists(),
            cache=False,
        )
        accelerator = accelerator_for(resources.device, training.mixed_precision)
        unscored = replace(data, evaluation=None)
        if training.top_k not in alignments:  # another task's depends on the new readout and on the number of atoms
            alignments[training.top_k] = (
                resources.aligned_file(run).aligned
                if own
                else prepare(adapter, host, unscored, options, resources.reporter).aligned
            )
        aligned = alignments[training.top_k]

        def after_step(done: int, ported_now: Callable[[], PortedModel]) -> None:
            dev.after_step(done, lambda examples: classes(ported_now(), examples, "dev")[0])

        tune(
            adapter,
            host,
            unscored,
            options,
            accelerator=accelerator,
            files=files,
            reporter=resources.reporter,
            aligned=aligned,
            after_step=None if files is None else after_step,
        )
        return adapter.with_task(output).port(aligned)

    def classes(ported: PortedModel, examples: Examples, label: str) -> tuple[Classes, float]:
        found = ported.classes_of(
            examples,
            batch_size=run.evaluation.batch_size,
            max_length=min(run.training.max_length, host.max_length),
            progress=phase(resources.reporter, f"scoring: {label}"),
        )
        return found.for_metric(data.task.kind), found.atoms_per_token

    def attempt(train: TaskData, held: Examples, training: TrainingSection) -> Classes:
        return classes(tuned(train, training, "search", None), held, "held out")[0]

    search = _search(run, data, searches, attempt, folder)
    training = chosen_training(run, search)
    started = time.monotonic()
    files = RunFiles(folder / "tuning.uhl-run")
    dev.keep_in(files.folder / "dev.jsonl")
    ported = tuned(data, training, "tuned", files)
    seconds = time.monotonic() - started - dev.seconds
    predictions, atoms = classes(ported, evaluation_of(data), "tuned")
    before = None
    if own:
        bare = adapter.port(resources.aligned_file(run).aligned)
        before = classes(bare, evaluation_of(data), "zero-shot")[0]
    (folder / "search.task.safetensors").unlink(missing_ok=True)
    file_bytes = adapter_path.stat().st_size + (folder / "tuned.task.safetensors").stat().st_size
    costs = ported_costs(ported, host, run.evaluation, file_bytes=file_bytes, atoms=atoms)
    curve = tuple(curve_of_log(files.log))
    shutil.rmtree(files.folder)  # its checkpoint is no longer needed
    return Outcome(predictions, costs, seconds, search, curve, before, adapter, dev.points())


def _retrained(run: RunConfig, resources: Resources, data: TaskData, searches: dict[str, Search]) -> Outcome:
    """A baseline, trained on a copy of the host after a search if one is asked for."""
    dev = _DevScores(run, data)

    def trained(
        train: Examples, training: TrainingSection, observed: bool = False
    ) -> tuple[Retrained, list[CurvePoint]]:
        model = Retrained(run.method, resources.fresh_host(run.host), len(data.task.labels), training)
        accelerator = accelerator_for(resources.device, training.mixed_precision)

        def note(done: int, total: int, text: str) -> None:
            resources.reporter(f"training: {run.method}", done, total, text)

        def after_step(done: int) -> None:
            if observed:
                dev.after_step(done, lambda examples: predicted(model, examples, silent))

        return model, fit(model, train, training, accelerator=accelerator, on_step=note, after_step=after_step)

    def predicted(model: Retrained, examples: Examples, reporter: Reporter) -> Classes:
        return model.predict(
            examples,
            batch_size=run.evaluation.batch_size,
            max_length=run.training.max_length,
            progress=phase(reporter, f"scoring: {run.method}"),
        )

    def attempt(train: TaskData, held: Examples, training: TrainingSection) -> Classes:
        return predicted(trained(train_of(train), training)[0], held, resources.reporter)

    search = _search(run, data, searches, attempt, RunFolder(resources.results, run.run_id).path)
    started = time.monotonic()
    model, curve = trained(train_of(data), chosen_training(run, search), observed=True)
    seconds = time.monotonic() - started - dev.seconds
    predictions = predicted(model, evaluation_of(data), resources.reporter)
    costs = retrained_costs(model, resources.bare_host(run.host), run.evaluation)
    return Outcome(predictions, costs, seconds, search, tuple(curve), dev_curve=dev.points())


class _DevScores:
    """Scores on the evaluation data every `eval_steps`, and the seconds that they took."""

    def __init__(self, run: RunConfig, data: TaskData) -> None:
        self.seconds = 0.0
        self._every = run.training.eval_steps
        self._data = data
        self._points: dict[int, DevPoint] = {}
        self._path: Path | None = None

    def keep_in(self, path: Path) -> None:
        """Save the scores in a file, and begin with those of an interrupted training in it."""
        self._path = path
        if path.exists():
            found = [DevPoint.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self._points = {point.step: point for point in found}

    def after_step(self, done: int, classes: Callable[[Examples], Classes]) -> None:
        """Score after this number of steps, if it is one of those."""
        if self._every is None or done % self._every:
            return
        started = time.monotonic()
        examples, task = evaluation_of(self._data), self._data.task
        predictions, references = classes(examples), references_of(examples)
        value = score(task.metric, predictions, references, task.labels).value
        both = both_scores(predictions, references, task.labels)
        self._points[done] = DevPoint(step=done, score=value, f1=both.f1, accuracy=both.accuracy)
        if self._path is not None:
            write_text(self._path, "".join(f"{point.model_dump_json()}\n" for point in self.points()))
        self.seconds += time.monotonic() - started

    def points(self) -> tuple[DevPoint, ...]:
        """All scores, by step."""
        return tuple(self._points[step] for step in sorted(self._points))


Attempt = Callable[[TaskData, Examples, TrainingSection], Classes]


def _search(
    run: RunConfig, data: TaskData, searches: dict[str, Search], attempt: Attempt, folder: Path
) -> Search | None:
    """The run's search on held-out training examples, see `search_once`."""

    def split(limit: int) -> tuple[Examples, Callable[[TrainingSection], Classes]]:
        held, rest = split_for_search(train_of(data), limit)
        return held, lambda training: attempt(replace(data, train=rest), held, training)

    return search_once(run, data.task, searches, split, folder)


def has_clock(run: RunConfig, results: Path) -> bool:
    """Whether a finished run has a wall-clock time; the majority class has none."""
    return RunFolder(results, run.run_id).read().costs.wall_clock_percent is not None


def time_again(run: RunConfig, resources: Resources) -> RunMetrics:
    """The metrics of a finished run with a new wall-clock in percent of the bare host's, written to its folder.

    Parallel processes slow each other down, so the caller must ensure that nothing else runs.  Nothing is trained:
    the time of a pass depends on a model's shape, not on its values.

    :raises FormatError: When its metrics are damaged.
    :raises UsageError: When the run's adapter is not there.
    """
    folder = RunFolder(resources.results, run.run_id)
    metrics = folder.read()
    percent = _wall_clock(run.model_copy(update={"training": chosen_training(run, metrics.search)}), resources)
    costs = metrics.costs.model_copy(update={"wall_clock_percent": percent})
    metrics = metrics.model_copy(update={"costs": costs, "timed_on": resources.device_name})
    folder.write_metrics(metrics)
    return metrics


def _wall_clock(run: RunConfig, resources: Resources) -> float | None:
    if METHODS[run.method].kind == "retrained" or run.method == FROM_SOURCE:
        labels = len(resources.data(run.dataset).task.labels)
        structure = "lora" if run.method == FROM_SOURCE else run.method
        model = Retrained(structure, resources.fresh_host(run.host), labels, run.training).as_stored()
        return retrained_costs(model, resources.bare_host(run.host), run.evaluation).wall_clock_percent
    generated = METHODS[run.method].kind == "generated"
    path = projectors_path(run, resources) if generated else resources.adapter_path(run)
    if not path.exists():
        raise UsageError(f"{path} no longer exists.", "Make the run again with --overwrite.")
    if generated:
        ported = on_target(run, resources, read_kept(path))
    elif METHODS[run.method].kind == "distilled":
        ported = distilled_shape(run, resources.aligned_file(run))
    elif run.method != NEW_TASK and run.training.top_k is None:
        # A tuned adapter only differs in its gains.
        ported = ported_by(run, resources.aligned_file(run))
    else:
        task_file = RunFolder(resources.results, run.run_id).path / "tuned.task.safetensors"
        tuned = resources.adapter(run)[0].with_task(task_file)
        ported = tuned.port(tuned.align(resources.bare_host(run.host), max_flops=run.budget.max_flops))
    return ported_costs(ported, ported.host, run.evaluation, file_bytes=0, atoms=None).wall_clock_percent
