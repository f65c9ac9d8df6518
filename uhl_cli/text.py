"""Text for a terminal or a log: text from a file, a host or data cannot do anything there but be read."""

from __future__ import annotations

import re

# A run of white space that holds more than plain spaces: newlines, tabs, and what Unicode calls line separators.
_BREAK = re.compile(r"\s*[^\S ]\s*")
# Joiners inside words of Persian and of Indic scripts: invisible, but harmless.
_JOINERS = "\u200c\u200d"


def one_line(text: object) -> str:
    """`text` as one line of printable characters.

    Guarantee: a line break or a tab becomes a space; a control character (C0, C1, so every ANSI escape), a
    bidirectional override, a surrogate and whatever else is not printable becomes a question mark.  A text that is
    one printable line is returned as it is.
    """
    line = _BREAK.sub(" ", str(text))
    if line.isprintable():
        return line
    return "".join(letter if letter.isprintable() or letter in _JOINERS else "?" for letter in line)
