"""Task files are switched on a ported model: the same as porting anew, with the updates' tensors shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_tune import run
from tiny_hosts import SWEEP, tiny_host
from toy_runs import TINY_LIMIT, make_adapter, pair_data, sequence_data, token_data

from uhl_cli.api import UniversalAdapter
from uhl_cli.cost.flops import SEQUENCE_LENGTH
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
    first = loaded.port(host, max_flops=TINY_LIMIT, switchable=True)
    texts = list(sequence_data().evaluation.texts)
    inputs = encode(host, texts).model_inputs()
    before = first(texts)
    current = first
    for name in ("own", "tokens", "pairs", "own"):
        current = current.with_task(tasks[name])
        anew = loaded.with_task(tasks[name]).port(host, max_flops=TINY_LIMIT)
        examples = DATA[name]().evaluation
        assert current.task == anew.task
        with torch.inference_mode(), current.attached():
            switched = host.map.base(**inputs).last_hidden_state
        with torch.inference_mode(), anew.attached():
            assert torch.equal(host.map.base(**inputs).last_hidden_state, switched)
        assert current.predict(examples).classes == anew.predict(examples).classes
        assert current.predict(examples).atoms_per_token == anew.predict(examples).atoms_per_token
        for index, layer in first.folded.layers.items():
            shared = current.folded.layers[index].edits
            assert all(shared[kind].packed.data_ptr() == edit.packed.data_ptr() for kind, edit in layer.edits.items())
    assert torch.equal(first(texts), before), "the model that was switched from has changed"
    assert not torch.equal(current(texts), before), "the task file makes no difference"


@pytest.mark.integration
@pytest.mark.parametrize("start", ["pairs", "tokens"])
def test_a_model_that_was_ported_with_another_task_takes_the_own_one(start, adapter, tasks):
    """The own readout and the feature bank come from the adapter's file, not from the task that was ported."""
    host = tiny_host("electra", hidden_size=40)
    loaded = UniversalAdapter.load(adapter)
    anew = loaded.with_task(tasks["own"]).port(host, max_flops=TINY_LIMIT)
    other = loaded.with_task(tasks[start])
    switched = other.port(host, max_flops=TINY_LIMIT, switchable=True).with_task(tasks["own"])
    texts = list(sequence_data().evaluation.texts)
    assert torch.equal(switched(texts), anew(texts))
    assert torch.equal(other.with_task(tasks["own"]).port(host, max_flops=TINY_LIMIT)(texts), anew(texts))


def test_what_cannot_be_switched_is_said(adapter, tasks, tmp_path):
    host = tiny_host("llama", hidden_size=40)
    loaded = UniversalAdapter.load(adapter)
    with pytest.raises(UsageError, match="switchable=True"):
        loaded.port(host, max_flops=TINY_LIMIT).with_task(tasks["own"])
    other = tmp_path / "other.safetensors"
    make_adapter(host, sequence_data(), other, max_steps=4)
    ported = UniversalAdapter.load(other).port(host, max_flops=TINY_LIMIT, switchable=True)
    with pytest.raises(FormatError, match="another adapter"):
        ported.with_task(tasks["own"])


@pytest.mark.integration
def test_a_task_that_needs_another_plan_is_refused_rather_than_carried_by_halves(adapter, tasks):
    """Words are averaged by a product over all tokens, so a token task costs more and other parts are left out."""
    host = tiny_host("llama", hidden_size=40)
    loaded = UniversalAdapter.load(adapter)
    _, plan, host_flops = loaded.align(host, max_flops=TINY_LIMIT)
    needed = adapter_flops_per_token(plan, host.map, loaded.manifest.config)
    limit = 100 * needed / (host_flops / min(SEQUENCE_LENGTH, host.max_length)) * 1.002  # whole for texts, just so
    ported = loaded.port(host, max_flops=limit, switchable=True)
    assert ported.report["left_out"] == ()
    assert ported.with_task(tasks["own"]).task == loaded.manifest.task
    with pytest.raises(UsageError, match="other parts"):
        ported.with_task(tasks["tokens"])
    assert loaded.with_task(tasks["tokens"]).port(host, max_flops=limit).report["left_out"] != ()
