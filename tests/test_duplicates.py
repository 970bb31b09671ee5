"""Near-duplicates against all pairs, with ratios worked out by hand, by difflib and by a textbook LCS."""

import difflib
import random
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

from rlhf.data import sources
from rlhf.data.duplicates import drop_duplicates, leaks, near_duplicates

SHARED = Path(__file__).parents[2] / "shared" / "data"
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.'?"


def text(unit):
    return f"{unit[0]}\n{unit[1]}"


def lcs(one, other):
    """Length of the longest common subsequence, by the recurrence of the textbook (Cormen et al., 14.4)."""
    row = [0] * (len(other) + 1)
    for a in one:
        previous = row
        row = [0]
        for at, b in enumerate(other):
            row.append(previous[at] + 1 if a == b else max(previous[at + 1], row[at]))
    return row[-1]


def ratio(one, other):
    return 2 * lcs(one, other) / (len(one) + len(other))


def test_the_first_is_kept_and_the_ratio_is_two_m_by_t():
    # "any pets ?\nyes , a dog ." has 24 characters; the second text lacks " ." (22): 2 * 22 / 46. The fourth is the first.
    units = [
        ("any pets ?", "yes , a dog ."),
        ("any pets ?", "yes , a dog"),
        ("hi", "hello"),
        ("any pets ?", "yes , a dog ."),
    ]
    assert near_duplicates(units) == [(0, 1, pytest.approx(44 / 46)), (0, 3, 1.0)]


def test_the_threshold_itself_is_not_above():
    # 10 characters on either side, 17 of 20 in common with the newline: 2 * 17 / 40 is 0.85; with 18 it is 0.9
    one = ("abcdefghij", "klmnopqrs")
    assert near_duplicates([one, ("abcdefghij", "klmnop123")]) == []
    assert near_duplicates([one, ("abcdefghij", "klmnopq23")]) == [(0, 1, pytest.approx(0.9))]


def test_no_chains():
    # of 20 characters: 1 and 2 differ in two (0.9), 2 and 3 in two others (0.9), 1 and 3 in four (0.8)
    units = [("abcdefghij", "klmnopqrs"), ("12cdefghij", "klmnopqrs"), ("1234efghij", "klmnopqrs")]
    assert [pair[:2] for pair in near_duplicates(units)] == [(0, 1)]
    assert [pair[:2] for pair in near_duplicates(units[1:])] == [(0, 1)]


def test_what_difflib_finds_is_found_and_its_order_dependence_is_not_shared():
    # Blocks taken greedily, the longest first, can miss what a subsequence has: difflib finds "abc" in the middle alone.
    one, other = "abcxdefg", "defgabcx"
    assert difflib.SequenceMatcher(None, one, other).ratio() <= ratio(one, other)
    rng = random.Random(0)
    for _ in range(300):
        one = "".join(rng.choices("abcde", k=rng.randint(1, 30)))
        other = "".join(rng.choices("abcde", k=rng.randint(1, 30)))
        assert difflib.SequenceMatcher(None, one, other, autojunk=False).ratio() <= ratio(one, other) + 1e-12
        assert Indel.normalized_similarity(one, other) == pytest.approx(ratio(one, other))


def test_difflibs_autojunk_would_miss_long_near_duplicates():
    rng = random.Random(1)
    long = "".join(rng.choices(LETTERS[:12], k=400))
    changed = "".join("!" if at % 20 == 7 else letter for at, letter in enumerate(long))  # 5 % of it
    assert difflib.SequenceMatcher(None, long, changed).ratio() < 0.85 < ratio(long, changed)
    assert [pair[:2] for pair in near_duplicates([(long, "yes"), (changed, "yes")])] == [(0, 1)]


def test_a_text_longer_than_all_others_together():
    long = "".join(random.Random(2).choices(LETTERS, k=20_000))
    short = [(str(number), "good day") for number in range(100)]
    assert (100, 101) in [pair[:2] for pair in near_duplicates([*short, (long, "yes"), (long[1_000:], "yes")])]


def test_short_empty_and_strange_texts():
    units = [("", ""), ("", "a"), ("hi", "hello"), ("hi", "hello!"), ("\ud800", "\U0001f600 \0"), ("hi", "hallo")]
    # "hi\nhello" against "hi\nhello!": 16 / 17; against "hi\nhallo": 14 / 16; "\n" against "\na": 2 / 3
    assert near_duplicates(units) == [(2, 3, pytest.approx(16 / 17)), (2, 5, pytest.approx(14 / 16))]
    assert near_duplicates([]) == near_duplicates([("a", "b")]) == []


@pytest.mark.parametrize("threshold", [0, 1, 85])
def test_an_impossible_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match="`threshold`.*0.85"):
        near_duplicates([("a", "b"), ("c", "d")], threshold)


def test_leaks_are_between_the_sides_only():
    train = [("any pets ?", "yes , a dog ."), ("any pets ?", "yes , a dog"), ("hi", "good day")]
    heldout = [
        ("what is up ?", "nothing"),
        ("any pets ?", "yes , a dog !"),
        ("hi", "good day"),
        ("what is up ?", "nothing"),
    ]
    # 23 of 24 characters in common: 46 / 48
    assert leaks(train, heldout) == [(0, 1, pytest.approx(46 / 48)), (2, 2, 1.0)]
    assert leaks(train, []) == leaks([], heldout) == []


def row(number, *texts, source="mine", **keys):
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(texts)]
    return {"persona": ["i have a dog ."], "messages": messages, "dialogue_id": f"d{number}", "source": source, **keys}


def test_a_duplicate_reply_stays_as_context():
    first = row(1, "any pets ?", "yes , a dog .", "what is its name ?", "rex , like my uncle .")
    second = row(2, "any pets ?", "yes , a dog !", "do you ski ?", "never in my life .", file="a.csv", line=7)
    left, rejected = drop_duplicates([first, second])
    assert left[0] is first
    assert [message.get("train", True) for message in left[1]["messages"]] == [True, False, True, True]
    assert [message["content"] for message in left[1]["messages"]] == [m["content"] for m in second["messages"]]
    assert all("train" not in message for message in second["messages"])
    assert rejected == [
        {
            "file": "a.csv",
            "line": 7,
            "reason": "near-duplicate",
            "dropped": "reply",
            "text": "yes , a dog !",
            "dialogue_id": "d2",
            "duplicate_of": [{"message": 1, "dialogue_id": "d1", "reply": 1, "ratio": 0.9583}],
        }
    ]


def test_another_answer_to_the_same_question_is_no_duplicate():
    question = "what do you do for a living , if i may ask you that ?"
    rows = [row(1, question, "i am a farmer ."), row(2, question, "i am a student .")]
    assert len(near_duplicates([(question, "i am a farmer ."), (question, "i am a student .")])) == 1
    assert drop_duplicates(rows) == (rows, [])
    # and does not hide that the third answer is the second
    left, rejected = drop_duplicates([*rows, row(3, question, "i am a student !")])
    assert left == rows
    assert [found["dialogue_id"] for found in rejected[0]["duplicate_of"]] == ["d2"]


def test_a_dialogue_of_duplicates_alone_is_dropped_with_the_reason():
    texts = ("any pets ?", "yes , a dog .", "do you ski ?", "never in my life .")
    left, rejected = drop_duplicates([row(1, *texts), row(2, *texts[2:], *texts[:2])])
    assert [kept["dialogue_id"] for kept in left] == ["d1"]
    assert [(entry["dropped"], entry["reason"]) for entry in rejected] == [
        ("dialogue", "every reply is a near-duplicate")
    ]
    assert rejected[0]["text"].startswith("user: do you ski ?\nassistant: never")
    assert [found["reply"] for found in rejected[0]["duplicate_of"]] == [3, 1]


def test_a_source_called_world_is_looked_at_and_untrained_replies_are_not():
    texts = ("any pets ?", "yes , a dog .")
    worlds = [row(1, *texts, source="world"), row(2, *texts, source="world")]
    assert drop_duplicates(worlds)[0] == worlds[:1]
    untrained = row(3, *texts)
    untrained["messages"][1]["train"] = False
    rows = [untrained, row(4, *texts)]
    assert drop_duplicates(rows) == (rows, [])


def changed(rng, words, original, kind):
    """The text edited again and again, as long as its ratio stays at 0.86 or above; None where one edit is too many."""
    goal = rng.choice((0.86, 0.86, rng.uniform(0.86, 0.99)))  # most of them at the edge
    now, last = original, None
    for _ in range(len(original)):
        at = rng.randrange(len(now))
        if kind == "replace":
            now = now[:at] + rng.choice(LETTERS) + now[at + 1 :]
        elif kind == "insert":
            now = now[:at] + rng.choice(LETTERS) + now[at:]
        elif kind == "delete" and len(now) > 2:
            now = now[:at] + now[at + 1 :]
        elif kind == "append":
            now += rng.choice(LETTERS)
        elif kind == "case":
            now = now[:at] + now[at].swapcase() + now[at + 1 :]
        elif kind == "word":
            parts = now.split(" ")
            parts[rng.randrange(len(parts))] = rng.choice(words)
            now = " ".join(parts)
        if 2 * LCSseq.similarity(original, now) / (len(original) + len(now)) < goal:
            break
        last = now if now != original else last
    return last


def real_units(count):
    """Units of both real files, one half each, each text once."""
    persona_chat = SHARED / "synthetic_persona_chat" / "valid.csv"
    convai2 = SHARED / "convai2_personachat" / "valid_self_original.txt"
    if not (persona_chat.is_file() and convai2.is_file()):
        pytest.skip(f"needs {persona_chat} and {convai2}")
    rows = sources.synthetic_persona_chat(persona_chat, [])
    pairs = [
        (before["content"], after["content"])
        for row in rows
        for before, after in zip(row["messages"], row["messages"][1:], strict=False)
        if after["role"] == "assistant"
    ]
    lines = convai2.read_text(encoding="utf-8").splitlines()
    asked = [tuple(line.split(" ", 1)[1].split("\t")[:2]) for line in lines if "\t" in line]
    rng = random.Random(3)
    return rng.sample(list(dict.fromkeys(pairs)), count // 2) + rng.sample(list(dict.fromkeys(asked)), count // 2)


def generated_units(count):
    """Units of words some of which are common and most rare, as in natural text (Zipf's law)."""
    rng = random.Random(5)
    words = ["".join(rng.choices(LETTERS[:20], k=rng.randint(1, 8))) for _ in range(3_000)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(words))))

    def sentence():
        return " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(1, 16))) + rng.choice((" .", " ?"))

    return list(dict.fromkeys((sentence(), sentence()) for _ in range(count)))


@pytest.mark.parametrize("source", [real_units, generated_units])
def test_recall_and_precision_with_planted_duplicates(source):
    real = source(2_000)
    assert len(real) == 2_000
    rng = random.Random(4)
    kinds = ("replace", "insert", "delete", "append", "case", "word")
    words = [word for unit in real for word in text(unit).split()]
    short = sorted(real, key=lambda unit: len(text(unit)))[:100]
    edits = [changed(rng, words, text(unit), kinds[at % len(kinds)]) for at, unit in enumerate([*real[::4], *short])]
    planted = [tuple(edit.split("\n", 1)) for edit in edits if edit and "\n" in edit]
    assert len(planted) > 450
    units = [*real, *planted]
    texts = [text(unit) for unit in units]

    # All pairs, by another function of the library: the LCS itself.
    lengths = np.array([len(one) for one in texts])
    common = process.cdist(texts, texts, scorer=LCSseq.similarity, dtype=np.int32)
    ratios = 2 * common / (lengths[:, None] + lengths)
    dropped: dict[int, int] = {}
    for index in range(len(texts)):
        similar = [other for other in np.flatnonzero(ratios[index, :index] > 0.85) if other not in dropped]
        if similar:
            dropped[index] = similar[0]

    found = near_duplicates(units)
    assert all(ratios[kept, index] > 0.85 for kept, index, _ in found)  # precision is 1
    np.testing.assert_allclose(
        [value for *_, value in found], [ratios[kept, index] for kept, index, _ in found], rtol=1e-12
    )
    mine = {index for _, index, _ in found}
    assert not mine & {kept for kept, *_ in found}
    assert len(mine & dropped.keys()) >= 0.99 * len(dropped) and len(dropped) > 450

    # Across a split: the planted ones are held out.
    wanted = {at for at in range(len(planted)) if (ratios[len(real) + at, : len(real)] > 0.85).any()}
    leaked = leaks(real, planted)
    assert all(ratios[first, len(real) + second] > 0.85 for first, second, _ in leaked)
    assert len({second for _, second, _ in leaked} & wanted) >= 0.99 * len(wanted)

    # What difflib's greedy blocks would have called similar is a part of what was dropped, and not all of it.
    by_difflib = [
        difflib.SequenceMatcher(None, texts[kept], texts[index], autojunk=False).ratio() for kept, index, _ in found
    ]
    assert 0.8 < np.mean(np.array(by_difflib) > 0.85) < 1
