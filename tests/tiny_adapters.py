"""Small valid adapters, banks and files, made in milliseconds from fake states or a tiny host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from tiny_hosts import SENTENCES
from torch import Tensor
from transformers import AutoModel

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.adapter.fold import fold
from uhl_cli.adapter.module import LoraFactors, PortedAdapter, linear_modules
from uhl_cli.align.alignment import Alignment, align_anchors
from uhl_cli.align.bank import AnchorBank, build_bank
from uhl_cli.align.features import FeatureBank, quantise_features
from uhl_cli.align.states import WordStates, word_states
from uhl_cli.align.texts import AnchorTexts, choose_anchors, choose_feature_texts
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.layout import bits_of
from uhl_cli.codes.quantise import codes_and_scales
from uhl_cli.data.tasks import Task
from uhl_cli.formats.adapter import FORMAT_VERSION, AdapterFile, Quantised
from uhl_cli.formats.convert import to_file
from uhl_cli.formats.folder import TunedRecord
from uhl_cli.formats.task import TaskFile, TaskRecord, task_parameter_shapes
from uhl_cli.formats.transfer import StoredTransfer
from uhl_cli.host.checkpoint import Host
from uhl_cli.metrics import Score
from uhl_cli.schema import (
    AdapterConfig,
    AnchorRecord,
    FeatureRecord,
    Fingerprint,
    HostRecord,
    Manifest,
    Parts,
    TrainingConfig,
    TrainingRecord,
    TransferRecord,
)
from uhl_cli.transfer.general import record_of, transfer_texts
from uhl_cli.transfer.texts import MAX_LEVEL, TransferTexts, count_examples

# Odd sizes on purpose: half bytes and unequal widths must be handled everywhere.
SMALL = AdapterConfig(
    num_atoms=7,
    canonical_size=9,
    readout_size=5,
    task_embedding_size=3,
    mixer_hidden_size=3,
    size_hidden_size=3,
    num_labels=3,
)
NO_HOST = Fingerprint(
    architecture="None",
    model_type="none",
    hidden_size=32,
    num_hidden_layers=2,
    vocab_size=300,
    parameters=1,
    digest="0" * 64,
)


def tiny_anchors(num_words: int = 96, *, seed: int = 0) -> AnchorTexts:
    """Anchor words in the sentences that the tiny tokenizers know."""
    return choose_anchors(SENTENCES, num_words=num_words, seed=seed, origin="sentences")


def fake_states(
    words: int, *, width: int, depth: int, rank: int, seed: int = 0, latent: Tensor | None = None
) -> WordStates:
    """Low-rank random states: one latent vector a word, another random map at every depth and place."""
    generator = torch.Generator().manual_seed(seed)
    if latent is None:
        latent = torch.randn(words, rank, generator=generator)

    def state() -> Tensor:
        return latent @ torch.randn(latent.shape[1], width, generator=generator) + 3 * torch.randn(
            width, generator=generator
        )

    return WordStates(
        stream=tuple(state() for _ in range(depth + 1)),
        attention=tuple(state() for _ in range(depth)),
        mlp=tuple(state() for _ in range(depth)),
        present=torch.ones(words, dtype=torch.bool),
    )


def random_adapter(config: AdapterConfig = SMALL, *, seed: int = 0) -> CanonicalAdapter:
    """An adapter whose every parameter matters; some tokens get two atoms, some one, some none."""
    adapter = CanonicalAdapter(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
            if name == "threshold":
                value.copy_(torch.tensor([0.2, -0.1])[: config.top_k])
    return adapter


def tiny_task(config: AdapterConfig = SMALL) -> Task:
    """A task that fits the configuration."""
    labels = tuple(f"label {index}" for index in range(config.num_labels))
    if config.kind == "tokens":
        return Task(
            name="tags", kind="tokens", labels=labels, metric="accuracy", tokens_column="words", label_column="tags"
        )
    return Task(name="moods", kind="sequence", labels=labels, metric="accuracy", text_column="t", label_column="l")


def tiny_manifest(
    config: AdapterConfig,
    anchors: AnchorTexts,
    *,
    fingerprint: Fingerprint = NO_HOST,
    name: str = "fake",
    features: AnchorTexts | None = None,
) -> Manifest:
    """A manifest that fits configuration, anchors and features."""
    record = None
    if features is not None:
        record = FeatureRecord(
            texts=len(features.texts),
            words=features.num_words,
            digest=features.digest,
            word_rule=features.word_rule,
        )
    return Manifest(
        format_version=FORMAT_VERSION,
        config=config,
        task=tiny_task(config),
        label_counts=tuple(range(1, config.num_labels + 1)),
        source=HostRecord(name=name, fingerprint=fingerprint),
        training=TrainingRecord(
            command="uhl pretrain",
            config=TrainingConfig(),
            steps=1,
            train_examples=sum(range(1, config.num_labels + 1)),
            train_digest="0" * 64,
            data="none",
        ),
        anchors=AnchorRecord(
            origin=anchors.origin,
            texts=len(anchors.texts),
            words=anchors.num_words,
            digest=anchors.digest,
            word_rule=anchors.word_rule,
        ),
        parts=Parts(features=record),
        versions={"uhl": "0"},
    )


def fake_bank(config: AdapterConfig = SMALL, *, num_words: int = 40, anchors: AnchorTexts | None = None) -> AnchorBank:
    """A bank of fake states on tiny anchors, or on the anchors given."""
    anchors = anchors or tiny_anchors(num_words)
    states = fake_states(anchors.num_words, width=16, depth=4, rank=12)
    return build_bank(anchors, states, knots=config.knots, canonical_size=config.canonical_size)


def many_texts(count: int = 240) -> list[str]:
    """Words of the sentences in random order: many contexts, all of words that the tiny hosts know."""
    words = " ".join(SENTENCES).split()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(words), (count, 9), generator=generator).tolist()
    return [" ".join(words[index] for index in row) for row in chosen]


def fake_features(config: AdapterConfig = SMALL, *, seed: int = 0, texts: int = 240) -> FeatureBank:
    """A bank of random features, one set for each of the words of `many_texts`."""
    anchors = choose_feature_texts(many_texts(texts), exclude=(), num_words=10_000, seed=seed, origin="sentences")
    assert anchors is not None
    generator = torch.Generator().manual_seed(seed)
    columns = config.readout_size + config.num_labels
    features = torch.randn(anchors.num_words, columns, generator=generator) * 3 + 1
    return quantise_features(anchors, features, torch.randn(config.readout_size, generator=generator))


def tiny_transfer(
    config: AdapterConfig = SMALL,
    *,
    seed: int = 0,
    pairs: bool = False,
    general: bool = False,
    texts: Sequence[str] = SENTENCES,
) -> StoredTransfer:
    """A transfer set with random outputs: of the texts, of pairs of them, or of 60 of the package's own texts."""
    texts, words, own = list(texts), config.kind == "tokens", None
    if general:
        own = record_of(texts)
        texts = transfer_texts(own)[:60]
    second = tuple(reversed(texts)) if pairs else None
    held = TransferTexts(tuple(texts), second, 0 if words else 3, words, "general" if general else "sentences")
    examples, predictions = count_examples(held)
    draw = np.random.default_rng(seed)
    codes = draw.integers(-MAX_LEVEL, MAX_LEVEL, (predictions, config.num_labels - 1), np.int8, endpoint=True)
    record = TransferRecord(
        origin=held.origin,
        texts=len(texts),
        user_texts=0 if general else len(texts),
        pairs=pairs,
        spans=held.spans,
        examples=examples,
        predictions=predictions,
        digest=held.digest,
        general=own,
        teacher="nobody",
        teacher_score=Score(metric="accuracy", value=0.8, low=0.7, high=0.9, examples=50),
    )
    return StoredTransfer(record, codes, None if general else held, words=words)


def tiny_file(
    config: AdapterConfig = SMALL, *, seed: int = 0, featured: bool = False, transfer: StoredTransfer | None = None
) -> AdapterFile:
    """A valid file's content, with a feature bank if asked; no host is run."""
    bank = fake_bank(config)
    features = fake_features(config, seed=seed) if featured else None
    manifest = tiny_manifest(config, bank.anchors, features=None if features is None else features.anchors)
    parts = Parts(features=manifest.parts.features, transfer=None if transfer is None else transfer.record)
    manifest = manifest.model_copy(update={"parts": parts})
    return to_file(random_adapter(config, seed=seed), bank, manifest, features, transfer)


def tiny_task_file(
    manifest: Manifest | None = None, *, adapter: str = "0" * 64, own_task: bool = True, seed: int = 0
) -> TaskFile:
    """A task file with random content, of the adapter with this manifest and digest."""
    manifest = manifest or tiny_manifest(SMALL, tiny_anchors())
    record = TaskRecord(
        adapter=adapter,
        config=manifest.config,
        task=manifest.task,
        label_counts=manifest.label_counts,
        own_task=own_task,
        target=manifest.source,
        training=manifest.training,
        versions={},
        before=Score(metric="accuracy", value=0.5, low=0.4, high=0.6, examples=10),
        score=Score(metric="accuracy", value=0.7, low=0.6, high=0.8, examples=10),
    )
    trained = random_adapter(manifest.config, seed=seed)
    parameters = {}
    for name in task_parameter_shapes(record):
        codes, scales = codes_and_scales(trained.get_parameter(name), bits_of(name))
        parameters[name] = Quantised(codes.numpy(), scales.numpy())
    return TaskFile(record, parameters)


def random_lora(host: Host, *, rank: int = 3, seed: int = 0, size: float = 0.1, zero: bool = False) -> LoraFactors:
    """A and B of every linear module of a host, exact in float16; B is zero if asked."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, linear in linear_modules(host.map).items():
        down = size * torch.randn(rank, linear.in_features, generator=generator)
        up = size * torch.randn(linear.module_features, rank, generator=generator)
        factors[name] = (down.half().float(), torch.zeros_like(up) if zero else up.half().float())
    return LoraFactors(factors)


def tuned_record(adapter: UniversalAdapter) -> TunedRecord:
    """What `tune --parameters lora` would say of a LoRA that started from the adapter."""
    return TunedRecord(
        adapter=adapter.digest,
        training=adapter.manifest.training,
        supervision="transfer set",
        label_counts=adapter.manifest.label_counts,
        versions={"uhl": "0"},
        before=Score(metric="accuracy", value=0.5, low=0.4, high=0.6, examples=10),
        score=Score(metric="accuracy", value=0.7, low=0.6, high=0.8, examples=10),
    )


def host_bank(host: Host, config: AdapterConfig = SMALL) -> tuple[AnchorBank, WordStates]:
    """A bank that the host itself defines, with the host's word states."""
    anchors = tiny_anchors()
    states = word_states(host, anchors)
    return build_bank(anchors, states, knots=config.knots, canonical_size=config.canonical_size), states


def tiny_universal(
    host: Host, config: AdapterConfig = SMALL, *, seed: int = 0, featured: bool = False, digest: str = ""
) -> UniversalAdapter:
    """A random universal adapter whose source is the host, with a bank of random features if asked.

    :param digest: Of the file that it is said to be from.
    """
    bank, _ = host_bank(host, config)
    features = fake_features(config, seed=seed) if featured else None
    texts = None if features is None else features.anchors
    manifest = tiny_manifest(config, bank.anchors, fingerprint=host.fingerprint, name=host.name, features=texts)
    content = to_file(random_adapter(config, seed=seed), bank, manifest, features)
    return UniversalAdapter.from_file(replace(content, digest=digest))


def all_depths(alignment: Alignment, *, seed: int = 0) -> Alignment:
    """The same alignment with random weights at every depth, so that nothing depends on which were chosen."""
    generator = torch.Generator().manual_seed(seed)
    rows = alignment.depth_bias.shape[0]
    depth_weights = {
        depth: torch.randn(rows, alignment.width, generator=generator) / alignment.width
        for depth in range(alignment.num_hidden_layers + 1)
    }
    return replace(alignment, depth_weights=depth_weights)


def unpacked(adapter: PortedAdapter, dtype: torch.dtype = torch.float32) -> PortedAdapter:
    """The same adapter detached and in `dtype`, its tables plain."""
    return adapter.mapped(lambda _name, value: value.detach().to(dtype))


def meta_twin(host: Host) -> Host:
    """The same host without weights, made from its configuration alone: on the meta device, without a tokenizer."""
    with torch.device("meta"):
        model = AutoModel.from_config(host.model.config).eval()
    model.config.pad_token_id = None
    return replace(host, model=model, tokenizer=None, map=host.map.on(model))


def tiny_folded(
    host: Host, config: AdapterConfig = SMALL, *, zero: bool = False, seed: int = 0
) -> tuple[PortedAdapter, Alignment, dict[str, Tensor]]:
    """A random adapter folded for a host, with the alignment and the stored parameters that it was folded from."""
    bank, states = host_bank(host, config)
    alignment = align_anchors(bank, states)
    adapter = random_adapter(config, seed=seed)
    if zero:
        with torch.no_grad():
            adapter.get_parameter("atoms_u").zero_()
    with torch.no_grad():
        stored = adapter.stored()
        return fold(stored, alignment, host.map), alignment, stored
