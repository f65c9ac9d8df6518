"""Tokenize texts as plain text: no string in them becomes a special token.

By default a fast tokenizer reads `[SEP]` or `<s>` inside a text as the special token of that name.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase


def read_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Change a fast tokenizer, in place, so that no text gives a special token's id (the unknown token's excepted).

    Special tokens are still put around a text.  Added tokens that are not special are still found in it.  The change is
    saved with the tokenizer.  A special token of one character is left alone: it may be a letter or a mark of the text.
    """
    fast: Any = tokenizer
    backend = fast.backend_tokenizer
    plain = {token.content for token in fast.added_tokens_decoder.values() if not token.special}
    backend.add_special_tokens([token for token in fast.all_special_tokens if token in plain])
    fast.split_special_tokens = True
    fast.init_kwargs["split_special_tokens"] = True  # saved from here
    # The option keeps the tokenizer from looking for special tokens.  Unigram and word-level models know them as pieces
    # of text, too; a piece must lie in one part of the pre-tokenizer's.
    if _reads_any(fast):
        steps = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, _apart(fast)])


def takes_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `read_as_text` changed the pre-tokenizer; the classes of some families build their own when loaded."""
    fast: Any = tokenizer
    found = fast.backend_tokenizer.pre_tokenizer
    steps = {} if found is None else json.loads(found.__getstate__())
    return bool(steps.get("pretokenizers", [None])[-1] == json.loads(_apart(fast).__getstate__()))


def _names(tokenizer: Any) -> list[str]:  # noqa: ANN401
    """The special tokens of more than one character."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(token for token in added.union(tokenizer.all_special_tokens) if len(token) > 1)


def _reads_any(tokenizer: Any) -> bool:  # noqa: ANN401
    names = _names(tokenizer)
    texts = [text for token in names for text in (token, f"a{token}a", f"a {token} a")]
    numbers = {number for number in tokenizer.convert_tokens_to_ids(names) if number != tokenizer.unk_token_id}
    return bool(names) and any(
        number in numbers for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for number in row
    )


def _apart(tokenizer: Any) -> pre_tokenizers.Split:  # noqa: ANN401
    """A step that parts each special token after its first character."""
    pattern = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in _names(tokenizer))
    return pre_tokenizers.Split(Regex(pattern), "isolated")
