"""Check the bounds of an untrusted checkpoint's configuration before transformers acts on it.

transformers builds what a configuration describes: fifty million layers, or a dictionary of a trillion labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.errors
from safetensors import SafetensorError
from torch import nn

from uhl_cli.errors import HostError

# What transformers, torch and huggingface_hub raise for files that break their rules; older releases of the last have
# no error of their own for a configuration.
FOREIGN: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    SafetensorError,
    getattr(huggingface_hub.errors, "StrictDataclassError", ValueError),
)

MAX_CONFIG_BYTES = 20_000_000
# The deepest published hosts have about 130 layers.
_BOUNDS = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), (1, 512))
_BOUNDS |= dict.fromkeys(("num_labels", "_num_labels"), (0, 100_000))
# At most so many parameters a byte of the weights: four of two bits each; and so many that a checkpoint may lack.
_PARAMETERS_A_BYTE, _MISSING = 4, 10_000_000
_HINT = "Fetch the checkpoint again, or check its config.json."


def refuse_large_file(name: str, path: Path) -> None:
    """Return only if a configuration's file, if there is one, is of a sane size.

    :raises HostError: It is not.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size > MAX_CONFIG_BYTES:
        raise HostError(
            f"The configuration of '{name}' has {size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read.", _HINT
        )


def refuse_extremes(name: str, raw: Any) -> None:  # noqa: ANN401 - untrusted JSON
    """Return only if a configuration's numbers of layers and labels, wherever it has them, are sane.

    transformers builds so many modules, and a dictionary of so many labels, before it looks at anything else.  Other
    sizes show in the model on the meta device.

    :raises HostError: One is not; names it.
    """
    parts = [raw]
    while parts:
        part = parts.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, dict | list):
                parts.append(value)
            low, high = _BOUNDS.get(str(key), (0, 0))
            if high and value is not None and (type(value) is not int or not low <= value <= high):
                problem = f"The configuration of '{name}' has the {key} {value!r:.60}, which is no whole number"
                raise HostError(f"{problem} within {low:,} and {high:,}.", _HINT)


def refuse_more_than_stored(name: str, described: nn.Module, files: Sequence[Path]) -> None:
    """Return only if safetensors files are large enough for the model that their configuration describes.

    What they lack would be allocated and drawn at random, before it is noticed.

    :param described: The model on the meta device.
    :raises HostError: They are not.
    """
    stored = sum(path.stat().st_size for path in files if path.is_file())
    parameters = sum(value.numel() for value in (*described.parameters(), *described.buffers()))
    if parameters > _PARAMETERS_A_BYTE * stored + _MISSING:
        raise HostError(
            f"The configuration of '{name}' describes {parameters:,} parameters; its weights have {stored:,} bytes.",
            _HINT,
        )
