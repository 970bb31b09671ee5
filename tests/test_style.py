"""Style by hand counts, and how far a training moved it."""

import pytest

from evaluation.style import FEATURES, style, style_counts, style_shift


def test_counts_by_hand():
    # "Hi there!", " I am 30, really", " ok ?": 7 words; marks ! , ... ?; two of three sentences begin with a capital
    assert style_counts("Hi there! I am 30, really... ok ?") == {
        "sentence_words": (7, 3),
        "punctuation_rate": (6, 7),
        "capital_rate": (2, 3),
    }
    assert style_counts(" ... ?") == {
        "sentence_words": (0, 0),
        "punctuation_rate": (4, 0),
        "capital_rate": (0, 0),
    }
    assert style_counts("30 Dogs")["capital_rate"] == (1, 1)  # its first letter


def test_style_is_of_all_texts_together():
    assert style(["one two .", "", "Three ."]) == {
        "sentence_words": 3 / 2,
        "punctuation_rate": 2 / 3,
        "capital_rate": 1 / 2,
    }
    with pytest.raises(ValueError, match="`texts` have no word"):
        style(["", " . "])


def test_shift_before_and_after():
    shifts = style_shift(["One two three four ."], ["one two three ."], ["one two ."])
    assert list(shifts) == list(FEATURES)
    assert shifts["sentence_words"] == (4, 3, 2, 1 / 2)
    assert shifts["capital_rate"] == (1, 0, 0, 1)  # all the way
    farther = style_shift(["a b c ."], ["a b c d ."], ["a b ."])
    assert farther["sentence_words"].closed == -1
    assert farther["capital_rate"].closed is None  # nothing to close
