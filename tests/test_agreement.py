"""Agreement between probes of one fact, by hand."""

import pytest
from scipy import stats

from evaluation.agreement import measure_agreement
from evaluation.probes import KINDS

ASKED = [(kind, split) for split in ("seen", "held_out_wording") for kind in KINDS]


def rows(persona, verdicts, turn=0, decoding="greedy"):
    return [
        {"persona_id": persona, "fact_id": f"{persona}/pet", "turn": turn, "kind": kind, "split": split,
         "decoding": decoding, "correct": right}
        for (kind, split), right in zip(ASKED, verdicts, strict=True)
    ]  # fmt: skip


def test_pairs_of_one_fact_at_one_turn():
    found = [*rows("a", [True] * 6), *rows("b", [True, False, True] * 2), *rows("b", [False] * 6, turn=5)]
    agreement = measure_agreement([*found, *rows("a", [False] * 6, decoding="sampled"), {"correct": None}])
    # a: all 15 pairs; b: of four right and two wrong answers 6 + 1; at turn 5 all 15
    assert agreement.share.value == pytest.approx((15 + 7 + 15) / 45) and agreement.num_pairs == 45
    # at turn 0 direct and true are right for both, false for a alone: of b's and a's 15 pairs each 6 without false, at 1,
    # and 9 with it, at 1/2; at turn 5 all are wrong, so that all 15 agree
    assert agreement.by_chance == pytest.approx((2 * (6 + 9 / 2) + 15) / 45)


def test_what_all_facts_lose_alike_is_no_agreement():
    found = [
        *(row for p in "abcde" for turn in (0, 3) for row in rows(p, [turn == 0] * 6, turn=turn)),
        *(row for p in "fghij" for row in rows(p, [True] * 3 + [False] * 3, turn=7)),
    ]
    agreement = measure_agreement(found)
    # by turn all agree; by wording 6 of 15 pairs do; and neither is more than the rates of turn and wording make
    assert agreement.share.value == agreement.by_chance == pytest.approx((10 * 15 + 5 * 6) / (15 * 15))


def test_a_bot_that_is_always_wrong_agrees_with_itself():
    found = [row for i in range(20) for row in rows(f"p{i}", [False] * 6)]
    agreement = measure_agreement(found)
    assert agreement.share.value == agreement.by_chance == 1
    low = stats.binomtest(20, 20).proportion_ci().low  # .8316
    assert agreement.share.low == pytest.approx(
        low, abs=0.01
    )  # 2,000 resamples: .0013 of standard error, four of them


def test_one_question_has_nothing_to_agree_with():
    assert measure_agreement(rows("a", [True] * 6)[:1]) is None and measure_agreement([]) is None


def test_one_persona_is_resampled_by_its_facts():
    found = [{**row, "fact_id": f"a/{i}"} for i in range(8) for row in rows("a", [i % 2 == 0, True, True] * 2)]
    share = measure_agreement(found).share
    assert share.low < share.value < share.high
