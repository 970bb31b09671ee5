"""Readers, split and preference pairs, on small files written by hand; the real CSV where it is present."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from rlhf.data import sources
from rlhf.data.preferences import other_persona_pairs, prompts
from rlhf.data.sources import DataError, jsonl, synthetic_persona_chat
from rlhf.data.split import characters, persona_key, split

HEADER = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
REAL = Path(__file__).parents[2] / "shared/data/synthetic_persona_chat/valid.csv"
PLAIN = "User 1: Hi!\nUser 2: Hello!\nUser 1: Do you have a dog?\nUser 2: I do."


def write_csv(path: Path, *rows: tuple[str, ...], header: tuple[str, ...] = HEADER) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def read(tmp_path: Path, conversation: str, first: str = "I have a cat.\nI teach.", second: str = "I have a dog."):
    rejected: list[dict] = []
    path = write_csv(tmp_path / "data.csv", (first, second, conversation))
    return list(synthetic_persona_chat(path, rejected)), rejected


def test_a_conversation_gives_a_row_for_each_user(tmp_path):
    rows, rejected = read(tmp_path, PLAIN)
    assert rejected == []
    contents = ["Hi!", "Hello!", "Do you have a dog?", "I do."]
    assert rows == [
        {
            "persona": ["I have a cat.", "I teach."],
            "messages": [
                {"role": role, "content": content}
                for role, content in zip(["assistant", "user"] * 2, contents, strict=True)
            ],
            "dialogue_id": "data-1",
            "source": "synthetic_persona_chat",
        },
        {
            "persona": ["I have a dog."],
            "messages": [
                {"role": role, "content": content}
                for role, content in zip(["user", "assistant"] * 2, contents, strict=True)
            ],
            "dialogue_id": "data-1",
            "source": "synthetic_persona_chat",
        },
    ]


@pytest.mark.parametrize(
    "conversation",
    [
        "* User 1: Hi! *\n* User 2: It's *so* hot. *\n* User 1: Bye!",
        "*User 1:* Hi!\n*User 2:* It's *so* hot.\n*User 1:* Bye!",
        "**User 1**: Hi!\n**User 2**: It's *so* hot.\n**USER 1** : Bye!",
        "\nUser 1: Hi!\n\n  User 2: It's *so* hot.\r\nUser1: Bye!\n",
        "User 1: Hi!\n[A few minutes later]\nUser 2: It's\n* * *\nUser 2: *so* hot.\n(Later)\nUser 1: Bye!\n*At home*",
    ],
)
def test_the_ways_to_mark_a_speaker(tmp_path, conversation):
    rows, rejected = read(tmp_path, conversation)
    assert [message["content"] for message in rows[0]["messages"]] == ["Hi!", "It's *so* hot.", "Bye!"]
    assert [message["role"] for message in rows[1]["messages"]] == ["user", "assistant", "user"]
    assert {entry["reason"] for entry in rejected} <= {"stage direction"}
    assert len(rejected) == sum(conversation.count(text) for text in ("[A few", "* * *", "(Later)", "*At home"))


@pytest.mark.parametrize(
    "text",
    [
        "I am [User 1's name].",
        "I am (name).",
        "Nice to meet you, User 2!",
        "I am (user 1's name)",
        "From [city]",
        "I am [name",
    ],
)
def test_the_longest_stretch_without_a_placeholder_is_kept(tmp_path, text):
    rows, rejected = read(tmp_path, f"User 1: Hi!\nUser 2: {text}\n{PLAIN}")
    assert [message["content"] for message in rows[0]["messages"]] == ["Hi!", "Hello!", "Do you have a dog?", "I do."]
    assert rejected == [
        {
            "file": str(tmp_path / "data.csv"),
            "line": 3,  # of the file: the header is line 1, the first persona begins on line 2 and has two lines
            "reason": "placeholder",
            "dropped": "turns",
            "text": f"User 1: Hi!\nUser 2: {text}",
        }
    ]


@pytest.mark.parametrize(
    "text", ["(laughs) A dog (small).", "My username is bob.", "I have 2 users.", "a name (or two)"]
)
def test_what_is_no_placeholder_stays(tmp_path, text):
    rows, rejected = read(tmp_path, f"{PLAIN}\nUser 1: {text}")
    assert rows[0]["messages"][-1]["content"] == text
    assert rejected == []


def test_an_emphasised_first_word_stays(tmp_path):
    rows, _ = read(tmp_path, "User 1:*Hi* there!\nUser 2: *Hello*\nUser 1: Bye!")
    assert [message["content"] for message in rows[0]["messages"]] == ["*Hi* there!", "*Hello*", "Bye!"]


@pytest.mark.parametrize(
    ("conversation", "persona", "reason", "line"),
    [
        (PLAIN, " \n", "empty persona", 2),
        (f"{PLAIN}\nAt the gym", "I teach.", "unparseable line", 6),
        ("User 1: Hi!\nUser 2:\nUser 1: Hello?", "I teach.", "unparseable line", 3),
        ("User 1: Hi [name]!\nUser 2: Hello!\nUser 1: Bye!", "I teach.", "placeholder", 2),
        ("User 1: Hi!\nUser 2: Hello!", "I teach.", "fewer than 3 turns", 2),
        ("", "I teach.", "fewer than 3 turns", 2),
    ],
)
def test_a_bad_conversation_is_rejected_with_its_line(tmp_path, conversation, persona, reason, line):
    rejected: list[dict] = []
    path = write_csv(tmp_path / "data.csv", (persona, "I ski.", conversation), ("I teach.", "I ski.", PLAIN))
    assert [row["dialogue_id"] for row in synthetic_persona_chat(path, rejected)] == ["data-2", "data-2"]
    offset = persona.count("\n") if reason != "empty persona" else 0
    assert [(entry["reason"], entry["line"], entry["dropped"]) for entry in rejected] == [
        (reason, line + offset, "dialogue")
    ]


def test_a_record_with_too_few_cells_is_rejected(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(",".join(HEADER) + f'\nI teach.,I ski.\nI teach.,I ski.,"{PLAIN}"\n')
    rejected: list[dict] = []
    assert len(list(synthetic_persona_chat(path, rejected))) == 2
    assert [(entry["line"], entry["reason"]) for entry in rejected] == [(2, "wrong number of cells")]


def test_columns_are_found_by_name_and_a_byte_order_mark_is_no_part_of_one(tmp_path):
    path = write_csv(
        tmp_path / "data.csv", (PLAIN, "x", "I ski.", "I teach."), header=(HEADER[2], "id", HEADER[1], HEADER[0])
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row["persona"] for row in synthetic_persona_chat(path, [])] == [["I teach."], ["I ski."]]


@pytest.mark.parametrize(
    "header", [("character", "text", "line"), ("User 1 personas", *HEADER[1:]), (*HEADER, HEADER[0])]
)
def test_wrong_columns_name_expected_and_found(tmp_path, header):
    path = write_csv(tmp_path / "data.csv", tuple("abcd"[: len(header)]), header=header)
    with pytest.raises(DataError) as error:
        list(synthetic_persona_chat(path, []))
    for name in (*HEADER, *header, str(path)):
        assert name in str(error.value)


def test_an_empty_file_and_a_broken_one_are_named(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("")
    with pytest.raises(DataError, match="an empty file"):
        list(synthetic_persona_chat(path, []))
    path.write_text(",".join(HEADER) + '\n"I teach.,I ski.\n')
    with pytest.raises(DataError, match="is not CSV"):
        list(synthetic_persona_chat(path, []))
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        list(jsonl(path, []))
    with pytest.raises(DataError, match=re.escape(f"cannot read {tmp_path / 'none'}")):
        list(jsonl(tmp_path / "none", []))


@pytest.mark.parametrize("failures", [2, 3])
def test_a_read_is_tried_three_times_two_seconds_apart(tmp_path, monkeypatch, failures):
    path = write_csv(tmp_path / "data.csv", ("I teach.", "I ski.", PLAIN))
    content = path.read_bytes()
    calls: list[Path] = []
    pauses: list[float] = []

    def read_bytes(self: Path) -> bytes:
        calls.append(self)
        if len(calls) <= failures:
            raise OSError("the share is gone")
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(sources.time, "sleep", pauses.append)
    if failures == 2:
        assert len(list(synthetic_persona_chat(path, []))) == 2
    else:
        with pytest.raises(DataError, match="after 3 tries: the share is gone"):
            list(synthetic_persona_chat(path, []))
    assert len(calls) == 3
    assert pauses == [2.0, 2.0]


GOOD = {
    "persona": ["i have a dog ."],
    "messages": [{"role": "user", "content": "hi\u2028"}, {"role": "assistant", "content": "hello"}],
    "dialogue_id": "1",
    "source": "mine",
}


def test_jsonl_rows_come_back_as_they_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD, ensure_ascii=False) + "\n\n" + json.dumps(GOOD))
    rejected: list[dict] = []
    assert list(jsonl(path, rejected)) == [GOOD, GOOD]
    assert rejected == []


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ("{", ["not JSON"]),
        ("[]", ["not a JSON object"]),
        ({"persona": []}, ["`persona` is no list of facts"]),
        ({"persona": "i ski"}, ["`persona` is no list of facts"]),
        ({"persona": ["a", " "]}, ["`persona` is no list of facts"]),
        ({"messages": []}, ["`messages` is no list, or empty"]),
        ({"messages": ["hi"]}, ["message 1 has not exactly"]),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, ["message 2: user and assistant must alternate"]),
        ({"messages": [{"role": "system", "content": "a"}]}, ["got the role 'system'"]),
        ({"messages": [{"role": "user", "content": " "}]}, ["message 1 has no text"]),
        ({"dialogue_id": 3, "source": "", "personas": 1}, ["`dialogue_id`", "`source`", "did you mean `persona`?"]),
        ({"persona": None, "source": None, "dialogue_id": ""}, ["`persona`", "`source`", "`dialogue_id`"]),
    ],
)
def test_a_faulty_jsonl_row_is_rejected_with_all_its_faults(tmp_path, change, reasons):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps(GOOD) + "\n" + (change if isinstance(change, str) else json.dumps(GOOD | change)) + "\n"
    )
    rejected: list[dict] = []
    assert list(jsonl(path, rejected)) == [GOOD]
    assert [(entry["line"], entry["dropped"]) for entry in rejected] == [(2, "dialogue")]
    for reason in reasons:
        assert reason in rejected[0]["reason"]


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"personas": ["a"]}))
    rejected: list[dict] = []
    assert list(jsonl(path, rejected)) == []
    for name in ("persona", "messages", "dialogue_id", "source"):
        assert f"`{name}` is missing" in rejected[0]["reason"]


def rows_of(*pairs: tuple[str, list[str]]) -> list[dict]:
    """A row for each (dialogue_id, facts), with a reply of its own."""
    return [
        {
            "persona": facts,
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": f"reply {number} of mine"},
            ],
            "dialogue_id": dialogue,
            "source": "test",
        }
        for number, (dialogue, facts) in enumerate(pairs)
    ]


def linked_rows(people: int, dialogues: int) -> list[dict]:
    """Everybody talks with everybody in turn, each time described by four of five facts, in other spelling."""
    pairs = []
    for number in range(dialogues):
        for person in (number % people, (number * 7 + 3) % people):
            facts = [f"I have thing {person}-{fact} ." for fact in range(5) if fact != number % 5]
            pairs.append(
                (f"d{number}", [fact.upper() if number % 2 else fact.replace(" .", ".") for fact in facts[::-1]])
            )
    return rows_of(*pairs)


def test_a_persona_is_a_set_of_facts():
    assert persona_key(["I have a dog .", "I ski"]) == persona_key([" i ski!", "I have  a dog."])
    assert persona_key(["i have a dog"]) != persona_key(["i have a cat"])


def test_personas_with_most_facts_in_common_are_one_character():
    rows = rows_of(
        ("1", list("abcd")), ("2", list("bcde")), ("3", list("dexy")), ("4", list("cdef")), ("5", ["z"]), ("6", ["Z."])
    )
    assert characters(rows) == [0, 0, 2, 0, 4, 4]


@pytest.mark.parametrize("heldout", [0.1, 0.2, 0.5, 30])
@pytest.mark.parametrize("seed", range(5))
def test_no_fact_and_no_dialogue_is_on_both_sides(heldout, seed):
    rows = linked_rows(people=40, dialogues=200)
    train, held, between = split(rows, heldout, seed)
    for first, second in ((train, held), (held, train)):
        facts = {fact for row in first for fact in persona_key(row["persona"])}
        assert not any(persona_key(row["persona"]) & facts for row in second)
    assert not {row["dialogue_id"] for row in train} & {row["dialogue_id"] for row in held}
    assert {row["dialogue_id"] for row in between} <= {row["dialogue_id"] for row in held}
    target = heldout if heldout >= 1 else heldout * len(rows)
    largest = max(Counter(characters(rows)).values())
    assert target <= len(held) < target + largest
    ids = [id(row) for side in (train, held, between) for row in side]
    assert sorted(ids) == sorted(map(id, rows))


def test_the_split_is_the_seeds():
    rows = linked_rows(people=40, dialogues=200)
    assert split(rows, 0.2, 1) == split(rows, 0.2, 1)
    assert split(rows, 0.2, 1) != split(rows, 0.2, 2)


def test_separate_dialogues_lose_no_row():
    rows = rows_of(*((f"d{number}", [f"i have thing {number}-{side}"]) for number in range(20) for side in (0, 1)))
    train, held, between = split(rows, 10, 0)
    assert (len(train), len(held), len(between)) == (30, 10, 0)


def test_a_split_that_leaves_a_side_empty_is_refused():
    rows = rows_of(("1", ["a"]), ("2", ["a"]), ("3", ["a"]))
    with pytest.raises(DataError, match="leaves no training rows: they are of 1 characters"):
        split(rows, 0.5, 0)
    for heldout in (0, -1, 3, 0.0):
        with pytest.raises(DataError, match="`heldout` must leave rows on both sides of 3 rows"):
            split(rows, heldout, 0)


def talkative_rows() -> list[dict]:
    """40 characters x 6 replies of 1 to 12 words."""
    rows = []
    for number in range(40):
        messages = []
        for turn in range(6):
            words = " ".join(f"w{number}x{turn}" for _ in range(1 + (number * 5 + turn * 7) % 12))
            messages += [{"role": "user", "content": f"question {turn}"}, {"role": "assistant", "content": words}]
        rows.append(
            {"persona": [f"fact {number}"], "messages": messages, "dialogue_id": f"d{number}", "source": "test"}
        )
    return rows


def test_pairs_differ_in_character_and_not_in_length():
    rows = talkative_rows()
    pairs = other_persona_pairs(rows, 10_000, seed=0)
    assert len(pairs) == 240  # every reply has another of its length among 64 of 240
    longer = 0.0
    for pair in pairs:
        number = int(pair["dialogue_id"][1:])
        chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert pair["persona"] == rows[number]["persona"]
        prompt = pair["prompt"]
        assert prompt == rows[number]["messages"][: len(prompt)] and prompt[-1]["role"] == "user"
        assert pair["chosen"] == [rows[number]["messages"][len(prompt)]]
        assert f"w{number}x" not in rejected
        assert abs(len(rejected.split()) - len(chosen.split())) <= 0.3 * len(chosen.split())
        longer += (
            0.5 + (len(chosen.split()) > len(rejected.split())) / 2 - (len(chosen.split()) < len(rejected.split())) / 2
        )
    assert 0.45 < longer / len(pairs) < 0.55  # a coin's 95 % interval at n = 240 is +-0.063, and most pairs are ties


def test_the_same_reply_or_the_same_character_is_never_the_rejected_one():
    same = rows_of(("1", ["a"]), ("2", ["b"]))
    for row in same:
        row["messages"][1]["content"] = "Me too."
    same[1]["messages"][1]["content"] = " me too."
    assert other_persona_pairs(same, 10, 0) == []
    assert other_persona_pairs(rows_of(("1", list("abcd")), ("2", list("bcde"))), 10, 0) == []
    assert other_persona_pairs(rows_of(("1", ["a"]), ("1", ["b"])), 10, 0) == []
    assert len(other_persona_pairs(rows_of(("1", ["a"]), ("2", ["b"])), 10, 0)) == 2


def test_a_reply_without_another_of_its_length_gives_no_pair():
    rows = rows_of(("1", ["a"]), ("2", ["b"]))
    rows[1]["messages"][1]["content"] = (
        "one two three four five six"  # the other has four words: 50 % more, 33 % fewer
    )
    assert other_persona_pairs(rows, 10, 0) == []


def test_pairs_and_prompts_are_the_seeds_and_at_most_the_count():
    rows = talkative_rows()
    for make in (other_persona_pairs, prompts):
        assert make(rows, 20, 1) == make(rows, 20, 1) != make(rows, 20, 2)
        assert len(make(rows, 20, 1)) == 20
    asked = prompts(rows, 1000, 0)
    assert len(asked) == 240 == len({(row["dialogue_id"], len(row["prompt"])) for row in asked})
    assert all(row["prompt"][-1]["role"] == "user" for row in asked)


@pytest.mark.skipif(not REAL.is_file(), reason="needs Synthetic-Persona-Chat's valid.csv in ../shared/data")
def test_the_real_file():
    rejected: list[dict] = []
    rows = list(synthetic_persona_chat(REAL, rejected))
    assert len(rows) == 2 * 995
    assert Counter(entry["reason"] for entry in rejected if entry["dropped"] == "dialogue") == {"unparseable line": 5}
    text = REAL.read_text().split("\n")
    for entry in rejected:
        assert entry["text"].split("\n")[0][:12] in text[entry["line"] - 1]
    contents = "\n".join(message["content"] for row in rows for message in row["messages"])
    assert not re.search(r"\[|\(name\)|user [12]\b|^\*? ?User", contents, re.IGNORECASE | re.MULTILINE)
    assert len(set(characters(rows))) == 100
    train, held, _ = split(rows, 0.2, 42)
    facts = Counter(fact for row in train for fact in persona_key(row["persona"]))
    # Single facts ("i am a woman") belong to many people; no held-out persona has most of its facts in training.
    train_keys = {persona_key(row["persona"]) for row in train}
    for key in {persona_key(row["persona"]) for row in held}:
        assert sum(fact in facts for fact in key) < len(key)
        assert all(2 * len(key & other) <= min(len(key), len(other)) for other in train_keys)
