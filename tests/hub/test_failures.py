"""The mapping of the hub's errors: typed, one line, with the cause, and without the token."""

from __future__ import annotations

import logging
import traceback
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled

from uhl_cli.errors import HostNotFoundError, HubError, OutputError, UhlWarning
from uhl_cli.hub.failures import Request, hub_errors, quiet_hub

HOST = Request("user/repo", "v1", HostNotFoundError, "model", "pass a local folder")


def told(error: BaseException, request: Request = HOST) -> Exception:
    with pytest.raises((HubError, HostNotFoundError)) as caught, hub_errors(request):
        raise error
    assert str(caught.value).isprintable()
    return caught.value


def test_the_words_and_the_class_are_those_of_the_request():
    absent = LocalEntryNotFoundError("nothing")
    assert str(told(absent)).startswith("'user/repo' at revision 'v1' is not in the cache")
    assert str(told(absent)).endswith("or pass a local folder.")
    assert isinstance(told(absent), HostNotFoundError)
    assert type(told(absent, Request("user/repo"))) is HubError
    assert told(absent).__cause__ is absent


def test_what_is_no_failure_of_the_hub_passes():
    for error in (ZeroDivisionError("x"), KeyboardInterrupt(), OutputError("x"), HubError("own")):
        with pytest.raises(type(error)) as caught, hub_errors(HOST):
            raise error
        assert caught.value is error


def test_reasons_of_this_machine_are_named():
    assert "could not be fetched: first line" in str(told(RuntimeError("first line\nsecond")))
    upload = Request("user/repo", upload=True)
    error = RuntimeError("Error while uploading")
    error.__cause__ = OSError("the reason")
    assert "'user/repo' could not be written: the reason" in str(told(error, upload))


def test_a_header_that_cannot_be_sent_is_not_quoted():
    error = RuntimeError("Illegal header value b'Bearer hf_secret'")
    error.__context__ = ValueError("Bearer hf_secret")
    found = told(error)
    assert "characters that no token has" in str(found)
    shown = "".join(traceback.format_exception(type(found), found, found.__traceback__))
    assert "HostNotFoundError" in shown
    assert "hf_secret" not in shown


def test_no_token_is_sent_that_would_be_quoted(monkeypatch):
    for token in ("hf_a b", "hf_\x01", "hf_\u00e9"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HostNotFoundError, match="no token has") as caught, hub_errors(HOST):
            raise AssertionError("it was sent")
        assert token not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_valid\n")
    with hub_errors(HOST):
        pass


def test_the_library_is_silent_but_for_waits():
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    library, logger = logging.getLogger("huggingface_hub"), logging.getLogger("huggingface_hub.somewhere")
    library.addHandler(handler)
    hidden = are_progress_bars_disabled()
    try:
        with quiet_hub():
            assert are_progress_bars_disabled()
            logger.warning("Retrying in 1s")
            with pytest.warns(UhlWarning, match=r"limits the number of requests: Rate limited\. Waiting 61"):
                logger.warning("Rate limited. Waiting 61.0s before retry")
        assert heard == []
        assert are_progress_bars_disabled() == hidden
        logger.warning("heard again")
        assert heard == ["heard again"]
    finally:
        library.removeHandler(handler)


def test_an_upload_that_is_too_large_is_no_matter_of_the_network():
    refused = OSError("413")
    refused.response = SimpleNamespace(status_code=413, headers={})  # type: ignore[attr-defined]
    for upload, words in ((True, "takes no upload of this size to 'user/repo'"), (False, "could not be fetched")):
        with pytest.raises(HubError, match=words), hub_errors(Request("user/repo", upload=upload)):
            raise refused
