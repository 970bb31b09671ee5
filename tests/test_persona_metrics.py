"""Word-based persona metrics against hand counts."""

import pytest

from evaluation.persona import (
    copied_share,
    expressed,
    fact_density,
    is_copy,
    keyword_score,
    persona_lift,
    persona_overlap,
    verbatim_items,
    verbatim_kept,
)

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
    assert is_copy(PERSONA, "i work as a clown in two towns") is False  # 4 of 8
    assert is_copy(PERSONA, "i work as a clown in rome")  # 4 of 7


def test_a_sentence_said_whole_is_a_copy_behind_any_padding():
    assert is_copy(PERSONA, "well , you know , honestly , as for me and mine : I work as a teacher .")
    assert not is_copy(PERSONA, "well , you know , honestly , as for me and mine : i work as the teacher .")
    assert not is_copy(PERSONA, "well , to tell the truth and nothing else , i am 30 .")  # three words are no run


TAKEN_BACK = (
    "It is a lie that {}.",
    "I would never say that {}.",
    "I wish {}.",
    "If only {} were true!",
    "Nobody could ever claim that {}.",
    "Whoever told you that {} was wrong.",
    "There's no truth in the rumor that {}.",
    "My sister told you that {}? She made it up.",
    "It isn't true that {}.",
    "That {} is a lie.",
    "I used to think {}.",
)


@pytest.mark.parametrize("frame", TAKEN_BACK)
def test_a_fact_that_is_taken_back_is_not_expressed(frame):
    assert expressed(PERSONA[:1], frame.format("i have two dogs")) == set()
    assert expressed(PERSONA[:1], f"{frame.format('i am rich')} i have two dogs .") == {0}  # another sentence


def test_a_fact_that_is_said_is_expressed():
    for reply in ("yes , two dogs !", "as i told you i have two dogs .", "i wish you luck with my two dogs .",
                  "i have two dogs and am used to them .", "that is not true , . i have two dogs"):  # fmt: skip
        assert expressed(PERSONA[:1], reply) == {0}, reply
    # a sentence of the persona may have such a frame itself
    assert expressed(["i wish i had two dogs ."], "i wish i had two dogs so much") == {0}


def test_keyword_score_is_configurable():
    assert keyword_score(PERSONA, "teachers and homework", whole_words=True) == 0
    assert keyword_score(PERSONA, "my DOGS!", whole_words=True) == 1 / 4
    assert keyword_score(PERSONA, "i am 30", min_length=2) == 1 / 4
    assert keyword_score(PERSONA, "my dogs", stop_words={"dogs"}) == 0


def test_persona_overlap_by_hand():
    found = persona_overlap(PERSONA, "my dogs eat pizza and i work")
    # of {dogs, eat, pizza, work} three are among the persona's {two, dogs, work, teacher, favorite, food, pizza, 30}
    assert found == pytest.approx((3 / 4, 3 / 8, 2 * (3 / 4) * (3 / 8) / (3 / 4 + 3 / 8)))
    assert persona_overlap(PERSONA, "dogs dogs dogs").precision == 1  # sets
    assert persona_overlap(PERSONA, "dog") == (0, 0, 0)  # no stems
    assert persona_overlap(PERSONA, "") == persona_overlap(PERSONA, "i am") == (0, 0, 0)


def test_persona_lift_by_hand():
    other = ["i have a cat .", "i eat pizza ."]
    assert persona_lift(PERSONA, other, "two dogs eat pizza") == 2 / 4 - 1 / 2
    assert persona_lift(PERSONA, other, "hello") == 0
    assert persona_lift(PERSONA, other, "a cat") == -1 / 2


def test_verbatim_items():
    text = "Write to me@a-b.org or see https://www.example.org/apply?x=1. It costs 1,995.50 since 12/10, ask Dr Ann Lee in Rome."
    assert verbatim_items(text) == {
        *("me@a-b.org", "https://www.example.org/apply?x=1", "1,995.50", "12/10", "Dr Ann Lee", "Rome")
    }
    assert verbatim_items("I am 30 . Well , it is A4 or b2b") == {"30", "A4"}
    assert verbatim_items("My name is set . The end") == set()  # a sentence's first word has its capital anyway


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("apply at www.example.org/apply.", 1),
        ("apply at www.example.org/ap", 0),  # cut off
        ("apply at www.example.org/apply/now", 0),  # goes on
        ("it has 19 rooms, www.example.org/apply", 2),
        ("it has 1995 rooms", 0),
        ("it has 19.5 rooms", 0),
        ("it has 5,19 rooms", 0),
        ("19", 1),
        ("", 0),
    ],
)
def test_verbatim_kept(reply, kept):
    persona = ["i work for www.example.org/apply", "we have 19 rooms", "we are in Rome"]
    reference = "we have 19 rooms, see www.example.org/apply"  # Rome is not called for
    assert verbatim_kept(persona, reference, reply) == (kept, 2)
    assert verbatim_kept(persona, "hello", reply) == (0, 0)


@pytest.mark.parametrize("metric", [keyword_score, fact_density, persona_overlap])
def test_an_empty_persona_has_no_share(metric):
    with pytest.raises(ValueError, match="`persona` is empty"):
        metric([], "hello")
