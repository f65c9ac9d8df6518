"""How the defaults of label-free tuning were chosen: rates, steps, texts and their order, on held-out training texts.

    python tests/benchmarks/label_free_choices.py --shared SHARED --work FOLDER --output \
        tests/benchmarks/results/label_free_choices.json

FOLDER holds the files of `label_free.py`.  1,000 texts of a file's transfer set are held out with their spans; a run is
scored on them by their true labels, which stand in the training data.  No dev set is read.  Runs are written at once,
and an interrupted call goes on with the first that is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_free import TARGETS, Bench
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import TfidfVectorizer

from uhl_cli.codes.packing import squeeze
from uhl_cli.commands.options import HostOptions, TuneOptions
from uhl_cli.commands.scoring import references_of
from uhl_cli.commands.tune_student import DistillationData, trained_student, training_of
from uhl_cli.data import Examples, TaskData
from uhl_cli.data.examples import token_examples
from uhl_cli.files import write_text
from uhl_cli.metrics import score
from uhl_cli.reports import silent
from uhl_cli.train.loop import accelerator_for
from uhl_cli.transfer.texts import TransferSet

HELD_OUT = 1000


@dataclass(frozen=True)
class Choice:
    """One run.

    :param texts: How many texts are learnt from; None for all that are not held out.  `order` says which.
    :param spans: Most spans of a text.
    """

    target: str
    file: str = "sst2"
    parameters: str = "lora"
    steps: int = 1500
    learning_rate: float = 1.5e-3
    readout_learning_rate: float = 5e-4
    texts: int | None = None
    order: str = "random"
    spans: int = 16
    seed: int = 0


def choices(targets: tuple[str, ...]) -> Iterator[Choice]:
    """All runs, those that decide the most first."""
    for target in targets:
        for rate in (0.005, 0.02, 0.06, 0.2):
            yield Choice(target, parameters="delta-theta", steps=500, learning_rate=rate)
        for rate in (0.02, 0.06):
            yield Choice(target, parameters="delta-theta", steps=1500, learning_rate=rate)
    for target in targets:
        for spans in (0, 2):
            yield Choice(target, spans=spans)
    for target in targets[:1]:
        for texts in (1500, 3000):
            for order in ("random", "longest", "uncertain", "diverse"):
                yield Choice(target, texts=texts, order=order)
    for target in targets:
        for rate in (5e-4, 1.5e-3, 3e-3):
            yield Choice(target, learning_rate=rate)
        for readout_rate in (2e-3, 4e-3):
            yield Choice(target, readout_learning_rate=readout_rate)


def ordered(transfer: TransferSet, rows: NDArray[np.int64], order: str, count: int | None) -> NDArray[np.int64]:
    """The texts to learn from, of those in `rows`."""
    if count is None or count >= len(rows):
        return rows
    if order == "random":  # as they stand in the file
        return rows[:count]
    texts = [transfer.texts.texts[row] for row in rows]
    if order == "longest":
        return rows[np.argsort([-len(text) for text in texts], kind="stable")[:count]]
    if order == "uncertain":
        _, odds = transfer.whole(len(transfer.texts))
        spread = np.abs(odds[rows, 1:]).max(1)  # of a sequence task
        return rows[np.argsort(spread, kind="stable")[:count]]
    vectors = TfidfVectorizer(min_df=2).fit_transform(texts)
    clusters = MiniBatchKMeans(n_clusters=count // 4, random_state=0, n_init=1).fit_predict(vectors)
    ranks = np.zeros(len(rows), dtype=np.int64)
    seen: dict[int, int] = {}
    for place, cluster in enumerate(clusters.tolist()):
        ranks[place] = seen.get(cluster, 0)
        seen[cluster] = int(ranks[place]) + 1
    return rows[np.argsort(ranks, kind="stable")[:count]]


def split(transfer: TransferSet, data: TaskData, choice: Choice) -> tuple[DistillationData, Examples, int]:
    """What is learnt from, the held-out texts with their true labels, and bytes of the texts learnt from."""
    order = np.random.default_rng(7).permutation(len(transfer.texts))
    held, rest = np.sort(order[:HELD_OUT]), np.sort(order[HELD_OUT:])
    chosen = set(ordered(transfer, rest, choice.order, choice.texts).tolist())
    examples, owners = transfer.examples(), transfer.texts.owners()
    odds = torch.from_numpy(transfer.log_odds()).softmax(-1)
    counts = [1] * len(examples) if examples.words is None else [len(row) for row in examples.words]
    parts = torch.split(odds, counts)
    rows, place = [], {}
    for row, owner in enumerate(owners):
        place[owner] = place.get(owner, -1) + 1  # 0 is the whole text, the others are its spans
        if owner in chosen and place[owner] <= choice.spans:
            rows.append(row)
    wanted = [parts[row] for row in rows]
    distillation = DistillationData(
        examples.select(rows), lambda some: torch.cat([wanted[row] for row in some]), None, transfer.texts.digest, ""
    )
    text = "\n".join(transfer.texts.texts[index] for index in sorted(chosen))
    return distillation, _true(transfer, data, held), len(squeeze(text.encode()))


def _true(transfer: TransferSet, data: TaskData, held: NDArray[np.int64]) -> Examples:
    train = data.train
    assert train is not None
    texts = [transfer.texts.texts[index] for index in held]
    if train.tags is not None:
        tags = dict(zip(train.texts, train.tags, strict=True))
        return token_examples([text.split(" ") for text in texts], [tags[text] for text in texts])
    assert train.labels is not None
    labels = {" ".join(text.split()): label for text, label in zip(train.texts, train.labels, strict=True)}
    known = [text for text in texts if text in labels]  # a text that was cut has none
    return Examples(tuple(known), labels=tuple(labels[text] for text in known))


def made(bench: Bench, choice: Choice) -> dict[str, Any]:
    """The run's row."""
    adapter = bench.adapter(choice.file)
    aligned = bench.aligned(choice.file, choice.target)
    task, data = adapter.manifest.task, bench.data(adapter.manifest.task.name)
    distillation, held, size = split(adapter.transfer_set(), data, choice)
    options = TuneOptions(
        adapter=bench.file(choice.file),
        target=HostOptions(name=bench.path(choice.target), device="cpu"),
        parameters=choice.parameters,
        training={
            "max_steps": choice.steps,
            "learning_rate": choice.learning_rate,
            "readout_learning_rate": choice.readout_learning_rate,
            "seed": choice.seed,
            "mixed_precision": "bf16",
        },
    )
    student = trained_student(
        adapter,
        aligned,
        distillation,
        training_of(adapter, options),
        options,
        accelerator=accelerator_for("cpu", "bf16"),
        files=None,
        reporter=silent,
    )
    start = adapter.port(aligned)
    rows = {}
    for name, model in (("zero_shot", start), ("tuned", start.with_adapter(student.finished(aligned.host)))):
        rows[name] = score(
            task.metric, model.classes_of(held).for_metric(task.kind), references_of(held), task.labels
        ).value
    return rows | {"examples": len(distillation.examples), "held_out": len(held), "text_bytes": size}


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the adapter files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS[:2]))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.shared, arguments.work, {})
    rows = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else []
    done = [{name: row[name] for name in asdict(Choice(""))} for row in rows]
    for choice in choices(tuple(arguments.targets)):
        if asdict(choice) in done:
            continue
        rows.append(asdict(choice) | made(bench, choice))
        write_text(arguments.output, json.dumps(rows, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
