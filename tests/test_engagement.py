"""Descriptive numbers of engagement."""

import math
from pathlib import Path

import numpy as np
import pytest

from evaluation.engagement import (
    MARKERS,
    WEIGHTS,
    engagement_score,
    has_question,
    information,
    inverse_document_frequencies,
    is_follow_up,
    length_words,
    uptake,
)

CONVAI2 = Path(__file__).parents[2] / "shared/data/convai2_personachat/valid_self_original.txt"


def test_has_question():
    assert has_question("me too , and you ?")
    assert not has_question("i wonder what you do .")
    assert not has_question("")


@pytest.mark.parametrize(
    ("reply", "words"),
    [("i have a dog .", 4), ("i have a dog.", 4), ("it 's 7 !", 3), (" ... ?", 0), ("", 0), ("être né", 2)],
)
def test_length_words(reply, words):
    assert length_words(reply) == words


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        # question, exclamation, continuation, empathy, acknowledgment .25 .15 .15 .20 .15, and a tenth of words / 30
        ("I see, how sad and ... why?!", 0.25 + 0.15 + 0.15 + 0.20 + 0.15 + 0.1 * 7 / 30),  # published as 0.92
        ("understand? !no", 0.25 + 0.15 + 0.15 + 0.20 + 0.15 + 0.1 * 2 / 30),  # published as 0.91
        ("i know", 0.15 + 0.1 * 2 / 30 + 0.0),  # "no" in "know"
        ("the show", 0.25 + 0.1 * 2 / 30),  # "how" in "show"
        ("", 0.0),
        ("x " * 60, 0.1),
    ],
)
def test_engagement_score_of_the_earlier_project(reply, expected):
    assert engagement_score(reply) == pytest.approx(expected)


def test_engagement_markers_by_whole_words_and_of_ones_own():
    assert engagement_score("i know the show", whole_words=True) == pytest.approx(0.1 * 4 / 30)
    assert engagement_score("no , how ?", whole_words=True) == pytest.approx(0.25 + 0.15 + 0.1 * 4 / 30)
    assert engagement_score("wow", {"wow": ["wow"]}, {"wow": 0.5}) == pytest.approx(0.5 + 0.1 / 30)
    assert sum(WEIGHTS.values()) + 0.1 == pytest.approx(1) and MARKERS.keys() == WEIGHTS.keys()
    with pytest.raises(ValueError, match="`markers` has the flags"):
        engagement_score("wow", {"wow": ["wow"]}, WEIGHTS)


@pytest.mark.skipif(not CONVAI2.exists(), reason="ConvAI2 validation data is not beside the checkout")
def test_engagement_score_of_humans():
    replies = [line.split("\t")[1] for line in CONVAI2.read_text(encoding="utf-8").splitlines() if "\t" in line]
    assert np.mean([engagement_score(reply) for reply in replies]) == pytest.approx(0.22, abs=0.005)  # two places


def test_follow_up():
    assert is_follow_up("me too . which dogs do you have ?", "i love my dog")
    assert not is_follow_up("i have a dog . and you ?", "i love my dog")  # the question does not take it up
    assert not is_follow_up("dogs are great .", "i love my dog")  # no question
    assert not is_follow_up("do you like it ?", "i do like it")  # no content word
    assert not is_follow_up("", "i love my dog")


def test_uptake_by_hand():
    assert uptake("dogs and tea", "my dog drinks tea in rome") == 2 / 4
    assert uptake("", "my dog") == 0
    assert uptake("anything", "how are you ?") is None


def test_mean_idf_by_hand():
    frequencies = inverse_document_frequencies(["i have a dog", "i have tea", "i", "i"])  # three different turns
    assert information("i have dogs", frequencies) == pytest.approx(
        (math.log(4 / 4) + math.log(4 / 3) + math.log(4), 3)
    )
    assert information("", frequencies) == (0, 0)
