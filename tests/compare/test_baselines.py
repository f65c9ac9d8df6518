"""Baselines: what is trained, what is stored, and that training them learns."""

from __future__ import annotations

import pytest
import torch
from tiny_hosts import tiny_host
from toy_runs import sequence_data, token_data

from uhl_cli.compare.baselines import Retrained, SatLora, fake_int8, fit
from uhl_cli.compare.sections import TrainingSection
from uhl_cli.errors import TrainingError
from uhl_cli.host.encode import encode
from uhl_cli.train.loop import accelerator_for

TRAINING = TrainingSection(steps=40, batch_size=8, learning_rate=5e-3, warmup_steps=4, max_length=48)
METHODS = ("lora", "sat-lora", "full")
TEXTS = ["I loved every minute of it.", "The bank refused."]


def states(host, attached=None):
    with torch.inference_mode():
        return host.map.base(**encode(host, TEXTS).model_inputs()).last_hidden_state


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_sat_lora_begins_at_the_host_changes_it_and_restores_it(family):
    host = tiny_host(family)
    before = states(host)
    shared = SatLora(host.map, rank=4, alpha=8, atoms=6)
    with shared.attached():
        assert torch.equal(states(host), before)
    with torch.no_grad():
        for dictionary in shared.dictionaries.values():
            dictionary.write.normal_()
    with shared.attached():
        assert not torch.allclose(states(host), before, atol=1e-3)
    assert torch.equal(states(host), before)


def small_sat_lora(host):
    """SAT-LoRA that changes the host a little."""
    shared = SatLora(host.map, rank=3, alpha=6, atoms=5)
    with torch.no_grad():
        for dictionary in shared.dictionaries.values():
            dictionary.write.normal_(std=0.05)
    return shared


def test_sat_lora_is_a_mixture_of_shared_rows_added_to_the_weight():
    host = tiny_host("bert")
    shared = small_sat_lora(host)
    with shared.attached():
        found = states(host)
    weights = []
    with torch.no_grad():
        for linear, key, place in shared._target_modules.values():
            read, write = shared.dictionaries[key].factors(place)
            assert read.shape[0] == write.shape[0] == 3
            weights.append((linear.module.weight, (6 / 3) * write.T @ read))
        for weight, update in weights:
            weight += update
        assert torch.allclose(states(host), found, atol=1e-4)
    # One dictionary a shape, not one a layer.
    assert len(shared.dictionaries) == len(
        {(linear.out_features, linear.in_features) for linear, _, _ in shared._target_modules.values()}
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])  # with q, k and v apart, and in one module
def test_the_host_adds_what_sat_loras_forward_gives(family):
    host = tiny_host(family)
    shared = small_sat_lora(host)
    layer = host.map.layers[1]
    read, write = {}, {}
    for kind, linear in layer.target_modules.items():
        linear.module.register_forward_hook(lambda _, args, output, kind=kind: read.update({kind: (args[0], output)}))
    with torch.no_grad(), shared.attached():
        for kind, linear in layer.target_modules.items():
            linear.module.register_forward_hook(lambda _, _args, output, kind=kind: write.update({kind: output}))
        states(host)
        for kind, linear in layer.target_modules.items():
            inputs, before = read[kind]
            added = (write[kind] - before)[..., linear.columns]
            assert added.abs().max() > 1e-3
            torch.testing.assert_close(shared(inputs, (1, kind)), added, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(shared(inputs, (0, kind)), added, atol=1e-3)  # of another layer


def test_sat_lora_frozen_gives_what_it_gave():
    host = tiny_host("bert")
    shared = small_sat_lora(host)
    with shared.attached():
        before = states(host)
    shared.freeze()
    with shared.attached():
        assert torch.equal(states(host), before)


def test_int8_keeps_every_value_within_half_a_step_and_zero_rows():
    values = torch.randn(6, 50)
    values[2] = 0
    step = values.abs().amax(1, keepdim=True) / 127
    assert ((fake_int8(values) - values).abs() <= 0.51 * step + 1e-3 * values.abs()).all()
    assert torch.equal(fake_int8(values)[2], torch.zeros(50))
    assert len(fake_int8(values)[0].unique()) <= 255


def test_bytes_are_those_of_what_is_trained():
    host = tiny_host("bert")
    shared = Retrained("sat-lora", host, 2, TRAINING)
    sizes = dict(shared.shared.named_parameters())
    by_hand = sum(v.numel() + 2 * v.shape[0] if v.dim() == 2 else 2 * v.numel() for v in sizes.values())
    head = 2 * (host.hidden_size * 2 + 2)
    assert shared.stored_bytes() == by_hand + head
    lora = Retrained("lora", tiny_host("bert"), 2, TRAINING)
    factors = sum(
        8 * (linear.in_features + linear.out_features)
        for layer in host.map.layers
        for linear in layer.target_modules.values()
    )
    assert lora.stored_bytes() == 2 * factors + head
    whole = tiny_host("bert")
    size = sum(value.numel() for value in whole.map.base.parameters())
    assert Retrained("full", whole, 2, TRAINING).stored_bytes() == 4 * size + head


@pytest.mark.integration
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "data"), [("bert", sequence_data), ("llama", token_data)], ids=["texts", "tokens"])
def test_every_baseline_learns_and_a_rate_of_almost_nothing_does_not(method, family, data):
    examples = data().train
    losses = {}
    for rate in (5e-3, 1e-9):
        training = TRAINING.model_copy(update={"learning_rate": rate})
        model = Retrained(method, tiny_host(family), len(data().task.labels), training)
        curve = fit(model, examples, training, accelerator=accelerator_for("cpu", "no"))
        assert [point.step for point in curve] == [20, 40]
        losses[rate] = curve[-1].loss
        found = model.predict(examples, batch_size=16, max_length=48)
        assert len(found) == len(examples)
    assert losses[5e-3] < 0.8 * losses[1e-9]


@pytest.mark.parametrize("method", METHODS)
def test_the_host_is_trained_in_full_or_not_at_all(method):
    host = tiny_host("bert")
    own = list(host.map.base.parameters())
    assert all(value.requires_grad for value in own)
    trained = {id(value) for value in Retrained(method, host, 2, TRAINING).trained_parameters()}
    assert trained
    assert {id(value) in trained for value in own} == {method == "full"}


def test_lora_is_scored_as_float16_holds_it():
    model = Retrained("lora", tiny_host("bert"), 2, TRAINING)
    fit(model, sequence_data().train, TRAINING, accelerator=accelerator_for("cpu", "no"))
    trained = [value for value in model.model.parameters() if value.requires_grad]
    assert trained
    assert all(torch.equal(value, value.half().float()) for value in trained)


def test_same_seed_same_model():
    made = []
    for _ in range(2):
        model = Retrained("lora", tiny_host("bert"), 2, TRAINING)
        made.append(fit(model, sequence_data().train, TRAINING, accelerator=accelerator_for("cpu", "no")))
    assert made[0] == made[1]


def test_a_loss_that_is_not_finite_is_an_error():
    training = TRAINING.model_copy(update={"learning_rate": 1.0})
    model = Retrained("full", tiny_host("bert"), 2, training)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 20"):
        fit(model, sequence_data().train, training, accelerator=accelerator_for("cpu", "no"))
