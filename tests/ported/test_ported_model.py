"""A ported model is what a transformers user expects: threads, copies, texts, flags, interrupts."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_adapters import SMALL, tiny_folded, tiny_task, tiny_universal
from tiny_hosts import FAMILIES, SENTENCES, tiny_host, tiny_model, tiny_tokenizer

from uhl_cli import UniversalAdapter
from uhl_cli.adapter.attach import Attachment
from uhl_cli.cost.memory import PeakMemory
from uhl_cli.data import Examples
from uhl_cli.errors import AlignmentError, DataError, HostError, UsageError
from uhl_cli.host.running import use_of
from uhl_cli.ported.model import PortedModel, Prediction, WordPrediction

LIMIT = 1000.0
TEXTS = list(SENTENCES)
TOKENS = SMALL.model_copy(update={"kind": "tokens"})


def ported_to(host, *, seed=0, config=SMALL) -> PortedModel:
    return PortedModel(host, tiny_folded(host, config, seed=seed)[0], tiny_task(config))


@pytest.fixture(scope="module")
def adapter() -> UniversalAdapter:
    return tiny_universal(tiny_host("bert"), featured=True)


def hooks_of(model) -> int:
    return sum(
        len(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if "hook" in name and hasattr(value, "__len__")
    )


def in_threads(*calls) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("same", [True, False], ids=["one model", "two models of one host"])
def test_threads_take_turns(same):
    host = tiny_host("llama")
    first = ported_to(host)
    second = first if same else ported_to(host, seed=5)
    wanted = {ported: ported(TEXTS[:4]) for ported in (first, second)}
    wrong: list[PortedModel] = []

    def call(ported):
        for _ in range(80):
            if not torch.equal(ported(TEXTS[:4]), wanted[ported]):
                wrong.append(ported)

    in_threads(lambda: call(first), lambda: call(second))
    assert not wrong
    assert hooks_of(host.model) == 0
    assert same or not torch.equal(wanted[first], wanted[second])


def test_without_the_lock_threads_do_disturb_each_other(monkeypatch):
    """The negative control of `test_threads_take_turns`: it is the lock that keeps two threads apart."""
    host = tiny_host("llama")
    ported = ported_to(host)
    wanted = ported(TEXTS[:4])
    meeting = threading.Barrier(2)
    wrong: list[object] = []

    class NoLock:
        def acquire(self):
            return True

        def release(self):
            pass

        __enter__ = acquire

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(use_of(host.map.base), "lock", NoLock())

    def call():
        meeting.wait()
        for _ in range(40):
            try:
                if not torch.equal(ported(TEXTS[:4]), wanted):
                    wrong.append("logits")
            except (HostError, RuntimeError, AssertionError, AttributeError, KeyError, TypeError) as error:
                wrong.append(error)

    in_threads(call, call)
    assert wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_inside_its_own_context_applies_the_adapter_once(family):
    host = tiny_host(family)
    ported = ported_to(host)
    wanted = ported(TEXTS)
    with ported.attached():
        hooks = hooks_of(host.model)
        assert torch.equal(ported(TEXTS), wanted)
        assert hooks_of(host.model) == hooks > 0
        with ported.attached():
            assert hooks_of(host.model) == hooks
        assert hooks_of(host.model) == hooks
    assert hooks_of(host.model) == 0


def test_two_adapters_on_one_host_are_refused_by_name():
    host = tiny_host("bert")
    first, second = ported_to(host), ported_to(host, seed=5)
    wanted = second(TEXTS)
    with first.attached(), pytest.raises(HostError, match="the adapter for moods is already attached") as caught:
        second(TEXTS)
    assert "attached()" in caught.value.hint
    assert torch.equal(second(TEXTS), wanted)
    assert hooks_of(host.model) == 0


def test_a_host_is_not_aligned_while_an_adapter_is_attached(adapter):
    host = tiny_host("electra")
    ported = adapter.port(host, max_flops=LIMIT)
    with ported.attached(), pytest.raises(HostError, match="attached"):
        adapter.align(host, max_flops=LIMIT)
    assert adapter.align(host, max_flops=LIMIT).plan.layers


def test_copies_and_pickles_are_whole(adapter):
    ported = adapter.port(tiny_host("gpt2", hidden_size=40), max_flops=LIMIT)
    wanted = ported(TEXTS)
    for again in (copy.deepcopy(ported), pickle.loads(pickle.dumps(ported))):
        assert torch.equal(again(TEXTS), wanted)
        assert again.host.model is not ported.host.model
        with torch.no_grad():
            again.host.map.layers[0].target_modules["q"].module.weight.zero_()
        assert not torch.equal(again(TEXTS), wanted)
    assert torch.equal(ported(TEXTS), wanted)
    with ported.attached(), pytest.raises(HostError, match="cannot be copied"):
        copy.deepcopy(ported)


def test_the_state_is_the_adapters_alone():
    host = tiny_host("bert")
    ported = ported_to(host)
    state = ported.state_dict()
    assert not list(ported.parameters())
    assert set(state) == {f"adapter.{name}" for name in ported.adapter.state_dict()}
    assert sum(value.nbytes for value in state.values()) == ported.adapter.nbytes
    other = ported_to(host, seed=5)
    assert not torch.equal(other(TEXTS), ported(TEXTS))
    other.load_state_dict(state)
    assert torch.equal(other(TEXTS), ported(TEXTS))


def test_moving_the_adapter_says_what_to_do_about_the_host():
    ported = ported_to(tiny_host("bert"))
    wanted = ported(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ported.to("cpu")(TEXTS), wanted)
    with pytest.warns(UserWarning, match=r"the adapter is on meta, its host on cpu\. .*model\.to\('meta'\)"):
        moved = copy.deepcopy(ported).to("meta")
    assert moved.adapter.threshold.is_meta
    with pytest.raises(HostError, match="its host on cpu"):
        moved(TEXTS)
    assert hooks_of(moved.host.model) == 0


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "peft"])
def test_porting_leaves_training_flags_and_what_is_trainable(adapter, wrapped):
    tokenizer = tiny_tokenizer("bert")
    model = tiny_model("bert", tokenizer=tokenizer)
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    model.train()

    def flags():
        return [module.training for module in model.modules()], [value.requires_grad for value in model.parameters()]

    before = flags()
    assert all(before[0])
    assert any(before[1])
    assert all(before[1]) is not wrapped
    ported = adapter.port(model, tokenizer, max_flops=LIMIT)
    assert flags() == before
    # The host has dropout, which a call leaves off.
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    assert torch.equal(ported(TEXTS), ported(TEXTS))
    assert flags() == before
    with ported.attached(), torch.no_grad():  # the user's own passes are as the user set them
        ids = torch.arange(6, 18).reshape(2, 6)
        assert not torch.equal(ported.host.map.base(input_ids=ids)[0], ported.host.map.base(input_ids=ids)[0])
    assert flags() == before


def test_logits_carry_gradients_when_asked():
    host = tiny_host("bert")
    ported = ported_to(host)
    host.model.requires_grad_(True)
    plain = ported(TEXTS[:3])
    assert not plain.requires_grad
    logits = ported(TEXTS[:3], gradients=True)
    torch.testing.assert_close(logits.detach(), plain, atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert host.map.layers[0].target_modules["q"].module.weight.grad.abs().sum() > 0


def test_texts_as_users_hold_them():
    ported = ported_to(tiny_host("roberta"))
    wanted = ported(TEXTS[:5])
    for texts in (tuple(TEXTS[:5]), np.array(TEXTS[:5]), pd.Series(TEXTS[:5], index=range(3, 8))):
        assert torch.equal(ported(texts), wanted)
    assert ported(TEXTS[0]).shape == (1, 3)
    torch.testing.assert_close(ported(TEXTS[0])[0], wanted[0], atol=1e-4, rtol=1e-4)
    for size in (0, -1):
        with pytest.raises(UsageError, match="batch_size"):
            ported(TEXTS[:2], batch_size=size)
    for wrong in ([], ["a", None], [["a"]], [1.5], pd.Series(["a", float("nan")])):
        with pytest.raises(DataError):
            ported(wrong)


def test_one_long_text_costs_one_batch():
    """300 short texts and a long one: the long one does not stretch the others' batches."""
    ported = ported_to(tiny_host("bert"))
    texts = [*["a cold day"] * 300, " ".join(["soup"] * 60)]
    with PeakMemory() as by_length:
        ported(texts, batch_size=16)
    with PeakMemory() as together:
        ported(texts, batch_size=301)
    assert by_length.peak < together.peak / 5
    found = ported(texts, batch_size=16)
    torch.testing.assert_close(found, ported(texts, batch_size=301), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[-1], found[0], atol=1e-4)


def test_predictions_have_labels_and_probabilities():
    ported = ported_to(tiny_host("gpt2"), seed=2)
    found = ported.predict(TEXTS)
    shares = ported(TEXTS).softmax(-1)
    assert all(isinstance(each, Prediction) for each in found)
    for each, row in zip(found, shares, strict=True):
        assert list(each.probabilities) == list(ported.task.labels)
        assert list(each.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert each.label == ported.task.labels[int(row.argmax())]
    assert len({each.label for each in found}) > 1
    assert len(ported.predict("one text")) == 1


def test_words_are_predicted_with_their_place():
    ported = ported_to(tiny_host("gpt2"), config=TOKENS)
    text = "It 's cold, sadly."
    (found,) = ported.predict(text)
    assert all(isinstance(each, WordPrediction) for each in found)
    assert [each.word for each in found] == ["It", "'", "s", "cold", ",", "sadly", "."]
    assert all(text[each.start : each.end] == each.word for each in found)
    assert all(sum(each.probabilities.values()) == pytest.approx(1, abs=1e-5) for each in found)
    spans = tuple((each.start, each.end) for each in found)
    classes = ported.classes_of(Examples((text,), words=(spans,), tags=((0,) * len(spans),))).classes[0]
    assert [ported.task.labels.index(each.label) for each in found] == classes
    with pytest.raises(UsageError, match="predict"):
        ported(text)


def test_repr_is_two_lines(adapter):
    shown = repr(adapter.port(tiny_host("llama"), max_flops=LIMIT))
    assert len(shown.splitlines()) == 2
    assert len(shown) < 300
    assert "moods" in shown
    assert "tiny-llama" in shown


# Where an interrupt can come: Python handles signals when a function starts, and after calls and in loops inside it.
WATCHED = {
    "attach": ("call",),
    "evaluating": ("call",),
    "_set_training": ("call", "line"),
    "add_hooks": ("call", "line"),
    "_add_module_hook": ("call", "line"),
    "_owned": ("call", "line"),
    "remove_hooks": ("call", "line"),
    "_remove_owned": ("call", "line"),
    "hook": ("call", "line"),
}


class Interrupts:
    """Raises KeyboardInterrupt at the n-th place of `WATCHED` that is reached."""

    def __init__(self, number: int) -> None:
        self.left, self.fired = number, ""

    def __call__(self, frame, event, _argument):
        name = frame.f_code.co_name
        if not frame.f_code.co_filename.endswith(("attach.py", "running.py")) or name not in WATCHED:
            return None
        if event in WATCHED[name] and not self.fired:
            self.left -= 1
            if self.left == 0:
                self.fired = name
                raise KeyboardInterrupt
        return self if "line" in WATCHED[name] else None


def free_for_others(base) -> bool:
    found = []

    def try_it():
        lock = use_of(base).lock
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    in_threads(try_it)
    return found[0]


@pytest.mark.integration
@pytest.mark.parametrize("entered", [False, True], ids=["call", "context"])
def test_an_interrupt_anywhere_leaves_no_hook(entered):
    host = tiny_host("bert", num_hidden_layers=1)
    ported = ported_to(host)
    wanted = ported(TEXTS[:1])
    host.model.train()
    fired: list[str] = []

    def run():
        if entered:
            with ported.attached():
                host.map.base(input_ids=torch.arange(6, 12).reshape(1, 6))
        else:
            ported(TEXTS[:1])

    for number in range(1, 10_000):
        interrupts, before = Interrupts(number), sys.gettrace()
        sys.settrace(interrupts)
        try:
            run()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if not interrupts.fired:
            break
        fired.append(interrupts.fired)
        assert hooks_of(host.model) == 0, interrupts.fired
        assert use_of(host.map.base).attached is None, interrupts.fired
        assert all(module.training for module in host.model.modules()), interrupts.fired
        assert free_for_others(host.map.base), interrupts.fired
    assert set(fired) >= {"attach", "add_hooks", "_add_module_hook", "remove_hooks", "_remove_owned", "hook"}
    assert torch.equal(ported(TEXTS[:1]), wanted)


def test_an_interrupted_removal_is_finished_and_then_raised(monkeypatch):
    host = tiny_host("bert")
    ported = ported_to(host)
    original = Attachment.remove_hooks
    calls = []

    def interrupted(self):
        calls.append(None)
        if len(calls) < 3:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Attachment, "remove_hooks", interrupted)
    with pytest.raises(KeyboardInterrupt), ported.attached():
        assert hooks_of(host.model) > 0
    assert hooks_of(host.model) == 0
    assert len(calls) == 3


def test_an_alignment_to_another_adapter_is_refused(adapter):
    host = tiny_host("electra")
    aligned = adapter.align(host, max_flops=LIMIT)
    other = tiny_universal(tiny_host("gpt2"))
    with pytest.raises(UsageError, match="aligned to another adapter"):
        other.port(aligned)
    assert adapter.port(aligned)(TEXTS[:2]).shape == (2, 3)


def test_maps_that_are_not_finite_are_refused(adapter):
    host = tiny_host("llama")
    aligned = adapter.align(host, max_flops=LIMIT)
    assert adapter.port(aligned).adapter.is_finite
    aligned.folded.clear()
    aligned.alignment.layers[1].read[0, 0] = torch.inf
    with pytest.raises(AlignmentError, match="not finite"):
        adapter.port(aligned)


def test_adapters_and_aligned_hosts_are_shown_in_a_line_or_two(adapter):
    assert len(repr(adapter).splitlines()) == 2
    shown = repr(adapter.align(tiny_host("bert"), max_flops=LIMIT))
    assert shown == "AlignedHost('tiny-bert' by anchors, for the adapter's own task)"
    assert len(repr(adapter)) < 200


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mistral"])
def test_gradient_checkpointing_is_left_on_and_changes_nothing(adapter, family):
    wanted = adapter.port(tiny_host(family), max_flops=LIMIT)(TEXTS)
    host = tiny_host(family)
    model = host.model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ported = adapter.port(model, host.tokenizer, max_flops=LIMIT)
    assert torch.equal(ported(TEXTS), wanted)
    assert model.training
    assert model.is_gradient_checkpointing
