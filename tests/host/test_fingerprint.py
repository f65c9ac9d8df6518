"""Fingerprints are equal for equal checkpoints and differ for others."""

import pytest
import torch
from pydantic import ValidationError
from tiny_hosts import FAMILIES, save_tiny_host, tiny_config, tiny_host, tiny_model
from transformers import AutoModel, BertForMaskedLM

from uhl_cli.errors import HostError
from uhl_cli.host.checkpoint import load_host
from uhl_cli.host.fingerprint import Fingerprint, fingerprint
from uhl_cli.host.proof import resolve


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_have_equal_fingerprints_and_others_do_not(family):
    first = tiny_host(family).fingerprint
    assert first == tiny_host(family).fingerprint
    assert first.digest != tiny_host(family, seed=1).fingerprint.digest
    assert first.digest != tiny_host(family, num_hidden_layers=3).fingerprint.digest


def test_float32_and_bfloat16_loads_agree(tmp_path):
    folder = str(save_tiny_host(tmp_path / "host", "bert"))
    assert load_host(folder).fingerprint == load_host(folder, dtype="bfloat16").fingerprint


def test_float16_agrees_where_the_checkpoint_is_float16():
    model = tiny_model("bert").to(torch.float16)
    expected = fingerprint(resolve(model))
    for dtype in (torch.float32, torch.bfloat16):
        assert fingerprint(resolve(model.to(torch.float16).to(dtype))).digest == expected.digest


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.1.output.dense.weight",
    ],
)
def test_one_changed_weight_changes_the_digest(name):
    model = tiny_model("bert")
    before = fingerprint(resolve(model))
    with torch.no_grad():
        model.get_parameter(name)[5, 3] += 0.5
    after = fingerprint(resolve(model))
    assert before.digest != after.digest
    assert before.model_dump(exclude={"digest"}) == after.model_dump(exclude={"digest"})


def test_a_pooler_or_a_head_makes_no_difference():
    model = tiny_model("bert")
    masked = BertForMaskedLM(tiny_config("bert", 300, hidden_size=32, num_hidden_layers=2))
    masked.resize_token_embeddings(model.config.vocab_size)
    masked.bert.load_state_dict(model.state_dict(), strict=False)
    assert masked.bert.pooler is None
    assert fingerprint(resolve(masked)) == fingerprint(resolve(model))


def test_fields():
    found = tiny_host("electra").fingerprint
    assert (found.architecture, found.model_type) == ("ElectraModel", "electra")
    assert (found.hidden_size, found.num_hidden_layers) == (32, 2)
    assert found.parameters == sum(parameter.numel() for parameter in tiny_host("electra").model.parameters())
    assert Fingerprint.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError):
        found.digest = "other"


def test_model_without_weights_has_none():
    model = tiny_model("bert")
    with torch.device("meta"):
        twin = AutoModel.from_config(model.config)
    with pytest.raises(HostError, match="without weights"):
        fingerprint(resolve(model).on(twin))
