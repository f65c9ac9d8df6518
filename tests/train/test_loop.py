"""Training changes the adapter and nothing else; schedule, checkpoints and the head-only control are exact."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from tiny_hosts import SENTENCES, SWEEP, tiny_host
from transformers import get_scheduler

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.align.alignment import align_anchors
from uhl_cli.align.bank import build_bank
from uhl_cli.align.states import word_states
from uhl_cli.align.texts import choose_anchors
from uhl_cli.codes.layout import UPDATE_PARAMETERS
from uhl_cli.cost.flops import count_flops
from uhl_cli.cost.plan import full_plan
from uhl_cli.data import Examples
from uhl_cli.data.examples import token_examples
from uhl_cli.errors import DataError, TrainingError
from uhl_cli.host.running import frozen
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.controls import head_logits, mean_final_states
from uhl_cli.ported.model import encode_examples
from uhl_cli.schema import AdapterConfig, TrainingConfig
from uhl_cli.train.head import fit_head, regression
from uhl_cli.train.loop import learning_rate_factor, learning_rate_factors, optimizer_for, total_steps, train
from uhl_cli.train.model import TrainedModel
from uhl_cli.train.run_files import RunFiles

NEVER_TRAINED = ("delta_theta", "head_weight", "head_bias")
READOUT = ("readout_in_weight", "readout_in_bias", "readout_out_weight", "readout_out_bias", "readout_pool")
SIZE_MLP = ("size_in_weight", "size_in_bias", "size_out_weight", "size_out_bias")
CONFIG = TrainingConfig(max_steps=40, batch_size=16, max_length=48, noise=0.0, active_weight=0.0)


class Toy:
    """A tiny host with its anchors' alignment."""

    def __init__(self, family="bert", **sizes):
        self.host = tiny_host(family, **sizes)
        anchors = choose_anchors(list(SENTENCES), num_words=128, seed=0, origin="test")
        states = word_states(self.host, anchors)
        bank = build_bank(anchors, states, knots=(0.0, 0.5, 1.0), canonical_size=256)
        plan = full_plan(self.host.map)
        self.own = align_anchors(bank, states)
        self.aligned = AlignedHost(self.host, bank.digest, self.own, plan, count_flops(self.host, None))

    def train(self, adapter, examples, config, **options):
        losses = []
        options.setdefault("on_step", lambda report: losses.append(report))
        train(adapter, self.aligned, examples, config, accelerator=Accelerator(cpu=True), **options)
        return losses


@pytest.fixture(scope="module")
def toy():
    return Toy()


def separable(count=64):
    """Cold texts speak of soup, warm ones of dogs: a word apart, so any host can tell them."""
    texts = tuple(SENTENCES[15] if row % 2 else SENTENCES[9] for row in range(count))
    return Examples(texts=texts, labels=tuple(row % 2 for row in range(count)))


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_schedule_warms_up_and_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert factors[99] > 0


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (2, 0.06), (5, 1.0)])
def test_schedule_of_short_runs_trains(steps, warmup):
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_chosen_schedule_is_that_of_transformers(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    factor = learning_rate_factors(schedule, 100, 0.1)
    assert [factor(step) for step in range(100)] == pytest.approx(expected)
    own = learning_rate_factors(None, 100, 0.1)
    assert [own(step) for step in range(100)] == [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert own(0) > factor(0) == 0.0


def test_a_schedule_that_is_not_chosen_is_not_recorded():
    assert "schedule" not in TrainingConfig().model_dump()
    assert TrainingConfig(schedule="linear").model_dump()["schedule"] == "linear"


def test_number_of_steps():
    assert total_steps(100, TrainingConfig(batch_size=32, epochs=3)) == 12
    assert total_steps(100, TrainingConfig(batch_size=32, epochs=0.5)) == 2
    assert total_steps(1, TrainingConfig(batch_size=32, epochs=0.001)) == 1
    assert total_steps(100, TrainingConfig(batch_size=32, max_steps=7)) == 7
    with pytest.raises(DataError, match="no training example"):
        total_steps(0, TrainingConfig())


def test_only_matrices_decay_and_rates_differ():
    adapter = CanonicalAdapter(AdapterConfig())
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    groups = optimizer_for(adapter, TrainingConfig(learning_rate=0.5, readout_learning_rate=0.25)).param_groups
    seen = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["lr"] == (0.5 if name in UPDATE_PARAMETERS else 0.25)
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1)
    assert sorted(seen) == sorted(name for name in names.values() if name not in NEVER_TRAINED)


@pytest.mark.parametrize("family", SWEEP)
def test_training_learns_and_leaves_the_host_alone(family):
    toy = Toy(family, hidden_size=32, num_hidden_layers=2)
    before = state(toy.host.model)
    next(toy.host.model.parameters()).requires_grad_(False)  # a mixture of flags, which must come back as it was
    flags = [parameter.requires_grad for parameter in toy.host.model.parameters()]
    assert set(flags) == {False, True}
    adapter = CanonicalAdapter(AdapterConfig())
    first, *_, last = toy.train(adapter, separable(), CONFIG.model_copy(update={"max_steps": 60}))
    assert last.loss < 0.5 * first.loss
    assert last.accuracy == 1.0
    assert same(before, state(toy.host.model))
    assert [parameter.requires_grad for parameter in toy.host.model.parameters()] == flags
    assert not any(parameter.grad is not None for parameter in toy.host.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in toy.host.model.modules())
    assert all(not bool(adapter.get_parameter(name).any()) for name in NEVER_TRAINED)


def test_without_a_learning_rate_nothing_is_learnt(toy):
    adapter = CanonicalAdapter(AdapterConfig())
    before = state(adapter)
    # The options refuse a rate of zero.
    config = CONFIG.model_copy(update={"learning_rate": 0.0, "readout_learning_rate": 0.0})
    first, last = toy.train(adapter, separable(), config)
    assert last.loss == pytest.approx(first.loss, rel=1e-5)
    assert same(before, state(adapter))


def test_without_updates_the_readout_alone_is_trained(toy):
    adapter = CanonicalAdapter(AdapterConfig())
    before = state(adapter)
    toy.train(adapter, separable(), CONFIG.model_copy(update={"updates": False, "max_steps": 5}))
    changed = {name for name, value in state(adapter).items() if not torch.equal(value, before[name])}
    assert changed & set(UPDATE_PARAMETERS) == set()
    assert {"readout_in_weight", "readout_out_weight"} <= changed
    assert adapter.updates_are_zero


def one_step(toy, adapter, examples, config):
    model = TrainedModel(adapter, toy.aligned, config)
    encoded, words, _ = encode_examples(toy.host, examples, list(range(len(examples))), max_length=48)
    labels = examples.labels or [tag for row in examples.tags for tag in row]
    with frozen(toy.host.map.base):
        losses = model(encoded, words, torch.tensor(labels), 0)
        losses.total.backward()
    return losses


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
def test_gradient_reaches_every_trained_part(toy, kind):
    adapter = CanonicalAdapter(AdapterConfig(kind=kind))
    with torch.no_grad():  # at U = 0 nothing behind U can have a gradient
        adapter.get_parameter("atoms_u").normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
        adapter.get_parameter("size_out_weight").normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    examples = separable(8)
    if kind == "tokens":
        words = [text.split() for text in examples.texts]
        examples = token_examples(words, [[place % 2 for place in range(len(row))] for row in words])
    losses = one_step(toy, adapter, examples, TrainingConfig(max_length=48, update_dropout=0.0))
    assert losses.active > 0
    reached = {name for name, value in adapter.named_parameters() if value.grad is not None and bool(value.grad.any())}
    wanted = {"atoms_u", "atoms_v", "router", "task_router", "task_embedding", "threshold", *SIZE_MLP, *READOUT}
    wanted |= {name for name in UPDATE_PARAMETERS if name.startswith("mixer")}
    if kind == "tokens":
        wanted -= {"readout_pool"}
    assert wanted <= reached
    assert reached.isdisjoint(NEVER_TRAINED)
    assert all(parameter.grad is None for parameter in toy.host.model.parameters())


def test_a_new_adapter_gives_gradient_to_u_and_none_to_what_lies_behind_it(toy):
    adapter = CanonicalAdapter(AdapterConfig())
    one_step(toy, adapter, separable(8), TrainingConfig(active_weight=0.0, update_dropout=0.0))
    assert bool(adapter.get_parameter("atoms_u").grad.any())
    assert not bool(adapter.get_parameter("atoms_v").grad.any())


@pytest.mark.parametrize(("dropout", "updated"), [(0.999, False), (0.0, True)])
def test_a_step_with_updates_off_trains_the_readout_alone(toy, dropout, updated):
    adapter = CanonicalAdapter(AdapterConfig())
    losses = one_step(toy, adapter, separable(8), TrainingConfig(update_dropout=dropout))
    assert losses.updated is updated
    assert (adapter.get_parameter("atoms_u").grad is not None) is updated
    assert bool(adapter.get_parameter("readout_in_weight").grad.any())


def test_noise_depends_on_the_seed_alone(toy):
    adapter = CanonicalAdapter(AdapterConfig())
    model = TrainedModel(adapter, toy.aligned, TrainingConfig(noise=1.0, update_noise=1.0, update_dropout=0.0))
    encoded, words, _ = encode_examples(toy.host, separable(8), list(range(8)))
    targets = torch.tensor(separable(8).labels)
    losses = [model(encoded, words, targets, seed).total.item() for seed in (4, 4, 5)]
    assert losses[0] == losses[1] != losses[2]


def test_a_loss_that_is_not_finite_is_an_error(toy):
    adapter = CanonicalAdapter(AdapterConfig())
    with torch.no_grad():
        adapter.get_parameter("readout_out_bias").fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan at step 2") as caught:
        toy.train(adapter, separable(), CONFIG.model_copy(update={"max_steps": 2}))
    assert "--learning-rate" in caught.value.hint


def test_interrupted_training_goes_on_as_if_nothing_had_happened(toy, tmp_path):
    config = CONFIG.model_copy(update={"max_steps": 12, "noise": 1.0})
    whole = CanonicalAdapter(AdapterConfig())
    toy.train(whole, separable(), config, files=RunFiles(tmp_path / "whole"), save_every=4)

    class Stop(Exception):
        pass

    def stop(_report):
        raise Stop

    files = RunFiles(tmp_path / "cut")
    cut = CanonicalAdapter(AdapterConfig())
    with pytest.raises(Stop):  # the report of the last step comes before its checkpoint
        toy.train(cut, separable(), config, files=files, save_every=4, on_step=stop)
    resumed = CanonicalAdapter(AdapterConfig(), seed=77)
    toy.train(resumed, separable(), config, files=files, save_every=4, resume=True)
    assert same(state(whole), state(resumed))
    assert files.log.read_text().count("\n") == 1


def test_log_has_one_line_a_window_and_loses_those_behind_the_checkpoint(toy, tmp_path):
    files = RunFiles(tmp_path)
    toy.train(CanonicalAdapter(AdapterConfig()), separable(), CONFIG, files=files, save_every=20)
    lines = files.log.read_text().splitlines()
    assert len(lines) == 2
    files.log.write_text("\n".join([*lines, lines[-1].replace('"step": 40', '"step": 60'), '{"step": 80, "lo']))
    toy.train(CanonicalAdapter(AdapterConfig()), separable(), CONFIG, files=files, save_every=20, resume=True)
    assert files.log.read_text().splitlines() == lines


def test_head_beats_chance_on_separable_data(toy):
    examples = separable()
    weight, bias = fit_head(toy.host, toy.own, examples, num_labels=2, seed=0, max_length=48)
    assert weight.shape == (2, 256)
    assert bias.shape == (2,)
    assert head_accuracy(toy, examples, weight, bias) == 1.0
    turned = Examples(texts=examples.texts, labels=tuple(1 - label for label in examples.labels))
    assert head_accuracy(toy, turned, weight, bias) == 0.0


def head_accuracy(toy, examples, weight, bias):
    states, _ = mean_final_states(toy.host, examples, max_length=48)
    classes = head_logits(states, weight, bias, toy.own).argmax(-1).tolist()
    return sum(row == label for row, label in zip(classes, examples.labels, strict=True)) / len(examples)


@pytest.mark.parametrize(("present", "labels"), [((0, 2), 3), ((1, 2), 4), ((0, 1, 3), 5), ((2,), 4)])
def test_head_never_predicts_a_class_that_is_missing(toy, present, labels):
    texts = separable().texts[:24]
    chosen = tuple(present[row % len(present)] for row in range(24))
    examples = Examples(texts=texts, labels=chosen)
    weight, bias = fit_head(toy.host, toy.own, examples, num_labels=labels, seed=0)
    assert weight.shape == (labels, 256)
    states, _ = mean_final_states(toy.host, Examples(texts=SENTENCES, labels=(0,) * len(SENTENCES)))
    predicted = set(head_logits(states, weight, bias, toy.own).argmax(-1).tolist())
    assert predicted <= set(present)


def test_a_head_that_does_not_converge_says_nothing():
    """scikit-learn's warning would reach a user who asked for --quiet."""
    draw = np.random.default_rng(0)
    features, targets = draw.standard_normal((200, 30)) * 10.0 ** draw.uniform(-3, 4, 30), draw.integers(0, 2, 200)
    with pytest.warns(ConvergenceWarning):
        LogisticRegression(C=10.0, max_iter=500).fit(features, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regression(features, targets, 10.0)
