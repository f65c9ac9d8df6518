"""The baselines that the benchmarks share: those of `uhl compare`, on a target named by its folder.

Rank-8 LoRA of `peft` on every linear module, or the whole host (`rank=None`), with a linear head on the mean state of a
text's own tokens, or of each word's.  Retrained on each target, with labels, in float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uhl_cli.commands.scoring import Classes, references_of
from uhl_cli.compare.baselines import Retrained, fit
from uhl_cli.compare.results import Search
from uhl_cli.compare.search import search_rate, split_for_search
from uhl_cli.compare.sections import SearchSection, TrainingSection
from uhl_cli.data import Examples
from uhl_cli.host.checkpoint import load_host
from uhl_cli.metrics import score
from uhl_cli.train.loop import accelerator_for

LEARNING_RATES = (5e-4, 1.5e-3, 4e-3)
FULL_LEARNING_RATES = (3e-5, 1e-4, 3e-4)


@dataclass(frozen=True)
class LoraSettings:
    """How one run trains; alpha is twice the rank, as is customary.  Without a rank the whole host is trained."""

    learning_rate: float
    steps: int = 500
    rank: int | None = 8
    max_length: int = 128
    seed: int = 0

    @property
    def training(self) -> TrainingSection:
        """The same for `fit`."""
        rank = self.rank or TrainingSection().rank
        return TrainingSection(
            learning_rate=self.learning_rate,
            steps=self.steps,
            rank=rank,
            alpha=2 * rank,
            max_length=self.max_length,
            seed=self.seed,
        )


def baseline(name: str, num_labels: int, settings: LoraSettings) -> Retrained:
    """The untrained baseline on a freshly loaded host."""
    method = "full" if settings.rank is None else "lora"
    return Retrained(method, load_host(name, device="cpu"), num_labels, settings.training)


def take_steps(model: Retrained, train: Examples, settings: LoraSettings) -> None:
    """Train in place for as many steps as the settings say."""
    fit(model, train, settings.training, accelerator=accelerator_for("cpu", "no"))


def train_lora(name: str, train: Examples, num_labels: int, settings: LoraSettings) -> Retrained:
    """Train on a freshly loaded host."""
    model = baseline(name, num_labels, settings)
    take_steps(model, train, settings)
    return model.eval()


def predict(model: Retrained, examples: Examples, *, max_length: int = 128) -> Classes:
    """Classes of all examples, in order; for token tasks a list of them an example, one a word."""
    return model.predict(examples, batch_size=64, max_length=max_length)


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
) -> Search:
    """Try learning rates on held-out training examples, at most `limit`, by the task's metric; see `search_rate`.

    They are `LEARNING_RATES`, or `FULL_LEARNING_RATES` for a whole host.
    """
    held, rest = split_for_search(train, limit)

    def attempt(rate: float) -> float:
        settings = LoraSettings(rate, steps=steps, max_length=max_length, rank=rank)
        found = predict(train_lora(name, rest, len(labels), settings), held, max_length=max_length)
        return score(metric, found, references_of(held), labels).value

    rates = FULL_LEARNING_RATES if rank is None else LEARNING_RATES
    return search_rate(SearchSection(learning_rates=rates, steps=steps, held_out=limit), attempt, len(held))


def choose_learning_rate(name: str, train: Examples, num_labels: int, *, steps: int, limit: int = 2000) -> float:
    """The best rate of `search_learning_rate` by accuracy, for tasks that it scores."""
    labels = [str(label) for label in range(num_labels)]
    return search_learning_rate(name, train, labels, "accuracy", steps=steps, limit=limit).rate
