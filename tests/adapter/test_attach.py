"""Attaching over every family: nothing when zero, something when not, and the host as before afterwards."""

import pytest
import torch
from tiny_adapters import SMALL, tiny_folded, tiny_task, unpacked
from tiny_hosts import FAMILIES, SENTENCES, tiny_host, tiny_model, tiny_tokenizer

from uhl_cli.adapter.attach import AlignmentNoise, attach
from uhl_cli.data.examples import Examples, token_examples
from uhl_cli.errors import HostError, UsageError
from uhl_cli.host.checkpoint import wrap_host
from uhl_cli.host.encode import encode
from uhl_cli.ported.controls import randomised
from uhl_cli.ported.model import PortedModel, forward

TOKENS = SMALL.model_copy(update={"kind": "tokens"})


def output_of(host):
    with torch.inference_mode():
        return host.model(**encode(host, SENTENCES[:6]).model_inputs()).last_hidden_state


def hooks_of(host):
    """Number of hooks in all hook dictionaries of all modules."""
    return sum(
        len(value)
        for module in host.model.modules()
        for name, value in vars(module).items()
        if "hook" in name and hasattr(value, "__len__")
    )


def parameters_of(host):
    return {name: value.detach().clone() for name, value in host.model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_adapter_leaves_the_host_bit_for_bit(family):
    host = tiny_host(family)
    folded, _, _ = tiny_folded(host, zero=True)
    assert set(folded.by_layer) == {0, 1}
    before = output_of(host)
    assert before.isfinite().all()
    for dense in (False, True):
        with attach(host.map, folded, dense=dense):
            target_modules = {linear.module for layer in host.map.layers for linear in layer.target_modules.values()}
            assert all(module._forward_hooks or module._forward_pre_hooks for module in target_modules)
            assert hooks_of(host) >= len(target_modules) + len(host.map.layers)
            assert torch.equal(output_of(host), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_changes_the_host_and_leaves_no_trace(family):
    host = tiny_host(family)
    folded, _, _ = tiny_folded(host)
    before, parameters, hooks = output_of(host), parameters_of(host), hooks_of(host)
    flags = [value.requires_grad for value in host.model.parameters()]
    with attach(host.map, folded):
        changed = output_of(host)
        assert hooks_of(host) > hooks
    assert not torch.allclose(changed, before, atol=1e-3)

    def fail():
        with attach(host.map, folded):
            output_of(host)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert hooks_of(host) == hooks
    assert torch.equal(output_of(host), before)
    after = host.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in parameters.items())
    assert [value.requires_grad for value in host.model.parameters()] == flags
    assert not any(value.grad is not None for value in host.model.parameters())


def test_error_in_the_forward_pass_leaves_no_trace():
    host = tiny_host("bert")
    folded, _, _ = tiny_folded(host)
    bad = folded.mapped(lambda name, value: value[:, :5] if name == "layers.1.router" else value)
    before = output_of(host)
    with pytest.raises(RuntimeError), attach(host.map, bad):
        output_of(host)
    assert hooks_of(host) == 0
    assert torch.equal(output_of(host), before)


def test_error_while_attaching_leaves_no_trace(monkeypatch):
    host = tiny_host("bert")
    folded, _, _ = tiny_folded(host)
    last = host.map.layers[1].target_modules["down"].module

    def refuse(*_arguments, **_options):
        raise RuntimeError("no hook here")

    monkeypatch.setattr(last, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hook here"), attach(host.map, folded):
        pass
    assert hooks_of(host) == 0


def test_entering_again_changes_nothing_and_another_adapter_is_refused_by_name():
    host = tiny_host("gpt2")
    folded, other = tiny_folded(host)[0], tiny_folded(host, seed=1)[0]
    with attach(host.map, folded, name="the first") as outer:
        changed = output_of(host)
        hooks = hooks_of(host)
        with attach(host.map, folded) as inner:
            assert inner is outer
            assert hooks_of(host) == hooks
            assert torch.equal(output_of(host), changed)
        assert hooks_of(host) == hooks
        assert torch.equal(output_of(host), changed)
        second = attach(host.map, other, name="the second")
        with pytest.raises(HostError, match=r"the first is already attached .* so the second cannot") as caught, second:
            pass
        assert caught.value.hint
        assert hooks_of(host) == hooks
        assert torch.equal(output_of(host), changed)
    assert hooks_of(host) == 0
    with attach(host.map, folded):
        assert torch.equal(output_of(host), changed)
    with attach(host.map, other):
        assert not torch.equal(output_of(host), changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_host(family):
    tokenizer = tiny_tokenizer(family)
    host = wrap_host(tiny_model(family, tokenizer=tokenizer).to(torch.bfloat16), tokenizer)
    folded, _, _ = tiny_folded(host)
    ported = PortedModel(host, unpacked(folded, torch.bfloat16), tiny_task())
    logits = ported(SENTENCES[:3])
    assert logits.shape == (3, 3)
    assert logits.isfinite().all()
    exact = tiny_host(family)
    reference = PortedModel(exact, folded, tiny_task())(SENTENCES[:3])
    torch.testing.assert_close(logits.float(), reference, atol=0.1 * float(reference.abs().max()) + 0.1, rtol=0)
    silent, _, _ = tiny_folded(host, zero=True)
    before = output_of(host)
    with attach(host.map, unpacked(silent, torch.bfloat16)):
        assert torch.equal(output_of(host), before)


def test_ported_model_runs_without_inference_mode_around_it_and_within():
    host = tiny_host("llama")
    ported = PortedModel(host, tiny_folded(host)[0], tiny_task())
    outside = ported(SENTENCES[:3])
    with torch.inference_mode():
        assert torch.equal(ported(SENTENCES[:3]), outside)
    with torch.no_grad():
        assert torch.equal(ported(SENTENCES[:3]), outside)
    assert hooks_of(host) == 0
    with ported.attached():
        assert not torch.equal(output_of(host), output_of(tiny_host("llama")))


def test_logits_of_a_text_do_not_depend_on_its_batch():
    host = tiny_host("roberta")
    ported = PortedModel(host, tiny_folded(host)[0], tiny_task())
    together = ported(SENTENCES[:6])
    alone = torch.cat([ported([text]) for text in SENTENCES[:6]])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


def test_predictions_keep_the_examples_order():
    host = tiny_host("gpt2")
    ported = PortedModel(host, tiny_folded(host, seed=2)[0], tiny_task())
    found = ported.classes_of(Examples(SENTENCES, labels=(0,) * len(SENTENCES)), batch_size=5)
    expected = ported(SENTENCES).argmax(-1).tolist()
    assert found.for_metric("sequence") == expected
    assert len(set(expected)) > 1
    assert 0 < found.atoms_per_token < 2


def test_token_task_predicts_every_word():
    host = tiny_host("gpt2")
    folded, _, _ = tiny_folded(host, TOKENS)
    assert folded.readout.pool is None
    ported = PortedModel(host, folded, tiny_task(TOKENS))
    words = [text.split() for text in SENTENCES[:7]] + [["word"] * 90]  # the last does not fit into the host
    examples = token_examples(words, [[0] * len(row) for row in words])
    found = ported.classes_of(examples, batch_size=3)
    assert [len(row) for row in found.classes] == [len(row) for row in words]
    assert len({label for row in found.classes[:7] for label in row}) > 1
    with pytest.raises(UsageError, match="labels words"):
        ported(["text"])


def test_readout_is_unaffected_by_what_ran_before():
    host = tiny_host("bert")
    folded, _, _ = tiny_folded(host)
    encoded = encode(host, SENTENCES[:3])
    with torch.inference_mode(), attach(host.map, folded) as attachment:
        first = forward(host, attachment, encoded, None)[0]
        host.model(**encode(host, SENTENCES[5:9]).model_inputs())  # nobody asks for this pass's readout
        assert torch.equal(forward(host, attachment, encoded, None)[0], first)


def test_active_atoms_count_masked_tokens_only():
    host = tiny_host("bert")
    folded, _, _ = tiny_folded(host)
    means = {}
    for name, threshold in (("none", 99.0), ("all", -99.0)):
        limits = torch.full((2,), threshold)
        wide = folded.mapped(lambda name, value, limits=limits: limits if name == "threshold" else value)
        with torch.inference_mode(), attach(host.map, wide) as attachment:
            means[name] = float(forward(host, attachment, encode(host, SENTENCES[:4]), None)[1])
    assert means == {"none": 0.0, "all": 2.0}
    with torch.inference_mode(), attach(host.map, folded.without_updates()) as attachment:
        assert float(forward(host, attachment, encode(host, SENTENCES[:4]), None)[1]) == 0.0


def test_alignment_noise_changes_training_only_and_follows_its_generator():
    host = tiny_host("bert")
    folded, _, _ = tiny_folded(host)
    encoded = encode(host, SENTENCES[:3])

    def logits(readout, updates, seed):
        noise = AlignmentNoise(readout, updates, torch.Generator().manual_seed(seed))
        with torch.inference_mode(), attach(host.map, folded, dense=True, noise=noise) as attachment:
            return forward(host, attachment, encoded, None)[0]

    with torch.inference_mode(), attach(host.map, folded, dense=True) as attachment:
        plain = forward(host, attachment, encoded, None)[0]
    torch.testing.assert_close(logits(0.0, 0.0, 1), plain)
    for strengths in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        assert torch.equal(logits(*strengths, 1), logits(*strengths, 1))
        assert not torch.allclose(logits(*strengths, 1), plain, atol=1e-3)
        assert not torch.allclose(logits(*strengths, 1), logits(*strengths, 2), atol=1e-3)


def test_random_updates_have_the_same_size_and_another_direction():
    host = tiny_host("gpt2")
    folded, _, _ = tiny_folded(host)
    drawn = randomised(folded, seed=3)
    for index, layer in folded.by_layer.items():
        for name, edit in layer.edits.items():
            other = drawn.by_layer[index].edits[name]
            torch.testing.assert_close(other.norm(dim=1), edit.norm(dim=1))
            assert torch.nn.functional.cosine_similarity(other, edit).abs().mean() < 0.5
        assert drawn.by_layer[index].router is layer.router
    assert not torch.equal(drawn.readout.layer.edits["readout"], folded.readout.layer.edits["readout"])
