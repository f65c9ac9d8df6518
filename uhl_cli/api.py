"""The Python interface: load an adapter file, port it to any model, call the result.

from uhl_cli import UniversalAdapter

adapter = UniversalAdapter.load("adapter.safetensors")
ported = adapter.port(model, tokenizer)
logits = ported(["a fine film"])          # the host is changed only while this runs
with ported.attached():                   # or for as long as you like
    model(**inputs)

aligned = adapter.align(model, tokenizer, any_task=True)
names = adapter.port(aligned, task="names.task.safetensors")    # many tasks, aligned once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uhl_cli.adapter.fold import feature_prior, fold, refold
from uhl_cli.adapter.low_rank import Expansion
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.align.alignment import Alignment, align_shapes
from uhl_cli.align.bank import AnchorBank
from uhl_cli.align.features import FeatureBank, align_features, depths_within
from uhl_cli.codes.layout import parameter_shapes
from uhl_cli.cost.flops import count_flops
from uhl_cli.cost.plan import PortPlan, plan_for
from uhl_cli.errors import AlignmentError, DataError, FormatError, UsageError
from uhl_cli.formats.adapter import AdapterFile, read_adapter, to_bytes
from uhl_cli.formats.adapter_card import CARD, adapter_card
from uhl_cli.formats.alignment import alignment_key, load_alignment, save_alignment
from uhl_cli.formats.container import ADAPTER, Problems
from uhl_cli.formats.convert import bank_of, dequantised, features_of, stored_parameters
from uhl_cli.formats.folder import is_ported, ported_path
from uhl_cli.formats.ported import load_ported, tuned_on
from uhl_cli.formats.sharing import SharedFile
from uhl_cli.formats.task import TaskFile, TaskRecord, read_task
from uhl_cli.formats.transfer import StoredTransfer
from uhl_cli.host.checkpoint import Host, wrap_host
from uhl_cli.host.running import bare
from uhl_cli.hub.fetch import fetch
from uhl_cli.hub.reference import USUAL, FetchedPath, Reference
from uhl_cli.hub.upload import upload
from uhl_cli.ported.aligned import AlignedHost, FoldedAdapter, Progress, Served, align_host, warn_of_new_words
from uhl_cli.ported.calibrate import STRENGTHS, TEXTS, Calibration, Judge
from uhl_cli.ported.model import PortedModel
from uhl_cli.ported.shift import correction, update_shift
from uhl_cli.schema import Manifest, Strategy, TrainingConfig
from uhl_cli.transfer.texts import TransferSet

__all__ = ["AlignedHost", "PortedModel", "UniversalAdapter", "load_ported"]


@dataclass(frozen=True, eq=False, repr=False)
class UniversalAdapter:
    """A loaded adapter file: manifest, anchor bank, the parameters as stored, and the file's SHA-256 digest.

    `own_task` is False if it has another task's readout, which has no head-only control.  `max_length` is the longest
    input in tokens that it was trained, or tuned, with.  `features` is None for files without a feature bank, and for
    another task's readout, which was not trained on the source.  If `low_rank`, delta-theta is a low-rank update of
    the host's linear modules and replaces the atoms' update (see `adapter.low_rank`).  `content`: the file's.
    """

    manifest: Manifest
    bank: AnchorBank
    stored: dict[str, Tensor]
    digest: str = ""
    own_task: bool = True
    max_length: int = TrainingConfig().max_length
    features: FeatureBank | None = None
    transfer: StoredTransfer | None = None
    low_rank: bool = False
    base: UniversalAdapter | None = field(default=None, repr=False)
    content: AdapterFile | None = field(default=None, repr=False)

    @classmethod
    def load(cls, path: str | Path) -> UniversalAdapter:
        """Read and validate a file.

        :raises FormatError: When it is missing, damaged, or breaks the format.
        """
        return cls.from_file(read_adapter(_path(path)))

    @classmethod
    def from_file(cls, content: AdapterFile) -> UniversalAdapter:
        """The adapter of a file's content."""
        length = content.manifest.training.config.max_length
        bank, features = bank_of(content), features_of(content)
        stored = stored_parameters(content)
        return cls(
            content.manifest,
            bank,
            stored,
            content.digest,
            max_length=length,
            features=features,
            transfer=content.transfer,
            content=content,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        filename: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> UniversalAdapter:
        """Load an adapter file from the hub, or from this machine.

        The token is that of the environment (HF_TOKEN) or of `hf auth login`.

        :param pretrained_model_name_or_path: Hub id, `user/repo[@revision][:file]`; or a file, which always wins.
        :param revision: Branch, tag or commit; by default the main branch.
        :param filename: The file; by default the repository's only one, or its adapter.safetensors.
        :param cache_dir: Cache to use in place of the hub's own.
        :param local_files_only: Use the cache alone.
        :raises HubError: When it cannot be found or fetched.
        :raises FormatError: When there is no such file, or it is damaged or breaks the format.
        :raises UsageError: When names are malformed, or a revision or a file is named twice.
        """
        given = Path(pretrained_model_name_or_path)
        reference = None if given.exists() else Reference.parse(str(pretrained_model_name_or_path))
        if reference is None:
            if revision is not None or filename is not None:
                raise UsageError(f"{given} is no hub id, so it has no revision and no other file.", "Pass user/repo.")
            return cls.load(given)
        reference = reference.narrowed(revision, filename)
        local = fetch(reference, max_bytes=ADAPTER.max_bytes, offline=local_files_only, cache_dir=cache_dir)
        return cls.load(FetchedPath.of(reference, local))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = USUAL,
        commit_message: str | None = None,
        private: bool = False,
        revision: str | None = None,
        license: str | None = None,
        language: str | Sequence[str] = (),
        overwrite: bool = False,
        share_texts: bool = False,
    ) -> str:
        """Upload the adapter's file to the hub with a model card, in one commit, and return the repository's page.

        The token is that of the environment (HF_TOKEN) or of `hf auth login`.

        :param filename: Its name in the repository.
        :param private: Make the repository private; an existing public one is refused.
        :param revision: Branch to upload to, which is made if there is none.
        :param license: Licence to name in the card; by default the one recorded in the file.
        :param language: Languages of the texts, such as "en".
        :param overwrite: Replace another model card in the repository.
        :param share_texts: Agree that the training texts in the file become public.
        :raises UsageError: When a name is malformed, the file holds texts and `share_texts` is False, or this is not
            what was in a file.
        :raises HubError: When the hub cannot be reached or refuses.
        """
        content = self.content
        if content is None:
            raise UsageError(
                "an adapter with a task file is no file of its own.",
                "Push adapter.own, and the task file by `uhl push`.",
            )
        shared = SharedFile.of(to_bytes(content), filename, Problems(Path(filename)))
        if shared.warning and not share_texts:
            raise UsageError(f"{shared.warning}.", "Nothing was uploaded; pass share_texts=True to agree.")
        languages = (language,) if isinstance(language, str) else tuple(language)
        card = adapter_card(shared, repo_id, revision=revision, licence=license, languages=languages)
        done = upload(
            repo_id,
            {CARD: card.encode(), shared.name: shared.data},
            keep=None if overwrite else CARD,
            message=commit_message or f"Upload {shared.name} with uhl",
            revision=revision,
            private=private,
        )
        return done.url

    def with_task(self, task: str | Path | TaskFile) -> UniversalAdapter:
        """The adapter's file with the delta-theta (and the readout) of a task file that `uhl tune` made.

        It replaces any task file already applied.

        :param task: The file's path, or the result of `read_task`.
        :raises FormatError: When the file is damaged or was tuned on another adapter.
        :raises UsageError: When it is the folder of a LoRA, which fits only one model.
        """
        if not isinstance(task, TaskFile) and is_ported(_path(task)):
            raise UsageError(
                f"{task} holds a LoRA, which fits only one model.", "Call adapter.port(model, tokenizer, task=folder)."
            )
        content = task if isinstance(task, TaskFile) else read_task(_path(task))
        if content.record.adapter != self.digest:
            name = "the task file" if isinstance(task, TaskFile) else str(task)
            raise FormatError(f"{name} was tuned on another adapter file.", "Give the adapter that it was made from.")
        return self.own.with_parameters(content.record, dequantised(content.parameters))

    def with_parameters(self, record: TaskRecord, parameters: dict[str, Tensor]) -> UniversalAdapter:
        """The same adapter with a task's parameters in place of its own."""
        stored = dict(self.stored) | {"threshold": self.stored["threshold"][: record.config.top_k]}
        if not record.own_task:
            # No head-only control was fitted for another task; a zero head predicts its first class.
            shapes = parameter_shapes(record.config)
            stored = {name: value for name, value in stored.items() if name in shapes}
            stored |= {name: torch.zeros(shapes[name]) for name in ("head_weight", "head_bias")}
        update = {
            "config": record.config,
            "task": record.task,
            "label_counts": record.label_counts,
            "score": self.manifest.score if record.own_task else None,
        }
        manifest = self.manifest.model_copy(update=update)
        length = record.training.config.max_length
        features = self.features if record.own_task else None
        return UniversalAdapter(
            manifest,
            self.bank,
            stored | parameters,
            self.digest,
            record.own_task,
            length,
            features,
            self.transfer if record.own_task else None,
            record.parameters == "low-rank",
            self.own,
        )

    def transfer_set(self) -> TransferSet:
        """The file's transfer set: texts with the teacher's outputs.

        :raises DataError: When the file has no transfer set, or one of another version of the package's own texts.
        """
        if self.transfer is None:
            raise DataError(
                "the adapter file has no transfer set, so it cannot be tuned without labels.",
                "Tune with --task or --data, or get a file made by `uhl pretrain` without --transfer-set 0.",
            )
        return self.transfer.whole()

    def __repr__(self) -> str:
        task, source = self.manifest.task, self.manifest.source
        banks = f"{self.bank.anchors.num_words:,} anchor words"
        if self.features is not None:
            banks += f", {self.features.anchors.num_words:,} words with features"
        return f"UniversalAdapter({task.name!r}, {len(task.labels)} labels, from {source.name!r})\n  {banks}"

    @property
    def own(self) -> UniversalAdapter:
        """The adapter as in its file, without any task file."""
        return self.base or self

    def align(
        self,
        model: nn.Module | Host,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        strategy: Strategy | None = None,
        max_flops: float = 10.0,
        any_task: bool = False,
        progress: Progress | None = None,
        cache: bool = False,
    ) -> AlignedHost:
        """Align a model to this adapter: no label, no gradient, one pass over the anchor texts.

        The model is left unchanged, including its training flags and `requires_grad`.  For a host without weights
        (`host.config_only`) the result only has shapes, enough to count costs.

        :param max_flops: Limit in percent of the model's own FLOPs; parts are left out to meet it (see `cost.plan`).
        :param any_task: Also serve the readouts of task files, which takes longer; default: this adapter's only.
        :param cache: Take the alignment from the cache if this call was made before, or keep it there, as the commands
            do (see `formats.alignment`).  Of a model in memory, every weight, setting and module is compared (see
            `host.identity`); leave it out if you replaced functions of torch or transformers, which nothing can see.
        :raises UsageError: When a model is given without its tokenizer.
        :raises BudgetError: When nothing that fits the limit is left.
        :raises HostMapError: When the model hands no stream of states from layer to layer.
        :raises AlignmentError: When the model can read too few anchors, or its states are degenerate.
        :raises HostError: When an adapter is attached to the model.
        """
        host, space = _host_of(model, tokenizer), self.bank.digest
        chosen = strategy or self.manifest.config.strategy
        with bare(host.map.base):
            host_flops = count_flops(host, None)
            plan = plan_for(host, self.manifest.config, host_flops, max_flops)
            if host.map.embeddings.weight.is_meta and chosen == "anchors":
                return AlignedHost(host, space, self._shapes(host, plan), plan, host_flops, self._serves(any_task))
            if chosen != "anchors":
                return AlignedHost(host, space, align_host(host, self.bank, chosen), plan, host_flops)
            joint, own = any_task or self.features is None, self.own
            features = own.features if any_task or self.features is not None else None
            key = found = None
            if cache:
                key = alignment_key(
                    host,
                    self.bank,
                    depths=plan.readout_depths,
                    joint=joint,
                    features=features,
                    config=own.manifest.config,
                    stored=own.stored,
                )
                found = None if key is None else load_alignment(key, own.manifest.config, host)
            cached = found is not None
            if found is None:
                found = align_host(host, self.bank, chosen, plan=plan, joint=joint, progress=progress)
                if features is not None:
                    found = self._with_features(host, found, plan, progress)
                    if found.features is None and not joint:  # the host can read too few of the bank's words
                        found = align_host(host, self.bank, chosen, plan=plan, progress=progress)
            else:
                warn_of_new_words(host, found.new_words)
        alone = features is not None and found.features is None
        serves: Served = "any" if alone else self._serves(any_task)
        if key is not None and not cached:
            save_alignment(key, found, adapter=self.digest, host=host, serves=serves)
        return AlignedHost(host, space, found, plan, host_flops, serves, cached)

    def _serves(self, any_task: bool) -> Served:
        if any_task or self.own.features is None:
            return "any"
        return "other" if self.features is None else "own"

    def _with_features(self, host: Host, alignment: Alignment, plan: PortPlan, progress: Progress | None) -> Alignment:
        """The alignment with maps to the features of the adapter's own readout, if the host can read enough words."""
        own = self.own
        config = own.manifest.config
        assert own.features is not None
        maps = align_features(
            host,
            own.features,
            knots=config.knots,
            depths=plan.readout_depths,
            readout_size=config.readout_size,
            prior=feature_prior(own.stored, alignment, config.knots),
            progress=progress,
        )
        return replace(alignment, features=maps)

    def _shapes(self, host: Host, plan: PortPlan) -> Alignment:
        config = self.manifest.config
        depths = None if self.features is None else depths_within(plan.readout_depths, config.knots, host.map)
        readout_size = config.readout_size
        return align_shapes(
            self.bank, host.map, readout_depths=plan.readout_depths, feature_depths=depths, readout_size=readout_size
        )

    def port(
        self,
        model: nn.Module | Host | AlignedHost,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        task: str | Path | None = None,
        strategy: Strategy | None = None,
        max_flops: float = 10.0,
        strength: float | None = None,
        progress: Progress | None = None,
        cache: bool = False,
    ) -> PortedModel:
        """Port the adapter to a model: no label, no gradient, one pass over the anchor texts.

        :param model: A model, or the result of `align`; `strategy`, `max_flops` and `cache` are for `align`.
        :param task: Task file of `uhl tune`, which replaces the adapter's own task; or the folder that `uhl tune
            --parameters lora` made for this model, which needs no alignment and has no FLOP limit.
        :param strength: How strongly the updates act: 0, 0.5 or 1; by default chosen by the transfer set (see
            `ported.calibrate`), and 1 without one.  It does not apply without updates, or to tuned ones.
        :raises UsageError: When the aligned host does not serve the task, or carries other parts for it, or at another
            strength.
        :raises FormatError: When the task file is damaged or was tuned on another adapter.
        :raises FingerprintError: When the folder was made for another model.
        :raises AlignmentError: When the adapter's maps on the host are not finite.
        :raises UhlError: As `align` does.
        """
        if strength is not None and strength not in STRENGTHS:
            known = ", ".join(f"{value:g}" for value in STRENGTHS)
            raise UsageError(f"{strength:g} is not a strength of updates.", f"Choose one of {known}.")
        if task is not None and is_ported(_path(task)):
            host = model.host if isinstance(model, AlignedHost) else _host_of(model, tokenizer)
            return tuned_on(ported_path(_path(task)), host, self.digest)
        chosen = self if task is None else self.with_task(task)
        if not isinstance(model, AlignedHost):
            aligned = chosen.align(
                model, tokenizer, strategy=strategy, max_flops=max_flops, progress=progress, cache=cache
            )
            return chosen._ported(aligned, strength)
        if task is not None:
            plan = plan_for(model.host, chosen.manifest.config, model.host_flops, model.plan.max_flops)
            if plan != model.plan:
                raise UsageError(
                    f"within {model.plan.max_flops:g} % FLOPs, {model.host.name} carries other parts of the adapter "
                    f"for {task}.",
                    "Port it apart: adapter.port(model, tokenizer, task=file).",
                )
        return chosen._ported(model, strength)

    @torch.no_grad()
    def _ported(self, aligned: AlignedHost, strength: float | None) -> PortedModel:
        own = self.own
        aligned.refuse_other(self.bank, own_task=self.own_task)
        host, alignment = aligned.host, aligned.alignment
        folded = own._folded_for(aligned)
        adapter = folded.adapter
        if self.own_task and alignment.features is not None:
            adapter = adapter.with_shift(own._placed_shift(aligned))
        if self is own or self.low_rank:
            calibration = own.calibration(aligned)
            if calibration is not None:
                adapter = calibration.applied(adapter, 0.0 if self.low_rank else strength)
            elif strength is not None:
                adapter = adapter.with_strength(strength)
        if self.low_rank:
            expansion = Expansion.of(host.map, self.stored["delta_theta"].numel())
            lora = expansion.factors_of(_on(self.stored, host)["delta_theta"].to(host.device))
            adapter = adapter.without_updates().with_lora(lora)
            adapter = adapter.for_inference(host.device, host.map.embeddings.weight.dtype)
        elif self is not own:
            # Another task's readout uses `depth_weights`: the feature bank does not apply to it.
            taken = alignment if self.own_task else replace(alignment, features=None)
            adapter = refold(adapter, _on(self.stored, host), taken, new_readout=not self.own_task)
            adapter = adapter.for_inference(host.device, host.map.embeddings.weight.dtype)
        if aligned.has_weights and not adapter.is_finite:
            raise AlignmentError(
                f"the adapter's maps on {host.name} are not finite numbers.",
                "Load the host with --dtype float32, or get the adapter again from its source.",
            )
        return PortedModel(
            host,
            adapter,
            self.manifest.task,
            strategy=alignment.strategy,
            plan=aligned.plan.without_updates() if self.low_rank else aligned.plan,
            max_length=self.max_length,
        )

    def shift(self, aligned: AlignedHost) -> Tensor | None:
        """What the readout adds to its features on this host, float32 [readout_size], or None: see `ported.shift`.

        Measured once per aligned host, with the adapter's own updates, without those of a task file.
        """
        folded = self.own._folded_for(aligned)
        if not folded.measured:
            features = self.own.features
            if features is not None and aligned.alignment.features is not None and folded.adapter.updates:
                if aligned.has_weights:
                    folded.shift = correction(update_shift(aligned.host, folded.adapter, features), features.shift)
                else:
                    folded.shift = torch.empty_like(features.shift, device="meta")
            folded.measured = True
        return folded.shift

    @torch.no_grad()
    def calibration(self, aligned: AlignedHost) -> Calibration | None:
        """Strength of the updates and class offsets by the transfer set; None without it, or without weights.

        Measured once per aligned host.  A transfer set that cannot be read here (`transfer_set`) is ignored.
        """
        own = self.own
        folded = own._folded_for(aligned)
        if folded.calibration is None and aligned.has_weights:
            judge = own.judge(aligned.host)
            if judge is not None:
                start = folded.adapter
                if aligned.alignment.features is not None:
                    start = start.with_shift(own._placed_shift(aligned))
                at_home = aligned.host.fingerprint == self.manifest.source.fingerprint
                folded.calibration = judge.calibration(start, at_home=at_home)
        return folded.calibration

    def judge(self, host: Host) -> Judge | None:
        """The transfer set on a host, to calibrate an adapter or a control; None if there is none."""
        if self.transfer is None:
            return None
        try:
            examples, odds = self.transfer.whole().whole(TEXTS)
        except DataError:
            return None

        def logits_of(adapter: PortedAdapter) -> Tensor:
            ported = PortedModel(host, adapter, self.manifest.task, max_length=self.max_length)
            return torch.cat(ported.logits_of(examples))

        return Judge(logits_of, examples, torch.from_numpy(odds))

    def start(self, aligned: AlignedHost) -> PortedAdapter:
        """What a student starts from (see `train.student`): the ported readout without updates, calibrated for that."""
        own = self.own
        adapter, calibration = own._folded_for(aligned).adapter, own.calibration(aligned)
        return adapter.without_updates() if calibration is None else calibration.applied(adapter, 0.0)

    def _placed_shift(self, aligned: AlignedHost) -> Tensor | None:
        shift, weight = self.shift(aligned), aligned.host.map.embeddings.weight
        return None if shift is None else shift.to(device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def _folded_for(self, aligned: AlignedHost) -> FoldedAdapter:
        """This file's own parts on the host, without a shift; computed once."""
        if self not in aligned.folded:
            host, plan = aligned.host, aligned.plan
            folded: PortedAdapter = fold(
                _on(self.stored, host), aligned.alignment, host.map, layers=plan.layers, types=plan.types
            )
            aligned.folded[self] = FoldedAdapter(folded.for_inference(host.device, host.map.embeddings.weight.dtype))
        return aligned.folded[self]


def _path(path: str | Path) -> Path:
    """The path itself if it is one: a copy of a `FetchedPath` would lose where the file lies."""
    return path if isinstance(path, Path) else Path(path)


def _host_of(model: nn.Module | Host, tokenizer: PreTrainedTokenizerBase | None) -> Host:
    if isinstance(model, Host):
        return model
    if tokenizer is None:
        raise UsageError("a model needs its tokenizer to be ported to.", "Call port(model, tokenizer).")
    return wrap_host(model, tokenizer)


def _on(stored: dict[str, Tensor], host: Host) -> dict[str, Tensor]:
    """The parameters on the device of folding: the CPU, or the meta device for a host without weights."""
    if not host.map.embeddings.weight.is_meta:
        return stored
    return {name: value.to("meta") for name, value in stored.items()}
