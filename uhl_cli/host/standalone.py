"""A copy of a host's tokenizer that returns the ids of `encode` when called directly.

It works without uhl: `tokenizer(texts, pairs, truncation=True)` is enough.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from uhl_cli.errors import OutputError, TokenizerError, first_line
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import encode, first_token, takes_types
from uhl_cli.host.plain_text import takes_apart

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Settings that come from the tokenizer's file, or from loading it, and must not be saved.
_OF_THE_FILE = ("max_length", "truncation_strategy", "stride", "pad_to_multiple_of", "is_local", "local_files_only")
_HINT = "Open an issue that names the checkpoint; `uhl tune --parameters lora` needs no tokenizer of its own."


def standalone_tokenizer(host: Host, max_length: int) -> PreTrainedTokenizerBase:
    """A copy of the host's tokenizer that pads and truncates as `encode` does, to at most `max_length` tokens.

    It adds a decoder's begin token where `encode` does, and reads no special token in a text.  It returns segment ids
    only if the model uses them.
    """
    tokenizer: Any = copy.deepcopy(host.tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    token = first_token(tokenizer) if host.decoder else None
    if token is not None or takes_apart(tokenizer):
        tokenizer = _generic(tokenizer, token)
    inputs = ["input_ids", *(["token_type_ids"] if takes_types(host) else []), "attention_mask"]
    settings = {"model_max_length": max_length, "padding_side": "right", "truncation_side": "right"}
    for name, value in (settings | {"model_input_names": inputs}).items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # saved from here
    for name in _OF_THE_FILE:
        tokenizer.init_kwargs.pop(name, None)
    found: PreTrainedTokenizerBase = tokenizer
    return found


def save_standalone(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files, for this release of transformers and for older ones.

    :raises OSError: They cannot be written.
    """
    with _WriteFailures():
        tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings["tokenizer_class"] == "TokenizersBackend":  # the name in transformers 5 of a class that both have
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_other_ids(
    tokenizer: PreTrainedTokenizerBase,
    host: Host,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
) -> None:
    """Check that the tokenizer, saved and loaded, returns for these texts the ids and segments of `encode`.

    A text that spells the tokenizer's special tokens is among them.

    :raises TokenizerError: It does not.
    :raises OutputError: It cannot be saved in the temporary folder of this machine.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_standalone(tokenizer, Path(folder))
            loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise OutputError(
            f"cannot write to {tempfile.gettempdir()}: {first_line(error)}.", "Free some space."
        ) from error
    spelled = "a" + " a".join(tokenizer.all_special_tokens)
    first, second = [*texts, spelled], None if pairs is None else [*pairs, spelled]
    plain = loaded(first, second, truncation=True, padding=True, return_tensors="pt")
    ours = encode(host, first, second, max_length=max_length).model_inputs()
    if set(plain) != set(ours) or any(plain[name].tolist() != ours[name].tolist() for name in ours):
        raise TokenizerError(f"the tokenizer of '{host.name}' is not the same when it is saved and loaded.", _HINT)


class _WriteFailures(AbstractContextManager["_WriteFailures"]):
    """Converts the plain `Exception` that the tokenizers library raises on a full disk to an `OSError`."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and kind is Exception:
            raise OSError(first_line(error)) from error


def _generic(tokenizer: Any, token: int | None) -> PreTrainedTokenizerBase:  # noqa: ANN401
    """The tokenizer in the generic class, with a special token, if any, before each text.

    Classes of some families rebuild their pre-tokenizer or their post-processor when they are loaded.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if token is not None:
        state["post_processor"] = _begun(state["post_processor"], tokenizer.convert_ids_to_tokens(token), token)
    names = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in _ROLES}
    settings = {name: value for name, value in names.items() if value is not None}
    for name in ("add_prefix_space", "clean_up_tokenization_spaces", "split_special_tokens"):
        if isinstance(getattr(tokenizer, name, None), bool):
            settings[name] = getattr(tokenizer, name)
    found: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **settings
    )
    return found


def _begun(processor: dict[str, Any] | None, token: str, number: int) -> dict[str, Any]:
    """A post-processor, as in tokenizer.json, that adds the token at the beginning and otherwise works as this one."""
    steps: list[dict[str, Any]] = []
    if processor is not None:
        steps = list(processor["processors"]) if processor["type"] == "Sequence" else [processor]
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        parts = [{"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB")]
        template = {"type": "TemplateProcessing", "single": parts[:1], "pair": parts, "special_tokens": {}}
        steps.append(template)
    for form in ("single", "pair"):
        template[form] = [{"SpecialToken": {"id": token, "type_id": 0}}, *template[form]]
    template["special_tokens"] = template["special_tokens"] | {token: {"id": token, "ids": [number], "tokens": [token]}}
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}
