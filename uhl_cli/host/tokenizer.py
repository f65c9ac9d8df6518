"""Load a host's tokenizer, and check that it meets uhl's requirements.

Since version 5, transformers builds the normaliser and the pre-tokenizer of many tokenizers from their class, whatever
tokenizer.json says.  The same text can then get other token ids than those that the weights were trained on, which
costs accuracy and raises no error.  So both are compared here, and the file is used where they differ.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from uhl_cli.errors import TokenizerError, UhlWarning, first_line
from uhl_cli.host.locate import TOKENIZER_FILE, TOKENIZER_FILES
from uhl_cli.host.untrusted import FOREIGN
from uhl_cli.schema import TokenizerSource

# Words, a letter that few vocabularies have, and nothing.
_TRIAL = ("a word, \u1e9e\ud55c.", "")
_HINT = "Use a checkpoint with a tokenizer.json, or save its tokenizer as fast with transformers."
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Classes that take tokenizer.json as it is; the second is the name of the first since transformers 5.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SETTINGS_FILE = "tokenizer_config.json"
# Settings of tokenizer_config.json that the classes apply to tokenizer.json's normaliser, in every release.
_NORMALIZER_SETTINGS = {
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
}
# Each text has something that pre-tokenizers and normalisers are known to treat differently.
PROBES = (
    "The film is warm.",
    "It is n't bad, 7 1/2 out of 10.",
    "They're, I'll, we've, DON'T, O'Neil's",
    "2023 650841823 3.14159 1,000,000 0x1F",
    "  two  spaces   three ",
    " leading",
    "trailing ",
    "tab\there, line\nthere\r\n\r\nend",
    "UPPER Lower mIxEd iPhone USA",
    "na\u00efve caf\u00e9 Z\u00fcrich \u0130stanbul stra\u00dfe",
    "cafe\u0301 decomposed",
    "\ufb01ne \u2460 \uff21\uff22\uff23 \u00bd \u2122",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3067\u3059\u3002",
    "\u4e2d\u6587, English\u6df7\u5408 2024\u5e74",
    "\ud55c\uad6d\uc5b4 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "!!! ... --- ??! ;-) (a) [b] {c} <d>",
    "a_b snake_case x=y+1; e-mail@example.org http://a.b/c?d=e",
    "\u201cquoted\u201d \u2014 dash \u2026 \u00abguillemets\u00bb \u2019s",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "non\u00a0breaking zero\u200bwidth soft\u00adhyphen \x07bell",
    "$5.00 50% #1 R&D C++ a/b",
)


def load_tokenizer(
    name: str,
    folder: Path,
    *,
    config: Any,  # noqa: ANN401 - any family's configuration class
    trust_remote_code: bool = False,
    source: TokenizerSource | None = None,
    gguf: str | None = None,
    settings: Mapping[str, bool] = MappingProxyType({}),
) -> tuple[PreTrainedTokenizerBase, TokenizerSource | None]:
    """The fast tokenizer in a folder, set up by `prepare_tokenizer`, and its source; None if no choice is left.

    A choice is left where tokenizer.json and the tokenizer's class give other ids for one of `PROBES`.  Without
    `source` it is the file, since the checkpoint was saved with it and every release of transformers before 5 ran it;
    a class of the checkpoint's own code is preferred to the file.  A warning then says which tokens differ.

    :param source: Which of the two to use.
    :param gguf: A GGUF file in the folder, which holds a tokenizer too; tokenizer.json is preferred to it.
    :param settings: Settings that replace those that the tokenizer was saved with.
    :raises TokenizerError: There is none, it is damaged, or it gives no character offsets.
    """
    if gguf is None and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise TokenizerError(f"'{name}' has no tokenizer files.", "Copy tokenizer.json into the checkpoint's folder.")
    whole = (folder / TOKENIZER_FILE).is_file()
    if source == "file" and not whole:
        raise TokenizerError(f"'{name}' has no {TOKENIZER_FILE}.", "Leave out --tokenizer file.")
    with _DamagedTokenizer(name):
        # Checked first, because here the message about a broken JSON file is clearer than the library's.
        if whole:
            json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
        by_class = AutoTokenizer.from_pretrained(
            str(folder),
            config=config,
            use_fast=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **({"gguf_file": gguf} if gguf and not whole else {}),
            **settings,
        )
        by_file = _of_file(folder, by_class, settings) if whole else None
        texts = [] if by_file is None else _differing(by_class, by_file)
    if not texts:
        return prepare_tokenizer(name, by_class), None
    chosen = source or ("file" if type(by_class).__module__.startswith("transformers.") else "class")
    if source is None:
        reason = "which the checkpoint was saved with" if chosen == "file" else "which is the checkpoint's own code"
        warnings.warn(
            UhlWarning(
                f"{_said(name, by_class, by_file, texts)} The {chosen} is used, {reason}; choose with --tokenizer "
                "file or class (in Python the argument tokenizer)."
            ),
            stacklevel=2,
        )
    return prepare_tokenizer(name, by_file if chosen == "file" else by_class), chosen


def warn_other_file(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if a tokenizer in memory gives other ids than the tokenizer.json that it was loaded from."""
    origin = str(getattr(tokenizer, "name_or_path", "") or "")
    file = Path(origin) / TOKENIZER_FILE
    if origin and not file.is_file():
        try:
            cached = try_to_load_from_cache(origin, TOKENIZER_FILE)
        except ValueError:  # not an id of the hub
            cached = None
        file = Path(cached) if isinstance(cached, str) else file
    if not origin or not file.is_file() or not getattr(tokenizer, "is_fast", False):
        return
    with _DamagedTokenizer(name):
        by_file = _of_file(file.parent, tokenizer, {})
        texts = [] if by_file is None else _differing(tokenizer, by_file)
    if texts:
        hint = "If the model was trained with the file, load it with PreTrainedTokenizerFast.from_pretrained."
        warnings.warn(UhlWarning(f"{_said(name, tokenizer, by_file, texts)} {hint}"), stacklevel=3)


def _of_file(folder: Path, by_class: Any, settings: Mapping[str, bool]) -> Any:  # noqa: ANN401
    """The tokenizer that tokenizer.json holds, with the special tokens of the class; None if the class runs the file.

    Settings that tokenizer_config.json or `settings` name apply to it, as they do in every release of transformers.
    """
    if type(by_class).__name__ in _GENERIC or not getattr(by_class, "is_fast", False):
        return None
    path = folder / _SETTINGS_FILE
    given = {**(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}), **settings}
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **settings)
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        for attribute, setting in _NORMALIZER_SETTINGS.items():
            if setting in given:
                setattr(backend.normalizer, attribute, given[setting])
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and isinstance(given.get("add_prefix_space"), bool):
        backend.pre_tokenizer.add_prefix_space = given["add_prefix_space"]
    known = tokenizer.get_vocab()
    for role in (f"{role}_token" for role in _ROLES):
        token = getattr(by_class, role)
        if getattr(tokenizer, role) is None and token in known:
            setattr(tokenizer, role, token)
    tokenizer.model_input_names = by_class.model_input_names
    tokenizer.model_max_length = by_class.model_max_length
    return tokenizer


def _differing(one: Any, other: Any) -> list[str]:  # noqa: ANN401
    """The probes that two tokenizers give different ids, those with the fewest tokens first."""
    texts = [text for text in PROBES if one(text)["input_ids"] != other(text)["input_ids"]]
    return sorted(texts, key=lambda text: len(one(text)["input_ids"]))


def _said(name: str, by_class: Any, by_file: Any, texts: Sequence[str]) -> str:  # noqa: ANN401
    """One sentence that names the tokens that differ in the first text."""
    first, second = (list(each(texts[0])["input_ids"]) for each in (by_class, by_file))
    while first and second and first[0] == second[0]:
        first, second = first[1:], second[1:]
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    found, expected = (
        " ".join(each.convert_ids_to_tokens(part[:8]))
        for each, part in zip((by_class, by_file), (first, second), strict=True)
    )
    found, expected = found or "nothing", expected or "nothing"
    if found == expected:  # the same tokens with other ids
        found, expected = (" ".join(map(str, part[:8])) for part in (first, second))
    return (
        f"the tokenizer class of '{name}' ({type(by_class).__name__}) reads {len(texts)} of {len(PROBES)} test texts "
        f"differently from its {TOKENIZER_FILE}: in {texts[0]!r} '{found}' in place of '{expected}'."
    )


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
    fast: Any = tokenizer
    if tokenizer.unk_token is not None and fast.backend_tokenizer.token_to_id(tokenizer.unk_token) is None:
        tokenizer.unk_token = None  # such as "": looking for its id, transformers would not end
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
