"""Training a baseline, and the search of its learning rate on training examples that are held out for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional

from uhl_cli.compare.baselines import Retrained
from uhl_cli.compare.config import SearchSection, TrainingSection
from uhl_cli.data.examples import Examples
from uhl_cli.errors import TrainingError
from uhl_cli.ported.model import encode_examples
from uhl_cli.train.batches import batches_from
from uhl_cli.train.loop import LOG_EVERY, targets_of
from uhl_cli.train.model import plain_attention

Note = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Point:
    """A point of a learning curve: means over the training batches since the one before."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Search:
    """What a search found: the best rate, and the score of each that was tried, by its value."""

    rate: float
    scores: dict[float, float]
    held_out: int
    steps: int


def fit(
    model: Retrained,
    examples: Examples,
    training: TrainingSection,
    *,
    accelerator: Accelerator,
    on_step: Note | None = None,
) -> list[Point]:
    """Train in place: AdamW, linear warm-up, half a cosine to zero, cross entropy (a word is a case).

    :returns: The learning curve.
    :raises TrainingError: When the loss is no longer finite.
    """
    host = model.host
    trained = model.trained_parameters()
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    optimizer = accelerator.prepare(optimizer)
    length = min(training.max_length, host.max_length)
    curve: list[Point] = []
    losses: list[float] = []
    correct = count = 0
    batches = batches_from(
        examples, batch_size=training.batch_size, seed=training.seed, first_step=0, last_step=training.steps
    )
    for step, rows in batches:
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * rate_factor(step, training.steps, training.warmup_steps)
        encoded, words, _ = encode_examples(host, examples, rows, max_length=length)
        targets = torch.tensor(targets_of(examples, rows), device=host.device)
        with accelerator.autocast(), plain_attention(host):
            logits = model(encoded.to(host.device), words)
        loss = functional.cross_entropy(logits, targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        correct, count = correct + int((logits.argmax(-1) == targets).sum()), count + len(targets)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == training.steps:
            point = Point(step + 1, float(np.mean(losses)), correct / max(count, 1))
            if not math.isfinite(point.loss):
                raise TrainingError(f"the loss is {point.loss} at step {step + 1}.", "Try a smaller learning rate.")
            curve.append(point)
            losses, correct, count = [], 0, 0
            if on_step:
                on_step(step + 1, training.steps, f"loss {point.loss:.3f}  accuracy {point.accuracy:.3f}")
    model.as_stored()
    return curve


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear over `warmup` steps, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def split_for_search(examples: Examples, limit: int) -> tuple[Examples, Examples]:
    """(held out, rest) of the training examples, the same for every method.

    A tenth is held out, `limit` at most; of a small set a quarter, up to 500: fewer would choose by chance.
    """
    order = np.random.default_rng(5).permutation(len(examples))
    size = max(1, min(limit, max(len(examples) // 10, min(500, len(examples) // 4))))
    return examples.select(order[:size].tolist()), examples.select(order[size:].tolist())


def search_rate(search: SearchSection, attempt: Callable[[float], float], held_out: int) -> Search:
    """Try every rate of the section, and beyond an edge while the best lies on it.

    Of rates that tie the one nearest to the middle is taken.  All tie that are within one standard error of the highest
    score, that of a share of the held-out examples: a search is shorter than the run that it serves, and a rate that
    leads by chance at its end can be far too high for ten times the steps.

    :param attempt: Gives the score of a rate; one whose training diverges scores zero.
    :param held_out: Number of examples that a score is measured on.
    """
    rates = sorted(search.learning_rates)
    middle = rates[len(rates) // 2]
    scores: dict[float, float] = {}

    def tried(rate: float) -> None:
        try:
            scores[rate] = attempt(rate)
        except TrainingError:
            scores[rate] = 0.0

    def best() -> float:
        highest = max(scores.values())
        share = min(max(highest, 0.0), 1.0)
        error = math.sqrt(share * (1.0 - share) / held_out)
        tied = [rate for rate in sorted(scores) if scores[rate] >= highest - error]
        return min(tied, key=lambda rate: abs(math.log(rate / middle)))

    for rate in rates:
        tried(rate)
    for _ in range(search.edge_tries):
        if best() == min(scores) and len(set(scores.values())) > 1:
            tried(best() / search.edge_factor)
        elif best() == max(scores) and len(set(scores.values())) > 1:
            tried(min(1.0, best() * search.edge_factor))
        else:
            break
    return Search(best(), dict(sorted(scores.items())), held_out, search.steps)


def curve_of_log(path: Path) -> list[Point]:
    """The learning curve in a JSON-lines log of `train.loop`; empty without one."""
    if not path.exists():
        return []
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Point(entry["step"], entry["loss"], entry["accuracy"]) for entry in entries]
