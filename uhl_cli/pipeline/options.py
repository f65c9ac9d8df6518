"""Options of the pipelines, validated, importable without torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from pydantic import Field

from uhl_cli.schema import AdapterConfig, Frozen, Strategy, TrainingConfig


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
    """All of `uhl pretrain`."""

    host: HostOptions
    data: DataOptions
    output: Path = Path("adapter.safetensors")
    anchors: str | None = None
    num_anchors: int = Field(2048, ge=32, le=100_000)
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
        for name, value in self.data.model_dump(exclude={"task"}).items():
            flags[{"config": "data-config", "revision": "data-revision"}.get(name, name.replace("_", "-"))] = value
        flags["anchors"] = self.anchors
        flags |= _changed(self, PretrainOptions, ("num_anchors", "max_flops"))
        flags |= _changed(self.training, TrainingConfig, tuple(TrainingConfig.model_fields))
        strategy: Strategy = self.adapter.strategy
        flags["align"] = None if strategy == "anchors" else strategy
        flags["licence"] = None if self.licence == "unspecified" else self.licence
        for name, value in flags.items():
            if value is False:
                parts.append(f"--no-{name}")
            elif value is not None:
                parts += [f"--{name}", _shown(str(value))]
        return shlex.join(parts)


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
    strategy: Strategy | None = None
    score: bool = True
    batch_size: int = Field(64, ge=1)
    max_flops: float = Field(10.0, gt=0)
    seed: int = Field(0, ge=0)
    output: Path | None = None
    overwrite: bool = False
