"""A checkpoint gives back exactly what was saved, or a TrainingError that leaves model and optimizer as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from file_damage import assert_flips_are_found, record_of
from safetensors.torch import load, save
from torch import Tensor, nn

from uhl_cli.errors import TrainingError
from uhl_cli.formats.checkpoint import load_checkpoint, run_digest, save_checkpoint
from uhl_cli.formats.container import CHECKPOINT, to_bytes


class Small(nn.Module):
    """Two parameters that are trained and one that never has a gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.idle = nn.Parameter(torch.randn(2, generator=generator))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (self.weight.square().sum() + self.bias.sin().sum()).backward()
        optimizer.step()


def started(steps: int = 0, *, seed: int = 0) -> tuple[Small, torch.optim.Optimizer]:
    model = Small(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model.step(optimizer)
    return model, optimizer


def state(model: Small, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and moments, copied."""
    found = {name: value.detach().clone() for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        found |= {f"{name}.{key}": moment.clone() for key, moment in optimizer.state.get(value, {}).items()}
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def path(tmp_path) -> Path:
    save_checkpoint(tmp_path / "checkpoint.safetensors", *started(3), step=3, digest="d")
    return tmp_path / "checkpoint.safetensors"


def assert_refused(path: Path, words: str = "", digest: str = "d") -> None:
    model, optimizer = started(1, seed=5)
    before = state(model, optimizer)
    with pytest.raises(TrainingError) as caught:
        load_checkpoint(path, model, optimizer, digest=digest)
    assert words in caught.value.message
    assert "--resume" in caught.value.hint
    assert str(caught.value).isprintable()
    assert same(before, state(model, optimizer))


def test_parameters_and_moments_come_back_exactly(path):
    saved, fresh = started(3), started(seed=9)
    assert not same(state(*saved), state(*fresh))
    assert load_checkpoint(path, *fresh, digest="d") == 3
    assert same(state(*saved), state(*fresh))
    for model, optimizer in (saved, fresh):
        model.step(optimizer)
    assert same(state(*saved), state(*fresh))  # the optimizers go on alike
    assert "idle.step" not in state(*fresh)


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path):
    save_checkpoint(tmp_path / "first", *started(), step=0, digest="d")
    fresh = started(seed=9)
    assert load_checkpoint(tmp_path / "first", *fresh, digest="d") == 0
    assert same(state(*started()), state(*fresh))


def test_same_state_gives_the_same_bytes(path, tmp_path):
    save_checkpoint(tmp_path / "again", *started(3), step=3, digest="d")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_checkpoint_of_another_run_is_refused(path):
    assert_refused(path, "other options", digest="e")
    assert run_digest({"a": 1, "b": 2}) == run_digest({"b": 2, "a": 1}) != run_digest({"a": 1, "b": 3})


def test_every_flipped_bit_is_found(path):
    model, optimizer = started()
    assert_flips_are_found(path, lambda: load_checkpoint(path, model, optimizer, digest="d"), error=TrainingError)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "folder", "missing"])
def test_what_is_no_checkpoint_is_refused(path, damage):
    data = path.read_bytes()
    if damage in ("folder", "missing"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "text": b"not a checkpoint"}[damage])
    assert_refused(path, "the checkpoint cannot be used")


def test_an_edited_step_is_found(path):
    path.write_bytes(path.read_bytes().replace(b'\\"step\\": 3', b'\\"step\\": 4'))
    assert_refused(path, "the digest of the content")


def test_a_checkpoint_of_an_older_uhl_is_refused(path):
    path.write_bytes(save(load(path.read_bytes()), metadata={"step": "3", "digest": "d"}))
    assert_refused(path, "not a uhl checkpoint")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer.exp_avg.weight": None}, "at optimizer.exp_avg.weight"),
        ({"optimizer.step.bias": None}, "at optimizer.step.bias"),
        ({"parameter.idle": None}, "at parameter.idle"),
        ({"more": torch.zeros(1)}, "at more"),
        ({"optimizer.exp_avg.idle": torch.zeros(2)}, "at optimizer.exp_avg.idle"),
        ({"parameter.bias": torch.full((4,), float("nan"))}, "at parameter.bias"),
        ({"optimizer.exp_avg.bias": torch.full((4,), float("inf"))}, "at optimizer.exp_avg.bias"),
        ({"optimizer.exp_avg_sq.bias": torch.full((4,), -1.0)}, "at optimizer.exp_avg_sq.bias"),
        ({"optimizer.step.bias": torch.tensor(-1.0)}, "at optimizer.step.bias"),
        ({"parameter.bias": torch.zeros(5)}, "at parameter.bias"),
        ({"parameter.bias": torch.zeros(4, dtype=torch.float16)}, "at parameter.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_a_sound_container(path, changes, words):
    data = path.read_bytes()
    tensors = {name: value for name, value in (load(data) | changes).items() if value is not None}
    path.write_bytes(to_bytes(CHECKPOINT, json.dumps(record_of(data), sort_keys=True), tensors))
    assert_refused(path, words)


@pytest.mark.parametrize("change", [{"step": -1}, {"step": "many"}, {"more": 1}, {"stepped": ["weight"]}])
def test_records_that_do_not_fit_are_refused(path, change):
    data = path.read_bytes()
    path.write_bytes(to_bytes(CHECKPOINT, json.dumps(record_of(data) | change, sort_keys=True), load(data)))
    assert_refused(path)
