"""Every format, flag and split of local data, read back as it was written."""

import json
import subprocess
import sys

import pytest

from uhl_cli.data import TASKS, Task, load_task
from uhl_cli.data.splits import local_source
from uhl_cli.errors import DataError, UsageError

# What pandas would take for missing values, numbers, quotes or comments.
TRICKY = [
    "null",
    "NA",
    "None",
    "nan",
    "007",
    "1e5",
    '"',
    'a "quoted" word',
    "# no comment",
    "x, y",
    "true",
    "é\u00a0ü",
]
LABELS = [index % 2 for index in range(len(TRICKY))]


def write(folder, suffix, stem="train", texts=TRICKY, labels=LABELS):
    path = folder / f"{stem}{suffix}"
    if suffix == ".tsv":
        rows = [f"{label}\t{text}" for label, text in zip(labels, texts, strict=True)]
        path.write_text("\n".join(["label\ttext", *rows]) + "\n", encoding="utf-8")
    elif suffix == ".csv":
        rows = [f'{label},"{text.replace(chr(34), chr(34) * 2)}"' for label, text in zip(labels, texts, strict=True)]
        path.write_text("\n".join(["label,text", *rows]) + "\n", encoding="utf-8")
    elif suffix == ".jsonl":
        rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
        path.write_text("\n".join(rows) + "\n")
    elif suffix == ".json":
        path.write_text(json.dumps([{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]))
    else:
        import datasets

        datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)}).to_parquet(str(path))
    return path


def tsv(folder, content, name="train.tsv"):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json", ".parquet"])
def test_text_of_every_format_comes_back_as_written(tmp_path, suffix):
    write(tmp_path, suffix)
    write(tmp_path, suffix, "dev", TRICKY[:4], LABELS[:4])
    loaded = load_task(str(tmp_path))
    assert loaded.train.texts == tuple(TRICKY)
    assert loaded.train.labels == tuple(LABELS)
    assert loaded.evaluation.texts == tuple(TRICKY[:4])
    assert loaded.task.labels == ("0", "1")
    assert (loaded.task.text_column, loaded.task.label_column) == ("text", "label")
    assert str(tmp_path.parent) not in loaded.task.model_dump_json() + loaded.source


def test_all_formats_of_one_content_have_one_digest(tmp_path):
    digests = set()
    for suffix in (".tsv", ".csv", ".jsonl", ".parquet"):
        path = write(tmp_path, suffix, stem=f"one{suffix[1:]}")
        digests.add(load_task(str(path), need_train=False).evaluation.digest())
    assert len(digests) == 1


def test_csv_fields_may_hold_line_breaks_and_tsv_lines_may_end_in_crlf_after_a_mark(tmp_path):
    table = tsv(tmp_path, 'text,label\n"two\nlines",a\nplain,b\n', "x.csv")
    assert load_task(table, need_train=False).evaluation.texts == ("two\nlines", "plain")
    table = tsv(tmp_path, "\ufefflabel\ttext\r\na\tone\r\n\r\nb\ttwo\r\n", "x.tsv")
    assert load_task(table, need_train=False).evaluation.texts == ("one", "two")


def test_types_do_not_depend_on_where_in_a_long_file_a_value_stands(tmp_path):
    # datasets reads CSV in blocks of 10,000 rows and would guess types for each.
    rows = "".join(f"{index % 2}\t{index}\n" for index in range(10_050))
    loaded = load_task(tsv(tmp_path, f"label\ttext\n{rows}0\tlast\n"), need_train=False)
    assert loaded.evaluation.texts[7] == "7"
    assert loaded.evaluation.texts[-1] == "last"


def test_single_file_is_split_when_both_parts_are_needed(tmp_path):
    path = str(write(tmp_path, ".tsv", "mine", [f"text {i}" for i in range(40)], [i % 2 for i in range(40)]))
    loaded = load_task(path, seed=3)
    assert (len(loaded.train), len(loaded.evaluation)) == (36, 4)
    assert not set(loaded.train.texts) & set(loaded.evaluation.texts)
    assert "held out" in loaded.source
    assert loaded.task.name == "mine"
    again = load_task(path, seed=3)
    assert (again.train, again.evaluation) == (loaded.train, loaded.evaluation)
    assert load_task(path, seed=4).evaluation != loaded.evaluation
    assert load_task(path, need_train=False).train is None
    assert len(load_task(path, need_train=False).evaluation) == 40
    assert len(load_task(path, need_evaluation=False).train) == 40


def test_folder_without_evaluation_holds_out_the_same_rows_whether_or_not_training_is_read(tmp_path):
    write(tmp_path, ".tsv", "train", [f"text {i}" for i in range(40)], [i % 2 for i in range(40)])
    both = load_task(str(tmp_path))
    assert load_task(str(tmp_path), need_train=False).evaluation == both.evaluation
    assert len(both.evaluation) == 4


def test_limits_take_nested_random_subsets(tmp_path):
    path = str(write(tmp_path, ".tsv", "train", [f"text {i}" for i in range(100)], [i % 2 for i in range(100)]))
    whole = load_task(path, need_evaluation=False).train.texts
    ten = load_task(path, need_evaluation=False, limit_train=10)
    twenty = load_task(path, need_evaluation=False, limit_train=20).train.texts
    assert len(ten.train) == 10
    assert ten.train.texts != whole[:10]
    assert set(ten.train.texts) < set(twenty)
    assert "limited to 10 of 100" in ten.source
    assert len(load_task(path, need_evaluation=False, limit_train=10**6).train) == 100
    with pytest.raises(UsageError, match="limit of 0"):
        load_task(path, limit_train=0)


def test_evaluation_split_is_dev_then_valid_then_eval_then_test_and_flags_choose(tmp_path):
    for number, stem in enumerate(("train", "test", "eval", "validation", "dev")):
        write(tmp_path, ".tsv", stem, [f"{stem} one", f"{stem} two"], [0, 1])
        if number:
            assert load_task(str(tmp_path)).evaluation.texts[0] == f"{stem} one"
    loaded = load_task(str(tmp_path), train_split="eval", evaluation_split="test")
    assert loaded.train.texts[0] == "eval one"
    assert loaded.evaluation.texts[0] == "test one"
    with pytest.raises(DataError, match="no other split"):
        load_task(str(tmp_path), evaluation_split="other")


def test_shards_are_read_together_and_other_namesakes_refused(tmp_path):
    for shard in range(2):
        write(tmp_path, ".parquet", f"train-0000{shard}-of-00002", [f"{shard} a", f"{shard} b"], [0, 1])
    write(tmp_path, ".parquet", "dev", ["c", "d"], [0, 1])
    assert load_task(str(tmp_path)).train.texts == ("0 a", "0 b", "1 a", "1 b")
    write(tmp_path, ".parquet", "train_old", ["e", "f"], [0, 1])
    with pytest.raises(DataError, match="Several files"):
        load_task(str(tmp_path))
    write(tmp_path, ".parquet", "train", ["g", "h"], [0, 1])  # an exact name decides
    assert load_task(str(tmp_path)).train.texts == ("g", "h")


def test_a_row_reads_other_data_by_its_aliases_and_keeps_its_name(tmp_path):
    path = tsv(tmp_path, "label\ttitle\ttext\n0\tBad\tVery bad\npositive\tGood\tVery good\n")
    with pytest.raises(DataError, match="known are negative, positive"):
        load_task("amazon", data=path)
    path = tsv(tmp_path, "label\ttitle\ttext\n0\tBad\tVery bad\n1\tGood\tVery good\n")
    loaded = load_task("amazon", data=path, need_train=False)
    assert loaded.evaluation.texts == ("Bad", "Good")
    assert loaded.evaluation.pairs == ("Very bad", "Very good")
    assert (loaded.task.name, loaded.task.pair_column) == ("amazon", "text")


def test_local_source(tmp_path, monkeypatch):
    (tmp_path / "sst2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert local_source("sst2", None) is None
    assert local_source("./sst2", None).is_dir()
    assert local_source("sst2", str(tmp_path)) == tmp_path
    assert local_source("owner/name", None) is None
    for missing in ("./gone", "gone.csv", "/gone/away", "a/b/c", "~/gone", "~nobody-at-all/x", f"{'x' * 300}.csv", ""):
        with pytest.raises(DataError, match="no file or folder"):
            local_source(missing, None)


def test_progress_bars_and_verbosity_are_restored_even_after_an_error(tmp_path):
    import datasets
    import huggingface_hub
    from datasets.utils import are_progress_bars_disabled

    def settings() -> tuple[object, ...]:
        verbosity = datasets.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
        return (are_progress_bars_disabled(), *verbosity)

    before = settings()
    load_task(str(write(tmp_path, ".tsv")))
    with pytest.raises(DataError):
        load_task(tsv(tmp_path, "a\tb\n", "x.tsv"))
    assert settings() == before


def test_importing_the_package_imports_neither_torch_nor_datasets():
    code = (
        "import sys, uhl_cli.data, uhl_cli.data.tasks, uhl_cli.metrics; "
        "print({'torch', 'datasets', 'pandas', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_row_of_the_table_makes_a_task():
    for name, row in TASKS.items():
        task = Task(
            name=name,
            kind=row.kind,
            labels=row.labels,
            metric=row.metric,
            text_column=row.text_column,
            pair_column=row.pair_column,
            label_column=row.label_column,
            tokens_column=row.tokens_column,
        )
        assert Task.model_validate_json(task.model_dump_json()) == task
        assert set(row.aliases) <= {row.text_column, row.pair_column, row.label_column, row.tokens_column}
