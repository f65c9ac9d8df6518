"""A host with a packed adapter attached gives under torch.compile and autocast what it gives without."""

import pytest
import torch
from tiny_adapters import tiny_folded
from tiny_hosts import SENTENCES, tiny_host

from uhl_cli.adapter.attach import attach
from uhl_cli.host.encode import encode

CPU = (torch.device("cpu"), torch.float32)


def logits_of(host, folded, base):
    encoded = encode(host, SENTENCES[:4])
    with attach(host.map, folded) as attachment:
        final = base(**encoded.model_inputs()).last_hidden_state
        features = attachment.readout_features(final)
        return attachment.readout.logits(features, encoded.content_mask, None)


@pytest.mark.integration
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_compiled_as_one_graph(family):
    host = tiny_host(family)
    folded = tiny_folded(host)[0].for_inference(*CPU)
    silent = tiny_folded(host, zero=True)[0].for_inference(*CPU)
    torch.compiler.reset()
    with torch.inference_mode():
        expected = logits_of(host, folded, host.map.base)
        # Attached before the first call, so that hooks are part of the graph; no break is allowed.
        compiled = torch.compile(host.map.base, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits_of(host, folded, compiled), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(logits_of(host, silent, host.map.base), expected, atol=1e-3)
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_autocast(family):
    host = tiny_host(family)
    folded = tiny_folded(host)[0].for_inference(*CPU)
    with torch.inference_mode():
        expected = logits_of(host, folded, host.map.base)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = logits_of(host, folded, host.map.base)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, atol=0.05 * scale, rtol=0)
    assert not torch.equal(found.float(), expected)
