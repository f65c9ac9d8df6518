"""Exports: what others load without uhl is what uhl trained, whatever the family, the task and the format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from command_runs import write_conll
from export_runs import TEXTS, Inside, alone, asked, options_for, run
from safetensors.torch import load_file
from tiny_hosts import DECODERS, FAMILIES, save_tiny_host, tiny_config, tiny_host, tiny_tokenizer
from toy_runs import TINY_LIMIT, make_adapter, pair_data, sequence_data, token_data
from transformers import AutoTokenizer, BertForMaskedLM

from uhl_cli.api import UniversalAdapter
from uhl_cli.commands import export as module
from uhl_cli.commands.export import run_export
from uhl_cli.commands.options import DataOptions, HostOptions, TuneOptions, TuneTraining
from uhl_cli.commands.scoring import references_of
from uhl_cli.commands.tune_student import distillation_data, tune_student
from uhl_cli.data import Examples
from uhl_cli.errors import DataError, FormatError, LabelError, OutputError, UsageError
from uhl_cli.formats.export import BASE_FOLDER, RECORD_FILE, read_export
from uhl_cli.host.checkpoint import load_host, wrap_host
from uhl_cli.host.loading import RELEASE
from uhl_cli.metrics import score
from uhl_cli.train.classifier import load_classifier
from uhl_cli.train.run_files import RunFiles

DATA = {"sequence": sequence_data, "pairs": pair_data, "tokens": token_data}
FORMATS = ("merged", "peft")
QUICK = ("bert", "llama")
MISREAD = () if RELEASE >= (4, 50) else ("gpt2", "qwen2")
REST = tuple(family for family in FAMILIES if family not in (*QUICK, *MISREAD))
GROUPS = (QUICK, pytest.param(REST, marks=pytest.mark.integration))


class Stop(Exception):
    """The run is cut off."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """A file with a transfer set for a task of each kind, and one without."""
    folder = tmp_path_factory.mktemp("export")
    for name, data in DATA.items():
        assert make_adapter(tiny_host("bert"), data(), folder / name, transfer_set="auto").transfer_texts > 10
    make_adapter(tiny_host("bert"), sequence_data(), folder / "bare")
    return {name: folder / name for name in (*DATA, "bare")}


def target(family: str = "llama"):
    return tiny_host(family, hidden_size=40, num_hidden_layers=2, seed=1)


@pytest.fixture(scope="module", params=GROUPS, ids=["quick", "rest"])
def exports(request, adapters, tmp_path_factory) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By family, kind and format: the report, what is inside, and what a process without uhl answers."""
    folder = tmp_path_factory.mktemp("exports")
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    questions = []
    for family in request.param:
        for kind in DATA:
            for form in FORMATS:
                host, path = target(family), folder / f"{family}-{kind}-{form}"
                before = {name: value.clone() for name, value in host.model.state_dict().items()}
                with Inside(host, pairs=kind == "pairs") as inside:
                    report = run(adapters[kind], path, host, format=form, evaluation=DATA[kind]())
                same = all(torch.equal(value, before[name]) for name, value in host.model.state_dict().items())
                found[family, kind, form] = {
                    "report": report,
                    "inside": inside,
                    "majority_class": same
                    and all(value.requires_grad and value.grad is None for value in host.model.parameters()),
                    "host": host,
                    "folder": path,
                }
                arguments = None if form == "merged" else report.arguments
                questions.append(
                    asked(
                        path, "tokens" if kind == "tokens" else "sequence", pairs=kind == "pairs", arguments=arguments
                    )
                )
    for each, answer in zip(found.values(), alone(questions, folder), strict=True):
        each["answer"] = answer
    return found


def test_others_read_and_predict_what_uhl_does(exports):
    for where, each in exports.items():
        answer, inside = each["answer"], each["inside"]
        assert answer["problems"] == {}, where
        assert answer["ids"] == inside.ids, where
        assert torch.allclose(torch.tensor(answer["logits"]), inside.logits, atol=1e-4), where
        assert answer["labels"] == list(DATA[where[1]]().task.labels), where
        assert each["majority_class"], where
        wanted = None if where[1] == "tokens" else "single_label_classification"
        assert where[2] == "peft" or answer["problem_type"] == wanted, where


def test_merged_is_what_peft_is(exports):
    for (family, kind, form), each in exports.items():
        if form == "merged":
            other = exports[family, kind, "peft"]
            found, wanted = (torch.tensor(one["answer"]["logits"]) for one in (each, other))
            assert torch.allclose(found, wanted, atol=1e-4), (family, kind)
            assert each["report"].agreement == other["report"].agreement
            assert each["report"].scores == other["report"].scores


def test_padding_changes_nothing(exports):
    for where, each in exports.items():
        answer = each["answer"]
        assert (answer["pad"] == each["host"].tokenizer.pad_token_id) or where[0] not in DECODERS, where
        for row, logits in enumerate(answer["alone"]):
            batch = torch.tensor(answer["logits"][row])
            batch = batch if where[1] != "tokens" else batch[: len(logits)]
            assert torch.allclose(batch, torch.tensor(logits), atol=1e-4), (where, row)


def test_pipelines_say_the_labels_of_the_first_tokens(exports):
    for where, each in exports.items():
        answer = each["answer"]
        labels, logits = answer["labels"], torch.tensor(answer["logits"][0])
        if where[1] != "tokens":
            assert answer["said"][0] == labels[int(logits.argmax())], where
            assert set(answer["said"]) == set(labels), where
            continue
        tokenizer = AutoTokenizer.from_pretrained(each["folder"])
        offsets = tokenizer(TEXTS[0], return_offsets_mapping=True)["offset_mapping"]
        covered = {place for _, start, end in answer["said"] for place in range(start, end)}
        start = 0
        for word in TEXTS[0].split():
            token = next(
                row for row, (first, last) in enumerate(offsets) if first <= start < last or first == start < last
            )
            named = labels[int(logits[token].argmax())] != "O"
            assert ((start in covered) and (start + len(word) - 1 in covered)) == named, (where, word)
            start += len(word) + 1


def test_a_folder_holds_what_its_format_asks_for(exports):
    for (family, kind, form), each in exports.items():
        report, folder = each["report"], each["folder"]
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        common = {"README.md", "tokenizer.json", "tokenizer_config.json", RECORD_FILE}
        own = {"config.json", "model.safetensors"}
        if form == "peft":
            own = {"adapter_config.json", "adapter_model.safetensors"}
            own |= {f"{BASE_FOLDER}/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
        assert common | own <= files, (family, kind, form)
        assert report.files == {name: (folder / name).stat().st_size for name in files}
        assert report.bytes == sum(report.files.values())
        assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")], "something is left behind"
        record = read_export(folder)
        assert (record.format, record.task.kind, record.scores) == (form, DATA[kind]().task.kind, report.scores)
        said = "".join((folder / name).read_text() for name in ("README.md", RECORD_FILE))
        assert str(folder.parent) not in said, "the card tells of this machine's disk"
        if form == "peft":
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == str(folder / BASE_FOLDER)
            assert len(config["modules_to_save"]) == len(set(config["modules_to_save"])) > 0


def test_scores_are_those_of_what_was_written(exports):
    for (family, kind, form), each in exports.items():
        data, report = DATA[kind](), each["report"]
        assert set(report.scores) == set(report.agreement) == {"zero_shot", "export"}
        assert set(report.gains) == {"zero_shot"}
        if kind != "tokens" and form == "merged":
            model = load_classifier(str(each["folder"]), device="cpu")
            rows = [int(part.argmax()) for part in model.logits_of(data.evaluation)]
            wanted = score(data.task.metric, rows, references_of(data.evaluation), data.task.labels)
            assert report.scores["export"] == wanted, family
        zero_shot = UniversalAdapter.load(Path(report.adapter)).port(each["host"], max_flops=TINY_LIMIT)
        rows = zero_shot.classes_of(data.evaluation).for_metric(data.task.kind)
        assert report.scores["zero_shot"] == score(
            data.task.metric, rows, references_of(data.evaluation), data.task.labels
        )


def test_a_host_without_a_pooler_is_whole(adapters, tmp_path):
    tokenizer = tiny_tokenizer("bert")
    torch.manual_seed(0)
    model = BertForMaskedLM(tiny_config("bert", len(tokenizer), hidden_size=40, num_hidden_layers=2))
    host = wrap_host(model, tokenizer)
    questions, inside = [], []
    for form in FORMATS:
        with Inside(host) as found:
            report = run(adapters["sequence"], tmp_path / form, host, format=form)
        inside.append(found)
        arguments = None if form == "merged" else report.arguments
        questions.append(asked(tmp_path / form, "sequence", arguments=arguments))
    for answer, found in zip(alone(questions, tmp_path), inside, strict=True):
        assert answer["problems"] == {}
        assert torch.allclose(torch.tensor(answer["logits"]), found.logits, atol=1e-4)
    assert host.model.pooler is None


def test_a_base_that_is_named_is_loaded_with_what_the_report_says(adapters, tmp_path):
    path = save_tiny_host(tmp_path / "host", "llama", hidden_size=40, seed=1)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    host = load_host(str(path), device="cpu")
    questions, inside = [], []
    for name, settings in (("own", {}), ("copied", {"base": "copy"}), ("named", {"base": str(path)})):
        with Inside(host) as found:
            report = run(adapters["tokens"], tmp_path / name, host, format="peft", **settings)
        inside.append(found)
        assert (tmp_path / name / BASE_FOLDER).is_dir() == (name == "copied")
        assert report.base == str(tmp_path / name / BASE_FOLDER if name == "copied" else path)
        assert set(report.arguments) == (
            set() if name == "copied" else {"num_labels", "id2label", "label2id", "pad_token_id"}
        )
        card = (tmp_path / name / "README.md").read_text()
        assert str(tmp_path) not in card, "the card tells of this machine's disk"
        given = "num_labels=3" in card
        assert given == (name != "copied")
        arguments = {key: value for key, value in report.arguments.items() if key != "id2label"}
        questions.append(asked(tmp_path / name, "tokens", arguments=arguments))
    for answer, found in zip(alone(questions, tmp_path), inside, strict=True):
        assert answer["problems"] == {}
        assert torch.allclose(torch.tensor(answer["logits"]), found.logits, atol=1e-4)
    # uhl itself knows the labels by the record, whatever the base says.
    assert load_classifier(str(tmp_path / "own"), device="cpu").labels == token_data().task.labels
    run(adapters["sequence"], tmp_path / "hub", host, format="peft", base="org/name")
    assert json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"


def test_agreement_is_on_texts_that_were_held_out(adapters, tmp_path):
    report = run(adapters["sequence"], tmp_path / "out", target("bert"), max_steps=20)
    distillation = distillation_data(UniversalAdapter.load(adapters["sequence"]).transfer_set(), target("bert"))
    assert report.train_examples == len(distillation.examples)
    rows = [
        int(part.argmax()) for part in load_classifier(str(tmp_path / "out"), device="cpu").logits_of(distillation.held)
    ]
    assert report.agreement["export"] == score("accuracy", rows, references_of(distillation.held), ("cold", "warm"))
    assert set(distillation.held.texts).isdisjoint(distillation.examples.texts)


@pytest.mark.parametrize("form", FORMATS)
def test_a_smaller_type_is_reported(form, adapters, tmp_path):
    whole = run(adapters["sequence"], tmp_path / "whole", format=form, evaluation=sequence_data())
    assert whole.rounding is None
    report = run(adapters["sequence"], tmp_path / "half", format=form, dtype="bfloat16", evaluation=sequence_data())
    assert report.rounding.dtype == "bfloat16"
    held = report.agreement["export"].examples
    assert report.rounding.predictions == held + len(sequence_data().evaluation)
    assert 1e-5 < report.rounding.largest < 1
    assert 0 <= report.rounding.moved <= report.rounding.predictions
    name = "model.safetensors" if form == "merged" else "adapter_model.safetensors"
    assert {value.dtype for value in load_file(tmp_path / "half" / name).values()} == {torch.bfloat16}
    assert {value.dtype for value in load_file(tmp_path / "whole" / name).values()} == {torch.float32}
    if form == "merged":
        exact, rounded = (
            load_classifier(str(tmp_path / name), device="cpu", dtype=dtype)
            for name, dtype in (("whole", "float32"), ("half", "bfloat16"))
        )
        data = sequence_data().evaluation
        gaps = [(a - b).abs().max() for a, b in zip(exact.logits_of(data), rounded.logits_of(data), strict=True)]
        assert float(max(gaps)) <= report.rounding.largest + 1e-6


def test_a_type_whose_range_is_too_small_is_refused():
    values = [torch.tensor([[70_000.0, 1.0]])]
    exact, rounded = module._Said(values, []), module._Said([value.half().float() for value in values], [])
    with pytest.raises(OutputError, match=r"in float16 the outputs are not finite numbers\. Choose another --dtype"):
        module._rounding("float16", exact, rounded)
    assert module._rounding("float16", exact, exact).moved == 0


def tuned(adapter: Path, output: Path, parameters: str, host, **changes: Any) -> Path:
    settings = {"max_steps": 4, "batch_size": 8, "learning_rate": 0.02}
    options = TuneOptions(
        adapter=adapter,
        target=HostOptions(name="tiny", device="cpu"),
        parameters=parameters,
        training=TuneTraining(**settings),
        output=output,
        max_flops=TINY_LIMIT,
        rank=3 if parameters == "lora" else 8,
    )
    tune_student(UniversalAdapter.load(adapter), host, changes.get("data"), options, accelerator=Accelerator(cpu=True))
    return output


def test_a_lora_is_where_it_starts(adapters, tmp_path):
    host = target("bert")
    lora = tuned(adapters["sequence"], tmp_path / "lora", "lora", host)
    still = {"max_steps": 1, "learning_rate": 1e-12, "readout_learning_rate": 1e-12, "format": "peft"}
    report = run(adapters["sequence"], tmp_path / "out", host, task_file=lora, evaluation=sequence_data(), **still)
    assert report.rank == 3
    assert set(report.scores) == set(report.agreement) == {"zero_shot", "tuned", "export"}
    assert set(report.gains) == {"zero_shot", "tuned"}
    assert any("as the start" in teacher for teacher in report.teachers)
    theirs = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ours = load_file(lora / "ported.safetensors")
    seen = 0
    for name, value in ours.items():
        side, _, module = name.removeprefix("lora.").partition(".")
        if name.startswith("lora."):
            key = f"base_model.model.bert.{module.replace('/', '.')}.lora_{'A' if side == 'down' else 'B'}.weight"
            scale = 1 if side == "down" else 2
            assert torch.allclose(scale * theirs[key], value.float(), atol=1e-6)
            seen += 1
    assert seen == 2 * 6 * 2
    run(adapters["sequence"], tmp_path / "fresh", host, **still)
    other = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
    assert all(float(value.abs().max()) < 1e-6 for name, value in other.items() if "lora_B" in name)


def test_a_task_file_is_a_second_teacher(adapters, tmp_path, monkeypatch):
    host = target("bert")
    path = tuned(adapters["sequence"], tmp_path / "task", "delta-theta", host)
    taken: list[Any] = []
    monkeypatch.setattr(
        "uhl_cli.commands.export._train", lambda _classifier, _host, distillation, *_: taken.append(distillation)
    )
    report = run(adapters["sequence"], tmp_path / "both", host, task_file=path)
    assert set(report.agreement) == {"zero_shot", "tuned", "export"}
    assert len(report.teachers) == 2
    run(adapters["sequence"], tmp_path / "first", host)
    both, first = (distillation.targets(list(range(len(distillation.examples)))) for distillation in taken)
    model = UniversalAdapter.load(adapters["sequence"]).port(host, task=path, max_flops=TINY_LIMIT)
    second = torch.cat(model.logits_of(taken[1].examples)).softmax(-1)
    assert torch.allclose(both, (first + second) / 2, atol=1e-5)
    assert not torch.allclose(both, first, atol=1e-3)


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
def test_texts_of_the_users_own_take_the_transfer_sets_place(kind, adapters, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(DATA[kind]().train.texts) + "\n\n", encoding="utf-8")
    name = "bare" if kind == "sequence" else kind
    report = run(adapters[name], tmp_path / "out", target("bert"), texts=texts)
    assert report.teachers == ("the ported model, on file texts.txt",)
    assert report.train_examples > 20
    assert set(report.agreement) == {"zero_shot", "export"}
    # A tagger of three steps finds no entity, of which F1 says nothing.
    assert report.agreement["zero_shot"].value == (1.0 if kind == "sequence" else 0.0)


def test_labels_are_learnt_from_as_well(adapters, tmp_path):
    data = sequence_data()
    before = run(adapters["sequence"], tmp_path / "a", target("bert"))
    report = run(adapters["sequence"], tmp_path / "b", target("bert"), data=data)
    assert report.train_examples == before.train_examples + len(data.train)
    assert set(report.scores) == {"zero_shot", "export"}
    assert report.teachers[-1] == "labels: memory"
    alone_report = run(adapters["bare"], tmp_path / "c", target("bert"), data=data)
    assert (alone_report.train_examples, alone_report.agreement) == (len(data.train), {})
    half = run(adapters["bare"], tmp_path / "d", target("bert"), data=replace(data, evaluation=None), dtype="bfloat16")
    assert half.rounding.predictions > 0
    with pytest.raises(DataError, match="no training example"):
        run(adapters["bare"], tmp_path / "e", data=replace(data, train=Examples((), labels=())))
    for other in (token_data(), replace(data, task=data.task.model_copy(update={"labels": ("bad", "good")}))):
        with pytest.raises(DataError, match=r"memory labels .*, the adapter whole texts as cold, warm"):
            run(adapters["bare"], tmp_path / "e", data=other)
    assert not (tmp_path / "e").exists()


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_that_is_cut_off_and_resumed_ends_with_the_same_weights(form, adapters, tmp_path):
    begun: list[int] = []

    def stop(label: str, done: int, total: int, note: str = "") -> None:
        if label == "exporting" and done == 40:  # the report of the last step comes before its checkpoint
            raise Stop

    def report(label: str, done: int, total: int, note: str = "") -> None:
        if label == "exporting":
            begun.append(done)

    adapter, files = adapters["sequence"], RunFiles(tmp_path / "b")
    run(adapter, tmp_path / "whole", files=RunFiles(tmp_path / "a"), max_steps=40, format=form)
    with pytest.raises(Stop):
        run(adapter, tmp_path / "cut", files=files, reporter=stop, max_steps=40, format=form)
    assert not (tmp_path / "cut").exists()
    run(adapter, tmp_path / "cut", files=files, reporter=report, resume=True, max_steps=40, format=form)
    assert begun == [0, 40], "nothing was resumed"
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    run(adapter, tmp_path / "other", seed=5, max_steps=40, format=form)
    assert content(tmp_path / "other") != content(tmp_path / "whole")


def called(adapter: Path, host: Path, output: Path, **changes: Any):
    options = options_for(adapter, output, **changes)
    return run_export(options.model_copy(update={"target": HostOptions(name=str(host), device="cpu", offline=True)}))


def test_only_an_export_is_replaced_and_only_when_asked(adapters, tmp_path):
    host, output = save_tiny_host(tmp_path / "host", "bert"), tmp_path / "out"
    called(adapters["sequence"], host, output)
    whole = content(output)
    with pytest.raises(OutputError, match=r"uhl_export\.json already exists.*--overwrite"):
        called(adapters["sequence"], host, output)
    called(adapters["sequence"], host, output, overwrite=True, seed=3)
    assert content(output) != whole
    own = tmp_path / "own"
    own.mkdir()
    called(adapters["sequence"], host, own)  # an empty folder is no loss
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    (tmp_path / "file").write_text("words")
    for path in (mine, tmp_path / "file"):
        with pytest.raises(OutputError, match="not an export of uhl"):
            called(adapters["sequence"], host, path, overwrite=True)
    assert [each.name for each in mine.iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_no_trace_and_keeps_the_old_export(adapters, tmp_path, monkeypatch):
    host, output = target(), tmp_path / "out"
    run(adapters["sequence"], output, host)
    whole = content(output)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("uhl_cli.commands.export.model_card", full)
        with pytest.raises(OutputError, match="No space left"):
            run(adapters["sequence"], output, host, seed=4)
    assert content(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [Exception("No space left on device (os error 28)"), AssertionError("ours")])
def test_a_disk_that_is_full_for_the_tokenizer_is_one_line(adapters, tmp_path, monkeypatch, failure):
    """The tokenizers library says so by a plain exception; any other kind passes through."""

    def full(*_arguments: Any, **_options: Any) -> None:
        raise failure

    host = target()
    monkeypatch.setattr(type(host.tokenizer), "save_pretrained", full)
    wanted = OutputError if type(failure) is Exception else AssertionError
    with pytest.raises(wanted, match=r"cannot write to .*No space left on device|ours"):
        run(adapters["sequence"], tmp_path / "out", host)
    assert not list(tmp_path.iterdir())


def test_wrong_inputs_are_one_line_and_write_nothing(adapters, tmp_path):
    host, output = save_tiny_host(tmp_path / "host", "bert"), tmp_path / "out"
    words, empty, single = tmp_path / "t.txt", tmp_path / "empty.txt", tmp_path / "single.txt"
    words.write_text("one\ntwo\n")
    empty.write_text("\n")
    single.write_text("one\none\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    labels = tmp_path / "labels.tsv"
    labels.write_text("text\tlabel\n" + "".join(f"a{row}\t{'xyz'[row % 3]}\n" for row in range(12)))
    wrong: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
        ("bare", DataError, r"no transfer set for toy to learn from.*--texts FILE.*--data", {}),
        ("bare", DataError, "Cannot read nowhere.txt", {"texts": tmp_path / "nowhere.txt"}),
        ("bare", DataError, "are empty", {"texts": empty}),
        ("bare", DataError, "only one text", {"texts": single}),
        ("bare", DataError, "not UTF-8", {"texts": binary}),
        ("pairs", DataError, r"on pairs of texts.*--data", {"texts": words}),
        ("sequence", LabelError, "known are cold, warm", {"data": DataOptions(data=str(labels))}),
        (
            "sequence",
            DataError,
            "known are cold, warm",
            {"data": DataOptions(data=str(write_conll(tmp_path / "conll")))},
        ),
        ("sequence", UsageError, "--base has no effect", {"base": "x"}),
        ("sequence", UsageError, "--score-data has no effect", {"data": DataOptions(data="x"), "score_data": "x"}),
        ("sequence", UsageError, "--limit-train has no effect", {"data": DataOptions(limit_train=3)}),
        ("sequence", OutputError, "cannot write", {"output": words / "below"}),
    ]
    for name, kind, match, changes in wrong:
        with pytest.raises(kind, match=match) as caught:
            called(adapters[name], host, changes.pop("output", output), **changes)
        assert "\n" not in str(caught.value)
        assert not output.exists()
    with pytest.raises(FormatError, match="nothing"):
        called(adapters["sequence"], host, output, task_file=tmp_path / "nothing")
    assert not output.exists()
