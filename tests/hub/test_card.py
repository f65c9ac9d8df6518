"""The card of an adapter file: metadata that the hub's own reader takes, and a body that nobody's text can change."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_adapters import tiny_file, tiny_task_file, tiny_transfer
from toy_runs import TOKENS

from uhl_cli.budget.sizes import file_sizes
from uhl_cli.codes.layout import parameter_shapes
from uhl_cli.errors import FormatError, UsageError
from uhl_cli.formats.adapter import AdapterFile, to_bytes
from uhl_cli.formats.adapter_card import adapter_card
from uhl_cli.formats.container import Problems
from uhl_cli.formats.markdown import block, front_matter
from uhl_cli.formats.parts import bytes_by_part
from uhl_cli.formats.sharing import SharedFile
from uhl_cli.formats.task import task_to_bytes
from uhl_cli.metrics import Score
from uhl_cli.schema import PartRecord, Parts

SCORE = Score(metric="accuracy", value=0.91, low=0.89, high=0.93, examples=872)
STRANGE = (
    "a: b\n---\nlicense: mit",
    "\u202e\x1b[31m\x00\x85\u2028#",
    "'\"`%@&*!|>{}[],?:- \\",
    "\U0001f600 ć \ud800",
    "```\n# heading <script>x</script> ![a](http://b)",
    "yes",
    "1.0",
    "~",
    "",
)


def shared(content: AdapterFile, name: str = "adapter.safetensors") -> SharedFile:
    data = to_bytes(content)
    return SharedFile.of(data, name, Problems(name))


def changed(**values: object) -> AdapterFile:
    """A tiny file with another manifest."""
    content = tiny_file(featured=True, transfer=tiny_transfer())
    return replace(content, manifest=content.manifest.model_copy(update=values))


def of_the_hub() -> AdapterFile:
    """A file whose source and data are on the hub."""
    manifest = tiny_file().manifest
    task = manifest.task.model_copy(update={"name": "sst2", "metric": "accuracy"})
    source = manifest.source.model_copy(update={"name": "org/host", "revision": "c" * 40})
    data = "nyu-mll/glue (train), nyu-mll/glue (validation); more"
    training = manifest.training.model_copy(update={"data": data})
    return changed(task=task, source=source, training=training, score=SCORE, licence="MIT", label_counts=(30, 10, 60))


def test_the_metadata_are_those_that_the_hub_reads():
    card = ModelCard(adapter_card(shared(of_the_hub()), "user/repo", languages=["en", "de"]))
    found = card.data.to_dict()
    assert found["library_name"] == "uhl"
    assert (found["license"], found["language"]) == ("mit", ["en", "de"])
    assert (found["base_model"], found["base_model_relation"]) == ("org/host", "adapter")
    assert (found["datasets"], found["metrics"], found["tags"][0]) == (["nyu-mll/glue"], ["accuracy"], "uhl")
    assert found["pipeline_tag"] == "text-classification"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.91)
    assert (result.dataset_type, result.dataset_name, result.task_type) == (
        "nyu-mll/glue",
        "sst2",
        "text-classification",
    )
    assert "widget" not in card.content


def test_what_nobody_knows_is_left_out():
    found = ModelCard(adapter_card(shared(tiny_file()), "user/repo")).data.to_dict()
    assert not {"license", "language", "base_model", "datasets", "metrics", "model-index"} & set(found)
    found = ModelCard(adapter_card(shared(tiny_file()), "user/repo", licence="My own: none")).data.to_dict()
    assert (found["license"], found["license_name"]) == ("other", "My own: none")


def test_the_body_has_scores_controls_bytes_use_and_texts():
    file = shared(of_the_hub())
    card = adapter_card(file, "user/repo")
    assert "| the adapter on its source model | accuracy | 872 | 0.910 [0.890, 0.930] |" in card
    assert "| teacher of the transfer set: nobody | accuracy | 50 | 0.800 [0.700, 0.900] |" in card
    assert "| control: the most frequent label, in the training data | accuracy | 100 | 0.600 |" in card
    assert f"| the file | {len(file.data):,} |" in card
    assert "uhl port user/repo --target MODEL" in card
    assert 'UniversalAdapter.from_pretrained("user/repo")' in card
    assert f"{file.texts['anchor texts']:,} anchor texts, {file.texts['feature texts']:,} feature texts" in card
    elsewhere = adapter_card(shared(of_the_hub(), "a b.safetensors"), "user/repo", revision="v1")
    assert "uhl port 'user/repo@v1:a b.safetensors' --target MODEL" in elsewhere
    assert 'from_pretrained("user/repo", revision="v1", filename="a b.safetensors")' in elsewhere
    for code in re.findall(r"```\w+\n(.*?)\n```", card, re.DOTALL)[:2]:
        assert len(code.splitlines()) == 3


def test_the_card_of_a_task_file():
    data = task_to_bytes(tiny_task_file())
    file = SharedFile.of(data, "t.safetensors", Problems("t"))
    card = adapter_card(file, "user/repo")
    assert (file.texts, file.unknown, file.warning) == ({}, (), "")
    assert "tuned on" in card
    assert "0.700 [0.600, 0.800]" in card
    assert "control: before tuning" in card
    assert "0.500 [0.400, 0.600]" in card
    assert "--task-file user/repo:t.safetensors --target MODEL" in card
    assert "None of a data set." in card
    assert ModelCard(card).data.to_dict()["library_name"] == "uhl"


def test_the_bytes_by_part_are_those_of_budget(tmp_path):
    content = changed()
    path = tmp_path / "a.safetensors"
    path.write_bytes(to_bytes(content))
    found = bytes_by_part(SharedFile.read(path).contents)
    assert found == {
        part.part: part.bytes for part in file_sizes(path, parameter_shapes(content.manifest.config)).parts
    }
    assert sum(found.values()) == path.stat().st_size


def test_texts_are_counted_where_they_are():
    own = changed()
    texts = shared(own).texts
    manifest = own.manifest
    assert texts == {
        "anchor texts": manifest.anchors.texts,
        "feature texts": manifest.parts.features.texts,
        "transfer texts": manifest.parts.transfer.texts,
    }
    assert f"{texts['anchor texts']:,} anchor texts" in shared(own).warning
    pairs = tiny_file(transfer=tiny_transfer(pairs=True))
    assert shared(pairs).texts["transfer texts"] == 2 * pairs.manifest.parts.transfer.texts
    general = changed(anchors=manifest.anchors.model_copy(update={"origin": "general"}))
    assert shared(general).texts == {"transfer texts": manifest.parts.transfer.texts}
    none = tiny_file(featured=True, transfer=tiny_transfer(general=True))
    none = replace(none, manifest=none.manifest.model_copy(update={"anchors": general.manifest.anchors}))
    assert (shared(none).texts, shared(none).warning) == ({}, "")
    parts = Parts(**dict(none.manifest.parts), later=PartRecord())
    unknown = shared(replace(none, manifest=none.manifest.model_copy(update={"parts": parts})))
    assert unknown.unknown == ("later",)
    assert "unknown part later, which may hold texts" in unknown.warning


@pytest.mark.parametrize("text", STRANGE)
def test_the_yaml_is_valid_for_any_string(text):
    lines = front_matter({"key": text, "more": [text, {"in": text}], text or "x": 1})
    found = yaml.safe_load("\n".join(lines[1:-2]))
    assert found["key"] == text
    assert found["more"] == [text, {"in": text}]
    assert "\n".join(lines).encode()
    assert lines.count("---") == 2


@pytest.mark.parametrize("text", [text for text in STRANGE if text.isprintable() and text] + ["```", "````\n```"])
def test_no_text_ends_a_block_of_code(text):
    lines = block("bash", *text.split("\n"))
    assert lines[1:-1] == text.split("\n")
    assert lines[-1] not in text


@pytest.mark.parametrize("text", [text.encode(errors="ignore").decode() or "x" for text in STRANGE])
def test_no_text_of_a_stranger_is_markup(text):
    manifest = of_the_hub().manifest
    update = {
        "task": manifest.task.model_copy(update={"name": text, "labels": (f"1{text}", f"2{text}", "3")}),
        "source": manifest.source.model_copy(update={"name": text}),
        "training": manifest.training.model_copy(update={"command": text, "data": text}),
        "licence": text,
        "versions": {text: text},
        "score": SCORE.model_copy(update={"metric": text}),
    }
    card = adapter_card(shared(changed(**update)), "user/repo")
    assert card.encode()
    assert re.sub(r"\n", "", card).isprintable()
    header, body = card.split("\n---\n", 1)
    found = yaml.safe_load(header.removeprefix("---\n"))
    assert set(found) <= {*ModelCard(adapter_card(shared(of_the_hub()), "a/b")).data.to_dict(), "license_name"}
    prose = re.sub(r"(?m)^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL)
    assert re.findall(r"(?m)^#+ .*", prose)[1:] == [
        f"## {each}" for each in ("Use", "Scores", "Size", "Texts in the file", "How it was made")
    ]
    for sign in ("<script", "!\\[", "\\]\\(http"):
        assert not re.search(rf"(?<!\\){sign}", prose), f"{sign} is not escaped"
    assert ModelCard(card).data.library_name == "uhl"


def test_taggers_have_their_own_pipeline():
    config = tiny_file().manifest.config.model_copy(update={"kind": "tokens"})
    manifest = tiny_file(config).manifest.model_copy(update={"task": TOKENS, "score": SCORE})
    content = replace(tiny_file(config), manifest=manifest)
    card = adapter_card(shared(content), "user/repo")
    assert "pipeline_tag: token-classification" in card
    assert "metrics:\n- f1" in card
    assert "most frequent" not in card, "its accuracy is not what entity F1 is compared with"


def test_what_cannot_be_fetched_is_not_shared(tmp_path):
    for name in ("adapter.bin", "adapter", "a/b.safetensors", "a\x1bb.safetensors"):
        with pytest.raises(UsageError, match="no name for a file on the hub"):
            shared(tiny_file(), name)
    (tmp_path / "a.safetensors").write_bytes(b"no adapter")
    for path in (tmp_path / "a.safetensors", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FormatError):
            SharedFile.read(path)
