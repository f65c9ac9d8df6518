"""A host's digest: equal for equal hosts, another for whatever changes a state, none for what it cannot see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_hosts import FAMILIES, save_tiny_host, tiny_host, tiny_model, tiny_tokenizer
from tokenizers import normalizers
from torch import nn

from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.host.identity import host_digest

MIDDLE = "encoder.layer.1.output.dense.bias"


def changed(change: Callable[[nn.Module], object]) -> Host:
    """A tiny host whose model was changed before it was wrapped."""
    tokenizer = tiny_tokenizer("bert")
    model = tiny_model("bert", num_hidden_layers=3, tokenizer=tokenizer)
    with torch.no_grad():
        change(model)
    return wrap_host(model, tokenizer, name="tiny-bert")


def plain() -> Host:
    return changed(lambda model: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_hosts_have_equal_digests(family):
    host = tiny_host(family)
    digest = host_digest(host)
    assert digest is not None
    assert digest == host_digest(tiny_host(family))
    host.tokenizer(["a longer text"] * 2, truncation=True, max_length=4, padding=True)  # the last call's settings
    assert digest == host_digest(host)
    assert digest != host_digest(tiny_host(family, seed=1))


def test_a_weight_that_the_fingerprint_does_not_cover_counts():
    def one_number(model: nn.Module) -> None:
        model.get_parameter(MIDDLE)[3] += 1e-6

    one, other = plain(), changed(one_number)
    assert one.fingerprint == other.fingerprint
    assert host_digest(one) != host_digest(other)


def test_settings_of_modules_count():
    def less(model: nn.Module) -> None:
        model.get_submodule("encoder.layer.1.output.LayerNorm").eps = 1e-3

    def buffer(model: nn.Module) -> None:
        model.get_buffer("embeddings.token_type_ids")[0, 0] = 1

    def attention(model: nn.Module) -> None:
        model.config._attn_implementation = "eager"

    digests = [host_digest(changed(change)) for change in (lambda model: None, less, buffer, attention)]
    assert None not in digests
    assert len(set(digests)) == len(digests)


def test_the_tokenizer_counts_and_so_does_the_longest_input():
    tokenizer, model = tiny_tokenizer("bert"), tiny_model("bert")
    cased, shorter, other = (tiny_tokenizer("bert") for _ in range(3))
    cased.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    shorter.model_max_length -= 1
    other.add_tokens(["zz"])
    model.resize_token_embeddings(len(other))
    hosts = [wrap_host(model, each) for each in (tokenizer, cased, shorter, other)]
    assert len({each.fingerprint.digest for each in hosts}) == 1
    assert len({host_digest(each) for each in hosts}) == len(hosts)


def test_dtype_and_threads_count(tmp_path):
    folder = str(save_tiny_host(tmp_path / "host", "bert"))
    whole, half = load_host(folder, device="cpu"), load_host(folder, device="cpu", dtype="bfloat16")
    assert whole.fingerprint == half.fingerprint
    assert host_digest(whole) != host_digest(half)
    before, threads = host_digest(whole), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert host_digest(whole) != before
    finally:
        torch.set_num_threads(threads)
    assert host_digest(whole) == before
    with torch.autocast("cpu"):
        assert host_digest(whole) != before


class Own(nn.Linear):
    """A module of another package."""


def test_what_cannot_be_seen_has_no_digest():
    def own(model: nn.Module) -> None:
        model.get_submodule("encoder.layer.0.output.dense").__class__ = Own

    def hook(model: nn.Module) -> None:
        model.register_forward_pre_hook(lambda *_: None)

    def replaced(model: nn.Module) -> None:
        model.forward = model.forward

    for change in (own, hook, replaced):
        assert host_digest(changed(change)) is None


def test_which_layer_another_one_shares_counts():
    def shares(index: int) -> Host:
        def share(model: nn.Module) -> None:
            model.encoder.layer[2] = model.encoder.layer[index]  # type: ignore[union-attr, operator, index]

        return changed(share)

    digests = {host_digest(host) for host in (shares(0), shares(1), plain())}
    assert len(digests) == 3
    assert host_digest(shares(0)) in digests


def test_a_hook_on_all_modules_leaves_no_digest():
    host = plain()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert host_digest(host) is None
    finally:
        handle.remove()
    assert host_digest(host) is not None
