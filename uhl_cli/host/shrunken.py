"""Find the map of a model without weights, on narrow copies with the same pattern of layers.

Finding a map takes a model that runs, and the meta device has no values.  So two copies of the configuration are
made, with narrow heads, feed-forward parts and tables, few experts and random weights.  The map is found on the first
and proved on each of its layers.  Carried over to the second, it is proved at another size, on a layer of each kind.
Then it is carried over to the model itself.  Widths are always those of the model that the map is carried to.  Parts
of fused modules grow with their module; where that fails at the second size, they are left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from uhl_cli.errors import HostError, HostMapError, first_line
from uhl_cli.host.hostmap import HostLayer, HostMap, TargetModule, group_of
from uhl_cli.host.inner import base_of
from uhl_cli.host.loading import without_weights
from uhl_cli.host.proof import proved_parts, resolve
from uhl_cli.host.running import MetaGroups, evaluating
from uhl_cli.host.trace import Key, Tracer
from uhl_cli.host.untrusted import FOREIGN

# Fields of configurations that are widths, which all shrink by one factor, so that their ratios stay.
_WIDTH = re.compile(
    r"(size|dim|rank|width|channels|embd|headdim|d_head|d_state|dimension|intermediate_size_mlp)$"
    r"|^(d_model|d_ff|dff|d_kv|d_inner|n_inner|d_embed|dim_ff|dim_head|mamba_d_ssm)$"
)
_NO_WIDTH = re.compile(r"vocab|window|chunk|kernel|block_size|patch|image|group_size|batch|codebook|multiple")
_HEAD = re.compile(r"(head_dim|headdim|d_head|head_size|d_kv|dim_head|kv_channels)$")
_ROTARY = re.compile(r"rotary_dim$|rope_head_dim$")
_EXPERTS = re.compile(r"^(n|num|moe_num)_(local_|routed_)?experts$")
_CHOSEN_EXPERTS = re.compile(r"experts_per_tok(en)?$|^moe_(topk|k|top_k)$|^top_k_experts$|^router_top_k$")
_TOKEN = re.compile(r"(^|_)(token_)?(id|ids|index)$")
_PART_OF_HEAD = ("partial_rotary_factor", "rotary_pct")

# Least sizes of the two copies: of a head, and of the stream.  In narrower ones facts drown in chance.
_HEAD_SIZES = (4, 8)
_WIDTHS = (32, 64)
_VOCABULARY, _EXPERT_COUNT = 512, 4
_MOST_ELEMENTS = 200_000_000
# Of a stream, and of any module.
_MOST_WIDTH, _MOST_FEATURES = 1_000_000, 100_000_000
_HINT = "Load its weights with --target, or open an issue that names the model type."
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def map_without_weights(name: str, model: nn.Module, config: Any) -> HostMap:  # noqa: ANN401 - any configuration class
    """The map of a model on the meta device.

    The caller's random state is unchanged.  The map's `base` is the model's; for an encoder-decoder, its encoder.

    :param name: The host's, for messages.
    :param config: The configuration that the model was made of.
    :raises HostMapError: A narrow copy does not run, has no map, or has other modules than the model.
    """
    base = base_of(model)
    message = f"The modules of '{name}' are not found without weights"
    try:
        found, prover = (_copy(name, config, size) for size in (0, 1))
        assert found is not None  # there is always a first size
        host_map = resolve(found)
        if prover is not None:
            host_map = _without_unproved(host_map, _carried(host_map, base_of(prover)))
        return _carried(host_map, base)
    except HostError as error:
        raise HostMapError(f"{message}: {error.message}", _HINT) from error
    except FOREIGN as error:
        raise HostMapError(f"{message}: a narrow copy does not run: {first_line(error)}", _HINT) from error


# Narrow copies.


def _copy(name: str, config: Any, size: int) -> nn.Module | None:  # noqa: ANN401
    """A random model of the narrowed configuration in float32 on the CPU; None if it has no second size.

    :raises HostError: There is no such model, or it is still large.
    """
    factor = _factor(config, size)
    if factor is None:
        return None
    fields = _narrowed(config.to_dict(), factor)
    try:
        narrow = type(config).from_dict(fields)
    except FOREIGN as error:
        raise HostError(f"it has no copy that is {factor} times as narrow: {first_line(error)}") from error
    described = without_weights(AutoModel, name, narrow)
    elements = sum(value.numel() for value in (*described.parameters(), *described.buffers()))
    if elements > _MOST_ELEMENTS:
        raise HostError(f"a copy {factor} times as narrow still has {elements:,} numbers")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(size)
        try:
            model: nn.Module = AutoModel.from_config(narrow, attn_implementation="eager").float()
        except FOREIGN as error:
            raise HostError(f"it has no copy that is {factor} times as narrow: {first_line(error)}") from error
        for value in model.parameters():
            # Every part matters, biases too, and none grows large with the depth.
            value.add_(torch.randn_like(value) * min(0.1, value.shape[-1] ** -0.5 if value.dim() > 1 else 0.1))
    return model.eval()


def _factor(config: Any, size: int) -> int | None:  # noqa: ANN401
    """What every width is divided by, the most for the least sizes; None if there is no second size."""
    fields = config.to_dict()
    heads = [value for key, value in fields.items() if _HEAD.search(key) and type(value) is int and value > 0]
    rotary = [value for key, value in fields.items() if _ROTARY.search(key) and type(value) is int and value > 0]
    heads = [value for value in heads if value not in rotary]
    width, number = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if type(width) is not int or width < 1:
        raise HostError("its configuration names no hidden_size")
    if width > _MOST_WIDTH:
        raise HostError(f"its configuration names a hidden_size of {width:,}, more than {_MOST_WIDTH:,}")
    if not heads and type(number) is int and 0 < number <= width:
        heads = [width // number]
    # Many classes ask for a width that is a multiple of the heads, even with a head size of its own.
    ratio = [width // number] if type(number) is int and number > 0 and width % number == 0 and not rotary else []
    common = math.gcd(width, *ratio, *heads, *rotary)
    if common == 1:  # such as GPT-OSS, whose ratio is 45
        common = math.gcd(width, *heads, *rotary)
    divisors = [divisor for divisor in range(1, common + 1) if common % divisor == 0]

    def fitting(head: int, stream: int) -> int:
        most = [width // stream, *(value // head for value in heads), *(value * 2 // head for value in rotary)]
        return max(divisor for divisor in divisors if divisor <= max(1, min(most)))

    first, second = (fitting(*sizes) for sizes in zip(_HEAD_SIZES, _WIDTHS, strict=True))
    if size == 0:
        return first
    return second if second != first else max((each for each in divisors if each < first), default=None)


def _narrowed(fields: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """A configuration's fields with all widths divided, few experts and token ids, and plain rotary embeddings."""
    narrow: dict[str, Any] = {}
    for key, value in fields.items():
        if key in ("quantization_config", "rope_scaling", "dtype", "torch_dtype", "id2label", "label2id"):
            continue
        if isinstance(value, dict):
            narrow[key] = _narrowed(value, factor)
        elif _is_width(key):
            narrow[key] = (
                [_divided(each, factor) for each in value] if isinstance(value, list) else _divided(value, factor)
            )
        else:
            narrow[key] = _fewer(key, value, factor)
    if "rope_type" in narrow:
        # Scales that go with another type come as lists, one for each rotary feature.
        kept = {key: value for key, value in narrow.items() if not isinstance(value, list) or key == "mrope_section"}
        narrow = kept | {"rope_type": "default"}
    return narrow


def _is_width(key: str) -> bool:
    return (_WIDTH.search(key) is not None or _ROTARY.search(key) is not None) and not _NO_WIDTH.search(key)


def _divided(value: Any, factor: int) -> Any:  # noqa: ANN401
    return max(min(value, 4), round(value / factor)) if type(value) is int else value


def _fewer(key: str, value: Any, factor: int) -> Any:  # noqa: ANN401
    """A field that is no width, with the size that it has in a copy."""
    if key == "mrope_section" and isinstance(value, list):
        ends = [0, *(round(sum(value[: index + 1]) / factor) for index in range(len(value)))]
        return [after - before for before, after in itertools.pairwise(ends)]
    if key in _PART_OF_HEAD and isinstance(value, float) and 0 < value < 1:
        return 0.5
    if _TOKEN.search(key) and isinstance(value, list):
        return [min(each, _VOCABULARY - 1) if type(each) is int else each for each in value]
    if type(value) is not int:
        return value
    if _TOKEN.search(key):
        return min(value, _VOCABULARY - 1)
    if "vocab" in key:
        return min(value, _VOCABULARY)
    if _EXPERTS.search(key):
        return min(value, _EXPERT_COUNT)
    if _CHOSEN_EXPERTS.search(key):
        return min(value, _EXPERT_COUNT // 2)
    return min(value, 1) if key in ("n_group", "topk_group") else value


# Carrying a map to a model of another size.


def _carried(host_map: HostMap, base: nn.Module) -> HostMap:
    """The map of one size for a model of another; groups of modules with parts that do not scale are left out.

    :raises HostError: The models differ in more than sizes, or the other one does not run.
    """
    if _pattern(host_map.base) != _pattern(base):
        raise HostError("a narrow copy has other modules")
    written = {linear.edited for layer in host_map.layers for linear in layer.target_modules.values()}
    linears = [linear for layer in host_map.layers for linear in (*layer.target_modules.values(), *layer.others)]
    names = {module: name for name, module in host_map.base.named_modules()}
    watched = {layer.module for layer in host_map.layers} | {linear.module for linear in linears} | written
    try:
        there = {module: base.get_submodule(names[module]) for module in watched}
        table: Any = base.get_submodule(names[host_map.embeddings])
        ids = torch.zeros(2, 5, dtype=torch.int64, device=table.weight.device)
        with torch.no_grad(), MetaGroups() if ids.is_meta else nullcontext():
            calls = Tracer(base, ids).run(watched=there.values())[1]
        shapes = {key: (call.input.shape[-1], call.output.shape[-1]) for key, call in calls.items()}
        most = max(size for pair in shapes.values() for size in pair)
        if most > _MOST_FEATURES:
            raise HostError(f"a module has {most:,} features, more than {_MOST_FEATURES:,}")
        layers = tuple(_layer(layer, there, shapes) for layer in host_map.layers)
        first = host_map.layers[0]
        width = shapes[there[first.module], first.call][0]
    except FOREIGN as error:
        raise HostError(f"the model does not run: {first_line(error)}") from error
    return replace(host_map, base=base, hidden_size=width, layers=layers, embeddings=table)


def _pattern(base: nn.Module) -> set[tuple[str, type[nn.Module]]]:
    """Classes of modules by name without numbers: lists of experts may be shorter in a copy."""
    return {(_NUMBER.sub("", name), type(module)) for name, module in base.named_modules()}


def _layer(layer: HostLayer, there: Mapping[nn.Module, nn.Module], shapes: Mapping[Key, tuple[int, int]]) -> HostLayer:
    modules: dict[str, TargetModule] = {}
    problems: dict[str, None] = dict.fromkeys([layer.problem] if layer.problem else [])
    lost: set[str] = set()
    for kind, linear in layer.target_modules.items():
        moved = _moved(linear, there, shapes)
        if moved is None:
            lost |= set(group_of(kind))
            problems[f"the part '{kind}' of '{linear.name}' does not scale with the module"] = None
        else:
            modules[kind] = moved
    return replace(
        layer,
        module=there[layer.module],
        target_modules={kind: linear for kind, linear in modules.items() if kind not in lost},
        problem="; ".join(problems),
        others=tuple(linear for linear in (_moved(other, there, shapes) for other in layer.others) if linear),
    )


def _moved(
    linear: TargetModule, there: Mapping[nn.Module, nn.Module], shapes: Mapping[Key, tuple[int, int]]
) -> TargetModule | None:
    """A target module of another size; None where its part of a fused module does not scale."""
    module = there[linear.module]
    in_features, total = shapes[module, linear.call]
    columns = _scaled(linear.columns, linear.module_features, total)
    if columns is None:
        return None
    written = None if linear.written is None else (linear.written[0], there[linear.written[1]])
    size = columns.stop - columns.start if isinstance(columns, slice) else len(columns)
    return replace(linear, module=module, in_features=in_features, out_features=size, columns=columns, written=written)


def _scaled(columns: slice | Tensor, features: int, total: int) -> slice | Tensor | None:
    """Columns among `features` as the same share of `total`: blocks grow, single columns become more.

    None if a block would begin or end within a column.
    """
    if isinstance(columns, slice):
        start, stop = columns.start * total, columns.stop * total
        exact = start % features == 0 and stop % features == 0
        return slice(start // features, stop // features) if exact else None
    step = columns[1:] - columns[:-1]
    if bool((step == step[0]).all()):  # every second column, such as gates between what they gate
        stride = int(step[0])
        exact = features % stride == 0 and total % stride == 0 and len(columns) == features // stride
        return torch.arange(int(columns[0]), total, stride, device=columns.device) if exact else None
    first = torch.cat([torch.ones(1, dtype=torch.bool), step != 1])
    starts = columns[first]
    stops = columns[torch.cat([step != 1, torch.ones(1, dtype=torch.bool)])] + 1
    if bool((torch.cat([starts, stops]) * total % features != 0).any()):
        return None
    pairs = zip((starts * total // features).tolist(), (stops * total // features).tolist(), strict=True)
    return torch.cat([torch.arange(start, stop) for start, stop in pairs])


def _without_unproved(host_map: HostMap, there: HostMap) -> HostMap:
    """The map without those modules that are not proved at another size, on one layer of each kind."""
    kinds: dict[object, int] = {}
    kind_of = [kinds.setdefault(_kind(layer), layer.index) for layer in there.layers]
    with evaluating(there.base):
        proved = proved_parts(there, set(kind_of))
    layers = []
    for layer, index in zip(host_map.layers, kind_of, strict=True):
        other = proved.layers[index]
        kept = {kind: linear for kind, linear in layer.target_modules.items() if kind in other.target_modules}
        layers.append(replace(layer, target_modules=kept, problem=other.problem))
    return replace(host_map, layers=tuple(layers))


def _kind(layer: HostLayer) -> object:
    """What layers with the same parts have in common."""
    shapes = tuple((name, tuple(value.shape)) for name, value in layer.module.named_parameters())
    return type(layer.module), shapes, tuple(layer.target_modules), layer.problem
