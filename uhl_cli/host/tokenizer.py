"""Load a host's tokenizer, and make sure that it can do what uhl needs of it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from uhl_cli.errors import TokenizerError, first_line
from uhl_cli.host.locate import TOKENIZER_FILES

_HINT = "Use a checkpoint with a tokenizer.json, or save its tokenizer as fast with transformers."


def load_tokenizer(
    name: str,
    folder: Path,
    *,
    config: Any,  # noqa: ANN401 - any family's configuration class
    trust_remote_code: bool = False,
    **settings: bool,
) -> PreTrainedTokenizerBase:
    """The fast tokenizer in a folder, set up by `prepare_tokenizer`.

    :param settings: The tokenizer's own, in place of those that it was saved with.
    :raises TokenizerError: None is there, it is damaged, or it gives no character offsets.
    """
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise TokenizerError(f"'{name}' has no tokenizer files.", "Copy tokenizer.json into the checkpoint's folder.")
    with _DamagedTokenizer(name):
        # Checked first, since a broken JSON file is reported more clearly here than further down.
        if (folder / "tokenizer.json").is_file():
            json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder),
            config=config,
            use_fast=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **settings,
        )
    return prepare_tokenizer(name, tokenizer)


def prepare_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, changed to pad and cut on the right, and with a padding token.

    :raises TokenizerError: It is not fast, so gives no character offsets, or has no special token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(f"The tokenizer of '{name}' is not fast, so gives no character offsets.", _HINT)
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        # Padding is masked everywhere, so any token serves; the end token is the custom.
        substitute = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        if substitute is None:
            raise TokenizerError(
                f"The tokenizer of '{name}' has no padding, end, begin or unknown token.",
                "Set pad_token in its tokenizer_config.json.",
            )
        tokenizer.pad_token = substitute
    return tokenizer


class _DamagedTokenizer(AbstractContextManager["_DamagedTokenizer"]):
    """Turns the errors of unreadable tokenizer files into a `TokenizerError`.

    The tokenizers library raises plain `Exception` for a file whose parts do not fit, so the type
    is compared exactly: an error of another class outside the list passes through.
    """

    _TYPES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)

    def __init__(self, name: str) -> None:
        self.name = name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and (isinstance(error, self._TYPES) or kind is Exception):
            reason = first_line(error)
            raise TokenizerError(f"The tokenizer of '{self.name}' cannot be loaded: {reason}", _HINT) from error
