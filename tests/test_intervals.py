"""Intervals against scipy, closed forms and exact enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from evaluation.intervals import (
    bootstrap_statistic,
    cluster_bootstrap,
    cluster_sums,
    paired_difference,
    rate_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("n", "low", "high"), [(100, 0.767, 0.907), (200, 0.794, 0.893), (500, 0.816, 0.879), (1000, 0.827, 0.871)]
)
def test_wilson_printed_numbers(n, low, high):
    assert wilson(0.85 * n, n) == pytest.approx((low, high), abs=5e-4)  # printed to three places


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (1, 1), (3, 11), (499, 500)])
def test_wilson_is_scipy(k, n):
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_bad_counts(k, n):
    with pytest.raises(ValueError, match="`successes`"):
        wilson(k, n)


def test_cluster_sums():
    sums = cluster_sums(np.array([[1, 10], [2, 20], [4, 40]]), ["b", "a", "b"])
    assert sums.tolist() == [[5, 50], [2, 20]]
    with pytest.raises(ValueError, match="`statistics` is empty"):
        cluster_sums(np.zeros((0, 2)), [])
    with pytest.raises(ValueError, match="`clusters` has 1 entries for 2 rows"):
        cluster_sums(np.zeros((2, 2)), ["a"])
    with pytest.raises(ValueError, match=r"not finite in 1 rows \(first: \[1\]\)"):
        cluster_sums(np.array([[0.0], [math.nan]]), ["a", "b"])


def test_independent_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(5, 2, size=400)
    interval = cluster_bootstrap(values, np.ones(400), list(range(400)), num_resamples=10_000)
    half = 1.959964 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean(), abs=1e-12)
    # Monte-Carlo error of a 2.5 % point at 10,000 resamples is about 0.03 standard errors; allow 5 % of the half width
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_three_clusters_match_the_exact_distribution():
    numerators, denominators, clusters = [1, 2, 9, 4], [2, 2, 10, 5], ["a", "a", "b", "c"]
    sums = {"a": (3, 4), "b": (9, 10), "c": (4, 5)}
    exact = sorted(
        sum(sums[c][0] for c in draw) / sum(sums[c][1] for c in draw) for draw in itertools.product(sums, repeat=3)
    )
    interval = cluster_bootstrap(numerators, denominators, clusters)
    # 1/27 of the draws is the lowest value, and 1/27 the highest: both hold more than 2.5 %
    assert interval == pytest.approx((16 / 19, exact[0], exact[-1]), abs=1e-12)


def test_clusters_widen_the_interval_by_the_design_effect():
    values = np.repeat(np.random.default_rng(2).normal(size=100), 9)  # nine equal turns a dialogue
    clustered = cluster_bootstrap(values, np.ones(900), list(np.repeat(np.arange(100), 9)))
    independent = cluster_bootstrap(values, np.ones(900), list(range(900)))
    ratio = (clustered.high - clustered.low) / (independent.high - independent.low)
    assert ratio == pytest.approx(3, rel=0.1)  # sqrt(9), up to Monte-Carlo error at 2,000 resamples


def test_coverage_of_the_ratio():
    rng, hits = np.random.default_rng(3), 0
    for trial in range(200):
        means = rng.normal(0.5, 0.1, size=80)
        values = np.concatenate([rng.normal(mean, 0.2, size=5) for mean in means])
        _, low, high = cluster_bootstrap(values, np.ones(400), list(np.repeat(np.arange(80), 5)), 400, seed=trial)
        hits += low <= 0.5 <= high
    assert 178 <= hits <= 199  # 95 % of 200 is 190, standard deviation 3.1


def test_seed_decides_and_chunks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(4)
    values, clusters = rng.random(60), [i // 2 for i in range(60)]
    first = cluster_bootstrap(values, np.ones(60), clusters, seed=7)
    assert cluster_bootstrap(values, np.ones(60), clusters, seed=7) == first
    assert cluster_bootstrap(values, np.ones(60), clusters, seed=8)[1:] != first[1:]
    monkeypatch.setattr("evaluation.intervals.CHUNK_ELEMENTS", 70)
    # the same stream of draws in smaller pieces; sums in another order, so equal to rounding
    assert cluster_bootstrap(values, np.ones(60), clusters, seed=7) == pytest.approx(first, abs=1e-12)


def test_one_cluster_has_no_interval():
    value, low, high = cluster_bootstrap([1, 2], [1, 1], ["d", "d"])
    assert value == 1.5 and math.isnan(low) and math.isnan(high)


def test_zero_denominators():
    with pytest.raises(ValueError, match="`denominators` add up to 0"):
        cluster_bootstrap([0, 0], [0, 0], ["a", "b"])
    # resamples of the empty cluster alone have no value; the others all have 1/2
    assert cluster_bootstrap([1, 0], [2, 0], ["a", "b"]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="`numerators` has 1 entries, `denominators` 2"):
        cluster_bootstrap([1], [1, 1], ["a"])


def test_bootstrap_statistic_agrees_with_the_ratio():
    rng = np.random.default_rng(5)
    pairs, clusters = rng.random((50, 2)), [i // 5 for i in range(50)]
    generic = bootstrap_statistic(pairs, clusters, lambda totals: totals[..., 0] / totals[..., 1], seed=3)
    assert generic == pytest.approx(cluster_bootstrap(pairs[:, 0], pairs[:, 1], clusters, seed=3), abs=1e-12)


def test_rate_at_the_edge_is_wilson_over_clusters():
    clusters = [i // 4 for i in range(80)]
    high = stats.binomtest(0, 20).proportion_ci(method="wilson").high
    assert rate_interval([0.0] * 80, clusters) == pytest.approx((0, 0, high), abs=1e-9)
    assert rate_interval([1.0] * 80, clusters) == pytest.approx((1, 1 - high, 1), abs=1e-9)
    inner = [float(i % 3 == 0) for i in range(80)]
    assert rate_interval(inner, clusters) == cluster_bootstrap(inner, np.ones(80), clusters)


def test_paired_difference_cancels_what_items_share():
    hard = np.random.default_rng(6).normal(0, 10, size=200)
    interval = paired_difference(hard + 0.5, hard, list(range(200)))
    assert interval == pytest.approx((0.5, 0.5, 0.5), abs=1e-9)  # unpaired it would be 0.5 +- 2
    same = paired_difference(hard, hard[::-1].copy(), list(range(200)))
    assert same.value == pytest.approx(0, abs=1e-9) and same.low < 0 < same.high
    with pytest.raises(ValueError, match="`a` has 2 entries, `b` 1"):
        paired_difference([1, 2], [1], ["a", "b"])
