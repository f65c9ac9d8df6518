"""The options of `uhl compare`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from uhl_cli.commands.flags import Options

Mode = Literal["trial", "full"]
Tracker = Literal["none", "tensorboard", "wandb"]


class CompareOptions(Options):
    """All of `uhl compare`; without a method, host, task or seed, all are run."""

    option_names: ClassVar = {
        "configs": "config",
        "places": "at",
        "methods": "method",
        "hosts": "host",
        "tasks": "task",
        "seeds": "seed",
        "list_runs": "list",
    }

    configs: tuple[str, ...] = Field(
        min_length=1,
        description="YAML file of one run or of a grid, or a shipped one, such as local or published. May be repeated",
    )
    results_dir: Path = Field(Path("results"), description="folder of all results")
    mode: Mode = Field(
        "full", description="how much of each run is done; trial runs two steps, as a check that everything works"
    )
    places: dict[str, str] = Field(
        default_factory=dict, description="location of that host or data set. May be repeated"
    )
    methods: tuple[str, ...] = Field((), description="only this method. May be repeated")
    hosts: tuple[str, ...] = Field((), description="only this host. May be repeated")
    tasks: tuple[str, ...] = Field((), description="only this data set. May be repeated")
    seeds: tuple[int, ...] = Field((), description="only this seed. May be repeated")
    list_runs: bool = Field(False, description="print the names of the runs and stop")
    device: str = Field("auto", description="device: cpu, cuda, cuda:1, mps, or auto for the best available")
    offline: bool = Field(False, description="use only local or cached files")
    resume: bool = Field(False, description="skip finished runs and do the others")
    overwrite: bool = Field(False, description="replace existing output")
    compare_only: bool = Field(False, description="do no run; compare the finished ones")
    time_only: bool = Field(False, description="do no run; measure the wall-clock time of the finished ones again")
    figures: bool = Field(True, description="draw figures (needs matplotlib)")
    report_to: Tracker | None = Field(
        None, description="also report runs to a tracker, in full mode; by default as each configuration says"
    )
