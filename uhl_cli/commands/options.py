"""Options of the pipelines, validated, importable without torch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from pydantic import Field

from uhl_cli.schema import AdapterConfig, Frozen, Strategy, TrainingConfig

# What a command takes when nothing is named: both ship with the package.
DEFAULT_HOST = "builtin:base"
DEFAULT_TASK = "reviews"


class HostOptions(Frozen):
    """Which host, and how it is loaded."""

    name: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    offline: bool = False
    trust_remote_code: bool = False


class DataOptions(Frozen):
    """Which data, and which of its columns.  Without a task, that of the adapter is meant."""

    task: str | None = None
    data: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str | None = None
    evaluation_split: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    tokens_column: str | None = None
    limit_train: int | None = None
    limit_evaluation: int | None = None


class PretrainOptions(Frozen):
    """All of `uhl pretrain`.

    :param host: The source: its word states define canonical space.
    :param feature_words: Most words of the feature bank, which takes what the anchors leave of `max_bytes`.  None is as
        many as are of use, or no bank where there is no text or no room for one; a number insists on a bank; 0 is none.
    """

    host: HostOptions
    data: DataOptions
    output: Path = Path("adapter.safetensors")
    anchors: str | None = None
    num_anchors: int = Field(2048, ge=32, le=20_000)
    feature_words: int | None = Field(None, ge=0, le=200_000)
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    licence: str = Field("unspecified", max_length=500)
    max_bytes: int = Field(1_000_000, ge=1)
    max_flops: float = Field(10.0, gt=0)
    evaluation_batch_size: int = Field(64, ge=1)
    resume: bool = False
    overwrite: bool = False
    save_every: int = Field(200, ge=1)

    def command(self) -> str:
        """The command line that makes the same file: every option that decides its content, none that does not.

        Absolute paths are shortened to their last part, so that a shared file does not tell of its maker's disk.
        """
        parts = ["uhl", "pretrain", "--host", _shown(self.host.name), "--task", _shown(self.data.task or "")]
        flags: dict[str, object] = {
            "host-revision": self.host.revision,
            "dtype": None if self.host.dtype == "float32" else self.host.dtype,
        }
        flags |= _data_flags(self.data)
        flags["anchors"] = self.anchors
        flags |= _changed(self, PretrainOptions, ("num_anchors", "feature_words", "max_bytes", "max_flops"))
        flags |= _changed(self.training, TrainingConfig, tuple(TrainingConfig.model_fields))
        strategy: Strategy = self.adapter.strategy
        flags["align"] = None if strategy == "anchors" else strategy
        flags["licence"] = None if self.licence == "unspecified" else self.licence
        return _joined(parts, flags)


def _data_flags(data: DataOptions) -> dict[str, object]:
    """The data's options under the command line's names."""
    renamed = {"config": "data-config", "revision": "data-revision"}
    return {
        renamed.get(name, name.replace("_", "-")): value for name, value in data.model_dump(exclude={"task"}).items()
    }


def _joined(parts: list[str], flags: dict[str, object]) -> str:
    """One command line; flags that are None are left out."""
    words = list(parts)
    for name, value in flags.items():
        if value is False:
            words.append(f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", _shown(str(value))]
    return shlex.join(words)


def _changed(record: Frozen, kind: type[Frozen], names: tuple[str, ...]) -> dict[str, object]:
    """Fields whose value is not the default, under the command line's names."""
    renamed = {"width_views": "views", "mixed_precision": "mixed-precision"}
    found: dict[str, object] = {}
    for name in names:
        value = getattr(record, name)
        if value != kind.model_fields[name].default:
            found[renamed.get(name, name.replace("_", "-"))] = value
    return found


def _shown(value: str) -> str:
    return Path(value).name if Path(value).is_absolute() else value


class PortOptions(Frozen):
    """All of `uhl port`."""

    adapter: Path
    target: HostOptions
    data: DataOptions = DataOptions()
    data_required: bool = False
    task_file: Path | None = None
    strategy: Strategy | None = None
    score: bool = True
    batch_size: int = Field(64, ge=1)
    max_flops: float = Field(10.0, gt=0)
    seed: int = Field(0, ge=0)
    output: Path | None = None
    overwrite: bool = False


def tuning_defaults() -> TrainingConfig:
    """How `uhl tune` trains unless told otherwise: 500 steps of delta-theta, without noise, views or pauses."""
    return TrainingConfig(
        max_steps=500,
        learning_rate=0.1,
        readout_learning_rate=8e-3,
        weight_decay=0.0,
        noise=0.0,
        update_dropout=0.0,
        width_views=0,
    )


# What of it the command line lets a user change.
TUNED = (
    "max_steps",
    "batch_size",
    "learning_rate",
    "readout_learning_rate",
    "warmup_fraction",
    "active_weight",
    "delta_weight",
    "seed",
)


class TuneOptions(Frozen):
    """All of `uhl tune`.  Without an output the task file goes beside the adapter, see `output_path`.

    :param top_k: Most active atoms per token; None is the adapter's own number.
    :param max_length: Longest input in tokens, in training and scoring; None is what the adapter was trained with.
    :param optimise: Trials of a search for hyper-parameters; 0 for none.
    """

    adapter: Path
    target: HostOptions
    data: DataOptions = DataOptions()
    strategy: Strategy | None = None
    training: TrainingConfig = Field(default_factory=tuning_defaults)
    top_k: int | None = Field(None, ge=1, le=2)
    max_length: int | None = Field(None, ge=4, le=100_000)
    optimise: int = Field(0, ge=0, le=10_000)
    max_flops: float = Field(10.0, gt=0)
    evaluation_batch_size: int = Field(64, ge=1)
    output: Path | None = None
    resume: bool = False
    overwrite: bool = False
    save_every: int = Field(200, ge=1)

    def output_path(self, task: str) -> Path:
        """`--output`, or ADAPTER.TASK.TARGET.task.safetensors beside the adapter."""
        if self.output is not None:
            return self.output
        names = (re.sub(r"[^A-Za-z0-9_-]+", "-", Path(part).name).strip("-") for part in (task, self.target.name))
        return self.adapter.with_name(".".join([self.adapter.stem, *names, "task.safetensors"]))

    def command(self, task: str) -> str:
        """The command line that makes the same file; see `PretrainOptions.command`."""
        parts = ["uhl", "tune", self.adapter.name, "--target", _shown(self.target.name), "--task", _shown(task)]
        flags: dict[str, object] = {
            "revision": self.target.revision,
            "dtype": None if self.target.dtype == "float32" else self.target.dtype,
        }
        flags |= _data_flags(self.data) | {"align": self.strategy}
        flags |= _changed(self, TuneOptions, ("max_flops", "top_k", "max_length"))
        defaults = tuning_defaults()
        for name in TUNED:
            if getattr(self.training, name) != getattr(defaults, name):
                flags["steps" if name == "max_steps" else name.replace("_", "-")] = getattr(self.training, name)
        return _joined(parts, flags)


class DemoOptions(Frozen):
    """All of `uhl demo`; source, target and task are builtin unless told otherwise."""

    source: str = DEFAULT_HOST
    target: str = "builtin:small"
    task: str = DEFAULT_TASK
    epochs: float = Field(6.0, gt=0, le=1000)
    tune_steps: int = Field(500, ge=1)
    device: str = "auto"
    seed: int = Field(0, ge=0, le=2**31 - 1)
    output: Path | None = None
