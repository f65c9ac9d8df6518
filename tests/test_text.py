"""One line of printable characters, whatever comes in; and the names that the package shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import uhl_cli
from uhl_cli.errors import UhlError, first_line
from uhl_cli.text import one_line


@given(st.text())
def test_every_text_becomes_one_printable_line(text):
    line = one_line(text)
    assert line.replace("\u200c", "").replace("\u200d", "").isprintable()
    assert one_line(line) == line


@given(st.text().filter(str.isprintable))
def test_a_printable_line_is_left_alone(text):
    assert one_line(text) == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\r\n  c\td\u2028e\x85f\u00a0g", "a b c d e f g"),
        ("\x1b[31mred\x1b[0m", "?[31mred?[0m"),
        ("\x9b2J\x07\x00\x7f", "?2J???"),
        ("\u202eevil\u202c\u2066", "?evil??"),
        ("\udcff", "?"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("[red]  kept  [/red]", "[red]  kept  [/red]"),
        (Path("a"), "a"),
    ],
)
def test_examples(text, line):
    assert one_line(text) == line


def test_an_error_is_one_line_whatever_it_quotes():
    error = UhlError("no \x1b[2Jfile\n.", "Look\nagain.")
    assert (error.message, error.hint) == ("no ?[2Jfile .", "Look again.")
    assert str(error) == "no ?[2Jfile . Look again."
    assert first_line(ValueError("one\ntwo")) == "one"
    assert str(UhlError("it quotes: a bad header", "Fetch it again.")) == "it quotes: a bad header. Fetch it again."
    assert str(UhlError("it quotes: a bad header")) == "it quotes: a bad header"


def test_public_names_are_shown_without_torch():
    assert {"PortedModel", "UniversalAdapter", "__version__", "load_ported"} <= set(dir(uhl_cli))
    code = "import sys, uhl_cli\nassert {*uhl_cli.__all__} <= {*dir(uhl_cli)}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
    with pytest.raises(AttributeError):
        _ = uhl_cli.nothing
