"""Errors of the hub as one typed line each, for hosts, adapter files and uploads alike.

Guarantee: no message, traceback or line of a log contains the token.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_token,
)

from uhl_cli.errors import HubError, UhlError, UhlWarning, first_line
from uhl_cli.files import refuse_unwritable_cache

# The hub's HTTP errors derive from its HTTP library's base error, whichever library this release uses;
# errors of the connection itself (a proxy that refuses, a read that is interrupted) derive from it too.
HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]
# What a request can raise; an answer that is not a hub's (a login page of a network) breaks its parser.
FAILURES = (OSError, RuntimeError, EntryNotFoundError, HTTP_ERROR, ValueError, LookupError, TypeError, AttributeError)
_LOG_IN = "run `hf auth login` or set HF_TOKEN"
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# How an HTTP library quotes a header that it refuses to send.
_CREDENTIALS = re.compile(r"bearer\s+\S", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What is asked of the hub, in the words of the errors about it.

    :param error: Class of the errors.
    :param noun: What the repository holds.
    :param instead: What else to do where it is not in the cache.
    :param upload: Whether files go to the hub.
    """

    repo: str
    revision: str | None = None
    error: type[UhlError] = HubError
    noun: str = "repository"
    instead: str = "pass a local file"
    upload: bool = False

    @property
    def where(self) -> str:
        """Repository and revision."""
        return f"'{self.repo}'" + (f" at revision '{self.revision}'" if self.revision else "")


@contextmanager
def hub_errors(request: Request, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Turn the errors of requests to the hub into `request.error`, one line that says what to do.

    :param cache_dir: The cache that the requests write to; by default the hub's own.
    :raises OutputError: When the cache cannot be written.
    """
    _refuse_unusable_token(request)
    try:
        yield
    except FAILURES as error:
        if any(_CREDENTIALS.search(str(link)) for link in _links(error)):
            raise _unusable_token(request) from None
        found = _explained(request, error)
        if found is None:
            refuse_unwritable_cache(cache_dir or constants.HF_HUB_CACHE, error)
            found = _failed(request, error)
        raise found from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Neither progress bars nor a log of `huggingface_hub` inside the block: the files are small.

    That it waits since the hub limits requests is said by a `UhlWarning`.
    """
    handlers, hidden = tuple(logging.getLogger("huggingface_hub").handlers), are_progress_bars_disabled()
    forced = constants.HF_HUB_DISABLE_PROGRESS_BARS is False  # the user's wish has priority
    for handler in handlers:
        handler.addFilter(_instead_of_log)
    if not forced:
        disable_progress_bars()
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_instead_of_log)
        if not forced and not hidden:
            enable_progress_bars()


def _instead_of_log(record: logging.LogRecord) -> bool:
    """Whether to log a line of `huggingface_hub`; warns of a wait."""
    said = record.getMessage()
    if said.startswith("Rate limited"):
        warnings.warn(UhlWarning(f"The hub limits the number of requests: {said}"), stacklevel=2)
    return False


def _explained(request: Request, error: BaseException) -> UhlError | None:
    """The error for what the hub, or the cache, answered; None for what went wrong on this machine."""
    links, kind, where = tuple(_links(error)), request.error, request.where
    if _any(links, GatedRepoError):
        return kind(
            f"Access to {where} is restricted on the hub.",
            f"Ask for access on the {request.noun}'s page, then {_LOG_IN}.",
        )
    if _any(links, RevisionNotFoundError):
        return kind(
            f"The hub has no revision '{request.revision}' of '{request.repo}'.",
            "Pass an existing branch, tag or commit.",
        )
    if _any(links, RepositoryNotFoundError):
        return kind(
            f"The hub has no {request.noun} '{request.repo}', or it is private.",
            f"Check the id; for a private {request.noun} {_LOG_IN}.",
        )
    status = next((_status(link) for link in links if _status(link)), 0)
    if status == 401:
        if get_token() is None:
            return kind(f"The hub asks for a token for {where}.", f"{_LOG_IN[0].upper()}{_LOG_IN[1:]}.")
        return kind(f"The hub refuses the token for {where}.", "Check HF_TOKEN, or run `hf auth login` again.")
    if status == 403:
        right = "write to it" if request.upload else "read it"
        return kind(f"The hub refuses access to {where}.", f"Use a token whose owner may {right}: {_LOG_IN}.")
    if status == 429:
        wait = next((found for link in links if (found := _retry_after(link))), "")
        after = f"in {wait} seconds" if wait else "in some minutes"
        return kind(f"The hub limits the number of requests, so {where} is out of reach.", f"Run again {after}.")
    if request.upload and status == 413:
        return kind(f"The hub takes no upload of this size to {where}.", "Use a smaller file (see `--max-bytes`).")
    if request.upload and status in (409, 412):
        return kind(f"{where} changed during the upload, so nothing was committed.", "Run again.")
    if status >= 500:
        return kind(f"The hub answers with error {status} to a request for {where}.", "Run again later.")
    if _any(links, LocalEntryNotFoundError):
        return kind(
            f"{where} is not in the cache, and the hub cannot be reached or offline mode is on.",
            f"Run once with network access and without offline mode, or {request.instead}.",
        )
    return None


def _failed(request: Request, error: BaseException) -> UhlError:
    # `huggingface_hub` wraps what an upload raises, and names the reason only in the cause.
    reason = first_line(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
    if request.upload and isinstance(error, ValueError) and "metadata" in reason:
        said = " ".join(str(error).split())[:500]
        return request.error(f"The hub refuses the model card for {request.where}: {said}", "Correct what it names.")
    if request.upload:
        return request.error(
            f"{request.where} could not be written: {reason}",
            "Check the network, then run again; what is already there is not sent twice.",
        )
    return request.error(
        f"{request.where} could not be fetched: {reason}",
        "Check the network and the disk, then run again; finished files are kept.",
    )


def _any(links: tuple[BaseException, ...], kind: type[BaseException]) -> bool:
    return any(isinstance(link, kind) for link in links)


def _links(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    link: BaseException | None = error
    seen = set[int]()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int:
    """The status of the hub's answer; 0 if it is no error of HTTP."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status if isinstance(status, int) else 0


def _retry_after(error: BaseException) -> str:
    """The seconds that the hub asks to wait; empty if it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    found = str(headers.get("Retry-After", ""))
    return found if found.isdecimal() and len(found) < 7 else ""


def _refuse_unusable_token(request: Request) -> None:
    """An HTTP library would quote such a token in its error."""
    tokens = (os.environ.get(name, "").strip() for name in _TOKENS)
    if not all(token.isascii() and token.isprintable() and " " not in token for token in tokens):
        raise _unusable_token(request)


def _unusable_token(request: Request) -> UhlError:
    return request.error("The token for the hub has characters that no token has.", f"Check HF_TOKEN, or {_LOG_IN}.")
