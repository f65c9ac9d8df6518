"""A ported model: host, folded adapter and task together, ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from uhl_cli.adapter.attach import Injection
from uhl_cli.adapter.fold import FoldedAdapter, FoldedReadout
from uhl_cli.align.states import pooling_matrix
from uhl_cli.data.examples import Examples
from uhl_cli.data.tasks import Task
from uhl_cli.errors import UsageError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded, encode

Progress = Callable[[int, int], None]


def readout_logits(readout: FoldedReadout, features: Tensor, content_mask: Tensor, words: Tensor | None) -> Tensor:
    """Logits of the canonical readout (DESIGN 2.7).

    :param features: [batch, tokens, readout_size], see `Injection.readout_features`.
    :param content_mask: bool [batch, tokens]; the attention pool sees these tokens only.
    :param words: For token tasks, averaging weights [words, batch * tokens].
    :returns: [batch, labels] for sequence tasks, [words, labels] for token tasks.
    """
    hidden = functional.gelu(features)
    if readout.pool is not None:
        scores = (hidden @ readout.pool.to(hidden.dtype)).masked_fill(~content_mask, -torch.inf)
        hidden = (functional.softmax(scores, dim=1).unsqueeze(-1) * hidden).sum(1)
    logits = hidden @ readout.out_weight.to(hidden.dtype).T
    if readout.pool is None:
        assert words is not None
        # Averaged after the linear layer, which commutes with it and leaves fewer columns to average.
        logits = words.to(logits.dtype) @ logits.reshape(-1, logits.shape[-1])
    return logits + readout.out_bias.to(hidden.dtype)


def forward(host: Host, injection: Injection, encoded: Encoded, words: Tensor | None) -> tuple[Tensor, Tensor]:
    """One forward pass of an attached host: logits (see `readout_logits`) and mean active atoms per token."""
    output = host.map.base(**encoded.model_inputs())
    features = injection.readout_features(output.last_hidden_state)
    logits = readout_logits(injection.readout, features, encoded.content_mask, words)
    return logits, injection.active_atoms(encoded.content_mask)


@dataclass
class PortedModel:
    """A host that carries an adapter.

    Calling it gives logits; the host itself is changed only while a call runs or inside `attached()`, and is
    bit for bit as before afterwards.  `retask` makes the same of another task file, see `with_task`.
    """

    host: Host
    folded: FoldedAdapter
    task: Task
    report: dict[str, object] = field(default_factory=dict)
    retask: Callable[[PortedModel, str | Path], PortedModel] | None = field(default=None, repr=False)

    def with_task(self, path: str | Path) -> PortedModel:
        """The same host with the task of a task file, without another alignment; this model stays as it is.

        The two share the host and the updates' tensors: a task costs its gains and its readout, and using one
        after the other is all there is to switching.

        :raises UsageError: When the model was not ported with `switchable=True`, or the FLOP limit makes the host
            carry other parts for that task.
        :raises FormatError: When the file is damaged or was tuned on another adapter.
        """
        if self.retask is None:
            raise UsageError(
                "this ported model has no alignment to take a task file with.",
                "Port it again with adapter.port(model, tokenizer, switchable=True).",
            )
        return self.retask(self, path)

    def attached(self) -> Injection:
        """Context manager: inside it the host's own forward pass (any head it has) carries the updates."""
        return Injection(self.host.map, self.folded)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tensor:
        """Logits [texts, labels] of a sequence task for raw texts.

        :raises ValueError: For a token task; use `predict` with word spans.
        """
        if self.task.kind != "sequence":
            raise ValueError("a token task needs word spans: use predict(examples)")
        with self.attached() as injection:
            return self._logits(injection, encode(self.host, texts, pairs), None)[0]

    def _logits(self, injection: Injection, encoded: Encoded, words: Tensor | None) -> tuple[Tensor, Tensor]:
        return forward(self.host, injection, encoded.to(self.host.device), words)

    @torch.inference_mode()
    def predict(
        self,
        examples: Examples,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> Predictions:
        """Predicted classes of every example, in order, and the mean number of active atoms per token."""
        order = sorted(range(len(examples)), key=lambda row: -len(examples.texts[row]))
        classes: dict[int, list[int]] = {}
        active, tokens, truncated = 0.0, 0, 0
        with self.attached() as injection:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                encoded, words, counts = encode_examples(self.host, examples, rows, max_length=max_length)
                logits, mean_active = self._logits(injection, encoded, words)
                truncated += encoded.truncated
                best = logits.argmax(-1).tolist()
                for row, count in zip(rows, counts, strict=True):
                    classes[row], best = best[:count], best[count:]
                size = int(encoded.content_mask.sum())
                active, tokens = active + float(mean_active) * size, tokens + size
                if progress:
                    progress(min(start + batch_size, len(order)), len(order))
        ordered = [classes[row] for row in range(len(examples))]
        return Predictions(ordered, active / max(tokens, 1), truncated)


@dataclass(frozen=True)
class Predictions:
    """Classes per example (one for a sequence task, one a word for a token task), and active atoms per token.

    `truncated` counts the texts that were cut because they are longer than the host or `max_length` takes.
    """

    classes: list[list[int]]
    atoms_per_token: float
    truncated: int

    def for_metric(self, kind: str) -> list[int] | list[list[int]]:
        """As `metrics.score` wants them."""
        return [row[0] for row in self.classes] if kind == "sequence" else self.classes


def encode_examples(
    host: Host, examples: Examples, rows: Sequence[int], *, max_length: int | None = None
) -> tuple[Encoded, Tensor | None, list[int]]:
    """Encode some examples; for token tasks also the words' averaging weights [words, batch * tokens].

    A word that was cut off has weights of zero: it still gets a prediction, so that scores count it.
    :returns: Encoded batch, weights or None, and the number of predictions of each row.
    """
    texts = [examples.texts[row] for row in rows]
    pairs = [examples.pairs[row] for row in rows] if examples.pairs is not None else None
    encoded = encode(host, texts, pairs, max_length=max_length)
    if examples.words is None:
        return encoded, None, [1] * len(rows)
    spans = [list(examples.words[row]) for row in rows]
    weights, _ = pooling_matrix(encoded, spans)
    return encoded, weights.to(host.device), [len(row) for row in spans]
