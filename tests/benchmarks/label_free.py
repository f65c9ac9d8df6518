"""Tuning without labels: files of one source, tuned on targets from the transfer set alone, beside their controls.

    python tests/benchmarks/label_free.py --shared SHARED --work FOLDER --output RESULTS/label_free.json

Files are made first (`uhl pretrain`), then every run of the grid is made and written to the output at once, so that an
interrupted call goes on with the first run that is missing.  Rates and steps are the defaults of `uhl tune`, which were
chosen on held-out training texts (`label_free_choices.py`); dev sets are read for scores alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uhl_cli.adapter.module import PortedAdapter, PortedReadout
from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, PretrainOptions, TuneOptions
from uhl_cli.commands.pretrain import run_pretrain
from uhl_cli.commands.scoring import references_of
from uhl_cli.commands.tune_student import DistillationData, distillation_data, trained_student, training_of
from uhl_cli.compare.distilled import labelled_texts
from uhl_cli.data import TaskData, load_task
from uhl_cli.files import write_text
from uhl_cli.host.checkpoint import load_host
from uhl_cli.metrics import paired_difference, score
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import silent
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.loop import accelerator_for

SOURCE = "minilm-l6"
TARGETS = ("minilm-l3", "wiki-256x4", "builtin:decoder", "builtin:base")
# The file that ships for the builtin task, made and used on builtin hosts alone.
BUILTIN, BUILTIN_SOURCE, BUILTIN_TARGETS = (
    "reviews",
    "builtin:base",
    ("builtin:small", "builtin:tiny", "builtin:decoder"),
)
# Name of a file: its task, and what of `uhl pretrain` is not the default.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "sst2": ("sst2", {}),
    "sst2-general": ("sst2", {"anchors": "general"}),
    "conll2003": ("conll2003", {"max_steps": 1500}),
    "amazon": ("amazon", {"max_steps": 1500}),
    BUILTIN: ("reviews", {"epochs": 6.0}),
}
CURVE = (100, 500, 1500)


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    :param kind: `zero-shot`, `delta-theta`, `lora` or `readout` (refitted alone).
    :param distillation: `transfer`, `shuffled` (outputs of other texts), or `labels` (the same texts, true labels).
    :param start: `ported`, or `fresh`: a readout of random numbers in place of the ported one.
    :param steps: None for the default.
    """

    file: str
    target: str
    kind: str
    seed: int = 0
    distillation: str = "transfer"
    start: str = "ported"
    steps: int | None = None


def grid(targets: tuple[str, ...]) -> Iterator[Run]:
    """All runs, the table's first."""
    for target in targets:
        for file in FILES:
            if file != BUILTIN:
                yield Run(file, target, "zero-shot")
    for target in targets:
        seeds = (0,) if target in TARGETS[2:] else (0, 1, 2)
        for kind in ("lora", "delta-theta"):
            for seed in seeds:
                yield Run("sst2", target, kind, seed)
        for file in ("sst2-general", "amazon", "conll2003"):
            yield Run(file, target, "lora")
    for target in (name for name in TARGETS[:2] if name in targets):
        yield Run("sst2", target, "readout")
        for distillation in ("shuffled", "labels"):
            yield Run("sst2", target, "lora", distillation=distillation)
        for steps in CURVE:
            for start in ("ported", "fresh"):
                if (start, steps) != ("ported", CURVE[-1]):  # the default, above
                    yield Run("sst2", target, "lora", start=start, steps=steps)
        yield Run("sst2", target, "lora", steps=3000)
    for target in BUILTIN_TARGETS:
        for kind in ("zero-shot", "lora", "delta-theta"):
            yield Run(BUILTIN, target, kind)


class Bench:
    """The files, data sets and aligned hosts that the runs share."""

    def __init__(self, shared: Path, work: Path, hosts: dict[str, str], device: str = "cpu") -> None:
        self._shared, self._work, self._hosts = shared, work, hosts
        self.device = device
        self._data: dict[str, TaskData] = {}
        self._aligned: tuple[tuple[str, str], AlignedHost] | None = None
        self._adapters: dict[str, UniversalAdapter] = {}

    def path(self, host: str) -> str:
        """A host's name or folder."""
        if host in self._hosts:
            return self._hosts[host]
        return host if host.startswith("builtin:") else str(self._shared / "hosts" / host)

    def file(self, name: str) -> Path:
        """The adapter file, made if it is not there."""
        path = self._work / f"{name}.safetensors"
        if not path.exists():
            task, changed = FILES[name]
            training = TrainingConfig(
                max_steps=changed.get("max_steps"), epochs=changed.get("epochs", 3.0), mixed_precision="bf16"
            )
            source = BUILTIN_SOURCE if name == BUILTIN else SOURCE
            options = PretrainOptions(
                host=HostOptions(name=self.path(source), device=self.device),
                data=DataOptions(task=task, data=self._place(task)),
                output=path,
                anchors=changed.get("anchors"),
                training=training,
                licence="MIT",
                resume=True,
            )
            report = run_pretrain(options)
            write_text(path.with_suffix(".json"), report.model_dump_json(indent=1) + "\n")
        return path

    def adapter(self, name: str) -> UniversalAdapter:
        """The loaded file."""
        if name not in self._adapters:
            self._adapters[name] = UniversalAdapter.load(self.file(name))
        return self._adapters[name]

    def data(self, task: str) -> TaskData:
        """The task's data; training examples are for the control with labels alone."""
        if task not in self._data:
            self._data[task] = load_task(task, data=self._place(task), offline=True)
        return self._data[task]

    def _place(self, task: str) -> str | None:
        return None if task == "reviews" else str(self._shared / "data" / task)

    def aligned(self, file: str, target: str) -> AlignedHost:
        """The target aligned to the file; the last one is kept."""
        if self._aligned is None or self._aligned[0] != (file, target):
            host = load_host(self.path(target), device=self.device)
            self._aligned = ((file, target), self.adapter(file).align(host))
        return self._aligned[1]

    def made(self, run: Run) -> dict[str, Any]:
        """The run's row."""
        adapter, started = self.adapter(run.file), time.monotonic()
        aligned = self.aligned(run.file, run.target)
        zero_shot = adapter.port(aligned)
        data = self.data(adapter.manifest.task.name)
        models = {"zero_shot": zero_shot}
        row: dict[str, Any] = {"align_seconds": round(time.monotonic() - started, 1)}
        if run.kind == "zero-shot":
            calibration = adapter.calibration(aligned)
            start = adapter.start(aligned)
            models["updates_off"] = zero_shot.with_adapter(start)
            if calibration is not None:
                row |= {"strength": calibration.strength, "cross_entropy": calibration.cross_entropy}
        else:
            tuned, more = self._tuned(run, adapter, aligned, zero_shot, data)
            models, row = models | {"tuned": tuned}, row | more
        return row | _scores(adapter, models, data) | {"peak_megabytes": _peak()}

    def _tuned(
        self, run: Run, adapter: UniversalAdapter, aligned: AlignedHost, zero_shot: PortedModel, data: TaskData
    ) -> tuple[PortedModel, dict[str, Any]]:
        options = TuneOptions(
            adapter=self.file(run.file),
            target=HostOptions(name=self.path(run.target), device=self.device),
            parameters="delta-theta" if run.kind == "delta-theta" else "lora",
            training={"max_steps": run.steps, "seed": run.seed, "mixed_precision": "bf16"},
        )
        config = training_of(adapter, options)
        distillation = self._distillation(run, adapter, data)
        started = time.monotonic()
        student = trained_student(
            adapter,
            aligned,
            distillation,
            config,
            options,
            accelerator=accelerator_for(self.device, "bf16"),
            files=None,
            reporter=silent,
            start=_fresh(adapter.start(aligned), aligned, run.seed) if run.start == "fresh" else None,
            inner=run.kind != "readout",
        )
        tuned = zero_shot.with_adapter(student.finished(aligned.host))
        lora = tuned.adapter.lora
        assert lora is not None  # a student has one
        row = {
            "train_examples": len(distillation.examples),
            "taken_steps": config.max_steps,
            "learning_rate": config.learning_rate,
            "readout_learning_rate": config.readout_learning_rate,
            "seconds": round(time.monotonic() - started, 1),
            "lora_bytes": 2 * sum(value.numel() for value in lora.buffers()) if run.kind == "lora" else 0,
            "readout_bytes": 0
            if run.kind == "delta-theta"
            else sum(value.nbytes for value in tuned.adapter.readout.buffers()),
        }
        if distillation.held is not None:
            task, references = adapter.manifest.task, references_of(distillation.held)
            classes = tuned.classes_of(distillation.held).for_metric(task.kind)
            row["agreement"] = score(task.metric, classes, references, task.labels).value
        return tuned, row

    def _distillation(self, run: Run, adapter: UniversalAdapter, data: TaskData) -> DistillationData:
        distillation = distillation_data(adapter.transfer_set())
        if run.distillation == "labels":
            assert data.train is not None
            return replace(distillation, examples=labelled_texts(distillation.examples, data.train), targets=None)
        if run.distillation == "shuffled":
            order = np.random.default_rng(run.seed).permutation(len(distillation.examples)).tolist()
            targets = distillation.targets
            assert targets is not None  # a transfer set has some
            return replace(distillation, targets=lambda rows: targets([order[row] for row in rows]))
        return distillation


def _fresh(start: PortedAdapter, aligned: AlignedHost, seed: int) -> PortedAdapter:
    """The same structure with a readout of random numbers on all depths, of the size that keeps features near one."""
    generator = torch.Generator().manual_seed(seed)
    host, own = aligned.host, start.readout
    size, depths = len(own.bias), range(host.num_hidden_layers + 1)
    scale = (host.hidden_size * len(depths)) ** -0.5
    depth_weights = {depth: scale * torch.randn(size, host.hidden_size, generator=generator) for depth in depths}
    out = torch.randn(own.out_weight.shape, generator=generator) * size**-0.5
    pool = None if own.pool is None else torch.zeros(size)
    readout = PortedReadout(depth_weights, torch.zeros(size), None, pool, out, torch.zeros(len(own.out_bias)))
    return PortedAdapter(start.threshold, {}, readout)


def _scores(adapter: UniversalAdapter, models: dict[str, PortedModel], data: TaskData) -> dict[str, Any]:
    task, evaluation = adapter.manifest.task, data.evaluation
    assert evaluation is not None
    references = references_of(evaluation)
    classes = {name: model.classes_of(evaluation).for_metric(task.kind) for name, model in models.items()}
    rows = {name: score(task.metric, found, references, task.labels).model_dump() for name, found in classes.items()}
    last, first = list(classes.values())[-1], classes["zero_shot"]
    pair = (first, last) if "updates_off" in models else (last, first)
    gain = paired_difference(task.metric, pair[0], pair[1], references, task.labels)
    name = "zero_shot_minus_updates_off" if "updates_off" in models else "tuned_minus_zero_shot"
    row: dict[str, Any] = {"scores": rows, name: gain.model_dump()}
    if task.kind == "sequence":  # for differences of several seeds' means
        row["right"] = {name: _digits(found, references) for name, found in classes.items()}
    return row


def _digits(found: Sequence[object], references: Sequence[object]) -> str:
    """1 for an example whose class is right, else 0."""
    return "".join("1" if one == other else "0" for one, other in zip(found, references, strict=True))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the adapter files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--files", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--at", nargs="*", default=[], metavar="NAME=FOLDER", help="where further targets lie")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; one output takes rows of one device only")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    hosts = dict(entry.split("=", 1) for entry in arguments.at)
    bench = Bench(arguments.shared, arguments.work, hosts, arguments.device)
    rows = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else []
    done = [{name: row[name] for name in asdict(Run("", "", ""))} for row in rows]
    for run in grid(tuple(arguments.targets)):
        if run.file not in arguments.files or asdict(run) in done:
            continue
        row = asdict(run) | bench.made(run) | {"device": arguments.device}
        rows.append(row)
        write_text(arguments.output, json.dumps(rows, indent=1) + "\n")
        found = {name: round(each["value"], 4) for name, each in row["scores"].items()}
        print(json.dumps(asdict(run)), found, row.get("seconds", ""), flush=True)


if __name__ == "__main__":
    main()
