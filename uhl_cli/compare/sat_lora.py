"""SAT-LoRA: cross-layer shared LoRA, the baseline that shares atoms within one architecture.

Every weight shape [out, in] has one dictionary: K input rows and K output rows.  The two factors of a module's update,
rank r, are mixtures of these rows, and what mixes them is a function of the module's normalised depth and type.  So all
layers share their atoms, and what is learnt belongs to one architecture: another target needs its own training.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.host.hostmap import HostMap, Site

TYPES = ("q", "k", "v", "o", "up", "down")
_FREQUENCIES = 4
_MIXER_SIZE = 64
Shape = tuple[int, int]


def fake_int8(values: Tensor) -> Tensor:
    """Values as int8 codes with one float16 scale a row give them back; the gradient passes straight through."""
    # The smallest scale is one that float16 can hold, so that a row of zeros is not divided by zero.
    scale = (values.detach().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6).half().float()
    stored = (values.detach() / scale).round().clamp(-127, 127) * scale
    return values + (stored - values).detach()


def fake_half(values: Tensor) -> Tensor:
    """Values as float16 gives them back; the gradient passes straight through."""
    return values + (values.detach().half().float() - values).detach()


class _Dictionary(nn.Module):
    """Atoms of one weight shape [out, in], and the mixer of its modules."""

    def __init__(self, shape: Shape, atoms: int, rank: int) -> None:
        super().__init__()
        out_size, in_size = shape
        self.read = nn.Parameter(torch.randn(atoms, in_size) / math.sqrt(in_size))
        self.write = nn.Parameter(torch.zeros(atoms, out_size))  # an update of zero to begin with, as LoRA has
        inputs = 1 + 2 * _FREQUENCIES + len(TYPES)
        self.hidden = nn.Linear(inputs, _MIXER_SIZE)
        self.mix = nn.Linear(_MIXER_SIZE, 2 * rank * atoms)
        self._rank = rank

    def factors(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [r, out] of the module at `place`, from the values as stored."""
        hidden = functional.gelu(functional.linear(place, fake_int8(self.hidden.weight), fake_half(self.hidden.bias)))
        mixed = functional.linear(hidden, fake_int8(self.mix.weight), fake_half(self.mix.bias))
        into, out = mixed.reshape(2, self._rank, -1)
        return into @ fake_int8(self.read), out @ fake_int8(self.write)


class SatLora(nn.Module):
    """The baseline on a frozen host; inside `attached()` its modules carry the updates.

    :param atoms: K, rows of each side of a dictionary.
    """

    def __init__(self, host_map: HostMap, *, rank: int, alpha: float, atoms: int) -> None:
        super().__init__()
        self._sites: list[tuple[Site, str, Tensor]] = []
        self.dictionaries = nn.ModuleDict()
        last = max(1, len(host_map.layers) - 1)
        for index, layer in enumerate(host_map.layers):
            for type_, site in layer.sites.items():
                if type_ not in TYPES:
                    continue
                shape = (site.out_features, site.in_features)
                key = "x".join(map(str, shape))
                if key not in self.dictionaries:
                    self.dictionaries[key] = _Dictionary(shape, atoms, rank)
                self._sites.append((site, key, _place(index / last, type_)))
        self._scale = alpha / rank
        self._frozen: list[tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def freeze(self) -> None:
        """Mix the factors once for all: what is trained does not change any more."""
        self._frozen = self._factors()

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of every site."""
        found = []
        for _, key, place in self._sites:
            dictionary = self.dictionaries[key]
            assert isinstance(dictionary, _Dictionary)
            read, write = dictionary.factors(place.to(dictionary.read.device))
            found.append((read, self._scale * write))
        return found

    def attached(self) -> AbstractContextManager[object]:
        """Within it every module adds its update to its output."""
        stack = ExitStack()
        for (site, _, _), (read, write) in zip(self._sites, self._frozen or self._factors(), strict=True):
            hook = _Hook(site, read, write)
            stack.callback(site.module.register_forward_hook(hook).remove)
        return stack

    def stored_bytes(self) -> int:
        """Bytes of the file: int8 codes, a float16 scale a row, biases in float16."""
        matrices = [value for value in self.parameters() if value.dim() > 1]
        vectors = [value for value in self.parameters() if value.dim() == 1]
        return sum(value.numel() + 2 * len(value) for value in matrices) + 2 * sum(value.numel() for value in vectors)


class _Hook:
    """Adds a module's update to its output, or to its part of a fused module's output."""

    def __init__(self, site: Site, read: Tensor, write: Tensor) -> None:
        self._columns = site.columns if site.fused else None
        self._read, self._write = read, write

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states = inputs[0]
        update = ((states @ self._read.T.to(states.dtype)) @ self._write.to(states.dtype)).to(output.dtype)
        if self._columns is None:
            return output + update
        changed = output.clone()
        changed[..., self._columns] += update
        return changed


def _place(depth: float, type_: str) -> Tensor:
    """Features of a module's normalised depth and type."""
    waves = [wave(math.pi * 2**power * depth) for power in range(_FREQUENCIES) for wave in (math.sin, math.cos)]
    return torch.tensor([depth, *waves, *(float(type_ == other) for other in TYPES)])
