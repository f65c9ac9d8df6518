"""Options and report of `budget`, importable without torch.  `--json` prints exactly the report."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from uhl_cli.budget.sizes import FileSizes
from uhl_cli.commands.options import DataOptions, HostOptions
from uhl_cli.schema import Frozen, Strategy

CONVENTION = (
    "two FLOPs for a multiply-add; matrix products, attention and weighted sums of gathered rows count, "
    "element-wise work does not"
)
MAX_FLOPS = 10.0
MAX_ATOMS = 2.0


class BudgetOptions(Frozen):
    """All of `uhl budget`.

    :param target: A host to load, or None.
    :param target_config: A host of which the configuration alone is read: a config.json, a folder or a hub id.
    :param data: Data to measure active atoms on; without any, the adapter's own anchor texts.
    :param data_asked: Whether `data` names anything.
    :param batch_size: Sequences in the pass that is counted, measured and timed.
    :param max_bytes: Limit of the adapter file; a task file is reported apart.
    :param max_flops: Limit in percent of the target's FLOPs, 10 where a target is given.
    :param max_atoms: Limit of active atoms per token, 2 where they are measured.
    :param repetitions: Pairs of passes that `time` takes.
    """

    adapter: Path
    target: HostOptions | None = None
    target_config: HostOptions | None = None
    task_file: Path | None = None
    strategy: Strategy | None = None
    data: DataOptions = DataOptions()
    data_asked: bool = False
    sequence_length: int = Field(128, ge=1, le=1_000_000)
    batch_size: int = Field(1, ge=1, le=100_000)
    max_bytes: int = Field(1_000_000, ge=1)
    max_flops: float | None = Field(None, gt=0)
    max_atoms: float | None = Field(None, ge=0)
    time: bool = False
    repetitions: int = Field(20, ge=3, le=10_000)
    seed: int = Field(0, ge=0)


class FlopCount(Frozen):
    """One counter's figures for one pass."""

    host: int
    adapter: int = Field(description="what attaching the adapter adds, its readout included")
    percent: float = Field(description="adapter over host")


class FlopBudget(Frozen):
    """FLOPs by two independent counters."""

    convention: str = CONVENTION
    fvcore: FlopCount = Field(description="fvcore's trace of the running model, doubled, since it counts one a pair")
    torch: FlopCount = Field(description="torch's flop counter as the operators run")
    host_difference_percent: float = Field(description="fvcore minus torch, over torch, of the host alone")
    adapter_difference_percent: float = Field(description="the same of what the adapter adds")
    uncounted: tuple[str, ...] = Field(description="operators that ran and count nothing")

    @property
    def percent(self) -> float:
        """The larger figure of both counters, which the limit is held against."""
        return max(self.fvcore.percent, self.torch.percent)


class MemoryBudget(Frozen):
    """Bytes at run time; see `uhl_cli.cost.memory` for what is measured."""

    host_weights: int = Field(description="parameters of the host's base model, in their precision")
    adapter_weights: int = Field(description="tensors that the folded adapter adds, in the same precision")
    host_peak: int = Field(description="most bytes that a pass of the host alone holds besides the weights")
    adapter_peak: int = Field(description="what attaching the adapter adds to that peak")


class TimeBudget(Frozen):
    """Wall-clock time of one pass, host alone and with the adapter by turns."""

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
    parameters: int
    weights_loaded: bool = Field(description="false: counted from the configuration alone, on the meta device")
    dtype: str
    device: str
    sequence_length: int = Field(description="tokens of each sequence, no more than the host takes")
    batch_size: int
    flops: FlopBudget
    memory: MemoryBudget
    atoms: AtomsBudget | None = Field(description="None without weights")
    time: TimeBudget | None = Field(description="None unless asked for")
    left_out: tuple[str, ...] = Field(description="parts that `port` leaves out to hold the FLOP limit")
    whole_percent: float = Field(description="FLOPs with nothing left out, by formula at 128 tokens, in percent")
    refused: str | None = Field(description="why nothing is left to port within the limit; all parts are counted then")


class Limits(Frozen):
    """The limits that were held against; None where there is nothing to hold against it."""

    bytes: int
    flops_percent: float | None
    atoms_per_token: float | None


class BudgetReport(Frozen):
    """What `budget` found.  `beyond` says in words which limits are passed; it is empty within all of them."""

    adapter: str
    file: FileSizes
    task_file: FileSizes | None
    target: TargetBudget | None
    limits: Limits
    beyond: tuple[str, ...]
