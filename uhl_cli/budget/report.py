"""Options and report of `budget`, importable without torch.  `--json` prints exactly the report."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from uhl_cli.budget.sizes import FileSizes
from uhl_cli.commands.flags import Options
from uhl_cli.commands.options import CACHE, DEFAULT_ADAPTER, DataOptions, HostOptions
from uhl_cli.schema import Degree, Frozen, Strategy, TransferRecord

CONVENTION = (
    "two FLOPs for a multiply-add; matrix products, attention and weighted sums of gathered rows count, "
    "element-wise work does not"
)
MAX_BYTES = 1_000_000
MAX_FLOPS = 10.0
MAX_ATOMS = 2.0


class BudgetOptions(Options):
    """All of `uhl budget`."""

    argument = "adapter"
    files = ("adapter", "task_file")
    option_names: ClassVar = {"target.name": "target", "target_config.name": "target-config", "strategy": "align"}
    not_options = frozenset({"data.train_split", "data.limit_train"})

    adapter: Path = Field(
        DEFAULT_ADAPTER,
        description="adapter file made by `uhl pretrain` or its hub id as user/repo[@revision][:file], or folder made "
        "by `uhl port --output` or `uhl tune --parameters lora`",
    )
    target: HostOptions | None = Field(
        None,
        description="hub id, local folder or builtin:NAME of the model to measure the file on; for a folder, the model "
        "it was made for",
    )
    target_config: HostOptions | None = Field(
        None,
        description="the same without weights: a config.json, a folder or a hub id. Only the configuration is read, so "
        "that FLOPs and bytes of a model of any size are counted in seconds",
    )
    task_file: Path | None = Field(
        None,
        description="task file or LoRA folder of `uhl tune` to use with the adapter; its bytes are listed apart",
    )
    strategy: Strategy | None = Field(
        None, description="alignment strategy; by default the one that the file was trained with"
    )
    data: DataOptions = Field(
        DataOptions(),
        description="task whose evaluation data active atoms are measured on; by default the anchor texts are used",
    )
    sequence_length: int = Field(128, ge=1, le=1_000_000, description="tokens per sequence")
    batch_size: int = Field(1, ge=1, le=100_000, description="sequences in the forward pass that is counted and timed")
    max_bytes: int | None = Field(
        None, ge=1, description=f"limit in bytes, by default {MAX_BYTES:,} for an adapter file and none for a folder"
    )
    max_flops: float | None = Field(
        None,
        gt=0,
        description=f"FLOP limit in percent of the target's own, by default {MAX_FLOPS:g}; parts are left out to "
        "stay within it, as `port` does",
    )
    max_atoms: float | None = Field(
        None, ge=0, description=f"limit of active atoms per token, by default {MAX_ATOMS:g} if they are measured"
    )
    time: bool = Field(False, description="also measure the wall-clock overhead")
    repetitions: int = Field(20, ge=3, le=10_000, description="pairs of passes for --time")
    seed: int = Field(0, ge=0, description="seed of --limit-evaluation")
    cache: bool = Field(True, description=CACHE)

    @property
    def data_asked(self) -> bool:
        """Whether `data` names anything."""
        return self.data != DataOptions()


class FlopCount(Frozen):
    """One counter's figures for one pass."""

    host: int
    adapter: int = Field(description="what attaching the adapter adds, its readout included")
    percent: float = Field(description="adapter over host")


class FlopBudget(Frozen):
    """FLOPs by two independent counters."""

    convention: str = CONVENTION
    fvcore: FlopCount | None = Field(
        description="fvcore's trace of the running model, times two; None for a target that torch cannot trace"
    )
    torch: FlopCount = Field(description="torch's flop counter as the operators run")
    host_difference_percent: float | None = Field(description="fvcore minus torch, over torch, of the host alone")
    adapter_difference_percent: float | None = Field(description="the same of what the adapter adds")
    uncounted: tuple[str, ...] = Field(description="operators that ran and are not counted")
    lora: int = Field(
        0,
        description="of an unmerged LoRA or low-rank update, by torch's counter; 0 once merged into the weights",
    )

    @property
    def percent(self) -> float:
        """The larger figure of the counters, which is compared with the limit."""
        return self.torch.percent if self.fvcore is None else max(self.fvcore.percent, self.torch.percent)


class MemoryBudget(Frozen):
    """Bytes at run time; see `uhl_cli.cost.memory` for what is measured."""

    host_weights: int = Field(description="parameters of the host's base model, in their precision")
    adapter_weights: int = Field(description="tensors that the folded adapter adds, in the same precision")
    host_peak: int = Field(description="peak bytes of a pass of the host alone, without the weights")
    adapter_peak: int = Field(description="what attaching the adapter adds to that peak")


class TimeBudget(Frozen):
    """Wall-clock time of one pass, alternately of the host alone and with the adapter."""

    repetitions: int
    host_seconds: float = Field(description="median")
    attached_seconds: float = Field(description="median")
    ratio: float = Field(description="median over the pairs of attached over host alone")
    ratio_low: float = Field(description="lower quartile of the pairs")
    ratio_high: float = Field(description="upper quartile of the pairs")


class AtomsBudget(Frozen):
    """Active atoms per token: how many fire, on average over tokens and routers."""

    per_token: float
    data: str = Field(description="what they were measured on")
    texts: int


class TargetBudget(Frozen):
    """What an adapter costs on one host."""

    name: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    degree: Degree = Field(description='"all" layers can be edited, "some" parts of layers, or none: "stream"')
    parameters: int
    weights_loaded: bool = Field(description="false: counted from the configuration alone, on the meta device")
    dtype: str
    device: str
    sequence_length: int = Field(description="tokens of each sequence, at most the host's limit")
    batch_size: int
    flops: FlopBudget
    memory: MemoryBudget
    atoms: AtomsBudget | None = Field(description="None without weights, or if a LoRA replaces the updates")
    time: TimeBudget | None = Field(description="None unless asked for")
    strength: float | None = Field(
        None, description="of the updates, chosen by the transfer set; 0 leaves them out.  None without that choice"
    )
    left_out: tuple[str, ...] = Field(description="parts that `port` leaves out to stay within the FLOP limit")
    whole_percent: float = Field(description="FLOPs with nothing left out, by formula at 128 tokens, in percent")
    refused: str | None = Field(description="why nothing can be ported within the limit; all parts are then counted")


class Limits(Frozen):
    """The limits; None where nothing is compared with it."""

    bytes: int | None
    flops_percent: float | None
    atoms_per_token: float | None


class BudgetReport(Frozen):
    """What `budget` found.  `beyond` describes the limits that are exceeded; empty if none is."""

    adapter: str
    file: FileSizes
    task_file: FileSizes | None
    transfer: TransferRecord | None = Field(description="the file's transfer set; None without one")
    target: TargetBudget | None
    limits: Limits
    beyond: tuple[str, ...]
