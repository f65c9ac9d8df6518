"""The sections of a run's configuration, each of what one part of the run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from uhl_cli.commands.options import DataOptions, HostOptions
from uhl_cli.compare.options import Tracker
from uhl_cli.schema import Frozen, Schedule, TrainingConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Searched = Literal["learning_rate", "lambda_F", "lambda_Q", "top_k", "rank", "batch_size"]


class WithLater(Frozen):
    """A section that leaves out what later versions added and is not set, so that runs kept by earlier versions are
    still the same runs.

    :cvar later: Names of these fields.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _content(self, usual: SerializerFunctionWrapHandler) -> dict[str, object]:
        content: dict[str, object] = usual(self)
        return {name: value for name, value in content.items() if name not in self.later or value is not None}


class AdapterSection(WithLater):
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
    label: str | None = Field(None, pattern=NAME, max_length=50, description="end of the names of a grid's runs")

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


class DatasetSection(WithLater, DataOptions):
    """The data set; `task` is required."""

    task: str

    later: ClassVar = frozenset({"encoding"})


class TrainingSection(WithLater):
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
