"""Cache maps, so that each model is searched and proved once.

One JSON file a model, in the folder of `uhl_cli.cache`.  Its name is a digest of what the map depends on: the model's
class and configuration, the names, shapes and first values of all its parameters, and the releases of uhl, torch and
transformers.  A file is untrusted: if it does not fit the model, it is ignored, and the
model is searched again.  A cache that cannot be written is no error.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import Field, ValidationError
from torch import Tensor, nn

from uhl_cli import __version__
from uhl_cli.cache import cache_folder, mark_used, remove_least_used
from uhl_cli.errors import OutputError
from uhl_cli.files import write_text
from uhl_cli.host.hostmap import MODULE_TYPES, READER_TYPES, HostLayer, HostMap, TargetModule
from uhl_cli.schema import Frozen

# Part of the digest: another number for another way to search.
_FORMAT = 2
_FIRST_VALUES = 16
_MOST_FILES, _MOST_BYTES = 200, 20_000_000


class _Module(Frozen):
    """A target module; `columns` are runs (first, last + 1) of its output features, None for all."""

    name: str
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    columns: tuple[tuple[int, int], ...] | None
    transposed: bool
    space: str = Field(pattern="^(stream|attention|mlp)$")
    call: int = Field(ge=0)
    calls: int = Field(ge=1)
    written: str | None
    scale: float = Field(allow_inf_nan=False)
    matrix: bool


class _Layer(Frozen):
    """A layer with its target modules by type, and its other linear modules."""

    name: str
    call: int = Field(ge=0)
    calls: int = Field(ge=1)
    problem: str
    modules: dict[str, _Module]
    others: tuple[_Module, ...]


class _Map(Frozen):
    """A map without its modules."""

    hidden_size: int = Field(ge=1)
    embeddings: str
    decoder: bool
    pooler: str | None
    positions: int | None = Field(ge=1)
    layers: tuple[_Layer, ...] = Field(min_length=1, max_length=10_000)


def load_map(base: nn.Module) -> HostMap | None:
    """The map of a base model from the cache; None if there is none that fits it."""
    path = _path(base)
    try:
        if path is None or path.stat().st_size > _MOST_BYTES:
            return None
        stored = _Map.model_validate_json(path.read_bytes())
        found = _as_map(stored, base)
    except (OSError, ValidationError, AttributeError, ValueError):  # also a name that the model does not have
        return None
    mark_used(path)
    return found


def save_map(host_map: HostMap) -> None:
    """Keep a map in the cache, if that can be written."""
    path = _path(host_map.base)
    if path is None:
        return
    with suppress(OutputError, OSError):
        write_text(path, _of_map(host_map).model_dump_json())
        remove_least_used(path.parent, ".json", most_files=_MOST_FILES, most_bytes=_MOST_FILES * _MOST_BYTES)


def _path(base: nn.Module) -> Path | None:
    """The file of a base model; None without a home folder, or for a model that has no configuration of its own."""
    config, folder = getattr(base, "config", None), cache_folder("maps")
    if config is None or not hasattr(config, "to_dict") or folder is None:
        return None
    given = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    versions = (_FORMAT, __version__, torch.__version__, transformers.__version__)
    kind = (type(base).__module__, type(base).__qualname__, str(getattr(config, "_attn_implementation", "")))
    digest = hashlib.sha256(json.dumps([versions, kind, given], sort_keys=True, default=str).encode())
    for name, value in sorted(base.named_parameters()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        first = value.detach().reshape(-1)[:_FIRST_VALUES]
        digest.update(first.float().cpu().numpy().tobytes())
    return folder / f"{digest.hexdigest()}.json"


def _of_map(host_map: HostMap) -> _Map:
    names = {module: name for name, module in host_map.base.named_modules()}
    return _Map(
        hidden_size=host_map.hidden_size,
        embeddings=names[host_map.embeddings],
        decoder=host_map.decoder,
        pooler=host_map.pooler,
        positions=host_map.positions,
        layers=tuple(
            _Layer(
                name=layer.name,
                call=layer.call,
                calls=layer.calls,
                problem=layer.problem,
                modules={kind: _of_module(linear) for kind, linear in layer.target_modules.items()},
                others=tuple(map(_of_module, layer.others)),
            )
            for layer in host_map.layers
        ),
    )


def _of_module(linear: TargetModule) -> _Module:
    columns = linear.columns
    runs: list[tuple[int, int]] | None = None
    if isinstance(columns, Tensor):
        runs = []
        for index in columns.tolist():
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
    elif linear.fused:
        runs = [(columns.start, columns.stop)]
    return _Module(
        name=linear.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        columns=None if runs is None else tuple(runs),
        transposed=linear.transposed,
        space=linear.space,
        call=linear.call,
        calls=linear.calls,
        written=None if linear.written is None else linear.written[0],
        scale=linear.scale,
        matrix=linear.matrix,
    )


def _as_map(stored: _Map, base: nn.Module) -> HostMap:
    """:raises ValueError: Something does not fit the model; AttributeError: it has no module of a name."""
    embeddings: Any = base.get_submodule(stored.embeddings)
    if not isinstance(embeddings, nn.Embedding):
        raise ValueError("no embedding")
    layers = []
    for index, layer in enumerate(stored.layers):
        if not set(layer.modules) <= set(MODULE_TYPES):
            raise ValueError("unknown type")
        modules = {kind: _as_module(kind, each, base, stored.hidden_size) for kind, each in layer.modules.items()}
        others = tuple(_as_module("other", each, base, stored.hidden_size) for each in layer.others)
        module = base.get_submodule(layer.name)
        layers.append(HostLayer(index, layer.name, module, modules, layer.call, layer.calls, layer.problem, others))
    return HostMap(
        base=base,
        hidden_size=stored.hidden_size,
        layers=tuple(layers),
        embeddings=embeddings,
        decoder=stored.decoder,
        pooler=stored.pooler,
        positions=stored.positions,
    )


def _as_module(kind: str, stored: _Module, base: nn.Module, hidden_size: int) -> TargetModule:
    module = base.get_submodule(stored.name)
    columns: slice | Tensor = slice(0, stored.out_features)
    if stored.matrix:
        weight = module.get_parameter("weight")
        total, inputs = reversed(weight.shape) if stored.transposed else weight.shape
        runs = ((0, total),) if stored.columns is None else stored.columns
        sizes = [stop - start for start, stop in runs]
        inside = all(0 <= start < stop <= total for start, stop in runs)
        if not inside or sum(sizes) != stored.out_features or inputs != stored.in_features:
            raise ValueError("other shapes")
        columns = slice(*runs[0])
        if len(runs) > 1:
            indices = [index for start, stop in runs for index in range(start, stop)]
            columns = torch.tensor(indices, device=weight.device)
    stream = stored.in_features if kind in READER_TYPES else stored.out_features
    if kind != "other" and stream != hidden_size:
        raise ValueError("not of the stream's width")
    return TargetModule(
        type=kind,
        name=stored.name,
        module=module,
        in_features=stored.in_features,
        out_features=stored.out_features,
        columns=columns,
        transposed=stored.transposed,
        space=stored.space,
        call=stored.call,
        calls=stored.calls,
        written=None if stored.written is None else (stored.written, base.get_submodule(stored.written)),
        scale=stored.scale,
        matrix=stored.matrix,
    )
