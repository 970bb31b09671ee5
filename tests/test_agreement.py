"""Agreement between probes of one fact, by hand."""

import pytest

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
    # direct and true are right in 4 of 6, false in 2 of 6; per fact 3 pairs within kinds, 4 of each two kinds
    same = {"direct": 5 / 9, "false": 5 / 9}
    mixed = 2 / 3 * 1 / 3 + 1 / 3 * 2 / 3  # direct or true with false
    expected = (same["direct"] * 2 + same["false"] + 4 * 5 / 9 + 8 * mixed) / 15
    assert agreement.by_chance == pytest.approx(expected)


def test_a_bot_that_is_always_wrong_agrees_with_itself():
    found = [row for i in range(20) for row in rows(f"p{i}", [False] * 6)]
    agreement = measure_agreement(found)
    assert agreement.share.value == agreement.by_chance == 1 and agreement.share.low == pytest.approx(0.839, abs=1e-3)


def test_one_question_has_nothing_to_agree_with():
    assert measure_agreement(rows("a", [True] * 6)[:1]) is None and measure_agreement([]) is None


def test_one_persona_is_resampled_by_its_facts():
    found = [{**row, "fact_id": f"a/{i}"} for i in range(8) for row in rows("a", [i % 2 == 0, True, True] * 2)]
    share = measure_agreement(found).share
    assert share.low < share.value < share.high
