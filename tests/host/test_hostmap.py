"""Maps of the commonest families are what their code says, and a map that lies is not proved."""

from dataclasses import replace

import pytest
import torch
from tiny_hosts import DECODERS, FAMILIES, tiny_host, tiny_model
from torch import nn
from transformers import BertForSequenceClassification

from uhl_cli.errors import HostMapError
from uhl_cli.host.hostmap import READER_TYPES, read_layer_input
from uhl_cli.host.proof import proved_parts, resolve

BERT = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
LLAMA = {
    **{kind: f"self_attn.{kind}_proj" for kind in "qkvo"},
    **{kind: f"mlp.{kind}_proj" for kind in ("up", "down", "gate")},
}
# Written from the models' code: the list of layers, the embeddings, the pooler, and the modules of a layer.
KNOWN = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta"), ("encoder.layer", "embeddings.word_embeddings", "pooler", BERT)
    ),
    "electra": ("encoder.layer", "embeddings.word_embeddings", None, BERT),
    "distilbert": (
        "transformer.layer",
        "embeddings.word_embeddings",
        None,
        {**{kind: f"attention.{kind}_lin" for kind in "qkv"}, "o": "attention.out_lin", "up": "ffn.lin1",
         "down": "ffn.lin2"},
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2"), ("layers", "embed_tokens", None, LLAMA)),
    "gpt2": (
        "h",
        "wte",
        None,
        {**dict.fromkeys("qkv", "attn.c_attn"), "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    ),
}  # fmt: skip


def changed(host_map, **modules):
    """The map with other target modules in every layer: attributes to replace, or the type whose place it takes."""

    def other(layer, kind, change):
        old = layer.target_modules[kind]
        if isinstance(change, str):
            taken = layer.target_modules[change]
            return replace(taken, type=kind, space=old.space, written=old.written)
        return replace(old, **change)

    layers = []
    for layer in host_map.layers:
        others = {kind: other(layer, kind, change) for kind, change in modules.items()}
        layers.append(replace(layer, target_modules={**layer.target_modules, **others}))
    return replace(host_map, layers=tuple(layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_is_what_the_models_code_says(family):
    model = tiny_model(family, num_hidden_layers=3)
    host_map = resolve(model)
    path, embeddings, pooler, modules = KNOWN[family]
    assert (host_map.hidden_size, host_map.num_hidden_layers, host_map.degree) == (32, 3, "all")
    assert host_map.decoder == (family in DECODERS)
    assert host_map.embeddings is model.get_submodule(embeddings)
    assert host_map.pooler == pooler
    pre_norm = family in DECODERS
    for index, layer in enumerate(host_map.layers):
        assert layer.name == f"{path}.{index}"
        assert {kind: linear.name for kind, linear in layer.target_modules.items()} == {
            kind: f"{path}.{index}.{name}" for kind, name in modules.items()
        }
        for kind, linear in layer.target_modules.items():
            assert model.get_submodule(linear.name) is linear.module
            assert linear.weight().shape == (linear.out_features, linear.in_features)
            assert not linear.weight().requires_grad
            read = "attention" if pre_norm else "stream"
            assert linear.space == ("mlp" if kind in ("up", "gate") else read if kind in READER_TYPES else "stream")
            assert linear.transposed == (family == "gpt2")
    grouped = family in ("llama", "mistral", "qwen2")
    assert host_map.layers[0].target_modules["k"].out_features == (16 if grouped else 32)
    if family == "gpt2":
        columns = [host_map.layers[0].target_modules[kind].columns for kind in "qkv"]
        assert columns == [slice(0, 32), slice(32, 64), slice(64, 96)]


@pytest.mark.parametrize("family", FAMILIES)
def test_resolving_leaves_the_model_bit_for_bit(family):
    model = tiny_model(family)
    model.train()
    next(model.modules()).eval()  # a mixture of modes, which must come back as it was
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    resolve(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_half_precision_is_proven_too(family, dtype):
    assert resolve(tiny_model(family).to(dtype)).degree == "all"


def test_model_with_a_head_is_mapped_at_its_base():
    model = BertForSequenceClassification(tiny_model("bert").config).eval()
    assert resolve(model).base is model.bert


@pytest.mark.parametrize(("family", "unused"), [("bert", 0), ("roberta", 2), ("xlm-roberta", 2), ("gpt2", 0)])
def test_positions_count_from_the_first_that_a_text_reads(family, unused):
    model = tiny_model(family)
    assert model.config.max_position_embeddings == 64 + unused
    assert resolve(model).positions == 64


@pytest.mark.parametrize("family", ["gpt2", "bert", "qwen2"])
def test_weight_and_bias_give_the_output_columns(family):
    host = tiny_host(family)
    seen = {}
    ids = torch.arange(3, 9).unsqueeze(0)
    for kind in ("q", "k", "v", "o", "up", "down"):
        linear = host.map.layers[1].target_modules[kind]

        def keep(_module, args, output, kind=kind):
            seen[kind] = (args[0], output)

        handle = linear.module.register_forward_hook(keep)
        host.model(input_ids=ids)
        handle.remove()
        inputs, output = seen[kind]
        bias = linear.bias()
        expected = inputs @ linear.weight().T + (0 if bias is None else bias)
        torch.testing.assert_close(output[..., linear.columns], expected)
        if family == "gpt2" and kind == "k":  # negative control: another third is another weight
            other = expected @ torch.eye(32)
            assert not torch.allclose(output[..., host.map.layers[1].target_modules["v"].columns], other)


ATTENTION, FEED_FORWARD = {"q", "k", "v", "o"}, {"up", "down", "gate"}


@pytest.mark.parametrize(
    ("family", "modules", "lost", "words"),
    [
        ("bert", {"q": "k", "k": "q"}, ATTENTION, "q, k and v of layer 0 do not act as such"),
        ("bert", {"v": "k", "k": "v"}, ATTENTION, "do not act as such"),
        ("bert", {"q": {"transposed": True}}, ATTENTION, "something other than its weight"),
        ("llama", {"up": "gate", "gate": "up"}, FEED_FORWARD, "gate and up of layer 0 do not act as such"),
        ("llama", {"k": "v", "v": "k"}, ATTENTION, "do not act as such"),
        ("gpt2", {"q": "v", "v": "q"}, ATTENTION, "do not act as such"),
        ("gpt2", {"o": {"transposed": False}}, ATTENTION, "something other than its weight"),
        ("gpt2", {"q": {"columns": slice(32, 64)}}, ATTENTION, "do not act as such"),
        *(
            (family, {"q": {"space": other}}, ATTENTION, words)
            for family, other, words in (
                ("bert", "attention", "reads the stream itself"),
                ("llama", "stream", "something other than the stream"),
            )
        ),
    ],
)
def test_a_part_that_lies_is_left_out_with_its_reason(family, modules, lost, words):
    host_map = resolve(tiny_model(family))
    assert proved_parts(host_map).degree == "all"  # the same map without the lie
    proved = proved_parts(changed(host_map, **modules))
    for layer, before in zip(proved.layers, host_map.layers, strict=True):
        assert layer.target_modules.keys() == before.target_modules.keys() - lost
    assert words in proved.layers[0].problem


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_map_that_is_wrong_about_direction_is_refused(family):
    host_map = resolve(tiny_model(family))
    with pytest.raises(HostMapError, match="depend on later tokens, unlike what the map says"):
        proved_parts(replace(host_map, decoder=not host_map.decoder))


def test_a_map_that_is_wrong_about_layers_is_refused():
    host_map = resolve(tiny_model("bert", num_hidden_layers=3))
    first, second, third = host_map.layers
    with pytest.raises(HostMapError, match="does not hand its stream on to the next"):
        proved_parts(replace(host_map, layers=(first, third)))
    with pytest.raises(HostMapError, match="runs 1 times"):
        proved_parts(replace(host_map, layers=(first, replace(second, calls=2), third)))
    with pytest.raises(HostMapError, match="not a stream of 64"):
        proved_parts(replace(host_map, hidden_size=64))


class Doubled(nn.Linear):
    """Computes more than its weight."""

    def forward(self, states):
        return 2 * super().forward(states)


def test_a_module_that_computes_more_than_its_weight_is_left_out():
    model = tiny_model("bert")
    old = model.encoder.layer[0].attention.self.query
    new = model.encoder.layer[0].attention.self.query = Doubled(32, 32)
    new.load_state_dict(old.state_dict())
    host_map = resolve(model)
    assert host_map.degree == "some"
    first, second = host_map.layers
    assert first.target_modules.keys() == {"up", "down"}
    assert first.problem
    assert second.target_modules.keys() == set(BERT)


def test_a_module_without_effect_is_left_out():
    model = tiny_model("bert", num_hidden_layers=1)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.zero_()
    (layer,) = resolve(model).layers
    assert layer.target_modules.keys() == ATTENTION
    assert layer.problem


def test_integer_weights_are_refused_with_a_hint():
    class Rounded(nn.Linear):
        """As libraries of quantisation compute."""

        def forward(self, states):
            return nn.functional.linear(states, self.weight.float() / 127, self.bias)

    model = tiny_model("bert")
    new = model.encoder.layer[1].attention.self.query = Rounded(32, 32)
    new.weight = nn.Parameter((127 * new.weight.detach()).to(torch.int8), requires_grad=False)
    with pytest.raises(HostMapError, match=r"layer\.1\.attention.*no floating-point weight matrix") as caught:
        resolve(model.requires_grad_(False))
    assert "quantis" in caught.value.hint


def test_states_that_are_no_numbers_are_refused():
    model = tiny_model("bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(HostMapError, match="finite"):
        resolve(model)


def test_a_module_that_reads_no_token_ids_is_no_host():
    with pytest.raises(HostMapError, match="does not run on token ids"):
        resolve(nn.Linear(2, 2))


def test_layer_input_is_found_by_position_or_name():
    stream = torch.zeros(1, 5, 8)
    assert read_layer_input((stream,), {}) is stream
    assert read_layer_input((), {"hidden_states": stream}) is stream
    for args, kwargs in (((), {}), ((None,), {}), ((torch.zeros(5, 8),), {})):
        with pytest.raises(HostMapError):
            read_layer_input(args, kwargs)
