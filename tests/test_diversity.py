"""Distinct-n and repetition against hand counts, and the jackknife against an independent computation."""

import math
from pathlib import Path

import numpy as np
import pytest

from evaluation.diversity import (
    distinct_interval,
    distinct_n,
    distinct_per_reply,
    ead,
    ead_interval,
    repetition,
    taken_from,
)

CONVAI2 = Path(__file__).parents[2] / "shared/data/convai2_personachat/valid_self_original.txt"
REPLIES = ["i like dogs .", "i like cats .", "no"]  # 7 tokens: i like dogs i like cats no


def test_distinct_by_hand():
    assert distinct_n(REPLIES, 1, 7) == 5 / 7
    assert distinct_n(REPLIES, 2, 7) == 3 / 4  # pairs do not cross replies: i like, like dogs, i like, like cats
    assert distinct_n(["a a a the dog"], 1, 1) == 1  # articles are not tokens


def test_distinct_takes_exactly_the_first_tokens_of_the_shuffle():
    replies = ["same"] * 50 + ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10"]
    assert distinct_n(["w1 w2 w3 w4"], 1, 3) == 1  # cut inside a reply
    values = {distinct_n(replies, 1, 10, seed) for seed in range(40)}
    assert 1 / 10 in values and len(values) > 1  # the order depends on the seed
    assert distinct_n(replies, 1, 10, 3) == distinct_n(replies, 1, 10, 3)
    assert distinct_n(replies, 1, 60) == 11 / 60


def test_too_few_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"`num_tokens` = 8, but the 3 replies have 7 tokens"):
        distinct_n(REPLIES, 1, 8)
    with pytest.raises(ValueError, match="no 2-gram"):
        distinct_n(["yes", "no"], 2, 2)


def test_jackknife_is_leaving_each_dialogue_out():
    rng = np.random.default_rng(0)
    replies = [" ".join(f"w{i}" for i in rng.zipf(1.6, size=8) if i < 500) + " x" for _ in range(60)]
    clusters = [str(i // 3) for i in range(60)]
    tokens = [reply.split() for reply in replies]
    total = sum(map(len, tokens))

    def distinct(kept):
        found = [pair for i in kept for pair in zip(tokens[i], tokens[i][1:], strict=False)]
        return len(set(found)) / len(found)

    value = distinct(range(60))
    without = np.array([distinct([i for i in range(60) if clusters[i] != c]) for c in sorted(set(clusters))])
    error = math.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum())
    interval = distinct_interval(replies, clusters, 2, total)
    assert interval == pytest.approx((value, value - 1.959964 * error, value + 1.959964 * error), abs=1e-6)
    assert interval.value == distinct_n(replies, 2, total)
    assert interval.low < interval.value < interval.high


def test_one_dialogue_has_no_interval():
    value, low, high = distinct_interval(REPLIES, ["d"] * 3, 1, 7)
    assert value == 5 / 7 and math.isnan(low) and math.isnan(high)


def test_repetition_by_hand():
    assert repetition("i like to eat pizza", ["well i like to eat"]) == (1, 2)
    assert repetition("go on go on go on") == (1, 3)  # "go on go on" comes twice; "on go on go" once
    assert repetition("i like to eat pizza") == (0, 2)
    assert repetition("too short now") == (0, 0)
    assert repetition("") == (0, 0)


def test_taken_from_by_hand():
    context = ["i have two dogs and a cat", "well i like to eat"]
    assert taken_from("i have two dogs and you", context) == (2, 3)
    assert taken_from("i like to eat i like to eat", context) == (2, 5)  # the repeat is in the texts too
    assert taken_from("go on go on go on", context) == (0, 3)  # repetition within the reply is another number
    assert taken_from("too short", context) == (0, 0)
    assert taken_from("i have two dogs", []) == (0, 1)


def test_distinct_per_reply_by_hand():
    assert distinct_per_reply("go on go on", 1) == 2 / 4
    assert distinct_per_reply("go on go on", 2) == 2 / 3
    assert distinct_per_reply("go", 2) is None


def test_ead_by_hand():
    # two draws from two words show 2 (1 - 1/4) = 1.5 different ones
    assert ead(1, 2, vocabulary=2) == pytest.approx(1 / 1.5)
    assert ead(2, 2, vocabulary=2) == pytest.approx(2 / 1.5)
    # 3 of 5 words, vocabulary 10: 10 (1 - 0.9^5) = 4.0951
    assert ead(3, 5, vocabulary=10) == pytest.approx(3 / 4.0951)
    for different, total, vocabulary in ((0, 0, 10), (6, 5, 10), (11, 20, 10)):
        with pytest.raises(ValueError, match="`vocabulary`"):
            ead(different, total, vocabulary)


def test_ead_does_not_fall_with_size_as_distinct_does():
    rng = np.random.default_rng(1)
    draws = rng.integers(1000, size=20_000)
    small, large = (" ".join(f"w{i}" for i in draws[:size]) for size in (500, 20_000))
    values = [ead_interval([text], ["d"], vocabulary=1000).value for text in (small, large)]
    assert values == pytest.approx([1, 1], abs=0.05)  # what its expectation is for uniform draws
    assert distinct_n([small], 1, 500) > 10 * distinct_n([large], 1, 20_000)


def test_ead_interval_is_leaving_each_dialogue_out():
    replies = ["w1 w2 w3", "w3 w4", "w1 w5 w6 w7", "w8 w8"]
    clusters = ["a", "b", "c", "a"]
    words = [reply.split() for reply in replies]

    def value(kept):
        found = [word for i in kept for word in words[i]]
        return len(set(found)) / (20 * (1 - (19 / 20) ** len(found)))

    without = np.array([value([i for i in range(4) if clusters[i] != c]) for c in "abc"])
    error = math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    whole = value(range(4))
    expected = (whole, max(0, whole - 1.959964 * error), whole + 1.959964 * error)
    assert ead_interval(replies, clusters, vocabulary=20) == pytest.approx(expected, abs=1e-6)


@pytest.mark.skipif(not CONVAI2.exists(), reason="ConvAI2 validation data is not beside the checkout")
def test_distinct_of_human_replies_on_convai2():
    replies = [line.split("\t")[1] for line in CONVAI2.read_text(encoding="utf-8").splitlines() if "\t" in line]
    # 4,986 of 77,609 words and 29,875 of 69,808 pairs
    assert distinct_n(replies, 1, 77_609) == pytest.approx(4986 / 77609, abs=1e-9)
    assert distinct_n(replies, 2, 77_609) == pytest.approx(29875 / 69808, abs=1e-9)
