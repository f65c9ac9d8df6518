"""The baseline that the benchmarks share: rank-8 LoRA of `peft` on every linear module, mean pool and linear head.

With `rank=None` the whole host is trained instead.  It is retrained on each target, with labels, in float32.  The head
reads the mean final state of a text's own tokens, for token tasks that of each word's sub-tokens.  The learning rate is
chosen by the task's own metric on training examples that are held out for it: among a few, and beyond them while the
best lies on the edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.adapter.ported import encode_examples
from uhl_cli.data import Examples
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.host.encode import Encoded
from uhl_cli.metrics import score
from uhl_cli.pipeline.common import Classes, references_of
from uhl_cli.train.batches import batches_from
from uhl_cli.train.loop import targets_of

LEARNING_RATES = (5e-4, 1.5e-3, 4e-3)
FULL_LEARNING_RATES = (3e-5, 1e-4, 3e-4)
# A best rate on the edge is followed beyond it by this factor, this often at most.
EDGE_FACTOR, EDGE_TRIES = 3.0, 2


@dataclass(frozen=True)
class LoraSettings:
    """How one run trains; alpha is twice the rank, as is customary.  Without a rank the whole host is trained."""

    learning_rate: float
    steps: int = 500
    batch_size: int = 32
    rank: int | None = 8
    warmup: int = 50
    max_length: int = 128
    seed: int = 0


@dataclass(frozen=True)
class RateSearch:
    """The best learning rate, and the score of each that was tried, ascending, on `held_out` examples."""

    rate: float
    scores: dict[float, float]
    held_out: int


class LoraClassifier(nn.Module):
    """A host with LoRA on its linear modules, or free as a whole, and a head on the mean state of a text or word."""

    def __init__(self, host: Host, num_labels: int, settings: LoraSettings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.host = host
        if settings.rank is None:
            self.model = host.map.base.requires_grad_(True)
        else:
            names = sorted({site.name for layer in host.map.layers for site in layer.sites.values()})
            config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, lora_dropout=0.0, target_modules=names)
            self.model = get_peft_model(host.model, config)
        self.head = nn.Linear(host.hidden_size, num_labels)

    def forward(self, encoded: Encoded, words: Tensor | None = None) -> Tensor:
        """Logits [texts, labels], or [words, labels] with averaging weights `words` [words, batch * tokens]."""
        final = self.model(**encoded.model_inputs()).last_hidden_state
        if words is not None:
            return self.head(words.to(final.dtype) @ final.reshape(-1, final.shape[-1]))
        mask = encoded.content_mask.unsqueeze(-1).to(final.dtype)
        return self.head((final * mask).sum(1) / mask.sum(1))

    def trained_parameters(self) -> list[nn.Parameter]:
        """What is trained, and what a task has to store: the head, and two factors a linear module."""
        return [value for value in self.parameters() if value.requires_grad]


def train_lora(name: str, train: Examples, num_labels: int, settings: LoraSettings) -> LoraClassifier:
    """Train on a freshly loaded host; AdamW, linear warm-up, half a cosine to zero; cross entropy, a word a case."""
    model = LoraClassifier(load_host(name, device="cpu"), num_labels, settings)
    take_steps(model, train, settings)
    return model.eval()


def take_steps(model: LoraClassifier, train: Examples, settings: LoraSettings) -> None:
    """Train a model in place for as many steps as the settings say."""
    host, trained = model.host, model.trained_parameters()
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    batches = batches_from(
        train, batch_size=settings.batch_size, seed=settings.seed, first_step=0, last_step=settings.steps
    )
    for step, rows in batches:
        progress = max(0.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
        factor = min(1.0, (step + 1) / settings.warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        encoded, words, _ = encode_examples(host, train, rows, max_length=min(settings.max_length, host.max_length))
        loss = functional.cross_entropy(model(encoded, words), torch.tensor(targets_of(train, rows)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@torch.inference_mode()
def predict(model: LoraClassifier, examples: Examples, *, max_length: int = 128) -> Classes:
    """Classes of all examples, in order; for token tasks a list of them an example, one a word."""
    order = sorted(range(len(examples)), key=lambda row: len(examples.texts[row]))
    classes: dict[int, list[int]] = {}
    length = min(max_length, model.host.max_length)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        encoded, words, counts = encode_examples(model.host, examples, rows, max_length=length)
        found = model(encoded, words).argmax(-1)
        for row, part in zip(rows, torch.split(found, counts), strict=True):
            classes[row] = part.tolist()
    ordered = [classes[row] for row in range(len(examples))]
    return ordered if examples.tags is not None else [row[0] for row in ordered]


def search_learning_rate(
    name: str,
    train: Examples,
    labels: Sequence[str],
    metric: str,
    *,
    steps: int,
    limit: int = 2000,
    max_length: int = 128,
    rank: int | None = 8,
) -> RateSearch:
    """Try learning rates on a held-out tenth (at most `limit` examples) of the training set, by the task's metric.

    They are `LEARNING_RATES`, or `FULL_LEARNING_RATES` for a whole host.

    Of a small set a quarter is held out, up to 500 examples: fewer would choose by chance.  Of rates that tie,
    as all do that give the majority class, the one nearest to the middle is taken.
    """
    order = np.random.default_rng(5).permutation(len(train))
    size = min(limit, max(len(train) // 10, min(500, len(train) // 4)))
    held, rest = train.select(order[:size].tolist()), train.select(order[size:].tolist())
    references = references_of(held)
    rates = FULL_LEARNING_RATES if rank is None else LEARNING_RATES
    scores: dict[float, float] = {}

    def attempt(rate: float) -> None:
        settings = LoraSettings(rate, steps=steps, max_length=max_length, rank=rank)
        found = predict(train_lora(name, rest, len(labels), settings), held, max_length=max_length)
        scores[rate] = score(metric, found, references, labels).value

    def best() -> float:
        middle = rates[len(rates) // 2]
        return max(sorted(scores), key=lambda rate: (scores[rate], -abs(math.log(rate / middle))))

    for rate in rates:
        attempt(rate)
    for _ in range(EDGE_TRIES):
        if best() == min(scores):
            attempt(best() / EDGE_FACTOR)
        elif best() == max(scores):
            attempt(best() * EDGE_FACTOR)
        else:
            break
    return RateSearch(best(), dict(sorted(scores.items())), len(held))


def choose_learning_rate(name: str, train: Examples, num_labels: int, *, steps: int, limit: int = 2000) -> float:
    """The best rate of `search_learning_rate` by accuracy, for tasks that it scores."""
    labels = [str(label) for label in range(num_labels)]
    return search_learning_rate(name, train, labels, "accuracy", steps=steps, limit=limit).rate
