"""Report what uhl finds in a model: its layers and their modules by role, proved by running the model."""

from __future__ import annotations

import time

import torch
from torch import nn

from uhl_cli.commands.options import HostsOptions
from uhl_cli.host.checkpoint import load_host
from uhl_cli.host.hostmap import HostLayer, HostMap, TargetModule
from uhl_cli.reports import HostReport, LayerReport, ModuleReport, Reporter


def run_hosts(options: HostsOptions, reporter: Reporter) -> HostReport:
    """Load a host and describe its map.

    :raises HostError: It cannot be loaded, or is no host; the message says which fact does not hold.
    """
    reporter("loading", 0, None)
    start = time.perf_counter()
    host = load_host(
        options.name,
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        offline=options.offline,
        trust_remote_code=options.trust_remote_code,
    )
    return HostReport(
        host=host.name,
        fingerprint=host.fingerprint,
        degree=host.map.degree,
        decoder=host.decoder,
        max_length=host.max_length,
        embeddings=_name_of(host.map),
        pooler=host.map.pooler,
        layers=tuple(map(_layer, host.map.layers)),
        seconds=time.perf_counter() - start,
    )


def _name_of(host_map: HostMap) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in host_map.base.named_modules()}
    return names[host_map.embeddings]


def _layer(layer: HostLayer) -> LayerReport:
    modules = {kind: _module(linear) for kind, linear in layer.target_modules.items()}
    return LayerReport(
        index=layer.index,
        name=layer.name,
        call=layer.call if layer.calls > 1 else None,
        modules=modules,
        others=tuple(linear.name for linear in layer.others),
        problem=layer.problem,
    )


def _module(linear: TargetModule) -> ModuleReport:
    features = None
    if linear.fused:
        columns = linear.columns if isinstance(linear.columns, slice) else linear.columns.cpu()
        features = _ranges(torch.arange(linear.module_features)[columns].tolist())
    return ModuleReport(
        name=linear.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        features=features,
        space=linear.space,
        added_by=None if linear.written is None else linear.written[0],
        scale=linear.scale,
        experts=not linear.matrix,
    )


def _ranges(indices: list[int]) -> str:
    """Consecutive runs as first-last, such as 0-15, 48-63."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
