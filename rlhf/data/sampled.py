"""Preference pairs of replies that one model gave to one prompt: which two are compared, and how length is kept out of it.

A row is a prompt's row with {"replies": [text], "finished": [bool]}, and once it is judged {"scores": [float]}. A pair is
one of `rlhf/data/preferences.py`, of kind ``sampled``. Both replies come from the same model, so nothing in style tells
them apart but what the judge prefers. Judges prefer length all the same (Singhal et al. 2023,
https://arxiv.org/abs/2310.03716), hence the two replies are of about the same length, and over all pairs the chosen one
is longer by so many words as often as it is shorter by them.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations
from typing import Any

from rlhf.data.preferences import MAX_LENGTH_GAP

Row = dict[str, Any]


def best_and_worst(rows: Sequence[Row], min_margin: float, rejected: list[Row]) -> list[Row]:
    """One pair for each judged row that has one: of the replies that match in length, those furthest apart in score.

    Args:
        rows: With `scores`.
        min_margin: Least difference of the two scores.
        rejected: Gets {"dialogue_id", "reason", "dropped", "text"} for each reply that is unfit ("empty reply", "cut off",
            "duplicate reply") and each row that gives no pair ("too few replies", "tie", "too close", "length gap").
    """
    pairs = []
    for row in rows:
        replies, scores = row["replies"], row["scores"]
        fit = _fit(row, rejected)
        margins = {(i, j): scores[i] - scores[j] for i, j in permutations(fit, 2) if scores[i] > scores[j]}
        apart = [places for places, margin in margins.items() if margin >= min_margin]
        matched = [(i, j) for i, j in apart if _match(replies[i], replies[j])]
        if matched:
            # Where scores tie, as those of a rule do: the two that are nearest in length.
            best = min(matched, key=lambda ij: (-margins[ij], abs(_difference(replies[ij[0]], replies[ij[1]])), ij))
            pairs.append(_pair(row, *best))
        else:
            reason = "length gap" if apart else "too close" if margins else "tie"
            rejected.append(_no_pair(row, reason if len(fit) > 1 else "too few replies"))
    return pairs


def nearest_in_length(rows: Sequence[Row], rejected: list[Row]) -> list[Row]:
    """One pair for each row that has one, for a person to judge: the first two replies that are nearest in length.

    Which of them is called chosen means nothing yet. `rejected` is as for [`best_and_worst`].
    """
    pairs = []
    for row in rows:
        replies, fit = row["replies"], _fit(row, rejected)
        matched = [(i, j) for i, j in permutations(fit, 2) if i < j and _match(replies[i], replies[j])]
        if matched:
            pairs.append(_pair(row, *min(matched, key=lambda ij: abs(_difference(replies[ij[0]], replies[ij[1]])))))
        else:
            rejected.append(_no_pair(row, "length gap" if len(fit) > 1 else "too few replies"))
    return pairs


def balance_lengths(pairs: Sequence[Row], seed: int, rejected: list[Row]) -> list[Row]:
    """The pairs without as many, at random, as keep the chosen reply from being longer or shorter than by chance.

    For each number of words, as many pairs are left in which the chosen reply is longer by it as there are in which it is
    shorter. `rejected` gets the others, with the reason "length balance".
    """
    by_difference: dict[int, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        by_difference[_difference(*(pair[key][0]["content"] for key in ("chosen", "rejected")))].append(number)
    rng = random.Random(f"lengths/{seed}")
    surplus: set[int] = set()
    for difference, numbers in sorted(by_difference.items()):
        excess = len(numbers) - len(by_difference.get(-difference, ()))
        surplus |= set(rng.sample(numbers, max(0, excess)))
    for number in sorted(surplus):
        texts = [pairs[number][key][0]["content"] for key in ("chosen", "rejected")]
        rejected.append(_rejection(pairs[number], "length balance", "pair", "\n".join(texts)))
    return [pair for number, pair in enumerate(pairs) if number not in surplus]


def _fit(row: Row, rejected: list[Row]) -> list[int]:
    """Places of the replies that can be compared: said to the end, not empty, each once."""
    seen: set[str] = set()
    fit = []
    for place, (text, finished) in enumerate(zip(row["replies"], row["finished"], strict=True)):
        said = " ".join(text.casefold().split())
        reason = (
            "empty reply" if not said else "cut off" if not finished else "duplicate reply" if said in seen else None
        )
        if reason:
            rejected.append(_rejection(row, reason, "reply", text))
        else:
            seen.add(said)
            fit.append(place)
    return fit


def _match(chosen: str, rejected: str) -> bool:
    """Whether the lengths in words differ by at most 30 % of the shorter one, whichever is chosen."""
    return abs(_difference(chosen, rejected)) <= MAX_LENGTH_GAP * min(len(chosen.split()), len(rejected.split()))


def _difference(chosen: str, rejected: str) -> int:
    return len(chosen.split()) - len(rejected.split())


def _pair(row: Row, chosen: int, rejected: int) -> Row:
    return {
        **{key: row[key] for key in ("persona", "prompt", "dialogue_id")},
        "chosen": [{"role": "assistant", "content": row["replies"][chosen]}],
        "rejected": [{"role": "assistant", "content": row["replies"][rejected]}],
        "kind": "sampled",
    }


def _no_pair(row: Row, reason: str) -> Row:
    return _rejection(row, reason, "pair", "\n".join(row["replies"]))


def _rejection(row: Row, reason: str, dropped: str, text: str) -> Row:
    return {"dialogue_id": row["dialogue_id"], "reason": reason, "dropped": dropped, "text": text}
