"""A ported model: host, adapter and task together, ready to be called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uhl_cli.adapter.attach import Attachment, attach, refuse_elsewhere
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.align.states import pooling_matrix
from uhl_cli.align.texts import word_spans
from uhl_cli.cost.plan import PortPlan
from uhl_cli.data.examples import Examples
from uhl_cli.data.tasks import Task
from uhl_cli.data.texts import Texts, as_texts
from uhl_cli.errors import HostError, UsageError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded, encode, without_cache
from uhl_cli.host.hostmap import not_finite_hint
from uhl_cli.host.running import evaluating, use_of

Progress = Callable[[int, int], None]
BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """The most probable label of a text, and the probability of every label."""

    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class WordPrediction(Prediction):
    """The same for one word of a text, with its character span [start, end)."""

    word: str
    start: int
    end: int


@dataclass(frozen=True)
class ExampleClasses:
    """Classes per example (one for a sequence task, one per word for a token task), and active atoms per token.

    `truncated` counts the texts that were cut because they exceed the host's maximum length or `max_length`.
    """

    classes: list[list[int]]
    atoms_per_token: float
    truncated: int

    def for_metric(self, kind: str) -> list[int] | list[list[int]]:
        """The classes in the form that `metrics.score` expects."""
        return [row[0] for row in self.classes] if kind == "sequence" else self.classes


@dataclass(frozen=True)
class Outputs:
    """Logits [predictions, labels] of every example, in order: one prediction per example, or per word.

    `truncated` counts the texts that were cut, as in `ExampleClasses`.
    """

    logits: list[Tensor]
    truncated: int


class PortedModel(nn.Module):
    """A host that carries an adapter; make one with `UniversalAdapter.port`.

    Calling it returns logits.  The host is changed only during a call or inside `attached()`, and is restored bit for
    bit afterwards.  Calls run in eval mode; one thread at a time uses a host, and others wait.

    The host is not a submodule: `state_dict()`, `parameters()` and `.to()` apply to the adapter alone.
    `copy.deepcopy` and `pickle` copy the host as well.  To save the adapter on disk, use `save_ported`.

    :param strategy: The alignment strategy of the host.
    :param plan: The parts that the host carries; None when unknown.
    :param max_length: Longest input in tokens that the adapter was trained with; longer texts are truncated.
    """

    def __init__(
        self,
        host: Host,
        adapter: PortedAdapter,
        task: Task,
        *,
        strategy: str = "anchors",
        plan: PortPlan | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.host = host
        self.adapter = adapter
        self.task = task
        self.strategy = strategy
        self.plan = plan
        self.max_length = max_length

    def __repr__(self) -> str:
        readout = f"readout on depths {', '.join(self.adapter.readout.depth_weights)}"
        carried = f"updates in {len(self.adapter.layers)} layers" if self.adapter.updates else "no updates"
        if self.adapter.lora is not None:
            carried += f", LoRA of rank {self.adapter.lora.rank}"
        return (
            f"PortedModel({self.task.name!r}, {len(self.task.labels)} labels, on {self.host.name!r}: "
            f"{self.host.num_hidden_layers} layers of {self.host.hidden_size})\n"
            f"  {carried}, {readout}, {self.adapter.nbytes:,} bytes on {self.adapter.threshold.device}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """:raises HostError: The adapter is attached; the copy's host would keep the hooks."""
        if use_of(self.host.map.base).attached is not None:
            raise HostError("a model with an attached adapter cannot be copied.", "Leave its `attached()` first.")
        return dict(self.__dict__)

    def with_adapter(self, adapter: PortedAdapter) -> PortedModel:
        """The same host and task with another adapter."""
        return PortedModel(
            self.host, adapter, self.task, strategy=self.strategy, plan=self.plan, max_length=self.max_length
        )

    def to(self, *args: Any, **kwargs: Any) -> PortedModel:  # noqa: ANN401 - the signature is torch's
        """Move the adapter; warns if the host is then on another device.

        A new dtype applies to floating-point tensors; packed tables keep theirs.
        """
        found = super().to(*args, **kwargs)
        try:
            refuse_elsewhere(self.adapter, self.host.map)
        except HostError as error:
            warnings.warn(str(error), stacklevel=2)
        return found

    def attached(self) -> AbstractContextManager[Attachment]:
        """Context manager: inside it the host's own forward pass (with any head) includes the updates.

        :raises HostError: On entry, when another adapter is attached, or adapter and host are on different devices.
        """
        return attach(self.host.map, self.adapter, name=f"the adapter for {self.task.name}")

    def forward(
        self,
        texts: Texts,
        pairs: Texts | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        gradients: bool = False,
    ) -> Tensor:
        """Logits float32 [texts, labels] of a sequence task, in the order of the texts.

        Texts are batched by similar length, so one long text slows down one batch only.

        :param texts: One string, or a list, numpy array or pandas column of strings.
        :param max_length: Longest input in tokens; by default that of the adapter's training, or of the host.
        :param gradients: Record the graph, so that gradients flow to the host's parameters and the adapter's buffers.
        :raises DataError: An entry is not a string, or there are more or fewer pairs than texts.
        :raises UsageError: The task labels words; use `predict`.
        """
        if self.task.kind != "sequence":
            raise UsageError(
                f"{self.task.name} labels words, and logits of words are not of texts.", "Use predict(texts)."
            )
        examples = _examples(texts, pairs)
        with torch.set_grad_enabled(True) if gradients else torch.inference_mode():
            found = self._run(examples, batch_size=batch_size, max_length=max_length).logits
            return torch.cat(found)

    def predict(
        self,
        texts: Texts,
        pairs: Texts | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> list[Prediction] | list[list[WordPrediction]]:
        """Label and probabilities of every text, or of every word of every text for a token task; see `forward`.

        Words are runs of letters and single punctuation marks, see `align.texts.word_spans`.

        :raises DataError: An entry is not a string, or there are more or fewer pairs than texts.
        """
        examples = _examples(texts, pairs, words=self.task.kind == "tokens")
        with torch.inference_mode():
            logits = self._run(examples, batch_size=batch_size, max_length=max_length, progress=progress).logits
            rows = [part.float().softmax(-1).tolist() for part in logits]
        if examples.words is None:
            return [Prediction(*self._named(row[0])) for row in rows]
        return [
            [
                WordPrediction(*self._named(values), text[start:end], start, end)
                for values, (start, end) in zip(row, spans, strict=True)
            ]
            for row, text, spans in zip(rows, examples.texts, examples.words, strict=True)
        ]

    def _named(self, probabilities: Sequence[float]) -> tuple[str, dict[str, float]]:
        named = dict(zip(self.task.labels, probabilities, strict=True))
        return max(named, key=lambda label: named[label]), named

    @torch.inference_mode()
    def classes_of(
        self,
        examples: Examples,
        *,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> ExampleClasses:
        """Predicted classes of every example, in order, and the mean number of active atoms per token."""
        found = self._run(examples, batch_size=batch_size, max_length=max_length, progress=progress)
        classes = [part.argmax(-1).tolist() for part in found.logits]
        return ExampleClasses(classes, found.atoms_per_token, found.truncated)

    @torch.inference_mode()
    def outputs_of(
        self,
        examples: Examples,
        *,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> Outputs:
        """Logits float32 on the CPU of every example, and how many texts were cut."""
        found = self._run(examples, batch_size=batch_size, max_length=max_length, progress=progress)
        return Outputs([part.float().cpu() for part in found.logits], found.truncated)

    def logits_of(
        self,
        examples: Examples,
        *,
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Logits float32 [predictions, labels] of every example, in order: one prediction per example, or per word."""
        return self.outputs_of(examples, batch_size=batch_size, max_length=max_length, progress=progress).logits

    def _run(
        self, examples: Examples, *, batch_size: int, max_length: int | None, progress: Progress | None = None
    ) -> _Run:
        """Logits [predictions, labels] of every example, in order."""
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}.", "Pass 1 or more.")
        longest = self.max_length if max_length is None else max_length
        order = sorted(range(len(examples)), key=lambda row: -len(examples.texts[row]))
        logits: dict[int, Tensor] = {}
        active, tokens, truncated = 0.0, 0, 0
        with self._attached_for_a_call() as attachment:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                encoded, words, counts = encode_examples(self.host, examples, rows, max_length=longest)
                found, mean_active = forward(self.host, attachment, encoded.to(self.host.device), words)
                refuse_not_finite(self.host, found, counts, [examples.texts[row] for row in rows], encoded)
                truncated += encoded.truncated
                logits.update(zip(rows, torch.split(found, counts), strict=True))
                count = int(encoded.content_mask.sum())
                active, tokens = active + float(mean_active.detach()) * count, tokens + count
                if progress:
                    progress(min(start + batch_size, len(order)), len(order))
        return _Run([logits[row] for row in range(len(examples))], active / max(tokens, 1), truncated)

    @contextmanager
    def _attached_for_a_call(self) -> Iterator[Attachment]:
        with evaluating(self.host.map.base), self.attached() as attachment:
            yield attachment


def refuse_not_finite(
    host: Host, values: Tensor, counts: Sequence[int], texts: Sequence[str], encoded: Encoded
) -> None:
    """Return only if all values are finite numbers: a comparison takes those that are not for the first class.

    :param values: What the host gave, [sum of `counts`, ...], so many rows for each text.
    :raises HostError: One is not; names its text, and the token whose embedding is the reason, if there is one.
    """
    if values.isfinite().all():
        return
    parts = torch.split(values, list(counts))
    place = next(index for index, part in enumerate(parts) if not part.isfinite().all())
    ids = encoded.input_ids[place]
    table = host.map.embeddings.weight.detach()
    wrong = [token for token in sorted(set(ids.tolist())) if not table[token].isfinite().all()]
    reason = ""
    if wrong and host.tokenizer is not None:
        reason = f", because the embedding of its token {host.tokenizer.convert_ids_to_tokens(wrong[0])!r} is not"
    problem = f"the outputs of '{host.name}' are not finite for the text {texts[place][:60]!r}{reason}."
    hint = not_finite_hint(host.map) if wrong or table.dtype != torch.float32 else "Check it and the adapter file."
    raise HostError(problem, hint)


@dataclass(frozen=True)
class _Run:
    logits: list[Tensor]
    atoms_per_token: float
    truncated: int


def forward(host: Host, attachment: Attachment, encoded: Encoded, words: Tensor | None) -> tuple[Tensor, Tensor]:
    """One forward pass of an attached host: logits (see `PortedReadout.logits`) and mean active atoms per token."""
    output = host.map.base(**encoded.model_inputs(), **without_cache(host))
    features = attachment.readout_features(output.last_hidden_state)
    logits = attachment.readout.logits(features, encoded.content_mask, words)
    return logits, attachment.active_atoms(encoded.content_mask)


def encode_examples(
    host: Host, examples: Examples, rows: Sequence[int], *, max_length: int | None = None
) -> tuple[Encoded, Tensor | None, list[int]]:
    """Encode examples; for token tasks also the words' averaging weights [words, batch * tokens].

    A truncated word has zero weights: it still gets a prediction, so scores count it.
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


def _examples(texts: Texts, pairs: Texts | None, *, words: bool = False) -> Examples:
    """Unlabelled examples of texts, with the spans of their words if asked."""
    given = tuple(as_texts(texts))
    second = None if pairs is None else tuple(as_texts(pairs))
    if not words:
        return Examples(texts=given, pairs=second, labels=(0,) * len(given))  # the labels are never read
    spans = tuple(tuple(word_spans(text)) for text in given)
    return Examples(texts=given, words=spans, tags=tuple((0,) * len(row) for row in spans))
