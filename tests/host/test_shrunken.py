"""A map without weights, found on narrow copies, equals the map that is found on the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from uhl_cli.cost.flops import count_map_flops
from uhl_cli.cost.flops_fvcore import count_flops_fvcore
from uhl_cli.cost.memory import peak_bytes
from uhl_cli.cost.passes import PassShape
from uhl_cli.errors import HostMapError
from uhl_cli.host import shrunken
from uhl_cli.host.config_only import load_config_host
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.loading import without_weights
from uhl_cli.host.proof import resolve
from uhl_cli.host.shrunken import map_without_weights

# By name: the model type, and what differs from the common sizes.
TYPES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3": ("qwen3", {"head_dim": 32, "num_key_value_heads": 2}),
    "gemma2": ("gemma2", {"head_dim": 32, "num_key_value_heads": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon, each head": ("falcon", {"multi_query": False, "new_decoder_architecture": False, "alibi": True}),
    "falcon, groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "modernbert": ("modernbert", {"global_attn_every_n_layers": 2}),
    "deberta-v2": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}),
    "albert": ("albert", {"embedding_size": 64}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "t5": ("t5", {"d_model": 128, "d_kv": 32, "d_ff": 320, "num_layers": 3, "num_heads": 4}),
    "mpnet": ("mpnet", {}),
}


def made(model_type: str, **changes: object) -> tuple[object, nn.Module]:
    """A configuration whose heads have 32 features, and a random model of it."""
    sizes = {"vocab_size": 700, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **{**sizes, "intermediate_size": 320, "pad_token_id": 0, **changes})
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return config, model.eval()


def hollow(config: object, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = without_weights(AutoModel, "host", config).to(dtype)
    model.config.pad_token_id = None  # type: ignore[union-attr, assignment]
    return model


def described(host_map: HostMap) -> dict[str, object]:
    """What a map says, without modules."""
    layers = [
        {
            kind: (linear.name, torch.arange(linear.module_features)[linear.columns].tolist(), linear.transposed,
                   linear.space, linear.in_features, linear.out_features, linear.call, linear.calls, linear.matrix,
                   None if linear.written is None else linear.written[0], round(linear.scale, 2))
            for kind, linear in layer.target_modules.items()
        }
        for layer in host_map.layers
    ]  # fmt: skip
    ends = (host_map.decoder, host_map.pooler, host_map.positions, host_map.hidden_size, host_map.degree)
    places = [
        (layer.name, layer.call, layer.calls, layer.problem, [(each.name, each.out_features) for each in layer.others])
        for layer in host_map.layers
    ]
    return {"layers": layers, "ends": ends, "places": places}


@pytest.mark.parametrize("name", TYPES)
def test_the_map_without_weights_is_that_of_the_model(name):
    model_type, changes = TYPES[name]
    config, model = made(model_type, **changes)
    state = torch.get_rng_state()
    found = map_without_weights(name, hollow(config), config)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.is_meta for value in found.base.parameters())
    assert all(
        found.base.get_submodule(linear.name) is linear.module
        for layer in found.layers
        for linear in layer.target_modules.values()
    )
    assert described(found) == described(resolve(model))


def test_state_space_layers_have_the_stream_alone():
    config, _ = made("mamba", state_size=8, time_step_rank=8)
    found = map_without_weights("mamba", hollow(config), config)
    assert (found.degree, found.hidden_size, found.num_hidden_layers) == ("stream", 128, 3)
    linears = {(each.name.split(".")[-1], each.in_features, each.out_features) for each in found.layers[1].others}
    assert linears == {("in_proj", 128, 640), ("x_proj", 320, 24), ("out_proj", 320, 128)}
    assert all(layer.problem for layer in found.layers)


def test_a_rule_for_columns_that_fails_at_the_second_size_leaves_them_out(monkeypatch):
    config, _ = made("gpt_neox")
    scaled = shrunken._scaled

    def turned(columns, features, total):
        found = scaled(columns, features, total)
        return (found + 1) % total if isinstance(found, torch.Tensor) else found

    monkeypatch.setattr(shrunken, "_scaled", turned)
    found = map_without_weights("neox", hollow(config), config)
    assert found.degree == "some"
    assert all(set(layer.target_modules) == {"up", "down"} and "do not act" in layer.problem for layer in found.layers)


def test_parts_that_do_not_scale_are_left_out(monkeypatch):
    config, _ = made("phi3", num_key_value_heads=2)
    scaled = shrunken._scaled
    monkeypatch.setattr(shrunken, "_scaled", lambda part, *sizes: None if part.start else scaled(part, *sizes))
    found = map_without_weights("phi", hollow(config), config)
    assert not any("q" in layer.target_modules or "up" in layer.target_modules for layer in found.layers)
    assert "the part 'k' of 'layers.0.self_attn.qkv_proj' does not scale" in found.layers[0].problem


def columns(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_columns_scale_by_blocks_and_by_steps():
    scaled = shrunken._scaled
    assert scaled(slice(8, 12), 12, 36) == slice(24, 36)
    assert scaled(slice(8, 11), 12, 18) is None
    per_head = scaled(columns(2, 3, 8, 9), 12, 24)  # two heads of q, k, v with two features each
    assert per_head.tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert scaled(columns(2, 3, 8, 9), 12, 30).tolist() == [*range(5, 10), *range(20, 25)]
    assert scaled(columns(1, 2, 7, 8), 12, 18) is None
    assert scaled(columns(1, 3, 5), 6, 10).tolist() == [1, 3, 5, 7, 9]
    assert scaled(columns(1, 3), 6, 10) is None  # not every second column


def write(folder: Path, config: dict[str, object]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_refusals_name_the_host_and_say_why(tmp_path):
    sizes = {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "n_words": 300}
    streamless = write(tmp_path / "streamless", {"model_type": "xlm", **sizes})
    with pytest.raises(HostMapError, match=r"'.*streamless' are not found without weights: No list of layers of XLM"):
        load_config_host(streamless)
    widthless = write(
        tmp_path / "odd", {"model_type": "qwen3", "hidden_size": 60, "num_attention_heads": 7, "vocab_size": 9}
    )
    with pytest.raises(HostMapError, match="not found without weights") as refused:
        load_config_host(widthless)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_without_weights_are_counted_as_with_weights(tmp_path, dtype):
    pytest.importorskip("transformers.integrations.moe")  # older releases look for the tokens of each expert
    config, model = made("mixtral", num_key_value_heads=2, num_local_experts=4)
    found = load_config_host(write(tmp_path / "mixture", config.to_dict()), dtype=dtype)
    assert found.map.degree == "all"
    assert not found.map.layers[0].target_modules["down"].matrix
    with_weights = resolve(model)
    shape = PassShape(2, 8)
    assert count_map_flops(found.map, None, shape) == count_map_flops(with_weights, None, shape)
    assert count_flops_fvcore(found.map, None, shape)[0] == count_map_flops(with_weights, None, shape)
    if dtype == "float32":
        assert peak_bytes(found.map, None, shape) == pytest.approx(peak_bytes(with_weights, None, shape), rel=0.05)


def test_the_meta_device_alone_refuses_experts_in_float32(tmp_path):
    """Where torch takes them, `running.MetaGroups` is no longer needed."""
    pytest.importorskip("transformers.integrations.moe")
    config, _ = made("mixtral", num_key_value_heads=2, num_local_experts=4)
    found = load_config_host(write(tmp_path / "mixture", config.to_dict()))
    with pytest.raises(RuntimeError, match="BF16"):
        found.map.base(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"))


def test_a_configuration_that_takes_no_missing_padding(tmp_path):
    if "modernbert-decoder" not in CONFIG_MAPPING:
        pytest.skip("this release of transformers has no modernbert-decoder")
    config, _ = made("modernbert-decoder", num_hidden_layers=1)
    assert load_config_host(write(tmp_path / "host", config.to_dict())).map.decoder


def test_many_widths_divide_by_one_factor():
    mixture = AutoConfig.for_model("mixtral")
    narrow = shrunken._narrowed(mixture.to_dict(), 32)
    assert (narrow["hidden_size"], narrow["intermediate_size"], narrow["num_local_experts"]) == (128, 448, 4)
    for kept in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "max_position_embeddings"):
        assert narrow[kept] == getattr(mixture, kept)
    assert [shrunken._factor(mixture, size) for size in (0, 1)] == [32, 16]
    uneven = mixture.__class__(hidden_size=2880, num_attention_heads=64, head_dim=64)  # 45 is no multiple of two
    assert [shrunken._factor(uneven, size) for size in (0, 1)] == [16, 8]


def test_sizes_without_bounds_are_refused_at_once(tmp_path, monkeypatch):
    config, _ = made("mistral", num_key_value_heads=2)
    for sizes, words in (
        ({"hidden_size": 2**27, "num_attention_heads": 2**20}, "a hidden_size of 134,217,728, more than 1,000,000"),
        ({"intermediate_size": 2**45}, "a copy 4 times as narrow still has"),
    ):
        with pytest.raises(HostMapError, match=words):
            load_config_host(write(tmp_path / words[:10], config.to_dict() | sizes))
    monkeypatch.setattr(shrunken, "_MOST_FEATURES", 300)
    with pytest.raises(HostMapError, match="a module has 320 features, more than 300"):
        load_config_host(write(tmp_path / "host", config.to_dict()))
