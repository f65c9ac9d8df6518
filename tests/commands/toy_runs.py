"""Toy tasks in memory, and pretraining and porting on tiny hosts, as short calls."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from tiny_hosts import SENTENCES

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands.options import DataOptions, HostOptions, PortOptions, PretrainOptions
from uhl_cli.commands.port import port
from uhl_cli.commands.pretrain import pretrain
from uhl_cli.data import Examples, Task, TaskData
from uhl_cli.data.examples import token_examples
from uhl_cli.host.checkpoint import Host
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import PortReport, PretrainReport
from uhl_cli.schema import AdapterConfig, TrainingConfig

SEQUENCE = Task(
    name="toy", kind="sequence", labels=("cold", "warm"), metric="accuracy", text_column="text", label_column="label"
)
PAIR = SEQUENCE.model_copy(update={"name": "toy-pairs", "metric": "f1", "pair_column": "second"})
TOKENS = Task(
    name="toy-tags",
    kind="tokens",
    labels=("O", "B-PER", "I-PER"),
    metric="entity_f1",
    tokens_column="tokens",
    label_column="tags",
)
# The readout alone is over a tenth of a host of width 32.
TINY_LIMIT = 1000.0


def texts() -> tuple[str, ...]:
    """Every sentence as it is, and with its halves swapped."""
    halves = [sentence.split() for sentence in SENTENCES]
    swapped = [" ".join(words[len(words) // 2 :] + words[: len(words) // 2]) for words in halves]
    return (*SENTENCES, *swapped)


def sequence_data() -> TaskData:
    """Whether a text holds the letter w, 36 for training and 12 for evaluation."""
    examples = Examples(texts=texts(), labels=tuple(int("w" in text) for text in texts()))
    train, evaluation = examples.split(0.25, seed=0)
    return TaskData(SEQUENCE, train, evaluation, "memory")


def pair_data() -> TaskData:
    """Whether the second text is the swapped first, or another's."""
    first, second = SENTENCES, texts()[len(SENTENCES) :]
    moved = second[1:] + second[:1]
    both = Examples(
        texts=first + first,
        pairs=second + moved,
        labels=(1,) * len(first) + (0,) * len(first),
    )
    train, evaluation = both.split(0.25, seed=0)
    return TaskData(PAIR, train, evaluation, "memory")


def token_data() -> TaskData:
    """Capitalised words are persons; a second one in a row continues the first."""
    words = [text.split() for text in texts()]
    tags = []
    for sentence in words:
        row: list[int] = []
        for word in sentence:
            row.append((2 if row and row[-1] else 1) if word[0].isupper() else 0)
        tags.append(row)
    train, evaluation = token_examples(words, tags).split(0.25, seed=0)
    return TaskData(TOKENS, train, evaluation, "memory")


def toy_options(output: Path, **changes: object) -> PretrainOptions:
    """Three steps with 128 anchors; names of `TrainingConfig` and `PretrainOptions` may be changed."""
    training = {"max_steps": 3, "batch_size": 8, "max_length": 48, "update_dropout": 0.0}
    training |= {name: changes.pop(name) for name in list(changes) if name in TrainingConfig.model_fields}
    adapter = {name: changes.pop(name) for name in list(changes) if name in AdapterConfig.model_fields}
    settings: dict[str, object] = {
        "num_anchors": 128,
        "max_flops": TINY_LIMIT,
        "output": output,
        "feature_words": 0,
        "transfer_set": "0",
    } | changes
    return PretrainOptions(
        host=HostOptions(name="tiny", device="cpu"),
        data=DataOptions(task="toy"),
        adapter=AdapterConfig(**adapter),
        training=TrainingConfig(**training),
        **settings,
    )


def make_adapter(host: Host, data: TaskData, output: Path, **changes: object) -> PretrainReport:
    """Pretrain on loaded objects."""
    return pretrain(host, data, toy_options(output, **changes), accelerator=Accelerator(cpu=True))


def carry(adapter: Path, host: Host, data: TaskData | None, **changes: object) -> tuple[PortedModel, PortReport]:
    """Read the file and port it to a loaded host, with all controls."""
    settings: dict[str, object] = {"max_flops": TINY_LIMIT, "controls": True} | changes
    options = PortOptions(adapter=adapter, target=HostOptions(name="tiny", device="cpu"), **settings)
    return port(UniversalAdapter.load(adapter), host, options, data=data)
