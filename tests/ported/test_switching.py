"""Task files are ported to one aligned host: the same as porting anew, with the updates' tensors shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_tune import run
from tiny_hosts import SWEEP, tiny_host
from toy_runs import TINY_LIMIT, make_adapter, pair_data, sequence_data, token_data

from uhl_cli.api import UniversalAdapter
from uhl_cli.cost.passes import SEQUENCE_LENGTH
from uhl_cli.cost.plan import adapter_flops_per_token
from uhl_cli.errors import FormatError, UsageError
from uhl_cli.host.encode import encode


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("switch") / "adapter.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path, max_steps=30, anchors="general", feature_words=3000)
    assert UniversalAdapter.load(path).features is not None
    return path


@pytest.fixture(scope="module")
def tasks(adapter) -> dict[str, Path]:
    """A task file of the adapter's own task, one of pairs and one of tokens, all made on one host."""
    host = tiny_host("electra", hidden_size=40)
    found = {}
    for name, data in (("own", sequence_data()), ("pairs", pair_data()), ("tokens", token_data())):
        found[name] = adapter.with_name(f"{name}.task.safetensors")
        run(adapter, host, data, found[name], readout_learning_rate=0.02, max_steps=12)
    return found


DATA = {"own": sequence_data, "pairs": pair_data, "tokens": token_data}


@pytest.mark.parametrize("family", SWEEP)
def test_switching_is_porting_anew_and_back(family, adapter, tasks):
    host = tiny_host(family, hidden_size=40, num_hidden_layers=3, seed=1)
    loaded = UniversalAdapter.load(adapter)
    aligned = loaded.align(host, max_flops=TINY_LIMIT, any_task=True)
    first = loaded.port(aligned)
    texts = list(sequence_data().evaluation.texts)
    inputs = encode(host, texts).model_inputs()
    before = first(texts)
    current = first
    for name in ("own", "tokens", "pairs", "own"):
        current = loaded.port(aligned, task=tasks[name])
        anew = loaded.with_task(tasks[name]).port(host, max_flops=TINY_LIMIT)
        examples = DATA[name]().evaluation
        assert current.task == anew.task
        with torch.inference_mode(), current.attached():
            switched = host.map.base(**inputs).last_hidden_state
        with torch.inference_mode(), anew.attached():
            assert torch.equal(host.map.base(**inputs).last_hidden_state, switched)
        assert current.classes_of(examples).classes == anew.classes_of(examples).classes
        assert current.classes_of(examples).atoms_per_token == anew.classes_of(examples).atoms_per_token
        for index, layer in first.adapter.by_layer.items():
            shared = current.adapter.by_layer[index].edits
            assert all(shared[kind].data_ptr() == edit.data_ptr() for kind, edit in layer.edits.items())
    assert torch.equal(first(texts), before), "the model of the other task has changed"
    assert torch.equal(loaded.port(aligned)(texts), before)
    assert not torch.equal(current(texts), before), "the task file makes no difference"


@pytest.mark.integration
@pytest.mark.parametrize("start", ["pairs", "tokens"])
def test_a_host_that_was_aligned_with_another_task_takes_the_own_one(start, adapter, tasks):
    """The own readout and the feature bank come from the adapter's file, not from the task that was aligned."""
    host = tiny_host("electra", hidden_size=40)
    loaded = UniversalAdapter.load(adapter)
    anew = loaded.with_task(tasks["own"]).port(host, max_flops=TINY_LIMIT)
    other = loaded.with_task(tasks[start])
    switched = other.port(other.align(host, max_flops=TINY_LIMIT, any_task=True), task=tasks["own"])
    texts = list(sequence_data().evaluation.texts)
    assert torch.equal(switched(texts), anew(texts))
    assert torch.equal(other.with_task(tasks["own"]).port(host, max_flops=TINY_LIMIT)(texts), anew(texts))


def test_what_cannot_be_switched_is_said(adapter, tasks, tmp_path):
    host = tiny_host("llama", hidden_size=40)
    loaded = UniversalAdapter.load(adapter)
    own = loaded.align(host, max_flops=TINY_LIMIT)
    assert loaded.port(own, task=tasks["own"]).task == loaded.manifest.task
    pairs = loaded.with_task(tasks["pairs"]).align(host, max_flops=TINY_LIMIT)
    assert loaded.port(pairs, task=tasks["tokens"]).task.kind == "tokens"
    for aligned, task in ((own, tasks["pairs"]), (pairs, tasks["own"]), (pairs, None)):
        with pytest.raises(UsageError, match="does not serve") as caught:
            loaded.port(aligned, task=task)
        assert "any_task=True" in caught.value.hint
    other = tmp_path / "other.safetensors"
    make_adapter(host, sequence_data(), other, max_steps=4)
    another = UniversalAdapter.load(other)
    with pytest.raises(FormatError, match="another adapter"):
        another.port(another.align(host, max_flops=TINY_LIMIT, any_task=True), task=tasks["own"])


@pytest.mark.integration
def test_a_task_that_needs_another_plan_is_refused_rather_than_carried_by_halves(adapter, tasks):
    """Words are averaged by a product over all tokens, so a token task costs more and other parts are left out."""
    host = tiny_host("llama", hidden_size=40)
    loaded = UniversalAdapter.load(adapter)
    whole = loaded.align(host, max_flops=TINY_LIMIT)
    needed = adapter_flops_per_token(whole.plan, host.map, loaded.manifest.config)
    limit = (
        100 * needed / (whole.host_flops / min(SEQUENCE_LENGTH, host.max_length)) * 1.002
    )  # whole for texts, just so
    aligned = loaded.align(host, max_flops=limit, any_task=True)
    assert aligned.plan.left_out == ()
    assert loaded.port(aligned, task=tasks["own"]).task == loaded.manifest.task
    with pytest.raises(UsageError, match="other parts"):
        loaded.port(aligned, task=tasks["tokens"])
    assert loaded.with_task(tasks["tokens"]).port(host, max_flops=limit).plan.left_out != ()
