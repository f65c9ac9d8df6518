"""An alignment from the cache is the one that would be made, to the bit; a file that does not fit is made again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_damage import flips, record_of
from safetensors.numpy import load
from tiny_adapters import tiny_task_file, tiny_universal
from tiny_hosts import SENTENCES, SWEEP, save_tiny_host, tiny_host, tiny_tokenizer
from tokenizers import normalizers
from torch import Tensor

from uhl_cli.align.alignment import Alignment
from uhl_cli.api import UniversalAdapter
from uhl_cli.errors import UhlWarning
from uhl_cli.formats.alignment import kept_alignments, load_alignment, save_alignment
from uhl_cli.formats.container import ALIGNMENT, to_bytes
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.ported.aligned import AlignedHost

LIMIT = 1e6
DIGEST = "ab" * 32


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UHL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "alignments"


@pytest.fixture(scope="module")
def adapter() -> UniversalAdapter:
    return tiny_universal(tiny_host("bert"), featured=True, digest=DIGEST)


@pytest.fixture(scope="module")
def target() -> Host:
    return tiny_host("gpt2", hidden_size=40, num_hidden_layers=3, seed=1)


def aligned(adapter: UniversalAdapter, host: Host, **how: Any) -> AlignedHost:
    return adapter.align(host, **{"max_flops": LIMIT, "cache": True} | how)


def tensors(alignment: Alignment) -> Iterator[Tensor]:
    """All maps, in order; a map that two names share comes twice."""
    for maps in alignment.layers:
        yield from (maps.mean, maps.read, maps.write_stream, maps.write_attention, maps.write_mlp)
    yield from alignment.depth_weights.values()
    yield alignment.depth_bias
    features = alignment.features
    if features is not None:
        yield from (*features.depth_weights.values(), features.bias, features.head, features.head_bias)


def assert_same(first: Alignment, second: Alignment) -> None:
    """Equal to the bit, in memory order and in what is shared."""
    ours, theirs = list(tensors(first)), list(tensors(second))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert (one.stride(), one.dtype, one.device) == (other.stride(), other.dtype, other.device)
    for mine, yours in zip(first.layers, second.layers, strict=True):
        for name in ("write_attention", "write_mlp"):
            shared = [getattr(maps, name) is maps.write_stream for maps in (mine, yours)]
            assert shared[0] == shared[1]
    assert list(first.depth_weights) == list(second.depth_weights)
    plain = ("strategy", "width", "quality", "knot_quality", "new_words")
    assert [getattr(first, name) for name in plain] == [getattr(second, name) for name in plain]
    assert (first.features is None) == (second.features is None)
    if first.features is not None and second.features is not None:
        assert first.features.quality == second.features.quality
        assert list(first.features.depth_weights) == list(second.features.depth_weights)


@pytest.mark.parametrize("order", [(0, 12, 3, 10, 2), (12, 11, 1)])
@pytest.mark.parametrize("featured", [True, False])
def test_depths_are_summed_in_the_same_order(cache, order, featured):
    """Sums of floating-point numbers depend on it."""
    adapter = tiny_universal(tiny_host("bert"), featured=featured, digest=DIGEST)
    host, config = tiny_host("bert", num_hidden_layers=12), adapter.manifest.config
    made = aligned(adapter, host, cache=False).alignment
    weight = made.depth_weights[0]
    made = replace(made, depth_weights={depth: weight + depth for depth in order})
    if made.features is not None:
        weights = {depth: made.features.bias[:, None].expand(-1, 32) + depth for depth in reversed(order)}
        made = replace(made, features=replace(made.features, depth_weights=weights))
    save_alignment("e" * 64, made, adapter=DIGEST, host=host, serves="any")
    found = load_alignment("e" * 64, config, host)
    assert found is not None
    assert_same(made, found)


@pytest.mark.parametrize("featured", [True, False])
def test_a_hit_on_a_deep_host(cache, featured):
    adapter = tiny_universal(tiny_host("bert"), featured=featured, digest=DIGEST)
    first, second = (aligned(adapter, tiny_host("llama", num_hidden_layers=12)) for _ in range(2))
    assert (first.cached, second.cached) == (False, True)
    assert_same(first.alignment, second.alignment)
    assert torch.equal(adapter.port(first)(SENTENCES[:6]), adapter.port(second)(SENTENCES[:6]))


@pytest.mark.parametrize("family", SWEEP)
@pytest.mark.parametrize("featured", [True, False])
def test_a_hit_is_the_alignment_that_would_be_made(cache, family, featured, monkeypatch):
    adapter = tiny_universal(tiny_host("bert"), featured=featured, digest=DIGEST)
    host = tiny_host(family, hidden_size=40, num_hidden_layers=3, seed=1)
    made, first = aligned(adapter, host, cache=False), aligned(adapter, host)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("uhl_cli.ported.aligned.word_states", lambda *_, **__: pytest.fail("the host was run"))
    second = aligned(adapter, tiny_host(family, hidden_size=40, num_hidden_layers=3, seed=1))
    assert (made.cached, first.cached, second.cached) == (False, False, True)
    assert (made.serves, made.plan, made.host_flops) == (second.serves, second.plan, second.host_flops)
    for other in (first, second):
        assert_same(made.alignment, other.alignment)
    assert torch.equal(adapter.port(made)(SENTENCES[:6]), adapter.port(second)(SENTENCES[:6]))
    with pytest.raises(AssertionError):
        assert_same(made.alignment, replace(made.alignment, depth_bias=made.alignment.depth_bias + 1e-6))


def test_without_the_cache_nothing_is_read_or_written(cache, adapter, target):
    aligned(adapter, target, cache=False)
    assert not cache.exists()
    aligned(adapter, target)
    assert not aligned(adapter, target, cache=False).cached


def with_tokenizer(host: Host) -> Host:
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return wrap_host(host.model, tokenizer, name=host.name)


def test_other_hosts_are_no_hits(cache, adapter, target, tmp_path):
    shape = {"hidden_size": 40, "num_hidden_layers": 3}
    assert not aligned(adapter, target).cached
    assert aligned(adapter, tiny_host("gpt2", **shape, seed=1)).cached
    assert not aligned(adapter, tiny_host("gpt2", **shape, seed=2)).cached
    relettered = aligned(adapter, with_tokenizer(target))
    assert relettered.host.fingerprint == target.fingerprint
    assert not relettered.cached
    assert not torch.equal(relettered.alignment.depth_bias, aligned(adapter, target).alignment.depth_bias)
    folder = str(save_tiny_host(tmp_path / "host", "gpt2", **shape, seed=1))
    half = load_host(folder, device="cpu", dtype="bfloat16")
    assert half.fingerprint == target.fingerprint
    assert not aligned(adapter, half).cached


def test_weights_that_were_changed_in_memory_are_no_hit(cache, adapter):
    host = tiny_host("gpt2", hidden_size=40, num_hidden_layers=3, seed=1)
    assert not aligned(adapter, host).cached
    with torch.no_grad():
        host.map.layers[1].target_modules["down"].module.weight[0, 0] += 0.5
    assert not aligned(adapter, host).cached


def test_other_options_and_other_files_are_no_hits(cache, adapter, target):
    assert not aligned(adapter, target).cached
    assert not aligned(adapter, target, any_task=True).cached
    assert aligned(adapter, target, any_task=True).serves == "any"
    assert not aligned(adapter, target, strategy="size").cached
    assert not aligned(adapter, target, strategy="size").cached, "it costs nothing"
    limit = next(
        limit
        for limit in range(100, 0, -1)
        if len(adapter.align(target, strategy="size", max_flops=limit).plan.readout_depths) < 4
    )
    tight = aligned(adapter, target, max_flops=float(limit))
    assert tight.plan.readout_depths != aligned(adapter, target).plan.readout_depths
    assert not tight.cached
    for seed, digest in ((1, DIGEST), (0, "cd" * 32)):
        other = tiny_universal(tiny_host("bert"), featured=True, seed=seed, digest=digest)
        assert aligned(other, target).cached == (seed == 0), "the content decides, not the name"
    assert not aligned(tiny_universal(tiny_host("bert", seed=3), featured=True, digest=DIGEST), target).cached


def test_task_files_share_what_they_can(cache, adapter, target):
    aligned(adapter, target)
    own = tiny_task_file(adapter.manifest, adapter=DIGEST)
    assert aligned(adapter.with_task(own), target).cached
    other = adapter.with_task(tiny_task_file(adapter.manifest, adapter=DIGEST, own_task=False))
    assert [aligned(other, target).cached for _ in range(2)] == [False, True]
    assert aligned(other, target).serves == "other"


def numbers(data: bytes, name: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A sound file with one tensor changed."""
    held = load(data)
    held[name] = change(held[name])
    return to_bytes(ALIGNMENT, json.dumps(record_of(data), sort_keys=True, ensure_ascii=False), held)


def said(data: bytes, **fields: object) -> bytes:
    """A sound file with other fields in its record."""
    record = json.dumps(record_of(data) | fields, sort_keys=True, ensure_ascii=False)
    return to_bytes(ALIGNMENT, record, load(data))


def without(data: bytes, start: str) -> bytes:
    """A sound file without the tensors whose names begin so."""
    held = {name: value for name, value in load(data).items() if not name.startswith(start)}
    return to_bytes(ALIGNMENT, json.dumps(record_of(data), sort_keys=True, ensure_ascii=False), held)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "a flipped bit": lambda data: next(flips(data, 1)),
    "a flipped bit of the header": lambda data: list(flips(data, 2))[1],
    "no number": lambda data: numbers(data, "layers.0.read", lambda read: read * np.nan),
    "infinite": lambda data: numbers(data, "depth_bias", lambda bias: bias + np.float32(np.inf)),
    "another shape": lambda data: numbers(data, "layers.0.read", lambda read: read[:, 1:]),
    "another type": lambda data: numbers(data, "layers.0.mean", lambda mean: mean.astype(np.float64)),
    "a map is missing": lambda data: without(data, "layers.2.stream"),
    "no depth": lambda data: without(data, "depths."),
    "a depth is missing": lambda data: without(data, f"depths.{record_of(data)['depths'][-1]}"),
    "no depth is named": lambda data: said(data, depths=[]),
    "a depth is named twice": lambda data: said(
        data, depths=[*record_of(data)["depths"], record_of(data)["depths"][0]]
    ),
    "features are said and not there": lambda data: said(data, feature_quality=0.5, feature_depths=[0]),
    "an unknown tensor": lambda data: to_bytes(
        ALIGNMENT, json.dumps(record_of(data), sort_keys=True), load(data) | {"x": np.zeros(3, np.float32)}
    ),
    "another's": lambda data: said(data, key="0" * 64),
    "of an older version": lambda data: said(data, format_version="0.9"),
    "of a newer version": lambda data: said(data, format_version="2.0"),
    "of another depth": lambda data: said(data, quality=[0.5]),
    "with an unknown field": lambda data: said(data, more=1),
    "with a quality that is none": lambda data: said(data, feature_quality="x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_does_not_fit_is_made_again(cache, adapter, target, damage):
    made = aligned(adapter, target)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    path.write_bytes(DAMAGE[damage](good))
    again = aligned(adapter, target)
    assert not again.cached
    assert_same(made.alignment, again.alignment)
    assert path.read_bytes() == good
    assert aligned(adapter, target).cached


@pytest.mark.parametrize("fields", [{"feature_depths": []}, {"feature_depths": [], "feature_quality": None}])
def test_features_that_are_there_and_not_said_are_made_again(cache, target, fields):
    featured = tiny_universal(target, featured=True)
    aligned(featured, target)
    (path,) = cache.iterdir()
    path.write_bytes(said(path.read_bytes(), **fields))
    assert not aligned(featured, target).cached
    assert aligned(featured, target).cached


def test_a_link_in_the_cache_is_not_followed(cache, adapter, target, tmp_path):
    aligned(adapter, target)
    (path,) = cache.iterdir()
    path.unlink()
    other = tmp_path / "other"
    other.write_text("precious")
    path.symlink_to(other)
    aligned(adapter, target)
    assert other.read_text() == "precious"
    assert not path.is_symlink()
    assert aligned(adapter, target).cached


def test_a_pipe_in_place_of_a_file_is_no_error(cache, adapter, target):
    aligned(adapter, target)
    (path,) = cache.iterdir()
    path.unlink()
    os.mkfifo(path)
    assert not aligned(adapter, target).cached


@pytest.mark.parametrize("place", ["device", "file"])
def test_a_cache_that_cannot_be_written_is_no_error(adapter, target, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UHL_CACHE", os.devnull if place == "device" else str(tmp_path / "file"))
    assert [aligned(adapter, target).cached for _ in range(2)] == [False, False]
    assert list(kept_alignments()) == []


@pytest.mark.parametrize("bound", ["files", "bytes"])
def test_the_least_recently_used_are_removed(cache, adapter, monkeypatch, bound):
    hosts = [tiny_host("gpt2", seed=seed) for seed in range(3)]
    for age, host in enumerate(hosts[:2]):
        aligned(adapter, host)
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (age, age))
    size = newest.stat().st_size
    monkeypatch.setattr("uhl_cli.formats.alignment._MOST_FILES", 2 if bound == "files" else 100)
    monkeypatch.setattr("uhl_cli.formats.alignment._MOST_BYTES", 10**9 if bound == "files" else 2 * size + 64)
    assert aligned(adapter, hosts[0]).cached  # which is then the most recent
    aligned(adapter, hosts[2])
    assert len(list(cache.iterdir())) == 2
    assert [aligned(adapter, host).cached for host in (hosts[0], hosts[2], hosts[1])] == [True, True, False]


def test_what_a_killed_write_has_left_is_removed(cache, adapter, target):
    aligned(adapter, target)
    left = cache / f".{'0' * 64}.safetensors.abc.uhl-tmp"
    left.mkdir()
    (left / "new").write_bytes(b"half")
    aligned(adapter, target, any_task=True)
    assert not left.exists()
    assert len(list(cache.iterdir())) == 2


def test_two_may_write_the_same_file_at_once(cache, adapter):
    def work(_: int) -> AlignedHost:
        return aligned(adapter, tiny_host("gpt2", hidden_size=40, num_hidden_layers=3, seed=1))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(8)))
    for each in found[1:]:
        assert_same(found[0].alignment, each.alignment)
    assert work(0).cached
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_a_hit_warns_as_the_first_call_did(cache, adapter, target, monkeypatch):
    monkeypatch.setattr("uhl_cli.align.alignment.MIN_DISTINCT", 5)
    monkeypatch.setattr("uhl_cli.ported.aligned.NEW_WORDS", 2.0)
    said = []
    for cached in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UhlWarning)
            assert aligned(adapter, target).cached == cached
        said.append([str(each.message) for each in caught if issubclass(each.category, UhlWarning)])
    assert "check that the tokenizer belongs to the weights" in said[0][0]
    assert said[0] == said[1]
    monkeypatch.setattr("uhl_cli.ported.aligned.NEW_WORDS", -2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UhlWarning)
        assert aligned(adapter, target).cached


def test_the_record_says_whose_it_is(cache, adapter, target):
    aligned(adapter, target)
    (record,) = kept_alignments()
    assert (record.adapter, record.host.name, record.serves) == (DIGEST, target.name, "own")
    assert record.host.fingerprint == target.fingerprint
    (path,) = cache.iterdir()
    path.rename(path.with_stem("1" * 64))
    assert list(kept_alignments()) == []
