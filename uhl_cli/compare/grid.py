"""A grid of runs: every method on every host and data set."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, StrictInt, model_validator

from uhl_cli.compare.config import RunConfig, merged
from uhl_cli.compare.methods import METHODS
from uhl_cli.schema import Frozen


class _Seeds(Frozen):
    # A boolean is no seed, though pydantic takes it for one.
    seeds: tuple[StrictInt, ...] | dict[str, tuple[StrictInt, ...]] = (0,)

    def of(self, host: str) -> tuple[int, ...]:
        """The seeds on this host."""
        return self.seeds.get(host, self.seeds.get("default", (0,))) if isinstance(self.seeds, dict) else self.seeds


class Grid(Frozen):
    """Every method on every host and data set, without those that a data set's `methods` sets to null.

    A run's sections are merged, later ones taking precedence, from `defaults`, its data set, its method, and its data
    set's entry for this method (under `methods`).  A run's name is METHOD--HOST--DATASET--sSEED, and with an adapter
    pretrained on another task METHOD--HOST--DATASET--sSEED--from-TASK; the adapter's label is appended.  Dots are
    replaced by `dotless`.
    """

    hosts: tuple[str, ...] = Field(min_length=1)
    datasets: dict[str, dict[str, Any]] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    defaults: dict[str, Any] = Field(default_factory=dict)

    def runs(self) -> list[dict[str, Any]]:
        """The configurations, not yet validated, ordered by data set, seed and host."""
        found = []
        for task, dataset in self.datasets.items():
            sections = {name: part for name, part in dataset.items() if name not in ("seeds", "methods")}
            special = dataset.get("methods", {})
            seeds = _Seeds(seeds=dataset.get("seeds", (0,)))
            for seed in dict.fromkeys(seed for host in self.hosts for seed in seeds.of(host)):
                for host in (host for host in self.hosts if seed in seeds.of(host)):
                    for method, overrides in self.methods.items():
                        if (here := special.get(method, {})) is None:
                            continue
                        run = merged(self.defaults, sections, overrides, here)
                        parts = [method, host, task, f"s{seed}", *_of_adapter(run, method, task)]
                        place = {
                            "run_id": "--".join(_slug(part) for part in parts),
                            "method": method,
                            "host": {"name": host},
                            "dataset": {"task": task},
                            "training": {"seed": seed},
                        }
                        found.append(merged(run, place))
        return found

    @model_validator(mode="after")
    def _sections_are_used(self) -> Grid:
        """What the grid itself sets, and what is no section beside one, would be dropped silently."""
        fields = {"run_id": None, "method": None, "host": "name", "dataset": "task", "training": "seed"}
        for where, part in self._parts():
            for name, value in part.items():
                inner = fields.get(name)
                if name in fields and (inner is None or (isinstance(value, dict) and inner in value)):
                    given = name if inner is None else f"{name}.{inner}"
                    raise ValueError(f"{where}.{given} is set by the grid's hosts, datasets, methods and seeds")
                if name in RunConfig.model_fields and not isinstance(value, (dict, type(None))):
                    raise ValueError(f"{where}.{name} must be a section")
        return self

    def _parts(self) -> list[tuple[str, dict[str, Any]]]:
        """Every place that holds sections, and these."""
        parts = [("defaults", self.defaults), *((f"methods.{name}", part) for name, part in self.methods.items())]
        for task, dataset in self.datasets.items():
            where = f"datasets.{task}"
            parts.append((where, {name: part for name, part in dataset.items() if name not in ("seeds", "methods")}))
            special = dataset.get("methods", {})
            for method, part in special.items() if isinstance(special, dict) else ():
                if not isinstance(part, (dict, type(None))):
                    raise ValueError(f"{where}.methods.{method} must be sections, or null")
                parts.append((f"{where}.methods.{method}", part or {}))
        return parts

    @model_validator(mode="after")
    def _seeds_of_hosts(self) -> Grid:
        for task, dataset in self.datasets.items():
            seeds = dataset.get("seeds")
            odd = [host for host in seeds if host not in (*self.hosts, "default")] if isinstance(seeds, dict) else []
            if odd:
                raise ValueError(f"the seeds of {task} name {odd[0]!r}, which is no host of the grid")
        return self

    @model_validator(mode="after")
    def _methods_of_data_sets(self) -> Grid:
        """A misspelt method would be left as it is, or be run in spite of its null."""
        for task, dataset in self.datasets.items():
            special = dataset.get("methods", {})
            if not isinstance(special, dict):
                raise ValueError(f"the methods of {task} must be sections by method")
            odd = [method for method in special if method not in self.methods]
            if odd:
                raise ValueError(f"the methods of {task} name {odd[0]!r}, which is no method of the grid")
        return self


def _of_adapter(run: dict[str, Any], method: str, task: str) -> list[str]:
    """What the run's name says of its adapter: another task of pretraining, and its label."""
    adapter = run.get("adapter")
    if not isinstance(adapter, dict) or (method in METHODS and METHODS[method].kind == "retrained"):
        return []
    other, label = adapter.get("task"), adapter.get("label")
    return ([] if other in (None, task) else [f"from-{other}"]) + ([] if label is None else [str(label)])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-") or "x"
