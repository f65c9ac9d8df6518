"""What is settled before pretraining's first step: anchors, canonical space, alignments, and the FLOP plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uhl_cli.adapter.flops import SEQUENCE_LENGTH, count_flops
from uhl_cli.adapter.plan import PortPlan, full_plan, make_plan
from uhl_cli.align.alignment import Alignment
from uhl_cli.align.bank import AnchorBank, build_bank
from uhl_cli.align.states import word_states
from uhl_cli.align.texts import (
    AnchorTexts,
    choose_anchors,
    choose_feature_texts,
    general_texts,
    in_style_of,
    read_texts,
)
from uhl_cli.align.views import width_views
from uhl_cli.api import align
from uhl_cli.builtin.corpus import opinions
from uhl_cli.data import TaskData, load_task
from uhl_cli.host.checkpoint import Host
from uhl_cli.pipeline.options import PretrainOptions
from uhl_cli.reports import Reporter, phase
from uhl_cli.train.model import TrainingHost


@dataclass(frozen=True)
class Prepared:
    """What training needs: the bank, and the hosts with their alignments, the source first."""

    bank: AnchorBank
    hosts: list[TrainingHost]
    host_flops: int

    @property
    def own(self) -> Alignment:
        """The source's own alignment."""
        return self.hosts[0].views[0]

    @property
    def plan(self) -> PortPlan:
        """The parts that the source carries."""
        return self.hosts[0].plan


def prepare(
    host: Host, data: TaskData, options: PretrainOptions, reporter: Reporter, companions: Sequence[Host] = ()
) -> Prepared:
    """Choose anchors, define canonical space by the host, align the host to it, and imitate other widths.

    :raises BudgetError: When the FLOP limit leaves nothing.
    :raises AlignmentError: When there are too few anchors or the host's states are degenerate.
    """
    config = options.adapter
    host_flops = count_flops(host, None)
    tokens = min(SEQUENCE_LENGTH, host.max_length)
    plan = make_plan(host.map, config, host_flops_per_token=host_flops / tokens, max_flops_percent=options.max_flops)
    anchors = _anchors(data, options)
    states = word_states(host, anchors, progress=phase(reporter, "anchors"))
    if not bool(states.present.all()):  # texts longer than the host takes
        anchors, states = anchors.keep(states.present.tolist()), states.present_only()
    total = 2 + options.training.width_views
    reporter("aligning", 0, total)
    bank = build_bank(anchors, states, knots=config.knots, canonical_size=config.canonical_size)
    views = [align(host, bank, config.strategy, plan=plan, states=states)]
    if config.strategy == "anchors":
        views += width_views(
            bank,
            states,
            views[0],
            plan.tap_depths,
            count=options.training.width_views,
            seed=options.training.seed,
        )
    reporter("aligning", total, total)
    hosts = [TrainingHost(host, views, plan)]
    for companion in companions:
        # All parts, whatever they cost there: a companion is trained on, not shipped.
        whole = full_plan(companion.map)
        progress = phase(reporter, f"aligning {companion.name}")
        found = align(companion, bank, config.strategy, plan=whole, progress=progress)
        hosts.append(TrainingHost(companion, [found], whole))
    return Prepared(bank, hosts, host_flops)


# More words than this bring a readout nothing (figures: tests/benchmarks/README.md).
FEATURE_WORDS = 22_000


def feature_texts(data: TaskData, options: PretrainOptions, anchors: AnchorTexts) -> AnchorTexts | None:
    """Texts for the feature bank, from where the anchors come and other than theirs; None where there are none."""
    texts, origin = _texts(data, options)
    if options.anchors == "general":
        reviews = load_task("reviews", need_evaluation=False).train
        assert reviews is not None  # it ships with the package
        texts += _like_the_tasks([*opinions(), *reviews.texts], data)
    return choose_feature_texts(
        texts,
        exclude=set(anchors.texts),
        num_words=options.feature_words or FEATURE_WORDS,
        seed=options.training.seed,
        origin=origin,
    )


def _anchors(data: TaskData, options: PretrainOptions) -> AnchorTexts:
    texts, origin = _texts(data, options)
    return choose_anchors(texts, num_words=options.num_anchors, seed=options.training.seed, origin=origin)


def _texts(data: TaskData, options: PretrainOptions) -> tuple[list[str], str]:
    """Texts to align by and their origin: the task's training texts by default, the package's own, or a file's."""
    if options.anchors is None:
        assert data.train is not None  # pretrain has checked it
        return [*data.train.texts, *(data.train.pairs or ())], f"training texts of {data.task.name}"
    if options.anchors == "general":
        return _like_the_tasks(general_texts(), data), "general"
    return read_texts(Path(options.anchors)), f"file {Path(options.anchors).name}"


def _like_the_tasks(texts: list[str], data: TaskData) -> list[str]:
    assert data.train is not None  # pretrain has checked it
    return in_style_of(texts, data.train.texts)
