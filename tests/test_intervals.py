"""Intervals against scipy, closed forms and exact enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats

from evaluation.intervals import (
    Share,
    bootstrap_statistic,
    bootstrap_together,
    bounded_together,
    cliffs_delta,
    cluster_bootstrap,
    cluster_sums,
    holm,
    paired_bootstrap,
    paired_d,
    paired_difference,
    randomisation_test,
    rate_interval,
    ratio,
    share_interval,
    wilson,
    with_ones,
)
from evaluation.overlap import bleu_from_statistics, bleu_statistics


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
    # resamples of the empty cluster alone have no value; the others are those of a and b: 1/2, or one of both
    value, low, high = cluster_bootstrap([1, 0, 3], [2, 0, 4], ["a", "b", "c"])
    assert (value, low, high) == (4 / 6, 1 / 2, 3 / 4)
    # one cluster has all there is: its value is no certainty
    value, low, high = cluster_bootstrap([1, 0], [2, 0], ["a", "b"])
    assert value == 0.5 and math.isnan(low) and math.isnan(high)
    with pytest.raises(ValueError, match="`numerators` has 1 entries, `denominators` 2"):
        cluster_bootstrap([1], [1, 1], ["a"])


def test_bootstrap_statistic_agrees_with_the_ratio():
    rng = np.random.default_rng(5)
    pairs, clusters = rng.random((50, 2)), [i // 5 for i in range(50)]
    generic = bootstrap_statistic(pairs, clusters, lambda totals: totals[..., 0] / totals[..., 1], seed=3)
    assert generic == pytest.approx(cluster_bootstrap(pairs[:, 0], pairs[:, 1], clusters, seed=3), abs=1e-12)


@pytest.mark.parametrize(("right", "of"), [(0, 20), (20, 20), (1, 30), (29, 30), (3, 5), (40, 100)])
def test_rate_of_equal_clusters_is_clopper_and_pearsons(right, of):
    """Four rows a cluster, all right or all wrong: as many rows as clusters, and no more."""
    successes = np.repeat(np.arange(of) < right, 4)
    interval = rate_interval(successes, [i // 4 for i in range(4 * of)], num_resamples=20_000)
    exact = stats.binomtest(right, of).proportion_ci(method="exact")
    # Monte-Carlo: the order statistic stands within 3.3 standard errors of the point that it estimates, so between these
    near = 0.025 + np.array([-1, 1]) * 3.3 * math.sqrt(0.025 * 0.975 / 20_000)
    low = stats.beta.ppf(near, right, of - right + 1) if right else (0, 0)
    high = stats.beta.isf(near[::-1], right + 1, of - right) if right < of else (1, 1)
    assert low[0] - 1e-9 <= interval.low <= low[1] + 1e-9 and low[0] - 1e-9 <= exact.low <= low[1] + 1e-9
    assert high[0] - 1e-9 <= interval.high <= high[1] + 1e-9 and high[0] - 1e-9 <= exact.high <= high[1] + 1e-9
    assert interval.value == right / of


def test_two_personas_tell_little_and_one_nothing():
    low = rate_interval([0] + [1] * 15, [i // 8 for i in range(16)]).low
    assert low < stats.binomtest(2, 2).proportion_ci().low  # .158, were all 16 right
    value, low, high = rate_interval([0, 1], ["a", "a"])
    assert value == 0.5 and math.isnan(low) and math.isnan(high)
    value, low, high = share_interval([0, 0], [4, 0], ["a", "b"])  # b has no case
    assert value == 0 and math.isnan(low) and math.isnan(high)


def test_one_wrong_answer_more_does_not_earn_a_claim():
    clusters = [i // 20 for i in range(100)]
    one, none = rate_interval([0] + [1] * 99, clusters), rate_interval([1] * 100, clusters)
    assert one.low < none.low < 0.85


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_a_worse_system_never_has_a_higher_bound(rows):
    clusters = [cluster for cluster, _, _ in rows]
    worse = rate_interval([min(pair) for _, *pair in rows], clusters, num_resamples=200)
    better = rate_interval([max(pair) for _, *pair in rows], clusters, num_resamples=200)
    if math.isnan(worse.low):
        assert math.isnan(better.low) and len(set(clusters)) == 1
    else:
        assert worse.low <= better.low + 1e-12 and worse.high <= better.high + 1e-12  # rounding
        assert 0 <= worse.low <= worse.value <= worse.high <= 1


@pytest.mark.parametrize("rate", [0.85, 0.95])
@pytest.mark.parametrize("correlation", [0, 0.3, 1])
@pytest.mark.parametrize("num_clusters", [10, 30, 100])
def test_coverage_of_the_lower_bound_of_a_rate(num_clusters, correlation, rate):
    """Clusters of 1 to 8 rows whose own rates are beta distributed with this intra-cluster correlation."""
    rng, trials, above = np.random.default_rng(14), 300, 0
    for trial in range(trials):
        sizes = rng.integers(1, 9, size=num_clusters)
        if correlation in (0, 1):
            own = np.full(num_clusters, rate) if correlation == 0 else rng.random(num_clusters) < rate
        else:
            strength = 1 / correlation - 1
            own = rng.beta(rate * strength, (1 - rate) * strength, size=num_clusters)
        right = rng.binomial(sizes, own)
        above += share_interval(right, sizes, range(num_clusters), num_resamples=400, seed=trial).low > rate
    # the lower bound of a two-sided 95 % interval may miss 2.5 %; three standard errors of 300 trials are 2.7 %
    assert above / trials <= 0.052


def test_shares_together_are_each_alone(monkeypatch):
    rng = np.random.default_rng(15)
    lift = Share(with_ones(rng.uniform(-1, 1, size=40)), least=-1.0)
    share, clusters = Share(with_ones(rng.random(40))), [i // 3 for i in range(40)]
    both = bounded_together({"lift": lift, "share": share}, clusters, seed=5)
    assert both["share"] == pytest.approx(rate_interval(share.pairs[:, 0], clusters, seed=5), abs=1e-12)
    # from -1 to 1 is the share stretched: 2 x - 1
    stretched = rate_interval((lift.pairs[:, 0] + 1) / 2, clusters, seed=5)
    assert both["lift"] == pytest.approx([2 * bound - 1 for bound in stretched], abs=1e-12)
    monkeypatch.setattr("evaluation.intervals.CHUNK_ELEMENTS", 70)
    assert bounded_together({"lift": lift, "share": share}, clusters, seed=5)["lift"] == pytest.approx(
        both["lift"], abs=1e-12
    )


def test_many_clusters_have_the_bootstraps_interval():
    values, clusters = np.random.default_rng(16).random(8000) < 0.3, [i // 8 for i in range(8000)]
    ours, bootstrap = (f(values, *ones, clusters) for f, ones in ((rate_interval, ()), (cluster_bootstrap, (np.ones(8000),))))  # fmt: skip
    # one imagined cluster in 1,001: .3 / 1,001 lower, 7 / 10,000 higher, beside a half width of .01
    assert ours.low == pytest.approx(bootstrap.low, abs=2e-3) and ours.high == pytest.approx(bootstrap.high, abs=3e-3)


def test_what_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"'share' is not a share: 1 rows are outside of 0 to 1 \(first: 3 of 2\)"):
        share_interval([1, 3], [2, 2], ["a", "b"])
    with pytest.raises(ValueError, match="`denominators` add up to 0"):
        share_interval([0, 0], [0, 0], ["a", "b"])
    with pytest.raises(ValueError, match="`numerators` has 1 entries, `denominators` 2"):
        share_interval([1], [1, 1], ["a"])


def test_paired_difference_cancels_what_items_share():
    hard = np.random.default_rng(6).normal(0, 10, size=200)
    interval = paired_difference(hard + 0.5, hard, list(range(200)))
    assert interval == pytest.approx((0.5, 0.5, 0.5), abs=1e-9)  # unpaired it would be 0.5 +- 2
    same = paired_difference(hard, hard[::-1].copy(), list(range(200)))
    assert same.value == pytest.approx(0, abs=1e-9) and same.low < 0 < same.high
    with pytest.raises(ValueError, match="`a` has 2 entries, `b` 1"):
        paired_difference([1, 2], [1], ["a", "b"])


def test_percentile_bootstrap_is_scipys():
    rng = np.random.default_rng(7)
    numerators, denominators = rng.gamma(2, size=60), rng.uniform(1, 3, size=60)
    theirs = stats.bootstrap(
        (numerators, denominators), lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis), paired=True,
        n_resamples=10_000, method="percentile", vectorized=True, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    ours = cluster_bootstrap(numerators, denominators, list(range(60)), num_resamples=10_000)
    # two Monte-Carlo estimates of the same percentiles: each within about 0.03 standard errors, a quarter of the half width
    half = (theirs.high - theirs.low) / 2
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * half)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * half)


def test_together_is_each_alone():
    rng = np.random.default_rng(8)
    one, two, clusters = rng.random((40, 2)), rng.random((40, 3)), [i // 3 for i in range(40)]

    def third(totals):
        return totals[..., 2] - totals[..., 0]

    both = bootstrap_together({"a": (one, ratio), "b": (two, third)}, clusters, seed=5)
    assert both["a"] == pytest.approx(cluster_bootstrap(one[:, 0], one[:, 1], clusters, seed=5), abs=1e-12)
    assert both["b"] == pytest.approx(bootstrap_statistic(two, clusters, third, seed=5), abs=1e-12)
    with pytest.raises(ValueError, match=r"`statistic` of 'a' must map totals \(b, k\) to \(b,\)"):
        bootstrap_together({"a": (two, lambda totals: totals[0] * 0 + 1 if totals.ndim > 1 else 1.0)}, clusters)


def exact_p(a, b, clusters, statistic):
    """Every way of swapping whole clusters, counted."""
    names = sorted(set(clusters))
    observed, found = abs(statistic(a.sum(axis=0)) - statistic(b.sum(axis=0))), []
    for swaps in itertools.product((False, True), repeat=len(names)):
        swap = np.array([dict(zip(names, swaps, strict=True))[c] for c in clusters])[:, None]
        x, y = np.where(swap, b, a).sum(axis=0), np.where(swap, a, b).sum(axis=0)
        found.append(abs(statistic(x) - statistic(y)) >= observed - 1e-9)
    return np.mean(found)


def monte_carlo(p, trials, widths=4.0):
    return widths * math.sqrt(p * (1 - p) / trials) + 1 / trials


def test_randomisation_is_scipys_permutation_test_of_pairs():
    rng = np.random.default_rng(9)
    b = rng.normal(size=12)
    a = b + rng.normal(0.5, 1, size=12)
    exact = stats.permutation_test(
        (a, b), lambda x, y, axis: np.abs((x - y).mean(axis=axis)), permutation_type="samples",
        alternative="greater", n_resamples=np.inf, vectorized=True,
    ).pvalue  # fmt: skip
    assert 0.01 < exact < 0.5
    p = randomisation_test(with_ones(a), with_ones(b), list(range(12)))
    assert p == pytest.approx(exact, abs=monte_carlo(exact, 10_000))  # exact, against 10,000 draws


@pytest.mark.parametrize("binary", [False, True])
def test_randomisation_swaps_clusters_and_counts_ties(binary):
    rng = np.random.default_rng(10)
    clusters = [0, 0, 0, 1, 2, 2, 3, 3, 4, 5, 6, 7]
    values = rng.random((2, 12)) + np.array([[0.4], [0.0]])
    a, b = (with_ones(v > 0.6) if binary else with_ones(v) for v in values)
    exact = exact_p(a, b, clusters, lambda total: total[0] / total[1])
    assert 0.02 < exact < 0.6
    assert randomisation_test(a, b, clusters) == pytest.approx(exact, abs=monte_carlo(exact, 10_000))
    if not binary:  # another cut of the same rows gives another answer
        assert exact != exact_p(a, b, list(range(12)), lambda total: total[0] / total[1])


def test_randomisation_edges():
    values = with_ones([1.0, 2.0, 3.0])
    assert randomisation_test(values, values, [0, 1, 2]) == 1  # nothing differs
    assert randomisation_test(values, values + [1, 0], ["d"] * 3) == 1  # one cluster: swapped or not is the same
    far = with_ones(np.arange(40.0))
    assert randomisation_test(far + [9, 0], far, list(range(40)), num_trials=999) == 1 / 1000  # the smallest there is
    with pytest.raises(ValueError, match="`a` has 3 entries, `b` 2"):
        randomisation_test(values, values[:2], [0, 1, 2])
    with pytest.raises(ValueError, match="has no value"):
        randomisation_test(values * [1, 0], values, [0, 1, 2])


def test_randomisation_keeps_its_level_on_clustered_rates():
    rng, rejected = np.random.default_rng(11), 0
    for trial in range(200):
        level = np.repeat(rng.uniform(0.2, 0.8, size=25), 4)  # 25 dialogues of 4 replies, the systems alike
        a, b = (with_ones(rng.random(100) < level) for _ in range(2))
        rejected += randomisation_test(a, b, list(np.repeat(np.arange(25), 4)), num_trials=199, seed=trial) <= 0.05
    assert rejected <= 19  # 5 % of 200 is 10, standard deviation 3.1


def systems():
    rng = np.random.default_rng(12)
    references = [" ".join(f"w{i}" for i in rng.integers(30, size=9)) for _ in range(60)]

    def damaged(share):
        return [" ".join(w if rng.random() > share else "x" for w in text.split()) for text in references]

    return references, damaged(0.35), damaged(0.40)


def test_paired_tests_of_bleu_are_sacrebleus(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    references, one, two = systems()

    def theirs(kind, trials):
        named = [("one", one), ("two", two)]
        metrics = {"BLEU": BLEU(lowercase=True, force=True)}
        _, scores = PairedTest(named, metrics, [references], test_type=kind, n_samples=trials)()
        return scores["BLEU"]

    a, b = (np.stack([bleu_statistics(*pair) for pair in zip(r, references, strict=True)]) for r in (one, two))
    items = list(range(len(references)))

    ar = theirs("ar", 2000)
    assert ar[1].score == pytest.approx(float(bleu_from_statistics(b.sum(axis=0))), abs=1e-9)
    p = randomisation_test(a, b, items, bleu_from_statistics, num_trials=2000)
    assert 0.01 < ar[1].p_value < 0.9
    # two Monte-Carlo estimates of one probability; BLEU has no ties, so that counting them or not is the same
    assert p == pytest.approx(ar[1].p_value, abs=math.sqrt(2) * monte_carlo(ar[1].p_value, 2000))

    bs, found = theirs("bs", 2000), []

    def difference(totals):
        found.append(bleu_from_statistics(totals[..., :10]) - bleu_from_statistics(totals[..., 10:]))
        return found[-1]

    interval = bootstrap_statistic(np.concatenate([a, b], axis=1), items, difference)
    assert interval == paired_bootstrap(a, b, items, bleu_from_statistics)
    # sacrebleu's p: resamples whose absolute difference exceeds the mean one by more than the observed one
    sizes = np.abs(found[1])
    own_p = (np.sum(sizes - sizes.mean() > abs(interval.value)) + 1) / (len(sizes) + 1)
    assert own_p == pytest.approx(bs[1].p_value, abs=math.sqrt(2) * monte_carlo(bs[1].p_value, 2000))
    # and the interval of one system: sacrebleu prints half the distance of the 2.5 % and 97.5 % points
    for statistics, result in ((a, bs[0]), (b, bs[1])):
        alone = bootstrap_statistic(statistics, items, bleu_from_statistics)
        assert (alone.high - alone.low) / 2 == pytest.approx(result.ci, rel=0.08)  # 2,000 resamples each: 4 % a side


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    # in order 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, and never below the one before
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_paired_d_is_t_over_the_root_of_n():
    rng = np.random.default_rng(13)
    a, b = rng.normal(1, 2, size=30), rng.normal(size=30)
    t = stats.ttest_rel(a, b).statistic
    assert paired_d(with_ones(a), with_ones(b), list(range(30))) == pytest.approx(t / math.sqrt(30))
    # clusters of 1 and 2: means of differences 1 and (2 + 6) / 2 = 4; 2.5 / sd(1, 4) with n - 1
    d = paired_d(with_ones([1, 2, 6]), with_ones([0, 0, 0]), ["x", "y", "y"])
    assert d == pytest.approx(2.5 / math.sqrt(4.5))
    assert math.isnan(paired_d(with_ones([1, 2]), with_ones([0, 1]), ["x", "y"]))  # all differences are 1
    assert math.isnan(paired_d(with_ones([1, 2]), with_ones([0, 0]), ["x", "x"]))


def test_cliffs_delta_is_the_mann_whitney_u():
    rng = np.random.default_rng(14)
    a, b = rng.integers(-2, 4, size=25), rng.integers(-3, 3, size=40)
    u = stats.mannwhitneyu(a, b).statistic
    assert cliffs_delta(a, b) == pytest.approx(2 * u / (25 * 40) - 1)
    assert cliffs_delta([2, 3], [1]) == 1 and cliffs_delta([1], [1, 1]) == 0
    with pytest.raises(ValueError, match="`a` has 0 values"):
        cliffs_delta([], [1])
