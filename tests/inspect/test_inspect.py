"""What `inspect` says of a file is what is in it, to the byte; what is wrong with a file is found, all of it."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from file_damage import rebuilt, setting
from safetensors.numpy import load, save
from tiny_adapters import SMALL, tiny_file, tiny_task_file, tiny_transfer

from uhl_cli.adapter.canonical import mix
from uhl_cli.errors import FormatError, OutputError, UsageError
from uhl_cli.formats.adapter import AdapterFile, Quantised, read_adapter, values_of, write_adapter
from uhl_cli.formats.container import ADAPTER, TASK
from uhl_cli.formats.convert import dequantised, stored_parameters
from uhl_cli.formats.task import TaskFile, read_task, write_task
from uhl_cli.inspect.content import atom_statistics, mixing_weights
from uhl_cli.inspect.figures import GROUP_COLOURS
from uhl_cli.inspect.report import AdapterContent, Comparison, Group, InspectOptions, TaskContent
from uhl_cli.inspect.run import run_inspect
from uhl_cli.schema import UPDATE_TYPES, AdapterConfig

TOKENS = SMALL.model_copy(update={"kind": "tokens", "num_labels": 4, "top_k": 1, "knots": (0.5, 1.0)})
SHIPPED = sorted((Path(__file__).parents[2] / "adapters").glob("*.safetensors"))


def task_of(adapter: Path, **options: object) -> TaskFile:
    """A tiny task file that belongs to the adapter at `adapter`."""
    content = read_adapter(adapter)
    return tiny_task_file(content.manifest, adapter=content.digest, **options)


@pytest.fixture
def adapter(tmp_path) -> Path:
    write_adapter(tmp_path / "a.safetensors", tiny_file())
    return tmp_path / "a.safetensors"


@pytest.fixture
def task(adapter) -> Path:
    path = adapter.with_name("a.moods.task.safetensors")
    write_task(path, task_of(adapter))
    return path


def described(path: Path, **more: object) -> AdapterContent:
    report = run_inspect(InspectOptions(file=path, **more))
    assert report.adapter is not None
    return report.adapter


def described_task(path: Path) -> TaskContent:
    report = run_inspect(InspectOptions(file=path))
    assert report.task is not None
    return report.task


def problems(path: Path) -> tuple[str, ...]:
    report = run_inspect(InspectOptions(file=path, verify=True))
    assert report.verification is not None
    return report.verification.problems


def compared(path: Path, other: Path) -> Comparison:
    report = run_inspect(InspectOptions(file=path, diff=other))
    assert report.comparison is not None
    return report.comparison


@pytest.mark.parametrize("featured", [False, True])
@pytest.mark.parametrize("config", [SMALL, TOKENS, AdapterConfig(num_atoms=3, canonical_size=5, readout_size=2)])
def test_parts_are_the_files_tensors_and_sum_to_its_size(config, featured, tmp_path):
    path = tmp_path / "a.safetensors"
    size = write_adapter(path, tiny_file(config, featured=featured))
    parts = {part.name: part for part in described(path).parts}
    assert sum(part.bytes for part in parts.values()) == size == path.stat().st_size
    assert sum(part.share for part in parts.values()) == pytest.approx(1)
    stored = load(path.read_bytes())
    for name, value in stored.items():
        if name.endswith(".scale"):
            continue
        scale_name = f"{name.split('.')[0]}.scale" if name.endswith(".codes") else f"{name}.scale"
        scale = stored.get(scale_name, np.zeros(0, np.float32))
        assert parts[name].bytes == value.nbytes + scale.nbytes
        assert (parts[name].dtype, parts[name].scales) == (str(value.dtype), scale.size)
    assert set(parts) == {"header", *(name for name in stored if not name.endswith("scale"))}
    assert (parts["atoms_u"].shape, parts["atoms_u"].bits) == ((config.num_atoms, config.canonical_size), 8)
    assert (parts["delta_theta"].bits, parts["anchors.words"].bits, parts["anchors.texts"].bits) == (4, 1, None)
    coded = 8 * (parts["anchors.codes"].bytes - 4 * parts["anchors.codes"].scales)
    assert parts["anchors.codes"].bits == round(coded / math.prod(parts["anchors.codes"].shape), 2)
    assert ("features.codes" in parts) == featured
    if featured:
        assert parts["features.codes"].group == "features"
        assert 1 < parts["features.codes"].bits < 2
        assert parts["features.codes"].shape[1] == config.readout_size + config.num_labels


@pytest.mark.parametrize("own_task", [True, False])
def test_parts_of_a_task_file_sum_to_its_size(own_task, adapter, tmp_path):
    path = tmp_path / "t.task.safetensors"
    size = write_task(path, task_of(adapter, own_task=own_task))
    content = described_task(path)
    assert sum(part.bytes for part in content.parts) == size
    assert {part.name for part in content.parts} - {"header"} == set(read_task(path).parameters)
    assert (content.readout is None) == own_task
    values = dequantised(read_task(path).parameters)["delta_theta"]
    assert torch.equal(torch.tensor(content.delta_theta), values)
    assert content.root_mean_square == pytest.approx(values.square().mean(1).sqrt().tolist())


@pytest.mark.parametrize("config", [SMALL, TOKENS])
def test_values_are_those_of_torch_bit_for_bit(config):
    content = tiny_file(config)
    for name, value in stored_parameters(content).items():
        np.testing.assert_array_equal(values_of(content.parameters[name]), value.numpy())


@pytest.mark.parametrize("config", [SMALL, AdapterConfig()])
def test_mixing_weights_are_those_that_a_host_gets(config):
    content = tiny_file(config)
    stored, depths = stored_parameters(content), (0.0, 1 / 3, 0.5, 1.0)
    found = mixing_weights(content.parameters, depths)
    wanted = torch.stack([torch.stack([mix(stored, depth, name) for name in UPDATE_TYPES]) for depth in depths])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
    # Every part of the mixer counts: without it the weights are others.
    for name in ("mixer_in_weight", "mixer_in_bias", "mixer_out_weight", "mixer_out_bias", "delta_theta"):
        entry = content.parameters[name]
        silenced = {**content.parameters, name: Quantised(np.zeros_like(entry.codes), entry.scales)}
        assert np.abs(mixing_weights(silenced, depths) - found).max() > 1e-3


def with_row(content: AdapterFile, name: str, index: int, codes: np.ndarray, scale: float) -> AdapterFile:
    entry = content.parameters[name]
    changed = Quantised(entry.codes.copy(), entry.scales.copy())
    changed.codes[index], changed.scales[index] = codes, scale
    return replace(content, parameters={**content.parameters, name: changed})


def test_unused_atoms_and_closest_pairs_are_found():
    content = tiny_file()
    u, v = content.parameters["atoms_u"], content.parameters["atoms_v"]
    before = atom_statistics(content.parameters)
    assert before.unused == ()
    assert before.u.closest is not None
    assert abs(before.u.closest.cosine) < 0.99
    np.testing.assert_allclose(before.u.norms, np.linalg.norm(values_of(u).astype(np.float64), axis=1))
    changed = with_row(content, "atoms_u", 2, np.zeros(9, np.int8), 0.0)
    changed = with_row(changed, "atoms_u", 5, u.codes[1], 3 * float(u.scales[1]))  # another length, the same direction
    changed = with_row(changed, "atoms_v", 5, -v.codes[1], float(v.scales[1]))
    found = atom_statistics(changed.parameters)
    assert found.unused == (2,)
    assert found.u.norms[2] == 0
    assert found.u.minimum > 0
    for pair, cosine in ((found.u.closest, 1), (found.v.closest, -1), (found.update, -1)):
        assert pair is not None
        assert (pair.first, pair.second) == (1, 5)
        assert pair.cosine == pytest.approx(cosine)


def test_an_adapter_that_changes_nothing_has_no_pairs_and_is_described(tmp_path):
    content = tiny_file()
    for index in range(SMALL.num_atoms):
        content = with_row(content, "atoms_u", index, np.zeros(9, np.int8), 0.0)
    write_adapter(tmp_path / "a.safetensors", content)
    found = described(tmp_path / "a.safetensors")
    assert len(found.atoms.unused) == SMALL.num_atoms
    assert (found.atoms.u.closest, found.atoms.update) == (None, None)
    np.testing.assert_allclose(found.mixing.mean, mixing_weights(content.parameters).mean(2), rtol=1e-5)


def test_mixing_summary_leaves_unused_atoms_out(tmp_path):
    content = with_row(tiny_file(), "atoms_u", 2, np.zeros(9, np.int8), 0.0)
    write_adapter(tmp_path / "a.safetensors", content)
    found = described(tmp_path / "a.safetensors").mixing
    weights = mixing_weights(content.parameters)
    np.testing.assert_allclose(found.mean, np.delete(weights, 2, axis=2).mean(2), rtol=1e-5)
    np.testing.assert_allclose(found.deviation, np.delete(weights, 2, axis=2).std(2), rtol=1e-4)
    assert np.abs(np.array(found.mean) - weights.mean(2)).max() > 1e-3


def test_anchor_texts_are_given_only_when_asked_for(adapter):
    assert described(adapter).anchors.entries is None
    summary = described(adapter, anchors=True).anchors
    anchors = read_adapter(adapter).anchors
    assert summary.entries is not None
    assert [entry.text for entry in summary.entries] == list(anchors.texts)
    assert [list(entry.spans) for entry in summary.entries] == [anchors.spans(i) for i in range(len(anchors.texts))]
    assert summary.words == sum(len(entry.spans) for entry in summary.entries) == anchors.num_words
    assert summary.digest == anchors.digest
    assert (summary.feature_texts, summary.feature_words) == (0, 0)


def test_texts_of_the_feature_bank_are_given_behind_the_anchors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, tiny_file(featured=True))
    content, summary = read_adapter(path), described(path, anchors=True).anchors
    assert content.features is not None
    assert summary.entries is not None
    assert [entry.text for entry in summary.entries] == [*content.anchors.texts, *content.features.anchors.texts]
    assert summary.feature_texts == len(content.features.anchors.texts)
    assert summary.feature_words == content.features.anchors.num_words


def test_readout_counts_the_parameters_that_are_stored(adapter):
    readout = described(adapter).readout
    stored = {name: value for name, value in read_adapter(adapter).parameters.items() if name.startswith("readout")}
    assert readout.parameters == sum(entry.codes.size for entry in stored.values())
    assert (readout.inputs, readout.hidden, len(readout.labels)) == stored_sizes(stored)
    assert readout.label_counts == (1, 2, 3)


def stored_sizes(stored: dict[str, Quantised]) -> tuple[int, int, int]:
    hidden, inputs = stored["readout_in_weight"].codes.shape
    return inputs, hidden, stored["readout_out_weight"].codes.shape[0]


def test_task_files_beside_an_adapter_are_those_that_name_it(adapter, task, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_adapter(other / "b.safetensors", tiny_file(seed=1))
    write_task(tmp_path / "b.task.safetensors", task_of(other / "b.safetensors"))
    (tmp_path / "broken.task.safetensors").write_bytes(b"none")
    shutil.copy(task, tmp_path / "not-named-like-one.safetensors")
    found = described(adapter)
    assert [entry.file for entry in found.task_files] == [task.name]
    assert found.unreadable == ("broken.task.safetensors",)
    entry = found.task_files[0]
    assert (entry.bytes, entry.task, entry.own_task) == (task.stat().st_size, "moods", True)
    assert entry.before is not None
    assert entry.score is not None
    assert (entry.before.value, entry.score.value) == (0.5, 0.7)


def test_a_task_file_knows_the_adapter_beside_it(adapter, task, tmp_path):
    assert described_task(task).adapter == "a.safetensors"
    write_adapter(adapter, tiny_file(seed=1))
    assert described_task(task).adapter is None


def test_what_is_neither_is_refused(tmp_path):
    for path, words in ((tmp_path / "absent", "no file"), (tmp_path, "folder"), (tmp_path / "b", "not a whole")):
        if path.name == "b":
            path.write_bytes(b"nothing")
        with pytest.raises(FormatError, match=words):
            run_inspect(InspectOptions(file=path))
    (tmp_path / "c").write_bytes(save({"a": np.zeros(3, np.float32)}))
    with pytest.raises(FormatError, match="not a uhl adapter"):
        run_inspect(InspectOptions(file=tmp_path / "c"))


# --verify.  The formats' own rules, of which it lists every broken one, are tested with the readers: tests/formats.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_have_no_problem(path):
    assert problems(path) == ()


def score(value: float, low: float, high: float) -> dict[str, object]:
    return {"metric": "accuracy", "value": value, "low": low, "high": high, "examples": 10}


SHARED = [
    ("label_counts", [1, 2, 4], "label counts sum to 7; the training had 6"),
    ("training.train_digest", "0", "train_digest is not a SHA-256"),
    ("score", score(0.5, 0.8, 0.7), "score: 0.5 with the interval [0.8, 0.7] is upside down"),
    ("score", score(1.5, 0.6, 0.7), "not within 0 and 1"),
]
ADAPTERS = [
    ("source.fingerprint.digest", "short", "source.fingerprint.digest is not a SHA-256"),
    ("source.fingerprint.architecture", " ", "source.fingerprint.architecture is empty"),
    ("atoms_per_token", 2.5, "atoms_per_token is 2.5, more than top_k, 2"),
]
TASKS = [
    ("target.fingerprint.digest", "x", "target.fingerprint.digest is not a SHA-256"),
    ("target.fingerprint.model_type", "", "target.fingerprint.model_type is empty"),
    ("before", score(0.5, 0.9, 0.6), "before: 0.5"),
]


@pytest.mark.parametrize(
    ("kind", "way", "value", "words"),
    [(ADAPTER, *case) for case in SHARED + ADAPTERS] + [(TASK, *case) for case in SHARED + TASKS],
)
def test_counts_and_scores_that_disagree_are_named_though_a_reader_takes_them(kind, way, value, words, adapter, task):
    path = adapter if kind is ADAPTER else task
    assert problems(path) == ()
    path.write_bytes(rebuilt(kind, path.read_bytes(), setting(way, value)))
    assert run_inspect(InspectOptions(file=path)).format_version == kind.version
    assert len(problems(path)) == 1
    assert words in problems(path)[0]


def test_a_token_task_counts_words(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, tiny_file(TOKENS))
    assert problems(path) == ()
    path.write_bytes(rebuilt(ADAPTER, path.read_bytes(), setting("training.train_examples", 100)))
    assert problems(path) == ("the label counts sum to 10 words; the training had 100 sentences",)


def test_size_is_checked(tmp_path):
    content = tiny_file(AdapterConfig(num_atoms=1024, canonical_size=512))
    path = tmp_path / "a.safetensors"
    size = write_adapter(path, content)
    assert problems(path) == (f"the file holds {size:,} bytes; at most 1,000,000 are allowed",)


def test_a_file_that_is_not_ours_is_a_problem_and_one_that_cannot_be_read_an_error(tmp_path):
    (tmp_path / "a").write_bytes(b"nothing")
    assert "not a whole safetensors file" in problems(tmp_path / "a")[0]
    (tmp_path / "b").write_bytes(save({"a": np.zeros(3, np.float32)}))
    assert "not a uhl adapter" in problems(tmp_path / "b")[0]
    with (tmp_path / "c").open("wb") as file:
        file.truncate(ADAPTER.max_bytes + 1)
    for name, words in (("absent", "no file"), ("c", "no adapter is larger"), (".", "is a folder")):
        with pytest.raises(FormatError, match=words):
            problems(tmp_path / name)


# --diff


def test_a_file_differs_from_itself_in_nothing(adapter, task, tmp_path):
    for path in (adapter, task):
        found = compared(path, shutil.copy(path, tmp_path / "copy"))
        assert found.identical
        assert (found.fields, found.parts) == ((), ())
        assert found.same_parts > 0
    anchors = compared(adapter, adapter).anchors
    assert anchors is not None
    assert (anchors.common_words, anchors.relative) == (anchors.first_words, 0.0)


def test_difference_is_told_by_field_part_and_anchor(adapter, tmp_path):
    content = tiny_file()
    router = content.parameters["router"]
    changed = replace(
        content,
        manifest=content.manifest.model_copy(update={"licence": "MIT", "versions": {"torch": "1"}}),
        parameters={**content.parameters, "router": Quantised(router.codes, router.scales * 2)},
        coordinates=Quantised(content.coordinates.codes, content.coordinates.scales * 4),
    )
    other = tmp_path / "b.safetensors"
    write_adapter(other, changed)
    found = compared(adapter, other)
    assert not found.identical
    fields = {entry.name: (entry.first, entry.second) for entry in found.fields}
    assert fields == {
        "licence": ('"unspecified"', '"MIT"'),
        "versions.torch": (None, '"1"'),
        "versions.uhl": ('"0"', None),
    }
    assert [(entry.name, entry.relative) for entry in found.parts] == [("router", pytest.approx(0.5))]
    assert found.same_parts == len(content.parameters) - 1
    assert found.anchors is not None
    assert found.anchors.relative == pytest.approx(0.75)


def test_difference_of_a_feature_bank_is_one_more_part(adapter, tmp_path):
    one, other = tiny_file(featured=True), tiny_file(featured=True)
    assert one.features is not None
    assert other.features is not None
    paths = [tmp_path / "one", tmp_path / "other"]
    write_adapter(paths[0], one)
    codes = Quantised(-other.features.codes.codes, other.features.codes.scales)
    write_adapter(paths[1], replace(other, features=replace(other.features, codes=codes)))
    shape = one.features.codes.codes.shape
    found = compared(*paths).parts
    assert [(entry.name, entry.first, entry.second) for entry in found] == [("features.codes", shape, shape)]
    assert found[0].relative is not None
    assert found[0].relative > 0.5
    missing = compared(adapter, paths[0]).parts
    assert [(entry.name, entry.first, entry.second) for entry in missing] == [("features.codes", None, shape)]
    assert "features.codes" not in [entry.name for entry in compared(paths[0], paths[0]).parts]


def test_files_of_other_shape_and_kind_are_compared_as_far_as_that_goes(adapter, tmp_path):
    other = tmp_path / "b.safetensors"
    write_adapter(other, tiny_file(TOKENS))
    found = compared(adapter, other)
    parts = {entry.name: entry for entry in found.parts}
    assert (parts["readout_pool"].first, parts["readout_pool"].second) == ((5,), None)
    assert parts["readout_in_weight"].relative is None
    assert "config.knots" in {entry.name for entry in found.fields}
    assert found.anchors is not None
    assert found.anchors.common_texts == found.anchors.first_texts
    assert found.anchors.relative is None  # other knots


def test_transfer_sets_are_compared(tmp_path):
    texts = tiny_transfer()
    others = {
        "same": texts,
        "outputs": tiny_transfer(seed=1),
        "general": tiny_transfer(general=True),
        "pairs": tiny_transfer(pairs=True),
        "none": None,
    }
    for name, transfer in others.items():
        write_adapter(tmp_path / name, tiny_file(transfer=transfer))
    write_adapter(tmp_path / "first", tiny_file(transfer=texts))
    found = {name: compared(tmp_path / "first", tmp_path / name) for name in others}
    assert found["same"].identical
    part = {name: {each.name: each.relative for each in found[name].parts} for name in others}
    assert part["same"] == {}
    assert 0 < part["outputs"]["transfer.outputs"] < 2
    assert all(part[name] == {"transfer.outputs": None} for name in ("general", "pairs", "none"))
    common = {name: found[name].transfer.common_texts for name in others}
    assert common == {"same": 24, "outputs": 24, "general": 0, "pairs": 0, "none": 0}
    assert "parts.transfer.digest" in {field.name for field in found["general"].fields}
    assert compared(tmp_path / "none", tmp_path / "none").transfer is None


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"general": True}])
def test_a_transfer_set_is_described(options, tmp_path):
    path = tmp_path / "a.safetensors"
    transfer = tiny_transfer(**options)
    size = write_adapter(path, tiny_file(transfer=transfer))
    found = described(path, transfer=True)
    parts = {part.name: part for part in found.parts if part.group == "transfer"}
    assert set(parts) == {"transfer.outputs"} | (set() if "general" in options else {"transfer.texts"})
    assert sum(part.bytes for part in found.parts) == size
    assert parts["transfer.outputs"].shape == transfer.codes.T.shape
    examples, odds = transfer.whole().whole(len(transfer.whole().texts))
    labels = found.manifest.task.labels
    assert [entry.labels[0] for entry in found.transfer.entries] == [labels[best] for best in odds.argmax(1)]
    assert [entry.text for entry in found.transfer.entries] == list(examples.texts)
    assert [entry.pair for entry in found.transfer.entries] == list(examples.pairs or [None] * len(examples))
    classes = transfer.whole().log_odds().argmax(1)
    assert found.transfer.label_counts == tuple(np.bincount(classes, minlength=len(labels)).tolist())
    assert described(path).transfer.entries is None


def test_an_adapter_and_a_task_file_are_not_compared(adapter, task):
    with pytest.raises(FormatError, match="an adapter and a task file"):
        compared(adapter, task)


# --plot


@pytest.mark.integration
@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figures_are_drawn_in_every_format(ending, magic, tmp_path):
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "featured.safetensors", tmp_path / f"featured.{ending}"
    write_adapter(path, tiny_file(featured=True))
    report = run_inspect(InspectOptions(file=path, plot=plot))
    assert report.plot == str(plot)
    assert plot.read_bytes().startswith(magic)
    first = plot.read_bytes()
    run_inspect(InspectOptions(file=path, plot=plot, overwrite=True))
    assert plot.read_bytes() == first


@pytest.mark.integration
def test_figures_say_what_they_show(adapter, task, tmp_path):
    pytest.importorskip("matplotlib")
    for path in (adapter, task):
        plot = tmp_path / f"{path.stem}.svg"
        run_inspect(InspectOptions(file=path, plot=plot))
        assert "bytes by part" in plot.read_text()
        assert "module type" in plot.read_text()


def test_every_group_of_parts_has_a_colour_of_its_own():
    assert set(GROUP_COLOURS) == set(get_args(Group))
    assert len(set(GROUP_COLOURS.values())) == len(GROUP_COLOURS)


def test_figures_are_written_whole_or_not_at_all(adapter, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    plot = tmp_path / "a.png"
    plot.write_bytes(b"old")
    with pytest.raises(OutputError, match="already exists"):
        run_inspect(InspectOptions(file=adapter, plot=plot))

    def full(self: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="No space left") as caught:
        run_inspect(InspectOptions(file=adapter, plot=plot, overwrite=True))
    assert "--plot" in caught.value.hint
    assert plot.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib_it_says_what_to_install(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError) as caught:
        run_inspect(InspectOptions(file=adapter, plot=tmp_path / "a.png"))
    assert 'pip install "uhl[figures]"' in caught.value.hint
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"plot": Path("a.bmp")},
        {"plot": Path("a")},
        {"verify": True, "diff": Path("b")},
        {"verify": True, "anchors": True},
        {"diff": Path("b"), "plot": Path("a.png")},
    ],
)
def test_options_that_contradict_each_other_are_refused(more, adapter):
    with pytest.raises(UsageError):
        run_inspect(InspectOptions(file=adapter, **more))


def test_a_task_file_has_no_anchors_to_print(task):
    with pytest.raises(UsageError, match="no anchors"):
        run_inspect(InspectOptions(file=task, anchors=True))
