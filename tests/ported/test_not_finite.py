"""Logits that are not finite are an error, and not the first class: a comparison takes NaN for the largest."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import SMALL, tiny_folded, tiny_task
from tiny_hosts import FAMILIES, SENTENCES, tiny_host

from uhl_cli.data import Examples
from uhl_cli.errors import HostError
from uhl_cli.ported.controls import mean_final_states
from uhl_cli.ported.model import PortedModel

TEXTS = list(SENTENCES[:3])


def damaged(family, text):
    """A ported model whose host has no finite embedding for one token, which only this text has."""
    host = tiny_host(family)
    ported = PortedModel(host, tiny_folded(host, SMALL)[0], tiny_task(SMALL))
    ids = [set(host.tokenizer(each).input_ids) for each in TEXTS]
    own = ids[TEXTS.index(text)] - set().union(*(some for each, some in zip(TEXTS, ids, strict=True) if each != text))
    token = min(own)
    with torch.no_grad():
        host.map.embeddings.weight[token] = float("nan")
    return ported, host.tokenizer.convert_ids_to_tokens(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_and_its_token_are_named(family):
    ported, token = damaged(family, TEXTS[1])
    for call in (
        ported,
        ported.predict,
        lambda texts: ported.logits_of(Examples(tuple(texts), labels=(0,) * len(texts))),
    ):
        with pytest.raises(HostError) as caught:
            call(TEXTS)
        assert repr(TEXTS[1][:60]) in str(caught.value)
        assert repr(token) in str(caught.value)
        assert str(caught.value).endswith("Check the checkpoint.")
    assert torch.isfinite(ported([TEXTS[0], TEXTS[2]])).all(), "texts without the token are none the worse"


def test_the_states_of_the_head_only_control_are_looked_at_too():
    ported, token = damaged("bert", TEXTS[1])
    examples = Examples(tuple(TEXTS), labels=(0, 0, 0))
    with pytest.raises(HostError, match="not finite") as caught:
        mean_final_states(ported.host, examples)
    assert repr(token) in str(caught.value)
