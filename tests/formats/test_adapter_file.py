"""The adapter file: the same bytes for the same content, and no file can do more than be refused.

Damage is checked once for both who meet it: the reader, which raises the first problem, and `inspect --verify`, which
lists all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from file_damage import (
    as_1_1,
    assert_flips_are_found,
    assert_refused,
    header_of,
    problems_of,
    rebuilt,
    record_of,
    setting,
)
from safetensors.numpy import load
from tiny_adapters import SMALL, fake_bank, random_adapter, tiny_file, tiny_manifest, tiny_universal
from tiny_hosts import SENTENCES, tiny_host

from uhl_cli.adapter.canonical import size_gains
from uhl_cli.align.texts import AnchorTexts, word_spans
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.layout import MAX_PARAMETERS, bits_of, parameter_shapes
from uhl_cli.codes.packing import compress_text, pack_nibbles
from uhl_cli.errors import FormatError, HostError, NewerFormatError
from uhl_cli.formats.adapter import (
    MAX_CODES,
    MAX_FEATURE,
    MAX_GAIN,
    MAX_TEXT_BYTES,
    MAX_VALUE,
    AdapterFile,
    Features,
    Quantised,
    read_adapter,
    to_bytes,
    write_adapter,
)
from uhl_cli.formats.container import ADAPTER, Stored
from uhl_cli.formats.convert import bank_of, stored_parameters, to_file
from uhl_cli.inspect.report import InspectOptions
from uhl_cli.inspect.run import run_inspect
from uhl_cli.schema import AdapterConfig

TOKENS = SMALL.model_copy(update={"kind": "tokens", "num_labels": 4, "top_k": 1, "knots": (0.5, 1.0)})
SHIPPED = sorted((Path(__file__).parents[2] / "adapters").glob("*.safetensors"))
VALID = to_bytes(tiny_file())
FEATURED = to_bytes(tiny_file(SMALL, featured=True))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "adapter.safetensors"


def read_back(path: Path, data: bytes) -> AdapterFile:
    path.write_bytes(data)
    return read_adapter(path)


@pytest.mark.parametrize("featured", [False, True])
@pytest.mark.parametrize("config", [SMALL, TOKENS, AdapterConfig(num_atoms=3, canonical_size=5, readout_size=2)])
def test_what_is_read_is_what_was_written(path, config, featured):
    content = tiny_file(config, featured=featured)
    assert write_adapter(path, content) == path.stat().st_size == len(to_bytes(content))
    assert problems_of(path) == ()
    again = read_adapter(path)
    assert again.manifest == content.manifest
    assert again.anchors == content.anchors
    assert set(again.parameters) == set(content.parameters) == set(parameter_shapes(config))
    for name, entry in [*content.parameters.items(), ("", content.coordinates)]:
        found = again.parameters[name] if name else again.coordinates
        np.testing.assert_array_equal(found.codes, entry.codes)
        np.testing.assert_array_equal(found.scales, entry.scales)
        assert (found.codes.dtype, found.scales.dtype) == (np.int8, np.float32)
    assert (again.features is not None) == featured
    if again.features is not None and content.features is not None:
        assert again.features.anchors == content.features.anchors
        np.testing.assert_array_equal(again.features.codes.codes, content.features.codes.codes)
        np.testing.assert_array_equal(again.features.codes.scales, content.features.codes.scales)
        np.testing.assert_array_equal(again.features.mean, content.features.mean)
        np.testing.assert_array_equal(again.features.shift, content.features.shift)
    assert to_bytes(again) == path.read_bytes()


def test_what_is_read_is_what_training_computed_with(path):
    adapter, bank = random_adapter(), fake_bank()
    write_adapter(path, to_file(adapter, bank, tiny_manifest(SMALL, bank.anchors)))
    loaded = UniversalAdapter.load(path)
    stored = {name: value.detach() for name, value in adapter.stored().items()}
    assert set(loaded.stored) == set(stored)
    assert all(torch.equal(loaded.stored[name], value) for name, value in stored.items())
    assert not torch.equal(loaded.stored["atoms_u"], adapter.get_parameter("atoms_u").detach())  # it was quantised
    assert torch.equal(loaded.bank.coordinates, bank.coordinates)
    assert loaded.bank.knots == bank.knots
    again = read_adapter(path)
    assert loaded.digest == again.digest == header_of(path.read_bytes())["__metadata__"]["sha256"]
    assert torch.equal(stored_parameters(again)["atoms_v"], stored["atoms_v"])
    assert bank_of(again).anchors == bank.anchors


# Enough words for an alignment, by either rule.
MIXED = ("我们昨天去看了一部电影 and liked it, 但是", "这本书写得很好。", "หนังเรื่องนี้ดีมาก", *SENTENCES[:8])


@pytest.mark.parametrize("rule", [1, 2])
def test_words_are_counted_by_the_rule_of_the_file(path, rule):
    spans = [word_spans(text, rule) for text in MIXED]
    chosen = tuple(tuple(range(1, len(row), 2)) for row in spans)
    anchors = AnchorTexts(MIXED, chosen, "mixed", rule)
    bank = fake_bank(anchors=anchors)
    data = to_bytes(to_file(random_adapter(), bank, tiny_manifest(SMALL, anchors)))
    assert ("word_rule" in record_of(data)["anchors"]) == (rule != 1), "files of before have no such entry"
    again = read_back(path, data)
    assert again.anchors == anchors
    assert again.anchors.spans(0) == spans[0][1::2]
    assert to_bytes(again) == data
    assert problems_of(path) == ()
    assert word_spans(MIXED[0], 3 - rule) != spans[0], "the control: the other rule finds other words"
    assert_refused(path, rebuilt(ADAPTER, data, setting("anchors.word_rule", 3 - rule)), "anchors")


@pytest.mark.integration
def test_bytes_are_deterministic():
    assert to_bytes(tiny_file()) == VALID
    assert to_bytes(tiny_file(seed=1)) != VALID
    program = "import sys; from tiny_adapters import *; from uhl_cli.formats.adapter import to_bytes\n"
    program += "sys.stdout.buffer.write(to_bytes(tiny_file()))"
    # Of the hashes of strings, another one than this process's: no order of a set may reach the bytes.
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert done.stdout == VALID


def test_order_of_a_dictionary_does_not_reach_the_bytes():
    content = tiny_file()
    orders = [{"uhl": "0", "torch": "1"}, {"torch": "1", "uhl": "0"}]
    manifests = [content.manifest.model_copy(update={"versions": versions}) for versions in orders]
    one, two = (
        to_bytes(replace(content, manifest=manifest, parameters=dict(order(content.parameters.items()))))
        for manifest, order in zip(manifests, (list, reversed), strict=True)
    )
    assert one == two


def test_reading_needs_no_torch(path):
    path.write_bytes(VALID)
    program = (
        "import sys; from pathlib import Path; import uhl_cli.formats.adapter as store\n"
        f"content = store.read_adapter(Path({str(path)!r}))\n"
        "assert content.manifest.task.name == 'moods'\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'imported'\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("data", [VALID, FEATURED], ids=["bare", "featured"])
def test_format_1_1_is_read_as_the_same_content(data, path):
    new, old = read_back(path, data), read_back(path, as_1_1(data))
    assert problems_of(path) == ()
    assert old.manifest == new.manifest
    assert old.digest == new.digest  # so that task files fit either
    assert to_bytes(old) == data
    report = run_inspect(InspectOptions(file=path))
    assert (report.format_version, report.adapter.digest) == ("1.1", new.digest)


# Damage that a sound container carries: field of the manifest, its value, and what is said of it.
BAD_FIELDS = [
    ("training.config.noise", float("nan"), "at training.config.noise"),
    ("training.config.noise", float("inf"), "at training.config.noise"),
    ("atoms_per_token", float("nan"), "at atoms_per_token"),
    ("atoms_per_token", -1.0, "at atoms_per_token"),
    ("score", {"metric": "accuracy", "value": float("nan"), "low": 0, "high": 1, "examples": 1}, "at score.value"),
    ("config.num_atoms", 10**9, "at config.num_atoms"),
    ("config.num_atoms", -7, "at config.num_atoms"),
    ("config.num_atoms", "seven", "at config.num_atoms"),
    ("config.num_atoms", 8, "atoms_u has shape"),
    ("config.num_atoms", 10**400, "at config.num_atoms"),
    ("config.canonical_size", 1024, "atoms_u has shape"),
    ("config.top_k", 3, "at config.top_k"),
    ("config.knots", [], "at config.knots"),
    ("config.knots", [1.0, 0.5], "knots must rise"),
    ("config.knots", [0.0, 0.5], "end at 1"),
    ("config.knots", [float("nan"), 1.0], "at config.knots"),
    ("config.kind", "tokens", "kind of task differs"),
    ("config.kind", "regression", "regression, which is reserved"),
    ("task.kind", "multi-label", "multi-label, which is reserved"),
    ("task.kind", "poetry", "at task.kind"),
    ("config.num_labels", 2, "number of labels differs"),
    ("config.strategy", "guess", "at config.strategy"),
    ("task.labels", ["one", "two"], "number of labels differs"),
    ("task.labels", ["one", "two", "two"], "each once"),
    ("task.labels", ["x" * 10**5, "b", "c"], "at task.labels"),
    ("task.metric", "entity_f1", "entity_f1"),
    ("task.text_column", ..., "text_column"),
    ("label_counts", [1, 2], "number of labels differs"),
    ("label_counts", [1, 2, -3], "at label_counts"),
    ("anchors.digest", "0" * 64, "digest of the anchors"),
    ("anchors.digest", "zz", "at anchors.digest"),
    ("anchors.word_rule", 2, "digest of the anchors"),
    ("anchors.word_rule", 3, "at anchors.word_rule"),
    ("anchors.words", 39, "states 39 words of anchors"),
    ("anchors.words", 10**12, "at anchors.words"),
    ("anchors.texts", 1, "states 1 texts of anchors"),
    ("source.fingerprint.hidden_size", 0, "at source.fingerprint.hidden_size"),
    ("source.name", "x" * 10**5, "at source.name"),
    ("unknown", 1, "at unknown"),
    ("versions", {"uhl": 1}, "at versions"),
    ("task", ..., "at task"),
    ("config", [], "at config"),
    ("licence", [[[]]], "at licence"),
    ("parts", [], "at parts"),
    ("parts.features", {"texts": 1, "words": 1, "digest": "0" * 64}, "features.codes is missing"),
    ("parts.chorus", 1, "at parts.chorus"),
    ("parts.chorus", {"required": "perhaps"}, "at parts.chorus.required"),
    ("parts.chorus", {"required": True}, "it needs the part chorus"),
    ("parts.anchors", {}, "anchors is not a name of an optional part"),
    ("parts.atoms_u", {}, "atoms_u is not a name of an optional part"),
    ("parts.a b", {}, "a b is not a name of an optional part"),
]
NEWER = ("reserved", "it needs the part")


@pytest.mark.parametrize(("way", "value", "words"), BAD_FIELDS)
def test_bad_manifest(path, way, value, words):
    error = NewerFormatError if any(word in words for word in NEWER) else FormatError
    assert_refused(path, rebuilt(ADAPTER, VALID, setting(way, value)), words, error)


def test_manifest_nested_too_deeply(path):
    nested = "[" * 50_000 + "]" * 50_000
    data = rebuilt(ADAPTER, VALID, lambda record: json.dumps(record)[:-1] + f', "licence": {nested}}}')
    assert_refused(path, data, "is not readable")


def changed(index, value):
    def change(array):
        array.reshape(-1)[index] = value
        return array

    return change


def to_type(dtype):
    return lambda array: array.astype(dtype)


def viewed(dtype):
    return lambda array: array.view(dtype)


def cut(array):
    return array[:-1]


def nested(array):
    return array[None]


BAD_TENSORS = [
    ({"atoms_u": None}, "the part atoms_u is missing"),
    ({"atoms_u__scale": None}, "the part atoms_u.scale is missing"),
    ({"anchors__codes": None}, "the part anchors.codes is missing"),
    ({"anchors__texts": None}, "the part anchors.texts is missing"),
    ({"threshold": None}, "the part threshold is missing"),
    ({"extra": np.zeros(3, np.uint8)}, "the part extra does not belong"),
    ({"atoms_u.scale2": np.zeros(3, np.float32)}, "the part atoms_u.scale2 does not belong"),
    ({"chorus__codes": np.zeros(3, np.uint8)}, "the part chorus.codes does not belong"),
    ({"chorus.[red]": np.zeros(3, np.uint8)}, "[red] does not belong"),
    ({"\x1b[31m\nred": np.zeros(3, np.uint8)}, "red does not belong"),
    ({"atoms_u": to_type(np.float32)}, "atoms_u is float32; it must be int8"),
    ({"atoms_u": viewed(np.uint8)}, "atoms_u is uint8"),
    ({"atoms_u": to_type(np.int64)}, "atoms_u is int64"),
    ({"atoms_u": cut}, "atoms_u has shape (6, 9)"),
    ({"atoms_u": np.transpose}, "atoms_u has shape (9, 7)"),
    ({"atoms_u": nested}, "atoms_u has shape (1, 7, 9)"),
    ({"atoms_u": np.ravel}, "atoms_u has shape (63,)"),
    ({"atoms_u": changed(5, -128)}, "atoms_u has a code outside -127..127"),
    ({"delta_theta": changed(3, 0x80)}, "delta_theta has a code outside -7..7"),
    ({"delta_theta": cut}, "delta_theta holds 27 bytes"),
    ({"delta_theta": viewed(np.int8)}, "delta_theta is int8"),
    ({"delta_theta": nested}, "delta_theta holds 28 bytes"),
    ({"mixer_out_bias": changed(-1, 0x18)}, "mixer_out_bias has half a byte after its end"),
    ({"atoms_u__scale": changed(0, np.nan)}, "atoms_u.scale holds a value that is not finite"),
    ({"atoms_u__scale": changed(0, np.inf)}, "atoms_u.scale holds a value that is not finite"),
    ({"atoms_u__scale": changed(0, -np.inf)}, "atoms_u.scale holds a value that is not finite"),
    ({"atoms_u__scale": changed(0, -1e-9)}, "atoms_u.scale holds a value that is not finite or not within 0"),
    ({"atoms_u__scale": changed(0, 0.8)}, "not within 0 and 0.7874"),
    ({"delta_theta__scale": changed(0, 15.0)}, "not within 0 and 14.29"),
    ({"atoms_u__scale": to_type(np.float64)}, "atoms_u.scale is float64"),
    ({"atoms_u__scale": to_type(np.float16)}, "atoms_u.scale is float16"),
    ({"atoms_u__scale": cut}, "atoms_u.scale has shape (6,)"),
    ({"atoms_u__scale": lambda array: array[:, None]}, "atoms_u.scale has shape (7, 1)"),
    ({"anchors__scale": changed(0, np.nan)}, "anchors.scale holds a value that is not finite"),
    ({"anchors__scale": changed(0, 15.0)}, "anchors.scale holds a value"),
    ({"anchors__scale": cut}, "anchors.scale has shape (2, 9)"),
    ({"anchors__scale": np.ravel}, "anchors.scale has shape (27,)"),
    ({"anchors__codes": cut}, "anchors.codes is truncated"),
    ({"anchors__codes": changed(0, 0x08)}, "anchors.codes does not begin with the largest"),
    ({"anchors__codes": to_type(np.int16)}, "anchors.codes is int16"),
    ({"anchors__codes": lambda array: np.append(array, array)}, "anchors.codes is followed by other bytes"),
    ({"anchors__words": cut}, "anchors.words holds"),
    ({"anchors__words": lambda array: np.append(array, np.uint8(0))}, "anchors.words holds"),
    ({"anchors__words": changed(0, 0xFF)}, "words of anchors; the file contains"),
    ({"anchors__words": lambda array: array * 0}, "words of anchors; the file contains 0"),
    ({"anchors__words": lambda array: np.append(array[1:], array[:1] & 0)}, "of anchors"),
    ({"size_out_bias__scale": changed(0, 0.5)}, "the size MLP gives gains beyond 1,000"),
    ({"anchors__words": nested}, "anchors.words holds"),
    ({"anchors__words": to_type(np.int64)}, "anchors.words is int64"),
    ({"anchors__texts": lambda array: array[:-3]}, "anchors.texts"),
    ({"anchors__texts": lambda array: array[:0]}, "anchors.texts"),
    ({"anchors__texts": lambda array: np.append(array, array)}, "anchors.texts"),
    ({"anchors__texts": compress_text("other texts altogether")}, "the file contains 1"),
    ({"anchors__texts": compress_text("\n" * 100_000)}, "the file contains 100,001"),
    ({"anchors__texts": np.frombuffer(zlib.compress(b"\xff\xfe\xfd"), np.uint8)}, "anchors.texts cannot be"),
    ({"anchors__texts": viewed(np.int8)}, "anchors.texts is int8"),
]
BAD_FEATURES = [
    ({"features__codes": None}, "the part features.codes is missing"),
    ({"features__mean": None}, "the part features.mean is missing"),
    ({"features__shift": None}, "the part features.shift is missing"),
    ({"features__codes": cut}, "features.codes is truncated"),
    ({"features__codes": viewed(np.int8)}, "features.codes is int8"),
    ({"features__codes": nested}, "features.codes does not begin"),
    ({"features__scale": changed(0, np.nan)}, "features.scale holds a value that is not finite"),
    ({"features__scale": changed(0, -1e-9)}, "features.scale holds a value"),
    ({"features__scale": changed(0, 1430.0)}, "features.scale holds a value"),
    ({"features__scale": cut}, "features.scale has shape"),
    ({"features__mean": changed(0, np.nan)}, "features.mean holds a value that is not finite"),
    ({"features__mean": changed(0, -np.inf)}, "features.mean holds a value that is not finite"),
    ({"features__mean": changed(0, 10_001.0)}, "not within -10000 and 1e+04"),
    ({"features__mean": cut}, "features.mean has shape"),
    ({"features__mean": to_type(np.float64)}, "features.mean is float64"),
    ({"features__shift": changed(0, np.nan)}, "features.shift holds a value that is not finite"),
    ({"features__shift": cut}, "features.shift has shape"),
    ({"features__words": cut}, "features.words holds"),
    ({"features__words": changed(0, 0)}, "words of features; the file contains"),
    ({"features__texts": lambda array: array[:-3]}, "features.texts"),
    ({"features__texts": compress_text("other texts altogether")}, "the file contains 1"),
    ({"anchors__codes": cut}, "anchors.codes is truncated"),
]


@pytest.mark.parametrize(
    ("data", "tensors", "words"),
    [(VALID, *case) for case in BAD_TENSORS] + [(FEATURED, *case) for case in BAD_FEATURES],
    ids=[words for _, words in BAD_TENSORS + BAD_FEATURES],
)
def test_bad_tensors(path, data, tensors, words):
    assert_refused(path, rebuilt(ADAPTER, data, **tensors), words)


def test_features_that_the_manifest_does_not_name(path):
    found = assert_refused(path, rebuilt(ADAPTER, FEATURED, setting("parts.features", ...)), "does not belong")
    assert len(found) == len([name for name in load(FEATURED) if name.startswith("features.")])


def test_padding_of_the_words_is_zero(path):
    words = load(VALID)["anchors.words"]
    count = sum(len(text.split()) for text in read_back(path, VALID).anchors.texts)  # no punctuation apart
    assert count % 8
    assert_refused(
        path,
        rebuilt(ADAPTER, VALID, anchors__words=words | np.eye(1, len(words), len(words) - 1, dtype=np.uint8)[0]),
        "after its end",
    )


def test_all_that_is_wrong_is_listed(path):
    def change(record):
        for way, value in (
            ("anchors.digest", "0" * 64),
            ("source.fingerprint.digest", "x"),
            ("label_counts", [1, 2, 4]),
        ):
            setting(way, value)(record)

    damaged = rebuilt(
        ADAPTER,
        VALID,
        change,
        router__scale=changed(1, np.nan),
        router=to_type(np.int16),
        delta_theta=lambda array: array * 0,
        head_bias=None,
        more=np.zeros(1, np.uint8),
    )
    damaged = damaged[:-1] + bytes([damaged[-1] ^ 1])
    found = assert_refused(path, damaged, "digest of the content")
    for words in (
        "digest of the content",
        "label counts",
        "digest of the anchors",
        "fingerprint.digest",
        "router.scale",
        "router is int16",
        "delta_theta",
        "head_bias is missing",
        "more does not belong",
    ):
        assert sum(words in line for line in found) == 1, (words, found)
    assert len(found) == 9


def test_parts_are_checked_though_the_manifest_is_broken(path):
    damaged = rebuilt(ADAPTER, VALID, setting("licence", 3), delta_theta=lambda array: array * 0)
    found = assert_refused(path, damaged, "at licence")
    assert any("delta_theta has a code" in line for line in found)


def test_changed_anchor_text_of_the_same_shape_is_noticed(path):
    texts = zlib.decompress(load(VALID)["anchors.texts"].tobytes()).decode()
    # Another build of zlib may compress the same texts to other bytes.
    again = np.frombuffer(zlib.compress(texts.encode(), 1), np.uint8)
    assert read_back(path, rebuilt(ADAPTER, VALID, anchors__texts=again)).anchors.texts == tuple(texts.split("\n"))
    assert problems_of(path) == ()
    other = compress_text(texts.replace("e", "a", 1))
    assert_refused(path, rebuilt(ADAPTER, VALID, anchors__texts=other), "digest of the anchors")


def test_an_optional_part_that_is_not_known_is_left_out_and_kept(path):
    content = tiny_file()
    record = content.manifest.model_dump(mode="json")
    record["parts"]["chorus"] = {"required": False, "texts": 3, "of": ["a", {"b": 1}]}
    brain = Stored("bfloat16", (2,), memoryview(b"abcd"))
    extended = replace(
        content,
        manifest=type(content.manifest).model_validate_json(json.dumps(record)),
        others={"chorus.codes": brain, "chorus.a.b": Stored("uint8", (3,), memoryview(b"xyz"))},
    )
    data = to_bytes(extended)
    found = read_back(path, data)
    assert problems_of(path) == ()
    assert set(found.others) == {"chorus.codes", "chorus.a.b"}
    assert to_bytes(found) == data
    assert found.digest != read_back(path, VALID).digest
    assert UniversalAdapter.from_file(found).stored.keys() == content.parameters.keys()
    path.write_bytes(data)
    parts = run_inspect(InspectOptions(file=path)).adapter.parts
    assert sum(part.bytes for part in parts) == len(data)
    assert {part.name for part in parts if part.group == "other"} == set(found.others)
    odd = to_bytes(replace(extended, others={"chorus.[red]": brain}))
    assert_refused(path, odd, "the part chorus.[red] does not belong")


def test_a_newer_minor_version_is_read_as_far_as_it_is_known(path):
    data = rebuilt(ADAPTER, VALID, setting("format_version", "2.9"))
    assert read_back(path, data).manifest.format_version == "2.9"
    damaged = rebuilt(ADAPTER, data, setting("config.experts", 3))
    assert_refused(path, damaged, "format 2.9 goes beyond 2.0", NewerFormatError)


@pytest.mark.parametrize("featured", [False, True])
def test_every_flipped_bit_is_found(path, featured):
    path.write_bytes(FEATURED if featured else VALID)
    assert_flips_are_found(path, lambda: read_adapter(path), error=FormatError, count=500, seed=int(featured))


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_flipped_bits_of_a_shipped_file_are_found(path, shipped):
    path.write_bytes(shipped.read_bytes())
    assert_flips_are_found(path, lambda: read_adapter(path), error=FormatError, count=60)


# Bounds


def test_values_of_the_shipped_files_are_far_inside_the_bound():
    for shipped in SHIPPED:
        content = read_adapter(shipped)
        assert max(float(value.abs().max()) for value in stored_parameters(content).values()) < MAX_VALUE / 20
        assert 7 * float(content.coordinates.scales.max()) < MAX_VALUE / 10
        features = content.features
        assert features is not None
        assert float((7 * features.codes.scales + np.abs(features.mean)).max()) < MAX_FEATURE / 200
        gains = [torch.stack(size_gains(stored_parameters(content), width)) for width in (16, 128, 1024, 16_384)]
        assert float(min(gain.min() for gain in gains)) > MAX_GAIN**-0.5
        assert float(max(gain.max() for gain in gains)) < MAX_GAIN**0.5


def at_the_bound(content: AdapterFile, value: float) -> AdapterFile:
    """The content with every value of the parameters, but those of the size MLP, as large as `value` allows."""
    parameters = {
        name: Quantised(
            entry.codes, np.full_like(entry.scales, np.nextafter(np.float32(value / largest), np.float32(0)))
        )
        for name, entry in content.parameters.items()
        for largest in [7 if bits_of(name) == 4 else 127]
        if not name.startswith("size_")
    }
    return replace(content, parameters=content.parameters | parameters)


def test_values_at_the_bound_give_finite_logits_and_beyond_it_are_not_written(path):
    host = tiny_host("bert")
    content = to_file_of(tiny_universal(host))
    write_adapter(path, at_the_bound(content, MAX_VALUE))
    logits = UniversalAdapter.load(path).port(host, max_flops=1000.0)(list(SENTENCES[:4]))
    assert bool(torch.isfinite(logits).all())
    # The control: values that format 1.1 allowed.
    adapter = UniversalAdapter.from_file(at_the_bound(content, 1e8))
    with pytest.raises(HostError, match="are not finite"):
        adapter.port(host, max_flops=1000.0)(list(SENTENCES[:4]))
    with pytest.raises(FormatError, match=r"\.scale holds a value"):
        write_adapter(path, at_the_bound(content, 1.01 * MAX_VALUE))


def to_file_of(adapter: UniversalAdapter) -> AdapterFile:
    source = random_adapter(adapter.manifest.config)
    return to_file(source, adapter.bank, adapter.manifest)


def bomb(size: int) -> np.ndarray:
    """Codes that unpack to `size` bytes, in a thousandth of that."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return np.frombuffer(bytes([7]) + coder.compress(bytes(size)) + coder.flush(), np.uint8)


def bombed(config: AdapterConfig, *, words: int = 40, feature_words: int = 200, **tensors: np.ndarray) -> bytes:
    """A file with a sound manifest and parameters, whose anchors or features stand for far more than it holds."""

    def change(record):
        record["config"] |= config.model_dump(mode="json")
        record["anchors"]["words"] = words
        record["parts"]["features"]["words"] = feature_words

    found: dict[str, object] = dict(tensors)
    shapes = parameter_shapes(config) if config.num_atoms < 1024 else {}
    for name, shape in shapes.items():
        codes = np.zeros(shape, np.int8)
        found[name] = pack_nibbles(codes) if bits_of(name) == 4 else codes
        found[f"{name}.scale"] = np.zeros(codes.size // shape[-1] if len(shape) > 1 else 1, np.float32)
    return rebuilt(ADAPTER, FEATURED, change, **found)


KNOTS = tuple(index / 8 for index in range(9))
WIDE = SMALL.model_copy(update={"canonical_size": 1024, "knots": KNOTS})
DEEP = SMALL.model_copy(update={"readout_size": 1024})
HUGE = SMALL.model_copy(update={"num_atoms": 1024, "canonical_size": 1024, "readout_size": 1024, "knots": KNOTS})
BOMBS = {
    "coordinates": (lambda: bombed(WIDE, words=100_000, anchors__codes=bomb(100_000_000)), "have 921,"),
    "features": (lambda: bombed(DEEP, feature_words=200_000, features__codes=bomb(100_000_000)), "have 205,"),
    "parameters": (lambda: bombed(HUGE), "at most 8,000,000 are allowed"),
    "texts": (lambda: bombed(SMALL, anchors__texts=zipped(bytes(100_000_000))), "anchors.texts is longer than"),
    "lines": (lambda: bombed(SMALL, anchors__texts=zipped(b"\n" * 1_900_000)), "states 10 texts"),
    "manifest": (lambda: rebuilt(ADAPTER, FEATURED, setting("parts.chorus", [[]] * 230_000)), "at parts.chorus"),
    "codes": (lambda: bombed(SMALL, anchors__codes=bomb(100_000_000)), "anchors.codes holds more than 540 bytes"),
}


def zipped(content: bytes) -> np.ndarray:
    return np.frombuffer(zlib.compress(content, 9), np.uint8)


@pytest.mark.parametrize("name", [name for name in BOMBS if name != "manifest"])  # whose objects are slow to trace
def test_bombs_are_refused_within_memory(path, name):
    make, words = BOMBS[name]
    data = make()
    assert len(data) < 1_000_000
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=words):
            read_adapter(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000
    assert_refused(path, data, words)


def test_what_no_reader_takes_is_not_written(path):
    with pytest.raises(FormatError, match=f"at most {MAX_PARAMETERS:,}"):
        random_adapter(HUGE)
    content = tiny_file()
    anchors = content.manifest.anchors.model_copy(update={"words": MAX_CODES})
    with pytest.raises(FormatError, match=f"at most {MAX_CODES:,}"):
        to_bytes(replace(content, manifest=content.manifest.model_copy(update={"anchors": anchors})))


# Memory of a process beyond that of the imports: the peak's record is reset where the kernel allows it.  The imports
# are made once, and each group of files is read in a fork.
MEASURE = """
import json, os, pathlib, sys, uhl_cli.api
from uhl_cli.errors import FormatError

def kilobytes(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

def read(paths):
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    base = kilobytes("VmRSS:")
    outcomes = []
    for path in paths:
        try:
            adapter = uhl_cli.api.UniversalAdapter.load(path)
            outcomes.append(f"{adapter.bank.codes.numel()} {adapter.features.codes.numel()}")
        except FormatError as error:
            outcomes.append(f"refused {error}")
    return outcomes, (kilobytes("VmHWM:") - base) / 1000

for group in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        print(json.dumps(read(group)), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def measured(*groups: list[str]) -> list[tuple[list[str], float]]:
    """What became of reading each group of files in a process of its own, and the megabytes that the worst one took."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, json.dumps(groups)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells a process's memory on Linux alone")


def random_codes(shape: tuple[int, ...], largest: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-largest, largest, shape, np.int8, endpoint=True)


def large_texts(texts: int, words: int) -> AnchorTexts:
    """Many texts of words of one letter, `words` of them chosen, in nearly all the bytes that texts may have."""
    each, chosen = MAX_TEXT_BYTES // texts // 2, words // texts
    return AnchorTexts((" ".join("a" * each),) * texts, (tuple(range(chosen)),) * texts, "many")


LARGEST = {
    "parameters": (
        AdapterConfig(num_atoms=1024, canonical_size=1000, readout_size=1000, num_labels=900),
        large_texts(1000, 5000),
        large_texts(100, 8400),
    ),
    "texts": (
        AdapterConfig(num_atoms=4, canonical_size=52, readout_size=76),
        large_texts(50_000, 100_000),
        large_texts(50_000, 200_000),
    ),
}


def largest_file(name: str) -> bytes:
    """A file as large as the format allows, in its numbers or in its texts."""
    config, anchors, features = LARGEST[name]
    parameters = {}
    for part, shape in parameter_shapes(config).items():
        codes = random_codes(shape, 7 if bits_of(part) == 4 else 127)
        parameters[part] = Quantised(codes, np.full(int(np.prod(shape[:-1])), 1e-3, np.float32))
    columns = config.readout_size + config.num_labels
    vector = np.ones(columns, np.float32)
    coordinates = Quantised(
        random_codes((3, anchors.num_words, config.canonical_size), 3), np.ones((3, config.canonical_size), np.float32)
    )
    bank = Features(
        features,
        Quantised(random_codes((features.num_words, columns), 3), vector),
        vector,
        vector[: config.readout_size],
    )
    assert min(coordinates.codes.size, bank.codes.codes.size) > 0.93 * MAX_CODES
    manifest = tiny_manifest(config, anchors, features=features)
    return to_bytes(AdapterFile(manifest, parameters, anchors, coordinates, bank))


@ON_LINUX
@pytest.mark.slow
def test_neither_bombs_nor_the_largest_files_take_200_mb_of_a_process(tmp_path):
    groups = [[make() for make, _ in BOMBS.values()], *([largest_file(name)] for name in LARGEST)]
    paths = [[str(tmp_path / f"{place}-{row}") for row in range(len(group))] for place, group in enumerate(groups)]
    for group, names in zip(groups, paths, strict=True):
        for data, name in zip(group, names, strict=True):
            assert len(data) <= ADAPTER.max_bytes
            Path(name).write_bytes(data)
    (of_bombs, *_), *of_largest = found = measured(*paths)
    for outcome, (_, words) in zip(of_bombs, BOMBS.values(), strict=True):
        assert outcome.startswith("refused")
        assert words in outcome
    assert len(of_largest) == len(LARGEST)
    for (outcome,), _ in of_largest:
        assert not outcome.startswith("refused"), outcome
    assert all(0 < megabytes < 200 for _, megabytes in found)


def test_the_largest_configuration_is_near_the_bound():
    shapes = parameter_shapes(LARGEST["parameters"][0])
    assert 0.95 * MAX_PARAMETERS < sum(int(np.prod(shape)) for shape in shapes.values()) <= MAX_PARAMETERS
