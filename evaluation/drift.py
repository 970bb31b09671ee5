"""Drift: how many facts are still kept after k exchanges about other things, and how fast they get lost.

The model is exponential: of the facts kept at turn 0 a share 2^(-k / half-life) is kept after k exchanges. Its rate is the
least-squares slope of log((kept + 1/2) / (facts + 1)) over the turns that were asked at; the halves let zero have a
logarithm. Personas are resampled with all their turns, so what an easy persona gives to every turn cancels out. The
interval is that of the rate: a rate that may be 0 is no drop, and its half-life has a lower bound only.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from evaluation.intervals import Interval, bootstrap_together, ratio, wilson
from evaluation.probes import KINDS

MIN_KEPT = 10  # facts at turn 0; of fewer no half-life is told


class Drift(NamedTuple):
    """What became of the facts that were asked at every turn."""

    turns: list[int]
    kept: list[float]
    """Share at each turn."""
    num_facts: int
    change: Interval
    """Share at the last turn less that at the first."""
    rate: Interval
    """Of decay, in nats an exchange; negative where more facts are kept later."""


def kept_facts(replies: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[int, bool]]:
    """By (persona, fact, split): at which turns all greedy answers about the fact were right."""
    found: dict[tuple[str, str, str], dict[int, bool]] = {}
    for row in replies:
        if row.get("correct") is not None and row.get("decoding") == "greedy" and row.get("kind") in KINDS:
            turns = found.setdefault((row["persona_id"], row["fact_id"], row["split"]), {})
            turns[row["turn"]] = turns.get(row["turn"], True) and bool(row["correct"])
    return found


def measure_drift(replies: Iterable[Mapping[str, Any]], seed: int = 0) -> Drift | None:
    """Drift of a system from its probe replies; None where no fact was asked at two turns or more."""
    found = kept_facts(replies)
    turns = sorted({turn for kept in found.values() for turn in kept})
    asked = {fact: kept for fact, kept in found.items() if len(kept) == len(turns)}
    if len(turns) < 2 or not asked:
        return None
    unit = 0 if len({fact[0] for fact in asked}) > 1 else 1  # the persona, or the fact where there is one persona
    clusters = [fact[unit] for fact in asked]
    kept = np.array([[float(at[turn]) for turn in turns] for at in asked.values()])
    rows = np.hstack([np.ones((len(kept), 1)), kept])
    differences = np.stack([kept[:, -1] - kept[:, 0], np.ones(len(kept))], axis=1)
    weights = np.array(turns) - np.mean(turns)

    def rate(totals: np.ndarray) -> np.ndarray:
        logs = np.log((totals[..., 1:] + 0.5) / (totals[..., :1] + 1))
        return -(logs @ weights) / (weights @ weights)

    intervals = bootstrap_together({"change": (differences, ratio), "rate": (rows, rate)}, clusters, seed=seed)
    change, decay = intervals["change"], intervals["rate"]
    if (kept == kept[:, :1]).all():
        # No fact differs between turns: so does at most the share of clusters that Wilson's interval allows for.
        share = wilson(0, len(set(clusters)))[1]
        most = -math.log1p(-share) / (turns[-1] - turns[0])
        change, decay = Interval(0.0, -share, share), Interval(0.0, -most, most)
    return Drift(turns, kept.mean(axis=0).tolist(), len(kept), change, decay)


def half_life_words(drift: Drift) -> tuple[str, str]:
    """The half-life in words, and what to know about it."""
    if drift.kept[0] * drift.num_facts < MIN_KEPT:
        return "not told", f"only {round(drift.kept[0] * drift.num_facts)} facts kept at turn {drift.turns[0]}"
    span = drift.turns[-1]
    low, high = drift.rate.low, drift.rate.high
    if math.isnan(low):
        return "not told", "one persona and one fact: no interval"
    if low <= 0:
        least = (
            f"half-life, if any, at least {_exchanges(high, math.floor)} exchanges"
            if high > 0
            else "more were kept later"
        )
        return f"no drop seen within {span} exchanges", least
    beyond = f"; beyond the {span} asked after, so extrapolated" if math.log(2) / drift.rate.value > span else ""
    bounds = f"{_exchanges(high, math.floor)} to {_exchanges(low, math.ceil)}"
    return f"{_exchanges(drift.rate.value, round)} exchanges", bounds + beyond


def _exchanges(rate: float, direction: Any) -> str:
    """The half-life of a rate; its bounds are rounded outwards."""
    half_life = math.log(2) / rate
    digits = 1 if half_life < 20 else 0
    return f"{direction(half_life * 10**digits) / 10**digits:,.{digits}f}"
