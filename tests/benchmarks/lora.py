"""The baseline that the benchmarks share: rank-8 LoRA of `peft` on every linear module, mean pool and linear head.

It is retrained on each target, with labels.  Its learning rate is chosen among `LEARNING_RATES` on a tenth of the
training examples that is held out for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.data import Examples
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.host.encode import Encoded, encode
from uhl_cli.train.batches import batches_from

LEARNING_RATES = (5e-4, 1.5e-3, 4e-3)


@dataclass(frozen=True)
class LoraSettings:
    """How one run trains; alpha is twice the rank, as is customary."""

    learning_rate: float
    steps: int = 500
    batch_size: int = 32
    rank: int = 8
    warmup: int = 50
    max_length: int = 128
    seed: int = 0


class LoraClassifier(nn.Module):
    """A host with LoRA on its linear modules and a head on the mean of the text's own tokens."""

    def __init__(self, host: Host, num_labels: int, settings: LoraSettings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.host = host
        names = sorted({site.name for layer in host.map.layers for site in layer.sites.values()})
        config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, lora_dropout=0.0, target_modules=names)
        self.model = get_peft_model(host.model, config)
        self.head = nn.Linear(host.hidden_size, num_labels)

    def forward(self, encoded: Encoded) -> Tensor:
        final = self.model(**encoded.model_inputs()).last_hidden_state
        mask = encoded.content_mask.unsqueeze(-1).to(final.dtype)
        return self.head((final * mask).sum(1) / mask.sum(1))


def _encoded(host: Host, examples: Examples, rows: list[int], max_length: int) -> Encoded:
    pairs = None if examples.pairs is None else [examples.pairs[row] for row in rows]
    texts = [examples.texts[row] for row in rows]
    return encode(host, texts, pairs, max_length=min(max_length, host.max_length))


def train_lora(name: str, train: Examples, num_labels: int, settings: LoraSettings) -> LoraClassifier:
    """Train on a freshly loaded host; AdamW, linear warm-up, half a cosine to zero."""
    host = load_host(name, device="cpu")
    model = LoraClassifier(host, num_labels, settings)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    batches = batches_from(
        train, batch_size=settings.batch_size, seed=settings.seed, first_step=0, last_step=settings.steps
    )
    for step, rows in batches:
        progress = max(0.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
        factor = min(1.0, (step + 1) / settings.warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        targets = torch.tensor([train.labels[row] for row in rows])
        loss = functional.cross_entropy(model(_encoded(host, train, rows, settings.max_length)), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def predict(model: LoraClassifier, examples: Examples, *, max_length: int = 128) -> list[int]:
    """Classes of all examples, in order."""
    order = sorted(range(len(examples)), key=lambda row: len(examples.texts[row]))
    classes = [0] * len(examples)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        found = model(_encoded(model.host, examples, rows, max_length)).argmax(-1).tolist()
        for row, value in zip(rows, found, strict=True):
            classes[row] = value
    return classes


def choose_learning_rate(name: str, train: Examples, num_labels: int, *, steps: int, limit: int = 2000) -> float:
    """The best of `LEARNING_RATES` on a held-out tenth (at most `limit` examples) of the training set."""
    order = np.random.default_rng(5).permutation(len(train))
    size = min(limit, len(train) // 10)
    held, rest = train.select(order[:size].tolist()), train.select(order[size:].tolist())
    scores = {}
    for rate in LEARNING_RATES:
        model = train_lora(name, rest, num_labels, LoraSettings(rate, steps=steps))
        scores[rate] = float(np.mean(np.array(predict(model, held)) == np.array(held.labels)))
    return max(scores, key=lambda rate: scores[rate])
