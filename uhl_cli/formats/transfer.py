"""The part `transfer` of an adapter file: the transfer set (see `transfer.texts`), read without torch.

| name | dtype and shape | meaning |
|---|---|---|
| transfer.texts | uint8 | bzip2 of the texts, UTF-8, joined by newlines; for pairs, all first texts come first |
| transfer.outputs | uint8 | bzip2 of the teacher's codes -7..7 plus 8 [labels - 1, predictions] |

If the record has `general`, no texts are stored: they are the package's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from uhl_cli.codes.packing import squeeze, unsqueeze
from uhl_cli.errors import FormatError
from uhl_cli.formats.container import Problems, Stored
from uhl_cli.schema import AdapterConfig, TransferRecord
from uhl_cli.transfer.general import transfer_texts
from uhl_cli.transfer.texts import MAX_LEVEL, Codes, TransferSet, TransferTexts, count_examples

NAMES = ("transfer.outputs", "transfer.texts")
MAX_TEXT_BYTES = 2_000_000
_SHIFT = MAX_LEVEL + 1


class StoredTransfer:
    """A file's transfer set; the package's own texts are loaded on first use."""

    def __init__(self, record: TransferRecord, codes: Codes, texts: TransferTexts | None, *, words: bool) -> None:
        self.record = record
        self.codes = codes
        self._texts = texts
        self._words = words

    def whole(self) -> TransferSet:
        """The transfer set with its texts.

        :raises DataError: When they are the package's own, of another version.
        :raises FormatError: When the teacher's outputs belong to other texts.
        """
        texts = self._texts
        if texts is None:
            assert self.record.general is not None
            own = transfer_texts(self.record.general)[: self.record.texts]
            texts = TransferTexts(tuple(own), None, self.record.spans, self._words, self.record.origin)
            if texts.digest != self.record.digest:
                raise FormatError("the digest of the transfer set is not that of this package's texts.", _HINT)
            _check_counts(self.record, texts)
        return TransferSet(texts, self.codes, self.record.teacher)


_HINT = "Install the uhl that made the file (`uhl inspect` names it), or tune with --task or --data."


def names_of(record: TransferRecord) -> tuple[str, ...]:
    """The tensors of the part."""
    return NAMES[:1] if record.general is not None else NAMES


def transfer_tensors(transfer: StoredTransfer) -> dict[str, np.ndarray]:
    """The part's tensors."""
    planes = (transfer.codes.T + np.int8(_SHIFT)).astype(np.uint8)
    tensors = {"transfer.outputs": squeeze(planes.tobytes())}
    if transfer.record.general is None:
        texts = transfer.whole().texts
        tensors["transfer.texts"] = squeeze("\n".join((*texts.texts, *(texts.pairs or ()))).encode())
    return tensors


def parse_transfer(
    record: TransferRecord, config: AdapterConfig, tensors: Mapping[str, Stored], problems: Problems
) -> StoredTransfer | None:
    """The transfer set, or None where problems are collected and it has any.

    :raises FormatError: When a rule of the format is broken, unless problems are collected.
    """
    if record.general is not None and record.pairs:
        problems.add(FormatError("a transfer set of the package's own texts has no pairs"))
    if record.user_texts > (0 if record.general is not None else record.texts):
        problems.add(FormatError(f"the manifest states {record.user_texts:,} texts of the user's; there are fewer"))
    if not all(name in tensors for name in names_of(record)):
        return None
    codes = problems.attempt(partial(_codes, record, config, tensors))
    texts = None
    if record.general is None:
        texts = problems.attempt(partial(_texts, record, config, tensors))
    if codes is None or (texts is None and record.general is None):
        return None
    return StoredTransfer(record, codes, texts, words=config.kind == "tokens")


def _codes(record: TransferRecord, config: AdapterConfig, tensors: Mapping[str, Stored]) -> Codes:
    shape = (config.num_labels - 1, record.predictions)
    num_codes = shape[0] * shape[1]
    content = unsqueeze(_bytes("transfer.outputs", tensors), limit=num_codes, name="transfer.outputs")
    if len(content) != num_codes:
        raise FormatError(f"transfer.outputs holds {len(content):,} codes; {num_codes:,} are needed")
    planes = np.frombuffer(content, dtype=np.uint8).reshape(shape)
    if num_codes and (int(planes.min()) < 1 or int(planes.max()) > 2 * MAX_LEVEL + 1):
        raise FormatError(f"transfer.outputs has a code outside -{MAX_LEVEL}..{MAX_LEVEL}")
    # Always in eight bits, because the largest allowed set has 16 million codes.
    codes: Codes = np.ascontiguousarray(np.subtract(planes, _SHIFT, dtype=np.uint8).view(np.int8).T)
    return codes


def _texts(record: TransferRecord, config: AdapterConfig, tensors: Mapping[str, Stored]) -> TransferTexts:
    name, words = "transfer.texts", config.kind == "tokens"
    content = unsqueeze(_bytes(name, tensors), limit=MAX_TEXT_BYTES, name=name)
    if words and record.pairs:
        raise FormatError("a transfer set of words has no pairs")
    count = content.count(b"\n") + 1
    if count != record.texts * (2 if record.pairs else 1):
        raise FormatError(f"the manifest states {record.texts:,} texts of the transfer set; it has {count:,} lines")
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{name} is not UTF-8") from error
    if any(line != " ".join(line.split()) or not line for line in lines):
        raise FormatError("a text of the transfer set is empty or has white space other than single spaces")
    pairs = tuple(lines[record.texts :]) if record.pairs else None
    texts = TransferTexts(tuple(lines[: record.texts]), pairs, record.spans, words, record.origin)
    if texts.digest != record.digest:
        raise FormatError("the digest of the transfer set is not the one in the manifest")
    _check_counts(record, texts)
    return texts


def _check_counts(record: TransferRecord, texts: TransferTexts) -> None:
    if count_examples(texts) != (record.examples, record.predictions):
        raise FormatError(
            "the manifest's numbers of examples and predictions are not those of the transfer set's texts", _HINT
        )


def _bytes(name: str, tensors: Mapping[str, Stored]) -> np.ndarray:
    stored = tensors[name]
    if stored.dtype != "uint8" or len(stored.shape) != 1:
        raise FormatError(
            f"{name} has the type {stored.dtype} and {len(stored.shape)} dimensions; it needs uint8 and one"
        )
    return stored.numpy()
