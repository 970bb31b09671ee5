"""The audit on pairs with planted giveaways, and on pairs that only the persona decides."""

import logging
import math
import random
import re
from pathlib import Path

import pytest

from rlhf.data.audit import AuditError, audit, check_audit, overlap, refuse_cheaters
from rlhf.data.preferences import persona_pairs
from rlhf.data.sources import DataError, synthetic_persona_chat
from rlhf.data.split import split

REAL = Path(__file__).parents[2] / "shared/data/synthetic_persona_chat/valid.csv"
NAMES = [
    "longer_wins", "shorter_wins", "more_letters_wins", "fewer_letters_wins", "echo_wins", "novelty_wins",
    "bag_of_words", "reply_prefix", "reply_suffix", "writing", "turn_and_reply",
]  # fmt: skip


def pair(number: int, chosen: str, rejected: str) -> dict:
    return {
        "persona": [f"my name is number{number} ."],
        "prompt": [{"role": "user", "content": "well ?"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "dialogue_id": str(number),
        "kind": "planted",
    }


def by_persona(count: int) -> list[dict]:
    """Yes or no, which a coin has decided for each character; the same words on both sides otherwise."""
    rng = random.Random(7)
    pairs = []
    for number in range(count):
        right, wrong = rng.sample(["yes , i do .", "no , i do ."], 2)
        pairs.append(pair(number, right, wrong))
    return pairs


def accuracies(pairs: list[dict], heldout: list[dict] | None = None) -> dict[str, float]:
    return {cheater.name: cheater.accuracy for cheater in audit(pairs, 0, heldout)}


def test_length_is_counted_by_hand():
    heldout = [
        pair(1, "one two three .", "one ."),  # longer
        pair(2, "one two .", "one !"),  # longer
        pair(3, "one two .", "two one ."),  # equal
        pair(4, "one", "one two ."),  # shorter
    ]
    longer, shorter, *_ = audit(by_persona(20), 0, heldout)
    assert (longer.name, longer.accuracy, longer.n) == ("longer_wins", 0.625, 4)
    assert (shorter.name, shorter.accuracy, shorter.n) == ("shorter_wins", 0.375, 4)


def test_interval_is_wilsons():
    # 6 of 8, z = 1.959964: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    heldout = [pair(n, "one two", "one") if n < 6 else pair(n, "one", "one two") for n in range(8)]
    longer = audit(by_persona(20), 0, heldout)[0]
    p, n, z = 0.75, 8, 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # scipy's z has more digits
    assert longer.low == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-6)
    assert longer.high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-6)


def test_pairs_of_one_character_are_worth_fewer():
    """Of ten characters with ten pairs each seven win all: design effect 10, so the interval is that of 7 of 10."""
    heldout = [
        {**pair(n, *(("x x", "x") if n // 10 < 7 else ("x", "x x"))), "persona": [f"my name is number{n // 10} ."]}
        for n in range(100)
    ]
    longer = audit(by_persona(20), 0, heldout)[0]
    seven = audit(by_persona(20), 0, heldout[::10])[0]
    assert (longer.accuracy, longer.n, seven.n) == (0.7, 100, 10)
    # Wilson by hand: (0.7 + z²/20 - z √(0.021 + z²/400)) / (1 + z²/10) with z = 1.959964
    assert longer.low == pytest.approx(0.39678, abs=1e-5) and longer.low == seven.low
    refuse_cheaters([longer])  # 70 %, which chance explains


def test_which_reply_fits_the_turn_is_asked(caplog):
    """Either reply is chosen as often as rejected, and neither repeats the turn."""
    drinks = [("hot drink ?", "tea please", "beer please"), ("cold drink ?", "beer please", "tea please")]
    pairs = [
        {**pair(n, *drinks[n % 2][1:]), "prompt": [{"role": "user", "content": drinks[n % 2][0]}]} for n in range(100)
    ]
    assert {name for name, accuracy in accuracies(pairs).items() if accuracy > 0.6} == {"turn_and_reply"}
    with caplog.at_level("WARNING"):
        check_audit(pairs, 0)  # of real replies the better one may well fit its turn better
    assert "`turn_and_reply` 100.0%" in caplog.text and "forced" not in caplog.text


def test_pairs_that_only_the_persona_decides_pass():
    pairs = by_persona(400)
    cheaters = check_audit(pairs, 0)
    assert [cheater.name for cheater in cheaters] == NAMES
    assert [cheater.n for cheater in cheaters] == [120] * len(NAMES)  # 30 % of the characters, one pair each
    assert cheaters[0].accuracy == cheaters[1].accuracy == 0.5
    # a coin for each character: 120 tosses are within 0.5 ± 0.1 in 97 of 100 seeds, and this seed is fixed
    assert all(abs(cheater.accuracy - 0.5) < 0.1 for cheater in cheaters)


@pytest.mark.parametrize(
    ("good", "bad", "caught"),
    [
        (
            "i have a dog and a cat {}",
            "i have a {}",
            {"longer_wins", "more_letters_wins", "bag_of_words", "reply_suffix", "writing", "turn_and_reply"},
        ),
        (
            "i have {}",
            "i really do not have {}",
            {"shorter_wins", "fewer_letters_wins", "bag_of_words", "reply_prefix", "writing", "turn_and_reply"},
        ),
        ("i have a lovely {}", "i have a rotten {}", {"bag_of_words", "reply_suffix", "turn_and_reply"}),
        ("have i a {}", "i have a {}", {"reply_prefix"}),
    ],
)
def test_a_planted_giveaway_is_caught_by_name(good, bad, caught):
    words = ["dog", "cat", "hen", "fox"]
    pairs = [pair(n, good.format(words[n % 4]), bad.format(words[n // 4 % 4])) for n in range(100)]
    found = accuracies(pairs)
    assert {name for name, accuracy in found.items() if accuracy > 0.6} == caught
    assert all(found[name] == 1.0 for name in caught)
    with pytest.raises(AuditError) as error:
        check_audit(pairs, 0)
    assert {name for name in NAMES if f"`{name}` 100.0%" in str(error.value)} == caught - {"turn_and_reply"}
    assert "or force them" in str(error.value)


def new(rng: random.Random, length: int) -> str:
    """A word that no other pair has."""
    return "".join(rng.choices("bcdfghjklmnpqrstvwz", k=length))


@pytest.mark.parametrize(
    ("good", "bad", "caught"),
    [
        ("{nine} {nine} {nine}", "{five} {five} {five}", "more_letters_wins"),
        ("{five} {five} {five}", "{nine} {nine} {nine}", "fewer_letters_wins"),
        ("{FIVE} {five} {five}", "{five} {five} {five}", "writing"),
        ("{five}\n{five} {five}", "{five} {five} {five}", "writing"),
        ("{five} so there", "{five} there so", "reply_suffix"),
        ("{five} {said} {said}", "{five} {five} {five}", "echo_wins"),
        ("{five} {five} {five}", "{five} {said} {said}", "novelty_wins"),
    ],
)
def test_a_giveaway_in_words_that_are_always_new_is_caught(good, bad, caught):
    rng = random.Random(3)

    def written(form: str, said: str) -> str:
        kinds = {"{nine}": lambda: new(rng, 9), "{five}": lambda: new(rng, 5), "{FIVE}": lambda: new(rng, 5).upper()}
        return re.sub(r"\{\w+\}", lambda found: kinds.get(found[0], lambda: said)(), form)

    pairs = []
    for number in range(100):
        said = new(rng, 5)
        made = pair(number, written(good, said), written(bad, said))
        pairs.append({**made, "prompt": [{"role": "user", "content": f"{said} ?"}]})
    found = accuracies(pairs)
    assert {name for name, accuracy in found.items() if accuracy > 0.6} == {caught}
    assert found[caught] == 1.0


def test_overlap_by_hand():
    turns = [{"role": "user", "content": text} for text in ("red", "hi", "do you ski ?", "i do", "where")]
    # of "i", "ski", "red", ".": "red" stands in the fifth turn from the end
    assert overlap(turns, "I ski red red.") == 0.5
    assert overlap(turns, "") == overlap([], "hi") == 0.0


def test_forced_pairs_are_used_with_a_warning(caplog):
    pairs = [pair(n, "a long reply", "short") for n in range(40)]
    with caplog.at_level(logging.WARNING, logger="rlhf.data.audit"):
        cheaters = check_audit(pairs, 0, force=True)
    assert cheaters[0].accuracy == 1.0
    assert "`longer_wins` 100.0%" in caplog.text and "forced" in caplog.text


def test_sixty_per_cent_is_no_offence_and_a_little_more_is():
    def lengths(longer: int) -> list[dict]:
        return [pair(n, *(("x x", "x") if n < longer else ("x", "x x"))) for n in range(100)]

    train = by_persona(20)
    assert check_audit(train, 0, lengths(60))[0].accuracy == 0.6
    with pytest.raises(AuditError, match=r"`longer_wins` 61\.0%"):
        check_audit(train, 0, lengths(61))


def test_cheaters_learn_from_training_pairs_alone():
    train = [pair(n, "good", "bad") for n in range(20)]
    turned = [pair(n, "bad", "good") for n in range(20, 30)]
    assert accuracies(train, turned)["bag_of_words"] == 0.0
    unseen = [pair(n, "fine", "poor") for n in range(20, 30)]
    assert accuracies(train, unseen)["bag_of_words"] == 0.5


def test_the_order_of_the_pairs_changes_nothing():
    pairs = by_persona(60)
    heldout = [pair(100 + n, "yes , i do .", "no , i do .") for n in range(5)]
    assert audit(pairs, 0, heldout) == audit(pairs[::-1], 0, heldout)


def test_one_character_cannot_be_split():
    pairs = [pair(1, "yes", "no") for _ in range(10)]
    with pytest.raises(DataError, match="no training rows"):
        audit(pairs, 0)


@pytest.mark.skipif(not REAL.is_file(), reason="needs shared/data/synthetic_persona_chat")
def test_pairs_of_real_dialogues_pass():
    sides = split(list(synthetic_persona_chat(REAL, [])), 0.3, 42)
    (train, _), (heldout, _) = (persona_pairs(rows, 1500, 42) for rows in sides[:2])
    assert len({row["kind"] for row in train}) == 4
    # the interval of 1,500 pairs is ± 2.5 points
    assert all(abs(cheater.accuracy - 0.5) < 0.05 for cheater in check_audit(train, 42, heldout))
