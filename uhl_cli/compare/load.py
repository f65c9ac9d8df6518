"""Configurations of runs from YAML files: one run per file, or a grid of many."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.grid import Grid
from uhl_cli.errors import UsageError

SETS = Path(__file__).parent / "sets"


def load_configs(names: list[str]) -> list[RunConfig]:
    """The runs of files, or of shipped sets by name (`local`, `published`), in that order; equal ones once.

    :raises UsageError: When one cannot be read, has an unknown key, or two runs share a name.
    """
    runs: dict[str, RunConfig] = {}
    for name in names:
        for run in _from_file(_locate(name)):
            if run.run_id in runs and runs[run.run_id].digest != run.digest:
                raise UsageError(f"two runs are called {run.run_id}.", "Give every run a run_id of its own.")
            runs.setdefault(run.run_id, run)
    if not runs:
        raise UsageError("no run is configured.", "Name a file or a set with --config.")
    return list(runs.values())


def shipped_sets() -> list[str]:
    """Names of the sets that ship."""
    return sorted(path.stem for path in SETS.glob("*.yaml"))


def _locate(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name in shipped_sets():
        return SETS / f"{name}.yaml"
    raise UsageError(f"configuration {name} not found.", f"Name a YAML file, or one of {', '.join(shipped_sets())}.")


class _DoubledKey(Exception):
    """A mapping has a key twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a doubled key, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - as in yaml
        # Here and not where mappings are made: there, a merge (<<) has already put other mappings' keys before its own.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise _DoubledKey(f"the key {key.value!r} in line {key.start_mark.line + 1} stands there twice")
            seen.add((key.tag, key.value))
        return node


def _from_file(path: Path) -> list[RunConfig]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except _DoubledKey as error:
        raise UsageError(f"{path}: {error}.", "Leave out one of the two.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}.", "It must be a YAML file.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a configuration.", "See `uhl compare --help`.")
    try:
        if set(content) == {"grid"}:
            return [RunConfig.model_validate(run) for run in Grid.model_validate(content["grid"]).runs()]
        return [RunConfig.model_validate(content)]
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(str(part) for part in first["loc"])] if part)
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{path}: {where}{said}.", "Fix the configuration.") from error


def refuse_unknown_places(runs: list[RunConfig], places: dict[str, str], sources: Iterable[str] = ()) -> None:
    """Refuse a location (`--at NAME=PATH`) for a name that no run uses.

    :param sources: Names of hosts that only adapter files name.
    :raises UsageError: When there is one.
    """
    known = {run.host.name for run in runs} | {run.dataset.task for run in runs}
    known |= {run.adapter.source.name for run in runs if run.adapter and run.adapter.source}
    known |= {run.pretraining_data.task for run in runs} | set(sources)
    odd = sorted(set(places) - known)
    if odd:
        raise UsageError(f"no run has a host or data set {odd[0]!r}.", f"They are {', '.join(sorted(known))}.")
