"""Anchor texts: words, their choice, and files of texts."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from tiny_hosts import SENTENCES

from uhl_cli.align.texts import (
    MIN_WORDS,
    AnchorTexts,
    choose_anchors,
    choose_feature_texts,
    count_words,
    general_texts,
    in_style_of,
    read_texts,
    word_spans,
)
from uhl_cli.errors import AlignmentError, DataError


def words_of(text):
    return [text[start:end] for start, end in word_spans(text)]


def test_word_spans_are_words_and_single_marks():
    assert words_of("He didn't re-run it... «naïve»!") == [
        *("He", "didn't", "re-run", "it", ".", ".", ".", "«", "naïve", "»", "!"),
    ]
    assert words_of("  ") == []
    assert [count_words(text) for text in ("He didn't re-run it... «naïve»!", "  ", "")] == [11, 0, 0]


# Texts of several scripts, and their words with `|` between them.
SCRIPTS = (
    ("我买了iPhone12手机,2020年。", "我买|了|iPhone12|手机|,|2020|年|。"),
    ("ラーメンは美味しいです。", "ラーメン|は美|味し|いで|す|。"),
    ("𠮷野家-々", "𠮷野|家|-|々"),
    ("ภาษาไทยที่ดี น้ำ ๑๒", "ภา|ษา|ไท|ยที่|ดี|น้ำ|๑๒"),
    ("ខ្មែរ မြန်မာ ລາວ", "ខ្មែរ|မြန်|မာ|ລາ|ວ"),
    ("हिन्दी में लिखा है।", "हिन्दी|में|लिखा|है|।"),
    ("می\u200cخواهم.", "می\u200cخواهم|."),
    ("cafe\u0301 isn’t nai\u0308ve", "cafe\u0301|isn’t|nai\u0308ve"),
    ("안녕하세요 세계", "안녕하세요|세계"),
    ("Это кафе\x1fи «чай»", "Это|кафе|и|«|чай|»"),
)
# What both rules read alike.
SPACED = (
    *SENTENCES,
    "He didn't re-run it... «naïve»! ½ of C₂ — a_b ❤️ 10°",
    "Zürich–Genève, l’été; Ελλάδα, Москва-река, שלום עולם, مرحبا بالعالم, 안녕하세요 세계, Việt Nam",
    "a\x1fb\u3000c\u00a0d",
    "",
)


@pytest.mark.parametrize(("text", "words"), SCRIPTS)
def test_words_of_scripts_without_spaces_and_with_marks(text, words):
    assert words_of(text) == words.split("|")
    assert count_words(text) == len(words.split("|"))


def test_the_rules_differ_in_such_scripts_alone():
    for text in SPACED:
        assert word_spans(text, 1) == word_spans(text, 2)
        assert word_spans(text + "é", 1) == word_spans(text + "é", 2), "not the fast way for ASCII"
    differ = [text for text, _ in SCRIPTS if word_spans(text, 1) != word_spans(text, 2)]
    assert len(differ) == len(SCRIPTS) - 2, "the control: all but Korean and Russian"


def test_anchors_say_by_which_rule_their_words_are_counted():
    spaced, others = list(SPACED), [text for text, _ in SCRIPTS]
    for texts, rule in ((spaced, 1), (spaced + others, 2)):
        anchors = choose_anchors(texts, num_words=10_000, origin="s")
        features = choose_feature_texts(texts, exclude=(), num_words=10_000, origin="s")
        assert features is not None
        assert (anchors.word_rule, features.word_rule) == (rule, rule)
        assert anchors.first(3).word_rule == anchors.keep([True] * anchors.num_words).word_rule == rule
        assert anchors.counts() == [count_words(text, rule) for text in anchors.texts]
        found = {anchors.texts[row][a:b] for row in range(len(anchors.texts)) for a, b in anchors.spans(row)}
        assert ("我买" in found) == (rule == 2)
    assert replace(anchors, word_rule=1).digest != anchors.digest


def test_word_spans_cover_all_but_white_space():
    for text in (*SPACED, *(text for text, _ in SCRIPTS)):
        spans = word_spans(text)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert "".join(words_of(text)) == "".join(text.split())


def test_choice_is_deterministic_in_the_seed():
    first, again, other = (choose_anchors(SENTENCES, num_words=40, seed=seed, origin="s") for seed in (1, 1, 2))
    assert first == again
    assert first.digest == again.digest
    assert other.chosen != first.chosen
    assert other.digest != first.digest


def test_choice_does_not_depend_on_order_white_space_or_repeats():
    plain = choose_anchors(SENTENCES, num_words=40, origin="s")
    messy = [f" {text.replace(' ', '  ')}\n" for text in reversed(SENTENCES)] * 2 + ["", " \t"]
    assert choose_anchors(messy, num_words=40, origin="s") == plain


@pytest.mark.parametrize("num_words", [33, 40, 41, 100, 200])
@pytest.mark.parametrize("words_per_text", [1, 4, 7])
def test_count_is_exact_and_words_are_distinct(num_words, words_per_text):
    anchors = choose_anchors(SENTENCES, num_words=num_words, words_per_text=words_per_text, origin="s")
    total = sum(len(word_spans(text)) for text in SENTENCES)
    reachable = anchors.num_words if len(anchors.texts) < len(SENTENCES) else min(num_words, total)
    assert anchors.num_words == min(num_words, reachable)
    if words_per_text == 4:
        assert anchors.num_words == num_words
    for index, ordinals in enumerate(anchors.chosen):
        assert list(ordinals) == sorted(set(ordinals))
        assert ordinals[-1] < len(word_spans(anchors.texts[index]))
        assert len(anchors.spans(index)) == len(ordinals)


def test_choice_spreads_over_texts():
    wide = choose_anchors(SENTENCES, num_words=40, words_per_text=4, origin="s")
    assert len(wide.texts) == 10
    assert {len(ordinals) for ordinals in wide.chosen} == {4}
    narrow = choose_anchors(SENTENCES, num_words=40, words_per_text=10, origin="s")
    assert len(narrow.texts) == 4


def test_short_texts_give_all_they_have_and_others_make_up():
    texts = ["one two", "a b c", *SENTENCES[:4]]
    anchors = choose_anchors(texts, num_words=45, words_per_text=1, origin="s")
    counts = dict(zip(anchors.texts, map(len, anchors.chosen), strict=True))
    assert (counts["one two"], counts["a b c"]) == (2, 3)
    assert anchors.num_words == 45


def test_groups_name_the_text_of_each_word():
    anchors = AnchorTexts(("a b c", "d e"), ((0, 2), (1,)), "s")
    assert anchors.groups().tolist() == [0, 0, 1]
    assert anchors.num_words == 3


@pytest.mark.parametrize("texts", [[], ["", "  "], ["one two three"]])
def test_too_little_text_is_refused(texts):
    with pytest.raises(AlignmentError, match=str(MIN_WORDS)) as caught:
        choose_anchors(texts, num_words=100, origin="here")
    assert caught.value.hint
    assert choose_anchors(["w " * MIN_WORDS], num_words=100, origin="here").num_words == MIN_WORDS  # the control


def test_keep_leaves_out_words_and_emptied_texts():
    anchors = choose_anchors(SENTENCES, num_words=60, origin="s")
    present = np.ones(anchors.num_words, dtype=bool)
    present[anchors.groups() == 2] = False
    present[0] = False
    kept = anchors.keep(present.tolist())
    assert kept.num_words == present.sum()
    assert kept.texts == anchors.texts[:2] + anchors.texts[3:]
    assert kept.chosen[0] == anchors.chosen[0][1:]
    assert anchors.keep([True] * anchors.num_words) == anchors


def test_keep_needs_enough_words():
    anchors = choose_anchors(SENTENCES, num_words=60, origin="s")
    few = [index < MIN_WORDS - 1 for index in range(60)]
    with pytest.raises(AlignmentError) as caught:
        anchors.keep(few)
    assert caught.value.hint
    few[MIN_WORDS - 1] = True
    assert anchors.keep(few).num_words == MIN_WORDS


def test_general_texts_are_many_distinct_and_ascii():
    texts = general_texts()
    assert len(texts) >= 500
    assert len({text.strip().lower() for text in texts}) == len(texts)
    assert all(text.isascii() and text == text.strip() and len(word_spans(text)) >= 3 for text in texts)


def test_read_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("first line\n\n  \nzweite Zeile: ü\n", encoding="utf-8")
    assert read_texts(path) == ["first line", "zweite Zeile: ü"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as editors on Windows save it
    assert read_texts(path) == ["first line", "zweite Zeile: ü"]
    path.write_text("zweite Zeile: ü\n", encoding="latin-1")
    assert read_texts(path, encoding="latin-1") == ["zweite Zeile: ü"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00", None])
def test_read_texts_refuses(tmp_path, content):
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"texts\.txt") as caught:
        read_texts(path)
    assert caught.value.hint
    with pytest.raises(DataError):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (["A fine film.", "It's not good, really."], "It's Fine, isn't it?"),
        (["a fine film", "not good at all"], "it's fine, isn't it?"),
        (["a fine film .", "not good , really"], "it 's fine , is n't it ?"),
        (["EU rejects a call , again .", "It did n't ."], "It 's Fine , is n't it ?"),
        ([], "It's Fine, isn't it?"),
        (["in 1.5 or 2,000 cases"], "it's fine, isn't it?"),
    ],
)
def test_texts_are_written_like_the_sample(sample, expected):
    assert in_style_of(["It's Fine, isn't it?"], sample) == [expected]


def test_one_odd_text_in_a_hundred_does_not_turn_the_style():
    sample = ["a fine film ."] * 99 + ["A Fine Film."]
    assert in_style_of(["Well (he said), no."], sample) == ["well ( he said ) , no ."]
    assert in_style_of(["Well."], sample[:9] + sample[-1:]) == ["Well."]
