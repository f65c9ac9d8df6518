"""What is found and proved in models whose modules are fused, shared, normalised, or no attention."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_hosts import tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, BertModel

from uhl_cli.errors import HostMapError
from uhl_cli.host import layer_search
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.proof import proved_parts, resolve


def small(model_type: str, seed: int = 0, **settings: object) -> nn.Module:
    """A random model of a type."""
    common = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **{**common, "intermediate_size": 96, "pad_token_id": 0, **settings})
    torch.manual_seed(seed)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def described(host_map: HostMap) -> dict[str, object]:
    """What a map says, without modules."""
    layers = [
        {
            kind: (linear.name, torch.arange(linear.module_features)[linear.columns].tolist(), linear.transposed,
                   linear.space, linear.in_features, linear.out_features, linear.call, linear.written, linear.scale)
            for kind, linear in sorted(layer.target_modules.items())
        }
        for layer in host_map.layers
    ]  # fmt: skip
    ends = (host_map.decoder, host_map.pooler, host_map.positions, host_map.hidden_size)
    return {"layers": layers, "ends": ends, "names": [layer.name for layer in host_map.layers]}


def test_fused_and_interleaved_projections():
    found = resolve(small("gpt_neox", intermediate_size=128))
    linear = found.layers[0].target_modules["k"]
    assert linear.fused
    assert isinstance(linear.columns, torch.Tensor)
    assert linear.columns.tolist() == [index for head in range(4) for index in range(24 * head + 8, 24 * head + 16)]


def test_a_norm_between_writer_and_stream_is_where_the_edit_goes():
    model = small("gemma2", head_dim=8, num_key_value_heads=2)
    linear = resolve(model).layers[1].target_modules["down"]
    assert linear.written is not None
    assert linear.written[0] == "layers.1.post_feedforward_layernorm"
    assert linear.edited is model.get_submodule(linear.written[0])


def test_a_map_whose_writer_is_normalised_before_it_is_added_is_not_proved():
    model = small("gemma2", head_dim=8, num_key_value_heads=2)
    found = resolve(model)
    assert found.degree == "all"
    layers = tuple(
        replace(
            layer,
            target_modules={kind: replace(linear, written=None) for kind, linear in layer.target_modules.items()},
        )
        for layer in found.layers
    )
    proved = proved_parts(replace(found, layers=layers))
    assert all("does not arrive in the stream as added" in layer.problem for layer in proved.layers)
    assert proved.degree == "stream"


def test_a_causal_bert_is_a_decoder():
    config = tiny_config("bert", 300, hidden_size=32, num_hidden_layers=2)
    config.is_decoder = True
    torch.manual_seed(0)
    assert resolve(BertModel(config).eval()).decoder


def test_shared_layers_are_told_apart_by_their_call():
    found = resolve(small("albert", num_hidden_layers=3, embedding_size=16))
    assert [(layer.name, layer.call, layer.calls) for layer in found.layers] == [
        ("encoder.albert_layer_groups.0", index, 3) for index in range(3)
    ]
    assert [layer.target_modules["q"].call for layer in found.layers] == [0, 1, 2]


def test_the_encoder_of_an_encoder_decoder_is_the_host():
    torch.manual_seed(0)
    config = AutoConfig.for_model("t5", vocab_size=300, d_model=32, d_kv=8, d_ff=96, num_layers=2, num_heads=4)
    model = AutoModel.from_config(config).eval()
    found = resolve(model)
    assert found.base is model.encoder
    assert (found.degree, found.decoder, found.num_hidden_layers) == ("all", False, 2)


def test_state_space_layers_have_no_target_modules_but_linear_ones():
    found = resolve(small("mamba", state_size=8, expand=2, time_step_rank=4))
    assert found.degree == "stream"
    assert all(layer.problem and not layer.target_modules for layer in found.layers)
    assert {linear.name for linear in found.layers[0].others} >= {"layers.0.mixer.in_proj", "layers.0.mixer.out_proj"}


def test_a_model_without_a_list_of_layers_is_refused():
    config = AutoConfig.for_model("xlm", n_words=300, emb_dim=32, n_layers=2, n_heads=4)
    with pytest.raises(HostMapError, match="No list of layers of XLMModel hands a stream on"):
        resolve(AutoModel.from_config(config).eval())


def test_a_copy_has_the_same_map():
    model = small("albert", embedding_size=16)
    found = resolve(model)
    twin = copy.deepcopy(model)
    moved = found.on(twin)
    assert described(moved) == described(found)
    assert moved.layers[1].target_modules["q"].module is twin.get_submodule(found.layers[1].target_modules["q"].name)


@pytest.mark.parametrize(("size", "degree"), [(0.0, "all"), (3e-6, "all"), (1e-3, "some")])
def test_rounding_of_a_lone_token_gives_no_feature_another_role(monkeypatch, size, degree):
    """A lone token's queries and keys have no gradient but for rounding; a larger one would make values of them."""
    model = small("gpt_neox", intermediate_size=128)
    wanted, real = described(resolve(model)), layer_search._Block._gradients

    def rounded(self, readers, output, tokens):
        found = real(self, readers, output, tokens)
        most = max(float(value.max()) for value in found.values())
        return {key: value + size * most * (tokens == 1) for key, value in found.items()}

    monkeypatch.setattr(layer_search._Block, "_gradients", rounded)
    found = resolve(model)
    assert found.degree == degree
    assert (described(found) == wanted) is (degree == "all")


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_heads_that_attend_to_one_token_hide_no_feature(monkeypatch, family):
    model = tiny_model(family)
    queries = [linear.weight() for layer in resolve(model).layers for linear in [layer.target_modules["q"]]]
    with torch.no_grad():
        for weight in queries:
            weight.mul_(100)  # a view of the module's own
    assert resolve(model).degree == "all"
    monkeypatch.setattr(layer_search, "_READER_SIZE", 1e9)  # with queries of their own size
    monkeypatch.setattr(layer_search, "_TEXTS", 1)
    assert resolve(model).degree != "all"


@pytest.mark.parametrize("feature", [5.0, 200.0])
def test_what_is_small_beside_the_stream_is_found_in_half_precision(feature):
    """A shift of its own size would be lost in the stream's rounding."""
    model = small("gemma2", head_dim=8, num_key_value_heads=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[::3, 5] = feature
        for layer in model.layers:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.fill_(-0.97)  # it multiplies by one more than this
    assert resolve(model.to(torch.bfloat16)).degree == "all"
