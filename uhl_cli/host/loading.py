"""Read a folder's configuration and weights with transformers, quietly and with typed errors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from uhl_cli.errors import HostError, first_line
from uhl_cli.host.families import Family, family_of
from uhl_cli.host.locate import CONFIG_FILE
from uhl_cli.host.packed import unpack
from uhl_cli.host.untrusted import FOREIGN, refuse_extremes, refuse_large_file, refuse_more_than_stored

# Release (major, minor) of transformers.
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# Buffers that older releases saved among the weights: masks, positions, frequencies of rotary embeddings.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".position_ids", ".inv_freq")


def load_config(name: str, folder: Path, trust_remote_code: bool, *, as_host: bool = True) -> Any:  # noqa: ANN401
    """The configuration in a folder; with `as_host`, its model type must have a row in the table of families.

    :raises UnknownFamilyError: `as_host` is set and there is no row for its type.
    :raises HostError: It cannot be read.
    """
    refuse_large_file(name, folder if folder.is_file() else folder / CONFIG_FILE)
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
        refuse_extremes(name, raw)
        # A type that transformers itself does not know has no row either; this says so with our list.
        if as_host:
            family_of(SimpleNamespace(**raw))
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except FOREIGN as error:
        raise HostError(
            f"The configuration of '{name}' cannot be read: {first_line(error)}",
            "Fetch the checkpoint again, or check its config.json.",
        ) from error


def load_model(
    name: str,
    folder: Path,
    config: Any,  # noqa: ANN401 - any family's configuration class
    family: Family,
    dtype: str,
    trust_remote_code: bool,
) -> nn.Module:
    """The base model in a folder, with every weight except a pooler's from its safetensors files.

    The caller's random state is unchanged.

    :param dtype: Name of a torch dtype, or "auto" for the checkpoint's own.
    :raises HostError: Weights are damaged, missing or of other shapes than the configuration's, or the checkpoint has
        weights inside its layers that the model does not use.  Heads and poolers of other tasks are fine.
    """
    model, absent, unused = from_pretrained(AutoModel, name, folder, config, dtype, trust_remote_code)
    missing = _without_pooler(absent, family)
    if missing:
        raise HostError(
            f"The checkpoint of '{name}' lacks {len(missing)} weights, the first is '{missing[0]}'.",
            "Use a complete checkpoint of this model type; missing weights would be random.",
        )
    left = [key for key in unused if f".{family.layers}." in f".{key}" and not key.endswith(_BUFFERS)]
    if left:
        raise HostError(
            f"'{name}' has {len(left)} weights in layers that its configuration does not use, the first is "
            f"'{left[0]}'.",
            "Check num_hidden_layers and the model type in its config.json.",
        )
    return model


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
    described = without_weights(kind, name, config, trust_remote_code)
    refuse_more_than_stored(name, described, list(folder.glob("*.safetensors")))
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
    except FOREIGN as error:
        raise HostError(
            f"The weights of '{name}' cannot be loaded: {first_line(error)}",
            "Fetch the checkpoint again; a quantised one needs its library, or use an unquantised one.",
        ) from error
    reshaped = [entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]]
    return model, sorted({*report["missing_keys"], *reshaped}), sorted(report["unexpected_keys"])


def without_weights(kind: Any, name: str, config: Any, trust_remote_code: bool = False) -> nn.Module:  # noqa: ANN401
    """The model of a configuration on the meta device, in eval mode.

    :param kind: One of transformers' auto classes.
    :raises HostError: The configuration describes no model.
    """
    try:
        with torch.device("meta"):
            # Plain attention: others need libraries, and transformers 4 looks at the mask's values before it calls one.
            model: nn.Module = kind.from_config(
                copy.deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except FOREIGN as error:
        raise HostError(
            f"The configuration of '{name}' describes no model: {first_line(error)}", "Check its config.json."
        ) from error
    return model.eval()


def load_packed(
    name: str,
    folder: Path,
    config: Any,  # noqa: ANN401
    family: Family,
    dtype: str,
) -> nn.Module:
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
    if outcome.unexpected_keys or _without_pooler(outcome.missing_keys, family):
        raise HostError(f"The weights of '{name}' are not those of its configuration.", "Install uhl again.")
    return model.to(torch.float32 if dtype == "auto" else getattr(torch, dtype))


def _without_pooler(keys: Iterable[str], family: Family) -> list[str]:
    """Sorted keys without the pooler's, which does not affect the hidden states."""
    return sorted(key for key in keys if family.pooler is None or not key.startswith(f"{family.pooler}."))


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
