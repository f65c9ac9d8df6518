"""Calibration: offsets that undo a pushed class, a strength that follows the teacher, and nothing else changed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_hosts import SENTENCES, tiny_host
from torch.nn import functional
from toy_runs import make_adapter, sequence_data

from uhl_cli.api import UniversalAdapter
from uhl_cli.data.examples import Examples
from uhl_cli.errors import UsageError
from uhl_cli.ported.calibrate import STRENGTHS, Calibration, Judge, class_offsets


def test_offsets_undo_what_pushes_all_texts_towards_one_class():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    pushed = logits + torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)
    found = class_offsets(pushed, logits.softmax(-1))
    assert torch.allclose(found, torch.tensor([-2.0, 1.0, 1.0], dtype=torch.float64), atol=0.05)
    assert found.sum().abs() < 1e-9


def test_offsets_lower_the_cross_entropy_and_a_class_that_is_not_there_stays_finite():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    wanted = functional.one_hot(logits[:, :3].argmax(-1), 4).double()
    found = class_offsets(logits, wanted)
    assert torch.isfinite(found).all()
    assert functional.cross_entropy(logits + found, wanted) < functional.cross_entropy(logits, wanted)


def test_no_offset_where_the_model_says_what_the_teacher_says():
    logits = torch.randn(100, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert class_offsets(logits, logits.softmax(-1)).abs().max() < 1e-9


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrate") / "adapter.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path, max_steps=30, transfer_set="auto", teacher="adapter")
    return UniversalAdapter.load(path)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_strength_is_that_of_whatever_spoke(adapter, strength):
    target = tiny_host("bert", hidden_size=40, seed=3)
    aligned = adapter.align(target, max_flops=1000.0)
    bare = adapter._folded_for(aligned).adapter
    judge = adapter.judge(target)
    spoken = judge.logits_of(bare.with_strength(strength))
    found = Judge(judge.logits_of, judge.examples, spoken).calibration(bare)
    assert found.strength == strength
    assert found.offsets[strength].abs().max() < 1e-4
    assert found.cross_entropy[strength] < min(loss for other, loss in found.cross_entropy.items() if other != strength)


def test_updates_that_come_nearer_by_chance_are_left_out():
    # Some texts come nearer and others go away: on average a little nearer, which 40 texts do not show.
    logits = torch.tensor([[0.0, 0.0]] * 40)
    pushed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]] * 20)

    def calibration(good: int, *, at_home: bool = False) -> Calibration:
        wanted = torch.cat([4 * pushed[:good], -4 * pushed[good:]])
        by_strength = {0.0: logits, 0.5: 0.5 * pushed, 1.0: pushed}
        adapter = SimpleNamespace(updates=True, with_strength=lambda strength: strength)
        return Judge(by_strength.__getitem__, Examples(("a",) * 40, labels=(0,) * 40), wanted).calibration(
            adapter, at_home=at_home
        )

    chance, clear = calibration(28), calibration(38)
    assert calibration(28, at_home=True).strength == 1.0
    for found in (chance, clear):
        assert min(found.cross_entropy.values()) < found.cross_entropy[0.0]
    assert (chance.strength, clear.strength) == (0.0, 1.0)


def test_updates_act_on_the_host_that_they_were_trained_on(adapter):
    aligned = adapter.align(tiny_host("bert"), max_flops=1000.0)
    assert aligned.host.fingerprint == adapter.manifest.source.fingerprint
    assert adapter.calibration(aligned).strength == 1.0
    assert adapter.port(aligned).adapter.updates


def test_a_strength_can_be_asked_for(adapter):
    aligned = adapter.align(tiny_host("gpt2", hidden_size=40, seed=4), max_flops=1000.0)
    calibration, texts = adapter.calibration(aligned), list(SENTENCES)
    found = [adapter.port(aligned, strength=strength)(texts) for strength in STRENGTHS]
    assert torch.equal(adapter.port(aligned)(texts), found[STRENGTHS.index(calibration.strength)])
    assert not torch.equal(found[0], found[2])
    with pytest.raises(UsageError, match=r"0\.7 is not a strength"):
        adapter.port(aligned, strength=0.7)


def test_a_port_without_updates_takes_any_strength(adapter):
    aligned = adapter.align(tiny_host("gpt2", hidden_size=40, seed=4), max_flops=19.0)
    ported = adapter.port(aligned, strength=1.0)
    assert not ported.adapter.updates
    assert torch.equal(ported(list(SENTENCES)), adapter.port(aligned)(list(SENTENCES)))


def test_a_port_is_the_folded_adapter_with_strength_and_offsets(adapter):
    target = tiny_host("gpt2", hidden_size=40, seed=4)
    aligned = adapter.align(target, max_flops=1000.0)
    calibration, ported = adapter.calibration(aligned), adapter.port(aligned)
    bare = adapter._folded_for(aligned).adapter.with_strength(calibration.strength)
    logits = ported.with_adapter(bare)(list(SENTENCES))
    assert torch.allclose(ported(list(SENTENCES)), logits + calibration.offsets[calibration.strength], atol=1e-5)


def test_without_a_transfer_set_nothing_is_set(tmp_path):
    path = tmp_path / "adapter.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path, transfer_set="0")
    adapter = UniversalAdapter.load(path)
    aligned = adapter.align(tiny_host("bert"), max_flops=1000.0)
    assert adapter.calibration(aligned) is None
    assert adapter.judge(aligned.host) is None
