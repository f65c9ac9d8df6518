"""What `tune` trains in a target: a LoRA, or delta-theta's 1,024 numbers, and optionally the readout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.low_rank import Expansion
from uhl_cli.adapter.module import LoraFactors, PortedAdapter, PortedReadout, tuned_modules
from uhl_cli.adapter.sparse import row_values
from uhl_cli.codes.layout import bits_of
from uhl_cli.codes.quantise import fake_quantise
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.running import evaluating
from uhl_cli.ported.model import forward
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.model import Losses, precision_of, task_loss, unfused_attention

Trained = Literal["delta-theta", "lora"]
# The usual value; a LoRA's B is multiplied by alpha / r.
ALPHA_OVER_RANK = 2.0
BETAS = (0.9, 0.98)


class Student(nn.Module):
    """A ported readout, without the adapter's updates, on a host whose linear modules get the trained update.

    A new student predicts what the ported readout does.

    :param start: The adapter as ported to the host.
    :param readout: Train the readout too.
    :param delta_shape: Shape of delta-theta.
    :raises HostError: The host has no linear module that could be tuned.
    """

    def __init__(
        self,
        start: PortedAdapter,
        host_map: HostMap,
        trained: Trained,
        *,
        readout: bool,
        delta_shape: tuple[int, int],
        rank: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        bare = start.without_updates()
        self._threshold = bare.threshold.detach().float()
        self.readout = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=readout) for name, value in _values(bare.readout).items()}
        )
        self.factors = nn.ParameterDict()
        self.delta_theta: nn.Parameter | None = None
        self._expansion: Expansion | None = None
        device = host_map.embeddings.weight.device
        if trained == "lora":
            generator = torch.Generator().manual_seed(seed)
            for name, linear in tuned_modules(host_map).items():
                key, inputs = name.replace(".", "/"), linear.in_features
                down = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
                self.factors[f"down:{key}"] = nn.Parameter(down.to(device))
                self.factors[f"up:{key}"] = nn.Parameter(torch.zeros(linear.module_features, rank, device=device))
        else:
            self._expansion = Expansion.of(host_map, math.prod(delta_shape))
            self.delta_theta = nn.Parameter(torch.zeros(delta_shape, device=device))

    def adapter(self) -> PortedAdapter:
        """The current adapter, differentiable; delta-theta as its file holds it."""
        if self.delta_theta is not None:
            assert self._expansion is not None
            lora = self._expansion.factors_of(fake_quantise(self.delta_theta, bits_of("delta_theta")))
        else:
            names = [name.removeprefix("down:") for name in self.factors if name.startswith("down:")]
            lora = LoraFactors({name.replace("/", "."): self._factors_of(name) for name in names})
        return PortedAdapter(self._threshold, {}, _readout(dict(self.readout.items())), lora=lora)

    def _factors_of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.factors[f"down:{name}"], ALPHA_OVER_RANK * self.factors[f"up:{name}"]

    @torch.no_grad()
    def finished(self, host: Host) -> PortedAdapter:
        """The adapter as its file restores it: LoRA factors in float16, the readout's tables in eight bits."""
        adapter = self.adapter()
        if self.delta_theta is None and adapter.lora is not None:
            halves = {name: (down.half(), up.half()) for name, (down, up) in adapter.lora.by_module.items()}
            adapter = adapter.with_lora(LoraFactors(halves))
        return adapter.for_inference(host.device, host.map.embeddings.weight.dtype)

    def optimizer(self, config: TrainingConfig) -> torch.optim.AdamW:
        """AdamW over the trained parameters; weight decay only for the readout's matrices."""
        both = [*self.factors.values(), *([] if self.delta_theta is None else [self.delta_theta])]
        inner = [value for value in both if value.requires_grad]
        groups = [{"params": inner, "lr": config.learning_rate, "weight_decay": 0.0}] if inner else []
        for matrices in (True, False):
            some = [value for value in self.readout.values() if value.requires_grad and (value.dim() > 1) == matrices]
            if some and config.readout_learning_rate > 0:
                decay = config.weight_decay if matrices else 0.0
                groups.append({"params": some, "lr": config.readout_learning_rate, "weight_decay": decay})
        return torch.optim.AdamW([group | {"base_lr": group["lr"]} for group in groups], betas=BETAS)


class StudentModel(nn.Module):
    """A student on its host, which is not a submodule, as `train.loop.run_steps` takes it."""

    def __init__(self, student: Student, host: Host) -> None:
        super().__init__()
        self.student = student
        self._host = host

    def forward(self, encoded: Encoded, words: Tensor | None, targets: Tensor, _seed: int) -> Losses:
        """Losses of one batch; see `TrainedModel.forward`."""
        host = self._host
        with (
            precision_of(host),
            unfused_attention(host),
            evaluating(host.map.base),
            attach(host.map, self.student.adapter(), dense=True) as attachment,
        ):
            logits, active = forward(host, attachment, encoded, words)
        task, correct = task_loss(logits, targets)
        return Losses(task, task.detach(), correct, active.detach(), False)


def _values(readout: PortedReadout) -> dict[str, Tensor]:
    found = {
        f"depth_weight:{depth}": row_values(weight).detach().float().clone()
        for depth, weight in readout.by_depth.items()
    }
    others = {
        "bias": readout.bias,
        "pool": readout.pool,
        "out_weight": readout.out_weight,
        "out_bias": readout.out_bias,
    }
    return found | {name: value.detach().float().clone() for name, value in others.items() if value is not None}


def _readout(values: Mapping[str, Tensor]) -> PortedReadout:
    depth_weights = {
        int(name.removeprefix("depth_weight:")): value
        for name, value in values.items()
        if name.startswith("depth_weight:")
    }
    return PortedReadout(
        depth_weights, values["bias"], None, values.get("pool"), values["out_weight"], values["out_bias"]
    )
