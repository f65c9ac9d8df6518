"""Options and report of `inspect`, importable without torch.  `--json` prints exactly the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from uhl_cli.commands.flags import Options
from uhl_cli.commands.options import DEFAULT_ADAPTER
from uhl_cli.formats.folder import PortedRecord
from uhl_cli.formats.task import TaskRecord
from uhl_cli.metrics import Score
from uhl_cli.schema import Frozen, HostRecord, Manifest, TransferRecord

Group = Literal[
    "header", "updates", "size", "readout", "head-only control", "anchors", "features", "transfer", "LoRA", "other"
]
FileKind = Literal["adapter", "task", "ported"]


class InspectOptions(Options):
    """All of `uhl inspect`."""

    argument = "file"
    files = ("file", "diff")

    file: Path = Field(
        DEFAULT_ADAPTER,
        description="adapter file of `uhl pretrain`, task file or LoRA folder of `uhl tune`, or folder of `uhl port`; "
        "a file may be named by its hub id as user/repo[@revision][:file]",
    )
    anchors: bool = Field(False, description="print the texts of anchors and feature bank, with marked words")
    transfer: bool = Field(False, description="print the texts of the transfer set, with the teacher's labels")
    verify: bool = Field(False, description="check every rule of the format; print what is wrong and exit with code 1")
    diff: Path | None = Field(None, description="compare with another file of the same kind")
    plot: Path | None = Field(
        None, description="draw the report as figures: a .png, .svg or .pdf file (needs the extra `figures`)"
    )
    overwrite: bool = Field(False, description="replace existing output")
    offline: bool = Field(False, description="use only local or cached files")


class Part(Frozen):
    """One part of a file: a parameter with its scales, a table of the anchors, or the header."""

    name: str
    group: Group
    dtype: str = Field(description="type of the stored numbers, as numpy names it; json for the header")
    bits: float | None = Field(description="bits of one value, on average; None for the header and for compressed text")
    shape: tuple[int, ...] = Field(description="shape of the values, before packing; () for the header")
    scales: int = Field(description="number of float32 scales")
    bytes: int = Field(description="codes and scales together")
    share: float = Field(description="bytes over the file's bytes")


class Similarity(Frozen):
    """The two atoms that resemble each other most: the cosine of largest magnitude, with its sign."""

    cosine: float
    first: int
    second: int


class RowStatistics(Frozen):
    """Rows of one atom matrix, in canonical coordinates; statistics exclude unused atoms."""

    norms: tuple[float, ...] = Field(description="Euclidean norm of every atom's row")
    minimum: float
    median: float
    maximum: float
    closest: Similarity | None = Field(description="None with fewer than two rows that are not zero")


class AtomStatistics(Frozen):
    """The dictionary of atoms.  An atom whose row of U is zero has no effect on any host and is called unused."""

    count: int
    unused: tuple[int, ...]
    u: RowStatistics
    v: RowStatistics
    update: Similarity | None = Field(description="of the rank-one updates u v^T: product of both cosines")


class MixingWeights(Frozen):
    """Weights g(t, type) that scale every atom, over the used atoms (over all where none is used)."""

    depths: tuple[float, ...] = Field(description="normalised depths t: layer over number of layers")
    types: tuple[str, ...]
    mean: tuple[tuple[float, ...], ...] = Field(description="mean over atoms, [depths, types]")
    deviation: tuple[tuple[float, ...], ...] = Field(description="standard deviation over atoms, [depths, types]")


class AnchorText(Frozen):
    """One anchor text and the character spans of its anchor words."""

    text: str
    spans: tuple[tuple[int, int], ...]


class AnchorSummary(Frozen):
    """Anchors and feature bank; `entries` are their texts, if requested, those of the feature bank last."""

    origin: str
    texts: int
    words: int
    words_per_text: float
    texts_by_words: dict[int, int] = Field(description="how many texts have this number of anchor words")
    knots: tuple[float, ...]
    digest: str
    feature_texts: int = Field(0, description="texts of the feature bank")
    feature_words: int = Field(0, description="words whose readout features the file holds")
    entries: tuple[AnchorText, ...] | None = None


class TransferText(Frozen):
    """A text of the transfer set, and the teacher's most probable label; for a token task, one per word."""

    text: str
    pair: str | None
    labels: tuple[str, ...]


class TransferSummary(Frozen):
    """The transfer set; `entries` are its texts, without their spans, if requested."""

    record: TransferRecord
    label_counts: tuple[int, ...] = Field(description="number of predictions by their most probable label")
    entries: tuple[TransferText, ...] | None = None


class ReadoutSummary(Frozen):
    """The canonical readout: layer sizes `inputs`, `hidden`, and one logit per label."""

    kind: Literal["sequence", "tokens"]
    inputs: int
    hidden: int
    labels: tuple[str, ...]
    label_counts: tuple[int, ...] = Field(description="training examples (for a token task: words) of each label")
    parameters: int
    bytes: int


class TaskFileSummary(Frozen):
    """A task file of `uhl tune` that belongs to the adapter."""

    file: str
    task: str
    target: HostRecord
    own_task: bool
    before: Score | None
    score: Score | None
    bytes: int


class AdapterContent(Frozen):
    """What is in an adapter file.  The bytes of `parts` sum to the file's size."""

    digest: str = Field(description="SHA-256 of the content; task files name it")
    manifest: Manifest
    parts: tuple[Part, ...]
    atoms: AtomStatistics
    mixing: MixingWeights
    anchors: AnchorSummary
    transfer: TransferSummary | None = Field(None, description="None without a transfer set")
    readout: ReadoutSummary
    task_files: tuple[TaskFileSummary, ...] = Field(description="task files next to the file that belong to it")
    unreadable: tuple[str, ...] = Field(description="names next to the file that end like task files but are not")


class TaskContent(Frozen):
    """What is in a task file.  The bytes of `parts` sum to the file's size."""

    digest: str
    record: TaskRecord
    parts: tuple[Part, ...]
    types: tuple[str, ...]
    delta_theta: tuple[tuple[float, ...], ...] = Field(description="values, [types, atoms]")
    root_mean_square: tuple[float, ...] = Field(description="of delta-theta over atoms, one per type")
    readout: ReadoutSummary | None = Field(description="None if the adapter's own readout is used")
    adapter: str | None = Field(description="name of the adapter next to it that it belongs to")


class LoraSummary(Frozen):
    """A LoRA on `modules` linear modules."""

    rank: int
    modules: int
    parameters: int
    bytes: int


class PortedContent(Frozen):
    """What is in a ported adapter's folder.  The bytes of `parts` sum to its file's size."""

    digest: str
    record: PortedRecord
    parts: tuple[Part, ...]
    lora: LoraSummary | None = Field(description="None where `uhl port` made it without one")
    adapter: str | None = Field(description="name of the adapter next to the folder that it was tuned from")


class Verification(Frozen):
    """Broken rules that `--verify` found; empty if the file is valid."""

    problems: tuple[str, ...]


class FieldDifference(Frozen):
    """A field of the header, its name dotted, and its JSON text in both files; None where it is missing."""

    name: str
    first: str | None
    second: str | None


class PartDifference(Frozen):
    """A part whose values differ.

    :param relative: Euclidean norm of the difference over the larger of both norms, in [0, 2]; None where the
        shapes differ or one file lacks the part.
    """

    name: str
    first: tuple[int, ...] | None
    second: tuple[int, ...] | None
    relative: float | None


class AnchorDifference(Frozen):
    """How many anchor texts and words two adapters share.

    :param relative: Relative difference of the coordinates of the shared words, as in `PartDifference`; None where
        no word is shared or the knots or canonical sizes differ.
    """

    first_texts: int
    second_texts: int
    common_texts: int
    first_words: int
    second_words: int
    common_words: int
    relative: float | None


class TransferDifference(Frozen):
    """How many texts the transfer sets of two adapters share; 0 of one that has none."""

    first_texts: int
    second_texts: int
    common_texts: int | None = Field(description="None where this uhl lacks the texts of one of them")


class Comparison(Frozen):
    """What `--diff` found.  `identical` refers to the bytes; `same_parts` counts the parts with equal values."""

    other: str
    other_bytes: int
    identical: bool
    fields: tuple[FieldDifference, ...]
    parts: tuple[PartDifference, ...]
    same_parts: int
    anchors: AnchorDifference | None
    transfer: TransferDifference | None = Field(None, description="None where neither file has a transfer set")


class InspectReport(Frozen):
    """What `inspect` found: exactly one of `adapter`, `task`, `ported`, `verification` and `comparison` is set.

    :param kind: None if a file under verification is neither an adapter nor a task file nor a ported adapter.
    :param format_version: None if a file under verification does not state it.
    """

    file: str
    kind: FileKind | None
    format_version: str | None
    bytes: int
    adapter: AdapterContent | None = None
    task: TaskContent | None = None
    ported: PortedContent | None = None
    verification: Verification | None = None
    comparison: Comparison | None = None
    plot: str | None = None
