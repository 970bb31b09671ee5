"""Descriptive numbers of engagement."""

import pytest

from evaluation.engagement import has_question, length_words


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
