"""A host prepared for porting: its alignment to an adapter, the port plan, and its own FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.align.alignment import Alignment, align_anchors, align_size, new_word_quality
from uhl_cli.align.bank import AnchorBank
from uhl_cli.align.states import WordStates, word_states
from uhl_cli.cost.plan import PortPlan
from uhl_cli.errors import UhlWarning, UsageError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.running import bare
from uhl_cli.ported.calibrate import Calibration
from uhl_cli.schema import Strategy

Progress = Callable[[int, int], None]
# Least `new_word_quality`.  Measured: 0.35 to 0.90 with a host's own tokenizer, 0.01 to 0.03 with shuffled ids.
NEW_WORDS = 0.1
Served = Literal["own", "other", "any"]


@dataclass
class FoldedAdapter:
    """What all tasks of one adapter share on a host: the folded adapter, and what was measured once to set it up."""

    adapter: PortedAdapter
    shift: Tensor | None = None
    measured: bool = False
    calibration: Calibration | None = None


@dataclass(frozen=True, eq=False, repr=False)
class AlignedHost:
    """One host aligned to an adapter's canonical space; `UniversalAdapter.align` makes it, `port` takes it.

    Porting several tasks of an adapter to one `AlignedHost` aligns once, and they share the updates' tensors.

    :param space: Digest of the anchor bank that defines the space (`AnchorBank.digest`); other adapters are refused.
    :param plan: The parts that the host carries within the FLOP limit.
    :param host_flops: FLOPs of the host's own forward pass, see `cost.flops`.
    :param serves: Readouts that the alignment supports: the adapter's own, those of other tasks, or any.
    :param cached: Whether the alignment was kept by an earlier call, see `formats.alignment`.
    """

    host: Host
    space: str
    alignment: Alignment
    plan: PortPlan
    host_flops: int
    serves: Served = "any"
    cached: bool = False
    folded: dict[object, FoldedAdapter] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        served = {"own": "the adapter's own task", "other": "other tasks", "any": "any task"}[self.serves]
        left_out = f", without {', '.join(self.plan.left_out)}" if self.plan.left_out else ""
        return f"AlignedHost({self.host.name!r} by {self.alignment.strategy}, for {served}{left_out})"

    @property
    def has_weights(self) -> bool:
        """False for a host made from a configuration alone."""
        return not self.host.map.embeddings.weight.is_meta

    def refuse_other(self, bank: AnchorBank, *, own_task: bool) -> None:
        """Check that the alignment is to this bank's space, and supports the adapter's own task or another one.

        :raises UsageError: It is not, or does not.
        """
        if bank.digest != self.space:
            raise UsageError(
                f"{self.host.name} was aligned to another adapter.",
                "Align it with this one's adapter.align(model, tokenizer).",
            )
        if self.serves not in ("any", "own" if own_task else "other"):
            kind = "the adapter's own task" if own_task else "another task than the adapter's own"
            raise UsageError(
                f"this alignment of {self.host.name} does not serve {kind}.",
                "Align it for all tasks with adapter.align(model, tokenizer, any_task=True).",
            )


def align_host(
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

    :param states: The host's word states, if they were already computed.
    :param joint: See `align_anchors`.

    Warns (`UhlWarning`) if words align no better than by chance, see `warn_of_new_words`.

    :raises AlignmentError: When too few anchors fit into the host's input, or its states are degenerate.
    :raises HostError: When an adapter is attached to the host.
    """
    if strategy == "size":
        return align_size(bank, hidden_size=host.hidden_size, num_hidden_layers=host.num_hidden_layers)
    if states is None:
        with bare(host.map.base):
            states = word_states(host, bank.anchors, progress=progress)
    quality = new_word_quality(bank, states)
    warn_of_new_words(host, quality)
    found = align_anchors(bank, states, readout_depths=None if plan is None else plan.readout_depths, joint=joint)
    return replace(found, new_words=quality)


def warn_of_new_words(host: Host, quality: float | None) -> None:
    """Warn (`UhlWarning`) if a host's `new_word_quality` is no better than chance, as with another tokenizer."""
    if quality is not None and quality < NEW_WORDS:
        warnings.warn(
            UhlWarning(
                f"the states of '{host.name}' hardly predict the adapter's for words not seen in the fit: R^2 "
                f"{quality:.2f}, where models with their own tokenizer reach 0.35 or more. Expect wrong results; check "
                "that the tokenizer belongs to the weights, and that the model knows the language of the adapter."
            ),
            stacklevel=3,
        )
