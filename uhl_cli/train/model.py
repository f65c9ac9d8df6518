"""The model that pretraining optimises: a frozen host with the adapter, which is folded again at every step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from uhl_cli.adapter.attach import AlignmentNoise, attach
from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.adapter.fold import fold, refold
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.codes.layout import UPDATE_PARAMETERS
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded
from uhl_cli.host.running import evaluating
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import forward
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.task_adapter import TaskAdapter

# A batch's seed is RANKS times a number of its step, plus the process's rank.
RANKS = 1024


@dataclass(frozen=True)
class Losses:
    """Terms of the loss (docs/method.md, "Pretraining"), number of right predictions, and mean active atoms per token.

    `updated` is False for a step without updates, whose `active` is zero.
    """

    total: Tensor
    task: Tensor
    correct: Tensor
    active: Tensor
    updated: bool


class TrainedModel(nn.Module):
    """Adapter parameters and a frozen host, which is not a submodule, so that it is not trained or copied."""

    def __init__(
        self,
        adapter: CanonicalAdapter | TaskAdapter,
        aligned: AlignedHost,
        config: TrainingConfig,
        *,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self._aligned = aligned
        self._shift = shift
        self._config = config
        self._base: PortedAdapter | None = None
        if not config.updates:
            for name, parameter in adapter.named_parameters():
                if name in UPDATE_PARAMETERS:
                    parameter.requires_grad_(False)

    def forward(self, encoded: Encoded, words: Tensor | None, targets: Tensor, seed: int) -> Losses:
        """Losses of one batch; `targets` class ids [examples] or [words], or distributions, one row each.

        `seed` draws the noise; `seed // RANKS` draws whether updates are off, the same for all processes of a step.
        A readout that is trained with and without updates works better on a target, where they only act partly.
        """
        config = self._config
        cpu = torch.Generator().manual_seed(seed // RANKS)
        updated = config.updates and float(torch.rand((), generator=cpu)) >= config.update_dropout
        host = self._aligned.host
        noise = None
        if config.noise + config.update_noise > 0:
            generator = torch.Generator(device=targets.device).manual_seed(seed)
            noise = AlignmentNoise(config.noise, config.update_noise, generator)
        folded = self._folded(updated)
        with (
            precision_of(host),
            unfused_attention(host),
            evaluating(host.map.base),
            attach(host.map, folded, dense=True, noise=noise) as attachment,
        ):
            logits, active = forward(host, attachment, encoded, words)
        task, correct = task_loss(logits, targets)
        delta = self.adapter.get_parameter("delta_theta").square().sum()
        total = task + config.active_weight * active + config.delta_weight * delta
        return Losses(total, task.detach(), correct, active.detach(), updated)

    def _folded(self, updated: bool) -> PortedAdapter:
        """The adapter folded to the host's shape; parts that no trained parameter affects are folded only once."""
        stored, aligned = self.adapter.stored(), self._aligned
        plan, host_map, alignment = aligned.plan, aligned.host.map, aligned.alignment
        if not isinstance(self.adapter, TaskAdapter):
            return fold(stored, alignment, host_map, layers=plan.layers, types=plan.types, updates=updated)
        if self._base is None:
            fixed = {name: value.detach() for name, value in stored.items()}
            self._base = fold(
                fixed,
                alignment,
                host_map,
                layers=plan.layers,
                types=plan.types,
                updates=updated,
                shift=self._shift,
            )
        return refold(self._base, stored, alignment, new_readout=self.adapter.new_readout)


def task_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy against class ids or distributions, and the number of right most probable classes."""
    classes = targets if targets.dim() == 1 else targets.argmax(-1)
    return functional.cross_entropy(logits.float(), targets), (logits.argmax(-1) == classes).sum()


def precision_of(host: Host) -> AbstractContextManager[object]:
    """Autocast where the host is in half precision: the adapter's parameters stay in float32."""
    weight = host.map.embeddings.weight
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()
    return torch.autocast(weight.device.type, dtype=weight.dtype)


def unfused_attention(host: Host) -> AbstractContextManager[object]:
    """Use plain attention on a CPU under autocast: there the fused kernel's backward pass takes a
    quarter of a step (55 ms of 240 at 22 M parameters)."""
    device = host.device.type
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" and torch.is_autocast_enabled(device) else nullcontext()
