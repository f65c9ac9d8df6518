"""The model that pretraining optimises: a frozen host that carries the adapter, folded anew at every step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.adapter.folding import FoldedAdapter, fold, refold
from uhl_cli.adapter.inject import AlignmentNoise, Injection
from uhl_cli.adapter.layout import UPDATE_PARAMETERS
from uhl_cli.adapter.plan import PortPlan
from uhl_cli.adapter.ported import forward
from uhl_cli.align.alignment import Alignment
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.task_adapter import TaskAdapter

# A seed counts steps in units of this, and processes within it.
RANKS = 1024


@dataclass(frozen=True)
class Losses:
    """Terms of the loss (DESIGN 2.8), number of right predictions, and mean active atoms per token.

    `updated` is False for a step that left the updates off, whose `active` is zero.
    """

    total: Tensor
    task: Tensor
    correct: Tensor
    active: Tensor
    updated: bool


class TrainedModel(nn.Module):
    """Adapter parameters and a frozen host; the host is no submodule, so that nothing trains or copies it."""

    def __init__(
        self,
        adapter: CanonicalAdapter | TaskAdapter,
        host: Host,
        views: list[Alignment],
        plan: PortPlan,
        config: TrainingConfig,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self._host = (host,)
        self._views = views
        self._plan = plan
        self._config = config
        self._base: FoldedAdapter | None = None
        if not config.updates:
            for name, parameter in adapter.named_parameters():
                if name in UPDATE_PARAMETERS:
                    parameter.requires_grad_(False)

    @property
    def host(self) -> Host:
        """The frozen host."""
        return self._host[0]

    def forward(self, encoded: Encoded, words: Tensor | None, targets: Tensor, seed: int) -> Losses:
        """Losses of one batch; `targets` [examples] or [words].

        `seed` draws the noise; `seed // RANKS` the width view and whether updates are off, so that all processes
        of a step do alike.  A readout that has seen the stream with and without updates serves a target better,
        where they arrive only in part.
        """
        config = self._config
        cpu = torch.Generator().manual_seed(seed // RANKS)
        updated = config.updates and float(torch.rand((), generator=cpu)) >= config.update_dropout
        # Every other step shows the host's own width; the views share the rest.
        view = self._views[0]
        if len(self._views) > 1 and torch.rand((), generator=cpu) < 0.5:
            view = self._views[1 + int(torch.randint(len(self._views) - 1, (), generator=cpu))]
        noise = None
        if config.noise + config.update_noise > 0:
            generator = torch.Generator(device=targets.device).manual_seed(seed)
            noise = AlignmentNoise(config.noise, config.update_noise, generator)
        folded = self._folded(view, updated)
        with self._precision(), Injection(self.host.map, folded, dense=True, noise=noise) as injection:
            logits, active = forward(self.host, injection, encoded, words)
        task = functional.cross_entropy(logits.float(), targets)
        delta = self.adapter.get_parameter("delta_theta").square().sum()
        total = task + config.active_weight * active + config.delta_weight * delta
        return Losses(total, task.detach(), (logits.argmax(-1) == targets).sum(), active.detach(), updated)

    def _folded(self, view: Alignment, updated: bool) -> FoldedAdapter:
        """The adapter in the host's shape; of a fixed one, what no parameter changes is folded once for all steps."""
        stored = self.adapter.stored()

        def full(values: dict[str, Tensor]) -> FoldedAdapter:
            plan, kind = self._plan, self.adapter.config.kind
            return fold(values, view, self.host.map, kind=kind, layers=plan.layers, types=plan.types, updates=updated)

        if not isinstance(self.adapter, TaskAdapter):
            return full(stored)
        if self._base is None:
            self._base = full({name: value.detach() for name, value in stored.items()})
        return refold(self._base, stored, view, new_readout=self.adapter.new_readout)

    def _precision(self) -> AbstractContextManager[object]:
        """Autocast where the host is in half precision: the adapter's parameters stay in float32."""
        weight = self.host.map.embeddings.weight
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return nullcontext()
        return torch.autocast(weight.device.type, dtype=weight.dtype)
