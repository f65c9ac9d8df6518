"""Parts of model cards in Markdown; no text of others is read as markup there, nor breaks the YAML."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from uhl_cli.metrics import Score
from uhl_cli.text import one_line

# The hub's names of the tasks.
PIPELINES = {"sequence": "text-classification", "tokens": "token-classification"}


def front_matter(header: Mapping[str, object]) -> list[str]:
    """The card's metadata as lines of YAML, valid for any string."""
    text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=1_000_000)
    return ["---", *text.rstrip("\n").split("\n"), "---", ""]


def block(language: str, *lines: str) -> list[str]:
    """Code, which no line of it can end."""
    fence = "```"
    while any(fence in line for line in lines):
        fence += "`"
    return [f"{fence}{language}", *lines, fence]


def interval(score: Score) -> str:
    """A value with its 95 % interval."""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def plain(text: str) -> str:
    """Untrusted text without characters that Markdown reads as markup."""
    return "".join(f"\\{sign}" if sign in r"\`*_{}[]<>()#!|" else sign for sign in one_line(text))
