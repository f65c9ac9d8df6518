"""Resources that runs share: data sets, bare hosts, adapters and alignments, loaded or made once.

Runs are ordered by data set and host, so only the last host is kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, PretrainOptions
from uhl_cli.commands.pretrain import run_pretrain
from uhl_cli.commands.scoring import load
from uhl_cli.compare.config import ADAPTERS, RunConfig
from uhl_cli.compare.sections import DatasetSection
from uhl_cli.data import TaskData, load_task
from uhl_cli.errors import DataError, FingerprintError, UsageError
from uhl_cli.host.checkpoint import Host, device_of
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.reports import Reporter, phase
from uhl_cli.transfer.texts import Floats, TransferTexts

# The byte limit covers an adapter and the task file that tuning adds (2.6 kB for the adapter's own task).
TASK_FILE_BYTES = 4096


@dataclass(frozen=True)
class AlignedFile:
    """An adapter with its alignment to a host."""

    adapter: UniversalAdapter
    path: Path
    aligned: AlignedHost

    @property
    def host(self) -> Host:
        """The host that the adapter is aligned to."""
        return self.aligned.host


class Resources:
    """Loads and caches resources; writes only below `results`.

    :param places: Locations of hosts and data sets by name.
    :param offline: Use only local or cached files.
    """

    def __init__(
        self, results: Path, places: dict[str, str], *, device: str, offline: bool, reporter: Reporter
    ) -> None:
        self.results = results
        self.device = device
        self.reporter = reporter
        self._places = places
        self._offline = offline
        self._data: dict[str, TaskData] = {}
        self._host: tuple[HostOptions, Host] | None = None
        self._adapters: dict[Path, UniversalAdapter] = {}
        self._aligned_file: tuple[tuple[str, HostOptions, float], AlignedFile] | None = None
        self._outputs: dict[tuple[str, str, int, float], Floats] = {}

    @property
    def device_name(self) -> str:
        """The device of the runs: a GPU's name, or the kind of device."""
        device = device_of(self.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def host_options(self, host: HostOptions) -> HostOptions:
        """The options with this experiment's location, device and offline setting."""
        place = self._places.get(host.name, host.name)
        return host.model_copy(update={"name": place, "device": self.device, "offline": host.offline or self._offline})

    def fresh_host(self, host: HostOptions) -> Host:
        """A copy of the host, for a run that changes it."""
        return self.bare_host(host).copied()

    def bare_host(self, host: HostOptions) -> Host:
        """The shared host, which no run changes."""
        if self._host is None or self._host[0] != host:
            self._host = self._aligned_file = None  # freed before the next is loaded
            self._host = (host, load(self.host_options(host)))
        return self._host[1]

    def data(self, dataset: DatasetSection) -> TaskData:
        """A data set with both parts; the examples that a limit selects do not depend on a run's seed.

        :raises DataError: When one of them is missing.
        """
        key = dataset.model_dump_json()
        if key not in self._data:
            flags = self.data_options(dataset).model_dump(exclude={"task"})
            found = load_task(dataset.task, offline=self._offline, seed=0, **flags)
            if not found.train or not found.evaluation:
                raise DataError(f"{dataset.task} lacks training or evaluation examples.", "Check the dataset section.")
            self._data[key] = found
        return self._data[key]

    def data_options(self, dataset: DatasetSection) -> DataOptions:
        """The data set's options, with its location."""
        flags = dataset.model_dump()
        if dataset.data is None and dataset.task in self._places:
            flags["data"] = self._places[dataset.task]
        return DataOptions(**flags)

    def aligned_file(self, run: RunConfig) -> AlignedFile:
        """The run's adapter, aligned to its host.

        :raises UsageError: When the run has no adapter section.
        :raises UhlError: As pretraining, reading and aligning do.
        """
        host = self.bare_host(run.host)
        adapter, path = self.adapter(run)
        key = (adapter.digest, run.host, run.budget.max_flops)
        if self._aligned_file is None or self._aligned_file[0] != key:
            self._aligned_file = None
            aligned = adapter.align(host, max_flops=run.budget.max_flops)
            self._aligned_file = (key, AlignedFile(adapter, path, aligned))
        return self._aligned_file[1]

    def adapter(self, run: RunConfig) -> tuple[UniversalAdapter, Path]:
        """The run's adapter and its file, which is pretrained first if missing.

        :raises UsageError: When the run has no adapter section.
        :raises UhlError: As pretraining and reading do.
        """
        path = self._adapter_file(run)
        if path not in self._adapters:
            self._adapters[path] = UniversalAdapter.load(path)
        return self._adapters[path], path

    def adapter_path(self, run: RunConfig) -> Path:
        """Path of the run's adapter, which may not be pretrained yet: one for each source, pretraining task and seed.

        :raises UsageError: When the run has no adapter section.
        """
        section = run.adapter
        if section is None:
            raise UsageError(f"run {run.run_id} has no adapter.", "Give it an adapter section.")
        if section.file is not None:
            return section.file
        assert section.source is not None
        task = _slug(run.pretraining_data.task)
        seed = run.seed if section.seed is None else section.seed
        name = f"{_slug(section.source.name)}--{task}--s{seed}--{_key(run)}.safetensors"
        return self.results / ADAPTERS / name

    def source_outputs(self, run: RunConfig, texts: TransferTexts) -> Floats:
        """Logits float32 [predictions, labels] of the adapter's source, with the adapter on it; computed once.

        The source is the adapter section's, else the one that the file names.

        :raises UhlError: As loading and porting do.
        :raises FingerprintError: When it is not the checkpoint that the adapter was pretrained on.
        """
        adapter, path = self.adapter(run)
        key = (adapter.digest, texts.digest, run.training.max_length, run.budget.max_flops)
        if key not in self._outputs:
            assert run.adapter is not None  # otherwise there is no adapter
            named = adapter.manifest.source
            section = run.adapter.source or HostOptions(name=named.name, revision=named.revision)
            source = load(self.host_options(section))
            if source.fingerprint != named.fingerprint:
                raise FingerprintError(
                    f"{source.name} is not the source that {path} was made from.",
                    f"Give the location of {named.name} with --at {named.name}=PATH.",
                )
            ported = adapter.port(source, max_flops=run.budget.max_flops)
            logits = ported.logits_of(
                texts.examples(),
                batch_size=run.evaluation.batch_size,
                max_length=min(run.training.max_length, source.max_length),
                progress=phase(self.reporter, "the source's outputs"),
            )
            self._outputs[key] = torch.cat(logits).numpy()
        return self._outputs[key]

    def _adapter_file(self, run: RunConfig) -> Path:
        """The file, pretrained first if missing; an interrupted training continues."""
        output, section = self.adapter_path(run), run.adapter
        assert section is not None
        if section.file is not None or output.exists():
            return output
        assert section.source is not None
        training = section.pretraining.model_copy(update={"seed": run.seed if section.seed is None else section.seed})
        options = PretrainOptions(
            host=self.host_options(section.source),
            data=self.data_options(run.pretraining_data),
            anchors=section.anchors,
            num_anchors=section.num_anchors,
            feature_words=section.feature_words,
            transfer_set=section.transfer_set or "auto",
            training=training,
            max_bytes=max(1, run.budget.max_bytes - TASK_FILE_BYTES),
            max_flops=run.budget.max_flops,
            evaluation_batch_size=run.evaluation.batch_size,
            output=output,
            resume=True,
        )
        run_pretrain(options, self.reporter)
        return output


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in Path(name).name)


def _key(run: RunConfig) -> str:
    """An eight-digit hash of everything that affects an adapter's content."""
    assert run.adapter is not None
    how = run.adapter.model_dump_json(exclude={"task", "dataset", "seed", "label"})
    text = how + run.pretraining_data.model_dump_json() + run.budget.model_dump_json()
    return hashlib.sha256(text.encode()).hexdigest()[:8]
