"""The standard classifier: a copy of the host's weights, a LoRA that starts where it is told, and the rule of words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny_hosts import FAMILIES, SENTENCES, SWEEP, tiny_config, tiny_host, tiny_tokenizer
from toy_runs import SEQUENCE, TOKENS, sequence_data, token_data
from transformers import BertConfig, BertForMaskedLM, T5Config, T5Model

from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.module import LoraFactors, PortedAdapter, PortedReadout, linear_modules
from uhl_cli.errors import HostError
from uhl_cli.host.checkpoint import Host, wrap_host
from uhl_cli.host.encode import encode
from uhl_cli.host.standalone import standalone_tokenizer
from uhl_cli.ported.model import encode_examples
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.loop import run_steps, targets_of
from uhl_cli.train.standard import StandardClassifier, refuse_headless, refuse_misread_padding, standard_model

TEXTS = list(SENTENCES[:4])


def reading(host: Host, length: int = 48) -> Host:
    return replace(host, tokenizer=standalone_tokenizer(host, length), max_length=length)


def state_of(host: Host) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in host.model.state_dict().items()}


def certain(data):
    """The labels as distributions."""
    size = len(data.task.labels)
    return lambda rows: torch.eye(size)[torch.tensor(targets_of(data.train, rows))]


def trained(host: Host, data, steps: int, **changes: float) -> StandardClassifier:
    config = TrainingConfig(max_steps=steps, batch_size=12, max_length=48, warmup_fraction=0.1)
    rates = {"learning_rate": 2e-2, "readout_learning_rate": 2e-2, "weight_decay": 0.0} | changes
    config = config.model_copy(update=rates)
    classifier = StandardClassifier(host, data.task, rank=4, seed=0)
    run_steps(
        classifier,
        classifier.trained,
        classifier.optimizer(config),
        host,
        data.train,
        config,
        accelerator=Accelerator(cpu=True),
        targets=certain(data),
    )
    return classifier


@pytest.mark.parametrize("task", [SEQUENCE, TOKENS], ids=["sequence", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_classifier_has_the_hosts_states(family, task):
    host = reading(tiny_host(family))
    inputs = encode(host, TEXTS).model_inputs()
    with torch.inference_mode():
        wanted = host.model(**inputs)[0]
        classifier = StandardClassifier(host, task, rank=2, seed=0)
        found = classifier.model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(found, wanted, atol=1e-5)
    names = {name for name, value in classifier.model.named_parameters() if value.requires_grad}
    target_modules = len(linear_modules(host.map))
    assert sum(".lora_A." in name for name in names) == sum(".lora_B." in name for name in names) == target_modules
    whole = {name.split(".modules_to_save.")[0].split(".")[-1] for name in names if ".lora_" not in name}
    heads = {"bert": {"classifier", "pooler"}, "distilbert": {"classifier", "pre_classifier"}}
    heads |= {name: {"score"} for name in ("llama", "mistral", "qwen2", "gpt2")}
    if task.kind == "tokens":
        heads = {"gpt2": {"classifier"}} | {name: {"score"} for name in ("llama", "mistral", "qwen2")}
    assert whole == heads.get(family, {"classifier"})


@pytest.mark.parametrize("family", SWEEP)
def test_training_teaches_and_leaves_the_host_as_it_was(family):
    data, host = sequence_data(), reading(tiny_host(family))
    host.model.train()
    host.model.requires_grad_(True)
    before = state_of(host)
    references = data.train.labels

    def right(classifier: StandardClassifier) -> float:
        rows = [int(part.argmax()) for part in classifier.logits_of(data.train)]
        return sum(a == b for a, b in zip(rows, references, strict=True)) / len(rows)

    assert right(trained(host, data, 90)) >= 0.9
    assert right(trained(host, data, 5, learning_rate=1e-9, readout_learning_rate=1e-9)) < 0.85, "nothing to learn"
    assert all(torch.equal(value, before[name]) for name, value in host.model.state_dict().items())
    assert all(module.training for module in host.model.modules())
    assert all(value.requires_grad and value.grad is None for value in host.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_given_factors_act_as_uhls_own_hooks_do(family):
    host = reading(tiny_host(family))
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: (
            torch.randn(3, linear.in_features, generator=generator) / 10,
            torch.randn(linear.module_features, 3, generator=generator) / 10,
        )
        for name, linear in linear_modules(host.map).items()
    }
    readout = PortedReadout(
        {0: torch.zeros(4, 32)}, torch.zeros(4), None, torch.zeros(4), torch.zeros(2, 4), torch.zeros(2)
    )
    adapter = PortedAdapter(torch.zeros(1), {}, readout, lora=LoraFactors(factors))
    inputs = encode(host, TEXTS).model_inputs()
    with torch.inference_mode():
        bare = host.model(**inputs)[0]
        with attach(host.map, adapter):
            wanted = host.model(**inputs)[0]
        classifier = StandardClassifier(host, SEQUENCE, rank=8, seed=0, start=adapter.lora)
        found = classifier.model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert classifier.rank == 3
        assert torch.allclose(found, wanted, atol=1e-4)
        assert not torch.allclose(bare, wanted, atol=1e-2), "the factors do nothing"
        logits = classifier.model(**inputs).logits
        classifier.merge()
        assert torch.allclose(classifier.model(**inputs).logits, logits, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_words_prediction_is_its_first_tokens(family):
    data, host = token_data(), reading(tiny_host(family))
    classifier = StandardClassifier(host, TOKENS, rank=2, seed=0)
    encoded, words, counts = encode_examples(host, data.train, [0, 1], max_length=12)
    with torch.inference_mode():
        every = classifier.model(**encoded.model_inputs()).logits
        found, present = classifier.predictions(encoded, words)
    place, cut = 0, 0
    for row, spans in enumerate(data.train.words[:2]):
        for start, end in spans:
            tokens = [
                token
                for token, (first, last) in enumerate(encoded.offsets[row].tolist())
                if first < end and start < last
            ]
            assert bool(present[place]) == bool(tokens)
            wanted = every[row, tokens[0]] if tokens else torch.zeros(3)
            assert torch.equal(found[place], wanted)
            cut += not tokens
            place += 1
    assert place == sum(counts)
    assert 0 < cut < place, "no word was cut, or all"


def test_words_that_were_cut_teach_nothing():
    data, host = token_data(), reading(tiny_host("bert"))
    classifier = StandardClassifier(host, TOKENS, rank=2, seed=0)
    encoded, words, _ = encode_examples(host, data.train, [0], max_length=12)
    targets = certain(data)([0])
    present = (words > 0).any(1)
    losses = classifier(encoded, words, targets, 0)
    changed = targets.clone()
    changed[~present] = torch.tensor([0.0, 0.0, 1.0])
    assert torch.equal(classifier(encoded, words, changed, 0).total, losses.total)
    changed[present] = torch.tensor([0.0, 0.0, 1.0])
    assert not torch.equal(classifier(encoded, words, changed, 0).total, losses.total)
    none = classifier(encoded, torch.zeros_like(words), targets, 0)
    none.total.backward()
    assert all(not value.grad.any() for value in classifier.trained.values() if value.grad is not None)


def test_the_head_is_drawn_by_the_seed_and_not_by_the_caller():
    host = reading(tiny_host("bert"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = standard_model(host, SEQUENCE, seed=1).classifier.weight
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(standard_model(host, SEQUENCE, seed=1).classifier.weight, first)
    assert not torch.equal(standard_model(host, SEQUENCE, seed=2).classifier.weight, first)


def test_a_host_without_a_pooler_gets_one():
    tokenizer = tiny_tokenizer("bert")
    model = BertForMaskedLM(tiny_config("bert", len(tokenizer), hidden_size=32, num_hidden_layers=2))
    host = reading(wrap_host(model, tokenizer))
    assert host.model.pooler is None
    found = standard_model(host, SEQUENCE, seed=1).bert.pooler.dense.weight
    assert bool(found.std() > 0)


def test_a_family_without_a_head_is_refused_by_name():
    class Other(BertConfig):
        model_type = "bert"

    host = tiny_host("bert")
    refuse_headless(host, SEQUENCE)
    host.model.config.__class__ = Other
    with pytest.raises(HostError, match=r"no head for sequence classification on models of type 'bert'.*tune --param"):
        refuse_headless(host, SEQUENCE)
    with pytest.raises(HostError, match="token classification"):
        standard_model(host, TOKENS, seed=0)


def test_a_head_that_needs_the_decoder_beside_the_host_is_refused():
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("bert")
    host = wrap_host(T5Model(T5Config(vocab_size=len(tokenizer), **shape)).eval(), tokenizer)
    with pytest.raises(HostError, match=r"type 't5' needs all of it, and the host is its T5Stack\..*tune --param"):
        refuse_headless(host, SEQUENCE)


def test_a_release_that_misreads_padding_is_refused(monkeypatch):
    monkeypatch.setattr("uhl_cli.train.standard.RELEASE", (4, 50))
    for family in FAMILIES:
        refuse_misread_padding(tiny_host(family), SEQUENCE)
    monkeypatch.setattr("uhl_cli.train.standard.RELEASE", (4, 49))
    for family in FAMILIES:
        host = tiny_host(family)
        refuse_misread_padding(host, TOKENS)
        if family in ("gpt2", "qwen2"):  # their one special token has all roles
            with pytest.raises(HostError, match=r"reads padding as text.*4\.50"):
                refuse_misread_padding(host, SEQUENCE)
        else:
            refuse_misread_padding(host, SEQUENCE)


def test_weights_that_the_class_does_not_have_are_refused():
    host = tiny_host("bert")
    host.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(HostError, match=r"the first mismatch is 'extra\.weight'"):
        standard_model(host, SEQUENCE, seed=0)
