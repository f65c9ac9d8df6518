"""Baselines that are retrained on every target: LoRA of `peft`, SAT-LoRA, and the whole host.

Each has a linear head on the mean final state of a text's own tokens, for token tasks on that of each word's
sub-tokens.  LoRA edits every linear module of a layer.  Scores use the values as stored: LoRA's
factors and all heads in float16, SAT-LoRA's dictionaries in int8, a whole host in float32.

SAT-LoRA is cross-layer shared LoRA, which shares atoms within one architecture.  Every weight shape [out, in] has one
dictionary: K input rows and K output rows.  The two factors of a module's update, rank r, are mixtures of these rows,
with weights that are a function of the module's normalised depth and type.  So all layers share their atoms, and the
result belongs to one architecture: another target needs its own training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.commands.scoring import Classes
from uhl_cli.compare.results import CurvePoint
from uhl_cli.compare.sections import TrainingSection
from uhl_cli.data.examples import Examples
from uhl_cli.errors import TrainingError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded
from uhl_cli.host.hostmap import HostMap, TargetModule
from uhl_cli.ported.model import encode_examples
from uhl_cli.train.batches import batches_from
from uhl_cli.train.loop import LOG_EVERY, Targets, learning_rate_factors, targets_of
from uhl_cli.train.model import task_loss, unfused_attention

Progress = Callable[[int, int], None]
Note = Callable[[int, int, str], None]
Shape = tuple[int, int]
Place = tuple[int, str]

TYPES = ("q", "k", "v", "o", "up", "down")
_FREQUENCIES = 4
_MIXER_SIZE = 64


class Retrained(nn.Module):
    """A host that a baseline trains, and its head.  The host is changed permanently: pass a copy.

    :param method: `lora`, `sat-lora` or `full`.
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
        """Context in which the host has the trained update; only SAT-LoRA is detached outside it."""
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
        return functional.linear(pooled, weight.to(pooled.dtype), bias.to(pooled.dtype)).float()

    def trained_parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [value for value in self.parameters() if value.requires_grad]

    def stored_bytes(self) -> int:
        """Bytes to store for this task on this target."""
        head = 2 * sum(value.numel() for value in self.head.parameters())
        if self.shared is not None:
            return self.shared.stored_bytes() + head
        itemsize = 2 if self.method == "lora" else 4
        return itemsize * sum(value.numel() for value in self.model.parameters() if value.requires_grad) + head

    @torch.no_grad()
    def as_stored(self) -> Retrained:
        """Round LoRA's factors to the float16 of its file; the others are trained as they are stored.

        SAT-LoRA's factors are mixed once, as in use, so that its run time is that of a LoRA.
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
        """Classes of all examples, in order; for token tasks a list per example, one per word."""
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
    from peft import LoraConfig, get_peft_model

    names = sorted({linear.name for layer in host.map.layers for linear in layer.target_modules.values()})
    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, lora_dropout=0.0, bias="none", target_modules=names)
    base: Any = host.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a warning of transformers that peft causes
        model: nn.Module = get_peft_model(base, config)
    return model


def fit(
    model: Retrained,
    examples: Examples,
    training: TrainingSection,
    *,
    accelerator: Accelerator,
    targets: Targets | None = None,
    on_step: Note | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[CurvePoint]:
    """Train in place: AdamW, the section's schedule, cross entropy (per word for token tasks).

    :param targets: Targets of some rows, see `train.loop.run_steps`; by default the examples' own classes.
    :param after_step: Called with the number of finished steps after each step.
    :returns: The learning curve.
    :raises TrainingError: When the loss is no longer finite.
    """
    host = model.host
    trained = model.trained_parameters()
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    optimizer = accelerator.prepare(optimizer)
    length = min(training.max_length, host.max_length)
    factors = learning_rate_factors(training.schedule, training.steps, training.warmup_steps / training.steps)
    curve: list[CurvePoint] = []
    losses: list[float] = []
    correct = count = 0
    batches = batches_from(
        examples, batch_size=training.batch_size, seed=training.seed, first_step=0, last_step=training.steps
    )
    for step, rows in batches:
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factors(step)
        encoded, words, _ = encode_examples(host, examples, rows, max_length=length)
        wanted = torch.tensor(targets_of(examples, rows)) if targets is None else targets(rows)
        wanted = wanted.to(host.device)
        with accelerator.autocast(), unfused_attention(host):
            logits = model(encoded.to(host.device), words)
        loss, right = task_loss(logits, wanted)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        correct, count = correct + int(right), count + len(wanted)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == training.steps:
            mean_loss, accuracy = float(np.mean(losses)), correct / max(count, 1)
            if not math.isfinite(mean_loss):
                raise TrainingError(f"the loss is {mean_loss} at step {step + 1}.", "Try a smaller learning rate.")
            curve.append(CurvePoint(step=step + 1, loss=mean_loss, accuracy=accuracy))
            losses, correct, count = [], 0, 0
            if on_step:
                on_step(step + 1, training.steps, f"loss {mean_loss:.3f}  accuracy {accuracy:.3f}")
        if after_step:
            after_step(step + 1)
    model.as_stored()
    return curve


def fake_int8(values: Tensor) -> Tensor:
    """Values rounded to int8 codes with one float16 scale per row; the gradient is straight-through."""
    # The scale is at least the smallest float16, so that a row of zeros is not divided by zero.
    scale = (values.detach().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6).half().float()
    stored = (values.detach() / scale).round().clamp(-127, 127) * scale
    return values + (stored - values).detach()


def fake_half(values: Tensor) -> Tensor:
    """Values rounded to float16; the gradient is straight-through."""
    return values + (values.detach().half().float() - values).detach()


class _Dictionary(nn.Module):
    """Atoms of one weight shape [out, in], and the mixer of its modules."""

    def __init__(self, shape: Shape, atoms: int, rank: int) -> None:
        super().__init__()
        out_size, in_size = shape
        self.read = nn.Parameter(torch.randn(atoms, in_size) / math.sqrt(in_size))
        self.write = nn.Parameter(torch.zeros(atoms, out_size))  # the update starts at zero, as in LoRA
        inputs = 1 + 2 * _FREQUENCIES + len(TYPES)
        self.hidden = nn.Linear(inputs, _MIXER_SIZE)
        self.mix = nn.Linear(_MIXER_SIZE, 2 * rank * atoms)
        self._rank = rank

    def factors(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [r, out] of the module at `place`, from the values as stored."""
        hidden = functional.gelu(functional.linear(place, fake_int8(self.hidden.weight), fake_half(self.hidden.bias)))
        mixed = functional.linear(hidden, fake_int8(self.mix.weight), fake_half(self.mix.bias))
        into, out = mixed.reshape(2, self._rank, -1)
        return into @ fake_int8(self.read), out @ fake_int8(self.write)


class SatLora(nn.Module):
    """The baseline on a frozen host; inside `attached()` its modules have the updates.

    :param atoms: K, rows of each side of a dictionary.
    """

    def __init__(self, host_map: HostMap, *, rank: int, alpha: float, atoms: int) -> None:
        super().__init__()
        self._target_modules: dict[Place, tuple[TargetModule, str, Tensor]] = {}
        self.dictionaries = nn.ModuleDict()
        last = max(1, len(host_map.layers) - 1)
        for index, layer in enumerate(host_map.layers):
            for type_, linear in layer.target_modules.items():
                if type_ not in TYPES:
                    continue
                shape = (linear.out_features, linear.in_features)
                key = "x".join(map(str, shape))
                if key not in self.dictionaries:
                    self.dictionaries[key] = _Dictionary(shape, atoms, rank)
                self._target_modules[index, type_] = (linear, key, _place(index / last, type_))
        self._scale = alpha / rank
        self._mixed: dict[Place, tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def freeze(self) -> None:
        """Mix the factors once; training is finished."""
        self._mixed = None
        self._mixed = {place: self._factors(place) for place in self._target_modules}

    def _factors(self, place: Place) -> tuple[Tensor, Tensor]:
        """A, and B times alpha / r, of a target module."""
        if self._mixed is not None:
            return self._mixed[place]
        _, key, features = self._target_modules[place]
        dictionary = self.dictionaries[key]
        assert isinstance(dictionary, _Dictionary)
        read, write = dictionary.factors(features.to(dictionary.read.device))
        return read, self._scale * write

    def forward(self, states: Tensor, place: Place) -> Tensor:
        """The update of one target module: alpha / r times B^T A x, added to its output.

        :param states: x [..., in_features], the module's input.
        :param place: Index of its layer, and its type.
        :returns: [..., out_features], in the precision of the states.
        """
        read, write = self._factors(place)
        return (states @ read.T.to(states.dtype)) @ write.to(states.dtype)

    def attached(self) -> AbstractContextManager[object]:
        """Context in which every module adds its update to its output."""
        stack = ExitStack()
        for place, (linear, _, _) in self._target_modules.items():
            stack.callback(linear.module.register_forward_hook(self._hook(linear, place)).remove)
        return stack

    def _hook(self, linear: TargetModule, place: Place) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """Adds the update to a module's output, or to its part of a fused module's output."""

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            update: Tensor = self(inputs[0], place).to(output.dtype)
            if not linear.fused:
                return output + update
            changed = output.clone()
            changed[..., linear.columns] += update
            return changed

        return hook

    def stored_bytes(self) -> int:
        """Bytes of the file: int8 codes, a float16 scale a row, biases in float16."""
        matrices = [value for value in self.parameters() if value.dim() > 1]
        vectors = [value for value in self.parameters() if value.dim() == 1]
        return sum(value.numel() + 2 * len(value) for value in matrices) + 2 * sum(value.numel() for value in vectors)


def _place(depth: float, type_: str) -> Tensor:
    """Features of a module's normalised depth and type."""
    waves = [wave(math.pi * 2**power * depth) for power in range(_FREQUENCIES) for wave in (math.sin, math.cos)]
    return torch.tensor([depth, *waves, *(float(type_ == other) for other in TYPES)])
