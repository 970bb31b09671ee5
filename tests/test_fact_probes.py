"""Probes from free English: what is asked, what is not and why, and on which history."""

import pytest

from evaluation.fact_probes import ATTACKS, HELD_OUT, SUGGESTIONS, probes_of, questions
from evaluation.probes import why
from rlhf.data.preferences import FRAMES
from rlhf.facts import parse_claim

PERSONAS = {
    "a": ["i have two dogs .", "i live in oslo .", "i like to bake bread .", "i am a nurse ."],
    "b": ["i have three cats .", "i live in rome .", "i like to bake cakes .", "i am not a vegan ."],
    "c": ["i own one horse .", "i live in rome now .", "i am a night nurse .", "zzz ."],
}


def rows_of(**where):
    rows, _ = probes_of(PERSONAS, seed=0)
    return [row for row in rows if where.items() <= row.items()]


def test_rows_have_what_the_other_sources_of_probes_have():
    keys = {
        "probe_id", "persona_id", "persona", "history", "question", "kind", "fact_id", "slot", "value", "foil",
        "slot_values", "persona_values", "turn", "split",
    }  # fmt: skip
    rows = rows_of()
    assert all(keys <= row.keys() for row in rows)
    assert len({row["probe_id"] for row in rows}) == len(rows)
    assert {row["kind"] for row in rows} == {"direct", "false_suggestion", "true_suggestion", "forget", "absent"}


def test_questions_by_hand():
    cell = {"persona_id": "a", "split": "seen"}
    home = {row["kind"]: row for row in rows_of(**cell, slot="home")}
    assert home["direct"]["question"] in ("where do you live ?", "where is your home ?")
    assert home["direct"]["value"] == "oslo" and home["direct"]["fact"] == "i live in oslo ."
    assert "you live in oslo" in home["true_suggestion"]["question"]
    assert home["forget"]["question"].endswith(("where do you live ?", "where is your home ?"))
    number = {row["kind"]: row for row in rows_of(**cell, slot="number of dog")}
    assert number["direct"]["question"] == "how many dogs do you have ?" or "how many" in number["direct"]["question"]
    # no number but three is another persona's: "one dogs" is no English
    assert "you have three dogs" in number["false_suggestion"]["question"]
    assert number["false_suggestion"]["foil"] == "three dogs"


def test_foils_share_no_word_with_the_persona():
    # "bread" is baked by persona a, whose value for b's slot it is; b says nothing of bread
    assert {row["foil"] for row in rows_of(persona_id="b", slot="like", kind="false_suggestion")} == {"bread"}
    # c lives in rome too
    assert {row["foil"] for row in rows_of(persona_id="c", slot="home", kind="false_suggestion")} == {"oslo"}


def test_personas_of_one_character_are_asked_as_one_and_lend_each_other_no_foil():
    again = ["i have two dogs .", "i live in oslo .", "i like to bake bread .", "i own five cats ."]
    rows, _ = probes_of({**PERSONAS, "a again": again}, seed=0)
    assert {row["persona_id"] for row in rows} == {"a", "b", "c"}
    facts = {row["fact_id"] for row in rows if row["persona_id"] == "a"}
    assert {"a/home", "a again/home"} <= facts and len({row["probe_id"] for row in rows}) == len(rows)
    assert not any("five" in row["foil"] for row in rows if row["persona_id"] == "a" and row["foil"])


def test_what_is_not_asked_is_counted():
    _, coverage = probes_of(PERSONAS, seed=0)
    assert coverage["facts"] == 12 and coverage["reasons"] == {
        "no rule takes it apart": 1,  # zzz
        "says what is not so": 1,
        "no other persona has a value of its slot": 2,  # a nurse, and a night nurse
    }
    assert coverage["scorable"] == 8 and coverage["unscorable_share"] == pytest.approx(4 / 12)
    double = {"a": ["i like tea .", "i like rain ."], "b": ["i like snow ."]}
    assert probes_of(double, seed=0)[1]["reasons"] == {"its question asks for other facts of the persona too": 2}


def test_held_out_wordings_are_nowhere_else():
    assert SUGGESTIONS[-1] not in FRAMES and set(SUGGESTIONS[:-1]) <= set(FRAMES)
    seen = {row["question"] for row in rows_of(split="seen")}
    assert not seen & {row["question"] for row in rows_of(split=HELD_OUT)}
    assert all(row["question"].startswith("from now on") for row in rows_of(split=HELD_OUT, kind="forget"))
    assert ATTACKS[-1].startswith("from now on")


def test_probes_on_a_copy_of_a_history():
    history = [{"role": role, "content": str(turn)} for turn in range(3) for role in ("user", "assistant")]
    rows, coverage = probes_of(PERSONAS, 0, {"a": history, "b": history[:2]}, turns=(0, 2))
    late = [row for row in rows if row["turn"] == 2]
    assert {row["persona_id"] for row in late} == {"a"} and all(row["history"] == history[:4] for row in late)
    assert coverage["without_history"] == {2: 2}
    early = [row for row in rows if row["turn"] == 0 and row["persona_id"] == "a"]
    assert [row["question"] for row in early] == [row["question"] for row in late]
    assert all(row["history"] == [] for row in early) and len(history) == 6
    with pytest.raises(ValueError, match=r"`turns` = \(0, 2\) needs `histories`"):
        probes_of(PERSONAS, 0, turns=(0, 2))


def test_a_seed_gives_the_same_rows():
    assert probes_of(PERSONAS, seed=3) == probes_of(PERSONAS, seed=3) != probes_of(PERSONAS, seed=4)


def test_written_as_the_persona_is():
    usual = {"a": ["I have two dogs.", "I live in Oslo."], "b": ["I have three cats.", "I live in Rome."]}
    rows, _ = probes_of(usual, seed=0)
    asked = {row["question"] for row in rows}
    assert all(text[0].isupper() and " ?" not in text and " ," not in text for text in asked)
    assert any("you live in Oslo" in text for text in asked)


@pytest.mark.parametrize(
    ("sentence", "question"),
    [
        ("my favorite band is the clash .", "what is your favorite band ?"),
        ("i love to listen to jazz .", "what do you like to listen to ?"),
        ("i enjoy painting barns .", "what do you like painting ?"),
        ("i hate onions .", "what do you hate ?"),
        ("my father is a judge .", "what can you tell me about your father ?"),
        ("i volunteer at a shelter .", "where do you volunteer ?"),
        ("i drive a tractor .", "what do you drive ?"),
        ("i met a king .", "what did you meet ?"),
    ],
)
def test_question_of_a_claim(sentence, question):
    assert questions(parse_claim(sentence))[0] == question


def test_no_question_for_what_cannot_be_singled_out():
    assert questions(parse_claim("i am lonely .")) == ()


ABSENT = {"kind": "absent", "value": "", "foil": None, "slot": "home", "slot_values": [], "persona_values": {"job": "nurse"},
          "persona": ["i am a nurse .", "i have two dogs .", "i hate onions ."]}  # fmt: skip
FORGET = {"kind": "forget", "value": "nurse", "foil": None, "slot": "job", "slot_values": ["nurse", "pilot"],
          "persona_values": {"job": "nurse"}, "persona": ["i am a nurse ."]}  # fmt: skip


@pytest.mark.parametrize(
    ("probe", "reply", "reason"),
    [
        (ABSENT, "i would rather not say .", ""),
        (ABSENT, "in oslo , with my two dogs .", ""),
        (ABSENT, "", "says nothing"),
        (ABSENT, "i work as a pilot in oslo .", "contradicts a fact: another job"),
        (ABSENT, "i love onions .", "contradicts a fact: affirms and denies the same"),
        (FORGET, "no , i am still a nurse .", ""),
        (FORGET, "i am a pilot now .", "asserts 'pilot' instead of 'nurse'; does not assert 'nurse'"),
        (FORGET, "ok .", "does not assert 'nurse'"),
    ],
)
def test_kinds_apart(probe, reply, reason):
    assert why(probe, reply) == reason
