"""Word-based persona metrics against hand counts."""

import pytest

from evaluation.persona import copied_share, fact_density, is_copy, keyword_score

PERSONA = ["i have two dogs .", "i work as a teacher .", "my favorite food is pizza .", "i am 30 ."]


def test_keyword_score_by_hand():
    assert keyword_score(PERSONA, "My dogs like PIZZA!") == 2 / 4
    assert keyword_score(PERSONA, "") == 0
    assert keyword_score(PERSONA, "i am 30 and i have two") == 0  # no word of 4 letters that is no stop word
    assert keyword_score(PERSONA, "teachers and homework") == 1 / 4  # one sentence, by "teacher" and "work"


def test_keyword_score_is_what_it_is_blamed_for():
    assert keyword_score(PERSONA, "i do not have dogs") == keyword_score(PERSONA, "i have dogs") == 1 / 4
    assert keyword_score(PERSONA, "a patchwork of underdogs") == 2 / 4  # substrings
    assert keyword_score(PERSONA[:3], " ".join(PERSONA)) == 1


def test_fact_density_by_hand():
    assert fact_density(PERSONA, "a patchwork of underdogs") == 0  # whole words
    assert fact_density(PERSONA, "my dog is working") == 2 / 4  # dog = dogs, working = work by Porter's stemmer
    assert fact_density(PERSONA, "i am 30 years old") == 1 / 4
    assert fact_density(PERSONA, "i like my favorite things") == 0  # generic words
    assert fact_density(PERSONA, "") == 0


def test_copied_share_by_hand():
    assert copied_share(PERSONA, "yes , i work as a teacher !") == 5 / 6
    assert copied_share(PERSONA, "i work as a clown") == 4 / 5
    assert copied_share(PERSONA, "i have two cats") == 0  # three words are no run
    assert copied_share(PERSONA, "i have two dogs i work as") == 4 / 7  # runs do not cross sentences
    assert copied_share(PERSONA, "") == 0


def test_is_copy_is_more_than_half():
    assert is_copy(PERSONA, "i have two dogs and they are big") is False  # 4 of 8
    assert is_copy(PERSONA, "i have two dogs and they bark")  # 4 of 7


@pytest.mark.parametrize("metric", [keyword_score, fact_density])
def test_an_empty_persona_has_no_share(metric):
    with pytest.raises(ValueError, match="`persona` is empty"):
        metric([], "hello")
