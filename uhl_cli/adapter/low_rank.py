"""delta-theta as an update of a host's linear modules: 1,024 numbers that expand to a LoRA on any host.

Every linear module gets a LoRA of rank `RANK`.  A has fixed signs.  Each entry of B is one of the numbers, by a fixed
assignment, times a sign and a factor that gives all numbers the same weight (as in Uni-LoRA, 2506.00799).  Assignment
and signs follow from the host's shapes, so a task file stores the numbers alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uhl_cli.adapter.module import LoraFactors, tuned_modules
from uhl_cli.host.hostmap import HostMap

RANK = 4
# Key of the generator.  Part of the task file's format: another key gives another model.
_KEY = 0x75686C


@dataclass(frozen=True)
class Expansion:
    """How the numbers become B: `places` int64 and `factors` float32 [entries of all B], and every module's A."""

    names: tuple[str, ...]
    down: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, host_map: HostMap, count: int) -> Expansion:
        """The expansion of `count` numbers on a host.

        :raises HostError: The host has no linear module.
        """
        target_modules = tuned_modules(host_map)
        device = host_map.embeddings.weight.device
        entries = [linear.module_features * RANK for linear in target_modules.values()]
        inputs = [linear.in_features * RANK for linear in target_modules.values()]
        # numpy guarantees that a bit generator's raw output never changes, but not that its distributions do not.
        drawn = np.random.Philox(key=_KEY).random_raw(sum(entries) + sum(inputs))
        taken = drawn[: sum(entries)]
        places = ((taken >> np.uint64(1)) % np.uint64(count)).astype(np.int64)
        signs = 1.0 - 2.0 * (taken & np.uint64(1)).astype(np.float32)
        uses = np.bincount(places, minlength=count).clip(1)
        factors = (signs / np.sqrt(uses)[places]).astype(np.float32)
        rows = 1.0 - 2.0 * (drawn[sum(entries) :] & np.uint64(1)).astype(np.float32)
        down = [
            torch.from_numpy(part.reshape(RANK, -1) / np.float32(np.sqrt(part.size / RANK))).to(device)
            for part in np.split(rows, np.cumsum(inputs)[:-1])
        ]
        ends = np.cumsum(entries)[:-1]
        return cls(
            tuple(target_modules),
            tuple(down),
            tuple(torch.from_numpy(part).to(device) for part in np.split(places, ends)),
            tuple(torch.from_numpy(part).to(device) for part in np.split(factors, ends)),
        )

    def factors_of(self, numbers: Tensor) -> LoraFactors:
        """A and B of every module, differentiable in `numbers`, which are of any shape."""
        flat = numbers.reshape(-1)
        found = {}
        for name, down, places, factors in zip(self.names, self.down, self.places, self.factors, strict=True):
            found[name] = (down, (flat[places] * factors).view(-1, RANK))
        return LoraFactors(found)
