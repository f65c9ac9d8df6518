"""Prove a host map by running the model: check that every target module computes, and does, what its row states.

Six facts are checked, on the first and the last layer (all layers for the first fact):

1. each layer is called with a [batch, tokens, hidden_size] stream;
2. a linear's output is its input times the linear's weight, plus its bias (so the weight is not
   transposed, quantised or wrapped);
3. noise on a linear's output changes the final hidden state;
4. q acts on its own token alone, k on later ones too, and v adds the same to each token;
5. gate is inside the activation and up outside it, so doubling up doubles what down reads;
6. attention reads the stream itself, or a normalised copy of it, as the row's `pre_norm` says.

Facts 4 and 5 tell modules of equal shape apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from uhl_cli.errors import HostMapError
from uhl_cli.host.hostmap import HostLayer, HostMap, TargetModule, find_map, not_finite_hint, read_layer_input

_TOKENS = 5
_MIDDLE = 2
_HINT = "The model's code differs from its family's; use an unmodified checkpoint, or open an issue."
Edit = Callable[[Tensor], Tensor]


def resolve(model: nn.Module) -> HostMap:
    """The model's map, proved.

    :raises UnknownFamilyError: The model's type has no row.
    :raises HostMapError: A module is missing, has another shape, or does not do what its row states.
    """
    host_map = find_map(model)
    prove_map(host_map)
    return host_map


def prove_map(host_map: HostMap) -> None:
    """Check every fact of the map; the model is unchanged afterwards, bit for bit.

    :raises HostMapError: A fact does not hold; the message names the module.
    """
    modes = {module: module.training for module in host_map.base.modules()}
    host_map.base.eval()
    try:
        with torch.no_grad():
            _prove(host_map)
    finally:
        for module, training in modes.items():
            module.training = training


def _prove(host_map: HostMap) -> None:
    runner = _Runner(host_map)
    ends = {layer.index: layer for layer in (host_map.layers[0], host_map.layers[-1])}
    # Passes over a large host are slow: one pass for all readings, and one per target module's edit.
    reference = runner.run([linear for layer in ends.values() for linear in layer.target_modules.values()])
    if not bool(torch.isfinite(reference.final).all()):
        raise HostMapError("The host's hidden states are not finite numbers.", not_finite_hint(host_map))
    for layer in ends.values():
        for linear in layer.target_modules.values():
            _prove_weight(reference, linear)
        _prove_norm(host_map, reference, layer)
        edited = {kind: runner.run_edited(layer, kind, reference) for kind in layer.target_modules}
        for kind, run in edited.items():
            if torch.equal(run.final, reference.final):
                name = layer.target_modules[kind].name
                raise HostMapError(f"Editing '{name}' ({kind}) does not change the result.", _HINT)
        _prove_attention(runner, layer, reference, edited)
        _prove_feed_forward(layer, reference, edited)


@dataclass(frozen=True, eq=False)
class _Run:
    """One pass: the final hidden state, each layer's stream, and inputs and outputs of watched target modules.

    All except the first are float32 [tokens, features].
    """

    final: Tensor
    streams: dict[int, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def read(self, linear: TargetModule) -> Tensor:
        return self.inputs[_key(linear)]

    def written(self, linear: TargetModule) -> Tensor:
        return self.outputs[_key(linear)]


def _key(linear: TargetModule) -> str:
    return f"{linear.name} {linear.type}"


class _Runner:
    """Runs the base model over the same few tokens, with at most one edit at a time."""

    def __init__(self, host_map: HostMap) -> None:
        self.host_map = host_map
        device = host_map.embeddings.weight.device
        rows = host_map.embeddings.num_embeddings
        self.ids = torch.linspace(0, rows - 1, _TOKENS + 2)[1:-1].long().unsqueeze(0).to(device)
        self.generator = torch.Generator().manual_seed(0)
        self.streams: dict[int, Tensor] = {}

    def noise(self, like: Tensor, *shape: int) -> Tensor:
        """Gaussian noise of the size of `like`'s root mean square, or 1 where that is zero."""
        scale = like.float().pow(2).mean().sqrt().item() or 1.0
        noise = torch.randn(shape, generator=self.generator) * scale
        return noise.to(device=like.device, dtype=like.dtype)

    def final_state(self) -> Tensor:
        """[1, tokens, hidden_size]; also checks that every layer gets a stream, and records it."""
        hidden_size = self.host_map.hidden_size
        self.streams = {}

        def check(layer: HostLayer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                stream = read_layer_input(args, kwargs)
                if stream.shape != (1, _TOKENS, hidden_size):
                    raise HostMapError(
                        f"Layer {layer.index} gets {tuple(stream.shape)}, not a stream of {hidden_size}.", _HINT
                    )
                self.streams[layer.index] = stream.float().reshape(_TOKENS, hidden_size)

            return hook

        handles = [
            layer.module.register_forward_pre_hook(check(layer), with_kwargs=True) for layer in self.host_map.layers
        ]
        try:
            output = self.host_map.base(input_ids=self.ids, attention_mask=torch.ones_like(self.ids))
        finally:
            for handle in handles:
                handle.remove()
        if len(self.streams) != self.host_map.num_hidden_layers:
            raise HostMapError("The model does not run all of its layers.", _HINT)
        state: Tensor = output[0]
        return state

    @contextmanager
    def editing(self, linear: TargetModule, edit: Edit) -> Iterator[None]:
        """Context manager: inside it `edit` replaces the target module's columns of its module's output."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output.clone()
            output[..., linear.columns] = edit(output[..., linear.columns])
            return output

        handle = linear.module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def run(self, watched: Sequence[TargetModule]) -> _Run:
        """One pass that records inputs and outputs of the watched target modules.

        :raises HostMapError: A watched linear does not run exactly once.
        """
        kept: dict[str, list[tuple[Tensor, Tensor]]] = {_key(linear): [] for linear in watched}

        def watch(linear: TargetModule) -> RemovableHandle:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                kept[_key(linear)].append((args[0].float(), output[..., linear.columns].float()))

            return linear.module.register_forward_hook(hook)

        handles = [watch(linear) for linear in watched]
        try:
            final = self.final_state()
        finally:
            for handle in handles:
                handle.remove()
        for name, passes in kept.items():
            if len(passes) != 1:
                raise HostMapError(f"'{name}' runs {len(passes)} times in a pass, not once.", _HINT)
        return _Run(
            final=final,
            streams=self.streams,
            inputs={name: passes[0][0].reshape(_TOKENS, -1) for name, passes in kept.items()},
            outputs={name: passes[0][1].reshape(_TOKENS, -1) for name, passes in kept.items()},
        )

    def run_edited(self, layer: HostLayer, kind: str, reference: _Run) -> _Run:
        """A pass with one target module edited so as to distinguish its type; o and down are watched."""
        linear = layer.target_modules[kind]

        def at_middle(part: Tensor) -> Tensor:
            part = part.clone()
            part[:, _MIDDLE] += 4 * self.noise(part, part.shape[-1])
            return part

        edits: dict[str, Edit] = {
            "q": at_middle,
            "k": at_middle,
            "v": lambda part: part + self.value_shift(reference.written(linear)).to(part.dtype),
            "up": lambda part: 2 * part,
        }
        with self.editing(linear, edits.get(kind, lambda part: part + self.noise(part, *part.shape))):
            return self.run([layer.target_modules["o"], layer.target_modules["down"]])

    def value_shift(self, values: Tensor) -> Tensor:
        """One shift for all tokens, several times the values' own size; the same at every call."""
        self.generator.manual_seed(1)
        return 4 * self.noise(values, values.shape[-1])


def _near(actual: Tensor, expected: Tensor) -> bool:
    """Whether both are equal up to the rounding of half precision and tensor cores."""
    return bool((actual - expected).norm() <= 0.03 * expected.norm() + 1e-6)


def _prove_weight(reference: _Run, linear: TargetModule) -> None:
    bias = linear.bias()
    expected = reference.read(linear) @ linear.weight().float().T + (0.0 if bias is None else bias.float())
    if not _near(reference.written(linear), expected):
        raise HostMapError(f"'{linear.name}' ({linear.type}) computes something other than its weight.", _HINT)


def _prove_norm(host_map: HostMap, reference: _Run, layer: HostLayer) -> None:
    same = torch.equal(reference.read(layer.target_modules["q"]), reference.streams[layer.index])
    if same == host_map.family.pre_norm:
        found = "the stream itself" if same else "something other than the stream"
        raise HostMapError(f"Attention of layer {layer.index} reads {found}, unlike its family's.", _HINT)


def _prove_attention(runner: _Runner, layer: HostLayer, reference: _Run, edited: dict[str, _Run]) -> None:
    """q, k and v are told apart by which tokens' attention output (what o reads) they change."""
    o, v = layer.target_modules["o"], layer.target_modules["v"]
    before = reference.read(o)
    query, key, value = (edited[kind].read(o) - before for kind in ("q", "k", "v"))
    others = [token for token in range(_TOKENS) if token != _MIDDLE]
    own_token_only = bool(query[others].norm() <= 1e-6 * before.norm() + 1e-9)
    other_tokens_too = bool(key[others].norm() > 1e-6 * before.norm())
    # Attention weights sum to one, so a shift of all values passes unchanged, once per group of queries.
    shift = runner.value_shift(reference.written(v))
    arrived = shift.norm() * (o.in_features / v.out_features) ** 0.5
    small = 0.03 * before.norm() + 1e-6
    same = bool((value - value[0]).norm() <= small + 0.03 * value.norm())
    whole = bool((value[0].norm() - arrived).abs() <= small + 0.03 * arrived)
    if not (own_token_only and other_tokens_too and same and whole):
        raise HostMapError(f"q, k and v of layer {layer.index} do not act as such.", _HINT)


def _prove_feed_forward(layer: HostLayer, reference: _Run, edited: dict[str, _Run]) -> None:
    """Doubling up doubles what down reads, where a gate holds the activation."""
    down = layer.target_modules["down"]
    if "gate" in layer.target_modules and not _near(edited["up"].read(down), 2 * reference.read(down)):
        raise HostMapError(f"gate and up of layer {layer.index} do not act as such.", _HINT)
