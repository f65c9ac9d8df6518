"""Load a checkpoint as a host: frozen base model, tokenizer, proven map and fingerprint."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from uhl_cli.errors import HostError, UsageError, first_line
from uhl_cli.host.fingerprint import Fingerprint, fingerprint
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.loading import load_config, load_model, load_packed, quiet, refuse_incomplete
from uhl_cli.host.locate import locate
from uhl_cli.host.plain_text import read_as_text
from uhl_cli.host.proof import resolve
from uhl_cli.host.tokenizer import load_tokenizer, prepare_tokenizer, try_tokenizer, warn_other_file
from uhl_cli.schema import TokenizerSource

DTYPES = ("float32", "bfloat16", "float16", "auto")
# Tokenizers without a limit report a huge number; no host reads this many tokens.
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
    :param tokenizer_source: Where the tokenizer comes from, if its file and its class give other ids; else None.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    map: HostMap
    max_length: int
    fingerprint: Fingerprint
    revision: str | None
    tokenizer_source: TokenizerSource | None = None

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
        return self.map.decoder

    @property
    def device(self) -> torch.device:
        """Device of the model's input."""
        return self.map.embeddings.weight.device

    def copied(self) -> Host:
        """A copy of the host whose weights can be changed; faster than loading it again.

        The tokenizer is shared.  The map is not proven again, because it was proven on the same modules.
        """
        model = copy.deepcopy(self.model)
        return replace(self, model=model, map=self.map.on(model))


def load_host(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    offline: bool = False,
    trust_remote_code: bool = False,
    tokenizer: TokenizerSource | None = None,
    cache_dir: str | Path | None = None,
    cache: bool = True,
) -> Host:
    """The host `name`: `builtin:NAME`, a local folder or GGUF file, or a hub id, with a proven map.

    The model is frozen and in eval mode.  Only safetensors and GGUF weights are loaded.  The checkpoint must
    contain every weight except a pooler's.  The caller's random state is unchanged.

    :param revision: Branch, tag or commit of a hub id.
    :param device: A torch device, or "auto": CUDA, else MPS, else CPU.
    :param dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
    :param offline: Use only the hub's cache.
    :param trust_remote_code: Run the checkpoint's own Python code.
    :param tokenizer: "file" for the tokenizer that tokenizer.json holds, "class" for the one that transformers makes.
        Where they differ, the default is the file, with a `UhlWarning`; see `tokenizer.load_tokenizer`.
    :param cache: Take a map by structure from the cache, or put it there, see `map_cache`.
    :raises UsageError: Unknown dtype or device.
    :raises HostNotFoundError: There is no such host, or it cannot be reached.
    :raises TokenizerError: Its tokenizer is missing, damaged or not fast.
    :raises HostMapError: It hands no stream of states from layer to layer.
    :raises HostError: Its configuration or weights are missing, damaged or do not fit each other.
    """
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'.", f"Pass one of: {', '.join(DTYPES)}.")
    target = device_of(device)
    located = locate(name, revision=revision, offline=offline, cache_dir=cache_dir, with_code=trust_remote_code)
    with quiet():
        config = load_config(name, located.folder, trust_remote_code, gguf=located.gguf)
        found, source = load_tokenizer(
            name,
            located.folder,
            config=config,
            trust_remote_code=trust_remote_code,
            source=tokenizer,
            gguf=located.gguf,
        )
        if located.packed:
            weights = load_packed(name, located.folder, config, dtype)
        else:
            weights = load_model(name, located.folder, config, dtype, trust_remote_code, located.gguf)
        model = weights.model
        try:
            model.to(target)
        except (RuntimeError, AssertionError) as error:
            raise HostError(
                f"'{name}' does not fit on {target}: {first_line(error)}",
                "Use --device cpu, or --dtype bfloat16.",
            ) from error
        model.eval().requires_grad_(False)
        host = replace(_host(name, model, found, located.revision, cached=cache), tokenizer_source=source)
        refuse_incomplete(name, weights, host.map)
        return host


def wrap_host(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, name: str = "in-memory") -> Host:
    """A host from a model of any class and a tokenizer in memory; see `inner.base_of` for what of it is the host.

    The model keeps its training and `requires_grad` flags.  The tokenizer is copied; the caller's keeps its settings.
    Warns (`UhlWarning`) if it gives other ids than the tokenizer.json that it was loaded from.

    :raises TokenizerError: The tokenizer is not fast.
    :raises HostMapError: The model hands no stream of states from layer to layer, holds several models, or adapters or
        prompts of peft.
    :raises HostError: The tokenizer has more tokens than the model has embeddings, or a token beyond them.
    """
    warn_other_file(name, tokenizer)
    return _host(name, model, prepare_tokenizer(name, copy.deepcopy(tokenizer)), None)


def _host(
    name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, revision: str | None, *, cached: bool = False
) -> Host:
    host_map = resolve(model, cached=cached)
    rows = host_map.embeddings.num_embeddings
    if len(tokenizer) > rows:
        raise HostError(
            f"The tokenizer of '{name}' has {len(tokenizer)} tokens, the model {rows} embeddings.",
            "Use the tokenizer that belongs to the checkpoint: its own tokenizer.json beside the weights.",
        )
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:  # a vocabulary with gaps
        raise HostError(
            f"Token {token!r} of the tokenizer of '{name}' has id {largest}, the model {rows} embeddings.",
            "Use the tokenizer that belongs to the checkpoint: its own tokenizer.json beside the weights.",
        )
    types = getattr(getattr(host_map.base, "config", None), "type_vocab_size", 0) or 0
    try_tokenizer(name, tokenizer, rows=rows, types=types)
    read_as_text(tokenizer)
    return Host(
        name=name,
        model=host_map.base,
        tokenizer=tokenizer,
        map=host_map,
        max_length=longest_input(host_map.positions, tokenizer),
        fingerprint=fingerprint(host_map),
        revision=revision,
    )


def longest_input(positions: int | None, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Longest input, in tokens, that the model's positions and the tokenizer, if any, allow."""
    limits = [_FALLBACK_LENGTH if positions is None else positions]
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
        problem = f"Device '{device}' cannot be used here: {first_line(error)}"
        raise UsageError(problem, "Pass --device cpu, or auto for the best that this machine has.") from error
    return target
