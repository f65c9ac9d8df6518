"""Load a checkpoint as a host: frozen base model, tokenizer, proven map and fingerprint."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from uhl_cli.errors import HostError, UsageError, first_line
from uhl_cli.host.families import Family, family_of
from uhl_cli.host.fingerprint import Fingerprint, fingerprint
from uhl_cli.host.hostmap import HostMap, find_map
from uhl_cli.host.loading import load_config, load_model, load_packed, quiet
from uhl_cli.host.locate import locate
from uhl_cli.host.plain_text import read_as_text
from uhl_cli.host.proof import resolve
from uhl_cli.host.tokenizer import load_tokenizer, prepare_tokenizer

DTYPES = ("float32", "bfloat16", "float16", "auto")
# Tokenizers without a limit report a huge number; no host in the table of families reads this many tokens.
_NO_LIMIT = 10**7
_FALLBACK_LENGTH = 512


@dataclass(frozen=True, eq=False)
class Host:
    """A base model with its tokenizer, map and limits.

    :param name: The name it was loaded by.
    :param model: Base model without a head.
    :param tokenizer: Fast, pads and cuts on the right, has a padding token; None for a host without weights, which
        `config_only` makes.
    :param max_length: Longest input in tokens, special tokens included.
    :param revision: Commit on the hub, or None for a folder, a builtin or a model in memory.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    map: HostMap
    max_length: int
    fingerprint: Fingerprint
    revision: str | None

    @property
    def hidden_size(self) -> int:
        """Width of the stream."""
        return self.map.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self.map.num_hidden_layers

    @property
    def decoder(self) -> bool:
        """Whether attention is causal."""
        return self.map.family.decoder

    @property
    def device(self) -> torch.device:
        """Device of the model's input."""
        return self.map.embeddings.weight.device

    def copied(self) -> Host:
        """A copy of the host whose weights can be changed; faster than loading it again.

        The tokenizer is shared.  The map is not proven again, because it was proven on the same modules.
        """
        model = copy.deepcopy(self.model)
        return replace(self, model=model, map=find_map(model))


def load_host(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    offline: bool = False,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
) -> Host:
    """The host `name`: `builtin:NAME`, a local folder, or a hub id, with a proven map.

    The model is frozen and in eval mode.  Only safetensors weights are loaded.  The checkpoint must contain every
    weight except a pooler's.  The caller's random state is unchanged.

    :param revision: Branch, tag or commit of a hub id.
    :param device: A torch device, or "auto": CUDA, else MPS, else CPU.
    :param dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
    :param offline: Use only the hub's cache.
    :param trust_remote_code: Run the checkpoint's own Python code.
    :raises UsageError: Unknown dtype or device.
    :raises HostNotFoundError: There is no such host, or it cannot be reached.
    :raises UnknownFamilyError: Its model type has no row; raised before weights are loaded.
    :raises TokenizerError: Its tokenizer is missing, damaged or not fast.
    :raises HostMapError: Its modules do not match its family's row.
    :raises HostError: Its configuration or weights are missing, damaged or do not fit each other.
    """
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'.", f"Pass one of: {', '.join(DTYPES)}.")
    target = device_of(device)
    located = locate(name, revision=revision, offline=offline, cache_dir=cache_dir, with_code=trust_remote_code)
    with quiet():
        config = load_config(name, located.folder, trust_remote_code)
        family = family_of(config)
        tokenizer = load_tokenizer(name, located.folder, config=config, trust_remote_code=trust_remote_code)
        if located.packed:
            model = load_packed(name, located.folder, config, family, dtype)
        else:
            model = load_model(name, located.folder, config, family, dtype, trust_remote_code)
        try:
            model.to(target)
        except (RuntimeError, AssertionError) as error:
            raise HostError(
                f"'{name}' does not fit on {target}: {first_line(error)}",
                "Use --device cpu, or --dtype bfloat16.",
            ) from error
        model.eval().requires_grad_(False)
        return _host(name, model, tokenizer, located.revision)


def wrap_host(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, name: str = "in-memory") -> Host:
    """A host from a model and a tokenizer in memory; no file is read.

    The model keeps its training and `requires_grad` flags.  The tokenizer is copied; the caller's keeps its settings.

    :raises UnknownFamilyError: The model's type has no row.
    :raises TokenizerError: The tokenizer is not fast.
    :raises HostMapError: The model does not match its family's row.
    :raises HostError: The tokenizer has more tokens than the model has embeddings, or a token beyond them.
    """
    return _host(name, model, prepare_tokenizer(name, copy.deepcopy(tokenizer)), None)


def _host(name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> Host:
    family_of(getattr(model, "config", None))
    base: nn.Module = getattr(model, "base_model", model)
    host_map = resolve(base)
    rows = host_map.embeddings.num_embeddings
    if len(tokenizer) > rows:
        raise HostError(
            f"The tokenizer of '{name}' has {len(tokenizer)} tokens, the model {rows} embeddings.",
            "Use the tokenizer that belongs to the checkpoint.",
        )
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:  # a vocabulary with gaps
        raise HostError(
            f"Token {token!r} of the tokenizer of '{name}' has id {largest}, the model {rows} embeddings.",
            "Use the tokenizer that belongs to the checkpoint.",
        )
    read_as_text(tokenizer)
    return Host(
        name=name,
        model=base,
        tokenizer=tokenizer,
        map=host_map,
        max_length=longest_input(base.config, host_map.family, tokenizer),
        fingerprint=fingerprint(host_map),
        revision=revision,
    )


def longest_input(config: Any, family: Family | None, tokenizer: PreTrainedTokenizerBase | None) -> int:  # noqa: ANN401
    """Longest input, in tokens, that the model's positions and the tokenizer, if any, allow."""
    limits = [_FALLBACK_LENGTH]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        unused = config.pad_token_id + 1 if family is not None and family.positions_after_padding else 0
        limits = [positions - unused]
    if tokenizer is not None and 0 < tokenizer.model_max_length < _NO_LIMIT:
        limits.append(int(tokenizer.model_max_length))
    return min(limits)


def device_of(device: str) -> torch.device:
    """The device of a `--device` option; `auto` is the first available of cuda, mps and cpu.

    :raises UsageError: When it cannot be used here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"Device '{device}' cannot be used here.", "Pass --device auto or cpu.") from error
    return target
