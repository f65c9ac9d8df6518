"""The Python interface: load an adapter file, port it to any model, call the result.

from uhl_cli import UniversalAdapter

adapter = UniversalAdapter.load("adapter.safetensors")
ported = adapter.port(model, tokenizer)
logits = ported(["a fine film"])          # the host is changed only while this runs
with ported.attached():                   # or for as long as you like
    model(**inputs)
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uhl_cli.adapter.fold import compact, feature_prior, fold, move, refold
from uhl_cli.align.alignment import Alignment, align_anchors, align_size
from uhl_cli.align.bank import AnchorBank
from uhl_cli.align.features import FeatureBank, align_features
from uhl_cli.align.states import WordStates, word_states
from uhl_cli.codes.layout import parameter_shapes
from uhl_cli.cost.flops import SEQUENCE_LENGTH, count_flops
from uhl_cli.cost.plan import PortPlan, make_plan
from uhl_cli.errors import FormatError, UsageError
from uhl_cli.formats.adapter import AdapterFile, read_adapter
from uhl_cli.formats.convert import bank_of, dequantised, features_of, stored_parameters
from uhl_cli.formats.ported import load_ported
from uhl_cli.formats.task import TaskRecord, read_task
from uhl_cli.host.checkpoint import Host, wrap_host
from uhl_cli.ported.model import PortedModel, Progress
from uhl_cli.ported.shift import correction, update_shift
from uhl_cli.schema import AdapterConfig, Manifest, Strategy, TrainingConfig

__all__ = ["PortedModel", "UniversalAdapter", "align", "load_ported"]


def align(
    host: Host,
    bank: AnchorBank,
    strategy: Strategy,
    *,
    plan: PortPlan | None = None,
    states: WordStates | None = None,
    joint: bool = True,
    progress: Progress | None = None,
) -> Alignment:
    """Align a host to a bank's canonical space by the named strategy.

    :param states: The host's word states, where they are known already.
    :param joint: See `align_anchors`.

    :raises AlignmentError: When the host takes in too few anchors, or its states are degenerate.
    """
    if strategy == "size":
        return align_size(bank, hidden_size=host.hidden_size, num_hidden_layers=host.num_hidden_layers)
    if states is None:
        states = word_states(host, bank.anchors, progress=progress)
    return align_anchors(bank, states, tap_depths=None if plan is None else plan.tap_depths, joint=joint)


@dataclass(frozen=True)
class UniversalAdapter:
    """A loaded adapter file: manifest, anchor bank, the parameters as stored, and the file's SHA-256 digest.

    `head_fitted` is False where the head-only control does not belong to the task: that of a task file.
    `max_length` is the longest input in tokens that it was trained, or tuned, with.  `features` is None in files that
    have none, and for another task's readout, which the source never saw.
    """

    manifest: Manifest
    bank: AnchorBank
    stored: dict[str, Tensor]
    digest: str = ""
    head_fitted: bool = True
    max_length: int = TrainingConfig().max_length
    features: FeatureBank | None = None
    base: UniversalAdapter | None = field(default=None, repr=False)

    @classmethod
    def load(cls, path: str | Path) -> UniversalAdapter:
        """Read and validate a file.

        :raises FormatError: When it is missing, damaged, or breaks the format.
        """
        return cls.from_file(read_adapter(Path(path)))

    @classmethod
    def from_file(cls, content: AdapterFile) -> UniversalAdapter:
        """The adapter of a file's content."""
        length = content.manifest.training.config.max_length
        bank, features = bank_of(content), features_of(content)
        stored = stored_parameters(content)
        return cls(content.manifest, bank, stored, content.digest, max_length=length, features=features)

    def with_task(self, path: str | Path) -> UniversalAdapter:
        """The adapter's file with the delta-theta (and the readout) of a task file that `uhl tune` made.

        Nothing of a task file that it carries already is left.

        :raises FormatError: When the file is damaged or was tuned on another adapter.
        """
        content = read_task(Path(path))
        if content.record.adapter != self.digest:
            raise FormatError(f"{path} was tuned on another adapter file.", "Give the adapter that it was made from.")
        own = self.base or self
        return own.with_parameters(content.record, dequantised(content.parameters))

    def with_parameters(self, record: TaskRecord, parameters: dict[str, Tensor]) -> UniversalAdapter:
        """The same adapter with a task's parameters in place of its own."""
        stored = dict(self.stored) | {"threshold": self.stored["threshold"][: record.config.top_k]}
        if not record.own_task:
            # No head-only control was fitted for another task; a zero head predicts its first class.
            shapes = parameter_shapes(record.config)
            stored = {name: value for name, value in stored.items() if name in shapes}
            stored |= {name: torch.zeros(shapes[name]) for name in ("head_weight", "head_bias")}
        update = {
            "config": record.config,
            "task": record.task,
            "label_counts": record.label_counts,
            "score": self.manifest.score if record.own_task else None,
        }
        manifest = self.manifest.model_copy(update=update)
        fitted = self.head_fitted and record.own_task
        length = record.training.config.max_length
        features = self.features if record.own_task else None
        base = self.base or self
        return UniversalAdapter(manifest, self.bank, stored | parameters, self.digest, fitted, length, features, base)

    def port(
        self,
        model: nn.Module | Host,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        strategy: Strategy | None = None,
        max_flops: float = 10.0,
        switchable: bool = False,
        progress: Progress | None = None,
    ) -> PortedModel:
        """Carry the adapter to a model: no label, no gradient, one pass over the anchor texts.

        :param switchable: Keep the alignment in memory, so that `PortedModel.with_task` takes task files.
        :param max_flops: Limit in percent of the host's own FLOPs; parts are left out to hold it (see `plan`).
        :raises UsageError: When a bare model comes without its tokenizer.
        :raises BudgetError: When nothing that fits the limit is left.
        :raises UnknownFamilyError: When the model's family has no row.
        """
        if isinstance(model, Host):
            host = model
        elif tokenizer is None:
            raise UsageError("a model needs its tokenizer to be ported to.", "Call port(model, tokenizer).")
        else:
            host = wrap_host(model, tokenizer)
        alignment, plan, host_flops = self.align(
            host, strategy=strategy, max_flops=max_flops, any_task=switchable, progress=progress
        )
        ported = self.inject(host, alignment, plan, host_flops)
        if switchable:
            own = self.base or self
            if alignment.features is None and alignment.strategy == "anchors":
                alignment = own.with_features(host, alignment, plan, progress=progress)
            ported.retask = _Retask(own, alignment, plan, host_flops, max_flops)
        return ported

    def align(
        self,
        host: Host,
        *,
        strategy: Strategy | None = None,
        max_flops: float = 10.0,
        any_task: bool = False,
        progress: Progress | None = None,
    ) -> tuple[Alignment, PortPlan, int]:
        """The host's alignment, the plan that holds the FLOP limit, and the host's own FLOPs at 128 tokens.

        :param any_task: Serve the readouts of other tasks too, to which a feature bank says nothing.
        """
        host_flops = count_flops(host, None)
        config = self.manifest.config
        plan = plan_for(host, config, host_flops, max_flops)
        chosen = strategy or config.strategy
        joint = any_task or self.features is None
        found = align(host, self.bank, chosen, plan=plan, joint=joint, progress=progress)
        if chosen == "anchors":
            found = self.with_features(host, found, plan, progress=progress)
            if found.features is None and not joint:  # the host takes in too few of the bank's words
                found = align(host, self.bank, chosen, plan=plan, progress=progress)
        return found, plan, host_flops

    def with_features(
        self, host: Host, alignment: Alignment, plan: PortPlan, *, progress: Progress | None = None
    ) -> Alignment:
        """A host's alignment with maps to the readout's features, where the file has a feature bank."""
        if self.features is None:
            return alignment
        config = self.manifest.config
        maps = align_features(
            host,
            self.features,
            knots=config.knots,
            depths=plan.tap_depths,
            readout_size=config.readout_size,
            prior=feature_prior(self.stored, alignment, config.knots),
            progress=progress,
        )
        if maps is None:
            return alignment
        # The shift is that of the file's own updates, whatever a task file adds to them.
        own = self.stored | {"delta_theta": torch.zeros_like(self.stored["delta_theta"])}
        ported = replace(self, stored=own).inject(host, replace(alignment, features=maps), plan, 0)
        shift = correction(update_shift(ported, self.features), self.features.shift)
        return replace(alignment, features=replace(maps, shift=shift))

    def inject(self, host: Host, alignment: Alignment, plan: PortPlan, host_flops: int) -> PortedModel:
        """The ported model of an alignment."""
        started = time.monotonic()
        with torch.no_grad():
            kind = self.manifest.config.kind
            folded = fold(self.stored, alignment, host.map, kind=kind, layers=plan.layers, types=plan.types)
            folded = move(compact(folded), host.device, host.map.embeddings.weight.dtype)
        report: dict[str, object] = {
            "strategy": alignment.strategy,
            "left_out": plan.left_out,
            "host_flops": host_flops,
            "fold_seconds": time.monotonic() - started,
        }
        return PortedModel(host, folded, self.manifest.task, report)


@dataclass(frozen=True)
class _Retask:
    """What `PortedModel.with_task` needs besides the task file: the adapter, and how it was ported."""

    adapter: UniversalAdapter
    alignment: Alignment
    plan: PortPlan
    host_flops: int
    max_flops: float

    @torch.inference_mode()
    def __call__(self, ported: PortedModel, path: str | Path) -> PortedModel:
        tuned = self.adapter.with_task(path)
        host = ported.host
        plan = plan_for(host, tuned.manifest.config, self.host_flops, self.max_flops)
        if plan != self.plan:
            raise UsageError(
                f"within {self.max_flops:g} % FLOPs, {host.name} carries other parts of the adapter for {path}.",
                "Port it apart: adapter.with_task(file).port(model).",
            )
        # The model may carry another task's readout at present, so the readout is always folded.
        alignment = self.alignment if tuned.features is not None else replace(self.alignment, features=None)
        folded = refold(ported.folded, tuned.stored, alignment, new_readout=True)
        folded = move(compact(folded), host.device, host.map.embeddings.weight.dtype)
        return replace(ported, folded=folded, task=tuned.manifest.task)


def plan_for(host: Host, config: AdapterConfig, host_flops: int, max_flops: float) -> PortPlan:
    """The parts that a host carries within a limit in percent of its own FLOPs, which are `host_flops` at 128 tokens.

    :raises BudgetError: When nothing that fits the limit is left.
    """
    tokens = min(SEQUENCE_LENGTH, host.max_length)
    return make_plan(host.map, config, host_flops_per_token=host_flops / tokens, max_flops_percent=max_flops)
