"""Bytes of a ported adapter are those of its tensors, and the peak of a pass is what is alive at once."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import SMALL, meta_twin, tiny_folded, tiny_universal, unpacked
from tiny_hosts import FAMILIES, tiny_host

from uhl_cli.codes.layout import TAIL_BYTES
from uhl_cli.cost.memory import PeakMemory, peak_bytes
from uhl_cli.cost.passes import PassShape


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_is_what_is_alive_at_once(device):
    before = torch.zeros(10_000, device=device)
    with torch.inference_mode(), PeakMemory() as meter:
        first = torch.ones(1000, device=device)
        assert meter.peak == 4000
        second = first + 1  # two alive
        assert meter.peak == 8000
        view = second.view(10, 100)  # no new bytes
        view.add_(1)
        before.mul_(2)  # neither what was there already
        assert meter.peak == 8000
        del first
        third = torch.ones(500, device=device)  # takes the place of the first
        assert meter.peak == 8000
        fourth = torch.ones(1000, device=device, dtype=torch.float64)
        assert meter.peak == 4000 + 2000 + 8000
    del second, view, third, fourth


def test_a_view_keeps_its_bytes_alive():
    with torch.inference_mode(), PeakMemory() as meter:
        view = torch.ones(1000)[:1]
        other = torch.ones(1000)
        assert meter.peak == 8000
    del view, other


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_the_adapter(family):
    host = tiny_host(family)
    folded = unpacked(tiny_folded(host)[0])
    d, atoms, readout, labels, layers = 32, SMALL.num_atoms, SMALL.readout_size, SMALL.num_labels, 2
    # Writers have an edit and the MLP's readers another; attention's a third, unless they read the stream as it is.
    # Parts of a fused module have their own.
    edits = layers * (
        5 if family == "gpt2" else 3 if host.map.layers[0].target_modules["q"].space == "attention" else 2
    )
    gains = 1 + sum(len(layer.target_modules) for layer in host.map.layers)
    depth_weights = len(folded.readout.by_depth) * readout
    rows = atoms * ((layers + 1) * 2 + edits + 1) + depth_weights
    table = atoms * (((layers + 1) * 2 + edits) * d + readout) + depth_weights * d
    values = (layers + 1) * 2 * atoms + atoms * gains
    values += 2 * readout + labels * readout + labels + SMALL.top_k
    assert folded.nbytes == 4 * (values + table)
    assert unpacked(folded, torch.bfloat16).nbytes == 2 * (values + table)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        packed = folded.for_inference(torch.device("cpu"), dtype)
        assert packed.nbytes == size * values + table + 8 * rows
        assert packed.nbytes == sum(value.nbytes for value in packed.state_dict().values())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_peak_of_a_pass(family):
    host = tiny_host(family)
    folded = unpacked(tiny_folded(host)[0])
    one, four = (peak_bytes(host.map, None, PassShape(size, 48)) for size in (1, 4))
    widest = 4 * 48 * 96  # the feed-forward layer's output
    assert one >= 2 * widest  # beside the activation that is made of it
    assert one < 100 * widest
    assert 3.5 * one < four < 4.5 * one
    assert peak_bytes(host.map, folded, PassShape(1, 48)) > one
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.model.modules())


def test_attaching_makes_no_copy_of_the_edits():
    """Not even of GPT-2's, whose q, k and v are parts of one module."""
    host = tiny_host("gpt2")
    folded = unpacked(tiny_folded(host)[0])
    edits = 4 * SMALL.num_atoms * 3 * 32 * 2
    short = PassShape(1, 1)
    assert peak_bytes(host.map, folded, short) - peak_bytes(host.map, None, short) < edits


def test_bytes_are_counted_without_weights_too():
    host = tiny_host("bert")
    shaped = tiny_universal(host).port(meta_twin(host), max_flops=1e9).adapter
    assert shaped.threshold.is_meta
    folded = tiny_folded(host)[0].for_inference(torch.device("cpu"), torch.float32)
    missing = set(range(3)) - set(folded.readout.by_depth)
    assert shaped.nbytes == folded.nbytes + (32 + TAIL_BYTES) * SMALL.readout_size * len(missing)
