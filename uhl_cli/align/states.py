"""Word states: a host's hidden states at every depth for the words of some texts.

The host runs once over the texts.  A word's state is the mean over the states of its sub-tokens (docs/method.md,
"Anchor texts and words"), so states of hosts with different tokenizers can be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from uhl_cli.align.texts import AnchorTexts
from uhl_cli.errors import AlignmentError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded, encode, tokens_of_spans
from uhl_cli.host.hostmap import HostMap, not_finite_hint, read_layer_input

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WordStates:
    """States of N anchor words in a host of width d and depth L, float32.

    `stream[l]` [N, d] is the input of layer l, and `stream[L]` the host's last hidden state.
    `attention[l]`, `mlp[l]` [N, d] are the inputs of the q and the up module of layer l.  In hosts that normalise
    after the layer, `attention[l]` is the same tensor as `stream[l]`; so are both in layers without these modules.
    `present` [N] is False for words that the host never saw (truncated at its maximum length).
    """

    stream: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]
    mlp: tuple[Tensor, ...]
    present: Tensor

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers L."""
        return len(self.attention)

    def each(self, change: Callable[[Tensor], Tensor]) -> WordStates:
        """Apply `change` to each state; states that share a tensor still share it."""
        stream, mlp = tuple(map(change, self.stream)), tuple(map(change, self.mlp))
        attention = tuple(
            stream[index] if state is self.stream[index] else change(state)
            for index, state in enumerate(self.attention)
        )
        return WordStates(stream, attention, mlp, self.present)

    def present_only(self) -> WordStates:
        """The states of the words that the host saw."""
        seen = self.each(lambda state: state[self.present])
        return replace(seen, present=self.present[self.present])


@contextmanager
def record_states(host_map: HostMap, record: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Call `record(place, layer, state)` for every layer's stream, attention and mlp input; remove hooks at exit.

    For one pass of the host.  Layers without attention or feed-forward part have no such places.
    """
    handles = []
    try:
        for module, places in _recorded(host_map).items():
            calls = itertools.count()

            def hook(
                _module: nn.Module,
                args: tuple[object, ...],
                kwargs: dict[str, object],
                places: dict[int, list[tuple[str, int]]] = places,
                calls: Iterator[int] = calls,
            ) -> None:
                for place, index in places.get(next(calls), ()):
                    record(place, index, read_layer_input(args, kwargs) if place == "stream" else _first(args))

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorded(host_map: HostMap) -> dict[nn.Module, dict[int, list[tuple[str, int]]]]:
    """(place, layer) by module and number of its call in a pass."""
    found: dict[nn.Module, dict[int, list[tuple[str, int]]]] = {}
    for layer in host_map.layers:
        found.setdefault(layer.module, {}).setdefault(layer.call, []).append(("stream", layer.index))
        for place, module_type in (("attention", "q"), ("mlp", "up")):
            linear = layer.target_modules.get(module_type)
            if linear is not None:
                found.setdefault(linear.module, {}).setdefault(linear.call, []).append((place, layer.index))
    return found


def _first(args: tuple[object, ...]) -> Tensor:
    state = args[0]
    assert isinstance(state, Tensor)  # a linear module's only argument
    return state


def pooling_matrix(encoded: Encoded, spans: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Averaging weights [N, batch * tokens] of the words over the tokens, and a mask [N] of the words seen."""
    batch, tokens = encoded.input_ids.shape
    weights = torch.zeros(sum(len(row) for row in spans), batch, tokens)
    word = 0
    for row, row_spans in enumerate(spans):
        overlap = tokens_of_spans(encoded, row, row_spans).float()
        weights[word : word + len(row_spans), row] = overlap / overlap.sum(1, keepdim=True).clamp_min(1)
        word += len(row_spans)
    flat = weights.view(len(weights), batch * tokens)
    return flat, flat.any(dim=1)


@dataclass(frozen=True)
class WordBatch:
    """A batch of texts: `rows` int64, indices of its words among all anchor words; `weights` [words, tokens]."""

    rows: Tensor
    weights: Tensor
    encoded: Encoded


def word_batches(
    host: Host, anchors: AnchorTexts, *, batch_size: int = 32, every: int = 1, progress: Progress | None = None
) -> Iterator[WordBatch]:
    """The anchor texts in batches of similar length, each with those of its words that fit into the host's input.

    :param every: Yield only every n-th batch, starting with the first.
    """
    order = sorted(range(len(anchors.texts)), key=lambda index: (-len(anchors.texts[index]), index))
    counts = torch.tensor([len(ordinals) for ordinals in anchors.chosen])
    starts = torch.cumsum(counts, 0) - counts
    for start in range(0, len(order), batch_size * every):
        chosen = order[start : start + batch_size]
        encoded = encode(host, [anchors.texts[index] for index in chosen])
        weights, present = pooling_matrix(encoded, [anchors.spans(index) for index in chosen])
        rows = torch.cat([torch.arange(int(counts[index])) + starts[index] for index in chosen])
        yield WordBatch(rows[present], weights[present].to(host.device), encoded.to(host.device))
        if progress:
            progress(min(start + batch_size, len(order)), len(order))


@torch.inference_mode()
def word_states(
    host: Host, anchors: AnchorTexts, *, batch_size: int = 16, progress: Progress | None = None
) -> WordStates:
    """Run `host` once over the anchor texts and return its word states.

    :raises AlignmentError: When a state is not finite, or fewer than half of the words fit into the host.
    """
    joined: dict[tuple[str, int], Tensor] = {}
    present = torch.zeros(anchors.num_words, dtype=torch.bool)
    stream: Tensor | None = None
    for batch in word_batches(host, anchors, batch_size=batch_size, progress=progress):

        def record(place: str, index: int, state: Tensor, batch: WordBatch = batch) -> None:
            nonlocal stream
            if place == "attention" and state is stream:
                return
            if place == "stream":
                stream = state
            pooled = batch.weights @ state.reshape(-1, state.shape[-1]).float()
            if (place, index) not in joined:
                joined[place, index] = torch.zeros(len(present), pooled.shape[1])
            joined[place, index][batch.rows] = pooled.cpu()

        with record_states(host.map, record):
            output = host.map.base(**batch.encoded.model_inputs())
        record("stream", host.num_hidden_layers, output.last_hidden_state)
        present[batch.rows] = True
    if not all(torch.isfinite(state).all() for state in joined.values()):
        raise AlignmentError(
            f"the host {host.name} gives states that are not finite on the anchor texts.",
            not_finite_hint(host.map),
        )
    if int(present.sum()) < max(16, len(present) // 2):
        raise AlignmentError(
            f"the host {host.name} has room for only {int(present.sum())} of {len(present)} anchor words.",
            "Its longest input is too short for them; choose another host, or pretrain with shorter --anchors.",
        )
    depth = host.num_hidden_layers
    return WordStates(
        stream=tuple(joined["stream", index] for index in range(depth + 1)),
        attention=tuple(joined.get(("attention", index), joined["stream", index]) for index in range(depth)),
        mlp=tuple(joined.get(("mlp", index), joined["stream", index]) for index in range(depth)),
        present=present,
    )
