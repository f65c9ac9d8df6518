"""Anchor texts and the words in them: the text positions at which hosts are compared.

A word is a character span, so any tokenizer works: a host's state of a word is the mean over the tokens that overlap
its span (docs/method.md, "Anchor texts and words").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
import regex

from uhl_cli.data.files import read_lines
from uhl_cli.errors import AlignmentError, DataError

# The rules by which texts are cut into words.  A file says which one numbers its words, so none may ever change.
_RUNS = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]")
# Rule 2 differs in scripts without spaces between words, where two letters are a word and a single one is what is left
# of a run, and at combining marks and joiners, which belong to the letter before; rule 1 takes them for punctuation.
# On Chinese reviews pairs align two encoders better than whole runs and single letters, and as well as a dictionary.
_LETTER = r"[[\p{L}\p{Nl}]&&[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]"
_RUN = rf"(?:[[\p{{L}}\p{{N}}_]--{_LETTER}][\p{{M}}\u200c\u200d]*)+"
_PAIRS = regex.compile(
    rf"(?:(?={_LETTER})\X\p{{M}}*){{1,2}}|{_RUN}(?:['’\-]{_RUN})*|[^\p{{L}}\p{{N}}_\s\x1c-\x1f]", regex.VERSION1
)
WORD_RULE = 2
MAX_TEXT_CHARACTERS = 2000
MIN_WORDS = 32
MAX_FEATURE_TEXT_WORDS = 64
# From a larger data set, feature texts are chosen among a random sample of this many.
MAX_FEATURE_POOL = 100_000


def word_spans(text: str, rule: int = WORD_RULE) -> list[tuple[int, int]]:
    """Character spans of the words and single punctuation marks of `text`, in order, by rule 1 or 2."""
    return list(_spans(text, rule))


def count_words(text: str, rule: int = WORD_RULE) -> int:
    """Number of `word_spans(text, rule)`, without building the list."""
    return sum(1 for _ in _spans(text, rule))


def _spans(text: str, rule: int) -> Iterator[tuple[int, int]]:
    # The rules agree on ASCII, where `re` is faster.
    pattern = _RUNS if rule == 1 or text.isascii() else _PAIRS
    return (match.span() for match in pattern.finditer(text))


def _rule_for(texts: Sequence[str]) -> int:
    """The oldest rule by which the texts have the same words as by the newest."""
    return 1 if all(word_spans(text, 1) == word_spans(text) for text in texts) else WORD_RULE


@dataclass(frozen=True)
class AnchorTexts:
    """Texts and the chosen words in them.

    `chosen[i]` lists the ordinals, among `word_spans(texts[i], word_rule)`, of the anchor words of text i.
    """

    texts: tuple[str, ...]
    chosen: tuple[tuple[int, ...], ...]
    origin: str
    word_rule: int = 1

    @property
    def num_words(self) -> int:
        """Number of anchor words in all texts."""
        return sum(len(ordinals) for ordinals in self.chosen)

    def counts(self) -> list[int]:
        """Number of words, chosen or not, of each text."""
        return [count_words(text, self.word_rule) for text in self.texts]

    @property
    def digest(self) -> str:
        """SHA-256 over the texts and the chosen words."""
        content = "\n".join(self.texts) + "\0" + repr(self.chosen)
        if self.word_rule != 1:
            content += f"\0{self.word_rule}"
        return hashlib.sha256(content.encode()).hexdigest()

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Character spans of the anchor words of text `index`."""
        spans = word_spans(self.texts[index], self.word_rule)
        return [spans[ordinal] for ordinal in self.chosen[index]]

    def groups(self) -> np.ndarray:
        """int64 [num_words]: the text of each anchor word; held-out splits keep a text's words together."""
        return np.repeat(np.arange(len(self.texts)), [len(ordinals) for ordinals in self.chosen])

    def first(self, count: int) -> AnchorTexts:
        """The first `count` texts with their anchor words."""
        return replace(self, texts=self.texts[:count], chosen=self.chosen[:count])

    def keep(self, present: Sequence[bool]) -> AnchorTexts:
        """The same texts with only those anchor words whose entry in `present` [num_words] is true.

        :raises AlignmentError: When fewer than `MIN_WORDS` are left.
        """
        flags = iter(present)
        kept = [tuple(ordinal for ordinal in ordinals if next(flags)) for ordinals in self.chosen]
        pairs = [(text, ordinals) for text, ordinals in zip(self.texts, kept, strict=True) if ordinals]
        left = sum(len(ordinals) for _, ordinals in pairs)
        if left < MIN_WORDS:
            raise AlignmentError(
                f"the source host has room for only {left} of {self.num_words} anchor words.",
                "Its longest input is too short for them; give shorter lines with --anchors FILE.",
            )
        return replace(self, texts=tuple(text for text, _ in pairs), chosen=tuple(ordinals for _, ordinals in pairs))


def choose_anchors(
    texts: Sequence[str], *, num_words: int, words_per_text: int = 4, seed: int = 0, origin: str
) -> AnchorTexts:
    """Choose about `num_words` anchor words, `words_per_text` from each text.

    Distinct texts are drawn at random from the longer half, because a word in context reveals more about a host
    than a word alone.  If there are too few texts, more words are taken from each.

    :raises AlignmentError: When the texts contain fewer than `MIN_WORDS` words in total.
    """
    clean = sorted({" ".join(text.split())[:MAX_TEXT_CHARACTERS] for text in texts if text.strip()})
    rng = np.random.default_rng(seed)
    counts = np.array([len(word_spans(text)) for text in clean], dtype=np.int64)
    if counts.sum() < MIN_WORDS:
        raise AlignmentError(
            f"the anchor texts of {origin} hold only {int(counts.sum())} words; at least {MIN_WORDS} are needed.",
            "Give more text with --anchors FILE, or use --anchors general.",
        )
    wanted_texts = max(1, -(-num_words // words_per_text))
    longest_first = np.argsort(-counts, kind="stable")
    pool = longest_first[: max(wanted_texts, len(clean) // 2)]
    picked = np.sort(rng.permutation(pool)[:wanted_texts])
    # Texts contribute equally; short texts contribute all their words and longer ones make up the difference.
    shares = np.zeros(len(picked), dtype=np.int64)
    available = counts[picked]
    while shares.sum() < min(num_words, available.sum()):
        open_texts = np.flatnonzero(shares < available)
        missing = min(num_words, available.sum()) - shares.sum()
        shares[open_texts[:missing]] += 1
    chosen = []
    for index, share in zip(picked, shares, strict=True):
        ordinals = rng.permutation(counts[index])[:share]
        chosen.append(tuple(int(ordinal) for ordinal in np.sort(ordinals)))
    kept = [(clean[index], ordinals) for index, ordinals in zip(picked, chosen, strict=True) if ordinals]
    found = tuple(text for text, _ in kept)
    return AnchorTexts(found, tuple(ordinals for _, ordinals in kept), origin, _rule_for(found))


def choose_feature_texts(
    texts: Sequence[str], *, exclude: Collection[str], num_words: int, seed: int = 0, origin: str
) -> AnchorTexts | None:
    """Texts of about `num_words` words in total, every word chosen, in random order; None when there is no text.

    Texts are distinct and not in `exclude` (compared with white space collapsed); longer ones are preferred as in
    `choose_anchors`; long texts are cut to their first `MAX_FEATURE_TEXT_WORDS` words.
    """
    generator = np.random.default_rng(seed)
    clean = sorted({" ".join(text.split()) for text in texts}.difference(exclude, {""}))
    if len(clean) > MAX_FEATURE_POOL:
        clean = [clean[index] for index in generator.permutation(len(clean))[:MAX_FEATURE_POOL]]
    found = sorted({_first_words(text, MAX_FEATURE_TEXT_WORDS) for text in clean})
    counts = np.array([len(word_spans(text)) for text in found], dtype=np.int64)
    longest_first = np.argsort(-counts, kind="stable")
    enough = int(np.searchsorted(np.cumsum(counts[longest_first]), num_words)) + 1
    pool = longest_first[: max(enough, len(found) // 2)]
    chosen, total = [], 0
    for index in generator.permutation(pool).tolist():
        if total >= num_words:
            break
        if counts[index]:
            chosen.append(index)
            total += int(counts[index])
    if not chosen:
        return None
    ordinals = tuple(tuple(range(int(counts[index]))) for index in chosen)
    picked = tuple(found[index] for index in chosen)
    return AnchorTexts(picked, ordinals, origin, _rule_for(picked))


def _first_words(text: str, count: int) -> str:
    spans = word_spans(text)[:count]
    return text[: spans[-1][1]] if spans else ""


def general_texts() -> list[str]:
    """The package's own anchor sentences, on many subjects, written for this purpose."""
    content = resources.files("uhl_cli.align").joinpath("general.txt").read_text(encoding="utf-8")
    return [line for line in content.splitlines() if line.strip()]


# Clitics that treebanks write apart: "does n't", "it 's".
_NOT = re.compile(r"(?<=\w)(n['’]t)\b", re.IGNORECASE)
_CLITIC = re.compile(r"(?<=\w)(['’](?:s|re|ve|ll|d|m))\b", re.IGNORECASE)
_MARK = re.compile(r"\s*([.,!?;:()\"])\s*")


def in_style_of(texts: Sequence[str], sample: Sequence[str]) -> list[str]:
    """The same texts in the style of the sample: lower-cased, or with punctuation and clitics apart, if the sample is.

    Hosts represent "it's fine." and "it 's fine ." differently, so anchors written like the task's texts align
    better where it matters.  A sample has a style when more than 95 % of its texts (its marks, for `apart`) show it.
    """
    return styled(texts, *style_of(sample))


def style_of(sample: Sequence[str]) -> tuple[bool, bool]:
    """Whether a sample is written in lower case, and whether with punctuation and clitics apart."""
    lower = _share(sum(text == text.lower() for text in sample), len(sample))
    joined = "\n".join(sample)
    apart = _share(len(re.findall(r"(?<=\s)[.,]", joined)), len(re.findall(r"(?<=\D)[.,]", joined)))
    return lower, apart


def styled(texts: Sequence[str], lower: bool, apart: bool) -> list[str]:
    """The texts in that style, with each run of white space replaced by one space."""
    found = list(texts)
    if lower:
        found = [text.lower() for text in found]
    if apart:
        found = [_MARK.sub(r" \1 ", _CLITIC.sub(r" \1", _NOT.sub(r" \1", text))) for text in found]
    return [" ".join(text.split()) for text in found]


def _share(count: int, total: int) -> bool:
    return total > 0 and count > 0.95 * total


def read_texts(
    path: Path,
    hint: str = "Give a text file with one text a line, or use --anchors general.",
    *,
    encoding: str | None = None,
) -> list[str]:
    """Lines of a text file, without empty ones.

    :param encoding: Its encoding; None is UTF-8.
    :raises UsageError: When there is no such encoding.
    :raises DataError: When the file is missing, is not text in this encoding or holds no text.
    """
    lines = [line for line in read_lines(path, encoding, hint=hint) if line.strip()]
    if not lines:
        raise DataError(f"the texts {path} are empty.", hint)
    return lines
