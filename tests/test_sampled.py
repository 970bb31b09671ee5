"""Pairs of several replies to one prompt, by hand: which two, what is left out and why, and the balance of lengths."""

from collections import Counter

import pytest

from rlhf.data.sampled import balance_lengths, best_and_worst, nearest_in_length


def row(
    replies: list[str], scores: list[float] | None = None, cut_off: tuple[int, ...] = (), name: str = "d1"
) -> dict:
    judged = {} if scores is None else {"scores": scores}
    return {
        "persona": ["i have a dog ."], "prompt": [{"role": "user", "content": "any pets ?"}], "dialogue_id": name,
        "kind": "direct", "value": "dog", "replies": replies,
        "finished": [place not in cut_off for place in range(len(replies))], **judged,
    }  # fmt: skip


def texts(pair: dict) -> tuple[str, str]:
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def test_the_pair_is_the_best_and_the_worst():
    (pair,) = best_and_worst([row(["a dog", "a cat", "a cow", "no pet"], [0.5, -2.0, 1.5, 0.0])], 1.0, [])
    assert pair == {
        "persona": ["i have a dog ."], "prompt": [{"role": "user", "content": "any pets ?"}], "dialogue_id": "d1",
        "chosen": [{"role": "assistant", "content": "a cow"}], "rejected": [{"role": "assistant", "content": "a cat"}],
        "kind": "sampled",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("replies", "scores", "expected"),
    [
        # 10 words may stand against 13, not against 14: 30 % of the shorter one
        (["w " * 10, "v " * 13], [2.0, 0.0], True),
        (["w " * 10, "v " * 14], [2.0, 0.0], False),
        (["v " * 14, "w " * 10], [2.0, 0.0], False),
        # a margin of exactly the least one is enough
        (["a b", "b a"], [1.0, 0.0], True),
        (["a b", "b a"], [0.75, 0.0], False),
    ],
)
def test_the_limits(replies, scores, expected):
    assert bool(best_and_worst([row(replies, scores)], 1.0, [])) == expected


def test_where_the_best_is_too_long_the_next_one_is_taken():
    (pair,) = best_and_worst([row(["one two three four", "one two", "three two"], [3.0, 2.0, 0.0])], 1.0, [])
    assert texts(pair) == ("one two", "three two")


def test_among_equal_scores_the_nearest_length_wins():
    replies = ["w " * 10 + "a", "w " * 10, "v " * 8 + "b", "v " * 10]
    (pair,) = best_and_worst([row(replies, [1.0, 1.0, 0.0, 0.0])], 1.0, [])
    assert texts(pair) == (replies[1], replies[3])


def test_nothing_is_dropped_without_a_reason():
    rows = [
        row(["", "  ", "a dog", "A  dog"], [0.0, 0.0, 1.0, 1.0], name="few"),
        row(["a dog", "a cat"], [1.0, 1.0], name="tie"),
        row(["a dog", "a cat"], [1.0, 0.5], name="close"),
        row(["a dog", "one two three"], [1.0, 0.0], name="length"),
        row(["a dog", "a cat and", "a cow"], [0.0, 9.0, 1.0], (1,), name="cut"),
    ]
    rejected: list[dict] = []
    (pair,) = best_and_worst(rows, 1.0, rejected)
    assert pair["dialogue_id"] == "cut" and texts(pair) == ("a cow", "a dog")
    assert [(entry["dialogue_id"], entry["dropped"], entry["reason"]) for entry in rejected] == [
        ("few", "reply", "empty reply"),
        ("few", "reply", "empty reply"),
        ("few", "reply", "duplicate reply"),
        ("few", "pair", "too few replies"),
        ("tie", "pair", "tie"),
        ("close", "pair", "too close"),
        ("length", "pair", "length gap"),
        ("cut", "reply", "cut off"),
    ]
    assert rejected[2]["text"] == "A  dog" and rejected[4]["text"] == "a dog\na cat"


def test_a_person_gets_the_two_that_are_nearest_in_length():
    replies = ["w " * 10, "v " * 12, "u " * 10, "u " * 10]
    rejected: list[dict] = []
    rows = [row(replies), row(["a", "one two"]), row(["a", "a"])]
    (pair,) = nearest_in_length(rows, rejected)
    assert texts(pair) == (replies[0], replies[2]) and pair["kind"] == "sampled"
    assert [entry["reason"] for entry in rejected] == [
        "duplicate reply", "length gap", "duplicate reply", "too few replies",
    ]  # fmt: skip


def pair(difference: int, number: int) -> dict:
    """The chosen reply has 11 words, `difference` more than the rejected one."""
    (made,) = best_and_worst(
        [row(["w " * 10 + "x", "v " * (11 - difference)], [1.0, 0.0], name=f"{difference}/{number}")], 1.0, []
    )
    return made


def test_each_difference_in_length_is_left_as_often_as_its_opposite():
    counts = {0: 5, 1: 9, -1: 4, 2: 3, -3: 2}
    pairs = [pair(difference, number) for difference, count in counts.items() for number in range(count)]
    rejected: list[dict] = []
    left = balance_lengths(pairs, 7, rejected)
    differences = Counter(len(good.split()) - len(bad.split()) for good, bad in map(texts, left))
    assert differences == {0: 5, 1: 4, -1: 4}
    assert left == [pair for pair in pairs if pair in left]  # in their order
    assert len(rejected) == len(pairs) - len(left) == 10
    assert {entry["reason"] for entry in rejected} == {"length balance"}
    dropped = {entry["dialogue_id"] for entry in rejected}
    assert dropped.isdisjoint(pair["dialogue_id"] for pair in left) and len(dropped) == 10
    assert balance_lengths(pairs, 7, []) == left != balance_lengths(pairs, 8, [])


def test_no_rows_no_pairs():
    assert best_and_worst([], 1.0, []) == nearest_in_length([], []) == balance_lengths([], 0, []) == []
