"""The four named tasks on their real data."""

import pytest

from uhl_cli.data import TASKS, load_task


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "train", "evaluation"),
    [("sst2", 67_349, 872), ("boolq", 1_886, 3_270), ("conll2003", 14_041, 3_250), ("amazon", 3_110, 800)],
)
def test_real_data(shared_data, name, train, evaluation):
    loaded = load_task(name, data=str(shared_data / name))
    assert (len(loaded.train), len(loaded.evaluation)) == (train, evaluation)
    assert loaded.task.labels == TASKS[name].labels
    assert loaded.task.metric == TASKS[name].metric
    assert "left out" not in loaded.source
    for part in (loaded.train, loaded.evaluation):
        assert all(part.label_counts(len(loaded.task.labels)))
        assert all(text.strip() for text in part.texts)
        assert not any(text.startswith(("nan", "None\t")) for text in part.texts[:1000])
    if name == "conll2003":
        assert loaded.train.texts[0] == "EU rejects German call to boycott British lamb ."
        counts = dict(zip(loaded.task.labels, loaded.train.label_counts(9), strict=True))
        assert counts["B-PER"] == 6600
        assert counts["B-LOC"] == 7140


@pytest.mark.shared
def test_real_lines_are_kept_to_the_character(shared_data):
    import csv

    for name in ("sst2", "amazon"):
        loaded = load_task(name, data=str(shared_data / name), need_train=False)
        with (shared_data / name / "dev.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert loaded.evaluation.texts == tuple(row[loaded.task.text_column] for row in rows)
        assert loaded.evaluation.labels == tuple(int(row["label"]) for row in rows)
