"""Persona sentences taken apart by rule, for exchanging values and for asking about them."""

import pytest

from rlhf.facts import (
    Claim,
    Fact,
    as_usual,
    claim_coverage,
    lemma,
    lemmas,
    parse_claim,
    parse_fact,
    second_person,
    slot_values,
)

# sentence: (stem, value, the sentence denied)
FACTS = {
    "i have two dogs .": ("i have", "two dogs", "i do not have two dogs"),
    "I've two dogs.": ("i have", "two dogs", "i do not have two dogs"),
    "i work as a nurse.": ("i work as", "a nurse", "i do not work as a nurse"),
    "I'm an artist!": ("i am", "an artist", "i am not an artist"),
    "i am also a graduate student.": ("i am", "a graduate student", "i am not a graduate student"),
    "i really like to travel .": ("i like to", "travel", "i do not like to travel"),
    "My favourite color is grey.": ("my favorite color is", "grey", "my favorite color is not grey"),
    "gymnastics is my favorite sport.": ("my favorite sport is", "gymnastics", "my favorite sport is not gymnastics"),
    "my favorite ice cream flavor is mint": (
        "my favorite ice cream flavor is", "mint", "my favorite ice cream flavor is not mint"
    ),
    "my favorite note is c .": ("my favorite note is", "c", "my favorite note is not c"),
    "I don\u2019t drink soda.": ("i do not drink", "soda", "i drink soda"),
    "i am not a vegan .": ("i am not", "a vegan", "i am a vegan"),
    "i can't swim .": ("i can not", "swim", "i can swim"),
    "my father was a farmer .": ("my father was", "a farmer", "my father was not a farmer"),
}  # fmt: skip


@pytest.mark.parametrize("sentence", FACTS)
def test_sentence_is_taken_apart(sentence):
    stem, value, denied = FACTS[sentence]
    fact = parse_fact(sentence)
    assert fact == Fact(stem, value)
    assert fact.state(value) == f"{stem} {value}"
    assert fact.deny(value) == denied


@pytest.mark.parametrize(
    "sentence",
    [
        "", ".", "two dogs live with me .", "i went to yale .", "i have a son who is in school .", "i have visited spain .",
        "i have never been to ohio .", "i love my dog because he is kind .", "i like a , b and c .", "i have the .",
        "i work at a bar at night to pay for college .",
    ],
)  # fmt: skip
def test_no_rule_is_better_than_a_wrong_one(sentence):
    assert parse_fact(sentence) is None


def test_a_small_word_in_front_keeps_values_apart():
    keys = {text: parse_fact(text).slot for text in ("i am a nurse .", "i am an artist .", "i am from texas .")}
    assert keys["i am a nurse ."] == keys["i am an artist ."] != keys["i am from texas ."]


def test_values_by_slot():
    rows = [
        {"persona": ["i have two dogs .", "i went to yale .", "i live in oslo ."]},
        {"persona": ["i have one cat .", "i live in new york .", "i have two dogs ."]},
    ]
    assert slot_values(rows) == {
        ("i have", "", 2): ["two dogs", "one cat"],
        ("i live in", "", 1): ["oslo"],
        ("i live in", "", 2): ["new york"],
    }


CLAIMS = {
    "My name is Ada and I weave.": Claim("name", "ada"),
    "hey there i'm 31 years old.": Claim("age", "31"),
    "i'm in my fifties.": Claim("age", "fifties"),
    "my favourite colours are teal and ochre": Claim("favorite color", "teal and ochre"),
    "chess is my favorite game.": Claim("favorite game", "chess"),
    "i now live with my aunt in lisbon.": Claim("home", "lisbon"),
    "i live in a cabin with two goats": Claim("home", "cabin"),
    "i was born in peru .": Claim("birthplace", "peru"),
    "i was raised on a farm": Claim("childhood home", "farm"),
    "i moved here from chile .": Claim("origin", "chile"),
    "i'm a retired deep sea fisherman.": Claim("job", "retired deep sea fisherman"),
    "i shear sheep for a living .": Claim("job", "shear sheep"),
    "i work at a bakery to pay for college .": Claim("workplace", "bakery"),
    "i'm married to a judge": Claim("marital status", "married"),
    "i'm not a vegetarian .": Claim("diet", "vegetarian", positive=False),
    "i've long curly hair and green eyes .": Claim("hair", "long curly"),
    "i have three older brothers who tease me .": Claim(
        "number of brother", "three older brothers", ask="older brothers"
    ),
    "i have a parrot named rio": Claim("pet", "parrot"),
    "i do not have a car .": Claim("vehicle", "car", positive=False),
    "i have no pets .": Claim("pet", "pets", positive=False),
    "i really love to bake rye bread on weekends .": Claim("like", "rye bread", ask="to bake"),
    "i enjoy walking in the rain": Claim("like", "rain", ask="walking in"),
    "i can't stand opera .": Claim("like", "opera", positive=False),
    "i am terrified of moths .": Claim("fear", "moths"),
    "i'm a big opera fan": Claim("like", "opera"),
    "i want to become a pilot .": Claim("want", "pilot"),
    "i speak danish .": Claim("language", "danish"),
    "my mother was a midwife .": Claim("my mother", "midwife"),
    "my parents don't support my plans.": Claim("my parents", "support my plans", positive=False),
    "i volunteer at the zoo every month": Claim("volunteer at", "zoo"),
    "in my spare time i collect stamps .": Claim("collect", "stamps"),
    "i never won a race .": Claim("did win", "race", positive=False),
    "i drive a tractor but i hate it": Claim("drive", "tractor"),
    "i am 60years old": Claim("age", "60"),
}


@pytest.mark.parametrize("sentence", CLAIMS)
def test_claim(sentence):
    assert parse_claim(sentence) == CLAIMS[sentence]


@pytest.mark.parametrize(
    "sentence",
    [
        "", "zzz .", "do you have a dog ?", "they are always late .", "i have no friends that i trust .",
        "i have been away .", "i dance on weekends .", "i have a .", "the rain makes me sad .",
    ],
)  # fmt: skip
def test_no_claim(sentence):
    assert parse_claim(sentence) is None


def test_claims_of_exclusive_slots():
    exclusive = {
        text: parse_claim(text).exclusive for text in ("i live in rome .", "i have two cats .", "i like tea .")
    }
    assert exclusive == {"i live in rome .": True, "i have two cats .": True, "i like tea .": False}


def test_words():
    assert lemma("kids") == lemma("children") == lemma("child") and lemma("three") == "3"
    assert lemmas("I have the two baking dogs .") == {"2", "bake", "dog"}
    assert parse_claim("i own two old boats .").numbers == {2}


def test_coverage_counts_different_sentences():
    share = pytest.approx(1 / 3)
    found = claim_coverage(["i like tea .", "i like tea .", "i like rum .", "zzz ."])
    assert found == {"facts": 3, "unscorable": 1, "unscorable_share": share}
    assert claim_coverage([])["unscorable_share"] == 0


def test_wording():
    assert (
        second_person("i was glad that my dog likes me , and i am")
        == "you were glad that your dog likes you , and you are"
    )
    assert second_person("I've two cats") == "you've two cats"
    assert as_usual("yes , i have a dog .") == "Yes, I have a dog."
