"""Reports: the results of the commands, as data.  `--json` prints exactly these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from pydantic import Field

from uhl_cli.metrics import Difference, Score
from uhl_cli.schema import Degree, Fingerprint, Frozen, HostRecord


class Reporter(Protocol):
    """Receives progress; the command line draws a bar from it, a library user may ignore it."""

    def __call__(self, label: str, done: int, total: int | None, note: str = "") -> None:
        """`done` of `total` parts (None: not known) of the phase `label`; `note` is shown beside the bar."""


def silent(label: str, done: int, total: int | None, note: str = "") -> None:
    """A reporter that does nothing."""


def phase(reporter: Reporter, label: str) -> Callable[[int, int], None]:
    """A reporter of one phase, as a function of (done, total)."""
    return lambda done, total: reporter(label, done, total)


class DepthQuality(Frozen):
    """How well one depth of a host predicts canonical coordinates of held-out anchor texts."""

    depth: int
    normalised_depth: float
    r2: float


class FlopReport(Frozen):
    """FLOPs of one forward pass over one sequence; a multiply-add is two."""

    sequence_length: int
    host: int
    adapter: int
    percent: float


class PretrainReport(Frozen):
    """What `pretrain` did."""

    output: str
    bytes: int
    source: HostRecord
    task: str
    train_examples: int
    steps: int
    seconds: float
    score: Score | None
    head_only: Score | None
    readout_only: Score | None
    teacher: str | None = Field(description="name of the transfer set's teacher; None without one")
    teacher_score: Score | None = Field(description="its score on the evaluation data")
    teachers: dict[str, Score] = Field(description="scores of the candidate teachers, on held-out training examples")
    atoms_per_token: float | None
    truncated: int = Field(description="evaluation texts that were cut at the longest input")
    quality: tuple[DepthQuality, ...]
    anchor_words: int
    feature_words: int
    transfer_texts: int
    transfer_examples: int = Field(description="texts of the transfer set and their spans")
    user_texts: int = Field(description="different texts in the file that are not uhl's own")
    flops: FlopReport


class CalibrationReport(Frozen):
    """How `port` calibrated the adapter by its transfer set; see `ported.calibrate`."""

    texts: int = Field(description="texts of the transfer set that the target read")
    strength: float = Field(description="how strongly the updates act; 0 leaves them out")
    offsets: tuple[float, ...] = Field(description="what was added to the logits, one number per class")
    cross_entropy: dict[float, float] = Field(description="to the teacher's outputs, in nats, by strength")


Verdict = Literal["good", "tune", "unusable", "pretrain"]


class ExpectedScore(Frozen):
    """The accuracy on the task that a port's agreement with the teacher promises, with a 95 % interval."""

    value: float
    low: float
    high: float
    chance: float = Field(description="accuracy of answers at random, with the port's share of each class")
    constant: float = Field(description="accuracy of always answering the training labels' most frequent class")
    teacher: float = Field(description="the teacher's accuracy on the evaluation data of pretraining")


class AgreementReport(Frozen):
    """How far a port agrees with the transfer set's teacher on held-out texts, and what that is worth."""

    score: Score = Field(description="the task's metric against the teacher's most probable classes")
    texts: int = Field(description="held-out texts that were read, each with its spans")
    kappa: float = Field(description="share of equal answers beyond chance: 1 is all, 0 no more than by chance")
    expected: ExpectedScore | None = Field(
        description="None for token tasks, other metrics than accuracy, and teachers without a score"
    )
    verdict: Verdict = Field(
        description='"tune": `uhl tune` is needed first; "pretrain": the teacher is no better than a constant answer'
    )


class PortReport(Frozen):
    """What `port` did.  `scores` has "ported" and what it is compared with, with --controls all; `gains` is paired."""

    adapter: str
    bytes: int = Field(description="of the adapter file, or of the file in a LoRA's folder, which is used in its place")
    target: HostRecord
    degree: Degree = Field(description="what of the target can be edited, see `HostReport`")
    strategy: str
    task: str
    source: str
    source_score: Score | None
    parameters: Literal["gains", "low-rank", "lora"] | None = Field(
        None, description="what the task file, or the LoRA's folder, tuned; None zero-shot"
    )
    supervision: Literal["labels", "transfer set"] | None = Field(None, description="what it was tuned by")
    alignment_cached: bool = Field(False, description="the alignment was kept by an earlier call, not fitted by this")
    quality: tuple[DepthQuality, ...]
    readout_quality: tuple[float, ...] = Field(
        description="held-out R^2 of a readout's canonical coordinates, one per knot; empty with a feature bank"
    )
    feature_quality: float | None = Field(
        None, description="held-out R^2 of the readout's features by the feature bank, if there is one; 0.88 at most"
    )
    calibration: CalibrationReport | None = Field(None, description="None without a transfer set")
    agreement: AgreementReport | None = Field(None, description="None if it was not judged, see `not_judged`")
    not_judged: str | None = Field(None, description="why there is no agreement; None if there is one")
    left_out: tuple[str, ...]
    flops: FlopReport
    seconds: dict[str, float]
    data: str | None
    scores: dict[str, Score]
    gains: dict[str, Difference]
    atoms_per_token: float | None
    truncated: int = Field(description="evaluation texts that were cut at the longest input")
    output: str | None = None


class Trial(Frozen):
    """One trial of a search: its values and its score on held-out examples.  A value not searched is None."""

    number: int
    learning_rate: float = Field(gt=0)
    active_weight: float | None = Field(None, gt=0)
    delta_weight: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=1, le=2)
    readout_learning_rate: float | None = Field(None, gt=0, description="None if no readout is trained")
    rank: int | None = Field(None, ge=1, description="searched by `uhl compare` alone, as the batch size")
    batch_size: int | None = Field(None, ge=1)
    score: float


class SearchReport(Frozen):
    """What `tune --optimise` tried; `best` is the number of the trial whose values the task file was tuned with."""

    trials: tuple[Trial, ...]
    best: int
    held_out: int = Field(description="number of held-out examples that trials were scored on")
    ranges: dict[str, tuple[float, float]] = Field(description="ranges at the end, widened where needed")


class TuneReport(Frozen):
    """What `tune` did.  `scores` has "tuned" and its comparisons; `gains` is tuned minus each, paired."""

    output: str
    adapter: str
    target: HostRecord
    degree: Degree = Field(description="what of the target can be edited, see `HostReport`")
    task: str
    own_task: bool = Field(description="the adapter's own readout is used; otherwise a new one was trained")
    parameters: Literal["delta-theta", "lora"] = Field(description="what was tuned")
    supervision: Literal["labels", "transfer set"] = Field(description="what it was tuned by")
    delta_bytes: int = Field(description="bytes of delta-theta's codes; 0 for a LoRA")
    lora_bytes: int = Field(description="bytes of the LoRA's factors; 0 for delta-theta")
    readout_bytes: int = Field(description="bytes of a readout that was trained; 0 if the ported one is kept")
    bytes: int = Field(description="bytes of the task file, or of the LoRA's folder")
    train_examples: int
    unread: int = Field(0, description="examples of the transfer set whose every token is unknown to the target")
    steps: int
    seconds: float
    agreement: dict[str, Score] = Field(
        description='without labels: "zero_shot" and "tuned" against the teacher, on held-out texts of the transfer set'
    )
    scores: dict[str, Score]
    gains: dict[str, Difference]
    atoms_per_token: float | None
    truncated: int
    flops: FlopReport
    left_out: tuple[str, ...]
    search: SearchReport | None = None


class DemoReport(Frozen):
    """What `demo` did: the reports of its three steps."""

    pretrain: PretrainReport
    port: PortReport
    tune: TuneReport
    max_bytes: int = Field(description="limit of the file's size")
    max_flops: float = Field(description="limit on source and target, in percent of the host's own FLOPs")
    output: str | None = Field(description="folder of the files; None if they were deleted")
    seconds: float


class PredictReport(Frozen):
    """What `predict` did."""

    model: str = Field(description="name of the host, or of the classifier, that ran")
    texts: int
    labels: dict[str, int] = Field(description="texts by label, or entities, or words if tags are not of entities")
    unsure: int = Field(description="texts, or words, whose label is empty: below --threshold, or cut off")
    truncated: int = Field(description="texts that were cut at the longest input")
    seconds: float = Field(description="of labelling, without loading and aligning")
    output: str | None = None


class RoundingReport(Frozen):
    """What saving in a smaller type than float32 changed, on the examples that the export was scored on."""

    dtype: str
    predictions: int
    largest: float = Field(description="largest difference of a logit")
    moved: int = Field(description="predictions whose class changed")


class ExportReport(Frozen):
    """What `export` did.  `scores` has "export" and its comparisons; `gains` is the export minus each."""

    output: str
    format: Literal["merged", "peft"]
    adapter: str
    target: HostRecord
    task: str
    base: str | None = Field(description="base that a peft export names; None for a merged one")
    arguments: dict[str, object] = Field(
        description="arguments that loading a peft export needs because its base has other settings"
    )
    files: dict[str, int] = Field(description="bytes by file")
    bytes: int
    rank: int
    teachers: tuple[str, ...] = Field(description="what it learnt from")
    train_examples: int
    unread: int = Field(0, description="examples of the transfer set whose every token is unknown to the target")
    steps: int
    seconds: float
    agreement: dict[str, Score] = Field(
        description='"export", "zero_shot" and with a task file "tuned" against the teacher, on held-out texts'
    )
    scores: dict[str, Score]
    gains: dict[str, Difference]
    truncated: int = Field(description="evaluation texts that were cut at the longest input")
    rounding: RoundingReport | None = Field(description="None if it is saved in float32")


class ModuleReport(Frozen):
    """A target module of a layer.

    :param features: Its output features among the module's, such as "0-15, 48-63"; None for all.
    :param space: What its edit is added to: "stream", or the input of "attention" or of the "mlp".
    :param added_by: The module whose output is added to the stream, if that is not the module itself.
    :param scale: What the host multiplies its output by before it is added.
    :param experts: It is a whole block of experts.
    """

    name: str
    in_features: int
    out_features: int
    features: str | None
    space: str
    added_by: str | None
    scale: float
    experts: bool


class LayerReport(Frozen):
    """A layer: its target modules by type, other linear modules, and why target modules are missing.

    :param call: Number of the call, where several layers share one module.
    """

    index: int
    name: str
    call: int | None
    modules: dict[str, ModuleReport]
    others: tuple[str, ...]
    problem: str


class HostReport(Frozen):
    """What `uhl hosts` found.

    :param degree: Modules of "all" layers can be edited, of "some", or of none: the "stream" alone is read.
    :param seconds: Wall-clock time of loading, finding and proving.
    """

    host: str
    fingerprint: Fingerprint
    degree: Degree
    decoder: bool
    max_length: int
    embeddings: str
    pooler: str | None
    layers: tuple[LayerReport, ...]
    seconds: float


class PushReport(Frozen):
    """What `push` did, or with --dry-run would do."""

    file: str
    repo: str
    revision: str | None = Field(description="the branch; None for the main one")
    files: dict[str, int] = Field(description="bytes of the files by their name in the repository")
    texts: dict[str, int] = Field(description="how many texts the file makes public, by the part that holds them")
    card: str | None = Field(description="the model card; None without one")
    url: str | None = Field(description="page of the repository; None for a dry run")
    commit: str | None = Field(description="commit that has the files; None for a dry run")
    changed: bool = Field(description="whether there is a new commit")
    private: bool | None = Field(description="whether the repository is private; None for a dry run")
