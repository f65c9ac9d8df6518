"""The table of the compared methods; no other code knows a method by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Role = Literal["proposed", "baseline", "control"]
Kind = Literal["ported", "tuned", "retrained"]


@dataclass(frozen=True)
class Method:
    """One row.

    :param name: What a run configuration calls it.
    :param label: What tables and figures call it.
    :param role: `proposed` and `baseline` compete for the best run; a `control` does not.
    :param kind: `ported` trains nothing on the target, `tuned` is `uhl tune`, `retrained` is trained there.
    :param settings: Training settings that only some methods have, and that a search may choose.
    """

    name: str
    label: str
    role: Role
    kind: Kind
    settings: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether labels of the target are used."""
        return self.kind != "ported"

    @property
    def searchable(self) -> tuple[str, ...]:
        """Training settings that a search may choose."""
        return ("learning_rate", "batch_size", *self.settings) if self.trained else ()


_TUNED = ("lambda_F", "lambda_Q", "top_k")
_ROWS = (
    Method("uhl-zero-shot", "uhl, zero-shot", "proposed", "ported"),
    Method("uhl-tuned", "uhl, after tuning", "proposed", "tuned", _TUNED),
    Method("uhl-tuned-new-task", "uhl, another task's file tuned", "proposed", "tuned", _TUNED),
    Method("sat-lora", "SAT-LoRA", "baseline", "retrained", ("rank",)),
    Method("lora", "LoRA r8", "baseline", "retrained", ("rank",)),
    Method("full", "full fine-tuning", "baseline", "retrained"),
    Method("majority-class", "control: majority class", "control", "ported"),
    Method("random-update", "control: random updates", "control", "ported"),
    Method("head-only", "control: head only", "control", "ported"),
    Method("size-only", "control: size only", "control", "ported"),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
