"""Faults and score of replies on boundary cases, bad replies in a dialogue, and counts on real files where present."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from rlhf.data import scripts, sources, world
from rlhf.data.quality import (
    KIND_OF_SOURCE,
    STANDARDS,
    Standard,
    distinct_trigrams,
    faults,
    mark_bad_replies,
    score,
    score_parts,
)
from rlhf.prepare import READERS

DATA = Path(__file__).parents[2] / "shared/data"
CHAT, SCRIPT, ANSWERS, EXPERT = (STANDARDS[name] for name in ("chat", "script", "answers", "expert"))
ANY_SCORE = {name: dataclasses.replace(standard, min_score=0.0) for name, standard in STANDARDS.items()}


@pytest.mark.parametrize(
    ("text", "kind", "reasons"),
    [
        ("ninechars", "script", ["under 10 characters"]),
        (" ninechars ", "script", ["under 10 characters"]),
        ("ten chars.", "script", []),
        ("ninechars", "expert", ["under 10 characters"]),
        ("yes .", "chat", []),
        ("No.", "answers", []),
        ("?", "chat", ["no letter or digit"]),
        ("...", "answers", ["no letter or digit"]),
        ("", "chat", ["no letter or digit"]),
        ("<noinput>", "answers", ["no letter or digit"]),
        ("1963", "answers", []),
        ("[He leaves the room.", "chat", ["begins with [ or ends with ]"]),
        ("I leave the room. [exit]", "script", ["begins with [ or ends with ]"]),
        ("I leave [slowly] the room.", "script", []),
        ("It is *so* hot, really.", "chat", []),
        ("It is *so* hot, *really.", "chat", ["more than 2 asterisks"]),
        ("**Bold** answers are fine.", "answers", []),
        ("**Bold** answers are fine.", "expert", []),
        ("Here it is:\n```\na * b * c * d\n```", "script", []),
        ("Sure!\nUser 2: and you?", "chat", ["speaks for another"]),
        ("Bot: hello there", "chat", ["speaks for another"]),
        ("I am a user: a happy one.", "chat", []),
        # 12 words, 10 trigrams, 3 different ones; then 11 words, which are too few to judge
        ("a b c a b c a b c a b c", "chat", ["goes round in circles"]),
        ("a b c a b c a b c a b", "chat", []),
        # 12 words, 10 trigrams, exactly half of them different: a b c d e over and over
        ("a b c d e a b c d e a b", "chat", []),
    ],
)
def test_a_reply_has_the_faults_of_its_kind(text, kind, reasons):
    assert faults(text, ANY_SCORE[kind]) == reasons


def test_thresholds_are_the_standards():
    strict = Standard(
        min_characters=30, max_asterisks=0, characters=(1, 100), weights={"complete": 1.0}, min_score=0.5
    )
    assert faults("it is *short", strict) == [
        "under 30 characters",
        "more than 0 asterisks",
        "score under 0.5",
    ]
    assert faults("this is a reply long enough, with an end.", strict) == []


@pytest.mark.parametrize(
    ("text", "share"), [("", 1.0), ("a b", 1.0), ("a b c", 1.0), ("a A a a", 0.5), ("a b c d", 1)]
)
def test_distinct_trigrams(text, share):
    assert distinct_trigrams(text) == share


def test_each_kind_weighs_parts_that_exist_to_one():
    parts = score_parts("x", CHAT)
    for standard in STANDARDS.values():
        assert set(standard.weights) <= set(parts)
        assert sum(standard.weights.values()) == pytest.approx(1.0, abs=1e-12)  # sums of decimal fractions


@pytest.mark.parametrize(
    ("text", "part", "value"),
    [
        ("x" * 10, "length", 1.0),
        ("x" * 100, "length", 1.0),
        ("x" * 5, "length", 0.5),
        ("x" * 200, "length", 0.5),
        ("", "length", 0.0),
        ("It ends.", "complete", 1.0),
        ("It ends. 😀", "complete", 1.0),
        ("It breaks off and", "complete", 0.0),
        ("As the transcript says, no.", "own_words", 0.0),
        ("In this video we see it.", "own_words", 0.0),
        ("Transcription is a process in cells.", "own_words", 1.0),
        ("Plain words.", "formatting", 0.0),
        ("Plain words.", "plain", 1.0),
        ("- one\n- two", "formatting", 0.5),
        ("It is **bold**.\n\n1. one\n2. two", "formatting", 1.0),
        ("# Head\n\n- one **two** `three`", "formatting", 1.0),
        ("3 * 4 * 5 = 60", "formatting", 0.0),
        ("It is *so* hot.", "plain", 0.5),
    ],
)
def test_parts_of_the_score(text, part, value):
    standard = dataclasses.replace(CHAT, characters=(10, 100))
    assert score_parts(text, standard)[part] == value


def test_markdown_counts_for_an_expert_and_against_a_chat():
    plain = "Take the tablets with water. " * 10
    marked = "**Tablets**\n\n- take them with water.\n- do not break them.\n" + "Take care of what you eat today. " * 5
    assert score(marked, EXPERT) - score(plain, EXPERT) == pytest.approx(0.4)  # the weight of the formatting
    assert score("Yes, **I** do!\n\n- really.", CHAT) == pytest.approx(0.8)  # all but `plain`, 0.2
    assert score("Yes, I do! Really.", CHAT) == pytest.approx(1.0)


def test_a_score_is_the_weighted_sum_and_is_held_to_the_threshold():
    # 67 of at least 134 characters: 0.5 x 0.2; no markdown; it ends; its own words
    text = "x" * 66 + "."
    assert score(text, EXPERT) == pytest.approx(0.1 + 0.0 + 0.2 + 0.2)
    assert faults(text, EXPERT) == ["score under 0.7"]
    assert faults(text, dataclasses.replace(EXPERT, min_score=0.49)) == []


@pytest.mark.parametrize("standard", STANDARDS.values())
@pytest.mark.parametrize("text", ["", " ", "a", "*" * 50, "a " * 5000, "\n\n# x\n" * 50, "😀"])
def test_a_score_is_between_0_and_1(standard, text):
    assert 0.0 <= score(text, standard) <= 1.0


def test_every_reader_of_rows_has_a_kind():
    assert set(KIND_OF_SOURCE.values()) <= set(STANDARDS)
    assert set(KIND_OF_SOURCE) == set(READERS) - {"hub"}  # whose rows carry the name of the format that they are of


def row_of(*contents: str) -> dict:
    """A dialogue that the user opens."""
    messages = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(contents)]
    return {"persona": ["i ski ."], "messages": messages, "dialogue_id": "d1", "source": "test"}


def test_a_bad_reply_stays_as_context():
    row = row_of("hi", "[waves]", "any pets ?", "yes , a dog .")
    rejected: list[dict] = []
    assert list(mark_bad_replies([row], CHAT, "file.csv", rejected)) == [
        {
            **row,
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "[waves]", "train": False},
                {"role": "user", "content": "any pets ?"},
                {"role": "assistant", "content": "yes , a dog ."},
            ],
        }
    ]
    assert rejected == [
        {
            "file": "file.csv",
            "dialogue_id": "d1",
            "turn": 2,
            "reason": "begins with [ or ends with ]",
            "dropped": "training",
            "text": "[waves]",
        }
    ]
    assert "train" not in row["messages"][1]  # the row that came in is left alone


@pytest.mark.parametrize(
    ("contents", "bad"),
    [
        (("hi", "i love my dog .", "ok", "I  love my dog ."), [4]),  # four words
        (("hi", "i love dogs", "ok", "i love dogs"), []),  # three
        (("do you like dogs ?", "do you like dogs ?", "yes", "good for you"), [2]),  # the user's words
        (("do you like dogs ?", "yes , i do .", "ok", "do you like dogs ?"), []),  # asked back later
        (("hi", "hello", "i love my dog .", "me too", "i love my dog .", "fine"), []),  # the user may
    ],
)
def test_what_was_said_before_is_not_trained_on(contents, bad):
    rejected: list[dict] = []
    (row,) = mark_bad_replies([row_of(*contents)], CHAT, "f", rejected)
    assert [entry["turn"] for entry in rejected] == bad
    assert [number for number, m in enumerate(row["messages"], 1) if m.get("train") is False] == bad


def test_a_dialogue_without_a_good_reply_is_left_out():
    opened = row_of("hi", "hello", "what ?", "...")
    opened["messages"] = opened["messages"][1:]  # the good reply is an opening line now
    rejected: list[dict] = []
    assert list(mark_bad_replies([row_of("hi", "..."), opened], CHAT, "f", rejected)) == []
    assert [(entry["reason"], entry["dropped"]) for entry in rejected] == [
        ("no letter or digit", "training"),
        ("no good reply", "dialogue"),
    ] * 2


def test_a_reply_that_is_context_already_is_not_reported_again():
    row = row_of("hi", "...", "what ?", "nothing .")
    rejected: list[dict] = []
    once = list(mark_bad_replies([row], CHAT, "f", rejected))
    assert list(mark_bad_replies(once, CHAT, "f", rejected)) == once
    assert len(rejected) == 1


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    return DATA / name


def marked(rows: list[dict], kind: str) -> tuple[int, int, Counter[str]]:
    """Dialogues kept, replies in them that are not trained on, and the reasons."""
    rejected: list[dict] = []
    kept = list(mark_bad_replies(rows, STANDARDS[kind], "f", rejected))
    untrained = sum(message.get("train") is False for row in kept for message in row["messages"])
    return len(kept), untrained, Counter(entry["reason"] for entry in rejected)


def short(rows: list[dict]) -> tuple[int, int]:
    """Replies under 10 characters, and all replies."""
    replies = [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]
    return sum(len(text) < 10 for text in replies), len(replies)


# The counts of short and of repeated replies were taken before there was a filter; those of PandaLM hold it where it is.


def test_real_chat_keeps_its_short_replies():
    rows = list(sources.synthetic_persona_chat(real("synthetic_persona_chat/valid.csv"), []))
    assert short(rows) == (1138, 26369)
    assert marked(rows, "chat") == (1990, 153, Counter({"said before in the dialogue": 153}))
    rows = list(sources.convai2(real("convai2_personachat/valid_self_original.txt"), []))
    assert short(rows) == (0, 7801)
    assert marked(rows, "chat") == (1000, 11, Counter({"said before in the dialogue": 11}))


def test_a_real_script_loses_its_exclamations():
    path = real("tinyshakespeare/input.txt")
    rows = list(scripts.script(path, [], character="ROMEO", persona=["i am romeo ."]))
    assert marked(rows, "script") == (17, 4, Counter({"under 10 characters": 4}))  # "Out--", "Whither?", ...


def test_real_short_answers_are_kept_but_are_no_experts():
    rows = list(sources.question_answer(real("university_faq"), [], persona=["i am an advisor ."]))
    assert short(rows) == (3, 95)
    assert marked(rows, "answers") == (95, 0, Counter())
    assert marked(rows, "expert")[0] == 0


def test_real_model_answers_that_loop_are_found():
    path = real("pandalm_human_pref/testset-v1.json")
    rows = list(sources.preference(path, [], persona=["i am an assistant ."]))
    found = [faults(row["chosen"][-1]["content"], ANSWERS) for row in rows]
    assert len(rows) == 786 and found.count([]) == 741
    assert sum("goes round in circles" in reasons for reasons in found) == 31


def test_the_world_has_no_faults_but_repetition_by_design():
    rows = list(world.dialogues(300, 42))
    assert short(rows)[0] == 0
    assert set(marked(rows, "chat")[2]) <= {"said before in the dialogue"}
