"""Offline, data comes out of the hub's cache in the hub's own layout; what is not there is an error."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

SCRIPT = """
import json, sys, warnings
from uhl_cli.data import load_task
from uhl_cli.errors import UhlError, UhlWarning
warnings.simplefilter("ignore", UhlWarning)
name, options = sys.argv[1], json.loads(sys.argv[2])
try:
    loaded = load_task(name, **options)
    print(json.dumps([loaded.task.labels, loaded.train.texts, loaded.evaluation.texts]))
except UhlError as error:
    print(json.dumps([type(error).__name__, error.message, error.hint]))
"""
# fsspec up to 2024.6, which datasets 3 asks for, does not list the links of a snapshot.
needs_links = pytest.mark.skipif(
    tuple(int(part) for part in version("fsspec").split(".")[:2]) < (2024, 10),
    reason="this fsspec does not list symbolic links",
)
CARD = """---
configs:
- config_name: cola
  data_files:
  - {split: train, path: cola/train-*}
- config_name: sst2
  data_files:
  - {split: train, path: sst2/train-*}
  - {split: validation, path: sst2/validation-*}
---
"""


def cache(folder, hub, files, ref="main", card=None):
    """What `hf download --repo-type dataset` leaves: blobs, and a snapshot of links to them."""
    import datasets

    commit = "0123456789abcdef0123456789abcdef01234567"
    base = folder / "hub" / f"datasets--{hub.replace('/', '--')}"
    snapshot = base / "snapshots" / commit
    (base / "blobs").mkdir(parents=True)
    reference = base / "refs" / ref
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)
    for number, (name, (columns, features)) in enumerate(files.items()):
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blob = base / "blobs" / f"blob{number}"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(blob))
        path.symlink_to(os.path.relpath(blob, path.parent))
    if card:
        (snapshot / "README.md").write_text(card)


def run(folder, name, environment_offline=True, **options):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub")}
    if environment_offline:
        environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, json.dumps(options)],
        capture_output=True, text=True, env=environment, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def texts(prefix, names):
    import datasets

    columns = {"sentence": [f"{prefix} null", f"{prefix} b", f"{prefix} hidden"], "label": [0, 1, -1]}
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return columns, features


@needs_links
@pytest.mark.integration
@pytest.mark.parametrize("environment_offline", [True, False])
def test_cached_snapshot(tmp_path, environment_offline):
    home = tmp_path / ".cache" / "huggingface"  # hidden folders must not hide the files
    names = ["neg", "pos"]
    cache(
        home,
        "owner/some-name",
        {
            "data/train-00000-of-00001.parquet": texts("train", names),
            "data/validation-00000-of-00001.parquet": texts("validation", names),
        },
    )
    options = {} if environment_offline else {"offline": True}
    assert run(home, "owner/some-name", environment_offline, **options) == [
        names,
        ["train null", "train b"],
        ["validation null", "validation b"],
    ]
    kind, message, hint = run(home, "owner/other", environment_offline, **options)
    assert kind == "DataError"
    assert "owner/other is not cached" in message
    assert "--data" in hint


@needs_links
@pytest.mark.integration
def test_rows_of_the_table_come_from_partial_snapshots(tmp_path):
    names = ["negative", "positive"]
    cache(
        tmp_path,
        "nyu-mll/glue",
        {
            "sst2/train-00000-of-00001.parquet": texts("train", names),
            "sst2/validation-00000-of-00001.parquet": texts("validation", names),
        },
        card=CARD,
    )
    assert run(tmp_path, "sst2")[1] == ["train null", "train b"]
    kind, message, hint = run(tmp_path, "nyu-mll/glue")
    assert kind == "DataError"
    assert "holds only parts of nyu-mll/glue: README.md, sst2" in message
    assert "--config" in hint


@needs_links
@pytest.mark.integration
def test_revision_of_a_row_is_followed(tmp_path):
    import datasets

    names = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
    plain = datasets.Dataset.from_dict({"tokens": [["EU", "rejects"]], "ner_tags": [[3, 0]]})
    features = plain.features.copy()
    tags = features["ner_tags"]
    if isinstance(tags, list):
        features["ner_tags"] = [datasets.ClassLabel(names=names)]
    else:
        features["ner_tags"] = type(tags)(datasets.ClassLabel(names=names))
    rows = plain.to_dict(), features
    files = {"conll2003/train/0000.parquet": rows, "conll2003/validation/0000.parquet": rows}
    cache(tmp_path, "eriktks/conll2003", files, ref="refs/convert/parquet")
    assert run(tmp_path, "conll2003") == [names, ["EU rejects"], ["EU rejects"]]
    assert "not cached" in run(tmp_path, "conll2003", revision="main")[1]
