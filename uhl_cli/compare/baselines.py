"""Baselines that are retrained on every target: LoRA of `peft`, SAT-LoRA, and the whole host.

Each has a linear head on the mean final state of a text's own tokens, for token tasks on that of each word's
sub-tokens.  LoRA edits every linear module of a layer.  A score is that of the values as they are stored: LoRA's
factors and all heads in float16, SAT-LoRA's dictionaries in int8, a whole host in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from uhl_cli.commands.scoring import Classes
from uhl_cli.compare.config import TrainingSection
from uhl_cli.compare.sat_lora import SatLora, fake_half
from uhl_cli.data.examples import Examples
from uhl_cli.errors import UsageError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded
from uhl_cli.ported.model import encode_examples

Progress = Callable[[int, int], None]


class Retrained(nn.Module):
    """A host that a baseline trains, and its head.  The host is changed for good: give it a copy of its own.

    :param method: `lora`, `sat-lora` or `full`.
    :raises UsageError: When LoRA is asked for and peft is not installed.
    """

    def __init__(self, method: str, host: Host, num_labels: int, training: TrainingSection) -> None:
        super().__init__()
        torch.manual_seed(training.seed)
        self.method = method
        self.host = host
        self.shared: SatLora | None = None
        self.model: nn.Module = host.map.base.requires_grad_(method == "full")
        if method == "lora":
            self.model = _with_lora(host, training)
        elif method == "sat-lora":
            self.shared = SatLora(host.map, rank=training.rank, alpha=training.alpha, atoms=training.atoms)
        self.head = nn.Linear(host.hidden_size, num_labels)
        self.to(host.device)

    def attached(self) -> AbstractContextManager[object]:
        """Within it the host carries what is trained; only SAT-LoRA is not there all the time."""
        return nullcontext() if self.shared is None else self.shared.attached()

    def forward(self, encoded: Encoded, words: Tensor | None = None) -> Tensor:
        """Logits [texts, labels], or [words, labels] with averaging weights `words` [words, batch * tokens]."""
        with self.attached():
            final = self.model(**encoded.model_inputs()).last_hidden_state
        if words is not None:
            pooled = words.to(final.dtype) @ final.reshape(-1, final.shape[-1])
        else:
            mask = encoded.content_mask.unsqueeze(-1).to(final.dtype)
            pooled = (final * mask).sum(1) / mask.sum(1)
        weight, bias = fake_half(self.head.weight), fake_half(self.head.bias)
        return nn.functional.linear(pooled, weight.to(pooled.dtype), bias.to(pooled.dtype)).float()

    def trained_parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [value for value in self.parameters() if value.requires_grad]

    def stored_bytes(self) -> int:
        """Bytes that the task has to store for this target."""
        head = 2 * sum(value.numel() for value in self.head.parameters())
        if self.shared is not None:
            return self.shared.stored_bytes() + head
        size = 2 if self.method == "lora" else 4
        return size * sum(value.numel() for value in self.model.parameters() if value.requires_grad) + head

    @torch.no_grad()
    def as_stored(self) -> Retrained:
        """Round LoRA's factors to the float16 of its file; the others are trained as they are stored.

        SAT-LoRA's factors are mixed once, as any user would, so that its run time is that of a LoRA.
        """
        if self.shared is not None:
            self.shared.freeze()
        if self.method == "lora":
            for value in self.model.parameters():
                if value.requires_grad:
                    value.copy_(value.half().to(value.dtype))
        return self.eval()

    @torch.inference_mode()
    def predict(
        self, examples: Examples, *, batch_size: int, max_length: int, progress: Progress | None = None
    ) -> Classes:
        """Classes of all examples, in order; for token tasks a list of them an example, one a word."""
        order = sorted(range(len(examples)), key=lambda row: -len(examples.texts[row]))
        classes: dict[int, list[int]] = {}
        length = min(max_length, self.host.max_length)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            encoded, words, counts = encode_examples(self.host, examples, rows, max_length=length)
            found = self(encoded.to(self.host.device), words).argmax(-1)
            for row, part in zip(rows, torch.split(found, counts), strict=True):
                classes[row] = part.tolist()
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
        ordered = [classes[row] for row in range(len(examples))]
        return ordered if examples.tags is not None else [row[0] for row in ordered]


def _with_lora(host: Host, training: TrainingSection) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError("LoRA needs peft.", 'Run `pip install "uhl[compare]"`.') from error
    names = sorted({site.name for layer in host.map.layers for site in layer.sites.values()})
    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, lora_dropout=0.0, bias="none", target_modules=names)
    base: Any = host.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # one of transformers, which peft provokes
        model: nn.Module = get_peft_model(base, config)
    return model
