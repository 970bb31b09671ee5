"""Readers, split and preference pairs, on small files written by hand; the real CSV where it is present."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
import yaml

from rlhf.data import records, sources
from rlhf.data.preferences import other_persona_pairs, prompts
from rlhf.data.scripts import UnknownCharacterError, script
from rlhf.data.sources import (
    DataError,
    convai2,
    hub,
    jsonl,
    messages,
    preference,
    question_answer,
    synthetic_persona_chat,
)
from rlhf.data.split import characters, persona_key, split
from rlhf.persona import Persona, render_prompt

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
    monkeypatch.setattr(records.time, "sleep", pauses.append)
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
        ("[" * 100_000, ["not JSON: nested too deeply"]),
        ({"persona": ["a \ud800"]}, ["`persona` is no list of facts"]),
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
    """A row for each (dialogue_id, facts), with a reply of its own that has the first fact in it."""
    return [
        {
            "persona": facts,
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": f"reply {number} of {facts[0]}"},
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
    rows = rows_of(("1", ["a"]), ("1", ["a"]), ("1", ["a"]))
    with pytest.raises(DataError, match="leaves no training rows: they are of 1 characters"):
        split(rows, 0.5, 0)
    for heldout in (0, -1, 3, 0.0):
        with pytest.raises(DataError, match="`heldout` must leave rows on both sides of 3 rows"):
            split(rows, heldout, 0)


def test_a_folder_without_questions_names_those_below_it(tmp_path):
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "ai.yml").write_text("conversations:\n- - what is ai\n  - a field\n")
    with pytest.raises(DataError, match=r"no \.csv, .* file lies in .*; there are some in .*/english: name one"):
        list(question_answer(tmp_path, [], persona=["i am a bot ."]))
    assert len(list(question_answer(tmp_path / "english", [], persona=["i am a bot ."]))) == 1


def talkative_rows() -> list[dict]:
    """40 characters x 6 replies of 1 to 12 words, all of which their facts have."""
    rows = []
    for number in range(40):
        messages = []
        for turn in range(6):
            words = " ".join(f"w{number}x{turn}" for _ in range(1 + (number * 5 + turn * 7) % 12))
            messages += [{"role": "user", "content": f"question {turn}"}, {"role": "assistant", "content": words}]
        rows.append(
            {
                "persona": [f"w{number}x{turn}" for turn in range(6)],
                "messages": messages,
                "dialogue_id": f"d{number}",
                "source": "test",
            }
        )
    return rows


def test_pairs_differ_in_character_and_not_in_length():
    rows = talkative_rows()
    pairs = other_persona_pairs(rows, 10_000, seed=0)
    assert 200 <= len(pairs) <= 240 and len(pairs) % 2 == 0  # two exchange their replies; the last may find nobody
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
    same = rows_of(("1", ["v"]), ("2", ["w"]))
    for row in same:
        row["messages"][1]["content"] = "Me too."
    same[1]["messages"][1]["content"] = " me too."
    assert other_persona_pairs(same, 10, 0) == []
    assert other_persona_pairs(rows_of(("1", list("vwxy")), ("2", list("wxyz"))), 10, 0) == []
    assert other_persona_pairs(rows_of(("1", ["v"]), ("1", ["w"])), 10, 0) == []
    assert len(other_persona_pairs(rows_of(("1", ["v"]), ("2", ["w"])), 10, 0)) == 2


def test_a_reply_without_another_of_its_length_gives_no_pair():
    rows = rows_of(("1", ["v"]), ("2", ["w"]))
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


# -- placeholders and what rows may carry ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "I am [Name].",
        "I am [User 1's name].",
        "Write to [insert your email here].",
        "I work at [Company Name] as a [job title].",
        "Mail <your address>.",
        "Hello {{user}}, I am {{ char }}.",
        "Call +91-XXXXXXXXXX.",
    ],
)
def test_a_blank_is_found(text):
    assert records.BLANK.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "[Exit]",
        "[laughs] I am fine.",
        "See [the link](https://example.org/name).",
        "left = [x for x in names[1:]]",
        'row["name"]',
        "d[name]",
        "List<T> and <b>",
        "{{ total }}",
        "xxxx",
        "MXXXX",
        "[1]",
        "my name is bob",
    ],
)
def test_what_is_no_blank(text):
    assert not records.BLANK.search(text)


def test_jsonl_rows_may_carry_candidates_and_untrained_replies(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = GOOD | {
        "messages": [GOOD["messages"][0], {**GOOD["messages"][1], "train": False}],
        "candidates": [None, ["hello", "no"]],
    }
    path.write_text(json.dumps(row))
    rejected: list[dict] = []
    assert list(jsonl(path, rejected)) == [row] and rejected == []
    faulty = [
        {"candidates": [None]},
        {"candidates": [None, ["hello", ""]]},
        {"candidates": [None, "hello"]},
        {"messages": [{"role": "user", "content": "hi", "train": True}]},
        {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "train": "no"}]},
    ]
    path.write_text("\n".join(json.dumps(GOOD | change) for change in faulty))
    assert list(jsonl(path, rejected)) == []
    assert [entry["line"] for entry in rejected] == [1, 2, 3, 4, 5]
    assert "as long as `messages`" in rejected[0]["reason"]
    assert all("`candidates`" in entry["reason"] for entry in rejected[:3])
    assert all("`train` must be" in entry["reason"] for entry in rejected[3:])


# -- ConvAI2 -----------------------------------------------------------------------------------------------------------

CONVAI2 = (
    "1 your persona: i ski .\n"
    "2 your persona: i have a dog .\n"
    "3 hi there\thello !\t\twhat ?|no way|hello !\n"
    "4 any pets ?\ta dog .\t\ta cat .|a dog .\n"
)


def test_convai2_gives_persona_turns_and_candidates(tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text(CONVAI2)
    rejected: list[dict] = []
    assert list(convai2(path, rejected)) == [
        {
            "persona": ["i ski .", "i have a dog ."],
            "messages": [
                {"role": "user", "content": "hi there"},
                {"role": "assistant", "content": "hello !"},
                {"role": "user", "content": "any pets ?"},
                {"role": "assistant", "content": "a dog ."},
            ],
            "candidates": [None, ["what ?", "no way", "hello !"], None, ["a cat .", "a dog ."]],
            "dialogue_id": "valid-1",
            "source": "convai2",
        }
    ]
    assert rejected == []


def test_convai2_without_candidates_with_both_personas_and_an_opening_line(tmp_path):
    path = tmp_path / "both.txt"
    path.write_text(
        "1 your persona: i ski .\r\n2 partner's persona: i cook .\r\n3 __SILENCE__\thello !\r\n4 hi\tyour dog ?\r\n"
    )
    rejected: list[dict] = []
    (row,) = convai2(path, rejected)
    assert [(m["role"][0], m["content"]) for m in row["messages"]] == [
        ("a", "hello !"),
        ("u", "hi"),
        ("a", "your dog ?"),
    ]
    assert row["persona"] == ["i ski ."] and "candidates" not in row
    assert rejected == [
        {"file": str(path), "line": 1, "reason": "partner's persona", "dropped": "line", "text": "i cook ."}
    ]


def test_the_two_sides_of_a_convai2_dialogue_share_their_id(tmp_path):
    path = tmp_path / "train.txt"
    first = "1 your persona: i ski .\n2 hi\thello\n3 any pets ?\ta dog .\n"
    second = "1 your persona: i cook .\n2 __SILENCE__\thi\n3 hello\tany pets ?\n4 a dog .\tnice !\n"
    other = "1 your persona: i read .\n2 hi\tgood day\n3 and you ?\tfine .\n"
    path.write_text(first + second + other)
    assert [row["dialogue_id"] for row in convai2(path, [])] == ["train-1", "train-1", "train-8"]


@pytest.mark.parametrize(
    ("episode", "line", "reason"),
    [
        ("1 hi\thello\n", 1, "empty persona"),
        ("1 partner's persona: i ski .\n2 hi\thello\n", 1, "empty persona"),
        ("1 your persona: i ski .\n2 hi there\n", 2, "unparseable line"),
        ("1 your persona: i ski .\n2 hi\t \n", 2, "unparseable line"),
        ("1 your persona: i ski .\n2 hi\thello\nhow\tare you\n", 3, "unparseable line"),
        ("1 your persona: i ski .\n2 hi\thello\t\tno|what\n", 2, "the reply is none of the candidates"),
        ("1 your persona: i ski .\n2 hi\thello\n3 __SILENCE__\tso\n", 1, "silence within a dialogue"),
        ("1 your persona: i ski .\n2 __SILENCE__\thello\n", 2, "no reply to a turn of the user"),
        ("1 your persona: i ski .\n2 hi [name]\thello\n", 2, "placeholder"),
    ],
)
def test_a_bad_convai2_dialogue_is_rejected_with_its_line(tmp_path, episode, line, reason):
    path = tmp_path / "valid.txt"
    path.write_text(episode + CONVAI2)
    rejected: list[dict] = []
    assert len(list(convai2(path, rejected))) == 1
    assert [(e["line"], e["reason"], e["dropped"]) for e in rejected] == [(line, reason, "dialogue")]


def test_candidates_stay_beside_their_reply_when_turns_are_cut(tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text(CONVAI2.replace("hi there", "i am [name]"))
    rejected: list[dict] = []
    (row,) = convai2(path, rejected)
    assert [message["content"] for message in row["messages"]] == ["hello !", "any pets ?", "a dog ."]
    assert row["candidates"] == [["what ?", "no way", "hello !"], None, ["a cat .", "a dog ."]]
    assert [(e["line"], e["dropped"], e["text"]) for e in rejected] == [(3, "turns", "i am [name]")]


def test_a_file_that_is_not_convai2_is_named(tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text("hello\nworld\n")
    with pytest.raises(DataError, match=r"needs lines such as '1 your persona: i ski \.'"):
        list(convai2(path, []))


# -- scripts -----------------------------------------------------------------------------------------------------------

BLOCKS = """First Citizen:
Hear me speak.

All:
Speak, speak.

FIRST CITIZEN:
You are resolved
to die: all of you?

All:
Resolved.

All:
Resolved, I say.

Second Citizen:
One word.

First citizen :
Let us kill him.
"""


def spoken(rows: list[dict]) -> list[list[tuple[str, str]]]:
    return [[(m["role"][0], m["content"]) for m in row["messages"]] for row in rows]


@pytest.mark.parametrize(
    "character", ["First Citizen", "first citizen", "FIRST CITIZEN:", "First-Citizen", "Frist Citizen"]
)
def test_blocks_of_a_script(tmp_path, character):
    path = tmp_path / "play.txt"
    path.write_text(BLOCKS)
    rejected: list[dict] = []
    rows = list(script(path, rejected, character=character, persona=["i am a citizen ."]))
    assert spoken(rows) == [
        [
            ("a", "Hear me speak."),
            ("u", "Speak, speak."),
            ("a", "You are resolved to die: all of you?"),
            ("u", "One word."),  # the speaker before the reply; what "All" say is left out
            ("a", "Let us kill him."),
        ]
    ]
    assert {key: rows[0][key] for key in ("persona", "dialogue_id", "source")} == {
        "persona": ["i am a citizen ."],
        "dialogue_id": "play-1",
        "source": "script",
    }
    assert rejected == []


def test_turns_of_one_speaker_are_joined(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text(BLOCKS)
    rows = list(script(path, [], character="Second Citizen", persona=["x ."]))
    assert spoken(rows) == [[("u", "Resolved. Resolved, I say."), ("a", "One word.")]]


def test_lines_of_a_script_its_directions_and_scenes(tmp_path):
    path = tmp_path / "show.txt"
    path.write_text(
        "SCENE 1: The garage\nMorty: What is it?\nRick (to Morty): A portal,\nMorty.\n(burps)\nDr. Wong's Aide: Stop!\n"
        "Rick: No.\n\nThey leave.\n---\nRick: Where are we?\nMorty: Here.\n[Scene: home]\nRick: Hi!\n"
    )
    rejected: list[dict] = []
    rows = list(script(path, rejected, character="rick", persona=["x ."]))
    assert spoken(rows) == [[("u", "What is it?"), ("a", "A portal, Morty."), ("u", "Stop!"), ("a", "No.")]]
    assert [(e["line"], e["reason"], e["dropped"], e["text"]) for e in rejected] == [
        (5, "stage direction", "line", "(burps)"),
        (9, "no speaker", "line", "They leave."),
        (11, "no reply to a turn of the user", "dialogue", "Where are we?"),
        (14, "no reply to a turn of the user", "dialogue", "Hi!"),
    ]


def test_a_dialogue_ends_where_others_talk_for_long(tmp_path):
    def lines(others: int) -> str:
        return "B: b\n\nA: one\n\n" + "".join(f"C{i}: c\n\n" for i in range(others)) + "A: two\n"

    path = tmp_path / "play.txt"
    path.write_text(lines(4))
    assert spoken(script(path, [], character="A", persona=["x"])) == [
        [("u", "b"), ("a", "one"), ("u", "c"), ("a", "two")]
    ]
    path.write_text(lines(5))
    rows = list(script(path, [], character="A", persona=["x"]))
    assert spoken(rows) == [[("u", "b"), ("a", "one")], [("u", "c"), ("a", "two")]]
    assert [row["dialogue_id"] for row in rows] == ["play-1", "play-13"]


def test_a_script_in_columns_is_cut_at_episodes_and_gaps(tmp_path):
    header = ("index", "episode no.", "Name", "line")
    path = write_csv(
        tmp_path / "show.csv",
        ("0", "1", "Morty", "Hi!"),
        ("1", "1", "RICK", "Hello,  Morty."),
        ("2", "2", "Morty", "Now?"),
        ("3", "2", "Rick", "Now."),
        ("4", "2", "", ""),
        ("5", "2", "Rick", "Later."),
        ("6", "2", "Beth", "Dad?"),
        ("7", "2", "Rick", ""),
        ("8", "2", "", "A door opens."),
        ("9", "2", "Rick", "Yes?"),
        header=header,
    )
    rejected: list[dict] = []
    rows = list(script(path, rejected, character="Rick", persona=["x ."]))
    assert spoken(rows) == [
        [("u", "Hi!"), ("a", "Hello, Morty.")],
        [("u", "Now?"), ("a", "Now.")],
        [("a", "Later."), ("u", "Dad?"), ("a", "Yes?")],
    ]
    assert [(e["line"], e["reason"], e["text"]) for e in rejected] == [
        (9, "no words", "Rick"),
        (10, "no speaker", "A door opens."),
    ]


def test_an_unknown_character_is_told_who_speaks(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text(BLOCKS)
    with pytest.raises(UnknownCharacterError) as error:
        list(script(path, [], character="Hamlet", persona=["x ."]))
    assert "'Hamlet'" in str(error.value)
    assert "First Citizen (3), All (3), Second Citizen (1)" in str(error.value)


def test_a_near_name_does_not_take_the_place_of_the_right_one(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("A: hi\n\nKING RICHARD II: two\n\nA: hi\n\nKING RICHARD III: three\n")
    for character, reply in (("King Richard II", "two"), ("King Richard III", "three")):
        assert spoken(script(path, [], character=character, persona=["x"])) == [[("u", "hi"), ("a", reply)]]


@pytest.mark.parametrize(
    ("wanted", "known"),
    [("Abcdef", True), ("Abcde", False), ("Petuco", False)],  # ratios 2x6/14 = 0.857, 2x5/13 = 0.77 and 2x6/15 = 0.8
)
def test_a_name_may_be_mistyped_up_to_a_ratio(tmp_path, wanted, known):
    path = tmp_path / "play.txt"
    path.write_text("Petruchio: hi\n\nAbcdefgh: two\n\nPetruchio: three\n")
    if known:
        assert spoken(script(path, [], character=wanted, persona=["x"])) == [[("u", "hi"), ("a", "two")]]
    else:
        with pytest.raises(UnknownCharacterError):
            list(script(path, [], character=wanted, persona=["x"]))


@pytest.mark.parametrize("persona", [[], [" "], "i ski ."])
def test_a_script_needs_facts(tmp_path, persona):
    path = tmp_path / "play.txt"
    path.write_text(BLOCKS)
    with pytest.raises(DataError, match="`persona` must be a list of facts"):
        list(script(path, [], character="All", persona=persona))


def test_script_columns_are_named_when_missing(tmp_path):
    path = write_csv(tmp_path / "show.csv", ("Rick", "1"), header=("who", "number"))
    with pytest.raises(DataError) as error:
        list(script(path, [], character="Rick", persona=["x"]))
    for name in ("'speaker'", "'character'", "'line'", "'who'", "'number'", str(path)):
        assert name in str(error.value)


# -- questions and answers ---------------------------------------------------------------------------------------------

ADVISOR = {"persona": ["i am an advisor ."]}


def pairs(rows: list[dict]) -> list[tuple[str, ...]]:
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def test_questions_of_a_csv_and_of_json_lines(tmp_path):
    path = write_csv(
        tmp_path / "faq.csv", ("1", "Open?", "At 9."), ("2", "Shut?", " "), header=("n", "Question", "ANSWER")
    )
    rejected: list[dict] = []
    assert list(question_answer(path, rejected, **ADVISOR)) == [
        {
            "persona": ["i am an advisor ."],
            "messages": [{"role": "user", "content": "Open?"}, {"role": "assistant", "content": "At 9."}],
            "dialogue_id": "faq-2",
            "source": "question_answer",
        }
    ]
    assert [(e["line"], e["reason"]) for e in rejected] == [(3, "the answer is no text or blank")]
    path = tmp_path / "alpaca.jsonl"
    path.write_text(
        '{"instruction": "Translate.", "input": "ja", "output": "yes"}\n\n{"instruction": "Go.", "output": "Gone."}\n'
        '{"instruction": "Name it.", "output": true}\n[]\n{"output": "[Your name], hello", "instruction": "Hi."}\n'
    )
    rejected = []
    assert pairs(question_answer(path, rejected, **ADVISOR)) == [("Translate.\n\nja", "yes"), ("Go.", "Gone.")]
    assert sorted((e["line"], e["reason"]) for e in rejected) == [
        (4, "the answer is no text or blank"),
        (5, "not a JSON object"),
        (6, "placeholder"),
    ]


def test_a_json_list_knows_its_lines(tmp_path):
    path = tmp_path / "faq.json"
    path.write_text(
        '\n[\n  {"question": "a [b], {c}?",\n   "answer": "d"}, 3,\n  {"question": "e", "answer": null},\n'
        '  {"question": "f", "answer": "g"}\n]\n'
    )
    rejected: list[dict] = []
    rows = list(question_answer(path, rejected, **ADVISOR))
    assert pairs(rows) == [("a [b], {c}?", "d"), ("f", "g")]
    assert [row["dialogue_id"] for row in rows] == ["faq-3", "faq-6"]
    assert [(e["line"], e["reason"]) for e in rejected] == [
        (4, "not a JSON object"),
        (5, "the answer is no text or blank"),
    ]


def test_a_mapping_of_questions_loses_no_double_key_silently(tmp_path):
    path = tmp_path / "faq.json"
    path.write_text('{\n "open?": "at 9 \\u00e0 peu",\n "fee?": "none",\n "open?": "at 10"\n}')
    rejected: list[dict] = []
    assert pairs(question_answer(path, rejected, **ADVISOR)) == [("open?", "at 9 à peu"), ("fee?", "none")]
    assert [(e["reason"], e["text"]) for e in rejected] == [("the question stands twice as a key", "open?\nat 10")]


def test_intents_use_every_pattern_and_every_response(tmp_path):
    intents = [
        {"tag": "hello", "patterns": ["hi", "hey", "hello"], "responses": ["Hi!", "Hello!"]},
        {"tag": "bye", "patterns": ["bye"], "responses": ["Bye!", "See you!"]},
        {"tag": "none", "patterns": [], "responses": ["What?"]},
    ]
    path = tmp_path / "bot.json"
    path.write_text(json.dumps({"intents": intents}, indent=1))
    rejected: list[dict] = []
    rows = list(question_answer(path, rejected, **ADVISOR))
    assert pairs(rows) == [
        ("hi", "Hi!"), ("hey", "Hello!"), ("hello", "Hi!"), ("bye", "Bye!"), ("bye", "See you!")
    ]  # fmt: skip
    assert [row["dialogue_id"] for row in rows] == ["bot-hello"] * 3 + ["bot-bye"] * 2
    line = next(n for n, text in enumerate(path.read_text().split("\n"), 1) if '"none"' in text)
    assert [(e["line"], e["dropped"]) for e in rejected] == [(line, "dialogue")]
    assert "`patterns` and `responses`" in rejected[0]["reason"]


def test_lists_of_conversations(tmp_path):
    path = tmp_path / "talk.yml"
    path.write_text(
        "categories:\n- conversations\nconversations:\n- - Hi\n  - Hello\n  - When?\n  - 1963\n- - You lie\n  - no\n  - Why?\n"
        "- just text\n- - Alone\n- - Blank\n  - ''\n"
    )
    rejected: list[dict] = []
    rows = list(question_answer(path, rejected, **ADVISOR))
    assert pairs(rows) == [("Hi", "Hello", "When?", "1963"), ("You lie", "no", "Why?")]
    assert [row["dialogue_id"] for row in rows] == ["talk-4", "talk-8"]
    reasons = [(11, "not a list of texts, or one is blank"), (12, "no reply to a turn of the user")]
    assert [(e["line"], e["reason"]) for e in rejected] == [*reasons, (13, reasons[0][1])]


@pytest.mark.parametrize("categories", ["", "categories: conversations\n", "categories: [talk]\n"])
def test_of_a_list_that_may_be_answers_to_one_question_the_first_is_used(tmp_path, categories):
    path = tmp_path / "talk.yml"
    path.write_text(f"{categories}conversations:\n- - Hi\n  - Hello\n  - Good day\n  - Welcome\n- - Bye\n  - Bye!\n")
    rejected: list[dict] = []
    assert pairs(question_answer(path, rejected, **ADVISOR)) == [("Hi", "Hello"), ("Bye", "Bye!")]
    line = 5 if categories else 4
    assert [(e["line"], e["dropped"], e["text"]) for e in rejected] == [(line, "turns", "Good day\nWelcome")]
    assert rejected[0]["reason"] == "more than one answer, or no category 'conversations'"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", "q,a\n1,2\n", "'q', 'a'"),
        ("a.jsonl", '{"ask": "x", "say": "y"}\n', "'ask', 'say'"),
        ("a.json", '{"data": [], "version": "1"}', "'data', 'version'"),
        ("a.json", "3", "another JSON value"),
        ("a.json", '{"intents": 3}', "int"),
        ("a.json", "{", "a.json:1 is not JSON"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.yml", "- a\n", "no keys"),
        ("a.yml", "talks: []\n", "'talks'"),
        ("a.yml", "a: [\n", "is not YAML"),
    ],
)
def test_a_file_of_no_known_shape_is_named_with_what_was_found(tmp_path, name, content, found):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        list(question_answer(tmp_path / name, [], **ADVISOR))
    assert name in str(error.value) and found in str(error.value)


def test_a_folder_of_questions_is_read_file_by_file(tmp_path):
    write_csv(tmp_path / "b.csv", ("Open?", "At 9."), header=("question", "answer"))
    (tmp_path / "a.json").write_text('{"fee?": "none"}')
    (tmp_path / "README.md").write_text("hello")
    rows = list(question_answer(tmp_path, [], **ADVISOR))
    assert [row["dialogue_id"] for row in rows] == ["a-1", "b-2"]


# -- chat messages -----------------------------------------------------------------------------------------------------


def chat_line(*turns: tuple[str, str], **more: object) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], **more})


def test_chat_messages_with_the_system_message_as_persona(tmp_path):
    path = tmp_path / "chat.jsonl"
    system = ("system", "i ski .\n\n i have a dog . \n")
    path.write_text(
        "\n".join(
            [
                chat_line(system, ("user", "hi"), ("user", "you there ?"), ("assistant", "yes ."), id="x7"),
                chat_line(("user", "hi"), ("assistant", "hello")),
                json.dumps({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}),
            ]
        )
    )
    rejected: list[dict] = []
    assert list(messages(path, rejected)) == [
        {
            "persona": ["i ski .", "i have a dog ."],
            "messages": [
                {"role": "user", "content": "hi\nyou there ?"},
                {"role": "assistant", "content": "yes ."},
            ],
            "dialogue_id": "chat-x7",
            "source": "messages",
        }
    ]
    assert [e["line"] for e in rejected] == [2, 3]
    assert "no persona" in rejected[0]["reason"] and "`messages` is no list" in rejected[1]["reason"]
    assert [row["persona"] for row in messages(path, [], persona=["i cook ."])] == [
        ["i ski .", "i have a dog ."],
        ["i cook ."],
    ]


def test_share_gpt_columns(tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [("system", "i ski ."), ("human", "hi"), ("gpt", "hello")]
    path.write_text(json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]}))
    (row,) = messages(path, [])
    assert row["persona"] == ["i ski ."]
    assert row["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        (chat_line(("user", "hi"), ("tool", "3")), "message 2: the role must be"),
        (chat_line(("user", "hi"), ("system", "i ski .")), "message 2: the role must be"),
        (chat_line(("user", "hi"), ("assistant", " ")), "message 2 has no text"),
        (chat_line(("user", "hi")), "no reply to a turn of the user"),
        (chat_line(("assistant", "hi"), ("user", "hello")), "no reply to a turn of the user"),
        (chat_line(("user", "i am [name]"), ("assistant", "hello [name]")), "placeholder"),
        (json.dumps({"messages": []}), "`messages` is no list of messages, or empty"),
        (json.dumps({"messages": ["hi"]}), "message 1 is no object"),
    ],
)
def test_a_bad_chat_is_rejected_with_its_line(tmp_path, line, reason):
    path = tmp_path / "chat.jsonl"
    path.write_text(chat_line(("user", "hi"), ("assistant", "hello")) + "\n" + line + "\n")
    rejected: list[dict] = []
    assert len(list(messages(path, rejected, persona=["i ski ."]))) == 1
    assert [(e["line"], e["dropped"]) for e in rejected] == [(2, "dialogue")]
    assert reason in rejected[0]["reason"]


# -- preferences -------------------------------------------------------------------------------------------------------


def turn_list(*contents: str) -> list[dict]:
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(contents)]


SAID = {"chosen": [{"role": "assistant", "content": "yes ."}], "rejected": [{"role": "assistant", "content": "no ."}]}
SYSTEM = {"role": "system", "content": "i ski ."}


@pytest.mark.parametrize(
    "record",
    [
        {"persona": ["i ski ."], "prompt": "hi ?", "chosen": "yes .", "rejected": "no ."},
        {"prompt": [SYSTEM, *turn_list("hi ?")], "chosen": SAID["chosen"], "rejected": SAID["rejected"]},
        {"prompt": [SYSTEM, *turn_list("hi ?")], "chosen": "yes .", "rejected": SAID["rejected"]},
        {"chosen": [SYSTEM, *turn_list("hi ?", "yes .")], "rejected": [SYSTEM, *turn_list("hi ?", "no .")]},
        {"persona": ["i ski ."], "prompt": "hi ?", "chosen": turn_list("hi ?", "yes ."), "rejected": turn_list("hi ?", "no .")},
        {"prompt": "[PERSONA] i ski . [DIALOGUE] [USER] hi ? [RESPONSE]", "chosen": "yes .", "rejected": "no ."},
    ],
)  # fmt: skip
def test_the_ways_to_write_a_preference(tmp_path, record):
    path = tmp_path / "pairs.jsonl"
    if "[USER]" in str(record.get("prompt")):
        record = {**record, "prompt": render_prompt(Persona(("i ski .",)), turn_list("hi ?"))}
    path.write_text(json.dumps(record))
    rejected: list[dict] = []
    assert list(preference(path, rejected)) == [
        {"persona": ["i ski ."], "prompt": turn_list("hi ?"), **SAID, "dialogue_id": "pairs-1", "kind": "given"}
    ]
    assert rejected == []


PAIR = {"persona": ["i ski ."], "prompt": "hi ?", "chosen": "yes .", "rejected": "no ."}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"persona": None}, "no persona"),
        ({"persona": ["i ski .", " "]}, "`persona` is no list of facts"),
        ({"prompt": None}, "the prompt does not end with a turn of the user"),
        ({"prompt": turn_list("hi", "hello")}, "the prompt does not end with a turn of the user"),
        ({"prompt": "[PERSONA] i ski ."}, "`prompt`:"),
        ({"rejected": " yes . "}, "chosen and rejected are the same"),
        ({"chosen": ""}, "`chosen` is no list of messages"),
        ({"rejected": None}, "`rejected` is no list of messages"),
        ({"rejected": turn_list("hi ?")}, "`rejected` does not end with a reply"),
        ({"chosen": turn_list("hi ?", "yes .")}, "differ before their last reply"),
        ({"chosen": turn_list("so", "yes ."), "rejected": turn_list("so", "no .")}, "`prompt` is not what `chosen`"),
        ({"chosen": "i am [name] ."}, "placeholder"),
    ],
)
def test_a_bad_preference_is_rejected_with_its_line(tmp_path, change, reason):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR | {"kind": "mine"}) + "\n" + json.dumps(PAIR | change))
    rejected: list[dict] = []
    assert [row["kind"] for row in preference(path, rejected)] == ["mine"]
    assert [entry["line"] for entry in rejected] == [2]
    assert reason in rejected[0]["reason"]


@pytest.mark.parametrize(
    ("votes", "chosen"),
    [
        ((1, 1, 1), "one"),
        ((2, 2, 0), "two"),
        ((1, 1, 2), "one"),
        ((0, 0, 1), None),
        ((0, 1, 2), None),
        ((1, 0, 0), None),
    ],
)
def test_people_must_agree(tmp_path, votes, chosen):
    record = {"instruction": "Count.", "input": "a", "response1": "one", "response2": "two"}
    path = tmp_path / "votes.json"
    path.write_text(json.dumps([record | {f"annotator{n}": vote for n, vote in enumerate(votes, 1)}]))
    rejected: list[dict] = []
    rows = list(preference(path, rejected, persona=["i count ."]))
    if chosen is None:
        assert rows == [] and [e["reason"] for e in rejected] == ["no majority for one response"]
    else:
        assert [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["kind"]) for row in rows] == [
            (chosen, {"one": "two", "two": "one"}[chosen], "human")
        ]
        assert rows[0]["prompt"] == turn_list("Count.\n\na")


def test_pairs_of_one_prompt_belong_together(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [
        PAIR,
        PAIR | {"prompt": "ho ?"},
        PAIR | {"chosen": "well , yes ."},
        PAIR | {"id": "x", "chosen": "so ."},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    assert [row["dialogue_id"] for row in preference(path, [])] == ["pairs-1", "pairs-2", "pairs-1", "pairs-x"]


def test_a_pair_with_an_empty_reply_of_a_model_is_left_out_by_rule(tmp_path):
    record = {"instruction": "Count.", "input": "", "response1": "one", "response2": " ", "annotator1": 1}
    path = tmp_path / "votes.json"
    path.write_text(json.dumps([record, record | {"instruction": None, "response2": "two"}]))
    rejected: list[dict] = []
    assert list(preference(path, rejected, persona=["i count ."])) == []
    assert [entry["reason"] for entry in rejected] == ["a model gave no reply", "`instruction` is no text or blank"]
    assert [entry["reason"] in sources.FILTERED for entry in rejected] == [True, False]


def test_preference_columns_are_named_when_missing(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "hi", "good": "yes", "bad": "no"}))
    with pytest.raises(DataError) as error:
        list(preference(path, []))
    for name in ("'chosen'", "'rejected'", "'response1'", "'good'", "'bad'"):
        assert name in str(error.value)


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """Answers of `datasets.load_dataset`, in order: rows, or an error to raise; the calls and the pauses made."""
    answers: list = []
    calls: list[tuple] = []
    pauses: list[float] = []

    def load_dataset(path, *, split):
        calls.append((path, split))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return datasets.Dataset.from_list(answer)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(records.time, "sleep", pauses.append)
    return answers, calls, pauses


class HTTPError(Exception):
    """As the hub's client has one, of no class of Python's."""


def test_the_hub_is_tried_three_times_two_seconds_apart(loads):
    answers, calls, pauses = loads
    answers += [ConnectionError("down"), HTTPError("503"), [{"question": "Open?", "answer": "At 9."}]]
    assert pairs(hub("someone/faq", [], split="test", persona=["x ."])) == [("Open?", "At 9.")]
    assert calls == [("someone/faq", "test")] * 3
    assert pauses == [2.0, 2.0]
    answers += [ConnectionError("down")] * 3
    with pytest.raises(DataError, match="someone/faq after 3 tries: down"):
        list(hub("someone/faq", []))
    assert len(calls) == 6 and len(pauses) == 4


@pytest.mark.parametrize("error", [FileNotFoundError("no such data set"), ValueError("unknown split")])
def test_what_waiting_does_not_help_is_said_at_once(loads, error):
    answers, calls, pauses = loads
    answers.append(error)
    with pytest.raises(DataError, match=f"cannot load 'someone/faq', split 'train', from the hub: {error}"):
        list(hub("someone/faq", []))
    assert len(calls) == 1 and pauses == []


def test_wrong_columns_of_the_hub_are_named(loads):
    answers, _, _ = loads
    answers.append([{"audio": "x", "label": 3}])
    with pytest.raises(DataError) as error:
        list(hub("someone/sounds", [], persona=["x ."]))
    for name in ("someone/sounds", "question, answer", "messages", "chosen, rejected", *HEADER, "'audio', 'label'"):
        assert name in str(error.value)


def test_each_shape_of_the_hub_goes_to_its_reader(loads):
    answers, _, _ = loads
    answers.append([dict(zip(HEADER, ("I ski.", "I cook.", PLAIN), strict=True))])
    assert [row["dialogue_id"] for row in hub("a/personas", [])] == ["personas-1", "personas-1"]
    answers.append([{"messages": [SYSTEM, *turn_list("hi", "hello")]}])
    assert [(row["persona"], row["messages"]) for row in hub("a/chat", [])] == [
        (["i ski ."], turn_list("hi", "hello"))
    ]
    answers.append([PAIR])
    assert [row["chosen"] for row in hub("a/pairs", [])] == [SAID["chosen"]]
    answers.append([{"name": "Morty", "line": "Hi!"}, {"name": "Rick", "line": "Hello."}, {"name": None, "line": "x"}])
    rejected: list[dict] = []
    rows = list(hub("a/script", rejected, character="rick", persona=["x ."]))
    assert spoken(rows) == [[("u", "Hi!"), ("a", "Hello.")]]
    assert [(e["file"], e["line"], e["reason"]) for e in rejected] == [("a/script", 3, "no speaker")]


# -- real files --------------------------------------------------------------------------------------------------------

DATA = Path(__file__).parents[2] / "shared/data"


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    return DATA / name


def test_the_real_convai2_file():
    path = real("convai2_personachat/valid_self_original.txt")
    rejected: list[dict] = []
    rows = list(convai2(path, rejected))
    text = path.read_text(encoding="utf-8")
    assert rejected == []
    assert len(rows) == len({row["dialogue_id"] for row in rows}) == 1000
    assert sum(len(row["persona"]) for row in rows) == text.count(" your persona: ") == 4483
    choices = [(m, c) for row in rows for m, c in zip(row["messages"], row["candidates"], strict=True)]
    replies = [(message, c) for message, c in choices if message["role"] == "assistant"]
    assert len(replies) == 7801 and len(choices) == 2 * 7801
    assert all(len(c) == 20 and c[-1] == message["content"] for message, c in replies)
    assert all(c is None for message, c in choices if message["role"] == "user")


def test_the_real_script():
    path = real("tinyshakespeare/input.txt")
    blocks = [block.split("\n") for block in path.read_text().strip().split("\n\n")]
    assert len(blocks) == 7222
    rejected: list[dict] = []
    rows = list(script(path, rejected, character="Romeo", persona=["i am romeo ."]))
    empty = [block for block in blocks if len(block) == 1]
    assert [entry["reason"] for entry in rejected] == ["no words"] * len(empty) and len(empty) == 125
    spoken_by_romeo = [" ".join(block[1:]) for block in blocks if block[0] == "ROMEO:" and len(block) > 1]
    replies = [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]
    assert len(spoken_by_romeo) == 160
    assert " ".join(replies) == " ".join(spoken_by_romeo)  # every word of his, in order; two turns are joined
    assert len(replies) == 159
    with pytest.raises(UnknownCharacterError, match=r"Most frequent: GLOUCESTER \(2\d\d\), DUKE VINCENTIO"):
        list(script(path, [], character="Hamlet", persona=["x ."]))


def test_the_real_questions_and_answers():
    path = real("university_faq/universe_university_faq.json")
    faq = json.loads(path.read_text())
    rejected: list[dict] = []
    assert dict(pairs(question_answer(path, rejected, **ADVISOR))) == faq and len(faq) == 58
    assert rejected == []
    path = real("university_faq/89184_intents.json")
    rows = list(question_answer(path, rejected, **ADVISOR))
    assert len(rows) == 42 - 5  # the number and address that are asked for are blanks: +91-XXXXXXXXXX
    assert [entry["reason"] for entry in rejected] == ["placeholder"] * 5
    assert len({row["dialogue_id"] for row in rows}) == 7


def test_the_real_conversations():
    folder = real("chatterbot_corpus/english")
    lists = {path.name: yaml.safe_load(path.read_text())["conversations"] for path in folder.iterdir()}
    rejected: list[dict] = []
    rows = list(question_answer(folder, rejected, **ADVISOR))
    assert len(rows) == 2025
    longer = Counter(
        {name: sum(isinstance(turns, list) and len(turns) > 2 for turns in of) for name, of in lists.items()}
    )
    assert Counter(Path(e["file"]).name for e in rejected if e["dropped"] == "turns") == +longer - Counter(
        {"conversations.yml": longer["conversations.yml"]}
    )
    assert sum(len(row["messages"]) > 2 for row in rows) == longer["conversations.yml"] == 17
    whole = [(Path(e["file"]).name, e["line"]) for e in rejected if e["dropped"] == "dialogue"]
    assert whole == [("trivia.yml", 35)]  # a text that is no list


def test_the_real_preferences():
    rejected: list[dict] = []
    path = real("pandalm_human_pref/testset-v1.json")
    rows = list(preference(path, rejected, persona=["i am an assistant ."]))
    counts = Counter(entry["reason"] for entry in rejected)
    assert len(rows) + counts.total() == 999
    assert counts["no majority for one response"] == 999 - 894
    assert counts["placeholder"] == 49 and len(rows) == 786
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all(lines[entry["line"] - 1].strip() == "{" for entry in rejected)
