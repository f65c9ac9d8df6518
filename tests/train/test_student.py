"""A student starts at the ported readout's predictions, and changes what it is asked to and nothing else."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tiny_adapters import tiny_universal
from tiny_hosts import SENTENCES, SWEEP, tiny_host
from torch.nn import functional

from uhl_cli.adapter.attach import attach
from uhl_cli.api import UniversalAdapter
from uhl_cli.data import Examples
from uhl_cli.host.running import evaluating
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import encode_examples, forward
from uhl_cli.schema import TrainingConfig
from uhl_cli.train.loop import run_steps, targets_of
from uhl_cli.train.model import task_loss
from uhl_cli.train.student import Student, StudentModel, Trained

KINDS: tuple[Trained, ...] = ("delta-theta", "lora")
CONFIG = TrainingConfig(
    max_steps=4, batch_size=8, max_length=48, learning_rate=0.02, readout_learning_rate=5e-3, noise=0.0, seed=0
)


def carried(family: str = "bert") -> tuple[UniversalAdapter, AlignedHost]:
    """A random adapter aligned to a host of another shape than its source's."""
    adapter = tiny_universal(tiny_host("bert"))
    return adapter, adapter.align(tiny_host(family, hidden_size=40, num_hidden_layers=3, seed=1), max_flops=1e6)


@pytest.fixture(scope="module")
def both() -> tuple[UniversalAdapter, AlignedHost]:
    return carried()


def student_of(adapter: UniversalAdapter, aligned: AlignedHost, trained: Trained, seed: int = 0) -> Student:
    delta = adapter.stored["delta_theta"]
    return Student(
        adapter.start(aligned),
        aligned.host.map,
        trained,
        readout=trained == "lora",
        delta_shape=(delta.shape[0], delta.shape[1]),
        rank=3,
        seed=seed,
    )


def examples(adapter: UniversalAdapter) -> Examples:
    count = len(adapter.manifest.task.labels)
    return Examples(SENTENCES, labels=tuple(row % count for row in range(len(SENTENCES))))


def logits(aligned: AlignedHost, student: Student) -> torch.Tensor:
    """Logits of all sentences as training sees them."""
    host = aligned.host
    some = Examples(SENTENCES, labels=(0,) * len(SENTENCES))
    encoded, words, _ = encode_examples(host, some, list(range(len(SENTENCES))))
    with torch.no_grad(), evaluating(host.map.base), attach(host.map, student.adapter(), dense=True) as attachment:
        return forward(host, attachment, encoded, words)[0]


def taught(both, trained: Trained, *, targets=None, seed: int = 0, student: Student | None = None) -> Student:
    adapter, aligned = both
    student = student or student_of(adapter, aligned, trained, seed)
    config = CONFIG.model_copy(update={"seed": seed})
    run_steps(
        StudentModel(student, aligned.host),
        student,
        student.optimizer(config),
        aligned.host,
        examples(adapter),
        config,
        accelerator=Accelerator(cpu=True),
        targets=targets,
    )
    return student


def values(student: Student) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in student.named_parameters()}


@pytest.mark.parametrize("trained", KINDS)
@pytest.mark.parametrize("family", SWEEP)
def test_a_new_student_predicts_what_the_ported_readout_does(family, trained):
    adapter, aligned = carried(family)
    student = student_of(adapter, aligned, trained)
    start = adapter.port(aligned).with_adapter(adapter.start(aligned))(list(SENTENCES))
    assert torch.allclose(logits(aligned, student), start, atol=1e-5)
    finished = adapter.port(aligned).with_adapter(student.finished(aligned.host))(list(SENTENCES))
    assert torch.allclose(finished, start, atol=1e-5)  # tables are packed again, which may round a scale
    with torch.no_grad():
        for name, value in student.named_parameters():
            if name == "delta_theta" or name.startswith("factors.up"):
                value.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(logits(aligned, student), start, atol=1e-2)


@pytest.mark.parametrize("trained", KINDS)
def test_what_is_not_asked_for_stays(both, trained):
    adapter, aligned = both
    host = {name: value.clone() for name, value in aligned.host.map.base.state_dict().items()}
    student = student_of(adapter, aligned, trained)
    before = values(student)
    taught(both, trained, student=student)
    changed = {name for name, value in values(student).items() if not torch.equal(value, before[name])}
    if trained == "delta-theta":
        assert changed == {"delta_theta"}
    else:
        assert changed == set(before)
    assert all(torch.equal(value, host[name]) for name, value in aligned.host.map.base.state_dict().items())
    assert all(value.requires_grad for value in aligned.host.map.base.parameters())


@pytest.mark.parametrize("trained", KINDS)
def test_one_hot_outputs_teach_what_labels_do(both, trained):
    some = examples(both[0])
    count = len(both[0].manifest.task.labels)

    def one_hot(rows: list[int]) -> torch.Tensor:
        return functional.one_hot(torch.tensor(targets_of(some, rows)), count).float()

    hard, soft = values(taught(both, trained)), values(taught(both, trained, targets=one_hot))
    other = values(taught(both, trained, targets=lambda rows: one_hot(rows).roll(1, dims=1)))
    for name, value in hard.items():
        assert torch.allclose(value, soft[name], atol=1e-4), name
    assert any(not torch.allclose(value, other[name], atol=1e-3) for name, value in hard.items())


def test_the_loss_of_a_distribution_is_its_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(5, 3, generator=generator)
    classes = torch.tensor([0, 2, 1, 1, 0])
    hard, right = task_loss(given, classes)
    soft, right_too = task_loss(given, functional.one_hot(classes, 3).float())
    assert torch.allclose(hard, soft)
    assert right == right_too
    spread = torch.randn(5, 3, generator=generator).softmax(-1)
    expected = -(spread * given.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(task_loss(given, spread)[0], expected)
    assert not torch.allclose(hard, expected)


@pytest.mark.parametrize("trained", KINDS)
def test_the_seed_decides_all_that_is_random(both, trained):
    first, again, other = (values(taught(both, trained, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("trained", KINDS)
def test_training_sees_what_the_file_gives_back(both, trained):
    """Delta-theta as its four bits, and of a LoRA all but the last digits."""
    adapter, aligned = both
    student = taught(both, trained)
    seen = logits(aligned, student)
    finished = adapter.port(aligned).with_adapter(student.finished(aligned.host))(list(SENTENCES))
    tolerance = 1e-4 if trained == "delta-theta" else 0.1
    assert torch.allclose(seen, finished, atol=tolerance)
    start = adapter.port(aligned).with_adapter(adapter.start(aligned))(list(SENTENCES))
    assert not torch.allclose(seen, start, atol=tolerance), "nothing was learnt"
