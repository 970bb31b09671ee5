"""Two systems on the same prompts: differences with interval, p-value and effect size.

What is compared is an item: one prompt, or one fact that was asked about. Several decodings of an item are averaged
first, so that they count as one. Items are clustered as for the intervals of a single system, and both systems' items
are resampled, or swapped, cluster by cluster (`evaluation/intervals.py`). Distinct-n and EAD do not add up over items
and are not compared here.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation import METRICS
from evaluation.human_band import human_values
from evaluation.intervals import (
    NUM_RESAMPLES,
    NUM_TRIALS,
    Interval,
    Statistic,
    cliffs_delta,
    holm,
    paired_bootstrap,
    paired_d,
    randomisation_test,
    ratio,
    wilson,
    with_ones,
)
from evaluation.measures import independent, measures
from evaluation.perplexity import COUNTS, nats_statistic
from evaluation.probes import KINDS
from rlhf.files import read_jsonl

Row = Mapping[str, Any]


class Items(NamedTuple):
    """One metric of one system: statistics ``(n, k)`` an item, and what each item is and belongs to."""

    keys: list[Hashable]
    clusters: list[Hashable]
    statistics: np.ndarray
    statistic: Statistic


def reply_items(
    rows: Sequence[Row], seed: int = 0, human: Mapping[str, float | None] | None = None
) -> dict[str, Items]:
    """Items of every metric of recorded replies that adds up over them; an item is persona, history and dialogue.

    Args:
        rows: as for `score_rows`, several a prompt where there are several decodings.
        human: as for `measures`. Coverage and composite are numbers of a dialogue, and so is their item.
    """
    _, clusters = independent(rows)
    keys = [json.dumps([row["dialogue_id"], row["persona"], row["history"]]) for row in rows]
    return {
        name: _averaged([keys[i] for i in m.rows], [clusters[i] for i in m.rows], m.statistics, m.statistic)
        for name, m in measures(rows, seed, human).items()
    }


def fact_items(rows: Iterable[Row]) -> dict[str, Items]:
    """Items of `persona_consistency` and `persona_consistency_sampled`: a fact at a turn and in a split.

    As `probes.persona_consistency` has it: decodings of a probe are averaged first, then the three kinds multiplied.

    Args:
        rows: probe rows with `correct` and `decoding`; others are left out.
    """
    verdicts: dict[str, dict[tuple[Any, ...], dict[Hashable, list[float]]]] = {}
    for row in rows:
        if row.get("correct") is not None and row["kind"] in KINDS:
            name = "persona_consistency" if row["decoding"] == "greedy" else "persona_consistency_sampled"
            fact = (row["persona_id"], row["fact_id"], row["turn"], row["split"])
            probes = verdicts.setdefault(name, {}).setdefault(fact, {})
            probes.setdefault((row["kind"], row["probe_id"]), []).append(float(row["correct"]))
    items = {}
    for name, facts in verdicts.items():
        kept = [math.prod(sum(seen) / len(seen) for seen in probes.values()) for probes in facts.values()]
        unit = 0 if len({fact[0] for fact in facts}) > 1 else 1  # the persona, or the fact where there is one persona
        items[name] = Items(list(facts), [fact[unit] for fact in facts], with_ones(kept), ratio)
    return items


def likelihood_items(rows: Sequence[Row]) -> dict[str, Items]:
    """Items of the perplexities and of hits@1 (of a reply), from the rows of `likelihoods.jsonl`.

    A perplexity's item is a row: a long dialogue is several, each with its own replies, told apart by their order.
    """
    items = {}
    _, clusters = independent(rows) if rows else ("", [])
    for name, of in COUNTS.items():
        chosen = [i for i, row in enumerate(rows) if of in row]
        if chosen:
            sums = np.array([[rows[i]["nats"], rows[i][of]] for i in chosen], dtype=np.float64)
            seen: Counter[str] = Counter()
            keys: list[Hashable] = []
            for i in chosen:
                dialogue = json.dumps([rows[i]["dialogue_id"], rows[i]["persona"]])
                keys.append((dialogue, seen[dialogue]))
                seen[dialogue] += 1
            items[name] = _averaged(keys, [clusters[i] for i in chosen], sums, nats_statistic(name))
    chosen = [i for i, row in enumerate(rows) if "hit" in row]
    if chosen:
        keys = [json.dumps([rows[i]["dialogue_id"], rows[i]["persona"], rows[i]["turn"]]) for i in chosen]
        hits = with_ones([rows[i]["hit"] for i in chosen])
        items["hits_at_1"] = _averaged(keys, [clusters[i] for i in chosen], hits, ratio)
    return items


def choice_items(rows: Sequence[Row]) -> dict[str, Items]:
    """Items of `forced_choice`, from the rows of `choices.jsonl`: a fact in a wording."""
    if not rows:
        return {}
    facts = [(row["persona_id"], row["fact_id"], row["turn"], row["split"], row["question"]) for row in rows]
    unit = 0 if len({fact[0] for fact in facts}) > 1 else 1
    right = with_ones([row["right"] for row in rows])
    return {"forced_choice": _averaged(facts, [fact[unit] for fact in facts], right, ratio)}


def system_items(folder: str | Path, seed: int = 0) -> dict[str, Items]:
    """All items of an evaluated system, from the files replies, likelihoods and choices of `evaluate/<system>/`.

    Raises:
        FileNotFoundError: if there is no `replies.jsonl`; rule systems have no likelihoods.
    """
    rows = read_jsonl(Path(folder) / "replies.jsonl")
    spoken = [row for row in rows if row.get("correct") is None]
    scored, chosen = Path(folder) / "likelihoods.jsonl", Path(folder) / "choices.jsonl"
    return {
        **fact_items(rows),
        **(reply_items(spoken, seed, _human(Path(folder) / "results.json")) if spoken else {}),
        **choice_items(read_jsonl(chosen) if chosen.is_file() else []),
        **likelihood_items(read_jsonl(scored) if scored.is_file() else []),
    }


def _human(results: Path) -> dict[str, float | None] | None:
    """What people do, as the system's results have it."""
    band = json.loads(results.read_text(encoding="utf-8"))["run"].get("human_band") if results.is_file() else None
    return human_values(band) if band else None


def _averaged(
    keys: Sequence[Hashable], clusters: Sequence[Hashable], statistics: np.ndarray, statistic: Statistic
) -> Items:
    """One item a key: the mean of its rows' statistics."""
    first: dict[Hashable, int] = {}
    codes = np.array([first.setdefault(key, len(first)) for key in keys])
    sums = np.zeros((len(first), statistics.shape[1]))
    np.add.at(sums, codes, statistics)
    owner = dict(zip(reversed(keys), reversed(clusters), strict=True))
    return Items(list(first), [owner[key] for key in first], sums / np.bincount(codes)[:, None], statistic)


def compare(
    a: Mapping[str, Items],
    b: Mapping[str, Items],
    metrics: Collection[str] = METRICS,
    num_resamples: int = NUM_RESAMPLES,
    num_trials: int = NUM_TRIALS,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Every metric that both systems have, `a` less `b`, with Holm's adjustment over all of them.

    The family that Holm's adjustment is over are the metrics compared here. Where more than one pair of systems is
    compared, or fewer metrics matter, adjust the p-values of all that is claimed with `intervals.holm`.

    Effects: risk difference in percentage points for rates, Cliff's delta for ordinal values, d_z over clusters for
    other means and ratios; None for corpus numbers such as BLEU, where the difference itself is all there is, and where
    d_z is not defined.

    Args:
        a, b: items by metric (`system_items`, or `reply_items` and `fact_items` of rows).
        metrics: the family, chosen before looking; all by default.

    Returns:
        For each metric `{"a", "b", "difference", "ci_low", "ci_high", "p_value", "p_holm", "effect", "effect_name",
        "n", "n_clusters", "unit", "higher_is_better"}`; bounds are None where there is one cluster.

    Raises:
        ValueError: when the two do not have the same items of a metric, or no metric in common.
    """
    rows = {}
    for name in METRICS:
        if name in metrics and name in a and name in b:
            order = _paired_order(name, a[name], b[name])
            rows[name] = _row(name, a[name], b[name].statistics[order], num_resamples, num_trials, seed)
    if not rows:
        found = f"`a` has {sorted(a) or 'none'}, `b` {sorted(b) or 'none'}"
        raise ValueError(f"none of `metrics` {sorted(metrics)} in common: {found}.")
    adjusted = holm({name: row["p_value"] for name, row in rows.items()})
    for name, row in rows.items():
        row["p_holm"] = adjusted[name]
    return rows


def _paired_order(name: str, a: Items, b: Items) -> list[int]:
    """Where in `b` the items of `a` stand."""
    place = {key: index for index, key in enumerate(b.keys)}
    missing = [key for key in a.keys if key not in place]
    if missing or len(place) > len(a.keys):
        raise ValueError(
            f"`{name}`: {len(missing)} of the {len(a.keys)} items of `a` are not in `b`, and "
            f"{len(place) - len(a.keys) + len(missing)} of `b` not in `a`. A paired comparison needs the same prompts: "
            "evaluate both on the same data, with the same limits and seed."
        )
    return [place[key] for key in a.keys]


def _row(name: str, a: Items, other: np.ndarray, num_resamples: int, num_trials: int, seed: int) -> dict[str, Any]:
    metric, mine = METRICS[name], a.statistics
    num_clusters = len(set(a.clusters))
    interval = paired_bootstrap(mine, other, a.clusters, a.statistic, num_resamples, seed)
    if metric.is_rate and np.array_equal(mine, other):
        # No item differs: so does at most the share of clusters that Wilson allows for, and in either direction.
        bound = wilson(0, num_clusters)[1]
        interval = Interval(0.0, -bound, bound)
    effect, effect_name = math.nan, None
    if metric.is_rate:
        effect, effect_name = 100 * interval.value, "risk difference, percentage points"
    elif metric.ordinal:
        effect, effect_name = cliffs_delta(mine[:, 0], other[:, 0]), "Cliff's delta"
    elif mine.shape[1] == 2:
        effect, effect_name = paired_d(mine, other, a.clusters), "d_z over clusters"
    return {
        "a": float(a.statistic(mine.sum(axis=0))),
        "b": float(a.statistic(other.sum(axis=0))),
        "difference": interval.value,
        "ci_low": _finite(interval.low),
        "ci_high": _finite(interval.high),
        "p_value": randomisation_test(mine, other, a.clusters, a.statistic, num_trials, seed),
        "p_holm": None,
        "effect": _finite(effect),
        "effect_name": effect_name,
        "n": len(mine),
        "n_clusters": num_clusters,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
