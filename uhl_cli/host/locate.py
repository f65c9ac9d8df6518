"""From the name of a host to a local folder that holds its files."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

from uhl_cli.errors import HostError, HostNotFoundError
from uhl_cli.host.builtin import PREFIX, builtin_path
from uhl_cli.hub.failures import Request, hub_errors
from uhl_cli.hub.fetch import snapshot_folder

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SAFETENSORS = ".safetensors"
_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_CONVERT = "Convert them: load with transformers and call save_pretrained(folder), then pass the folder."


@dataclass(frozen=True)
class Located:
    """A host's files on disk.

    :param revision: Commit on the hub; None for a folder and a builtin.
    :param packed: Whether the weights are packed as a builtin's, see `uhl_cli.host.packed`.
    :param gguf: Name of the GGUF file in the folder that replaces configuration and weights, if there is one.
    """

    folder: Path
    revision: str | None
    packed: bool = False
    gguf: str | None = None


def locate(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    with_code: bool = False,
) -> Located:
    """The folder that holds configuration, tokenizer and safetensors weights of `name`.

    A name is `builtin:NAME`, an existing folder or GGUF file, or a hub id, in this order.  Hub ids follow the
    ecosystem's rules: HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE, the shared cache, and
    the cached files where the hub cannot be reached.  Pickled weights are never downloaded.

    :param revision: Branch, tag or commit of a hub id; ignored for folders.
    :param offline: Use the cache alone.
    :param with_code: Also fetch Python files (for `trust_remote_code`).
    :raises HostNotFoundError: No such folder, hub id, revision or builtin, or no access to it.
    :raises HostError: It is there, but has no configuration or no safetensors weights.
    """
    if name.startswith(PREFIX):
        located = Located(builtin_path(name.removeprefix(PREFIX)), None, packed=True)
    elif (file := _gguf_file(name)) is not None:
        return Located(file.parent, None, gguf=file.name)
    elif name and Path(name).expanduser().is_dir():
        located = Located(Path(name).expanduser(), None)
    else:
        _check_hub_id(name)
        located = _from_hub(name, revision, offline, cache_dir, with_code)
    _check_folder(name, located.folder)
    return located


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that a name means: the file itself, or a folder's only one where it has no config.json.

    :raises HostError: There are several, or the package that reads them is not installed.
    """
    path = Path(name).expanduser()
    found = [path] if path.is_file() else sorted(path.glob("*.gguf")) if name and path.is_dir() else []
    if not found or found[0].suffix != ".gguf" or (path / CONFIG_FILE).is_file():
        return None
    if len(found) > 1:
        raise HostError(f"'{name}' has {len(found)} GGUF files.", f"Pass one of them, such as {found[0]}.")
    if importlib.util.find_spec("gguf") is None:
        raise HostError(
            f"'{name}' is a GGUF file, which only the package gguf reads.",
            "Run `pip install gguf`, or pass the safetensors checkpoint that it was made from.",
        )
    return found[0]


def locate_peft(name: str, *, offline: bool = False) -> Path | None:
    """The folder of the PEFT adapter `name`, a folder or a hub id; None if it is not a PEFT adapter.

    :raises HostNotFoundError: No such folder or hub id, or no access to it.
    :raises HostError: It is one, but has no safetensors weights.
    """
    if name.startswith(PREFIX):
        return None
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        _check_hub_id(name)
        wanted = [PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, *TOKENIZER_FILES, *_TOKENIZER_SETTINGS]
        folder = _snapshot(name, None, wanted, offline, None)
    if not (folder / PEFT_CONFIG_FILE).is_file():
        return None
    if not (folder / PEFT_WEIGHTS_FILE).is_file():
        raise HostError(
            f"'{name}' has no {PEFT_WEIGHTS_FILE}.",
            "Only safetensors weights are loaded: save it again with peft's save_pretrained(folder).",
        )
    return folder


def _check_hub_id(name: str) -> None:
    if name and Path(name).expanduser().exists():
        raise HostNotFoundError(f"'{name}' is a file, not a folder.", "Pass the folder that holds config.json.")
    separators = name.count("/") + name.count(os.sep if os.sep != "/" else "\\")
    if name.startswith((".", "/", "~")) or name.endswith(("/", "\\")) or separators > 1 or "\\" in name:
        raise HostNotFoundError(f"There is no folder '{name}'.", "Check the path, or pass a hub id such as org/name.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise HostNotFoundError(
            f"'{name}' is neither a folder nor a valid hub id.",
            "Pass an existing folder, or a hub id such as org/name.",
        ) from None


def _from_hub(name: str, revision: str | None, offline: bool, cache_dir: str | Path | None, with_code: bool) -> Located:
    small = [
        CONFIG_FILE,
        INDEX_FILE,
        PEFT_CONFIG_FILE,
        *TOKENIZER_FILES,
        *_TOKENIZER_SETTINGS,
        *(["*.py"] if with_code else []),
    ]
    folder = _snapshot(name, revision, small, offline, cache_dir)
    if (folder / CONFIG_FILE).is_file():
        # The index lists the shards, so only these are fetched and no other copies of the weights.
        _snapshot(name, revision, sorted({WEIGHTS_FILE, *_weight_files(folder)}), offline, cache_dir)
    return Located(folder, folder.name)


def _snapshot(
    name: str, revision: str | None, patterns: list[str], offline: bool, cache_dir: str | Path | None
) -> Path:
    request = Request(name, revision, HostNotFoundError, "model", "pass a local folder")
    with hub_errors(request, cache_dir):
        return snapshot_folder(
            lambda: snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                cache_dir=cache_dir,
                local_files_only=offline,
            )
        )


def _weight_files(folder: Path) -> set[str]:
    """Names of the safetensors files that the folder's index lists, or of the single file.

    A single file goes before an index, which may be left over from another checkpoint; transformers does the same.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        return {WEIGHTS_FILE}
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HostError(f"'{index}' is not an index of weight files.", "Fetch the checkpoint again.") from None
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise HostError(f"'{index}' lists entries that are not plain file names.", "Fetch the checkpoint again.")
    pickled = sorted(name for name in names if not name.endswith(_SAFETENSORS))
    if pickled:
        raise HostError(f"'{index}' lists {pickled[0]}, which is not loaded since it can run code.", _CONVERT)
    return names


def _instead(name: str, folder: Path) -> str:
    """What to pass in place of a folder that has no config.json."""
    if (folder / PEFT_CONFIG_FILE).is_file():
        try:
            base = json.loads((folder / PEFT_CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, LookupError, TypeError):
            base = "its base"
        return (
            f"It is a PEFT adapter of {base}: merge it with peft's PeftModel.from_pretrained(base, "
            "adapter).merge_and_unload().save_pretrained(folder), or pass a classifier as --teacher."
        )
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        hub_id = folder.resolve().name.removeprefix("models--").replace("--", "/")
        return f"It is the cache of a hub model: pass {hub_id}, or one of the folders in its snapshots."
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    if inner:
        return f"There is one in {', '.join(inner[:3])}: pass {Path(name) / inner[0]}."
    return "Pass a folder that `save_pretrained` wrote, or a hub id of a transformers model."


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise HostError(f"'{name}' has no {CONFIG_FILE}.", _instead(name, folder))
    if (folder / PEFT_CONFIG_FILE).is_file():
        raise HostError(
            f"'{name}' holds a model and, in {PEFT_CONFIG_FILE}, a PEFT adapter, so it is unclear which is meant.",
            "Move the adapter's files to a folder of their own, or merge it into the model first.",
        )
    missing = sorted(file for file in _weight_files(folder) if not (folder / file).is_file())
    if not missing:
        return
    if any((folder / file).exists() for file in _PICKLE_FILES):
        raise HostError(
            f"'{name}' has pickled weights only, which are not loaded since they can run code.",
            _CONVERT,
        )
    raise HostError(
        f"'{name}' has no weights: {missing[0]} is missing.",
        "Only safetensors weights are loaded; convert others with save_pretrained, or fetch it again.",
    )
