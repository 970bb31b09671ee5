"""Agreement between probes of one fact: do its questions, their other wordings and its suggestions get one verdict?

A fact that is right where it is asked for in one way and wrong in another was hit rather than kept. The number is the
share of pairs of probes about one fact, at one turn, whose verdicts are the same. A bot that is always wrong agrees with
itself everywhere, so beside it stands the share that verdicts of the same rates would have if they were independent.
The rates are those of each kind, turn and split: what all facts lose by the turn, or in a wording, is no agreement.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

from evaluation.intervals import Interval, share_interval
from evaluation.probes import KINDS


class Agreement(NamedTuple):
    """How far the verdicts on one fact are the same."""

    share: Interval
    """Of pairs of probes, with the interval over personas, or over facts where there is one persona."""
    by_chance: float
    """The share if the verdicts on a fact were independent, each kind of probe right as often as at its turn in its split."""
    num_pairs: int


def measure_agreement(rows: Iterable[Mapping[str, Any]], seed: int = 0) -> Agreement | None:
    """Agreement of the greedy replies to probes; None where no fact was asked about twice at a turn.

    Args:
        rows: probe rows with `correct` and `decoding`; others are left out.
    """
    verdicts: dict[tuple[Any, ...], list[tuple[tuple[Any, ...], bool]]] = defaultdict(list)
    right: dict[tuple[Any, ...], list[bool]] = defaultdict(list)
    for row in rows:
        if row.get("correct") is not None and row["decoding"] == "greedy" and row["kind"] in KINDS:
            fact = (row["persona_id"], row["fact_id"], row["turn"])
            asked = (row["kind"], row["turn"], row["split"])
            verdicts[fact].append((asked, bool(row["correct"])))
            right[asked].append(bool(row["correct"]))
    rates = {asked: sum(found) / len(found) for asked, found in right.items()}
    pairs = {fact: list(combinations(found, 2)) for fact, found in verdicts.items()}
    pairs = {fact: found for fact, found in pairs.items() if found}
    if not pairs:
        return None
    unit = 0 if len({fact[0] for fact in pairs}) > 1 else 1
    clusters = [fact[unit] for fact in pairs]
    same = [float(sum(a == b for (_, a), (_, b) in found)) for found in pairs.values()]
    numbers = [len(found) for found in pairs.values()]
    share = share_interval(same, numbers, clusters, seed=seed)
    chance = sum(
        rates[one] * rates[other] + (1 - rates[one]) * (1 - rates[other])
        for found in pairs.values()
        for (one, _), (other, _) in found
    )
    return Agreement(share, chance / sum(numbers), sum(numbers))
