"""The table of the compared methods; no other code knows a method by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from uhl_cli.commands.options import TuneMode

Role = Literal["proposed", "baseline", "control"]
Kind = Literal["ported", "generated", "tuned", "distilled", "retrained"]


@dataclass(frozen=True)
class Method:
    """One row.

    :param name: What a run configuration calls it.
    :param label: What tables and figures call it.
    :param role: `proposed` and `baseline` compete for the best run; a `control` does not.
    :param kind: `ported` trains nothing on the target, nor does `generated`, whose projectors are made from its size;
        `tuned` is `uhl tune` with labels, `distilled` is trained there on the texts of a transfer set, `retrained` on
        the data set.
    :param settings: Training settings that only some methods have, and that a search may choose.
    :param mode: What of `uhl tune` gives the defaults of its training; None: the section's own.
    :param searches: Whether `search` may choose its learning rate, and `optuna` its settings.
    """

    name: str
    label: str
    role: Role
    kind: Kind
    settings: tuple[str, ...] = ()
    mode: TuneMode | None = None
    searches: bool = True

    @property
    def trained(self) -> bool:
        """Whether anything is trained on the target, with or without labels."""
        return self.kind not in ("ported", "generated")

    @property
    def searchable(self) -> tuple[str, ...]:
        """Training settings that a search may choose."""
        return ("learning_rate", "batch_size", *self.settings) if self.trained and self.searches else ()


NEW_TASK = "uhl-tuned-new-task"
_TUNED = ("lambda_F", "lambda_Q", "top_k")
_ROWS = (
    Method("uhl-zero-shot", "uhl, zero-shot", "proposed", "ported"),
    Method("uhl-tuned", "uhl, after tuning", "proposed", "tuned", _TUNED),
    Method(NEW_TASK, "uhl, another task's file tuned", "proposed", "tuned", _TUNED),
    Method(
        "uhl-distilled-delta-theta", "uhl, delta-theta without labels", "proposed", "distilled", (), "transfer", False
    ),
    Method("uhl-distilled-lora", "uhl, LoRA without labels", "proposed", "distilled", mode="lora", searches=False),
    Method("uhl-export", "uhl, exported", "proposed", "distilled", mode="lora", searches=False),
    Method("lora-same-texts", "LoRA, the same texts with labels", "baseline", "distilled", mode="lora", searches=False),
    Method("lora-from-source", "LoRA, taught by the source", "baseline", "distilled", ("rank",)),
    Method("sat-lora", "SAT-LoRA", "baseline", "retrained", ("rank",)),
    Method("lora", "LoRA r8", "baseline", "retrained", ("rank",)),
    Method("full", "full fine-tuning", "baseline", "retrained"),
    Method("majority-class", "control: majority class", "control", "ported"),
    Method("random-update", "control: random updates", "control", "ported"),
    Method("head-only", "control: head only", "control", "ported"),
    Method("size-only", "control: size only", "control", "ported"),
    Method("size-projectors", "control: projectors made from the size", "control", "generated"),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
