"""What a reply says of the persona's facts: marks worked out by reading the replies."""

import importlib.util

import pytest

from evaluation.dialogues import Mark, probe_marks, sentence_marks, vocabulary

PERSONA = ["i work as a lawyer .", "i have a dog .", "i want to visit london ."]
ROW = {
    "kind": "direct", "persona": PERSONA, "persona_values": {"job": "lawyer", "pet": "dog", "trip": "london"},
    "slot": "job", "value": "lawyer", "foil": None, "slot_values": ["lawyer", "nurse", "baker"],
}  # fmt: skip
KNOWN = vocabulary(
    [
        ROW,
        {"slot": "pet", "slot_values": ["dog", "cat"]},
        {"slot": "home", "slot_values": ["rome", "london"]},
        {"slot": "trip", "slot_values": ["rome", "london"]},
        {"slot": "food", "slot_values": ["curry"], "exclusive": False},
    ]
)


@pytest.mark.parametrize(
    ("reply", "marks"),
    [
        ("i am a lawyer .", [("supported", "job: lawyer")]),
        ("i am a nurse .", [("contradicted", "job: nurse, not lawyer")]),
        ("i am not a lawyer .", [("contradicted", "job: denies lawyer")]),
        ("i have two dogs .", [("contradicted", "pet: another number of dog")]),
        ("i am a lawyer and i have a cat .", [("supported", "job: lawyer"), ("contradicted", "pet: cat, not dog")]),
        ("i love curry .", [("invented", "food: curry")]),
        ("i have been to rome .", [("invented", "home or trip: rome")]),
        ("are you a lawyer ?", []),
        ("what a nice day .", []),
        ("", []),
    ],
)
def test_direct_question(reply: str, marks: list[tuple[str, str]]) -> None:
    assert probe_marks(ROW, reply, KNOWN) == [Mark(*mark) for mark in marks]


def test_suggestions_speak_through_yes_and_no() -> None:
    true = {**ROW, "kind": "true_suggestion"}
    assert probe_marks(true, "yes , i do .", KNOWN) == [Mark("supported", "job: lawyer, by its yes")]
    assert probe_marks(true, "no .", KNOWN) == [Mark("contradicted", "job: rejects lawyer")]
    false = {**ROW, "kind": "false_suggestion", "foil": "nurse"}
    assert probe_marks(false, "yes , that is right .", KNOWN) == [
        Mark("contradicted", "job: agrees to nurse, not lawyer")
    ]
    assert probe_marks(false, "no , i am a lawyer .", KNOWN) == [Mark("supported", "job: lawyer")]


def test_free_dialogue_is_marked_by_half_of_a_fact() -> None:
    persona = ["i have two red cars .", "i like jazz ."]
    assert sentence_marks(persona, "my cars are red , and you ?")[0] == Mark("supported", persona[0])
    assert sentence_marks(persona, "nice weather .") == []


@pytest.mark.skipif(
    importlib.util.find_spec("evaluation.contradiction") is None, reason="evaluation/contradiction.py is not there"
)
def test_free_dialogue_is_marked_by_contradictions() -> None:
    (mark,) = sentence_marks(["i am a vegetarian ."], "i eat steak every day .")
    assert mark.kind == "contradicted" and mark.text.startswith("i am a vegetarian . (")
