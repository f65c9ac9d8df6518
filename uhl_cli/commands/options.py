"""Options of the commands, validated, importable without torch; those of the command line are derived from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from uhl_cli.commands.flags import Options
from uhl_cli.schema import AdapterConfig, Strategy, TrainingConfig

# What a command takes when nothing is named: both ship with the package.
DEFAULT_HOST = "builtin:base"
DEFAULT_TASK = "reviews"
# What `pretrain` writes, and the other commands read, when no file is named.
DEFAULT_ADAPTER = Path("adapter.safetensors")

# What `--teacher` takes that is no model.
TEACHERS = ("auto", "adapter", "lora")

# Options that decide nothing of a file's content, so that the command kept in it leaves them out.
_OF_THE_CALL = frozenset(
    {"output", "device", "offline", "trust-remote-code", "resume", "overwrite", "save-every", "optimise"}
)
_ALIGN = "alignment strategy; by default the one that the file was trained with"
_MAX_FLOPS = "FLOP limit in percent of the target's own; parts are left out to hold it"
_DEVICE = "where to compute: cpu, cuda, cuda:1, mps, or auto for the best there is"
_OVERWRITE = "replace what already exists"
_RESUME = "go on with an interrupted run"
_SAVE_EVERY = "steps between checkpoints"


def _deciding(options: Options, *others: str) -> dict[str, object]:
    """All options but those that do not decide the course of a run, for its identity.

    A host, data and files are named by digests of their content instead, so how they are named does not count.
    """
    apart = {"data", "output", "resume", "overwrite", "save_every", "evaluation_batch_size", *others}
    return options.model_dump(mode="json", exclude=apart)


class HostOptions(Options):
    """Which host, and how it is loaded."""

    name: str = Field(description="hub id, local folder or builtin:NAME")
    revision: str | None = Field(None, description="branch, tag or commit of the host on the hub")
    device: str = Field("auto", description=_DEVICE)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="precision of the host's weights"
    )
    offline: bool = Field(False, description="use only what is local or cached")
    trust_remote_code: bool = Field(False, description="run model code from the host's repository")


class SourceOptions(HostOptions):
    """Which host a file is made on; without a name, `PretrainOptions.settled` finds one."""

    name: str | None = Field(None, description="hub id, local folder or builtin:NAME")  # type: ignore[assignment]


class DataOptions(Options):
    """Which data, and which of its columns.  Without a task, that of the adapter is meant."""

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


_TRAIN_DATA = frozenset({"data.train_split", "data.limit_train"})


class PretrainOptions(Options):
    """All of `uhl pretrain`.  The source's word states define canonical space.

    :param feature_words: Most words of the feature bank, which takes what the anchors leave of `max_bytes`.  None:
        automatic, and no bank where there is no text or no room for one.  A number requires a bank; 0 is none.
    """

    option_names: ClassVar = {"host.name": "host", "adapter.strategy": "align"}
    not_options = frozenset(
        {f"adapter.{name}" for name in AdapterConfig.model_fields if name != "strategy"}
        | {"training.delta_weight", "training.gradient_clip", "evaluation_batch_size"}
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
        ".txt file with one text a line is enough, or nothing, which takes sentences of this package",
    )
    output: Path = Field(DEFAULT_ADAPTER, description="where the adapter file goes")
    anchors: str | None = Field(
        None,
        description="texts to align by. They are SHIPPED IN THE FILE. By default words from the task's own training "
        "texts; 'general' takes sentences of this package and FILE your own (one text a line), for when your training "
        "text is confidential",
    )
    num_anchors: int = Field(512, ge=32, le=20_000, description="anchor words; each takes some 250 bytes")
    feature_words: int | None = Field(
        None,
        ge=0,
        le=200_000,
        description="most words of the feature bank, whose texts ship as well; 0 for none. By default it takes what "
        "the anchors leave of --max-bytes, if there is text for it",
    )
    transfer_set: str = Field(
        "auto",
        description="texts that SHIP IN THE FILE with the teacher's outputs, so that any target can be tuned without "
        "labels: 'auto' the task's training texts as far as there is room, a number at most so many of them, 'general' "
        "sentences of this package (the file holds no text then), FILE your own (one text a line), 0 none. With "
        "--anchors general or FILE, 'auto' is that",
    )
    teacher: str = Field(
        "auto",
        description="what speaks in the transfer set: 'adapter' the source with the finished adapter, 'lora' a LoRA "
        "that is trained beside it and thrown away, 'auto' the better of both on held-out training examples; or a "
        "fine-tuned classifier of your own (hub id, folder, or PEFT folder), which then speaks in place of labels, "
        "in training too",
    )
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    licence: str = Field("unspecified", max_length=500, description="licence to record in the file")
    max_bytes: int = Field(
        1_000_000, ge=1, description="largest file: refused before training; the feature bank fills it"
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
        """The model that `teacher` names; None where it names a way of making one."""
        return None if self.teacher in TEACHERS else self.teacher

    def with_defaults(self, base: str | None = None) -> PretrainOptions:
        """The options with a host, a task and anchors in place of what was left open.

        :param base: Name of the base of the classifier that speaks in place of labels, if there is one.
        """
        host, data, anchors = self.host, self.data, self.anchors
        if host.name is None:
            host = host.model_copy(update={"name": base or DEFAULT_HOST})
        if self.classifier is None and data.task is None:  # data alone is a task of the user's own
            data = data.model_copy(update={"task": data.data or DEFAULT_TASK, "data": None})
        elif data.task is None and data.data is None:  # the texts are the package's own, of which a file holds none
            anchors = anchors or "general"
        return self.model_copy(update={"host": host, "data": data, "anchors": anchors})

    def deciding(self) -> dict[str, object]:
        """Every option that decides the course of a run; a checkpoint of others is refused."""
        return _deciding(self, "host", "licence") | {"dtype": self.host.dtype}

    def command(self) -> str:
        """The command line that makes the same file: every option that decides its content, none that does not."""
        return self.said("uhl pretrain", always=frozenset({"host", "task"}), never=_OF_THE_CALL)


class PortOptions(Options):
    """All of `uhl port`."""

    argument = "adapter"
    option_names: ClassVar = {"target.name": "target", "strategy": "align"}
    not_options = _TRAIN_DATA

    adapter: Path = Field(DEFAULT_ADAPTER, description="adapter file made by `uhl pretrain`")
    target: HostOptions = Field(description="hub id, local folder or builtin:NAME of the model to port to")
    data: DataOptions = Field(DataOptions(), description="task to score on, when not the adapter's own name for it")
    task_file: Path | None = Field(
        None,
        description="task file, or folder of a LoRA, of `uhl tune` to use with the adapter; scores are then tuned ones",
    )
    strategy: Strategy | None = Field(None, description=_ALIGN)
    score: bool = Field(True, description="score zero-shot where the data can be had")
    batch_size: int = Field(64, ge=1, description="texts per batch when scoring")
    max_flops: float = Field(10.0, gt=0, description=_MAX_FLOPS)
    seed: int = Field(0, ge=0, description="seed of the random-update control and of subsets")
    output: Path | None = Field(
        None, description="folder to keep the ported adapter in, to load without aligning again"
    )
    overwrite: bool = Field(False, description=_OVERWRITE)

    @property
    def data_required(self) -> bool:
        """Whether `data` names any data or column, which must then be had; else scoring is left out without it."""
        return self.data.model_copy(update={"limit_evaluation": None}) != DataOptions()


def tuning_defaults() -> TrainingConfig:
    """How `uhl tune` trains unless told otherwise: 500 steps of delta-theta, without noise or pauses."""
    return TrainingConfig(
        max_steps=500,
        learning_rate=0.1,
        readout_learning_rate=8e-3,
        weight_decay=0.0,
        noise=0.0,
        update_dropout=0.0,
    )


# What of it the command line does not let a user change; `--max-length` is the tuning's own.
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
# Steps, learning rate and the readout's, of delta-theta with labels, of delta-theta without, and of a LoRA.
_TUNING: dict[TuneMode, tuple[int, float, float]] = {
    "labels": (500, 0.1, 8e-3),
    "transfer": (500, 0.02, 0.0),
    "lora": (1500, 1.5e-3, 5e-4),
}


# Options that say something of atoms and their gains alone.
_OF_ATOMS = ("top_k", "training.active_weight", "training.delta_weight")


class TuneTraining(TrainingConfig):
    """How `uhl tune` trains.  What is None depends on what is tuned, see `settled`."""

    # None where the field of the base has a number: what is tuned decides.
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
        description="peak learning rate of a readout that is trained; by default 0.0005 beside a LoRA, 0.008 for a new "
        "task's",
    )
    weight_decay: float = 0.0
    noise: float = 0.0
    update_dropout: float = 0.0

    def with_defaults(self, mode: TuneMode) -> TrainingConfig:
        """The configuration with the defaults of what is tuned in place of None."""
        steps, rate, readout_rate = _TUNING[mode]
        values = self.model_dump()
        defaults = {"max_steps": steps, "learning_rate": rate, "readout_learning_rate": readout_rate or 8e-3}
        return TrainingConfig(**values | {name: value for name, value in defaults.items() if values[name] is None})


class TuneOptions(Options):
    """All of `uhl tune`.  Without an output the task file goes beside the adapter, see `output_path`."""

    argument = "adapter"
    option_names: ClassVar = {"target.name": "target", "strategy": "align", "training.max_steps": "steps"}
    not_options = _NOT_TUNED | {"evaluation_batch_size"}

    adapter: Path = Field(DEFAULT_ADAPTER, description="adapter file made by `uhl pretrain`")
    target: HostOptions = Field(description="hub id, local folder or builtin:NAME of the model to tune on")
    data: DataOptions = Field(
        DataOptions(),
        description="task to tune on with labels; another task than the adapter's gets a readout of its own. With "
        "neither --task nor --data, the adapter is tuned without labels, on the transfer set in its file",
    )
    score_data: str | None = Field(
        None,
        description="evaluation data to score on when tuning without labels: local file or folder, or hub id; read for "
        "scores alone",
    )
    parameters: Literal["delta-theta", "lora"] = Field(
        "delta-theta",
        description="what is tuned: 512 bytes, or a LoRA of all linear modules with a readout of the target's own",
    )
    rank: int = Field(8, ge=1, le=256, description="rank of the LoRA")
    strategy: Strategy | None = Field(None, description=_ALIGN)
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
        description="choose the learning rates (of delta-theta with labels lambda_F, lambda_Q and top-k too) by that "
        "many trials first, on a held-out part of the training data or of the transfer set (needs optuna: "
        "pip install 'uhl[optimise]')",
    )
    max_flops: float = Field(10.0, gt=0, description=_MAX_FLOPS)
    evaluation_batch_size: int = Field(64, ge=1)
    output: Path | None = Field(
        None,
        description="where the task file goes; by default ADAPTER.TASK.TARGET.task.safetensors beside the adapter. A "
        "LoRA goes to a folder, by default ADAPTER.TASK.TARGET.lora",
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
        """Whether there are labels to tune with: without task and data, the transfer set serves."""
        return self.data.task is not None or self.data.data is not None

    @property
    def mode(self) -> TuneMode:
        """What is tuned, and by what."""
        if self.parameters == "lora":
            return "lora"
        return "labels" if self.labelled else "transfer"

    def refuse_idle(self) -> None:
        """Refuse what was asked for and would have no effect.

        :raises UsageError: When an option that says nothing of what is tuned is not at its default.
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
        """`--output`, or ADAPTER.TASK.TARGET.task.safetensors (ADAPTER.TASK.TARGET.lora) beside the adapter."""
        if self.output is not None:
            return self.output
        ending = "lora" if self.parameters == "lora" else "task.safetensors"
        names = (re.sub(r"[^A-Za-z0-9_-]+", "-", Path(part).name).strip("-") for part in (task, self.target.name))
        return self.adapter.with_name(".".join([self.adapter.stem, *names, ending]))

    def deciding(self) -> dict[str, object]:
        """Every option that decides the course of a run; a checkpoint of others is refused."""
        return _deciding(self, "adapter", "target", "optimise", "score_data") | {"dtype": self.target.dtype}

    def command(self, task: str) -> str:
        """The command line that makes the same file; see `PretrainOptions.command`."""
        data = self.data.model_copy(update={"task": task}) if self.labelled else self.data
        named = self.model_copy(update={"adapter": Path(self.adapter.name), "data": data})
        always = frozenset({"target", "task"} if self.labelled else {"target"})
        return named.said("uhl tune", always=always, never=_OF_THE_CALL)


class DemoOptions(Options):
    """All of `uhl demo`; source, target and task are builtin unless told otherwise."""

    source: str = Field(DEFAULT_HOST, description="model to train the adapter on")
    target: str = Field("builtin:small", description="model of another shape to carry it to")
    task: str = Field(DEFAULT_TASK, description="task to train on")
    epochs: float = Field(4.0, gt=0, le=1000, description="passes over the training data")
    tune_steps: int = Field(500, ge=1, description="steps of tuning on the target, without labels")
    device: str = Field("auto", description=_DEVICE)
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of everything random")
    output: Path | None = Field(
        None, description="folder to keep the adapter and the tuned LoRA in; without it they are thrown away"
    )


class PredictOptions(Options):
    """All of `uhl predict`."""

    argument = "adapter"
    rest = "texts"
    option_names: ClassVar = {"target.name": "target", "strategy": "align"}

    adapter: Path = Field(
        DEFAULT_ADAPTER,
        description="adapter file, folder of `uhl port --output` or of `uhl tune --parameters lora`, or folder with a "
        "classifier of transformers or peft, such as `uhl export` makes",
    )
    texts: tuple[str, ...] = Field(
        (), description="texts to label; of a task on two texts, two by two. Put -- before one that begins with a dash"
    )
    target: SourceOptions = Field(
        SourceOptions(),
        description="hub id, local folder or builtin:NAME of the model to run on: needed with an adapter file; a "
        "ported folder names its own, and this says where that lies",
    )
    task_file: Path | None = Field(
        None, description="task file, or folder of a LoRA, of `uhl tune` to use with the adapter file"
    )
    input: str | None = Field(
        None,
        description="file of texts: .txt (one a line), .csv, .tsv, .jsonl, .parquet or .conll, or - for stdin, which "
        "is also read when nothing is named",
    )
    format: Literal["txt", "csv", "tsv", "jsonl", "parquet", "conll"] | None = Field(
        None, description="format of the input; by default what its ending says, and txt for stdin"
    )
    text_column: str | None = Field(None, description="column of the text; a model of words splits it at blanks")
    pair_column: str | None = Field(None, description="column of the second text")
    tokens_column: str | None = Field(None, description="column of the words, a list")
    batch_size: int = Field(64, ge=1, le=100_000, description="texts per batch")
    max_length: int | None = Field(
        None,
        ge=4,
        le=100_000,
        description="longest input in tokens; by default what the model was trained with. Longer texts are cut",
    )
    strategy: Strategy | None = Field(None, description=_ALIGN)
    max_flops: float = Field(10.0, gt=0, description=_MAX_FLOPS)
    top_k: int | None = Field(None, ge=1, description="keep the probabilities of that many classes alone, of each text")
    threshold: float | None = Field(
        None, gt=0, le=1, description="leave the label empty where the largest probability is less"
    )
    prefix: str = Field("", description="what the names of the added columns begin with")
    output: Path | None = Field(
        None, description="file for the result, .csv, .tsv, .jsonl or .parquet; by default stdout takes it"
    )
    overwrite: bool = Field(False, description=_OVERWRITE)


class ExportOptions(Options):
    """All of `uhl export`.  What is trained is a LoRA with a standard head, as `uhl tune --parameters lora` trains."""

    argument = "adapter"
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

    adapter: Path = Field(DEFAULT_ADAPTER, description="adapter file made by `uhl pretrain`")
    target: HostOptions = Field(description="hub id, local folder or builtin:NAME of the model to export")
    output: Path = Field(description="folder for the export; written whole or not at all")
    format: Literal["merged", "peft"] = Field(
        "merged",
        description="'merged' a checkpoint of the target's own size with its family's standard head, 'peft' a LoRA "
        "with head for it",
    )
    base: str | None = Field(
        None,
        max_length=4000,
        pattern=r"^\S(.*\S)?$",
        description="base that a peft export names: a hub id or path that others can load, or 'copy' to write it into "
        "the folder; by default the target, which is copied where it is builtin",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision that is saved; training runs in float32"
    )
    data: DataOptions = Field(
        DataOptions(), description="labelled data of the adapter's own task to learn from as well, named by its task"
    )
    texts: Path | None = Field(
        None,
        description="texts to learn from in place of the transfer set, one a line; what the ported model (with "
        "--task-file the tuned one) says of them is the target. Needed where the adapter file has no transfer set",
    )
    task_file: Path | None = Field(
        None,
        description="what `uhl tune` made for this target: the LoRA in a folder is what the export starts from, a task "
        "file is a second teacher",
    )
    score_data: str | None = Field(
        None, description="evaluation data to score on: local file or folder, or hub id; read for scores alone"
    )
    rank: int = Field(8, ge=1, le=256, description="rank of the LoRA; with a folder as --task-file it has that one's")
    strategy: Strategy | None = Field(None, description=_ALIGN)
    training: TuneTraining = TuneTraining()
    max_length: int | None = Field(
        None,
        ge=4,
        le=100_000,
        description="longest input in tokens, which the saved tokenizer keeps to; by default what the adapter was "
        "trained with",
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
        """Refuse what was asked for and would have no effect.

        :raises UsageError: When an option that says nothing of this export is not at its default.
        """
        idle: dict[str, str] = _idle_data(self.data, self.labelled, self.score_data)
        if self.format == "merged":
            idle["base"] = "a merged export has no base: add --format peft"
        self.refuse_given(idle)

    def deciding(self) -> dict[str, object]:
        """Every option that decides the course of a run; a checkpoint of others is refused."""
        return _deciding(self, "adapter", "target", "format", "base", "dtype", "texts", "task_file", "score_data")

    def command(self) -> str:
        """The command line that makes the same export; see `PretrainOptions.command`."""
        named = self.model_copy(update={"adapter": Path(self.adapter.name)})
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
            idle[f"data.{name}"] = "it is of data, and none is named: add --task, --data or --score-data"
    return idle
