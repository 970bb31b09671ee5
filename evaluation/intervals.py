"""Confidence intervals, paired tests and effect sizes.

Turns of one dialogue (probes of one persona) are not independent, so the unit that is resampled, or swapped between two
systems, is the cluster, never the reply (Miller 2024, "Adding error bars to evals", arXiv:2411.00640). All intervals
are two-sided 95 %, all tests two-sided.

A number is a function of sums: each reply has a few sufficient statistics, they are added up over the corpus, and
`statistic` makes the number of the totals. For a mean these are the value and 1, for BLEU ten counts.

Shares have an interval of their own, [`bounded_together`]: the percentile bootstrap is too narrow for few clusters and
near 0 and 1, and Wilson's interval knows independent rows alone.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

NUM_RESAMPLES = 2000
NUM_TRIALS = 10_000  # of the randomisation test, as sacrebleu's
Z_95 = 1.959963984540054  # 97.5 % point of the standard normal distribution
CHUNK_ELEMENTS = 4_000_000  # resample counts held at once, so that memory does not grow with the corpus

Statistic = Callable[[np.ndarray], np.ndarray]  # totals (..., k) -> numbers (...)
Key = TypeVar("Key", bound=Hashable)


class Interval(NamedTuple):
    """A value with the bounds of its 95 % interval, in the unit of the value."""

    value: float
    low: float
    high: float


def ratio(totals: np.ndarray) -> np.ndarray:
    """First total / second total; NaN where the second is 0."""
    numerators, denominators = totals[..., 0], totals[..., 1]
    missing = np.full(np.shape(numerators), np.nan)
    return np.divide(numerators, denominators, out=missing, where=denominators != 0)


def cluster_sums(statistics: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Add the rows of each cluster: ``(n, k)`` -> ``(num_clusters, k)``, in order of first appearance.

    Raises:
        ValueError: when there are no rows, the lengths differ, or a statistic is not finite.
    """
    statistics = np.asarray(statistics, dtype=np.float64)
    if len(statistics) == 0:
        raise ValueError("`statistics` is empty: an interval needs at least one row.")
    if len(statistics) != len(clusters):
        raise ValueError(f"`clusters` has {len(clusters)} entries for {len(statistics)} rows: give one a row.")
    if not np.isfinite(statistics).all():
        bad = np.flatnonzero(~np.isfinite(statistics).all(axis=1))
        raise ValueError(
            f"`statistics` is not finite in {len(bad)} rows (first: {bad[:5].tolist()}): mend them first."
        )
    index: dict[Hashable, int] = {}
    codes = np.array([index.setdefault(cluster, len(index)) for cluster in clusters])
    sums = np.zeros((len(index), statistics.shape[1]))
    np.add.at(sums, codes, statistics)
    return sums


def _resampled_totals(sums: np.ndarray, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield chunks ``(b, k)`` of totals of the statistics, each over clusters drawn with replacement."""
    rng = np.random.default_rng(seed)
    num_clusters = len(sums)
    chunk = max(1, CHUNK_ELEMENTS // num_clusters)
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        draws = rng.integers(num_clusters, size=(rows, num_clusters)) + np.arange(rows)[:, None] * num_clusters
        counts = np.bincount(draws.ravel(), minlength=rows * num_clusters).reshape(rows, num_clusters)
        yield counts @ sums


def _percentile_interval(value: float, resampled: np.ndarray, num_clusters: int) -> Interval:
    if num_clusters <= 1:  # every resample is the sample itself: zero width would claim a certainty that is not there
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def bootstrap_together(
    measures: Mapping[Key, tuple[np.ndarray, Statistic]],
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[Key, Interval]:
    """Percentile bootstrap over clusters of several numbers of the same rows, from one set of resamples.

    Drawing costs more than multiplying, so twenty numbers take little longer than one. Each interval is the one that
    the number would have alone.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval).

    Args:
        measures: for each number its statistics ``(n, k)``, one row a reply, and what makes the number of their totals.
        clusters: the dialogue or persona of each row.

    Returns:
        An `Interval` each; the bounds are NaN when one cluster only has something other than zeros. A resample that has
        no value (a ratio whose denominators add up to 0) does not count.

    Raises:
        ValueError: on empty, unequal or non-finite input, or when a number has no value.
    """
    names = list(measures)
    arrays = [np.asarray(statistics, dtype=np.float64) for statistics, _ in measures.values()]
    sums = cluster_sums(np.concatenate(arrays, axis=1), clusters)
    totals = np.concatenate(list(_resampled_totals(sums, num_resamples, seed)))
    intervals, start = {}, 0
    for name, array in zip(names, arrays, strict=True):
        columns = slice(start, start := start + array.shape[1])
        statistic = measures[name][1]
        value = float(statistic(sums[:, columns].sum(axis=0)))
        if math.isnan(value):
            raise ValueError(f"{name!r} has no value: its `denominators` add up to 0.")
        resampled = statistic(totals[:, columns])
        if resampled.shape != (num_resamples,):
            raise ValueError(f"the `statistic` of {name!r} must map totals (b, k) to (b,), got {resampled.shape}.")
        telling = int((sums[:, columns] != 0).any(axis=1).sum())
        intervals[name] = _percentile_interval(value, resampled[~np.isnan(resampled)], telling)
    return intervals


def bootstrap_statistic(
    statistics: np.ndarray,
    clusters: Sequence[Hashable],
    statistic: Statistic,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """[`bootstrap_together`] of one number."""
    return bootstrap_together({"statistics": (statistics, statistic)}, clusters, num_resamples, seed)["statistics"]


def _pairs(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> np.ndarray:
    if len(numerators) != len(denominators):
        raise ValueError(f"`numerators` has {len(numerators)} entries, `denominators` {len(denominators)}.")
    return np.stack([np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)], axis=1)


def cluster_bootstrap(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """[`bootstrap_together`] of ``sum(numerators) / sum(denominators)``; a mean has denominators of 1."""
    pairs = _pairs(numerators, denominators)
    return bootstrap_statistic(pairs, clusters, ratio, num_resamples, seed)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate (Wilson 1927, JASA 22:209-212), bounds in [0, 1].

    Raises:
        ValueError: when `n` < 1 or `successes` is outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"`successes` = {successes} of `n` = {n}: need n >= 1 and 0 <= successes <= n.")
    rate = successes / n
    centre = (rate + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(rate * (1 - rate) / n + Z_95**2 / (4 * n**2))
    # At 0 and n the bound is exact; rounding would leave it 1e-17 outside.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


# -- shares ------------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """``sum(numerators) / sum(denominators)`` of which each row's own ratio lies between `least` and `most`."""

    pairs: np.ndarray
    """``(n, 2)``: numerator and denominator of each row."""
    least: float = 0.0
    most: float = 1.0


def bounded_together(
    shares: Mapping[Key, Share],
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[Key, Interval]:
    """Intervals of shares over clusters that hold with few clusters and at 0 and 1, from one set of random weights.

    The clusters get random weights (independent exponentials, the Bayesian bootstrap), and with them one imagined
    cluster of their mean size, whose rows all have the least value for the lower bound and the most for the upper one.
    The bounds are the 2.5 % point of the one weighted share and the 97.5 % point of the other. So the next cluster may
    be as bad as can be, which is what few clusters cannot rule out. Where each cluster is wholly right or wholly wrong
    and all are of one size, these are the exact bounds of Clopper & Pearson 1934 with n = number of clusters; where rows
    of a cluster differ they are narrower. A row that gets worse raises neither bound.

    Source: Gaffke 2005, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
    variable"; Learned-Miller & Thomas 2020, arXiv:1905.06208; weights over clusters after Rubin 1981, "The Bayesian
    bootstrap".

    Args:
        shares: by name, one row a reply.
        clusters: the dialogue or persona of each row.

    Returns:
        An `Interval` each; the bounds are NaN when one cluster only has a denominator.

    Raises:
        ValueError: on empty, unequal or non-finite input, when a row's ratio is out of its range, or when a number has
            no value.
    """
    arrays = [np.asarray(share.pairs, dtype=np.float64) for share in shares.values()]
    for (name, share), pairs in zip(shares.items(), arrays, strict=True):
        outside = (pairs[:, 0] < share.least * pairs[:, 1] - 1e-9) | (pairs[:, 0] > share.most * pairs[:, 1] + 1e-9)
        if outside.any():
            number, first = int(outside.sum()), pairs[outside][0].tolist()
            raise ValueError(
                f"{name!r} is not a share: {number} rows are outside of {share.least:g} to {share.most:g} (first: "
                f"{first[0]:g} of {first[1]:g}). Use `bootstrap_together` for other numbers."
            )
    sums = cluster_sums(np.concatenate(arrays, axis=1), clusters)
    telling = sums[:, 1::2] > 0
    worst = sums[:, 1::2].sum(axis=0) / np.maximum(telling.sum(axis=0), 1)  # mean size of a cluster that has any
    totals, extra = map(np.concatenate, zip(*_weighted_totals(sums, num_resamples, seed), strict=True))
    intervals = {}
    for column, (name, share) in enumerate(shares.items()):
        numerators, denominators = totals[:, 2 * column], totals[:, 2 * column + 1]
        value = float(ratio(sums[:, 2 * column : 2 * column + 2].sum(axis=0)))
        if math.isnan(value):
            raise ValueError(f"{name!r} has no value: its `denominators` add up to 0.")
        if telling[:, column].sum() <= 1:
            intervals[name] = Interval(value, math.nan, math.nan)
            continue
        size = worst[column] * extra
        low = np.percentile((numerators + share.least * size) / (denominators + size), 2.5)
        high = np.percentile((numerators + share.most * size) / (denominators + size), 97.5)
        # Of all rows at an end the bound is that end; rounding would leave it 1e-16 inside.
        intervals[name] = Interval(value, min(float(low), value), max(float(high), value))
    return intervals


def _weighted_totals(sums: np.ndarray, num_resamples: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of totals ``(b, k)`` with random weights of the clusters, and of one more cluster's weights ``(b,)``."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // (len(sums) + 1))
    for start in range(0, num_resamples, chunk):
        weights = rng.standard_exponential((min(chunk, num_resamples - start), len(sums) + 1))
        yield weights[:, 1:] @ sums, weights[:, 0]


def share_interval(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """[`bounded_together`] of one share, each numerator between 0 and its denominator."""
    pairs = _pairs(numerators, denominators)
    return bounded_together({"share": Share(pairs)}, clusters, num_resamples, seed)["share"]


def rate_interval(
    successes: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """[`share_interval`] of the mean of values in [0, 1], one a row."""
    return share_interval(successes, np.ones(len(successes)), clusters, num_resamples, seed)


# -- two systems on the same items -------------------------------------------------------------------------------------


def _paired_sums(a: np.ndarray, b: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(a) != np.shape(b):
        raise ValueError(f"`a` has {len(a)} entries, `b` {len(b)}: a paired test needs the same items in both.")
    sums = cluster_sums(np.concatenate([a, b], axis=1), clusters)
    return sums[:, : a.shape[1]], sums[:, a.shape[1] :]


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[Hashable],
    statistic: Statistic = ratio,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of ``statistic(a) - statistic(b)``, row i of both being two systems on the same item.

    Both systems are resampled together, so what an item costs either of them cancels out.

    Args:
        a, b: statistics ``(n, k)``, one row an item.
    """
    k = np.shape(a)[1]
    _paired_sums(a, b, clusters)  # refuses what does not pair up
    both = np.concatenate([a, b], axis=1)
    return bootstrap_statistic(
        both, clusters, lambda totals: statistic(totals[..., :k]) - statistic(totals[..., k:]), num_resamples, seed
    )


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """[`paired_bootstrap`] of ``mean(a) - mean(b)``, values one an item."""
    if len(a) != len(b):
        raise ValueError(f"`a` has {len(a)} entries, `b` {len(b)}: a paired difference needs the same items in both.")
    return paired_bootstrap(with_ones(a), with_ones(b), clusters, ratio, num_resamples, seed)


def with_ones(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The sufficient statistics ``(n, 2)`` of a mean: each value, and 1."""
    values = np.asarray(values, dtype=np.float64)
    return np.stack([values, np.ones(len(values))], axis=1)


def randomisation_test(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[Hashable],
    statistic: Statistic = ratio,
    num_trials: int = NUM_TRIALS,
    seed: int = 0,
) -> float:
    """Two-sided p by approximate randomisation that ``statistic(a)`` and ``statistic(b)`` differ by chance alone.

    Were the systems the same, swapping their replies within a cluster would change nothing. In each trial every
    cluster is swapped with probability 1/2; ``p = (c + 1) / (num_trials + 1)``, c the trials whose difference is at
    least as large as the one observed. A trial that ties with it counts (sacrebleu's does not): on rates, where ties
    are frequent, leaving them out gives too many false alarms. A trial in which a number has no value counts too.

    Source: Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses"; Riezler & Maxwell 2005.

    Args:
        a, b: statistics ``(n, k)``, one row an item, the same items in both.
    """
    sums_a, sums_b = _paired_sums(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), clusters)
    difference, total_a, total_b = sums_b - sums_a, sums_a.sum(axis=0), sums_b.sum(axis=0)
    observed = abs(float(statistic(total_a) - statistic(total_b)))
    if math.isnan(observed):
        raise ValueError("`a` or `b` has no value: its `denominators` add up to 0.")
    floor = observed - 1e-9 * max(1.0, observed)  # sums in another order differ in the last bits
    rng, as_large = np.random.default_rng(seed), 0
    chunk = max(1, CHUNK_ELEMENTS // len(difference))
    for start in range(0, num_trials, chunk):
        rows = min(chunk, num_trials - start)
        moved = rng.integers(2, size=(rows, len(difference)), dtype=np.int8) @ difference
        found = np.abs(statistic(total_a + moved) - statistic(total_b - moved))
        as_large += int((~(found < floor)).sum())
    return (as_large + 1) / (num_trials + 1)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """p-values adjusted for testing all of them: the chance of one false alarm or more among them stays below 5 %.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted: dict[Key, float] = {}
    largest = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def paired_d(a: np.ndarray, b: np.ndarray, clusters: Sequence[Hashable]) -> float:
    """d_z = mean / standard deviation (n - 1) of the clusters' differences of means (Cohen 1988; Lakens 2013).

    The unit is the cluster here too, so that many turns of few dialogues do not shrink the deviation. NaN for fewer
    than two clusters with rows, or when all differences are the same.

    Args:
        a, b: statistics ``(n, 2)`` of two ratios or means, one row an item.
    """
    sums_a, sums_b = _paired_sums(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), clusters)
    differences = ratio(sums_a) - ratio(sums_b)
    differences = differences[~np.isnan(differences)]
    if len(differences) < 2 or np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return math.nan
    return float(differences.mean() / differences.std(ddof=1))


def cliffs_delta(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Chance that a value of `a` is above one of `b`, less the chance that it is below (Cliff 1993). In [-1, 1].

    For ordinal values, whose differences mean nothing.

    Raises:
        ValueError: when either is empty.
    """
    if not len(a) or not len(b):
        raise ValueError(f"`a` has {len(a)} values, `b` {len(b)}: both need one.")
    ordered = np.sort(np.asarray(b, dtype=np.float64))
    below = np.searchsorted(ordered, a, side="left").sum()
    above = (len(ordered) - np.searchsorted(ordered, a, side="right")).sum()
    return float(below - above) / (len(a) * len(ordered))
