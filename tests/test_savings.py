"""LoRA against full fine-tuning: every expected number is worked out by hand from two curves of three or four points."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.savings import Card, Side, calculate_savings, seconds_to_loss

ROOT = Path(__file__).parents[1]

SMALL, LARGE = Card("small", 16, 0.4, 50), Card("large", 80, 4.0, 200)
CARDS = (LARGE, SMALL)  # the order must not matter


def lora(**changes):
    # 2.0 is reached at 15 s, half way from (10, 3.0) to (20, 1.0)
    values = {"curve": [(0, 5.0), (10, 3.0), (20, 1.0)], "memory_gb": 4.0, "kept_bytes": 50_000_000}
    return Side("LoRA", **{**values, **changes})


def full(**changes):
    # 2.0 is reached at 40 s, and is its best
    values = {"curve": [(0, 5.0), (40, 2.0), (80, 2.5)], "memory_gb": 10.0, "kept_bytes": 2_000_000_000}
    return Side("full", **{**values, **changes})


def test_on_one_card():
    savings = calculate_savings(lora(), full(), "small", cards=CARDS, storage_price=0.1)
    assert savings.target_loss == 2.0  # the worse of the best losses 1.0 and 2.0
    assert savings.loss_gap == -1.0
    assert (savings.lora.seconds, savings.full.seconds) == (15, 40)
    assert savings.time_reduction == savings.cost_reduction == pytest.approx(1 - 15 / 40)
    assert (savings.lora.card, savings.full.card) == ("small", "small")
    assert savings.lora.dollars == pytest.approx(15 / 3600 * 0.4)
    assert savings.memory_reduction == pytest.approx(0.6)
    assert savings.storage_reduction == pytest.approx(0.975)
    assert savings.full.storage_per_month == pytest.approx(0.2)
    assert savings.estimates == ()  # a card of the list was measured, and both sides are on it
    assert [text.split()[0] for text in savings.verdicts().values()] == ["met", "NOT"]  # 62.5 % of 60 and of 75


def test_each_side_on_its_own_card():
    """Full needs the large card, four times as fast: 40 s become 10, at 4 $ an hour; LoRA's 15 s stay, at 0.4 $."""
    savings = calculate_savings(lora(), full(memory_gb=40.0), "small", cards=CARDS)
    assert (savings.lora.card, savings.full.card) == ("small", "large")
    assert savings.full.dollars == pytest.approx(10 / 3600 * 4.0)
    assert savings.cost_reduction == pytest.approx(1 - (15 * 0.4) / (10 * 4.0))  # 85 %
    assert savings.time_reduction == pytest.approx(0.625)  # of the seconds measured, on one machine
    assert len(savings.estimates) == 1 and "times 50 / 200" in savings.estimates[0]
    text = str(savings)
    assert "| its rate, $ an hour | 0.40 | 4.00 |  |" in text and "- estimate: cost of full" in text
    assert "- cost: 75% less or better: met (85.0% less)" in text


def test_a_t4_holds_what_torch_has_of_it():
    """14.74 GiB are 15.83 GB, of which 1 is reserved: 14.9 GB, which 16 GB would hold, need the next card."""
    savings = calculate_savings(lora(memory_gb=14.8), full(memory_gb=14.9), "a CPU")
    assert (savings.lora.card, savings.full.card) == ("T4", "L4")


def test_a_machine_that_is_no_card():
    """Seconds of a CPU are taken for the card's, which says so and cancels out."""
    savings = calculate_savings(lora(memory_rule="planned by hand"), full(), "a CPU", cards=CARDS)
    assert savings.cost_reduction == pytest.approx(0.625)
    assert savings.estimates[0] == "memory of LoRA: planned by hand"
    assert "as many seconds as a CPU did" in savings.estimates[1] and len(savings.estimates) == 2


def test_a_side_that_never_gets_there():
    """LoRA stays behind: no saving is claimed at full fine-tuning's best loss, and the gap is printed."""
    behind = lora(curve=[(0, 5.0), (10, 3.0), (20, 2.5)])
    savings = calculate_savings(behind, full(), "small", target_loss=2.0, cards=CARDS)
    assert savings.lora.seconds is None and savings.time_reduction is None and savings.cost_reduction is None
    assert savings.loss_gap == 0.5 and "Loss gap, LoRA less full: +0.5000." in str(savings)
    assert set(savings.verdicts().values()) == {"not known"}
    at_both = calculate_savings(behind, full(), "small", cards=CARDS)
    assert at_both.target_loss == 2.5 and at_both.lora.seconds == 20
    assert at_both.full.seconds == pytest.approx(40 * 2.5 / 3.0)  # 2.5 of the 3.0 down to 2.0


def test_slower_is_said():
    """20 s against 10: LoRA takes twice the time."""
    savings = calculate_savings(lora(curve=[(0, 5.0), (20, 2.0)]), full(curve=[(0, 5.0), (10, 2.0)]), "small")
    assert savings.time_reduction == -1.0
    assert savings.verdicts()["time: 60% less or better"] == "NOT met (100.0% more)"


def test_too_large_for_every_card():
    savings = calculate_savings(lora(), full(memory_gb=79.5), "small", cards=CARDS)  # with the reserve 80.5
    assert savings.full.card is None and savings.full.dollars is None and savings.cost_reduction is None
    assert "full fits on no card" in savings.estimates[0] and savings.time_reduction is not None


@pytest.mark.parametrize(
    ("target", "seconds"), [(6.0, 0), (5.0, 0), (4.0, 5), (3.0, 10), (1.0, 20), (0.9, None)],
)  # fmt: skip
def test_seconds_to_loss(target, seconds):
    assert seconds_to_loss([(0, 5.0), (10, 3.0), (20, 1.0)], target) == seconds


def test_a_loss_that_rises_again_counts_when_it_was_first_reached():
    assert seconds_to_loss([(0, 4.0), (10, 2.0), (20, 4.0), (30, 1.0)], 2.0) == 10


def test_all_faults_are_named():
    with pytest.raises(ValueError) as refused:
        calculate_savings(lora(curve=[(0, 1.0)]), full(curve=[(0, 2.0), (0, float("nan"))], kept_bytes=0), "x")
    text = str(refused.value)
    assert text.count("\n") == 3 and "`curve` of LoRA" in text and "`kept_bytes` of full" in text and "finite" in text


def test_json():
    savings = json.loads(calculate_savings(lora(), full(), "small", cards=CARDS).to_json())
    assert savings["full"]["rate_per_gpu_hour"] == 0.4 and savings["verdicts"]["time: 60% less or better"][:3] == "met"


# The benchmark that measures both sides


def test_levels_of_the_benchmark(monkeypatch):
    """From 5.0 to 2.0, which both reach: half way is 3.5, at 7.5 s of LoRA's 10 from 5.0 to 3.0 and at 20 of full's 40."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("savings")
    measured = [
        {"curve": each.curve, "peak_memory_gb": each.memory_gb, "kept_bytes": each.kept_bytes, "tokens": 7}
        for each in (lora(), full())
    ]
    found = benchmark.report(*measured, search=[])
    assert [level["loss"] for level in found["levels"]] == pytest.approx([3.5, 2.75, 2.3, 2.15, 2.0])
    assert found["levels"][0]["lora"] == pytest.approx(7.5) and found["levels"][0]["full"] == pytest.approx(20)
    assert found["levels"][0]["less"] == pytest.approx(0.625) and found["savings"]["time_reduction"] == 0.625
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_the_benchmark_measures_both_sides(tmp_path):
    """Four steps a side, one learning rate; the rest is as in the whole."""
    command = [sys.executable, "benchmarks/savings.py", "--quick", "--output", str(tmp_path / "savings.json")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "savings.json").read_text())
    one, other = found["lora"], found["full"]
    assert one["curve"][0] == other["curve"][0] and one["curve"][0][0] == 0  # the same base, nothing trained yet
    assert one["tokens"] == other["tokens"] and one["steps"] == other["steps"] == 4  # the same rows in the same order
    # 4 layers of q, k, v, o (128 x 128) and gate, up, down (128 x 256), rank 16; the base has 0.8 M parameters
    assert one["trainable_parameters"] == 4 * 16 * (4 * 256 + 3 * 384) == 139_264
    assert other["trainable_parameters"] > 5 * one["trainable_parameters"]
    assert other["optimizer_bytes"] > 5 * one["optimizer_bytes"] and other["kept_bytes"] > 5 * one["kept_bytes"]
    assert one["curve"][-1][1] < one["curve"][0][1] and all(side["own_gb"] > 0 for side in (one, other))
