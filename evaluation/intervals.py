"""Confidence intervals: cluster bootstrap, Wilson interval, paired difference.

Turns of one dialogue (probes of one persona) are not independent, so the unit of resampling is the cluster, never the
reply (Miller 2024, "Adding error bars to evals", arXiv:2411.00640). All intervals are two-sided 95 %.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2000
Z_95 = 1.959963984540054  # 97.5 % point of the standard normal distribution
CHUNK_ELEMENTS = 4_000_000  # resample counts held at once, so that memory does not grow with the corpus


class Interval(NamedTuple):
    """A value with the bounds of its 95 % interval, in the unit of the value."""

    value: float
    low: float
    high: float


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
    if num_clusters == 1:  # every resample is the sample itself: zero width would claim a certainty that is not there
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def cluster_bootstrap(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over clusters of ``sum(numerators) / sum(denominators)`` (a mean has denominators of 1).

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval).

    Args:
        numerators, denominators: one number a row, any unit.
        clusters: the dialogue or persona of each row.

    Returns:
        `Interval`; the bounds are NaN when there is one cluster only. A resample whose denominators add up to 0 has no
        value and does not count.

    Raises:
        ValueError: on empty, unequal or non-finite input, or when the denominators add up to 0.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"`numerators` has {len(numerators)} entries, `denominators` {len(denominators)}.")
    pairs = np.stack([np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)], axis=1)
    sums = cluster_sums(pairs, clusters)
    numerator, denominator = sums.sum(axis=0)
    if denominator == 0:
        raise ValueError("`denominators` add up to 0: the ratio is not defined.")
    totals = np.concatenate(list(_resampled_totals(sums, num_resamples, seed)))
    totals = totals[totals[:, 1] != 0]
    return _percentile_interval(float(numerator / denominator), totals[:, 0] / totals[:, 1], len(sums))


def bootstrap_statistic(
    statistics: np.ndarray,
    clusters: Sequence[Hashable],
    statistic: Callable[[np.ndarray], float],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """As `cluster_bootstrap`, for any corpus number that is a function of summed sufficient statistics (BLEU).

    Args:
        statistics: ``(n, k)``, one row a reply.
        statistic: maps the totals ``(k,)`` to the number.
    """
    sums = cluster_sums(statistics, clusters)
    resampled = [statistic(total) for chunk in _resampled_totals(sums, num_resamples, seed) for total in chunk]
    return _percentile_interval(float(statistic(sums.sum(axis=0))), np.array(resampled), len(sums))


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


def rate_interval(
    successes: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of values in [0, 1], one a row.

    Cluster bootstrap; where every row is 0 or every row is 1 the bootstrap has zero width, and the Wilson interval
    with n = number of clusters (the cautious count) takes its place.
    """
    successes = np.asarray(successes, dtype=np.float64)
    interval = cluster_bootstrap(successes, np.ones(len(successes)), clusters, num_resamples, seed)
    if interval.value in (0.0, 1.0):
        num_clusters = len(set(clusters))
        return Interval(interval.value, *wilson(interval.value * num_clusters, num_clusters))
    return interval


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of ``mean(a) - mean(b)``, where `a[i]` and `b[i]` are two systems on the same item.

    Both systems are resampled together, so what an item costs either of them cancels out.
    """
    if len(a) != len(b):
        raise ValueError(f"`a` has {len(a)} entries, `b` {len(b)}: a paired difference needs the same items in both.")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return cluster_bootstrap(difference, np.ones(len(difference)), clusters, num_resamples, seed)
