"""Contradiction-free rate, grounded coverage and composite of recorded replies: values by hand."""

import pytest

from evaluation.compare import compare, reply_items
from evaluation.measures import measures, passes
from evaluation.score import score_rows

PERSONA = ["i have two dogs .", "i work as a nurse .", "i live in oslo .", "am i ?"]  # the last has no content word


def rows(*replies, dialogue="d", persona=PERSONA, users=("hi there", "what else ?", "and you ?", "so ?")):
    """A dialogue, each reply in its place."""
    found, history = [], []
    for user, reply in zip(users, replies, strict=False):
        history = [*history, {"role": "user", "content": user}]
        found.append(
            {"persona": persona, "history": history, "response": reply, "reference": None, "dialogue_id": dialogue}
        )
        history = [*history, {"role": "assistant", "content": reply}]
    return found


def value(name, found, human=None):
    measure = measures(found, human=human)[name]
    return float(measure.statistic(measure.statistics.sum(axis=0)))


def test_a_reply_contradicts_the_persona_or_an_earlier_turn():
    found = rows("i have three dogs .", "i love tea .", "no , i hate tea .", "do you live in rome ?")
    assert (
        value("contradiction_free_rate", found) == 2 / 4
    )  # three dogs against two, tea against tea; a question is none
    assert (
        value("contradiction_free_rate", [row | {"persona": []} for row in found]) == 2 / 3
    )  # the first has no claim
    assert measures([row | {"persona": []} for row in found])["contradiction_free_rate"].n == 3


def test_coverage_counts_a_fact_once_and_neither_copies_nor_contradictions_nor_echoes():
    covered = [
        (("my two dogs are lazy", "yes , the dogs !"), 1),  # dog of {2, dog} is half
        (("i work as a nurse .",), 0),  # a copy
        (("my nurse badge got lost in oslo",), 2),
        (("i live in rome . oslo is far .",), 0),  # another home
        (("",), 0),
    ]
    for replies, facts in covered:
        assert value("grounded_coverage", rows(*replies)) == facts / 3, replies
    assert value("grounded_coverage", rows("i nurse , yes", users=["are you a nurse ?"])) == 0  # the user's word
    assert measures(rows("hello", "hello again"))["grounded_coverage"].n == 3
    assert value("grounded_coverage", rows("oslo") + rows("hello", dialogue="e")) == 1 / 6
    assert "grounded_coverage" not in measures(rows("hello", persona=["am i ?"]))


def test_composite_by_hand():
    human = {"grounded_coverage": 0.5, "copy_rate": 0.1, "fact_density": 0.2}
    found = rows("it snows in oslo", "i work as a nurse .", "i have three dogs .", "well , well")
    # covered 1 of 3; 1 of 4 contradicted; 1 of 4 copied; 3 replies touch one of the four sentences each
    expected = (1 / 3 / 0.5) * (3 / 4) * (1 - (1 / 4 - 0.1)) * (0.2 / (3 / 4 / 4))
    assert 0.2 / (3 / 4 / 4) > 1  # fewer facts a reply than people: that factor is 1
    assert value("persona_composite", found, human) == pytest.approx(expected / (0.2 / (3 / 4 / 4)))
    packed = human | {"fact_density": 0.1}
    assert value("persona_composite", found, packed) == pytest.approx(expected / (0.2 / (3 / 4 / 4)) * 0.1 / (3 / 16))
    assert value("persona_composite", rows(""), human) == 0
    assert "persona_composite" not in measures(found) and "persona_composite" not in measures(found, human={})


def test_decodings_are_passes_of_their_own():
    first, second = rows("it snows in oslo", "fine"), rows("hello", "the dogs bark")
    both = [row for pair in zip(first, second, strict=True) for row in pair]
    # the second turns have other histories, so that they are no decodings of one prompt
    assert passes(both, range(4)) == [[0, 2, 3], [1]]
    same = [row for row in rows("it snows in oslo") for _ in range(2)]
    assert passes(same, range(2)) == [[0], [1]]
    assert value("grounded_coverage", same) == 1 / 3


def test_paired_difference_is_that_of_the_scores():
    human = {"grounded_coverage": 0.5, "copy_rate": 0.1, "fact_density": 0.2}
    towns = [[f"i live in town{n} .", "i work as a nurse ."] for n in range(12)]
    one = [r for n, p in enumerate(towns) for r in rows(f"it snows in town{n}", "well", dialogue=str(n), persona=p)]
    two = [r | {"response": "hello"} if n % 4 == 0 else r for n, r in enumerate(one)]
    compared = compare(reply_items(one, human=human), reply_items(two, human=human), num_resamples=200, num_trials=200)
    for name in ("contradiction_free_rate", "grounded_coverage", "persona_composite"):
        assert compared[name]["difference"] == pytest.approx(value(name, one, human) - value(name, two, human))
    assert (compared["grounded_coverage"]["a"], compared["grounded_coverage"]["b"]) == (1 / 2, 1 / 4)
    assert compared["grounded_coverage"]["n"] == 12  # dialogues
    assert compared["grounded_coverage"]["ci_low"] > 0 and compared["grounded_coverage"]["p_value"] < 0.05


def test_silence_never_contradicts_and_covers_nothing():
    found = [row for n in range(4) for row in rows("", "", dialogue=str(n))]
    scored = score_rows(found, num_resamples=50)["metrics"]
    assert (scored["contradiction_free_rate"]["value"], scored["grounded_coverage"]["value"]) == (1, 0)
    assert scored["contradiction_free_rate"]["ci_low"] < 1  # Wilson over dialogues, not a width of zero
