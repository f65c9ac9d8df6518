"""The proposal's own projectors: h_psi makes P_in and P_out themselves, from the size of a model and nothing else.

In the rest of the package h_psi makes gains, and ridge fits make the projectors (docs/method.md, "Alignment").  Here
nothing is fitted to a host: the projectors are trained on the source, together with the canonical adapter, and a target
gets those that h_psi makes for its size.  It is a control, which shows why the package departs from the proposal.

h_psi has one input, log10 of the number of parameters, and gives every entry of both matrices for the source's width.
A narrower host takes the entries of its coordinates, and the further coordinates of a wider one are neither read nor
written.  So the projectors are defined for every width, no entry is used that was never trained, and on the source they
are as free as any matrices.  An MLP with a coordinate's index as a second input would be defined for every width too,
but would see more than the size, and its few units would bound the projectors' rank on the source.

The readout is the adapter's own, on z at the knots.  Its maps on a target are the generated ones: it needs no label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.adapter.fold import fold
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.align.alignment import Alignment, LayerMaps, single_depth_weights
from uhl_cli.codes.layout import bits_of
from uhl_cli.codes.quantise import codes_and_scales, dequantise, fake_quantise
from uhl_cli.commands.outputs import claimed_run
from uhl_cli.commands.scoring import host_record, references_of
from uhl_cli.compare.config import PROJECTORS, RunConfig
from uhl_cli.compare.costs import ported_costs
from uhl_cli.compare.outcome import Outcome, evaluation_of, refuse_other_labels, train_of
from uhl_cli.compare.resources import Resources
from uhl_cli.cost.flops import count_flops
from uhl_cli.cost.plan import plan_for
from uhl_cli.data import TaskData
from uhl_cli.data.tasks import Task
from uhl_cli.errors import FormatError
from uhl_cli.formats import container
from uhl_cli.formats.checkpoint import run_digest
from uhl_cli.formats.container import Kind, Problems
from uhl_cli.host.checkpoint import Host
from uhl_cli.metrics import Score, score
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import phase
from uhl_cli.schema import AdapterConfig, Frozen, HostRecord, TrainingConfig
from uhl_cli.train.loop import StepReport, accelerator_for, optimizer_for, run_steps, total_steps
from uhl_cli.train.model import TrainedModel
from uhl_cli.train.run_files import RunFiles

# The input is centred on models of some 30 million parameters, so that one hidden layer resolves it.
LOG_SIZE = 7.5
_BITS = 8
_KEPT = Kind(
    "uhl-size-projectors",
    "file of projectors",
    "1.0",
    1_000_000_000,
    "Remove it: `uhl compare --resume` trains it again.",
)


class KeptRecord(Frozen):
    """Header of a kept file.

    :param steps: Optimiser steps of its training.
    :param score: On the evaluation data, on the source itself.
    """

    format_version: str = _KEPT.version
    config: AdapterConfig
    task: Task
    source: HostRecord
    training: TrainingConfig
    steps: int
    train_examples: int
    score: Score | None = None


class SizeProjectors(nn.Module):
    """h_psi: one hidden SiLU layer from log10 of a model's number of parameters to the entries of P_in and P_out.

    :param width: Width of the source, for which entries are made.
    :param canonical: d0.
    :param hidden: Hidden units.
    """

    def __init__(self, width: int, canonical: int, hidden: int, *, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.in_weight = nn.Parameter(torch.randn(hidden, 1, generator=draw))
        self.in_bias = nn.Parameter(torch.zeros(hidden))
        # At the start every size gets the same random projectors.
        self.out_weight = nn.Parameter(torch.zeros(hidden, 2, width, canonical))
        self.out_bias = nn.Parameter(torch.randn(2, width, canonical, generator=draw) / math.sqrt(canonical))

    def stored(self) -> dict[str, Tensor]:
        """Every parameter in 8 bits, one scale for each row, differentiable by straight-through."""
        return {name: fake_quantise(value, _BITS) for name, value in self.named_parameters()}

    def forward(self, parameters: int, width: int) -> tuple[Tensor, Tensor]:
        """P_in [d0, width] and P_out [width, d0] of a host; equal arguments give equal projectors.

        :param parameters: The host's number of parameters.
        """
        return generated(self.stored(), parameters, width)


def generated(stored: dict[str, Tensor], parameters: int, width: int) -> tuple[Tensor, Tensor]:
    """`SizeProjectors.forward` of its stored parameters."""
    size = math.log10(parameters) - LOG_SIZE
    hidden = functional.silu(stored["in_weight"][:, 0] * size + stored["in_bias"])
    entries = torch.einsum("h,hpwc->pwc", hidden, stored["out_weight"]) + stored["out_bias"]
    missing = width - entries.shape[1]
    read, write = functional.pad(entries, (0, 0, 0, missing)) if missing > 0 else entries[:, :width]
    return read.T, write


def size_alignment(stored: dict[str, Tensor], host: Host, config: AdapterConfig) -> Alignment:
    """The alignment of a host by generated projectors, the same at every depth, with gradients.

    :param stored: Of `SizeProjectors`.
    """
    read, write = generated(stored, host.fingerprint.parameters, host.hidden_size)
    depth = host.num_hidden_layers
    mean = read.new_zeros(host.hidden_size)
    layers = tuple(LayerMaps(index / depth, mean, read, write, write, write) for index in range(depth + 1))
    weights, bias = single_depth_weights(layers, config.knots)
    return Alignment("size", host.hidden_size, layers, weights, bias, (), ())


class SizeAdapter(nn.Module):
    """What is trained: a canonical adapter, and the projectors.  The adapter's own gains stay at one."""

    def __init__(self, config: AdapterConfig, width: int, *, seed: int = 0) -> None:
        super().__init__()
        self.adapter = CanonicalAdapter(config, seed=seed)
        for name, parameter in self.adapter.named_parameters():
            if name.startswith("size_"):
                parameter.requires_grad_(False)
        self.projectors = SizeProjectors(width, config.canonical_size, config.size_hidden_size, seed=seed)

    def bits(self) -> dict[str, int]:
        """Stored bits of every parameter."""
        prefix = "adapter."
        return {
            name: bits_of(name.removeprefix(prefix)) if name.startswith(prefix) else _BITS
            for name, _ in self.named_parameters()
        }

    def optimizer(self, config: TrainingConfig) -> torch.optim.AdamW:
        """AdamW; the projectors have the readout's rate, and decay as matrices do."""
        optimizer = optimizer_for(self.adapter, config)
        rate = config.readout_learning_rate
        for matrices in (True, False):
            chosen = [value for value in self.projectors.parameters() if (value.dim() > 1) == matrices]
            decay = config.weight_decay if matrices else 0.0
            optimizer.add_param_group({"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": decay})
        return optimizer


class _SizeModel(TrainedModel):
    """A frozen host with the adapter, whose projectors are generated again at every step."""

    def __init__(self, trained: SizeAdapter, aligned: AlignedHost, config: TrainingConfig) -> None:
        super().__init__(trained.adapter, aligned, config)
        self.projectors = trained.projectors
        self._shape = trained.adapter.config

    def _folded(self, updated: bool) -> PortedAdapter:
        host, plan = self._aligned.host, self._aligned.plan
        alignment = size_alignment(self.projectors.stored(), host, self._shape)
        stored = self.adapter.stored()
        return fold(stored, alignment, host.map, layers=plan.layers, types=plan.types, updates=updated)


@dataclass(frozen=True)
class Kept:
    """A trained adapter with its projectors: values as stored, by name as in `SizeAdapter`.

    :param file_bytes: Bytes of its file.
    """

    record: KeptRecord
    values: dict[str, Tensor]
    file_bytes: int

    def part(self, name: str) -> dict[str, Tensor]:
        """The values of the `adapter`, or of the `projectors`."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}

    def port(self, host: Host, *, max_flops: float) -> PortedModel:
        """The adapter on a host, by the projectors of its size: nothing is fitted, no text is read.

        :raises BudgetError: When even the readout exceeds the limit.
        """
        record = self.record
        plan = plan_for(host, record.config, count_flops(host, None), max_flops)
        alignment = size_alignment(self.part("projectors"), host, record.config)
        folded = fold(self.part("adapter"), alignment, host.map, layers=plan.layers, types=plan.types)
        folded = folded.for_inference(host.device, host.map.embeddings.weight.dtype)
        return PortedModel(host, folded, record.task, strategy="size", plan=plan, max_length=record.training.max_length)


def projectors_path(run: RunConfig, resources: Resources) -> Path:
    """Where the run's trained adapter is kept: once for each source, data set and seed, whatever the target."""
    return resources.results / PROJECTORS / resources.adapter_path(run).name


def kept(run: RunConfig, resources: Resources) -> Kept:
    """The run's trained adapter, trained first if it is not kept; an interrupted training continues.

    :raises UhlError: As loading, training and reading do.
    """
    path = projectors_path(run, resources)
    if not path.exists():
        with claimed_run(path, resume=True, overwrite=False) as files:
            _train(run, resources, path, files)
    return read_kept(path)


def on_target(run: RunConfig, resources: Resources, trained: Kept) -> PortedModel:
    """The run's target with the projectors of its size."""
    return trained.port(resources.bare_host(run.host), max_flops=run.budget.max_flops)


def by_size_alone(run: RunConfig, resources: Resources, data: TaskData) -> Outcome:
    """Do a run of this kind.

    :raises UsageError: When the pretraining's data has other labels.
    :raises UhlError: As loading, training and reading do.
    """
    trained = kept(run, resources)
    refuse_other_labels(run, trained.record.task, data)
    ported = on_target(run, resources, trained)
    found = ported.classes_of(
        evaluation_of(data),
        batch_size=run.evaluation.batch_size,
        progress=phase(resources.reporter, f"scoring: {run.method}"),
    )
    costs = ported_costs(
        ported, ported.host, run.evaluation, file_bytes=trained.file_bytes, atoms=found.atoms_per_token
    )
    predictions = found.for_metric(data.task.kind)
    return Outcome(predictions, costs, source=trained.record.source.name, source_score=trained.record.score)


def _train(run: RunConfig, resources: Resources, path: Path, files: RunFiles) -> None:
    """Train adapter and projectors together on the source, and write the file."""
    section = run.adapter
    assert section is not None  # the configuration has checked both
    assert section.source is not None
    training = section.pretraining.model_copy(update={"seed": run.seed if section.seed is None else section.seed})
    data, host = resources.data(run.pretraining_data), resources.bare_host(section.source)
    examples, evaluation = train_of(data), evaluation_of(data)
    config = AdapterConfig(num_labels=len(data.task.labels), kind=data.task.kind)
    accelerator = accelerator_for(resources.device, training.mixed_precision)
    trained = SizeAdapter(config, host.hidden_size, seed=training.seed).to(accelerator.device)
    host_flops = count_flops(host, None)
    plan = plan_for(host, config, host_flops, run.budget.max_flops)
    start = size_alignment(trained.projectors.stored(), host, config)
    aligned = AlignedHost(host, "", start, plan, host_flops)
    identity: dict[str, object] = {
        "training": training.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "host": host.fingerprint.model_dump(mode="json"),
        "train_digest": examples.digest(),
        "plan": [plan.types, plan.layers],
    }

    def on_step(report: StepReport) -> None:
        note = f"loss {report.loss:.3f}  accuracy {report.accuracy:.3f}  atoms/token {report.atoms:.2f}"
        resources.reporter(f"training: {run.method}", report.step, report.steps, note)

    run_steps(
        _SizeModel(trained, aligned, training),
        trained,
        trained.optimizer(training),
        host,
        examples,
        training,
        accelerator=accelerator,
        files=files,
        digest=run_digest(identity),
        resume=True,
        on_step=on_step,
    )
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, bits in trained.bits().items():
        codes, scales = codes_and_scales(trained.get_parameter(name).cpu(), bits)
        tensors |= {name: codes, f"{name}.scales": scales}
        values[name] = dequantise(codes, scales)
    record = KeptRecord(
        config=config,
        task=data.task,
        source=host_record(host),
        training=training,
        steps=total_steps(len(examples), training),
        train_examples=len(examples),
    )
    ported = Kept(record, values, 0).port(host, max_flops=run.budget.max_flops)
    found = ported.classes_of(
        evaluation,
        batch_size=run.evaluation.batch_size,
        progress=phase(resources.reporter, f"scoring: {run.method} on its source"),
    ).for_metric(data.task.kind)
    measured = score(data.task.metric, found, references_of(evaluation), data.task.labels)
    container.write(path, _KEPT, record.model_copy(update={"score": measured}), tensors)


def read_kept(path: Path) -> Kept:
    """Read a kept file.

    :raises FormatError: When it is missing or damaged.
    """
    problems = Problems(path, hint=_KEPT.hint)
    contents = container.read(path, _KEPT, problems=problems)
    record = container.read_record(contents, KeptRecord, problems)
    assert record is not None  # problems are raised
    shape = SizeAdapter(record.config, record.source.fingerprint.hidden_size)
    tensors = {name: tensor.torch() for name, tensor in contents.tensors.items()}
    wanted = {name: tuple(value.shape) for name, value in shape.named_parameters()}
    if {name: tuple(value.shape) for name, value in tensors.items() if not name.endswith(".scales")} != wanted:
        problems.add(FormatError("its tensors are not those of its configuration"))
    values = {name: dequantise(tensors[name], tensors[f"{name}.scales"]) for name in wanted}
    return Kept(record, values, contents.file_bytes)
