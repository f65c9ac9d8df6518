"""The base model is found inside models of any class, and what a port would not keep is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import tiny_universal
from tiny_hosts import SENTENCES, tiny_host, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertForSequenceClassification

from uhl_cli.errors import HostMapError
from uhl_cli.host.checkpoint import wrap_host
from uhl_cli.host.inner import base_of

TEXTS = list(SENTENCES[:4])


class Pooled(nn.Module):
    """A module as of a SentenceTransformer: it holds the model as `auto_model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model = model

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "token_embeddings": self.auto_model(**features).last_hidden_state}


class Headed(nn.Module):
    """A head of someone's own on a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = model
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])


WRAPPED = {
    "sentence transformer": lambda model: nn.Sequential(Pooled(model), nn.Identity()),
    "own head": Headed,
    "own head in another module": lambda model: nn.ModuleDict({"model": Headed(model)}),
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_model_is_ported_to_as_the_model_itself(how, family):
    model, tokenizer = tiny_model(family), tiny_tokenizer(family)
    adapter = tiny_universal(tiny_host(family))
    whole = WRAPPED[how](model)
    assert base_of(whole) is model
    wanted = adapter.port(model, tokenizer, max_flops=1e9)(TEXTS)
    assert torch.equal(adapter.port(whole, tokenizer, max_flops=1e9)(TEXTS), wanted)
    other = tiny_model(family, seed=1)
    assert not torch.equal(adapter.port(WRAPPED[how](other), tokenizer, max_flops=1e9)(TEXTS), wanted)


def test_the_model_inside_may_have_a_head_or_be_an_encoder_decoder():
    torch.manual_seed(0)
    headed = BertForSequenceClassification(tiny_model("bert").config)
    assert base_of(Headed(headed)) is headed.bert
    config = AutoConfig.for_model("t5", vocab_size=300, d_model=32, d_kv=8, d_ff=96, num_layers=2, num_heads=4)
    model = AutoModel.from_config(config)
    assert base_of(nn.Sequential(Pooled(model))) is model.encoder


def test_a_model_that_holds_none_is_itself():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4))
    assert base_of(model) is model


def test_two_models_are_refused_by_name():
    towers = nn.ModuleDict({"query": tiny_model("bert"), "passage": tiny_model("bert")})
    with pytest.raises(HostMapError, match=r"holds 2 models: query, passage\. Pass the one") as refused:
        wrap_host(towers, tiny_tokenizer("bert"))
    assert "\n" not in str(refused.value)


def test_a_peft_model_is_refused_until_it_is_merged():
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny_model("bert"), tiny_tokenizer("bert")
    adapter = tiny_universal(tiny_host("bert"))
    before = adapter.port(model, tokenizer, max_flops=1e9)(TEXTS)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    )
    for unmerged in (wrapped, wrapped.get_base_model()):
        with pytest.raises(HostMapError, match=r"is a layer of peft .* merge_and_unload\(\) first") as refused:
            adapter.port(unmerged, tokenizer)
        assert "\n" not in str(refused.value)
    merged = wrapped.merge_and_unload()
    logits = adapter.port(merged, tokenizer, max_flops=1e9)(TEXTS)
    assert torch.equal(adapter.port(wrapped, tokenizer, max_flops=1e9)(TEXTS), logits)  # which holds the merged model
    assert not torch.equal(logits, before)


def test_prompts_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer("gpt2")
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2))
    with pytest.raises(HostMapError, match=r"trained prompts .* get_base_model"):
        wrap_host(prompted, tokenizer)
    assert wrap_host(prompted.get_base_model(), tokenizer).model is model
