"""A host from its configuration alone: modules on the meta device, without weights."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModel

from uhl_cli.errors import HostError, HostNotFoundError, UsageError, first_line
from uhl_cli.host.builtin import PREFIX, builtin_path
from uhl_cli.host.checkpoint import DTYPES, Host, longest_input
from uhl_cli.host.fingerprint import shape_fingerprint
from uhl_cli.host.loading import load_config, quiet, without_weights
from uhl_cli.host.locate import CONFIG_FILE
from uhl_cli.host.running import MetaGroups
from uhl_cli.host.shrunken import map_without_weights
from uhl_cli.host.untrusted import FOREIGN
from uhl_cli.hub.failures import Request, hub_errors


def load_config_host(name: str, *, revision: str | None = None, dtype: str = "float32", offline: bool = False) -> Host:
    """The host that a configuration describes, without weights: on the meta device, and without a tokenizer.

    Its name is the given one; for a local path its last part, or the folder's name for a config.json.  Its `max_length`
    is what its positions allow; a tokenizer may allow less.  Its map is found on narrow copies, see `shrunken`.

    :param name: A config.json, a folder that holds one, `builtin:NAME`, or a hub id, of which only that file is read.
    :param dtype: As in `checkpoint.load_host`; "auto" takes the configuration's own, or float32.
    :raises UsageError: Unknown dtype.
    :raises HostNotFoundError: There is no such configuration, or it cannot be fetched.
    :raises UnknownModelTypeError: transformers does not know its model type.
    :raises HostMapError: Its modules are not found.
    :raises HostError: It cannot be read, or describes no model.
    """
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'.", f"Pass one of: {', '.join(DTYPES)}.")
    path = _config_path(name, revision, offline)
    with quiet():
        config = load_config(name, path, trust_remote_code=False)
        model: Any = without_weights(AutoModel, name, config)
        # Some models search the tokens for padding, but tokens have no values on the meta device.
        with suppress(*FOREIGN):  # some configurations take no None
            model.config.pad_token_id = None
        model = model.requires_grad_(False).to(_dtype(dtype, config))
        host_map = map_without_weights(name, model, config)
        try:
            with MetaGroups():
                host_map.base(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"))
        except FOREIGN as error:
            raise HostError(
                f"The configuration of '{name}' describes a model that does not run: {first_line(error)}",
                "Check its config.json.",
            ) from error
    longest = longest_input(host_map.positions, None)
    return Host(_shown(name, path), model, None, host_map, longest, shape_fingerprint(host_map), revision)


def _config_path(name: str, revision: str | None, offline: bool) -> Path:
    """The configuration's file on disk."""
    path = builtin_path(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(name).expanduser()
    if name and path.is_file():
        return path
    if name and path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise HostError(f"'{name}' has no {CONFIG_FILE}.", "Pass the file itself, or the folder that holds it.")
        return path / CONFIG_FILE
    if not name or name.endswith(".json") or name.startswith((".", "/", "~")):
        raise HostNotFoundError(f"There is no file '{name}'.", "Check the path, or pass a hub id such as org/name.")
    with hub_errors(Request(name, revision, HostNotFoundError, "model", "pass a config.json")):
        return Path(hf_hub_download(name, CONFIG_FILE, revision=revision, local_files_only=offline))


def _dtype(dtype: str, config: Any) -> torch.dtype:  # noqa: ANN401
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    # The field was called torch_dtype before transformers 4.56.
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32


def _shown(name: str, path: Path) -> str:
    """A host's name to show, without the directories of a local path."""
    if not Path(name).expanduser().exists():
        return name
    given = path.resolve()
    return given.parent.name if given.name == CONFIG_FILE else given.stem
