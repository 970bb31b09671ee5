"""Half-life and its interval, against the exponential worked out by hand."""

import math

import pytest

from evaluation.drift import half_life_words, measure_drift


def replies(kept: dict[str, list[bool]], turns: list[int]) -> list[dict]:
    """A fact a persona, asked by one kind of probe: whether it was kept at each turn."""
    return [
        {"persona_id": name, "fact_id": f"{name}/job", "split": "seen", "turn": turn, "kind": "direct", "correct": right,
         "decoding": "greedy"}
        for name, row in kept.items() for turn, right in zip(turns, row, strict=True)
    ]  # fmt: skip


def test_half_life_by_hand():
    # 199 of 199 facts at turn 0, 49 at turn 2: (199.5 / 200) / (49.5 / 200) = 4.030 in two exchanges
    drift = measure_drift(replies({f"p{i}": [True, i < 49] for i in range(199)}, [0, 2]))
    assert drift.kept == pytest.approx([1.0, 49 / 199]) and drift.num_facts == 199
    assert drift.rate.value == pytest.approx(math.log(199.5 / 49.5) / 2)
    assert drift.change.value == pytest.approx(-150 / 199)
    # of the share .246, 1.96 sqrt(.246 * .754 / 199) = .060; the bootstrap's bounds lie near, to a tenth of the width
    assert drift.change.low == pytest.approx(-150 / 199 - 0.060, abs=0.012)
    assert drift.change.high == pytest.approx(-150 / 199 + 0.060, abs=0.012)
    text, note = half_life_words(drift)
    assert text == "1.0 exchanges"  # 2 ln 2 / ln 4.030 = .9946
    low, high = map(float, note.split(" to "))
    assert low < 0.9946 < high and "extrapolated" not in note


def test_three_turns_are_fitted_by_least_squares():
    # 100, 50 and 50 of 100 kept: slope of the logs over turns 0, 1, 2 is (last - first) / 2
    kept = {f"p{i}": [True, i < 50, i < 50] for i in range(100)}
    assert measure_drift(replies(kept, [0, 1, 2])).rate.value == pytest.approx(math.log(100.5 / 50.5) / 2)


def test_slow_decay_is_called_extrapolated():
    drift = measure_drift(replies({f"p{i}": [True, i >= 20] for i in range(200)}, [0, 2]))  # a tenth is lost
    text, note = half_life_words(drift)
    assert text == "13.2 exchanges" and "beyond the 2 asked after" in note  # 2 ln 2 / ln(200.5 / 180.5) = 13.19


def test_no_drop_is_not_called_a_half_life():
    moved = {f"p{i}": [i % 10 != 0, i % 10 != 1] for i in range(100)}  # ten lost, ten won
    text, note = half_life_words(measure_drift(replies(moved, [0, 5])))
    assert text == "no drop seen within 5 exchanges" and note.startswith("half-life, if any, at least ")


def test_where_no_fact_moves_the_interval_is_not_a_point():
    drift = measure_drift(replies({f"p{i}": [True, True] for i in range(100)}, [0, 5]))
    # Wilson of 0 in 100: 1.96^2 / (100 + 1.96^2) = .03699
    assert drift.change == pytest.approx((0, -0.03699, 0.03699), abs=1e-5)
    assert half_life_words(drift) == ("no drop seen within 5 exchanges", "half-life, if any, at least 91 exchanges")


def test_too_few_kept_facts_have_no_half_life():
    drift = measure_drift(replies({f"p{i}": [i < 9, False] for i in range(100)}, [0, 5]))
    assert half_life_words(drift) == ("not told", "only 9 facts kept at turn 0")


def test_a_fact_counts_where_it_was_asked_at_every_turn_and_all_kinds_were_right():
    rows = replies({f"p{i}": [True, True] for i in range(20)}, [0, 5])
    rows += [{**row, "kind": "true_suggestion", "correct": row["persona_id"] != "p0"} for row in rows]
    rows += replies({"late": [True]}, [5])
    rows += [{**rows[0], "decoding": "sampled", "correct": False}, {"correct": None}]
    drift = measure_drift(rows)
    assert drift.num_facts == 20 and drift.kept == [0.95, 0.95]
    assert measure_drift(replies({"p": [True]}, [0])) is None and measure_drift([]) is None


def test_one_fact_has_no_interval():
    drift = measure_drift(replies({"p": [True, False]}, [0, 5]))
    assert math.isnan(drift.rate.low) and math.isnan(drift.change.low)
