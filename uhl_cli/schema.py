"""Frozen configurations: an adapter's shape, and the records of its manifest.

Everything here is plain data, validated by pydantic, importable without torch.
Sizes are bounded because a manifest may come from a stranger's file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from uhl_cli.data.tasks import Task
from uhl_cli.metrics import Score

# The module types that an update can edit; "readout" is the canonical task head, not a host module.
# See docs/method.md, "Update".
UPDATE_TYPES: tuple[str, ...] = ("q", "k", "v", "o", "up", "down", "gate", "readout")

Strategy = Literal["anchors", "size"]
Schedule = Literal["linear", "cosine", "constant"]
# Kinds of task that later versions of the formats may hold; this version refuses them by name.
RESERVED_KINDS = ("regression", "multi-label")


class Frozen(BaseModel):
    """Base of all records: immutable, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdapterConfig(Frozen):
    """Shape of a canonical adapter; every tensor's size follows from it (docs/method.md, "Canonical adapter")."""

    num_atoms: int = Field(128, ge=1, le=1024)
    canonical_size: int = Field(256, ge=4, le=1024)
    top_k: Literal[1, 2] = 2
    knots: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = Field((0.0, 0.5, 1.0), min_length=1, max_length=9)
    readout_size: int = Field(64, ge=1, le=1024)
    task_embedding_size: int = Field(16, ge=1, le=256)
    mixer_hidden_size: int = Field(15, ge=1, le=256)
    size_hidden_size: int = Field(8, ge=1, le=64)
    num_labels: int = Field(2, ge=1, le=1000)
    kind: Literal["sequence", "tokens"] = "sequence"
    strategy: Strategy = Field("anchors", description="alignment strategy")

    @model_validator(mode="after")
    def _knots_rise(self) -> AdapterConfig:
        if list(self.knots) != sorted(set(self.knots)) or self.knots[-1] != 1.0:
            raise ValueError("knots must rise strictly and end at 1")
        return self


class WordRecord(Frozen):
    """By which rule texts are cut into words, see `align.texts`; absent from the record where it is 1."""

    word_rule: Literal[1, 2] = 1

    @model_serializer(mode="wrap")
    def _without_first(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {name: value for name, value in handler(self).items() if (name, value) != ("word_rule", 1)}


class AnchorRecord(WordRecord):
    """The anchor texts' origin, number of texts and words, and digest."""

    origin: str = Field(max_length=200)
    texts: int = Field(ge=1, le=50_000)
    words: int = Field(ge=1, le=100_000)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class PartRecord(BaseModel):
    """A manifest's record of an optional part that this uhl does not know.

    :param required: Whether a reader that does not know the part must refuse the file; otherwise it ignores the part.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    required: bool = False

    @model_serializer(mode="wrap")
    def _as_it_was(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields: dict[str, object] = handler(self)
        if "required" not in self.model_fields_set:
            del fields["required"]
        return fields


class FeatureRecord(WordRecord):
    """How many texts and words the feature bank has, and its texts' digest."""

    texts: int = Field(ge=1, le=50_000)
    words: int = Field(ge=1, le=200_000)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class GeneralRecord(Frozen):
    """Which of the package's own texts a transfer set uses, and how they are written, see `transfer.general`."""

    version: int = Field(ge=1, le=9999)
    lower: bool
    apart: bool


class TransferRecord(Frozen):
    """A manifest's record of its transfer set, see `transfer.texts`.

    :param general: Set if the texts are the package's own, which the file does not hold.
    :param examples: Texts and their spans; `predictions`: the teacher's outputs, one per word for a token task.
    :param user_texts: How many of the texts come from the user's data or file.
    :param teacher: The teacher's name; `teacher_score`: its score on the evaluation data, if there was any.
    """

    origin: str = Field(max_length=200)
    texts: int = Field(ge=1, le=50_000)
    user_texts: int = Field(ge=0, le=50_000)
    pairs: bool
    spans: int = Field(ge=0, le=16)
    examples: int = Field(ge=1, le=1_000_000)
    predictions: int = Field(ge=1, le=4_000_000)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    general: GeneralRecord | None = None
    teacher: str = Field(max_length=500)
    teacher_score: Score | None = None


class Parts(BaseModel):
    """The optional parts of an adapter file by name; the names of all tensors of part `x` begin with `x.`.

    Parts that later versions add are kept as `PartRecord` in `unknown`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, PartRecord]

    features: FeatureRecord | None = None
    transfer: TransferRecord | None = None

    @property
    def unknown(self) -> dict[str, PartRecord]:
        """Parts that this uhl does not know."""
        return self.__pydantic_extra__

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {name: part for name, part in handler(self).items() if part is not None}


class TrainingConfig(Frozen):
    """How an adapter is trained; the defaults were chosen on a slice of SST-2's training set."""

    epochs: float = Field(3.0, gt=0, le=1000, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many steps instead")
    batch_size: int = Field(32, ge=1, le=4096, description="examples per step, over all processes")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="peak learning rate of the updates")
    readout_learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate of the readout")
    weight_decay: float = Field(0.01, ge=0, le=1, description="weight decay of matrices")
    warmup_fraction: float = Field(0.06, ge=0, le=1, description="share of the steps that warm up")
    active_weight: float = Field(0.01, ge=0, le=10, description="weight of active atoms in the loss (lambda_F)")
    delta_weight: float = Field(1e-5, ge=0, le=10, description="weight of delta-theta's square in the loss (lambda_Q)")
    noise: float = Field(1.0, ge=0, le=10, description="alignment noise of the readout's input, in standard deviations")
    update_noise: float = Field(0.0, ge=0, le=10, description="alignment noise of the updates' input")
    update_dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of the steps without updates, so that the readout works with and without them",
    )
    updates: bool = Field(True, description="train the weight updates, or the readout alone")
    max_length: int = Field(128, ge=4, le=100_000, description="longest input in tokens")
    gradient_clip: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of everything random")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast precision of training")

    schedule: Schedule | None = Field(
        None, description="schedule of the learning rate, by transformers' get_scheduler; None: see `train.loop`"
    )

    @model_serializer(mode="wrap")
    def _without_no_schedule(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out a schedule that is not chosen, so that earlier versions read the record."""
        fields: dict[str, object] = handler(self)
        return {name: value for name, value in fields.items() if (name, value) != ("schedule", None)}


# Settings of earlier versions: the number of simulated widths.
_REMOVED = frozenset({"width_views"})


def without_removed(record: dict[str, Any], name: str) -> dict[str, Any]:
    """A record whose training configuration, at `name`, lacks the settings that training no longer has."""
    config = record.get(name)
    if not isinstance(config, dict):
        return record
    return record | {name: {key: value for key, value in config.items() if key not in _REMOVED}}


class TrainingRecord(Frozen):
    """A manifest's record of training; settings that no longer exist are ignored."""

    command: str = Field(max_length=10_000)
    config: TrainingConfig
    steps: int = Field(ge=0)
    train_examples: int = Field(ge=0)
    train_digest: str = Field(max_length=64)
    data: str = Field(max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, record: Any) -> Any:  # noqa: ANN401 - whatever stands in a file
        return without_removed(record, "config") if isinstance(record, dict) else record


class Fingerprint(Frozen):
    """A host's identity in a few fields; equal for equal checkpoints.  Computed by `host.fingerprint`.

    :param architecture: Class of the base model.
    :param vocab_size: Rows of the input embedding.
    :param parameters: Number of parameters of the base model, without a pooler.
    :param digest: sha256 in hexadecimal digits.
    """

    architecture: str = Field(max_length=200)
    model_type: str = Field(max_length=200)
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    parameters: int = Field(ge=1)
    digest: str = Field(max_length=128)


# Where a host's tokenizer comes from: its tokenizer.json, or the class in transformers; see `host.tokenizer`.
TokenizerSource = Literal["file", "class"]
# What of a host can be edited: modules of all layers, of some, or of none, so that the stream alone is read.
Degree = Literal["all", "some", "stream"]


class HostRecord(Frozen):
    """A host: its name as given, and its fingerprint."""

    name: str = Field(max_length=500)
    revision: str | None = Field(None, max_length=200)
    fingerprint: Fingerprint


class Structure(Frozen):
    """What a ported adapter consists of: with its host and task, this determines all shapes.

    :param layers: Types of the modules that get updates, by layer.
    :param readout_depths: Depths, 0 to L, that the readout reads.
    :param readout_update: Whether the readout has an update of its own; `shift`: whether it has a shift.
    :param lora_rank: Rank of the LoRA on every linear module of every layer; 0 for none.
    """

    num_atoms: int = Field(ge=1, le=1024)
    top_k: int = Field(ge=1, le=2)
    readout_size: int = Field(ge=1, le=1024)
    layers: dict[int, Annotated[tuple[str, ...], Field(min_length=1, max_length=8)]] = Field(max_length=10_000)
    readout_depths: tuple[int, ...] = Field(min_length=1, max_length=10_000)
    readout_update: bool
    shift: bool
    lora_rank: int = Field(0, ge=0, le=1024)

    @model_validator(mode="after")
    def _chosen_atoms_exist(self) -> Structure:
        if self.top_k > self.num_atoms and (self.layers or self.readout_update):
            raise ValueError("no layer can choose more atoms than it has")
        if len(set(self.readout_depths)) != len(self.readout_depths) or any(
            len(set(types)) != len(types) for types in self.layers.values()
        ):
            raise ValueError("a depth or a module type is named twice")
        return self


class Manifest(Frozen):
    """The JSON in an adapter file's header."""

    format_version: str = Field(pattern=r"^\d{1,4}\.\d{1,4}$")
    config: AdapterConfig
    task: Task
    label_counts: tuple[Annotated[int, Field(ge=0)], ...]
    source: HostRecord
    training: TrainingRecord
    anchors: AnchorRecord
    parts: Parts = Parts()
    versions: dict[str, str]
    score: Score | None = None
    atoms_per_token: float | None = Field(default=None, ge=0)
    licence: str = Field("unspecified", max_length=500)

    @model_validator(mode="after")
    def _labels_agree(self) -> Manifest:
        if len(self.task.labels) != self.config.num_labels or len(self.label_counts) != self.config.num_labels:
            raise ValueError("number of labels differs between task, label counts and configuration")
        if self.task.kind != self.config.kind:
            raise ValueError("kind of task differs between task and configuration")
        return self
