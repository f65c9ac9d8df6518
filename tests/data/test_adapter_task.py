"""A name in a stranger's adapter file is never looked up: not at the hub, and not as a file; what the user names is."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_adapters import SMALL, host_bank, random_adapter, tiny_manifest
from tiny_hosts import SENTENCES, save_tiny_host, tiny_host

from uhl_cli.budget.report import BudgetOptions
from uhl_cli.budget.run import run_budget
from uhl_cli.commands.options import DataOptions, HostOptions, PortOptions, TuneOptions, tuning_defaults
from uhl_cli.commands.port import run_port
from uhl_cli.commands.tune import run_tune
from uhl_cli.data import Task, evaluation_data, name_to_load
from uhl_cli.errors import DataError, UhlError, UsageError
from uhl_cli.formats.adapter import write_adapter
from uhl_cli.formats.convert import to_file
from uhl_cli.formats.task import read_task
from uhl_cli.reports import PortReport

ROOT = Path(__file__).parents[2]
LABELS = ("cold", "mild", "warm")
FOREIGN = ["some-org/some-data", "mine.csv", "./mine.csv", "mine"]
COLUMNS = {"text_column": "t", "label_column": "l"}

opened: list[str] | None = None


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if opened is not None and event in ("open", "os.listdir", "os.scandir"):
        opened.append(str(arguments[0]))


sys.addaudithook(_record)  # cannot be taken back, and is silent while nothing is recorded


@pytest.fixture
def files_opened() -> Iterator[list[str]]:
    """The names of all files and folders that Python opens or lists."""
    global opened
    opened = []
    yield opened
    opened = None


@pytest.fixture
def asked_of_hub(monkeypatch) -> list[str]:
    """The names that the hub would have been asked for; it has none of them."""
    asked: list[str] = []

    def read_hub(hub: str, *_: object) -> None:
        asked.append(hub)
        raise DataError(f"{hub} is not there.")

    monkeypatch.setattr("uhl_cli.data.splits.read_hub", read_hub)
    return asked


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with data under names that an adapter file might hold."""
    rows = [f"{text}\t{LABELS[index % 3]}" for index, text in enumerate(SENTENCES)]
    for name in ("mine.csv", "mine/train.csv", "mine/dev.csv", "other.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            "\n".join(["t,l", *rows]).replace(",", ";").replace("\t", ",").replace(";", ",", 1)
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def task(name: str, **changes: object) -> Task:
    settings = {"kind": "sequence", "labels": LABELS, "metric": "accuracy"} | COLUMNS | changes
    return Task(name=name, **settings)


def asked(**named: object) -> dict[str, object]:
    return DataOptions(**named).model_dump()


def touched(files: list[str]) -> list[str]:
    return [name for name in files if Path(name).name in ("mine.csv", "mine", "train.csv", "dev.csv")]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_name_is_not_looked_up(name, here, asked_of_hub, files_opened):
    for named in ({}, {"limit_evaluation": 3}, {"label_column": "l"}):
        with pytest.raises(UsageError, match=r"--data.*--task"):
            evaluation_data(task(name), asked(**named), offline=False, seed=0)
    assert (asked_of_hub, touched(files_opened)) == ([], [])


@pytest.mark.parametrize("named", ["task", "data"])
def test_what_the_user_names_is_looked_up(named, here, asked_of_hub, files_opened):
    found = evaluation_data(task("mine.csv"), asked(**{named: "mine.csv"}), offline=False, seed=0)
    assert found.evaluation.texts == tuple(text.replace(",", ";") for text in SENTENCES)
    assert touched(files_opened)
    with pytest.raises(DataError, match="some-org/some-data is not there"):
        evaluation_data(task("some-org/some-data"), asked(**{named: "some-org/some-data"}), offline=False, seed=0)
    assert asked_of_hub == ["some-org/some-data"]


def test_a_task_of_this_package_is_looked_up_where_the_package_says(here, asked_of_hub, files_opened):
    (here / "sst2").mkdir()
    (here / "sst2" / "dev.csv").write_text("t,l\nwarm,warm\ncold,cold\n")
    files_opened.clear()
    with pytest.raises(DataError, match="nyu-mll/glue is not there"):
        evaluation_data(task("sst2"), asked(), offline=False, seed=0)
    assert asked_of_hub == ["nyu-mll/glue"]
    assert touched(files_opened) == []
    own = task("reviews", labels=("negative", "positive"), text_column="text", label_column="label")
    assert evaluation_data(own, asked(limit_evaluation=5), offline=True, seed=0).source.startswith("reviews/dev")


@pytest.mark.parametrize("name", [*FOREIGN, "~nobody/mine.csv", "..", "mine.csv\0"])
def test_beside_data_of_the_user_the_name_is_a_label(name, here, asked_of_hub, files_opened):
    found = evaluation_data(task(name), asked(data="other.csv"), offline=False, seed=0)
    assert len(found.evaluation) == len(SENTENCES)
    assert found.task.name in (name, Path(name).name)  # an existing mine.csv would be called mine
    assert (asked_of_hub, touched(files_opened)) == ([], [])


def test_columns_of_the_file_find_more_data_of_its_task_and_flags_go_first(here):
    (here / "wide.csv").write_text("t,u,l\nyes,no,cold\nyes,no,warm\n")
    assert evaluation_data(task("any"), asked(data="wide.csv"), offline=True, seed=0).evaluation.texts == ("yes", "yes")
    named = asked(data="wide.csv", text_column="u")
    assert evaluation_data(task("any"), named, offline=True, seed=0).evaluation.texts == ("no", "no")


def test_data_of_another_kind_is_refused(here):
    (here / "words.conll").write_text("Ann B-PER\nsleeps O\n\nsoup O\n")
    named = asked(data="words.conll", task="words")
    with pytest.raises(DataError, match="labels words, the adapter whole texts"):
        evaluation_data(task("any", labels=("O", "B-PER", "I-PER")), named, offline=True, seed=0)


def test_the_name_to_load():
    own, foreign = task("boolq"), task("foreign")
    assert name_to_load(own, asked()) == "boolq"
    assert name_to_load(foreign, asked(data="x.csv")) == "foreign"
    assert name_to_load(foreign, asked(task="x", data="y")) == name_to_load(own, asked(task="x")) == "x"


def adapter_file(path: Path, name: str, **changes: object) -> Path:
    host = tiny_host("bert")
    bank, _ = host_bank(host)
    manifest = tiny_manifest(SMALL, bank.anchors, fingerprint=host.fingerprint)
    manifest = manifest.model_copy(update={"task": task(name, **changes)})
    write_adapter(path, to_file(random_adapter(), bank, manifest))
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> HostOptions:
    folder = save_tiny_host(tmp_path_factory.mktemp("host") / "gpt2", "gpt2")
    return HostOptions(name=str(folder), device="cpu")


def port(file: Path, target: HostOptions, **named: object) -> PortReport:
    options = PortOptions(adapter=file, target=target, data=DataOptions(**named), max_flops=1000)
    return run_port(options)[1]


@pytest.mark.parametrize("name", FOREIGN)
def test_port_of_a_strangers_file(name, here, target, asked_of_hub, files_opened):
    file = adapter_file(here / "a.safetensors", name)
    report = port(file, target)
    assert report.data.startswith("not scored: ")
    assert "--data" in report.data
    assert report.scores == {}
    assert port(file, target, limit_evaluation=3).scores == {}
    with pytest.raises(UsageError, match="--data"):
        port(file, target, label_column="l")
    assert (asked_of_hub, touched(files_opened)) == ([], [])
    assert port(file, target, data="mine.csv").scores["ported"].examples == len(SENTENCES)
    assert touched(files_opened)
    with pytest.raises(DataError, match="some-org/some-data is not there"):
        port(file, target, task="some-org/some-data")
    assert asked_of_hub == ["some-org/some-data"]


def test_port_of_a_package_task_without_its_data(here, target, asked_of_hub):
    file = adapter_file(here / "a.safetensors", "sst2")
    assert port(file, target).data.startswith("not scored: nyu-mll/glue is not there")
    assert asked_of_hub == ["nyu-mll/glue"]
    with pytest.raises(DataError, match="nyu-mll/glue is not there"):
        port(file, target, task="sst2")


@pytest.mark.parametrize("name", FOREIGN)
def test_budget_of_a_strangers_file(name, here, target, asked_of_hub, files_opened):
    file = adapter_file(here / "a.safetensors", name)

    def data_of(**named: object) -> str:
        options = BudgetOptions(adapter=file, target=target, data=DataOptions(**named), max_flops=1000)
        return run_budget(options).target.atoms.data

    assert data_of() == "the adapter's anchor texts"
    with pytest.raises(UsageError, match="--data"):
        data_of(limit_evaluation=3)
    assert (asked_of_hub, touched(files_opened)) == ([], [])
    assert "mine.csv" in data_of(data="mine.csv")
    assert touched(files_opened)


@pytest.mark.parametrize("name", FOREIGN)
def test_tune_of_a_strangers_file(name, here, target, asked_of_hub, files_opened):
    file = adapter_file(here / "a.safetensors", name)

    def tune(**named: object) -> Path:
        options = TuneOptions(
            adapter=file,
            target=target,
            data=DataOptions(**COLUMNS, **named),
            training=tuning_defaults().model_copy(update={"max_steps": 1}),
            max_flops=1000,
            output=here / "t.safetensors",
        )
        return Path(run_tune(options).output)

    with pytest.raises(UsageError, match=r"--task, --data"):
        tune()
    assert (asked_of_hub, touched(files_opened)) == ([], [])
    with pytest.raises(UhlError, match="some-org/some-data is not there"):
        tune(task="some-org/some-data")
    assert asked_of_hub == ["some-org/some-data"]
    record = read_task(tune(data="other.csv")).record
    assert record.task.name == Path(name).name if name.startswith(".") else name
    assert touched(files_opened) == []


class Hub:
    """A server on this machine that counts its connections and tells each that it is out of service."""

    def __init__(self) -> None:
        self.calls = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        with contextlib.suppress(OSError):  # the test is over
            while True:
                connection, _ = self._socket.accept()
                self.calls += 1
                with connection, contextlib.suppress(OSError):  # the client is gone
                    connection.recv(65536)
                    connection.sendall(answer)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.mark.integration
@pytest.mark.parametrize(("name", "looked_up"), [("some-org/some-data", False), ("sst2", True)])
def test_a_hub_that_cannot_be_reached_is_asked_little_and_nothing_is_printed(name, looked_up, here, target, hub):
    file = adapter_file(here / "a.safetensors", name)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    kept |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(here / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "uhl_cli", "port", str(file), "--target", target.name, "--max-flops", "1000"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--quiet"], env=kept, capture_output=True, text=True, check=False, timeout=240
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "not-scored\n", "")
    # `datasets` alone makes six tries or more, with growing pauses between.
    assert 0 < hub.calls < 6 if looked_up else hub.calls == 0
