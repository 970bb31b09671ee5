"""Guards: the limits on both sides, and what is not known."""

import pytest

from evaluation import METRICS
from evaluation.guards import GUARDS, WITHOUT_PEOPLE, check, verdict

PEOPLE = {
    "copy_rate": 0.02, "fact_density": 0.1, "length_words": 10.0, "ead": 0.5, "repetition": 0.01, "question_rate": 0.3,
    "uptake": 0.1,
}  # fmt: skip


def broken(**changes):
    return [label for label, _, passed in check(PEOPLE | changes, PEOPLE) if passed is False]


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"copy_rate": 0.021}, "copy rate above the human 95th percentile"),
        ({"fact_density": 0.201}, "facts a reply ratio"),
        ({"fact_density": 0.049}, "facts a reply ratio"),
        ({"length_words": 20.1}, "length ratio"),
        ({"length_words": 4.9}, "length ratio"),
        ({"ead": 0.39}, "EAD ratio"),
        ({"repetition": 0.041}, "repetition change"),
        ({"question_rate": 0.51}, "question rate change"),
        ({"question_rate": 0.09}, "question rate change"),
        ({"uptake": 0.049}, "uptake of the user's words ratio"),
        ({"uptake": 0.201}, "uptake of the user's words ratio"),
        ({"kl_reference": 5.1}, "KL to SFT"),
    ],
)
def test_each_limit(changes, label):
    assert broken(**changes) == [label]


def test_within_the_limits():
    assert broken() == [] == broken(copy_rate=0.0, fact_density=0.051, length_words=19.9, ead=0.9, question_rate=0.49)
    assert verdict(check(PEOPLE, PEOPLE)) == ("all pass", "")
    assert verdict(check(PEOPLE | {"ead": 0.1}, PEOPLE)) == ("NOT COMPARABLE", "EAD ratio")


def test_what_is_not_known_is_no_pass():
    silent = {name: value for name, value in PEOPLE.items() if name not in ("ead", "repetition")}
    assert verdict(check(silent, PEOPLE)) == ("not checked", "EAD ratio, repetition change")
    assert verdict(check(PEOPLE, PEOPLE | {"copy_rate": None}))[0] == "not checked"
    # what the yardstick is not about at all is left out: SFT says nothing of how much people copy
    few = {name: PEOPLE[name] for name in WITHOUT_PEOPLE}
    assert len(check(PEOPLE | {"copy_rate": 1.0}, few)) == len(few)
    assert verdict(check(PEOPLE, PEOPLE | {"fact_density": 0.0}))[0] == "not checked"  # nothing is twice nothing


def test_guards_are_of_metrics():
    assert {guard.metric for guard in GUARDS} <= set(METRICS)
    assert set(WITHOUT_PEOPLE) < {guard.metric for guard in GUARDS}
