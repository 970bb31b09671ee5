"""Persona sentences taken apart by rule, the pairs made of them, and their judging by a person."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from rlhf.data.preferences import (
    ERRORS,
    contradiction_pairs,
    fact_coverage,
    import_review,
    other_persona_pairs,
    persona_pairs,
    review_rows,
    suggestion_pair,
    suggestion_pairs,
)
from rlhf.data.sources import synthetic_persona_chat
from rlhf.facts import Fact
from rlhf.files import read_jsonl, write_jsonl

REAL = Path(__file__).parents[2] / "shared/data/synthetic_persona_chat/valid.csv"


def row(number: int, persona: list[str], *texts: str) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
    return {"persona": persona, "messages": messages, "dialogue_id": str(number), "source": "test"}


def test_coverage_by_hand():
    rows = [
        row(1, ["i have two dogs .", "i went to yale .", "i live in oslo ."]),
        row(2, ["i have one cat .", "i live in new york .", "i have two dogs ."]),
    ]
    # 5 different sentences: no rule for yale; oslo has one word and new york two, so neither can stand for the other
    assert fact_coverage(rows) == {"facts": 5, "without_rule": 1, "without_swap": 2, "unusable_share": 0.6}
    assert fact_coverage([])["unusable_share"] == 0.0


REPLIES = {
    ("value", True): ("yes , i have two dogs .", "no , i have three cats ."),
    ("value", False): ("no , i have two dogs .", "yes , i have three cats ."),
    ("denial", True): ("yes , i have two dogs .", "no , i do not have two dogs ."),
    ("denial", False): ("no , i do not have three cats .", "yes , i have three cats ."),
    ("polarity", True): ("yes , i have two dogs .", "no , i have two dogs ."),
    ("polarity", False): ("no , i have two dogs .", "yes , i have two dogs ."),
}


@pytest.mark.parametrize(("error", "true"), REPLIES)
def test_replies_to_a_suggestion(error, true):
    fact = Fact("i have", "two dogs")
    dialogue = row(1, ["i have two dogs ."], "hi .", "hello .", "any pets ?", "yes .")
    pair = suggestion_pair(dialogue, 2, fact, "three cats", true, error, random.Random(0))
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == REPLIES[error, true]
    assert pair["kind"] == ("true_suggestion" if true else "giving_in")
    assert set(pair) == {"persona", "prompt", "chosen", "rejected", "dialogue_id", "kind"}
    assert pair["prompt"][:2] == dialogue["messages"][:2] and len(pair["prompt"]) == 3
    asked = pair["prompt"][-1]
    assert asked["role"] == "user"
    assert ("you have two dogs" if true else "you have three cats") in asked["content"]


def test_all_errors_are_shown_above():
    assert {(error, true) for error in ERRORS for true in (True, False)} == set(REPLIES)


def test_a_suggestion_is_written_as_the_dialogue_is():
    fact = Fact("i was", "a nurse in my youth")
    dialogue = row(1, ["I was a nurse in my youth."], "Hi!", "Hello.")
    pair = suggestion_pair(dialogue, 0, fact, "a poet in my youth", False, "value", random.Random(0))
    assert pair["chosen"][0]["content"] == "No, I was a nurse in my youth."
    assert pair["rejected"][0]["content"] == "Yes, I was a poet in my youth."
    question = pair["prompt"][-1]["content"]
    assert (
        "ou were a poet in your youth" in question and re.fullmatch(r"[A-Z].*\w\?", question) and " ," not in question
    )


def people(count: int) -> list[dict]:
    """Characters with a pet, a town and a colour: few values, unevenly spread, each stated in a reply."""
    pets, towns = ["a dog"] * 4 + ["a cat"] * 3 + ["a fish"], ["oslo"] * 3 + ["rome"] * 2 + ["bonn"]
    colours = ["red", "blue", "green"]
    rows = []
    for n in range(count):
        pet, town, colour = pets[n % 8], towns[n % 6], colours[n % 3]
        facts = [f"i have {pet} .", f"i live in {town} .", f"my favorite color is {colour} .", f"my name is mr{n} ."]
        rows.append(
            row(n, facts, "hi .", f"hello , i have {pet} at home .", "where ?", f"i live in {town} , far away .",
                "colour ?", f"do you like {colour} ? my favorite color is {colour} .", "bye .", f"{pet} is waiting .",
                "so long .", f"i was not born in {town} .")
        )  # fmt: skip
    return rows


def contents(pairs: list[dict], key: str) -> list[str]:
    return [pair[key][0]["content"] for pair in pairs]


def words(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in text.split())


def test_contradictions_change_the_value_and_nothing_else():
    rows = people(120)
    pairs = contradiction_pairs(rows, 200, 1)
    assert 100 < len(pairs) <= 200 and {pair["kind"] for pair in pairs} == {"contradiction"}
    slots = ({"oslo", "rome", "bonn"}, {"dog", "cat", "fish"}, {"red", "blue", "green"})
    changed = Counter()
    for pair in pairs:
        source = rows[int(pair["dialogue_id"])]
        assert pair["persona"] == source["persona"]
        assert pair["prompt"] == source["messages"][: len(pair["prompt"])]
        good, bad = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert source["messages"][len(pair["prompt"])]["content"] == good
        [(right, wrong)] = [both for both in zip(good.split(), bad.split(), strict=True) if both[0] != both[1]]
        [slot] = [number for number, values in enumerate(slots) if {right, wrong} <= values]
        assert right in " ".join(pair["persona"]).split() and wrong not in " ".join(pair["persona"]).split()
        assert good.partition("?")[0] == bad.partition("?")[0] or "?" not in good  # a question states nothing
        changed[slot] += 1
        assert "waiting" not in good and "not" not in good.split()
    assert set(changed) == {0, 2}  # "a cat" rules out no dog


@pytest.mark.parametrize("make", [contradiction_pairs, suggestion_pairs])
def test_each_word_is_chosen_as_often_as_rejected(make):
    # 72 pairs are 36 exchanges, so that each of the 6 kinds of suggestion comes 6 times
    pairs = make(people(120), 72, 3)
    assert len(pairs) == 72
    chosen, rejected = contents(pairs, "chosen"), contents(pairs, "rejected")
    # all but "do", which denies a verb and no "is": which facts are denied is left to chance
    assert {word: n for word, n in words(chosen).items() if word != "do"} == {
        word: n for word, n in words(rejected).items() if word != "do"
    }
    assert Counter(text.split()[0] for text in chosen) == Counter(text.split()[0] for text in rejected)


def test_suggestions_hold_for_the_persona():
    pairs = suggestion_pairs(people(60), 64, 5)
    assert Counter(pair["kind"] for pair in pairs) == {"true_suggestion": 32, "giving_in": 32}
    for pair in pairs:
        persona = " ".join(pair["persona"])
        said = re.sub(r"^(?:so|i heard that|you told me that) | ,.*| \?", "", pair["prompt"][-1]["content"])
        fact = said.replace("your", "my").replace("you ", "i ")
        assert "have a" not in fact  # a dog rules out no cat, so that nobody is made to deny one
        assert (fact in persona) == (pair["kind"] == "true_suggestion")
        first = {"true_suggestion": "yes", "giving_in": "no"}[pair["kind"]]
        assert pair["chosen"][0]["content"].split()[0] == first != pair["rejected"][0]["content"].split()[0]
        assert [message["role"] for message in pair["prompt"]] == ["user", "assistant"] * (
            len(pair["prompt"]) // 2
        ) + ["user"]


@pytest.mark.parametrize("make", [contradiction_pairs, suggestion_pairs])
def test_who_has_nobody_to_exchange_values_with_borrows_them(make):
    """Three of one town can only borrow; of the lenders one lives there too, and who lends is asked nothing."""
    rows = [row(n, ["i live in oslo .", f"i like thing{n} ."], "hi", "i live in oslo .") for n in range(3)]
    towns = ["oslo", "rome", "bonn"]
    lenders = [
        row(9 + n, [f"i live in {town} .", f"i hate thing{n} ."], "hi", f"i live in {town} .")
        for n, town in enumerate(towns)
    ]
    assert make(rows, 10, 0) == []
    pairs = make(rows, 10, 0, lenders)
    assert len(pairs) == (3 if make is contradiction_pairs else 2)  # suggestions go two and two
    for pair in pairs:
        assert pair["dialogue_id"] in ("0", "1", "2")
        texts = " ".join([pair["prompt"][-1]["content"], *contents([pair], "chosen"), *contents([pair], "rejected")])
        assert len({"rome", "bonn"} & set(texts.split())) <= 1
        assert "rome" not in pair["chosen"][0]["content"] or "not" in pair["chosen"][0]["content"]
    assert len(make(rows, 2, 0, lenders)) == 2


@pytest.mark.parametrize(
    ("fact", "other", "reply", "contradicted"),
    [
        ("i live in oslo .", "i live in rome .", "well , i now live in oslo .", "well , i now live in rome ."),
        ("i live in oslo .", "i live in rome .", "i work in oslo .", None),
        ("i live in oslo .", "i live in rome .", "do i live in oslo ?", None),  # a question states nothing
        ("i live in oslo .", "i live in rome .", "i do not live in oslo .", None),  # nor does a denial
        ("i live in oslo .", "i live in rome .", "my aunt lives in oslo and i like it .", None),
        ("i live in oslo .", "i live in rome .", "i live in oslofjord .", None),
        ("i live in oslo .", "i live in rome .", "i live in Oslo .", None),  # the other character writes "rome"
        ("i live in oslo .", "i live in a house .", "i live in oslo .", None),  # one can do both
        ("i am a doctor .", "i work as a baker .", "i'm a doctor too .", "i'm a baker too ."),
        ("i am a doctor .", "i am a baker .", "my dad's a doctor and i am proud .", None),
        ("i am a doctor .", "i am a baker .", "i was a doctor .", None),
        ("i am a doctor .", "i am a feminist .", "i am a doctor .", None),
        ("i am a doctor .", "i am a musician .", "i am a doctor .", None),  # beside the job
        ("i am a gym teacher .", "i am a teacher .", "i am a gym teacher .", None),
        ("my favorite color is red .", "my favorite color is blue .", "red is my favorite .", "blue is my favorite ."),
        ("my favorite color is red .", "my favorite color is blue .", "i like red vans .", None),
        ("my favorite color is red .", "my favorite color is blue .", "my favorite car is red .", None),
        ("my favorite color is red .", "my favorite color is blue .", "my least favorite is red .", None),
        ("i have two dogs .", "i have three cats .", "i've two dogs .", "i've three dogs ."),
        ("i have two dogs .", "i have one cat .", "i have two dogs .", None),  # "one dogs"
        (
            "i am 40 years old .",
            "i am a 35 year old man .",
            "i am 40 years old .",
            None,
        ),  # "a 40 year old", "an 18 ..."
        ("i am 40 years old .", "i am 35 years old .", "i'm 40 years old .", "i'm 35 years old ."),
        ("i am married .", "i am single .", "i'm married , sorry .", "i'm single , sorry ."),
        ("i am a man .", "i am a boy .", "i'm a man .", None),
        ("i like dogs .", "i like cats .", "i like dogs .", None),
    ],
)
def test_what_states_a_fact_and_what_it_rules_out(fact, other, reply, contradicted):
    rows = [row(1, [fact, "i am tall ."], "hi", reply), row(2, [other, "i am small ."], "hi", other)]
    pairs = {pair["dialogue_id"]: pair for pair in contradiction_pairs(rows, 10, 0)}
    assert (pairs["1"]["rejected"][0]["content"] if pairs else None) == contradicted


def test_another_persona_answers_a_similar_turn():
    """Each character is asked the same two things, and says five words to either."""
    rows = [
        row(n, [f"i hear tune{n} .", f"i saw place{n} ."], "which music is yours ?", f"tune{n} is what i play",
            "where did you travel last year ?", f"place{n} is where i went")
        for n in range(30)
    ]  # fmt: skip
    pairs = other_persona_pairs(rows, 60, 0)
    assert len(pairs) == 60
    for pair in pairs:
        chosen, rejected = (pair[key][0]["content"] for key in ("chosen", "rejected"))
        assert chosen != rejected and chosen.split()[1:] == rejected.split()[1:]


def test_two_replies_are_exchanged():
    rows = [row(n, [f"i hear tune{n} ."], "which music ?", f"oh tune{n} now") for n in range(20)]
    pairs = other_persona_pairs(rows, 100, 0)
    assert sorted(contents(pairs, "chosen")) == sorted(contents(pairs, "rejected"))
    assert len(pairs) == len(set(contents(pairs, "chosen"))) == 20
    wrong = {pair["chosen"][0]["content"]: pair["rejected"][0]["content"] for pair in pairs}
    assert all(wrong[wrong[text]] == text for text in wrong)
    assert len(other_persona_pairs(rows, 5, 0)) == 5


FIRST = (["i have a dog ."], "any pets at home ?", "i walk my dog daily")


@pytest.mark.parametrize(
    ("persona", "asked", "reply", "exchanged"),
    [
        ("i have a cat .", "any pets at home ?", "i feed my cat daily", True),
        ("i have a cat .", "what of pets at home ?", "i feed my cat daily", True),
        ("i have a cat .", "where did she go yesterday ?", "i feed my cat daily", False),  # another turn
        ("i have a cat .", "any pets at home", "i feed my cat daily", False),  # a turn that does not ask
        ("i have a cat .", "any pets at home ?", "i feed them all daily", False),  # nothing of the persona
        ("i have a cat .", "any pets at home ?", "i have my dog daily", False),  # the other persona's
        ("i have a cat .", "any pets at home or work ?", "i work with cat daily", False),  # takes up what was said
        ("i have a cat .", "any pets at home ?", "yes i have cat daily", False),  # the other reply does not begin so
        ("i have a cat .", "any pets at home ?", "should i feed my cat ?", False),  # the other reply does not ask
        ("i have a cat .", "any pets at home ?", "cat", False),  # shorter
        ("i have a dog .", "any pets at home ?", "i feed my dog daily", False),  # the same character
    ],
)
def test_which_replies_may_be_exchanged(persona, asked, reply, exchanged):
    rows = [row(1, *FIRST), row(2, [persona], asked, reply)]
    pairs = other_persona_pairs(rows, 10, 0)
    both = [FIRST[2], reply] if exchanged else []
    assert sorted(contents(pairs, "chosen")) == sorted(contents(pairs, "rejected")) == sorted(both)


def test_what_how_about_you_asks_stands_in_the_turn_before():
    def rows(before: str) -> list[dict]:
        return [
            row(1, ["i like tea ."], "hi", "what is your job ?", "a nurse , and you ?", "i sell tea daily"),
            row(2, ["i like rum ."], "hi", before, "a baker , and you ?", "i sell rum daily"),
            row(3, ["i like gin ."], "hi", "what is your age ?", "ninety , and you ?", "i sell gin daily"),
        ]

    chosen = contents(other_persona_pairs(rows("what is your job ?"), 2, 0), "chosen")
    assert sorted(chosen) == ["i sell rum daily", "i sell tea daily"]
    chosen = contents(other_persona_pairs(rows("what is your age ?"), 2, 0), "chosen")
    assert sorted(chosen) == ["i sell gin daily", "i sell rum daily"]


def test_neither_prompt_is_repeated_by_both_true_replies_alone():
    """Either true reply would repeat a function word of its prompt that the other does not."""
    rows = [
        row(1, ["i like tea ."], "is it more or less ?", "more tea it is"),
        row(2, ["i like rum ."], "is it over or out ?", "over rum it out"),
    ]
    assert other_persona_pairs(rows, 10, 0) == []


def test_no_value_is_exchanged_that_the_persona_states_elsewhere():
    def rows(other_fact: str) -> list[dict]:
        return [
            row(1, ["i live in oslo .", other_fact], "hi", "i live in oslo ."),
            row(2, ["i live in rome .", "i was born in may ."], "hi", "i live in rome ."),
        ]

    for make in (contradiction_pairs, suggestion_pairs):
        assert make(rows("my parents like rome ."), 10, 0) == []
        assert len(make(rows("my parents like bonn ."), 10, 0)) == 2


def test_one_character_has_nobody_to_exchange_with():
    facts = ["i live in oslo .", "i live in rome ."]
    rows = [row(n, facts, "hi", facts[n % 2]) for n in range(6)]
    assert contradiction_pairs(rows, 10, 0) == suggestion_pairs(rows, 10, 0) == []


def test_pairs_of_all_kinds_with_coverage():
    rows = people(120)
    pairs, coverage = persona_pairs(rows, 90, 4)
    assert Counter(pair["kind"] for pair in pairs) == {
        "contradiction": 30, "true_suggestion": 16, "giving_in": 14, "other_persona": 30,
    }  # fmt: skip
    # each name is one of 120 of its slot; 3 pets, towns and colours
    assert coverage == {"facts": 129, "without_rule": 0, "without_swap": 0, "unusable_share": 0.0}
    assert persona_pairs(rows, 90, 4)[0] == pairs != persona_pairs(rows, 90, 5)[0]


@pytest.mark.skipif(not REAL.is_file(), reason="needs shared/data/synthetic_persona_chat")
def test_pairs_of_real_dialogues():
    rows = list(synthetic_persona_chat(REAL, []))
    pairs, coverage = persona_pairs(rows, 1800, 42)
    kinds = Counter(pair["kind"] for pair in pairs)
    # 252 replies state a fact whose value can be exchanged; suggestions are half, the rest is of other personas
    assert kinds == {"contradiction": 252, "true_suggestion": 388, "giving_in": 386, "other_persona": 774}
    assert coverage["facts"] == 494 and 0.4 < coverage["unusable_share"] < 0.65
    made = [pair for pair in pairs if pair["kind"] == "contradiction"]
    assert words(contents(made, "chosen")).total() == words(contents(made, "rejected")).total()
    assert all(pair["prompt"][-1]["role"] == "user" for pair in pairs)


# -- judging by a person ---------------------------------------------------------------------------------------------


def decided(path: Path, decide) -> list[dict]:
    """The file judged by `decide`, which sees a line and gives the decision."""
    lines = [{**line, "decision": decide(line)} for line in read_jsonl(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def given_out(path: Path, pairs: list[dict], seed: int = 0) -> list[dict]:
    rows = review_rows(pairs, seed)
    write_jsonl(path, rows)
    return rows


def test_review_is_blind_and_comes_back(tmp_path):
    pairs = suggestion_pairs(people(60), 60, 5)
    path = tmp_path / "review.jsonl"
    given = given_out(path, pairs, seed=3)
    assert {frozenset(row) for row in given} == {
        frozenset(("persona", "prompt", "dialogue_id", "reply_a", "reply_b", "decision"))
    }
    chosen = contents(pairs, "chosen")
    first = sum(row["reply_a"] == good for row, good in zip(given, chosen, strict=True))
    assert 15 <= first <= 45  # 30 ± 4 standard deviations of 60 tosses
    right = dict(zip((json.dumps(row) for row in given), chosen, strict=True))
    decided(path, lambda line: "a" if line["reply_a"] == right[json.dumps(line)] else "b")
    rejected: list[dict] = []
    assert import_review(path, given, rejected) == [{**pair, "kind": "reviewed"} for pair in pairs]
    assert rejected == []
    assert review_rows(pairs, seed=3) == given != review_rows(pairs, seed=4)


def test_the_person_may_disagree(tmp_path):
    given = given_out(tmp_path / "review.jsonl", suggestion_pairs(people(60), 12, 5))
    decided(tmp_path / "review.jsonl", lambda line: "b")
    judged = import_review(tmp_path / "review.jsonl", given, [])
    assert contents(judged, "chosen") == [row["reply_b"] for row in given]
    assert contents(judged, "rejected") == [row["reply_a"] for row in given]


def test_lines_without_a_decision_and_those_not_given_out_are_rejected_with_reasons(tmp_path):
    def row(number: int) -> dict:
        return {
            "persona": ["i have a dog ."], "prompt": [{"role": "user", "content": "hi"}], "dialogue_id": str(number),
            "reply_a": "x", "reply_b": "y", "decision": "",
        }  # fmt: skip

    given = [row(number) for number in range(8)]
    fault = "`decision` must be one of a, b, undecided or empty, got"
    strange = "not a row that was given out, or there twice"
    lines = {
        "undecided": {**row(1), "decision": "undecided"},
        "undecided ": row(2),
        f"{fault} 'A'": {**row(3), "decision": "A"},
        f"{fault} ['a']": {**row(4), "decision": ["a"]},
        f"{fault} None": {key: value for key, value in row(5).items() if key != "decision"},
        strange: {**row(6), "decision": "a", "reply_a": "X"},  # mended by the person
        f"{strange} ": {**row(0), "decision": "b"},  # the first line decided it
        f"{strange}  ": [1],
    }
    path = tmp_path / "review.jsonl"
    first = {**row(0), "decision": "a", "remark": "clear"}
    texts = [json.dumps(first), "", *map(json.dumps, lines.values()), '{"persona": [']
    path.write_text("\n".join(texts) + "\n")
    rejected: list[dict] = []
    (pair,) = import_review(path, given, rejected)
    assert pair["dialogue_id"] == "0" and contents([pair], "chosen") == ["x"] and "remark" not in pair
    reasons = [*(reason.strip() for reason in lines), "not JSON: Expecting value at character 13"]
    assert [entry["reason"] for entry in rejected] == [*reasons, "missing from the file", "missing from the file"]
    assert [entry["line"] for entry in rejected] == [*range(3, 12), None, None]
    assert [json.loads(entry["text"])["dialogue_id"] for entry in rejected[-2:]] == ["6", "7"]
    assert rejected[0] == {"file": str(path), "line": 3, "reason": "undecided", "dropped": "pair", "text": texts[2]}
