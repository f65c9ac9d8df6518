"""Every family's row is proven against its models, and a row that lies is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_hosts import DECODERS, FAMILIES, tiny_config, tiny_host, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, BertForSequenceClassification

from uhl_cli.errors import HostMapError, UnknownFamilyError
from uhl_cli.host import families
from uhl_cli.host.families import MODULE_TYPES, TargetModuleRule, family_of, known_model_types
from uhl_cli.host.hostmap import find_map, read_layer_input
from uhl_cli.host.proof import by_row, resolve


def with_rule(monkeypatch, name, **rules):
    """Replace rules of the row `name` for one test."""
    rows = tuple(
        replace(row, target_modules={**row.target_modules, **rules}) if row.name == name else row
        for row in families.FAMILIES
    )
    monkeypatch.setattr(families, "FAMILIES", rows)


def with_row(monkeypatch, name, **fields):
    rows = tuple(replace(row, **fields) if row.name == name else row for row in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_resolves_and_proves(family):
    model = tiny_model(family, num_hidden_layers=3)
    host_map = by_row(model)
    assert host_map.hidden_size == 32
    assert host_map.num_hidden_layers == len(host_map.layers) == 3
    assert host_map.decoder == (family in DECODERS)
    for layer in host_map.layers:
        assert set(layer.target_modules) == set(family_of(model.config).target_modules) <= set(MODULE_TYPES)
        for linear in layer.target_modules.values():
            assert model.get_submodule(linear.name) is linear.module
            assert linear.weight().shape == (linear.out_features, linear.in_features)
            assert not linear.weight().requires_grad
    grouped = family in ("llama", "mistral", "qwen2")
    assert host_map.layers[0].target_modules["k"].out_features == (16 if grouped else 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_proof_leaves_the_model_bit_for_bit(family):
    model = tiny_model(family)
    model.train()
    next(model.modules()).eval()  # a mixture of modes, which must come back as it was
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    by_row(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_proof_the_meta_device_is_enough(family):
    config = tiny_config(family, 300, hidden_size=32, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    host_map = find_map(model)
    assert host_map.layers[1].target_modules["down"].weight().is_meta
    assert host_map.layers[1].target_modules["down"].weight().shape == (32, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_half_precision_is_proven_too(family, dtype):
    assert by_row(tiny_model(family).to(dtype)).num_hidden_layers == 2


def test_model_with_a_head_is_mapped_at_its_base():
    config = tiny_config("bert", 300, hidden_size=32, num_hidden_layers=2)
    model = BertForSequenceClassification(config)
    assert by_row(model).base is model.bert


@pytest.mark.parametrize("family", ["gpt2", "bert", "qwen2"])
def test_site_weight_and_bias_give_the_output_columns(family):
    host = tiny_host(family)
    site_inputs = {}
    ids = torch.arange(3, 9).unsqueeze(0)
    for kind in ("q", "k", "v", "o", "up", "down"):
        linear = host.map.layers[1].target_modules[kind]

        def keep(_module, args, output, kind=kind):
            site_inputs[kind] = (args[0], output)

        handle = linear.module.register_forward_hook(keep)
        host.model(input_ids=ids)
        handle.remove()
        inputs, output = site_inputs[kind]
        bias = linear.bias()
        expected = inputs @ linear.weight().T + (0 if bias is None else bias)
        torch.testing.assert_close(output[..., linear.columns], expected)
        if family == "gpt2" and kind == "k":  # negative control: another third is another weight
            other = expected @ torch.eye(32)
            assert not torch.allclose(output[..., host.map.layers[1].target_modules["v"].columns], other)


@pytest.mark.parametrize(
    ("family", "rules", "words"),
    [
        ("bert", {"q": TargetModuleRule("attention.self.nothing")}, "no module of type q"),
        ("bert", {"q": TargetModuleRule("attention.output.dense")}, "overlap"),
        (
            "bert",
            {"q": TargetModuleRule("attention.self.key"), "k": TargetModuleRule("attention.self.query")},
            "do not act",
        ),
        (
            "bert",
            {"v": TargetModuleRule("attention.self.key"), "k": TargetModuleRule("attention.self.value")},
            "do not act",
        ),
        ("bert", {"up": TargetModuleRule("output.dense")}, "reads 96"),
        ("bert", {"q": TargetModuleRule("attention.self.query", slice=(0, 3))}, "no part 0 of 3"),
        ("bert", {"q": TargetModuleRule("attention.self.query", slice=(0, 2))}, "widths of q"),
        ("bert", {"q": TargetModuleRule("attention.self.query", transposed=True)}, "something other"),
        ("bert", {"up": TargetModuleRule("intermediate.dense", transposed=True)}, "reads 96"),
        ("bert", {"o": TargetModuleRule("attention.output.LayerNorm")}, "no floating-point weight matrix"),
        ("llama", {"up": TargetModuleRule("mlp.gate_proj"), "gate": TargetModuleRule("mlp.up_proj")}, "gate and up"),
        ("llama", {"k": TargetModuleRule("self_attn.v_proj"), "v": TargetModuleRule("self_attn.k_proj")}, "do not act"),
        ("llama", {"q": TargetModuleRule("self_attn.qkv_proj", slice=(0, 3))}, "no module of type q"),
        ("gpt2", {"q": TargetModuleRule("attn.c_attn", slice=(1, 3), transposed=True)}, "overlap"),
        ("gpt2", {"v": TargetModuleRule("attn.c_attn", slice=(5, 6), transposed=True)}, "widths of q"),
        ("gpt2", {"up": TargetModuleRule("mlp.c_fc")}, "reads 32|reads 96"),
        ("gpt2", {"o": TargetModuleRule("attn.c_proj")}, "something other"),
        (
            "gpt2",
            {
                "q": TargetModuleRule("attn.c_attn", slice=(2, 3), transposed=True),
                "v": TargetModuleRule("attn.c_attn", slice=(0, 3), transposed=True),
            },
            "do not act",
        ),
    ],
)
def test_a_wrong_site_rule_is_refused(monkeypatch, family, rules, words):
    model = tiny_model(family)
    with_rule(monkeypatch, family, **rules)
    with pytest.raises(HostMapError, match=words) as caught:
        by_row(model)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {"layers": "encoder.blocks"}),
        ("bert", {"layers": "encoder"}),
        ("bert", {"embeddings": "embeddings.words"}),
        ("bert", {"embeddings": "embeddings.LayerNorm"}),
        ("electra", {"embedding_projection": None}),
        ("electra", {"embedding_projection": "embeddings.LayerNorm"}),
    ],
)
def test_a_wrong_row_is_refused(monkeypatch, family, fields):
    model = tiny_model(family)
    with_row(monkeypatch, family, **fields)
    with pytest.raises(HostMapError):
        find_map(model)


@pytest.mark.parametrize("family", [row.name for row in families.FAMILIES])
def test_where_the_norm_is_is_proven(monkeypatch, family):
    model = tiny_model(family)
    before = family_of(model.config).pre_norm
    with_row(monkeypatch, family, pre_norm=not before)
    with pytest.raises(HostMapError, match="reads the stream itself" if before is False else "something other"):
        by_row(model)


def test_configuration_that_contradicts_the_model_is_refused():
    model = tiny_model("bert")
    model.config.num_hidden_layers = 3
    with pytest.raises(HostMapError, match="number of layers"):
        by_row(model)
    model = tiny_model("bert")
    model.config.hidden_size = 64
    with pytest.raises(HostMapError):
        find_map(model)


def test_module_that_computes_more_than_its_weight_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model("bert")
    old = model.encoder.layer[0].attention.self.query
    new = Doubled(32, 32)
    new.load_state_dict(old.state_dict())
    model.encoder.layer[0].attention.self.query = new
    with pytest.raises(HostMapError, match="something other"):
        by_row(model)


def test_site_without_effect_is_refused():
    model = tiny_model("bert", num_hidden_layers=1)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.zero_()
    with pytest.raises(HostMapError, match="does not change"):
        by_row(model)


def test_integer_weights_are_refused_with_a_hint():
    model = tiny_model("bert")
    query = model.encoder.layer[1].attention.self.query
    query.weight = nn.Parameter(query.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(HostMapError, match="floating-point") as caught:
        by_row(model)
    assert "quantis" in caught.value.hint


def test_states_that_are_no_numbers_are_refused():
    model = tiny_model("bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(HostMapError, match="finite"):
        by_row(model)


def test_unknown_family_lists_the_known_ones():
    with pytest.raises(UnknownFamilyError, match="'t5'") as caught:
        family_of(AutoConfig.for_model("t5"))
    assert all(kind in caught.value.message for kind in known_model_types())
    assert caught.value.hint
    with pytest.raises(UnknownFamilyError, match="'None'"):
        by_row(nn.Linear(2, 2))
    with pytest.raises(HostMapError, match="does not run on token ids"):
        resolve(nn.Linear(2, 2))
    with pytest.raises(UnknownFamilyError):
        family_of(SimpleNamespace(model_type="bert", is_encoder_decoder=True))


def test_every_model_type_has_one_row():
    kinds = [kind for row in families.FAMILIES for kind in row.model_types]
    assert len(kinds) == len(set(kinds)) == len(known_model_types())
    assert set(FAMILIES) <= set(kinds)


def test_layer_input_is_found_by_position_or_name():
    stream = torch.zeros(1, 5, 8)
    assert read_layer_input((stream,), {}) is stream
    assert read_layer_input((), {"hidden_states": stream}) is stream
    for args, kwargs in (((), {}), ((None,), {}), ((torch.zeros(5, 8),), {})):
        with pytest.raises(HostMapError):
            read_layer_input(args, kwargs)
