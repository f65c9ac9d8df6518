"""Validated YAML configurations of runs: one run per file, or a grid of many."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StrictInt,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from uhl_cli.commands.flags import Options
from uhl_cli.commands.options import DataOptions, HostOptions, TuneTraining, tuning_defaults
from uhl_cli.compare.methods import METHODS
from uhl_cli.errors import UsageError
from uhl_cli.schema import Frozen, Schedule, TrainingConfig

SETS = Path(__file__).parent / "sets"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
# What uhl itself keeps in a results folder, beside the folders of the runs; no run may have one of these names.
ADAPTERS, PROJECTORS, COMPARISON, TRACKING = "adapters", "projectors", "comparison", "tracking"
SEARCHES = "searches.json"
RESERVED = (ADAPTERS, PROJECTORS, COMPARISON, TRACKING, SEARCHES)
Mode = Literal["trial", "full"]
Tracker = Literal["none", "tensorboard", "wandb"]
Searched = Literal["learning_rate", "lambda_F", "lambda_Q", "top_k", "rank", "batch_size"]


def dotless(name: str) -> str:
    """A run's name without dots, the same for equal names alone.

    Each dot becomes a hyphen, and six hexadecimal digits of the name's SHA-256 follow; a name without dots stays.
    """
    if "." not in name:
        return name
    return f"{name.replace('.', '-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _name(name: object) -> object:
    """The name of a run without dots.

    :raises ValueError: When it is that of a folder or file of uhl's own, on whichever file system.
    """
    if not isinstance(name, str):
        return name
    if name.casefold() in RESERVED or name in {dotless(each) for each in RESERVED}:
        raise ValueError(f"{name!r} is what uhl calls a part of the results folder; the run needs another name")
    return dotless(name)


Name = Annotated[str, Field(pattern=_NAME, max_length=200), BeforeValidator(_name)]


class _WithLater(Frozen):
    """A section that leaves out what later versions added and is not set, so that runs kept by earlier versions are
    still the same runs.

    :cvar later: Names of these fields.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _content(self, usual: SerializerFunctionWrapHandler) -> dict[str, object]:
        content: dict[str, object] = usual(self)
        return {name: value for name, value in content.items() if name not in self.later or value is not None}


class CompareOptions(Options):
    """All of `uhl compare`; without a method, host, task or seed, all are run."""

    option_names: ClassVar = {
        "configs": "config",
        "places": "at",
        "methods": "method",
        "hosts": "host",
        "tasks": "task",
        "seeds": "seed",
        "list_runs": "list",
    }

    configs: tuple[str, ...] = Field(
        min_length=1,
        description="YAML file of one run or of a grid, or a shipped one, such as local or published. May be repeated",
    )
    results_dir: Path = Field(Path("results"), description="folder of all results")
    mode: Mode = Field(
        "full", description="how much of each run is done; trial runs two steps, as a check that everything works"
    )
    places: dict[str, str] = Field(
        default_factory=dict, description="location of that host or data set. May be repeated"
    )
    methods: tuple[str, ...] = Field((), description="only this method. May be repeated")
    hosts: tuple[str, ...] = Field((), description="only this host. May be repeated")
    tasks: tuple[str, ...] = Field((), description="only this data set. May be repeated")
    seeds: tuple[int, ...] = Field((), description="only this seed. May be repeated")
    list_runs: bool = Field(False, description="print the names of the runs and stop")
    device: str = Field("auto", description="device: cpu, cuda, cuda:1, mps, or auto for the best available")
    offline: bool = Field(False, description="use only local or cached files")
    resume: bool = Field(False, description="skip finished runs and do the others")
    overwrite: bool = Field(False, description="replace existing output")
    compare_only: bool = Field(False, description="do no run; compare the finished ones")
    time_only: bool = Field(False, description="do no run; measure the wall-clock time of the finished ones again")
    figures: bool = Field(True, description="draw figures (needs matplotlib)")
    report_to: Tracker | None = Field(
        None, description="also report runs to a tracker, in full mode; by default as each configuration says"
    )


class AdapterSection(_WithLater):
    """The adapter to port: a file, or one pretrained on `source` with the run's seed.

    It is pretrained on the run's data set; with `task`, on that task for all data sets alike.

    :param pretraining: How it is pretrained; `seed` replaces its seed.
    :param anchors: As `uhl pretrain --anchors`.
    :param seed: Seed of its pretraining, so that the runs of several seeds share one file; None: the run's own.
    """

    file: Path | None = None
    source: HostOptions | None = None
    pretraining: TrainingConfig = TrainingConfig()
    anchors: str | None = "general"
    num_anchors: int = Field(2048, ge=32, le=20_000)
    feature_words: int | None = Field(None, ge=0, le=200_000)
    transfer_set: str | None = Field(None, description="as `uhl pretrain --transfer-set`; None: auto")
    task: str | None = Field(None, description="task of its pretraining")
    dataset: DataOptions | None = Field(None, description="location, columns and limits of that task's data")
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    label: str | None = Field(None, pattern=_NAME, max_length=50, description="end of the names of a grid's runs")

    later: ClassVar = frozenset({"transfer_set", "task", "dataset", "seed", "label"})

    @model_validator(mode="after")
    def _one_of_them(self) -> AdapterSection:
        if (self.file is None) == (self.source is None):
            raise ValueError("an adapter section needs either file or source")
        if self.seed is not None and self.source is None:
            raise ValueError("seed is that of pretraining on source; a file has its own")
        if self.task is not None and self.source is None:
            raise ValueError("task is that of pretraining on source; a file has its own")
        if self.dataset is not None and (self.task is None or self.dataset.task is not None):
            raise ValueError("dataset describes the data of task, which must be named beside it")
        return self


class DatasetSection(_WithLater, DataOptions):
    """The data set; `task` is required."""

    task: str

    later: ClassVar = frozenset({"encoding"})


class TrainingSection(_WithLater):
    """How a method is trained on the target.

    `rank` only applies to LoRAs and SAT-LoRA, `alpha` and `atoms` to LoRA and SAT-LoRA, `lambda_F`, `lambda_Q` and
    `top_k` to `uhl-tuned` and `uhl-tuned-new-task`.  What a method with `uhl tune`'s defaults leaves out, these replace
    (`RunConfig`).
    """

    steps: int = Field(500, ge=1)
    batch_size: int = Field(32, ge=1, le=4096)
    learning_rate: float = Field(1.5e-3, gt=0, le=1, description="used without a search")
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.01, ge=0, le=1)
    max_length: int = Field(128, ge=4, le=100_000)
    rank: int = Field(8, ge=1, le=1024)
    alpha: float = Field(16.0, gt=0)
    atoms: int = Field(32, ge=1, le=4096, description="rows of each of SAT-LoRA's dictionaries")
    gradient_clip: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0, le=2**31 - 1)
    mixed_precision: str = Field("no", pattern="^(no|bf16|fp16)$")
    schedule: Schedule | None = Field(
        None, description="by transformers' get_scheduler; None: linear warm-up, then half a cosine"
    )
    eval_steps: int | None = Field(None, ge=1, description="steps between dev scores in training")
    lambda_F: float | None = Field(None, ge=0, le=10, description="weight of active atoms in the loss")
    lambda_Q: float | None = Field(None, ge=0, le=10, description="weight of delta-theta's square in the loss")
    top_k: Literal[1, 2] | None = Field(None, description="most active atoms per token")

    later: ClassVar = frozenset({"schedule", "eval_steps", "lambda_F", "lambda_Q", "top_k"})


class EvaluationSection(Frozen):
    """How a run is scored and measured.

    :param timing_repetitions: Passes of the wall-clock measurement; 0 leaves it out.
    """

    batch_size: int = Field(64, ge=1)
    sequence_length: int = Field(128, ge=1)
    timing_batch_size: int = Field(8, ge=1)
    timing_repetitions: int = Field(10, ge=0)


class BudgetSection(Frozen):
    """Limits that a run must meet to count among the best."""

    max_bytes: int = Field(1_000_000, ge=1)
    max_flops: float = Field(10.0, gt=0, description="percent of the host's own")
    max_atoms: float = Field(2.0, gt=0, description="active atoms per token")


class SearchSection(Frozen):
    """The search of a learning rate on held-out training examples; without rates there is no search.

    If the best rate is the smallest or largest, the search goes beyond it by `edge_factor`, at most `edge_tries` times.
    """

    learning_rates: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    steps: int = Field(150, ge=1)
    held_out: int = Field(2000, ge=1)
    edge_factor: float = Field(3.0, gt=1)
    edge_tries: int = Field(2, ge=0, le=10)


class SearchRange(Frozen):
    """A range of a search, on a log scale."""

    low: int | float = Field(gt=0)
    high: int | float = Field(gt=0)

    @model_validator(mode="after")
    def _rises(self) -> SearchRange:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


def _is_number(value: object) -> bool:
    """Whether pydantic takes it for a number, with a string such as YAML's 1e-3, and it is no boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _kind_of_space(value: object) -> str | None:
    """Which part of a search space a value is; None if it is none."""
    if isinstance(value, SearchRange):
        return "range"
    if isinstance(value, dict):
        wrong = [each for name, each in value.items() if name in SearchRange.model_fields and not _is_number(each)]
        return None if wrong else "range"
    whole = isinstance(value, (list, tuple)) and value and all(_is_number(each) for each in value)
    return "choices" if whole else None


_SearchPart = Annotated[
    Annotated[SearchRange, Tag("range")] | Annotated[tuple[int | float, ...], Tag("choices")],
    Discriminator(
        _kind_of_space,
        custom_error_type="search_part",
        custom_error_message="it must be a list of numbers, or {low: NUMBER, high: NUMBER}",
    ),
]


class OptunaSection(Frozen):
    """A search by optuna on held-out training examples; the first trial has the values of `training`.

    :param search_space: A range, or a list of choices, by name of a setting of `training`.
    """

    n_trials: int = Field(25, ge=1, le=10_000)
    search_space: dict[Searched, _SearchPart] = Field(min_length=1)
    steps: int | None = Field(None, ge=1, description="steps of a trial; None: those of the run")
    held_out: int = Field(2000, ge=1)

    def space(self) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, ...]]]:
        """Ranges and choices by setting; an integer setting has integers.

        :raises ValidationError: When a value is none that its setting may have.
        """
        ranges: dict[str, tuple[float, float]] = {}
        choices: dict[str, tuple[float, ...]] = {}
        for name, part in self.search_space.items():
            values = (part.low, part.high) if isinstance(part, SearchRange) else part
            read = [getattr(TrainingSection.model_validate({name: value}), name) for value in values]
            if isinstance(part, SearchRange):
                ranges[name] = (read[0], read[1])
            else:
                choices[name] = tuple(read)
        return ranges, choices


class TrackingSection(Frozen):
    """Where a run is reported besides its files; never in trial mode."""

    report_to: Tracker = "none"
    entity: str | None = Field(None, description="user or team of Weights & Biases")
    project: str = Field("uhl-compare", description="project of Weights & Biases")


class RunConfig(_WithLater):
    """One run: a method on a host and a data set.

    Steps, learning rate, warm-up and weight decay that are not given are those of the method's own command.
    """

    run_id: Name
    method: str
    host: HostOptions
    adapter: AdapterSection | None = None
    dataset: DatasetSection
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    budget: BudgetSection = BudgetSection()
    search: SearchSection = SearchSection()
    optuna: OptunaSection | None = None
    tracking: TrackingSection | None = None

    later: ClassVar = frozenset({"optuna", "tracking"})

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, content: Any) -> Any:  # noqa: ANN401 - whatever stands in a file
        """Pydantic takes `true` for 1, so that `steps: true` would be a single step."""
        wrong = _boolean_for_number(cls, content)
        if wrong is not None:
            raise ValueError(f"{wrong} is true or false, and must be a number")
        return content

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, content: Any) -> Any:  # noqa: ANN401 - whatever stands in a file
        method = METHODS.get(str(content.get("method"))) if isinstance(content, dict) else None
        if method is None or method.mode is None:
            return content
        given = content.get("training", {})
        given = given.model_dump(exclude_unset=True) if isinstance(given, TrainingSection) else given
        if not isinstance(given, dict):
            return content
        own = TuneTraining().with_defaults(method.mode)
        values = {"steps": own.max_steps, "learning_rate": own.learning_rate, "weight_decay": own.weight_decay} | given
        if "warmup_steps" not in values:
            try:  # YAML reads 1.5e+3 as a float, which the section takes for whole steps
                steps = TrainingSection.model_validate({"steps": values["steps"]}).steps
            except ValidationError:
                return content  # the section itself says what is wrong
            values["warmup_steps"] = round(steps * own.warmup_fraction)
        return content | {"training": values}

    @model_validator(mode="after")
    def _hosts_are_named(self) -> RunConfig:
        if not self.host.name.strip():
            raise ValueError("host.name must not be empty")
        if self.adapter is not None and self.adapter.source is not None and not self.adapter.source.name.strip():
            raise ValueError("adapter.source.name must not be empty")
        return self

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"unknown method {value!r}; choose from {', '.join(METHODS)}")
        return value

    @model_validator(mode="after")
    def _ported_needs_adapter(self) -> RunConfig:
        if METHODS[self.method].kind != "retrained" and self.adapter is None:
            raise ValueError(f"method {self.method} needs an adapter section")
        if METHODS[self.method].kind in ("ported", "generated", "distilled") and not self.own_task:
            assert self.adapter is not None  # otherwise the task is its own
            raise ValueError(
                f"{self.run_id}: {self.method} is not defined on {self.dataset.task} for an adapter that is pretrained "
                f"on {self.adapter.task}, which has no readout for it: use uhl-tuned-new-task, or an adapter of its own"
            )
        return self

    @model_validator(mode="after")
    def _generated_from_a_source(self) -> RunConfig:
        """Alignment noise is in standard deviations of fitted coordinates, and generated ones have no fixed size."""
        if METHODS[self.method].kind != "generated":
            return self
        assert self.adapter is not None  # checked before
        if self.adapter.source is None:
            raise ValueError(f"{self.run_id}: {self.method} is trained on a source: name it in the adapter section")
        if self.adapter.pretraining.noise + self.adapter.pretraining.update_noise > 0:
            raise ValueError(f"{self.run_id}: {self.method} has no alignment noise: set it to 0 under pretraining")
        return self

    @model_validator(mode="after")
    def _tuned_on_the_right_task(self) -> RunConfig:
        """Tuning for the adapter's own task and for a new one, with a new readout, are two methods in tables.

        A file's task is only known when it is read; `runs.make_run` then refuses the other method.
        """
        if self.adapter is not None and self.adapter.file is not None:
            return self
        wanted = {"uhl-tuned": True, "uhl-tuned-new-task": False}.get(self.method, self.own_task)
        if wanted != self.own_task:
            right = "uhl-tuned" if self.own_task else "uhl-tuned-new-task"
            raise ValueError(
                f"{self.run_id}: on {self.dataset.task}, an adapter that is pretrained on {self.pretraining_data.task} "
                f"is tuned by {right}"
            )
        return self

    @model_validator(mode="after")
    def _searchable(self) -> RunConfig:
        if METHODS[self.method].kind == "distilled":
            if self.search.learning_rates and not METHODS[self.method].searches:
                raise ValueError(f"{self.run_id}: {self.method} has no search: its rates are those of its command")
            if self.training.eval_steps is not None:
                raise ValueError(f"{self.run_id}: {self.method} has no dev scores in training: leave out eval_steps")
        if self.optuna is None:
            return self
        if self.search.learning_rates:
            raise ValueError("search and optuna both choose the learning rate: leave out one")
        known = METHODS[self.method].searchable
        odd = [name for name in self.optuna.search_space if name not in known]
        if odd:
            raise ValueError(f"method {self.method} has no {odd[0]} to search; it has {', '.join(known) or 'none'}")
        try:
            self.optuna.space()
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"optuna.search_space.{first['loc'][0]}: {first['msg']}") from None
        return self

    @property
    def asks_for_search(self) -> bool:
        """Whether its training is searched, by rates or by optuna."""
        return self.optuna is not None or bool(self.search.learning_rates)

    @property
    def pretraining_data(self) -> DatasetSection:
        """The data that the run's adapter is pretrained on."""
        adapter = self.adapter
        if adapter is None or adapter.task is None or (adapter.task == self.dataset.task and adapter.dataset is None):
            return self.dataset
        section = DatasetSection(**(adapter.dataset or DataOptions()).model_dump() | {"task": adapter.task})
        return self.dataset if section == self.dataset else section

    @property
    def own_task(self) -> bool:
        """Whether the adapter is pretrained on the run's task, as far as the configuration tells."""
        return self.pretraining_data.task == self.dataset.task

    @property
    def plain_adapter(self) -> AdapterSection | None:
        """The adapter section without what does not affect the adapter: its label, and a task that is the run's own."""
        if self.adapter is None:
            return None
        own = {"task": None, "dataset": None} if self.pretraining_data is self.dataset else {}
        return self.adapter.model_copy(update=own | {"label": None})

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.training.seed

    @property
    def group(self) -> tuple[str, str]:
        """(data set, host): runs of one group are compared with each other."""
        return self.dataset.task, self.host.name

    @property
    def digest(self) -> str:
        """SHA-256 of everything that affects the result: not the name, nor where it is reported.

        A task of pretraining whose data is the run's own counts as none.
        """
        run = self.model_copy(update={"adapter": self.plain_adapter})
        return hashlib.sha256(run.model_dump_json(exclude={"run_id", "tracking"}).encode()).hexdigest()

    def tuning(self) -> TrainingConfig:
        """Training configuration of `uhl tune` or `uhl export` in this run; the rate is not the readout's."""
        chosen = ("batch_size", "learning_rate", "weight_decay", "max_length", "gradient_clip", "seed")
        own = {name: getattr(self.training, name) for name in chosen}
        own |= {"max_steps": self.training.steps, "mixed_precision": self.training.mixed_precision}
        chosen_now = {"active_weight": "lambda_F", "delta_weight": "lambda_Q", "schedule": "schedule"}
        values = {name: getattr(self.training, mine) for name, mine in chosen_now.items()}
        own |= {name: value for name, value in values.items() if value is not None}
        own["warmup_fraction"] = min(1.0, self.training.warmup_steps / self.training.steps)
        if METHODS[self.method].mode is not None:
            return TuneTraining(**own)
        return TrainingConfig(**{**tuning_defaults().model_dump(), **own})


def _types(annotation: object) -> list[object]:
    """The classes that an annotation is made of, and whatever else stands in it."""
    parts = get_args(annotation)
    return [each for part in parts for each in _types(part)] if parts else [annotation]


def _boolean_for_number(section: type[BaseModel], content: object) -> str | None:
    """Dotted path of the first boolean where the section, or one in it, has a number; None if there is none."""
    for name, value in content.items() if isinstance(content, dict) else ():
        field = section.model_fields.get(name)
        types = [] if field is None else _types(field.annotation)
        values = value if isinstance(value, (list, tuple)) else [value]
        number = any(each in (int, float) or isinstance(each, int) for each in types)  # of choices, types has these
        if number and bool not in types and any(isinstance(each, bool) for each in values):
            return str(name)
        for nested in types:
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                below = _boolean_for_number(nested, value)
                if below is not None:
                    return f"{name}.{below}"
    return None


class _Seeds(Frozen):
    # A boolean is no seed, though pydantic takes it for one.
    seeds: tuple[StrictInt, ...] | dict[str, tuple[StrictInt, ...]] = (0,)

    def of(self, host: str) -> tuple[int, ...]:
        """The seeds on this host."""
        return self.seeds.get(host, self.seeds.get("default", (0,))) if isinstance(self.seeds, dict) else self.seeds


class Grid(Frozen):
    """Every method on every host and data set, without those that a data set's `methods` sets to null.

    A run's sections are merged, later ones taking precedence, from `defaults`, its data set, its method, and its data
    set's entry for this method (under `methods`).  A run's name is METHOD--HOST--DATASET--sSEED, and with an adapter
    pretrained on another task METHOD--HOST--DATASET--sSEED--from-TASK; the adapter's label is appended.  Dots are
    replaced by `dotless`.
    """

    hosts: tuple[str, ...] = Field(min_length=1)
    datasets: dict[str, dict[str, Any]] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    defaults: dict[str, Any] = Field(default_factory=dict)

    def runs(self) -> list[dict[str, Any]]:
        """The configurations, not yet validated, ordered by data set, seed and host."""
        found = []
        for task, dataset in self.datasets.items():
            sections = {name: part for name, part in dataset.items() if name not in ("seeds", "methods")}
            special = dataset.get("methods", {})
            seeds = _Seeds(seeds=dataset.get("seeds", (0,)))
            for seed in dict.fromkeys(seed for host in self.hosts for seed in seeds.of(host)):
                for host in (host for host in self.hosts if seed in seeds.of(host)):
                    for method, overrides in self.methods.items():
                        if (here := special.get(method, {})) is None:
                            continue
                        run = _merged(self.defaults, sections, overrides, here)
                        parts = [method, host, task, f"s{seed}", *_of_adapter(run, method, task)]
                        place = {
                            "run_id": "--".join(_slug(part) for part in parts),
                            "method": method,
                            "host": {"name": host},
                            "dataset": {"task": task},
                            "training": {"seed": seed},
                        }
                        found.append(_merged(run, place))
        return found

    @model_validator(mode="after")
    def _sections_are_used(self) -> Grid:
        """What the grid itself sets, and what is no section beside one, would be dropped silently."""
        fields = {"run_id": None, "method": None, "host": "name", "dataset": "task", "training": "seed"}
        for where, part in self._parts():
            for name, value in part.items():
                inner = fields.get(name)
                if name in fields and (inner is None or (isinstance(value, dict) and inner in value)):
                    given = name if inner is None else f"{name}.{inner}"
                    raise ValueError(f"{where}.{given} is set by the grid's hosts, datasets, methods and seeds")
                if name in RunConfig.model_fields and not isinstance(value, (dict, type(None))):
                    raise ValueError(f"{where}.{name} must be a section")
        return self

    def _parts(self) -> list[tuple[str, dict[str, Any]]]:
        """Every place that holds sections, and these."""
        parts = [("defaults", self.defaults), *((f"methods.{name}", part) for name, part in self.methods.items())]
        for task, dataset in self.datasets.items():
            where = f"datasets.{task}"
            parts.append((where, {name: part for name, part in dataset.items() if name not in ("seeds", "methods")}))
            special = dataset.get("methods", {})
            for method, part in special.items() if isinstance(special, dict) else ():
                if not isinstance(part, (dict, type(None))):
                    raise ValueError(f"{where}.methods.{method} must be sections, or null")
                parts.append((f"{where}.methods.{method}", part or {}))
        return parts

    @model_validator(mode="after")
    def _seeds_of_hosts(self) -> Grid:
        for task, dataset in self.datasets.items():
            seeds = dataset.get("seeds")
            odd = [host for host in seeds if host not in (*self.hosts, "default")] if isinstance(seeds, dict) else []
            if odd:
                raise ValueError(f"the seeds of {task} name {odd[0]!r}, which is no host of the grid")
        return self

    @model_validator(mode="after")
    def _methods_of_data_sets(self) -> Grid:
        """A misspelt method would be left as it is, or be run in spite of its null."""
        for task, dataset in self.datasets.items():
            special = dataset.get("methods", {})
            if not isinstance(special, dict):
                raise ValueError(f"the methods of {task} must be sections by method")
            odd = [method for method in special if method not in self.methods]
            if odd:
                raise ValueError(f"the methods of {task} name {odd[0]!r}, which is no method of the grid")
        return self


def _of_adapter(run: dict[str, Any], method: str, task: str) -> list[str]:
    """What the run's name says of its adapter: another task of pretraining, and its label."""
    adapter = run.get("adapter")
    if not isinstance(adapter, dict) or (method in METHODS and METHODS[method].kind == "retrained"):
        return []
    other, label = adapter.get("task"), adapter.get("label")
    return ([] if other in (None, task) else [f"from-{other}"]) + ([] if label is None else [str(label)])


def _merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Later parts over earlier ones, section by section."""
    result: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            old = result.get(name)
            result[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-") or "x"


def load_configs(names: list[str]) -> list[RunConfig]:
    """The runs of files, or of shipped sets by name (`local`, `published`), in that order; equal ones once.

    :raises UsageError: When one cannot be read, has an unknown key, or two runs share a name.
    """
    runs: dict[str, RunConfig] = {}
    for name in names:
        for run in _from_file(_locate(name)):
            if run.run_id in runs and runs[run.run_id].digest != run.digest:
                raise UsageError(f"two runs are called {run.run_id}.", "Give every run a run_id of its own.")
            runs.setdefault(run.run_id, run)
    if not runs:
        raise UsageError("no run is configured.", "Name a file or a set with --config.")
    return list(runs.values())


def shipped_sets() -> list[str]:
    """Names of the sets that ship."""
    return sorted(path.stem for path in SETS.glob("*.yaml"))


def _locate(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name in shipped_sets():
        return SETS / f"{name}.yaml"
    raise UsageError(f"configuration {name} not found.", f"Name a YAML file, or one of {', '.join(shipped_sets())}.")


class _DoubledKey(Exception):
    """A mapping has a key twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a doubled key, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - as in yaml
        # Here and not where mappings are made: there, a merge (<<) has already put other mappings' keys before its own.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise _DoubledKey(f"the key {key.value!r} in line {key.start_mark.line + 1} stands there twice")
            seen.add((key.tag, key.value))
        return node


def _from_file(path: Path) -> list[RunConfig]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except _DoubledKey as error:
        raise UsageError(f"{path}: {error}.", "Leave out one of the two.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}.", "It must be a YAML file.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a configuration.", "See `uhl compare --help`.")
    try:
        if set(content) == {"grid"}:
            return [RunConfig.model_validate(run) for run in Grid.model_validate(content["grid"]).runs()]
        return [RunConfig.model_validate(content)]
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(str(part) for part in first["loc"])] if part)
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{path}: {where}{said}.", "Fix the configuration.") from error


def refuse_unknown_places(runs: list[RunConfig], places: dict[str, str], sources: Iterable[str] = ()) -> None:
    """Refuse a location (`--at NAME=PATH`) for a name that no run uses.

    :param sources: Names of hosts that only adapter files name.
    :raises UsageError: When there is one.
    """
    known = {run.host.name for run in runs} | {run.dataset.task for run in runs}
    known |= {run.adapter.source.name for run in runs if run.adapter and run.adapter.source}
    known |= {run.pretraining_data.task for run in runs} | set(sources)
    odd = sorted(set(places) - known)
    if odd:
        raise UsageError(f"no run has a host or data set {odd[0]!r}.", f"They are {', '.join(sorted(known))}.")


def trial(run: RunConfig) -> RunConfig:
    """The run in its smallest form: two steps on a few examples, as a check that everything works."""
    few = {"limit_train": 48, "limit_evaluation": 24}
    small: dict[str, Any] = {
        "dataset": few,
        "training": {"steps": 2, "batch_size": 8, "warmup_steps": 1, "max_length": 32, "mixed_precision": "no"},
        "evaluation": {"timing_repetitions": 1, "timing_batch_size": 1},
        "search": {"learning_rates": run.search.learning_rates[:1], "steps": 1, "held_out": 8, "edge_tries": 0},
        "optuna": None,
        "tracking": None,
    }
    if run.training.eval_steps is not None:
        small["training"]["eval_steps"] = 1
    if run.adapter is not None and run.adapter.source is not None:
        small["adapter"] = {
            "pretraining": {"max_steps": 2, "batch_size": 8, "max_length": 32},
            "num_anchors": 128,
            "feature_words": 0,
            "transfer_set": "8",
        }
        if run.adapter.task is not None:
            small["adapter"]["dataset"] = few
    return RunConfig.model_validate(_merged(run.model_dump(), small))
