"""Typed errors of uhl: what failed, on which input, and what to run next.

Every error that a user can cause is a `UhlError`.  It carries one line of
message and one line of hint; the command line prints both and exits with
`exit_code`.  Nothing in the package raises a bare `Exception`, and nothing
turns a failure into an empty result.
"""

from __future__ import annotations

from uhl_cli.text import one_line


class UhlError(Exception):
    """Base of all errors of uhl.  Message and hint are one printable line each, whatever text they quote.

    :param message: What failed, and on which input, in one line.
    :param hint: What the user can do or run next, in one line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = one_line(message)
        self.hint = one_line(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        # What was quoted at the end of a message may lack its full stop.
        stop = "." if self.hint and self.message and self.message[-1] not in ".!?:" else ""
        return f"{self.message}{stop} {self.hint}".strip()


class UsageError(UhlError):
    """Options that contradict each other or have no meaning."""

    exit_code = 2


class HubError(UhlError):
    """A repository on the hub, or a file in it, cannot be found, fetched or written."""


class HostError(UhlError):
    """A host checkpoint cannot be found, loaded or used."""


class HostNotFoundError(HostError):
    """No such folder, hub id or builtin, or not cached while offline."""


class TokenizerError(HostError):
    """The host has no tokenizer, or one that gives no character offsets."""


class UnknownModelTypeError(HostError):
    """transformers does not know the host's model type."""


class HostMapError(HostError):
    """The host hands no stream of states from layer to layer, or does not compute what its map states."""


class FingerprintError(HostError):
    """A ported adapter was made for another host."""


class DataError(UhlError):
    """A data set cannot be found, read or used."""


class LabelError(DataError):
    """Labels of the data differ from the labels that the adapter knows."""


class NoLabelsError(DataError):
    """No row of the data has a label."""


class AlignmentError(UhlError):
    """A target cannot be aligned: too few anchors, or degenerate states."""


class FormatError(UhlError):
    """A file is not a uhl adapter, is damaged, or breaks the format."""


class NewerFormatError(FormatError):
    """The file was written by a newer major version of the format."""


class BudgetError(UhlError):
    """The adapter exceeds the limits that were asked for."""

    exit_code = 3


class OutputError(UhlError):
    """A result cannot be written: disk full, no permission, or it already exists."""


class ClaimedError(OutputError):
    """Another process is writing the same result."""


class TrainingError(UhlError):
    """Training diverged, or a checkpoint does not fit the run."""


class RunError(UhlError):
    """Some runs of a comparison failed; the others are finished."""


class UhlWarning(UserWarning):
    """What a user should know about an input that is used all the same.

    Its message is one line; the command line prints it, with --quiet too.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message, or its class name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
