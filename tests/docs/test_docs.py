"""The package's docs ship with it, and what they say of modules, options, fields and constants is so."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from uhl_cli.cli.main import COMMANDS
from uhl_cli.codes.layout import bits_of, parameter_shapes
from uhl_cli.compare.load import load_configs
from uhl_cli.compare.methods import METHODS
from uhl_cli.schema import AdapterConfig

ROOT = Path(__file__).parents[2]
PAGES = ("compare.md", "format.md", "method.md")
# These show commands and tables; their figures are those of the benchmarks.
OTHERS = ("python.md", "results.md")
# What every command has beside its record.
PRINTING = {"json", "quiet", "debug", "help"}
# Options that docs of this package name and that are pip's.
FOREIGN = {"upgrade"}


def page(name: str) -> str:
    return (resources.files("uhl_cli") / "docs" / name).read_text(encoding="utf-8")


ALL = "\n".join(page(name) for name in PAGES)


def tables(marker: str) -> dict[str, list[list[str]]]:
    """Rows of the tables below `<!-- marker -->` or `<!-- marker: name -->`, without their header, by the name."""
    found = {}
    for match in re.finditer(rf"<!-- {marker}(?:: (.+?))? -->\n((?:\|.*\n)+)", ALL):
        lines = match[2].splitlines()[2:]
        found[match[1] or ""] = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert found
    return found


def code(cell: str) -> str:
    return re.fullmatch(r"`(.+)`", cell)[1]


def looked_up(dotted: str) -> Any:
    """A module's constant, a class, or the default of a model's field, by its dotted name."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            fields = value.model_fields if isinstance(value, type) and issubclass(value, BaseModel) else {}
            value = fields[name].default if name in fields else getattr(value, name)
        return value
    raise AssertionError(dotted)


def flags_of(command: str) -> set[str]:
    flags = COMMANDS[command].record().flags()
    return {flag.name for flag in flags} | {f"no-{flag.name}" for flag in flags if flag.default is True} | PRINTING


def missing_options(text: str) -> list[str]:
    """`uhl COMMAND --option` in code whose command or option does not exist, and options of no command at all."""
    known = set().union(*(flags_of(name) for name in COMMANDS)) | FOREIGN
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    missing = []
    for call in [*re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)), *lines]:
        words = call.split("#")[0].split()
        options = {word[2:].split("=")[0] for word in words if re.match(r"--[a-z]", word)}
        command = words[1] if len(words) > 1 and words[0] == "uhl" else None
        allowed = known if command is None else flags_of(command) if command in COMMANDS else set()
        missing += [call] if command is not None and command not in COMMANDS else []
        missing += [f"{call}: --{name}" for name in sorted(options - allowed)]
    return missing


def missing_paths(text: str) -> list[str]:
    """Paths that the repository lacks, and names beside a module that it does not define."""
    missing = [path for path in re.findall(r"`((?:uhl_cli|tests)/[\w/.]+)`", text) if not (ROOT / path).is_file()]
    for path, names in re.findall(r"`(uhl_cli/[\w/]+\.py)`\s+\(((?:`\w+`[,\s]*)+)\)", text):
        source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
        for name in re.findall(r"`(\w+)`", names):
            if not re.search(rf"^(class|def) {name}\b|^{name}\b.*=", source, re.MULTILINE):
                missing.append(f"{path}: {name}")
    return missing


@pytest.mark.parametrize("name", [*PAGES, *OTHERS])
def test_the_page_is_in_the_package(name):
    assert page(name).startswith("# ")
    assert max(map(len, page(name).splitlines())) < 400


def test_every_page_is_checked():
    docs = {path.name for path in (resources.files("uhl_cli") / "docs").iterdir() if path.name.endswith(".md")}
    assert docs == {*PAGES, *OTHERS}


def test_modules_and_names_exist():
    assert missing_paths(ALL) == []
    assert len(set(re.findall(r"`(uhl_cli/[\w/]+\.py)`", ALL))) > 50


def test_a_module_or_name_that_is_gone_is_noticed():
    assert missing_paths("`uhl_cli/adapter/gone.py`") == ["uhl_cli/adapter/gone.py"]
    assert missing_paths("`uhl_cli/adapter/fold.py` (`fold`, `gone`)") == ["uhl_cli/adapter/fold.py: gone"]


def test_commands_and_options_exist():
    assert missing_options(ALL) == []
    assert missing_options(ALL.replace("--max-flops", "--most-flops")) != []


@pytest.mark.parametrize("path", ["README.md", *(f"uhl_cli/docs/{name}" for name in OTHERS)])
def test_what_other_pages_say_of_commands_options_and_paths_exists(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(uhl [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    calls = [*inline, *(line for line in lines if line.startswith("uhl "))]
    assert path == "uhl_cli/docs/python.md" or calls
    assert missing_options("\n".join(f"`{call.split('#')[0].strip()}`" for call in calls)) == []
    scripts = [word for line in lines for word in line.split() if re.fullmatch(r"tests/[\w/]+\.py", word)]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    assert missing_paths(text) == []


def test_an_option_of_another_command_is_noticed():
    assert missing_options("`uhl port --rank 8`") == ["uhl port --rank 8: --rank"]
    assert missing_options("`uhl carry`") == ["uhl carry"]


def test_every_command_of_the_docs_parses():
    for block in re.findall(r"```bash\n(.*?)```", ALL, re.DOTALL):
        for line in block.strip().splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "python" or words[1] in COMMANDS, line


def test_constants_are_those_of_the_code():
    (rows,) = tables("constants").values()
    wrong = {name: value for name, value, _ in rows if looked_up(code(name)) != ast.literal_eval(code(value))}
    assert wrong == {}
    assert len(rows) > 60


@pytest.mark.parametrize("path", sorted(tables("fields")))
def test_fields_are_those_of_the_code(path):
    fields = looked_up(path).model_fields
    rows = tables("fields")[path]
    assert sorted(code(name) for name, *_ in rows) == sorted(fields)
    for name, said, _ in rows:
        default = fields[code(name)].get_default(call_default_factory=True)
        if said == "required":
            assert default is PydanticUndefined, name
        elif said == "its own":
            assert isinstance(default, BaseModel), name
        else:
            assert default == ast.literal_eval(code(said)), name


def test_parameters_are_those_of_the_code():
    config = AdapterConfig(num_labels=5)
    sizes = {"M": 128, "d0": 256, "k": 2, "F": 64, "C": 5, "K": 3, "E": 16, "H": 15, "S": 8}
    (rows,) = tables("parameters").values()
    said = {code(name): tuple(eval(shape, {"__builtins__": {}}, sizes)) for name, _, shape, _ in rows}
    assert said == parameter_shapes(config)
    assert {code(name): int(bits) for name, bits, *_ in rows} == {name: bits_of(name) for name in said}


def test_methods_are_those_of_the_code():
    (rows,) = tables("methods").values()
    assert [tuple(row[:3]) for row in rows] == [(f"`{each.name}`", each.label, each.role) for each in METHODS.values()]


def test_options_are_those_of_the_command():
    for command, rows in tables("options").items():
        flags = {f"--{flag.name}": flag for flag in COMMANDS[command].record().flags()}
        assert {code(row[0]) for row in rows} == set(flags)
        for name, default, _ in rows:
            if default.startswith("`"):
                assert str(flags[code(name)].default) == code(default)
            else:
                value = flags[code(name)].default
                assert {"required": value is PydanticUndefined, "on": value is True, "off": value is False}.get(
                    default, not value
                ), name


def test_the_grid_is_one(tmp_path):
    (grid,) = re.findall(r"```yaml\n(.*?)```", page("compare.md"), re.DOTALL)
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    runs = load_configs([str(path)])
    assert len(runs) == 2 * (3 + 1) * 3


def test_the_table_of_the_proposal_is_whole():
    (rows,) = tables("proposal").values()
    rows = [row for row in rows if not row[0].startswith("**")]
    assert len(rows) >= 60
    assert {len(row) for row in rows} == {4}
    assert {re.split(r"[: ]", row[3])[0] for row in rows} == {"equal", "differs", "absent"}
    assert len({row[0] for row in rows}) == len(rows)


def test_comments_that_point_to_a_section_find_it():
    titles = {name: set(re.findall(r"^#{2,3} (.+)$", page(name), re.MULTILINE)) for name in PAGES}
    found = 0
    for path in (ROOT / "uhl_cli").rglob("*.py"):
        for name, title in re.findall(r'docs/(\w+\.md), "([^"]+)"', path.read_text(encoding="utf-8")):
            found += 1
            assert title in titles[name], f"{path}: {title}"
    assert found >= 10
    for name, title in re.findall(r'`(\w+\.md)`, "([^"]+)"', ALL):
        assert title in titles[name], title


def test_the_architectures_of_the_readme_are_those_of_the_benchmark():
    summary = json.loads((ROOT / "tests/benchmarks/results/architectures.json").read_text())["summary"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"Of {summary['architectures']} tiny random models" in text
    for number, words in (("all", "take updates on all layers"), ("some", "on some"), ("stream", "the readout alone")):
        assert f"{summary[number]} {words}" in text
    assert f"{summary['refused']} are refused" in text
    assert summary["crash"] == 0
