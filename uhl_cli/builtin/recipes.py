"""The builtin hosts, one row each: shape, tokenizer and training.  Importable without torch.

`python -m uhl_cli.builtin.make` turns a row into a checkpoint; see there for the command and what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

VOCAB_SIZE = 14_336
# Every text is cut at this many tokens, in training as in use: positions beyond it were never trained.
MAX_LENGTH = 128


@dataclass(frozen=True)
class Recipe:
    """One builtin host.

    :param kind: "encoder" is a BERT with masked language modelling, "decoder" a Llama with causal.
    :param intermediate_size: Width between up and down projection.
    :param steps: Optimiser steps of `batch_tokens` tokens each.
    :param seed: Determines the random initialisation, and thereby the host's basis.
    """

    name: str
    kind: Literal["encoder", "decoder"]
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    learning_rate: float
    steps: int
    seed: int
    batch_tokens: int = 4096


_ROWS = (
    Recipe("tiny", "encoder", 2, 128, 4, 512, 2e-3, 1600, 11),
    Recipe("small", "encoder", 4, 192, 6, 768, 1.5e-3, 1600, 22),
    Recipe("base", "encoder", 6, 256, 8, 1024, 1e-3, 1700, 33),
    Recipe("decoder", "decoder", 4, 192, 6, 512, 2e-3, 900, 44),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({row.name: row for row in _ROWS})
