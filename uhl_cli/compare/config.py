"""The validated configuration of a run."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from uhl_cli.commands.options import DataOptions, HostOptions, TuneTraining, tuning_defaults
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.sections import (
    NAME,
    AdapterSection,
    BudgetSection,
    DatasetSection,
    EvaluationSection,
    OptunaSection,
    SearchSection,
    TrackingSection,
    TrainingSection,
    WithLater,
)
from uhl_cli.schema import TrainingConfig

# What uhl itself keeps in a results folder, beside the folders of the runs; no run may have one of these names.
ADAPTERS, PROJECTORS, COMPARISON, TRACKING = "adapters", "projectors", "comparison", "tracking"
SEARCHES = "searches.json"
RESERVED = (ADAPTERS, PROJECTORS, COMPARISON, TRACKING, SEARCHES)


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


Name = Annotated[str, Field(pattern=NAME, max_length=200), BeforeValidator(_name)]


class RunConfig(WithLater):
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


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Later parts over earlier ones, section by section."""
    result: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            old = result.get(name)
            result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


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
            "num_anchors": 64,
            "feature_words": 0,
            "transfer_set": "8",
        }
        if run.adapter.task is not None:
            small["adapter"]["dataset"] = few
    return RunConfig.model_validate(merged(run.model_dump(), small))
