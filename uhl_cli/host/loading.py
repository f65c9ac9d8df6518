"""Read a folder's configuration and weights with transformers, quietly and with typed errors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from uhl_cli.errors import HostError, UhlWarning, UnknownModelTypeError, first_line
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.locate import CONFIG_FILE
from uhl_cli.host.packed import unpack
from uhl_cli.host.untrusted import FOREIGN, refuse_extremes, refuse_large_file, refuse_more_than_stored

# Release (major, minor) of transformers.
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# Methods whose modules keep a weight matrix that torch can turn into floating-point numbers.
_QUANTISED = ("torchao",)
# Of the files, and of code in the checkpoint.
_FAILURES: tuple[type[Exception], ...] = (*FOREIGN, SyntaxError, NameError)
# Buffers that older releases saved among the weights: masks, positions, frequencies of rotary embeddings.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".position_ids", ".inv_freq")


@dataclass(frozen=True, eq=False)
class Weights:
    """A loaded model, the names of weights that the checkpoint lacks, which are random, and of those it has unused."""

    model: nn.Module
    missing: list[str]
    unused: list[str]


def load_config(name: str, folder: Path, trust_remote_code: bool, *, gguf: str | None = None) -> Any:  # noqa: ANN401
    """The configuration in a folder.

    A GGUF file in the folder replaces its config.json.  Attention is computed by torch alone, with a `UhlWarning` if
    the configuration names another implementation, which transformers might download.  Another warning says that code
    in the checkpoint is not run.

    :raises UnknownModelTypeError: transformers does not know its model type.
    :raises HostError: It cannot be read.
    """
    source = {"gguf_file": gguf, "local_files_only": True} if gguf else {"local_files_only": True}
    refuse_large_file(name, folder if folder.is_file() else folder / CONFIG_FILE)
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(str(folder), **source)
        refuse_extremes(name, raw)
        code = next(iter(dict(raw.get("auto_map") or {}).values()), None)
        if not (code and trust_remote_code):
            _refuse_unknown(raw.get("model_type"), code)
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **source)
        if code and not trust_remote_code:
            _warn(
                f"'{name}' comes with code of its own ({code}), which is not run: transformers' own "
                f"{config.model_type} is used. Add --trust-remote-code if the checkpoint needs its code."
            )
        attention = raw.get("attn_implementation") or raw.get("_attn_implementation")
        if attention not in (None, "eager", "sdpa"):
            config._attn_implementation = None
            _warn(f"'{name}' asks for the attention '{attention}', which is not used; torch's own computes the same.")
        return config
    except _FAILURES as error:
        raise HostError(
            f"The configuration of '{name}' cannot be read: {first_line(error)}",
            "Fetch the checkpoint again, or check its config.json.",
        ) from error


def _refuse_unknown(model_type: object, code: str | None) -> None:
    """:raises UnknownModelTypeError: transformers does not know the type."""
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    own = f"add --trust-remote-code to run its own code, {code}" if code else ""
    if model_type is None:
        hint = own or 'name it in config.json, such as "model_type": "bert"'
        raise UnknownModelTypeError("The configuration names no model_type.", f"{hint[0].upper()}{hint[1:]}.")
    hint = own or "use a newer release of it, or a checkpoint of a type that it knows"
    raise UnknownModelTypeError(
        f"transformers {transformers.__version__} knows no model type '{str(model_type)[:100]}'.",
        f"{hint[0].upper()}{hint[1:]}.",
    )


def _warn(text: str) -> None:
    warnings.warn(UhlWarning(text), stacklevel=3)


def load_model(
    name: str,
    folder: Path,
    config: Any,  # noqa: ANN401 - any family's configuration class
    dtype: str,
    trust_remote_code: bool,
    gguf: str | None = None,
) -> Weights:
    """The model in a folder, without a head, from its safetensors files or its GGUF file; see `refuse_incomplete`.

    The caller's random state is unchanged.

    :param dtype: Name of a torch dtype, or "auto" for the checkpoint's own.
    :raises HostError: The weights are quantised so that no matrix can be read; or they are damaged, or of other shapes
        than the configuration's.
    """
    quantised = dict(getattr(config, "quantization_config", None) or {})
    if quantised and quantised.get("quant_method") not in _QUANTISED:
        raise HostError(
            f"'{name}' is quantised by '{quantised.get('quant_method')}'; only torchao's are read.",
            "Use the checkpoint that it was made from, or save it again after transformers' model.dequantize().",
        )
    return Weights(*from_pretrained(AutoModel, name, folder, config, dtype, trust_remote_code, gguf=gguf))


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
    gguf: str | None = None,
) -> tuple[nn.Module, list[str], list[str]]:
    """A model from a folder's safetensors files, the names of missing weights, which are random, and of unused ones.

    :param gguf: A GGUF file in the folder, whose weights are dequantised.
    :param other_shapes: Treat weights of other shapes than the configuration's as missing.
    :raises HostError: Weights are damaged or, unless treated as missing, of other shapes.
    """
    if getattr(config, "transformers_weights", None) is not None:
        raise HostError(
            f"The configuration of '{name}' names its weight file, {config.transformers_weights}.",
            "Rename the file to model.safetensors, and remove transformers_weights from config.json.",
        )
    # The argument was called torch_dtype before 4.56.
    dtype_argument = "dtype" if RELEASE >= (4, 56) else "torch_dtype"
    described = without_weights(kind, name, config, trust_remote_code)
    refuse_more_than_stored(name, described, [folder / gguf] if gguf else list(folder.glob("*.safetensors")))
    try:
        # Missing weights (a pooler's) are random; drawing them must not change the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, report = kind.from_pretrained(
                str(folder),
                config=config,
                **({"gguf_file": gguf} if gguf else {"use_safetensors": True}),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them
                **{dtype_argument: dtype if dtype == "auto" else getattr(torch, dtype)},
            )
    except _FAILURES as error:
        raise HostError(
            f"The weights of '{name}' cannot be loaded: {first_line(error)}",
            "Fetch the checkpoint again; a quantised one needs its library, or use an unquantised one.",
        ) from error
    # Some releases give the names alone, others (name, shape in the file, shape in the model).
    reshaped = sorted((entry,) if isinstance(entry, str) else tuple(entry) for entry in report["mismatched_keys"])
    if reshaped and not other_shapes:
        key, *shapes = reshaped[0]
        shown = " with {} in place of {}".format(*map(list, shapes)) if shapes else ""
        raise HostError(
            f"The weights of '{name}' cannot be loaded: {len(reshaped)} have other shapes than its configuration says, "
            f"the first is '{key}'{shown}.",
            "Correct its config.json, such as vocab_size, hidden_size or intermediate_size.",
        )
    return (
        model,
        sorted({*report["missing_keys"], *(entry[0] for entry in reshaped)}),
        sorted(report["unexpected_keys"]),
    )


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
