"""The docs' "Methods compared" says what the committed comparisons say, to the last digit it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from uhl_cli.compare.load import load_configs
from uhl_cli.compare.methods import METHODS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
RESULTS_PAGE = ROOT / "uhl_cli" / "docs" / "results.md"
TASKS = {"SST-2": "sst2", "CoNLL-2003": "conll2003", "BoolQ": "boolq", "amazon": "amazon"}
NAMES = {each.label: name for name, each in METHODS.items()}


@pytest.fixture(scope="module")
def section() -> str:
    text = RESULTS_PAGE.read_text(encoding="utf-8")
    start = text.index("## Methods compared")
    return text[start : text.index("\n## ", start)]


def rows_below(section: str, header: str) -> list[list[str]]:
    """Cells of the table whose header line begins so; the header comes first and the rule is left out."""
    start = section.index(f"\n{header}") + 1
    lines = section[start : section.index("\n\n", start)].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def comparison(name: str) -> dict:
    return json.loads((RESULTS / name / "comparison" / "groups.json").read_text())


def scores(name: str) -> dict[tuple[str, str, str], str]:
    """What a cell must say, by (task, host, method)."""
    found = {}
    for group in comparison(name)["groups"]:
        error = "" if group["standard_error"] is None else f" ± {group['standard_error']:.3f}"
        beyond = "" if group["within_budget"] else " *"
        found[group["task"], group["host"], group["method"]] = f"{group['mean']:.3f}{error}{beyond}"
    return found


def test_scores_of_the_local_set(section):
    header, *rows = rows_below(section, "| | | minilm-l3")
    task, said = "", {}
    for title, method, *cells in rows:
        task = TASKS[title.split(",")[0]] if title else task
        said |= {(task, host, NAMES[method]): cell for host, cell in zip(header[2:], cells, strict=True)}
    assert said == scores("compare_local")
    assert len(said) == 4 * 4 * len({run.method for run in load_configs(["local"])})


def test_scores_of_the_label_free_set():
    text = RESULTS_PAGE.read_text(encoding="utf-8")
    header, *rows = rows_below(text, "| | without labels on the target, and beside it |")
    task, said = "", {}
    for title, method, *cells in rows:
        task = TASKS[title.split(",")[0]] if title else task
        said |= {(task, host, NAMES[method]): cell for host, cell in zip(header[2:], cells, strict=True) if cell}
    header, row = rows_below(text, "| | minilm-l6 | minilm-l3 |")
    said |= {("sst2", host, NAMES[row[0]]): cell for host, cell in zip(header[1:], row[1:], strict=True)}
    assert said == scores("compare_label_free")


def test_scores_of_the_upwards_set():
    _, *rows = rows_below(RESULTS_PAGE.read_text(encoding="utf-8"), "| data set, host | LoRA there")
    verdicts = {(each["task"], each["host"]): each for each in comparison("compare_upwards-builtin-base")["verdicts"]}
    found = scores("compare_upwards-builtin-base")
    for name, *cells in rows:
        title, host = name.split(", ")
        task = {"reviews": "reviews"}.get(title) or TASKS[title]
        verdict = verdicts.pop((task, host))
        value, low, high = (verdict["difference"][each] for each in ("value", "low", "high"))
        difference = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        stands = "no" if verdict["outcome"] == "open" else "yes"
        assert cells == [found[task, host, "lora"], found[task, host, "uhl-zero-shot"], difference, stands]
    assert verdicts == {}


def test_scores_of_the_builtin_set(section):
    header, *rows = rows_below(section, "| | builtin:small")
    said = {("reviews", h, NAMES[row[0]]): cell for row in rows for h, cell in zip(header[1:], row[1:], strict=True)}
    assert said == scores("compare_builtin")


def test_differences_and_how_many_of_them_stand(section):
    header, *rows = rows_below(section, "| minus |")
    verdicts = comparison("compare_local")["verdicts"]
    assert len(rows) >= 10
    for name, *cells in rows:
        first, second = name.split(" minus ")
        other = NAMES.get(second) or NAMES[f"control: {second}"]
        for task, cell in zip(header[1:], cells, strict=True):
            mine = [v for v in verdicts if (v["proposed"], v["other"], v["task"]) == (NAMES[first], other, TASKS[task])]
            values = [each["difference"]["value"] for each in mine]
            counts = [(sum(v["outcome"] == word for v in mine), word) for word in ("better", "worse")]
            stands = ", ".join(f"{count} {word}" for count, word in counts if count) or "none stands"
            assert cell == f"{min(values):+.3f} to {max(values):+.3f}: {stands}", (name, task)


def test_how_often_it_loses_and_by_how_much(section):
    content = comparison("compare_local")
    for proposed, words in (("uhl-zero-shot", "zero-shot {} of {} differences"), ("uhl-tuned", "tuned {} of {} and")):
        retrained = [
            each["outcome"]
            for each in content["verdicts"]
            if each["proposed"] == proposed and METHODS[each["other"]].kind == "retrained"
        ]
        assert "better" not in retrained
        assert words.format(retrained.count("worse"), len(retrained)) in section
    aggregated = json.loads((RESULTS / "compare_local" / "comparison" / "aggregated_metrics.json").read_text())
    assert f"{-aggregated['gap']:.1f} % below the best baseline" in section


def test_wall_clock_on_both_devices(section):
    clocks: dict[str, list[float]] = {}
    for path in (RESULTS / "compare_local").glob("*/metrics.json"):
        run = json.loads(path.read_text())
        if run["costs"]["wall_clock_percent"] is not None:
            assert run["timed_on"] == "cpu"
            clocks.setdefault(run["method"], []).append(run["costs"]["wall_clock_percent"])
    gpu: dict[str, list[float]] = {}
    for name, percent in json.loads((RESULTS / "wall_clock_h200.json").read_text())["wall_clock_percent"].items():
        gpu.setdefault(name.split("--")[0], []).append(percent)
    words = re.sub(r"\s+", " ", section.replace("**", ""))
    for there, rest in (
        (clocks, "{} ported, {} with an unmerged LoRA, {} with SAT-LoRA"),
        (gpu, "it was {}, {} and {} ("),
    ):
        ranges = [there["uhl-zero-shot"] + there["uhl-tuned"], there["lora"], there["sat-lora"]]
        assert rest.format(*(f"{min(each):+.0f} to {max(each):+.0f} %" for each in ranges)) in words
    assert f"measured {min(clocks['full']):.0f} to {max(clocks['full']):+.0f} %" in words
