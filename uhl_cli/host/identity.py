"""A digest of everything that decides which states a host gives to a text."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn

from uhl_cli import __version__
from uhl_cli.host.checkpoint import Host

# Code of these packages is known by their release.
_PACKAGES = ("torch", "transformers")
_ADDED_TOKENS = '"added_tokens"'


def host_digest(host: Host) -> str | None:
    """SHA-256 over a host and what runs it; None if something of it cannot be seen.

    Guarantee: two hosts with the same digest compute the same states of the same texts, by the same operations.  It
    covers every value of parameters and buffers with its dtype, the configuration, the plain attributes and classes of
    all modules, the tokenizer, the kind of device, the number of threads, and the releases of uhl, torch, transformers
    and tokenizers.  `Host.fingerprint` names a host, but covers three tensors alone and no tokenizer.

    None for modules of other packages, such as a checkpoint's own code, modules with hooks (or hooks on all modules) or
    a replaced `forward`, quantised weights, and a host without weights.  What it cannot see is code of torch or
    transformers that was replaced in this process.
    """
    base, tokenizer = host.map.base, host.tokenizer
    if tokenizer is None or _hooks_of_all() or not all(map(_known, base.modules())) or not _from_packages(tokenizer):
        return None
    # With duplicates, so that it counts which module or weight another one shares.
    every = (base.named_parameters(remove_duplicate=False), base.named_buffers(remove_duplicate=False))
    tensors = [(name, value.detach()) for named in every for name, value in named]
    if not all(type(value.data) is Tensor and not value.is_meta for _, value in tensors):
        return None
    config: Any = base.config
    given = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    modules = [
        (name, type(module).__module__, type(module).__qualname__, _plain(module))
        for name, module in base.named_modules(remove_duplicate=False)
    ]
    parts = [given, str(getattr(config, "_attn_implementation", "")), modules, _tokenizer(host), _running(host.device)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    with ThreadPoolExecutor() as pool:
        for (name, value), content in zip(tensors, pool.map(lambda entry: _content(entry[1]), tensors), strict=True):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} {content}\n".encode())
    return digest.hexdigest()


def _known(module: nn.Module) -> bool:
    """Whether the module's class and plain attributes say what it computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return _from_packages(module) and not any(hooks) and "forward" not in vars(module)


def _hooks_of_all() -> bool:
    """Whether there are hooks on the calls of every module."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(getattr(nn.modules.module, name, None) for name in names)


def _from_packages(thing: object) -> bool:
    return type(thing).__module__.partition(".")[0] in _PACKAGES


def _plain(module: nn.Module) -> dict[str, object]:
    """The module's attributes that are numbers or words, and the attention that a configuration of its own names."""
    found: dict[str, object] = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name != "training"
    }
    return found | {"config": str(getattr(vars(module).get("config"), "_attn_implementation", ""))}


def _tokenizer(host: Host) -> list[object]:
    """What decides the tokens of a text; without the last call's settings of truncation and padding."""
    tokenizer: Any = host.tokenizer
    text = tokenizer.backend_tokenizer.to_str()
    _, found, rest = text.partition(_ADDED_TOKENS)  # the two settings are written before them
    names = ("bos", "eos", "cls", "sep", "pad", "unk")
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in names]
    return [type(tokenizer).__qualname__, rest if found else text, special, host.max_length, host.decoder]


def _running(device: torch.device) -> list[object]:
    """What decides the rounding of a pass: releases, device, threads and precision."""
    cuda = device.type == "cuda"
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return [
        __version__,
        torch.__version__,
        transformers.__version__,
        tokenizers.__version__,
        device.type,
        torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        str(torch.get_default_dtype()),
        str(torch.get_autocast_dtype(device.type)) if autocast else None,
        torch.are_deterministic_algorithms_enabled(),
    ]


def _content(value: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
