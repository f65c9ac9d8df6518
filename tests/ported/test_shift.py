"""The mean shift of the updates: taken back on another host, left alone on the source."""

from dataclasses import replace

import pytest
import torch
from tiny_adapters import tiny_universal
from tiny_hosts import SENTENCES, tiny_host
from torch.testing import assert_close

from uhl_cli.align.states import word_batches
from uhl_cli.commands.scoring import host_record
from uhl_cli.formats.ported import load_ported, save_ported
from uhl_cli.host.encode import encode
from uhl_cli.ported import shift
from uhl_cli.ported.model import PortedModel
from uhl_cli.ported.shift import SAME, correction, update_shift

LIMIT = 1000.0  # the readout alone is over a tenth of a tiny host


def featured(host):
    """An adapter with a feature bank, and without delta-theta, as pretraining leaves it."""
    adapter = tiny_universal(host, featured=True)
    return replace(adapter, stored=adapter.stored | {"delta_theta": torch.zeros(8, adapter.manifest.config.num_atoms)})


def mean_features(ported, bank):
    """Mean of the readout's features over all words of the bank, written apart from `update_shift`."""
    found = []
    with torch.inference_mode(), ported.attached() as attachment:
        for batch in word_batches(ported.host, bank.anchors, batch_size=7):
            final = ported.host.map.base(**batch.encoded.model_inputs()).last_hidden_state
            features = attachment.readout_features(final)
            found.append(batch.weights @ features.reshape(-1, features.shape[-1]))
    return torch.cat(found).mean(0)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_targets_features_keep_their_mean_under_updates(family, monkeypatch):
    monkeypatch.setattr(shift, "_EVERY", 1)  # random features are noise, whose mean over a few texts is not zero
    host = tiny_host(family)
    adapter = featured(host)
    bank = adapter.features
    ported = adapter.port(host, max_flops=LIMIT)
    assert ported.adapter.readout.shift is not None  # the random shift in the file is none that these updates make
    bare = mean_features(PortedModel(host, ported.adapter.without_updates(), ported.task), bank)
    wanted = bank.values[:, : adapter.manifest.config.readout_size].mean(0)
    assert_close(bare, wanted, atol=0.02, rtol=0)  # the weights have eight bits
    unshifted = ported.adapter.with_shift(None)
    moved = mean_features(PortedModel(host, unshifted, ported.task), bank) - bare
    assert float(moved.norm()) > 0.1  # the control: these updates do shift the mean
    assert_close(mean_features(ported, bank), wanted, atol=1e-3, rtol=0)  # the shift makes good for the eight bits too


def test_on_the_source_the_shift_stays():
    host = tiny_host("bert")
    adapter = featured(host)
    found = adapter.port(host, max_flops=LIMIT)
    own = update_shift(host, found.adapter.with_shift(None), adapter.features)
    assert torch.equal(update_shift(host, found.adapter, adapter.features), own)  # a shift takes no part in it
    as_source = replace(adapter, features=replace(adapter.features, shift=own))
    assert as_source.port(host, max_flops=LIMIT).adapter.readout.shift is None
    assert_close(found.adapter.readout.shift, -own)


@pytest.mark.parametrize(
    ("factor", "same"), [(1.0, True), (1.0 + 0.9 * SAME, True), (1.0 + 1.1 * SAME, False), (0.0, False)]
)
def test_correction_is_minus_the_shift_unless_it_is_the_sources(factor, same):
    source = torch.tensor([3.0, -4.0])
    found = correction(factor * source, source)
    if same:
        assert found is None
    else:
        assert_close(found, -factor * source)


def test_updates_that_do_nothing_shift_nothing():
    nothing = torch.zeros(3)
    assert correction(nothing, nothing) is None


def test_readout_only_has_no_shift_and_a_ported_folder_keeps_it(tmp_path):
    host = tiny_host("bert")
    ported = featured(host).port(host, max_flops=LIMIT)
    assert ported.adapter.without_updates().readout.shift is None
    save_ported(tmp_path, ported, host_record(host))
    again = load_ported(tmp_path, host.model, host.tokenizer)
    assert_close(again.adapter.readout.shift, ported.adapter.readout.shift)
    assert torch.equal(again(list(SENTENCES)), ported(list(SENTENCES)))


def test_the_hosts_own_output_does_not_depend_on_the_shift():
    host = tiny_host("bert")
    ported = featured(host).port(host, max_flops=LIMIT)
    encoded = encode(host, list(SENTENCES))
    outputs = []
    for value in (ported.adapter.readout.shift, None):
        folded = ported.adapter.with_shift(value)
        with torch.inference_mode(), PortedModel(host, folded, ported.task).attached():
            outputs.append(host.map.base(**encoded.model_inputs()).last_hidden_state)
    assert torch.equal(*outputs)
