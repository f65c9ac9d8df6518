"""What `tune` trains: delta-theta on a fixed adapter and, for another task, a new readout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.codes.layout import READOUT_PARAMETERS, bits_of
from uhl_cli.codes.quantise import codes_and_scales, fake_quantise
from uhl_cli.formats.adapter import Quantised
from uhl_cli.formats.convert import dequantised
from uhl_cli.schema import AdapterConfig


class TaskAdapter(nn.Module):
    """A stored adapter of which only delta-theta (and with `new_readout` the readout) is trained.

    Guarantee: everything else is what the adapter's file holds, bit for bit, and `stored()` is what a task file
    will hold, so that its score equals the one in training.  A `config` with fewer active atoms keeps the first
    thresholds.
    """

    def __init__(self, stored: dict[str, Tensor], config: AdapterConfig, *, new_readout: bool, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.new_readout = new_readout
        self._fixed = dict(stored) | {"threshold": stored["threshold"][: config.top_k]}
        names = ["delta_theta"]
        if new_readout:
            fresh = CanonicalAdapter(config, seed=seed)
            names += [name for name in READOUT_PARAMETERS if name in dict(fresh.named_parameters())]
            for name in (*READOUT_PARAMETERS, "head_weight", "head_bias"):
                self._fixed.pop(name, None)
            self._fixed |= {name: value for name, value in fresh.stored().items() if name not in self._fixed}
        for name in names:
            # A new task starts with a zero bias.
            start = torch.zeros_like(stored[name]) if new_readout and name == "delta_theta" else self._fixed[name]
            self.register_parameter(name, nn.Parameter(start.detach().clone()))

    def stored(self) -> dict[str, Tensor]:
        """Every parameter as the files hold it, differentiable by straight-through in those that are trained."""
        trained = {name: fake_quantise(value, bits_of(name)) for name, value in self.named_parameters()}
        device = trained["delta_theta"].device
        return {name: value.to(device) for name, value in self._fixed.items()} | trained

    def trained_values(self) -> dict[str, Tensor]:
        """The trained parameters' values as read back from a task file, float32 on the CPU."""
        return dequantised(self.quantised())

    def quantised(self) -> dict[str, Quantised]:
        """The trained parameters as a task file holds them."""
        found = {}
        for name, value in self.named_parameters():
            codes, scales = codes_and_scales(value.detach().cpu(), bits_of(name))
            found[name] = Quantised(codes.numpy(), scales.numpy())
        return found
