"""Validated options of the commands, from which the command line is derived.  Importable without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from uhl_cli.commands.flags import Options
from uhl_cli.hub.reference import FetchedPath, local_name
from uhl_cli.schema import AdapterConfig, Strategy, TokenizerSource, TrainingConfig

# Defaults; both ship with the package.
DEFAULT_HOST = "builtin:base"
DEFAULT_TASK = "reviews"
# What `pretrain` writes, and the other commands read, when no file is named.
DEFAULT_ADAPTER = Path("adapter.safetensors")

# Values of `--teacher` that do not name a model.
TEACHERS = ("auto", "adapter", "lora")

# Options that do not affect a file's content; the command recorded in the file leaves them out.
_OF_THE_CALL = frozenset(
    {"output", "device", "offline", "trust-remote-code", "resume", "overwrite", "save-every", "optimise", "cache"}
)
_ALIGN = "alignment strategy; by default the one that the file was trained with"
_MAX_FLOPS = "FLOP limit in percent of the target's own; parts of the adapter are left out to stay within it"
_DEVICE = "device: cpu, cuda, cuda:1, mps, or auto for the best available"
_ADAPTER = "adapter file made by `uhl pretrain`, or its hub id as user/repo[@revision][:file]"
_OFFLINE = "use only local or cached files"
_ENCODING = "encoding of local text files, such as latin-1 or utf-16; by default UTF-8"
_OVERWRITE = "replace existing output"
CACHE = "take the alignment, and what was found about an unknown architecture, from the cache, and keep them there"
_RESUME = "continue an interrupted run"
_SAVE_EVERY = "steps between checkpoints"


def _deciding(options: Options, *others: str) -> dict[str, object]:
    """All options that affect the result of a run, for the run's identity.

    Hosts, data and files are identified by digests of their content, so their names do not count.
    """
    apart = {"data", "output", "resume", "overwrite", "save_every", "evaluation_batch_size", "cache", *others}
    return options.model_dump(mode="json", exclude=apart)


class HostOptions(Options):
    """Which host, and how it is loaded."""

    name: str = Field(description="hub id, local folder or builtin:NAME")
    revision: str | None = Field(None, description="branch, tag or commit of the host on the hub")
    device: str = Field("auto", description=_DEVICE)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="precision of the host's weights"
    )
    offline: bool = Field(False, description=_OFFLINE)
    trust_remote_code: bool = Field(False, description="run model code from the host's repository")
    tokenizer: TokenizerSource | None = Field(
        None,
        description="'file' for the tokenizer in tokenizer.json, 'class' for the one that transformers makes of its "
        "class; by default the file, with a warning if both give other tokens",
    )


class SourceOptions(HostOptions):
    """A host whose name is optional; for the source, `PretrainOptions.with_defaults` then chooses one."""

    name: str | None = Field(None, description="hub id, local folder or builtin:NAME")  # type: ignore[assignment]


class DataOptions(Options):
    """Which data, and which of its columns.  Without a task, the adapter's own task is used."""

    option_names: ClassVar = {"config": "data-config", "revision": "data-revision"}

    task: str | None = Field(None, description="task")
    data: str | None = Field(None, description="local file or folder, or hub id, to read the task's data from")
    config: str | None = Field(None, description="configuration of a hub data set")
    revision: str | None = Field(None, description="revision of a hub data set")
    train_split: str | None = Field(None, description="split to train on")
    evaluation_split: str | None = Field(None, description="split to score on")
    text_column: str | None = Field(None, description="column of the text")
    pair_column: str | None = Field(None, description="column of the second text")
    label_column: str | None = Field(None, description="column of the label, or of the tags")
    tokens_column: str | None = Field(None, description="column of the words of a token task")
    limit_train: int | None = Field(None, ge=1, description="train on a random subset of this size")
    limit_evaluation: int | None = Field(None, ge=1, description="score on a random subset of this size")
    encoding: str | None = Field(None, description=_ENCODING)


_TRAIN_DATA = frozenset({"data.train_split", "data.limit_train"})


class PretrainOptions(Options):
    """All of `uhl pretrain`.  The source's word states define canonical space.

    :param feature_words: Maximum number of words in the feature bank, which uses the bytes of `max_bytes` that the
        anchors leave free.  None: automatic, without a bank if text or room is lacking.  A number requires a bank; 0
        means no bank.
    """

    option_names: ClassVar = {"host.name": "host", "adapter.strategy": "align"}
    not_options = frozenset(
        {f"adapter.{name}" for name in AdapterConfig.model_fields if name != "strategy"}
        | {"training.delta_weight", "training.gradient_clip", "training.schedule", "evaluation_batch_size"}
    )

    host: SourceOptions = Field(
        SourceOptions(),
        description="hub id, local folder or builtin:NAME of the source model; by default builtin:base, or the base of "
        "the model that --teacher names",
    )
    data: DataOptions = Field(
        DataOptions(),
        description="task to train on: reviews, sst2, boolq, conll2003, amazon, or a hub id, file or folder of "
        "your own data; by default what --data names, else reviews. With a model as --teacher no labels are needed: a "
        ".txt file with one text per line is enough, and without any data sentences of this package are used",
    )
    output: Path = Field(DEFAULT_ADAPTER, description="path of the adapter file to write")
    anchors: str | None = Field(
        None,
        description="texts to align with. They are SHIPPED IN THE FILE. By default words from the task's own training "
        "texts. If your training text is confidential: 'general' for sentences of this package, or FILE for texts of "
        "your own (one per line)",
    )
    num_anchors: int = Field(512, ge=32, le=20_000, description="number of anchor words, about 250 bytes each")
    feature_words: int | None = Field(
        None,
        ge=0,
        le=200_000,
        description="maximum number of words in the feature bank, whose texts also ship in the file; 0 for no bank. By "
        "default it uses the bytes of --max-bytes that the anchors leave free, if there is text for it",
    )
    transfer_set: str = Field(
        "auto",
        description="texts that SHIP IN THE FILE with the teacher's outputs, so that any target can be tuned without "
        "labels: 'auto' for as many of the task's training texts as fit, a number for at most that many, 'general' for "
        "sentences of this package (the file then holds no text), FILE for your own (one text per line), 0 for none. "
        "With --anchors general or FILE, 'auto' uses the same source of texts",
    )
    teacher: str = Field(
        "auto",
        description="model whose outputs the transfer set holds: 'adapter' for the source with the finished adapter, "
        "'lora' for a LoRA that is trained as well and then discarded, 'auto' for the better of the two on held-out "
        "training examples; or a fine-tuned classifier of your own (hub id, folder, or PEFT folder), which then "
        "replaces labels, in training too",
    )
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    licence: str = Field("unspecified", max_length=500, description="licence to record in the file")
    max_bytes: int = Field(
        1_000_000,
        ge=1,
        description="maximum size of the file, checked before training; the feature bank fills what is left of it",
    )
    max_flops: float = Field(10.0, gt=0, description="FLOP limit on the source, in percent")
    evaluation_batch_size: int = Field(64, ge=1)
    resume: bool = Field(False, description=_RESUME)
    overwrite: bool = Field(False, description=_OVERWRITE)
    save_every: int = Field(200, ge=1, description=_SAVE_EVERY)

    @field_validator("host", mode="before")
    @classmethod
    def _host_of_any_kind(cls, value: object) -> object:
        return value.model_dump() if isinstance(value, HostOptions) else value

    @property
    def classifier(self) -> str | None:
        """The model that `teacher` names; None for `TEACHERS`."""
        return None if self.teacher in TEACHERS else self.teacher

    def with_defaults(self, base: str | None = None) -> PretrainOptions:
        """The options with defaults for host, task and anchors where they were not given.

        :param base: Name of the base model of the classifier that replaces labels, if there is one.
        """
        host, data, anchors = self.host, self.data, self.anchors
        if host.name is None:
            host = host.model_copy(update={"name": base or DEFAULT_HOST})
        if self.classifier is None and data.task is None:  # data alone is a task of the user's own
            data = data.model_copy(update={"task": data.data or DEFAULT_TASK, "data": None})
        elif data.task is None and data.data is None:  # the package's own texts, which no file needs to hold
            anchors = anchors or "general"
        return self.model_copy(update={"host": host, "data": data, "anchors": anchors})

    def deciding(self) -> dict[str, object]:
        """Every option that affects the result; a checkpoint made with other values is refused."""
        return _deciding(self, "host", "licence") | {"dtype": self.host.dtype}

    def command(self) -> str:
        """The command line that makes the same file, without the options that do not affect its content."""
        return self.said("uhl pretrain", always=frozenset({"host", "task"}), never=_OF_THE_CALL)


class PortOptions(Options):
    """All of `uhl port`."""

    argument = "adapter"
    files = ("adapter", "task_file")
    option_names: ClassVar = {"target.name": "target", "strategy": "align"}
    not_options = _TRAIN_DATA

    adapter: Path = Field(DEFAULT_ADAPTER, description=_ADAPTER)
    target: HostOptions = Field(description="hub id, local folder or builtin:NAME of the model to port to")
    data: DataOptions = Field(DataOptions(), description="task to score on; by default the adapter's")
    task_file: Path | None = Field(
        None,
        description="task file or LoRA folder made by `uhl tune`, or the hub id of a task file, to use with the "
        "adapter; scores are then those of the tuned model",
    )
    strategy: Strategy | None = Field(None, description=_ALIGN)
    score: bool = Field(True, description="score zero-shot if the data is available")
    controls: bool = Field(
        False,
        description="also score the controls, such as random updates and the readout alone, each by another pass over "
        "the data",
    )
    batch_size: int = Field(64, ge=1, description="texts per batch when scoring")
    max_flops: float = Field(10.0, gt=0, description=_MAX_FLOPS)
    seed: int = Field(0, ge=0, description="seed of the random-update control and of subsets")
    cache: bool = Field(True, description=CACHE)
    output: Path | None = Field(
        None, description="folder to save the ported adapter in, which loads without aligning again"
    )
    overwrite: bool = Field(False, description=_OVERWRITE)

    @property
    def data_required(self) -> bool:
        """Whether `data` names any data or column, which must then be found; otherwise missing data is not an error."""
        return self.data.model_copy(update={"limit_evaluation": None}) != DataOptions()


def tuning_defaults() -> TrainingConfig:
    """Default training of `uhl tune`: 500 steps of delta-theta, without noise or update dropout."""
    return TrainingConfig(
        max_steps=500,
        learning_rate=0.1,
        readout_learning_rate=8e-3,
        weight_decay=0.0,
        noise=0.0,
        update_dropout=0.0,
    )


# Training settings that are no options of `tune`; `--max-length` is a field of its own.
_NOT_TUNED = frozenset(
    f"training.{name}"
    for name in TrainingConfig.model_fields
    if name
    not in {
        "max_steps",
        "batch_size",
        "learning_rate",
        "readout_learning_rate",
        "warmup_fraction",
        "active_weight",
        "delta_weight",
        "seed",
    }
)


TuneMode = Literal["labels", "transfer", "lora"]
# (steps, learning rate, learning rate of the readout) by what is tuned.
_TUNING: dict[TuneMode, tuple[int, float, float]] = {
    "labels": (500, 0.1, 8e-3),
    "transfer": (500, 0.02, 0.0),
    "lora": (1500, 1.5e-3, 5e-4),
}


# Options that concern only atoms and their gains.
_OF_ATOMS = ("top_k", "training.active_weight", "training.delta_weight")


class TuneTraining(TrainingConfig):
    """Training of `uhl tune`.  The default for None depends on what is tuned, see `with_defaults`."""

    # None where the base class has a number: the default depends on what is tuned.
    max_steps: int | None = Field(
        None, ge=1, description="training steps; by default 500 for delta-theta, 1,500 for a LoRA"
    )
    learning_rate: float | None = Field(  # type: ignore[assignment]
        None,
        gt=0,
        le=1,
        description="peak learning rate; by default 0.1 for delta-theta with labels, 0.02 without, 0.0015 for a LoRA",
    )
    readout_learning_rate: float | None = Field(  # type: ignore[assignment]
        None,
        gt=0,
        le=1,
        description="peak learning rate of the readout, if it is trained; by default 0.0005 with a LoRA, 0.008 for a "
        "new task",
    )
    weight_decay: float = 0.0
    noise: float = 0.0
    update_dropout: float = 0.0

    def with_defaults(self, mode: TuneMode) -> TrainingConfig:
        """The configuration with every None replaced by the default for what is tuned."""
        steps, rate, readout_rate = _TUNING[mode]
        values = self.model_dump()
        defaults = {"max_steps": steps, "learning_rate": rate, "readout_learning_rate": readout_rate or 8e-3}
        return TrainingConfig(**values | {name: value for name, value in defaults.items() if values[name] is None})


class TuneOptions(Options):
    """All of `uhl tune`.  By default the task file is written next to the adapter, see `output_path`."""

    argument = "adapter"
    files = ("adapter",)
    option_names: ClassVar = {"target.name": "target", "strategy": "align", "training.max_steps": "steps"}
    option_help: ClassVar = {"max_flops": f"{_MAX_FLOPS}; a LoRA is not counted"}
    not_options = _NOT_TUNED | {"evaluation_batch_size"}

    adapter: Path = Field(DEFAULT_ADAPTER, description=_ADAPTER)
    target: HostOptions = Field(description="hub id, local folder or builtin:NAME of the model to tune on")
    data: DataOptions = Field(
        DataOptions(),
        description="task to tune on with labels; a task other than the adapter's gets a new readout. With "
        "neither --task nor --data, the adapter is tuned without labels, on the transfer set in its file",
    )
    score_data: str | None = Field(
        None,
        description="evaluation data to score on when tuning without labels: local file or folder, or hub id; used for "
        "scores only",
    )
    parameters: Literal["delta-theta", "lora"] = Field(
        "delta-theta",
        description="what to tune: delta-theta (512 bytes), or a LoRA on all linear modules and a readout",
    )
    rank: int = Field(8, ge=1, le=256, description="rank of the LoRA")
    strategy: Strategy | None = Field(None, description=_ALIGN)
    cache: bool = Field(True, description=CACHE)
    training: TuneTraining = TuneTraining()
    top_k: int | None = Field(
        None, ge=1, le=2, description="most active atoms per token; by default the adapter's own number"
    )
    max_length: int | None = Field(
        None,
        ge=4,
        le=100_000,
        description="longest input in tokens, in training and scoring; by default what the adapter was trained with",
    )
    optimise: int = Field(
        0,
        ge=0,
        le=10_000,
        description="first search the learning rates (for delta-theta with labels also lambda_F, lambda_Q and top-k) "
        "with this many trials, on a held-out part of the training data or of the transfer set (needs optuna: "
        "pip install 'uhl[optimise]')",
    )
    max_flops: float = Field(10.0, gt=0, description=_MAX_FLOPS)
    evaluation_batch_size: int = Field(64, ge=1)
    output: Path | None = Field(
        None,
        description="path of the task file; by default ADAPTER.TASK.TARGET.task.safetensors next to the adapter. A "
        "LoRA is written to a folder, by default ADAPTER.TASK.TARGET.lora",
    )
    resume: bool = Field(False, description=_RESUME)
    overwrite: bool = Field(False, description=_OVERWRITE)
    save_every: int = Field(200, ge=1, description=_SAVE_EVERY)

    @field_validator("training", mode="before")
    @classmethod
    def _training_of_any_kind(cls, value: object) -> object:
        return value.model_dump() if isinstance(value, TrainingConfig) else value

    @property
    def labelled(self) -> bool:
        """Whether to tune with labels; without task and data, the transfer set is used."""
        return self.data.task is not None or self.data.data is not None

    @property
    def mode(self) -> TuneMode:
        """What is tuned, and by what."""
        if self.parameters == "lora":
            return "lora"
        return "labels" if self.labelled else "transfer"

    def refuse_idle(self) -> None:
        """Refuse options that were given and would have no effect.

        :raises UsageError: When an option that does not apply to what is tuned is not at its default.
        """
        idle: dict[str, str] = {}
        if self.parameters == "lora":
            idle |= dict.fromkeys(_OF_ATOMS, "a LoRA has no active atoms, and no delta-theta")
        else:
            idle["rank"] = "it is the rank of a LoRA: add --parameters lora"
        if self.mode == "transfer":
            idle |= dict.fromkeys(_OF_ATOMS, "without labels there are no active atoms: name --task or --data")
            idle["training.readout_learning_rate"] = "delta-theta without labels keeps the ported readout"
        self.refuse_given(idle | _idle_data(self.data, self.labelled, self.score_data))

    def output_path(self, task: str) -> Path:
        """`--output`, or ADAPTER.TASK.TARGET.task.safetensors (ADAPTER.TASK.TARGET.lora) next to the adapter.

        For an adapter from the hub, it is in the current folder.
        """
        if self.output is not None:
            return self.output
        ending = "lora" if self.parameters == "lora" else "task.safetensors"
        names = (re.sub(r"[^A-Za-z0-9_-]+", "-", Path(part).name).strip("-") for part in (task, self.target.name))
        if isinstance(self.adapter, FetchedPath) and (reference := self.adapter.reference) is not None:
            return Path(".".join([reference.stem, *names, ending]))
        return self.adapter.with_name(".".join([self.adapter.stem, *names, ending]))

    def deciding(self) -> dict[str, object]:
        """Every option that affects the result; a checkpoint made with other values is refused."""
        return _deciding(self, "adapter", "target", "optimise", "score_data") | {"dtype": self.target.dtype}

    def command(self, task: str) -> str:
        """The command line that makes the same file; see `PretrainOptions.command`."""
        data = self.data.model_copy(update={"task": task}) if self.labelled else self.data
        named = self.model_copy(update={"adapter": Path(local_name(self.adapter)), "data": data})
        always = frozenset({"target", "task"} if self.labelled else {"target"})
        return named.said("uhl tune", always=always, never=_OF_THE_CALL)


class DemoOptions(Options):
    """All of `uhl demo`; source, target and task are builtin by default."""

    source: str = Field(DEFAULT_HOST, description="model to train the adapter on")
    target: str = Field("builtin:small", description="model of another shape to port it to")
    task: str = Field(DEFAULT_TASK, description="task to train on")
    epochs: float = Field(4.0, gt=0, le=1000, description="passes over the training data")
    tune_steps: int = Field(500, ge=1, description="steps of tuning on the target, without labels")
    device: str = Field("auto", description=_DEVICE)
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of everything random")
    output: Path | None = Field(
        None, description="folder to save the adapter and the tuned LoRA in; by default they are deleted"
    )


class PredictOptions(Options):
    """All of `uhl predict`."""

    argument = "adapter"
    files = ("adapter", "task_file")
    rest = "texts"
    option_names: ClassVar = {"target.name": "target", "strategy": "align"}

    adapter: Path = Field(
        DEFAULT_ADAPTER,
        description="adapter file or its hub id as user/repo[@revision][:file], folder made by `uhl port --output` or "
        "`uhl tune --parameters lora`, or folder with a transformers or peft classifier, such as `uhl export` writes",
    )
    texts: tuple[str, ...] = Field(
        (), description="texts to label; for a task on pairs, two per pair. Put -- before one that begins with a dash"
    )
    target: SourceOptions = Field(
        SourceOptions(),
        description="hub id, local folder or builtin:NAME of the model to run on; required with an adapter file. A "
        "ported folder records its model; give this if that model is elsewhere now",
    )
    task_file: Path | None = Field(
        None,
        description="task file or LoRA folder made by `uhl tune`, or the hub id of a task file, to use with the "
        "adapter file",
    )
    input: str | None = Field(
        None,
        description="file of texts: .txt (one per line), .csv, .tsv, .jsonl, .parquet or .conll, or - for stdin, which "
        "is the default if no texts are given",
    )
    format: Literal["txt", "csv", "tsv", "jsonl", "parquet", "conll"] | None = Field(
        None, description="format of the input; by default from the file extension, and txt for stdin"
    )
    encoding: str | None = Field(None, description=_ENCODING)
    text_column: str | None = Field(None, description="column of the text; a token classifier splits it at white space")
    pair_column: str | None = Field(None, description="column of the second text")
    tokens_column: str | None = Field(None, description="column of the lists of words")
    batch_size: int = Field(64, ge=1, le=100_000, description="texts per batch")
    max_length: int | None = Field(
        None,
        ge=4,
        le=100_000,
        description="longest input in tokens; by default what the model was trained with. Longer texts are cut",
    )
    strategy: Strategy | None = Field(None, description=_ALIGN)
    max_flops: float = Field(10.0, gt=0, description=_MAX_FLOPS)
    cache: bool = Field(True, description=CACHE)
    top_k: int | None = Field(None, ge=1, description="keep only the largest N probabilities of each text")
    threshold: float | None = Field(
        None, gt=0, le=1, description="leave the label empty if the largest probability is below this"
    )
    prefix: str = Field("", description="prefix of the names of the added columns")
    output: Path | None = Field(
        None, description="file for the result, .csv, .tsv, .jsonl or .parquet; by default it goes to stdout"
    )
    overwrite: bool = Field(False, description=_OVERWRITE)


class ExportOptions(Options):
    """All of `uhl export`.  It trains a LoRA like `uhl tune --parameters lora`, but with a standard head."""

    argument = "adapter"
    files = ("adapter", "task_file")
    option_names: ClassVar = {"target.name": "target", "strategy": "align", "training.max_steps": "steps"}
    option_help: ClassVar = {
        "training.max_steps": "training steps; by default 1,500",
        "training.learning_rate": "peak learning rate of the LoRA; by default 0.0015",
        "training.readout_learning_rate": "peak learning rate of the head; by default 0.0005",
    }
    not_options = (
        _NOT_TUNED
        | {"training.active_weight", "training.delta_weight"}
        | {"target.dtype", "target.trust_remote_code", "evaluation_batch_size"}
    )

    adapter: Path = Field(DEFAULT_ADAPTER, description=_ADAPTER)
    target: HostOptions = Field(description="hub id, local folder or builtin:NAME of the model to export")
    output: Path = Field(description="folder for the export; written whole or not at all")
    format: Literal["merged", "peft"] = Field(
        "merged",
        description="'merged' for a checkpoint of the target's size with its family's standard head, 'peft' for a LoRA "
        "and a head",
    )
    base: str | None = Field(
        None,
        max_length=4000,
        pattern=r"^\S(.*\S)?$",
        description="base model that a peft export names: a hub id or path that others can load, or 'copy' to write it "
        "into the folder; by default the target, which is copied if it is builtin",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the saved weights; training runs in float32"
    )
    data: DataOptions = Field(
        DataOptions(), description="task of labelled data to learn from as well; it must have the adapter's labels"
    )
    texts: Path | None = Field(
        None,
        description="file of texts to learn from in place of the transfer set, one per line; the targets are the "
        "outputs of the ported model (with --task-file the tuned one). Needed if the adapter file has no transfer set",
    )
    task_file: Path | None = Field(
        None,
        description="output of `uhl tune` for this target, or the hub id of a task file: the export starts from a LoRA "
        "folder, and takes a task file as a second teacher",
    )
    score_data: str | None = Field(
        None, description="evaluation data to score on: local file or folder, or hub id; used for scores only"
    )
    rank: int = Field(8, ge=1, le=256, description="rank of the LoRA; that of the --task-file, if this is a LoRA")
    strategy: Strategy | None = Field(None, description=_ALIGN)
    cache: bool = Field(True, description=CACHE)
    training: TuneTraining = TuneTraining()
    max_length: int | None = Field(
        None,
        ge=4,
        le=100_000,
        description="longest input in tokens, also for the saved tokenizer; by default what the adapter was trained "
        "with",
    )
    max_flops: float = Field(10.0, gt=0, description=_MAX_FLOPS)
    evaluation_batch_size: int = Field(64, ge=1)
    resume: bool = Field(False, description=_RESUME)
    overwrite: bool = Field(False, description=_OVERWRITE)
    save_every: int = Field(200, ge=1, description=_SAVE_EVERY)

    @field_validator("training", mode="before")
    @classmethod
    def _training_of_any_kind(cls, value: object) -> object:
        return value.model_dump() if isinstance(value, TrainingConfig) else value

    @property
    def labelled(self) -> bool:
        """Whether labelled data is named."""
        return self.data.task is not None or self.data.data is not None

    def refuse_idle(self) -> None:
        """Refuse options that were given and would have no effect.

        :raises UsageError: When an option that does not apply to this export is not at its default.
        """
        idle: dict[str, str] = _idle_data(self.data, self.labelled, self.score_data)
        if self.texts is not None:
            idle.pop("data.encoding", None)
        if self.format == "merged":
            idle["base"] = "a merged export has no base: add --format peft"
        self.refuse_given(idle)

    def deciding(self) -> dict[str, object]:
        """Every option that affects the result; a checkpoint made with other values is refused."""
        return _deciding(self, "adapter", "target", "format", "base", "dtype", "texts", "task_file", "score_data")

    def command(self) -> str:
        """The command line that makes the same export; see `PretrainOptions.command`."""
        named = self.model_copy(update={"adapter": Path(local_name(self.adapter))})
        return named.said("uhl export", always=frozenset({"target", "format"}), never=_OF_THE_CALL)


def _idle_data(data: DataOptions, labelled: bool, score_data: str | None) -> dict[str, str]:
    """Why options that name data or its columns have no effect, by the option's dotted path."""
    if labelled:
        return {"score_data": "--task and --data name the evaluation data too"}
    idle = {}
    for name in type(data).model_fields:
        if name in ("train_split", "limit_train"):
            idle[f"data.{name}"] = "there are no labels to train with: name --task or --data"
        elif score_data is None:
            idle[f"data.{name}"] = "no data is named: add --task, --data or --score-data"
    return idle


class PushOptions(Options):
    """All of `uhl push`."""

    argument = "file"
    rest = "repo"

    file: Path = Field(description="adapter file of `uhl pretrain`, or task file of `uhl tune`")
    repo: str = Field(description="repository on the hub, as user/name; it is made if there is none")
    license: str | None = Field(
        None,
        max_length=500,
        description="licence to name in the card, as an identifier of the hub such as mit or apache-2.0; by default "
        "the one recorded in the file",
    )
    language: tuple[str, ...] = Field((), description="language of the texts, such as en; may be repeated")
    private: bool = Field(False, description="make the repository private; an existing public one is refused")
    revision: str | None = Field(None, description="branch to upload to, which is made if there is none")
    message: str | None = Field(None, min_length=1, max_length=500, description="message of the commit")
    card: bool = Field(True, description="upload a model card (README.md) with the file")
    overwrite: bool = Field(False, description="replace another model card in the repository")
    dry_run: bool = Field(False, description="print the card and what would be uploaded, without any connection")
    yes: bool = Field(False, description="agree that the texts in the file become public, without being asked")


class HostsOptions(HostOptions):
    """All of `uhl hosts`."""

    argument = "name"
