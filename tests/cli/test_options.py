"""Options of every command: each is a field of the command's record, with the field's default, and reaches it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from command_runs import ROOT, call, imported
from pydantic import BaseModel, Field

from uhl_cli.cli.main import COMMANDS, with_options
from uhl_cli.commands.flags import Flag, Options
from uhl_cli.commands.options import ExportOptions, HostOptions, PortOptions, PretrainOptions, TuneOptions
from uhl_cli.errors import UhlError

# What a call needs.
NEEDED = {"port": ["--target", "x"], "tune": ["--target", "x"], "compare": ["--config", "c"], "hosts": ["x"]}
NEEDED |= {"export": ["--target", "x", "--output", "o"], "push": ["x", "y"]}
PLACES = {"demo": "commands.demo", "pretrain": "commands.pretrain", "port": "commands.port", "tune": "commands.tune"}
PLACES |= {"predict": "commands.predict", "export": "commands.export", "inspect": "inspect.run"}
PLACES |= {
    "budget": "budget.run",
    "compare": "compare.experiment",
    "hosts": "commands.hosts",
    "list": "inspect.listing",
    "push": "commands.push",
}
COLOURLESS = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


class Reached(UhlError):
    """Raised in place of the work."""


@pytest.fixture
def taken(monkeypatch, here) -> list[Options]:
    """Records that the pipelines were called with; none does its work."""
    records: list[Options] = []

    def reached(options: Options, *_: object) -> None:
        records.append(options)
        raise Reached("reached.", "As wanted.")

    for command, place in PLACES.items():
        monkeypatch.setattr(f"uhl_cli.{place}.run_{command}", reached)
    monkeypatch.setattr("uhl_cli.compare.experiment.chosen_runs", reached)
    (here / "adapter.safetensors").touch()
    return records


def fields(record: type[Options]) -> Iterator[tuple[str, ...]]:
    """Paths of all fields that are no records, without help of the code under test."""
    for name, field in record.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for below in fields(nested[0]) if nested else [()]:
            yield (name, *below)


def value_at(record: BaseModel, path: tuple[str, ...]) -> object:
    value: object = record
    for name in path:
        value = getattr(value, name)
    return value


def bare(command: str) -> Options:
    """The record of a command that was given nothing but what it needs."""
    kind = COMMANDS[command].record()
    needed = {"port": {"target": HostOptions(name="x")}, "compare": {"configs": ("c",)}, "hosts": {"name": "x"}}
    needed["export"] = {"target": HostOptions(name="x"), "output": Path("o")}
    needed["push"] = {"file": Path("x"), "repo": "y"}
    return kind(**needed.get("port" if command == "tune" else command, {}))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bare_command_is_a_bare_record(command, taken):
    call(command, *NEEDED.get(command, []))
    assert taken == [bare(command)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_the_default_of_its_field(command):
    """The options that click knows, against the record's fields: none is missing, none is more, defaults are equal."""
    kind = COMMANDS[command].record()
    record = bare(command)
    by_option = {f"--{flag.name}": flag for flag in kind.flags()}
    seen = set()
    for parameter in with_options(command).params:
        if parameter.name in ("json", "quiet", "debug"):
            assert parameter.default is False
            continue
        argument = parameter.param_type_name == "argument"
        flag = by_option[f"--{parameter.name}" if argument else parameter.opts[0]]
        assert argument == (flag.name in (kind.argument, kind.rest))
        seen |= set(flag.paths)
        default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
        for path in flag.paths:
            if value_at(record, path[:-1]) is None:  # a record that is there only when it is named
                field = HostOptions.model_fields[path[-1]]
                wanted = None if field.is_required() else field.default
            else:
                wanted = value_at(record, path)
            if flag.required:
                assert parameter.required
            elif wanted in ((), {}):
                assert default in (None, [], ())
            else:
                assert default == wanted, flag.name
    hidden = {tuple(path.split(".")) for path in kind.not_options}
    assert hidden <= set(fields(kind)), "a field that there is not is kept from the command line"
    assert seen == set(fields(kind)) - hidden


def other(flag: Flag) -> tuple[list[str], object]:
    """Arguments that give an option another value than its default, and that value in the record."""
    annotation = flag.field.annotation
    kinds = (
        [kind for kind in get_args(annotation) if kind is not type(None)] if type(None) in get_args(annotation) else []
    )
    kind = kinds[0] if kinds else annotation
    option = f"--{flag.name}"
    if kind is bool:
        return [f"--no-{flag.name}" if flag.default else option], not flag.default
    if get_origin(kind) is Literal:
        value: object = next(choice for choice in get_args(kind) if choice != flag.default)
    elif get_origin(kind) is tuple:
        value = get_args(kind)[0](7)
        return [option, str(value), option, str(value)], (value, value)
    elif get_origin(kind) is dict:
        return [option, "a=b", option, "c=d=e"], {"a": "b", "c": "d=e"}
    elif kind is int:
        value = (flag.default or 0) + 1 if flag.name != "max-length" else 9
    elif kind is float:
        value = (flag.default or 0.5) / 2
    else:
        value = kind("other")
    return [option, str(value)], value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_reaches_its_field_and_no_other(command, taken):
    kind = COMMANDS[command].record()
    needed = NEEDED.get(command, [])
    both = ["--target", "x", "--target-config", "y"] if command == "budget" else []
    for flag in kind.flags():
        arguments, value = other(flag)
        if flag.name == kind.argument:
            if needed[:1] == ["x"]:  # it needs its argument
                continue
            Path("other").touch()
            arguments = arguments[1:]
        elif flag.name == kind.rest:
            if flag.required:
                continue
            arguments = ["adapter.safetensors", *value]
        elif arguments[0] in needed:
            continue
        shared = both if len(flag.paths) > 1 else []
        call(command, *needed, *shared)
        plain = taken.pop()
        call(command, *needed, *shared, *arguments)
        changed = taken.pop()
        reached = set()
        for path in fields(kind):
            try:
                before = value_at(plain, path)
            except AttributeError:
                before = None
            try:
                after = value_at(changed, path)
            except AttributeError:
                after = None
            if before != after:
                reached.add(path)
                if path in flag.paths:
                    assert after == value
        nested = flag.paths[0][0] if value_at(plain, flag.paths[0][:-1]) is None else None
        assert reached >= set(flag.paths), flag.name
        assert {path for path in reached if path[0] != nested} <= set(flag.paths), flag.name


class Changed(PortOptions):
    """A record with another default, bound and help."""

    batch_size: int = Field(7, ge=3, le=8, description="texts at a time")


def test_the_help_and_the_call_follow_the_record(taken, monkeypatch):
    monkeypatch.setitem(COMMANDS, "port", replace(COMMANDS["port"], record=lambda: Changed))
    call("port", "--target", "x")
    assert value_at(taken[0], ("batch_size",)) == 7
    shown = call("port", "--help", env=COLOURLESS).out
    assert re.search(r"--batch-size .*Texts at a time\. From 3 to 8\..*\[default: 7\]", shown)
    assert call("port", "--target", "x", "--batch-size", "9").error.startswith("error: --batch-size: ")


def test_two_fields_may_not_share_a_name():
    class Twice(Options):
        """The host and the data are read at a revision each."""

        host: HostOptions = HostOptions(name="x")
        revision: str = "y"

    with pytest.raises(TypeError, match="--revision"):
        Twice.flags()


@pytest.mark.parametrize("entry", ["", "name", "=path", "name="])
def test_a_place_is_a_name_and_a_path(entry, here):
    called = call("compare", "--config", "builtin", "--at", entry)
    assert called.code == 2
    assert "NAME=PATH" in called.error


@pytest.mark.parametrize(
    "record",
    [
        PretrainOptions(),
        TuneOptions(adapter=Path("a"), target=HostOptions(name="x")),
        ExportOptions(adapter=Path("a"), target=HostOptions(name="x"), output=Path("o")),
    ],
)
def test_the_command_that_a_file_keeps_is_one_that_makes_the_same_record(record, taken):
    """Every option but those of the call alone."""
    call_alone = {"output", "device", "offline", "trust-remote-code", "resume", "overwrite", "save-every"}
    call_alone |= {"optimise", "cache"}
    given = {"task": "reviews"} | ({"output": Path("o")} if isinstance(record, ExportOptions) else {})
    for flag in type(record).flags():
        if flag.name not in {*call_alone, "adapter"}:
            given[flag.name] = other(flag)[1]
    given["adapter"] = Path("a")
    full = type(record).from_flags(given)
    said = full.command(full.data.task or "") if isinstance(full, TuneOptions) else full.command()
    where = ["--output", "o"] if isinstance(record, ExportOptions) else []  # which no file is made without
    call(*shlex.split(said)[1:], *where)
    assert taken == [full]


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS), ["port", "-h"]])
def test_help_has_an_example_that_the_command_takes(arguments, taken):
    called = call(*arguments, env=COLOURLESS)
    assert (called.code, called.err) == (0, "")
    example = re.search(r"Example: uhl (.+)", called.out)
    assert example is not None
    assert call(*shlex.split(example.group(1))).error == "error: reached. As wanted."


def test_help_breaks_lines_where_the_terminal_ends():
    said = call("inspect", "--help", env={"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "80", "TERMINAL_WIDTH": "80"}).out
    lines = [line.strip() for line in said.splitlines()]
    start = next(place for place, line in enumerate(lines) if line.startswith("With --quiet, print one line"))
    paragraph = lines[start : lines.index("", start)]
    assert len(paragraph) > 1
    for line, following in pairwise(paragraph):
        assert len(f" {line} {following.split()[0]}") > 78, "a line that ends early"


def test_help_imports_nothing_heavy():
    top = [["--help"], ["--version"], []][:2]
    assert imported(*top, cwd=ROOT) == [set()] * len(top)
    each = [[command, "--help"] for command in COMMANDS]
    assert imported(*each, cwd=ROOT)[-1] <= {"numpy"}
    assert imported(["--help"], cwd=ROOT, first=("numpy",)) == [{"numpy"}], "it would be noticed"
