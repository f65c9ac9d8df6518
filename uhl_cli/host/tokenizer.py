"""Load a host's tokenizer, and check that it meets uhl's requirements."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from uhl_cli.errors import TokenizerError, first_line
from uhl_cli.host.locate import TOKENIZER_FILES
from uhl_cli.host.untrusted import FOREIGN

# Words, a letter that few vocabularies have, and nothing.
_TRIAL = ("a word, \u1e9e\ud55c.", "")
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

    :param settings: Settings that replace those that the tokenizer was saved with.
    :raises TokenizerError: There is none, it is damaged, or it gives no character offsets.
    """
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise TokenizerError(f"'{name}' has no tokenizer files.", "Copy tokenizer.json into the checkpoint's folder.")
    with _DamagedTokenizer(name):
        # Checked first, because here the message about a broken JSON file is clearer than the library's.
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


def try_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, *, rows: int, types: int) -> None:
    """Return only if a few texts and pairs give ids that the model has: some damage shows in use alone.

    :param rows: Number of token embeddings; `types`: of segment embeddings, below 2 where the model uses none.
    :raises TokenizerError: They do not.
    """
    for pairs in (None, list(_TRIAL)):
        with _DamagedTokenizer(name):
            found = tokenizer(list(_TRIAL), pairs, truncation=True, max_length=16, return_token_type_ids=True)
        for key, number in (("input_ids", rows), ("token_type_ids", types if types > 1 else sys.maxsize)):
            largest = max(max(row, default=0) for row in found[key])
            if largest >= number:
                problem = f"The tokenizer of '{name}' gives {key} of {largest}; the model knows {number}."
                raise TokenizerError(problem, "Use the tokenizer that belongs to the checkpoint.")


def prepare_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, changed to pad and cut on the right, and with a padding token.

    :raises TokenizerError: It is not fast (so it gives no character offsets), or has no special token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(f"The tokenizer of '{name}' is not fast, so gives no character offsets.", _HINT)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise TokenizerError(f"The model_max_length of the tokenizer of '{name}' is not a number.", _HINT)
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        # Padding is masked everywhere, so any token works; the end token is customary.
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

    The tokenizers library raises plain `Exception` for a file whose parts do not fit, and where its Rust code panics a
    class of its own under `BaseException`, so these two are compared exactly: other errors pass through.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or error is None:
            return
        if isinstance(error, FOREIGN) or kind is Exception or kind.__name__ == "PanicException":
            reason = first_line(error)
            raise TokenizerError(f"The tokenizer of '{self.name}' cannot be loaded: {reason}", _HINT) from error
