"""Read a folder's configuration and weights with transformers, quietly and with typed errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from uhl_cli.errors import HostError, first_line
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.packed import unpack

# Release (major, minor) of transformers.
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# Buffers that older releases saved among the weights: masks, positions, frequencies of rotary embeddings.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".position_ids", ".inv_freq")


@dataclass(frozen=True, eq=False)
class Weights:
    """A loaded model, the names of weights that the checkpoint lacks, which are random, and of those it has unused."""

    model: nn.Module
    missing: list[str]
    unused: list[str]


def load_config(name: str, folder: Path, trust_remote_code: bool) -> Any:  # noqa: ANN401
    """The configuration in a folder.

    :raises HostError: It cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HostError(
            f"The configuration of '{name}' cannot be read: {first_line(error)}",
            "Fetch the checkpoint again, or check its config.json.",
        ) from error


def load_model(
    name: str,
    folder: Path,
    config: Any,  # noqa: ANN401 - any family's configuration class
    dtype: str,
    trust_remote_code: bool,
) -> Weights:
    """The model in a folder, without a head, from its safetensors files; see `refuse_incomplete`.

    The caller's random state is unchanged.

    :param dtype: Name of a torch dtype, or "auto" for the checkpoint's own.
    :raises HostError: Weights are damaged or of other shapes than the configuration's.
    """
    return Weights(*from_pretrained(AutoModel, name, folder, config, dtype, trust_remote_code))


def refuse_incomplete(name: str, weights: Weights, host_map: HostMap) -> None:
    """Check that every weight of the host except a pooler's was loaded, and that its layers use all of theirs.

    :raises HostError: Weights are missing, or the checkpoint has weights inside its layers that the model does not use.
        Heads and poolers of other tasks, and a decoder beside the encoder that is the host, are fine.
    """
    prefix = next(path for path, module in weights.model.named_modules() if module is host_map.base)
    within = [key.removeprefix(f"{prefix}.") for key in weights.missing if not prefix or key.startswith(f"{prefix}.")]
    own = {path for path, _ in host_map.base.named_parameters()}
    missing = [key for key in within if key in own and not key.startswith(f"{host_map.pooler}.")]
    if missing:
        raise HostError(
            f"The checkpoint of '{name}' lacks {len(missing)} weights, the first is '{missing[0]}'.",
            "Use a complete checkpoint of this model type; missing weights would be random.",
        )
    lists = {f".{layer.name.rpartition('.')[0]}." for layer in host_map.layers}
    left = [key for key in weights.unused if any(part in f".{key}" for part in lists) and not key.endswith(_BUFFERS)]
    if left:
        raise HostError(
            f"'{name}' has {len(left)} weights in layers that its configuration does not use, the first is "
            f"'{left[0]}'.",
            "Check num_hidden_layers and the model type in its config.json.",
        )


def from_pretrained(
    kind: Any,  # noqa: ANN401 - one of transformers' auto classes
    name: str,
    folder: Path,
    config: Any,  # noqa: ANN401
    dtype: str,
    trust_remote_code: bool,
    *,
    other_shapes: bool = False,
) -> tuple[nn.Module, list[str], list[str]]:
    """A model from a folder's safetensors files, the names of missing weights, which are random, and of unused ones.

    :param other_shapes: Treat weights of other shapes than the configuration's as missing.
    :raises HostError: Weights are damaged or, unless treated as missing, of other shapes.
    """
    # The argument was called torch_dtype before 4.56.
    dtype_argument = "dtype" if RELEASE >= (4, 56) else "torch_dtype"
    try:
        # Missing weights (a pooler's) are random; drawing them must not change the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, report = kind.from_pretrained(
                str(folder),
                config=config,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=other_shapes,
                **{dtype_argument: dtype if dtype == "auto" else getattr(torch, dtype)},
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise HostError(
            f"The weights of '{name}' cannot be loaded: {first_line(error)}",
            "Fetch the checkpoint again; a quantised one needs its library, or use an unquantised one.",
        ) from error
    reshaped = [entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]]
    return model, sorted({*report["missing_keys"], *reshaped}), sorted(report["unexpected_keys"])


def load_packed(
    name: str,
    folder: Path,
    config: Any,  # noqa: ANN401
    dtype: str,
) -> Weights:
    """The base model of a builtin host, from its packed weights; otherwise as `load_model`.

    :param dtype: Name of a torch dtype, or "auto" for float32, which the weights unpack to.
    :raises HostError: The weights are damaged or do not fit the configuration.
    """
    weights = unpack(folder / "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = AutoModel.from_config(config)
    try:
        outcome = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise HostError(f"The weights of '{name}' do not fit its configuration.", "Install uhl again.") from error
    if outcome.unexpected_keys:
        raise HostError(f"The weights of '{name}' are not those of its configuration.", "Install uhl again.")
    model.to(torch.float32 if dtype == "auto" else getattr(torch, dtype))
    return Weights(model, sorted(outcome.missing_keys), [])


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager: inside it transformers logs errors only and shows no progress bars."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
