"""What each metric of recorded replies is made of: sufficient statistics, reply by reply or dialogue by dialogue.

Totals of statistics make a number (`evaluation/intervals.py`), so one pass serves the value, its interval, and the paired
difference of two systems.
"""

import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation import METRICS
from evaluation.contradiction import THRESHOLD, contradicts, statements
from evaluation.diversity import repetition, taken_from
from evaluation.engagement import (
    engagement_score,
    has_question,
    information,
    inverse_document_frequencies,
    is_follow_up,
    length_words,
    uptake,
)
from evaluation.intervals import (
    NUM_RESAMPLES,
    Interval,
    Share,
    Statistic,
    bootstrap_together,
    bounded_together,
    ratio,
    with_ones,
)
from evaluation.overlap import bleu_from_statistics, bleu_statistics, f1, rouge
from evaluation.persona import (
    content_stems,
    expressed,
    fact_density,
    is_copy,
    keyword_score,
    persona_lift,
    persona_overlap,
    verbatim_kept,
)
from evaluation.style import FEATURES, style_counts
from rlhf.data.split import characters

Row = Mapping[str, Any]


def independent(rows: Sequence[Row]) -> tuple[str, list[Hashable]]:
    """What is resampled for an interval, and the cluster of each row.

    Replies of one character lean on the same facts, so the unit is the persona (personas that share most facts are one
    character: [`rlhf.data.split.characters`]). Where all rows are of one, it is the dialogue, and in one dialogue the
    reply. A row without a persona counts by its dialogue.

    Returns:
        `("persona" | "dialogue" | "reply", clusters)`.
    """
    by_dialogue: list[Hashable] = [row["dialogue_id"] for row in rows]
    by_persona: list[Hashable] = [
        number if row["persona"] else row["dialogue_id"] for row, number in zip(rows, characters(rows), strict=True)
    ]
    if len(set(by_persona)) > 1 and any(row["persona"] for row in rows):
        return "persona", by_persona
    if len(set(by_dialogue)) > 1:
        return "dialogue", by_dialogue
    return "reply", list(range(len(rows)))


def metric_row(name: str, interval: Interval, n: int) -> dict[str, Any]:
    """What `results.json` says of a metric of METRICS; a bound that is NaN (one cluster) is null, as JSON lacks NaN."""
    value, low, high = interval
    return {
        "value": value,
        "ci_low": None if math.isnan(low) else low,
        "ci_high": None if math.isnan(high) else high,
        "n": n,
        "unit": METRICS[name].unit,
        "higher_is_better": METRICS[name].higher_is_better,
    }


# -- sufficient statistics ---------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """What a metric is made of: which rows it is of, their statistics ``(len(rows), k)``, and the number of a total."""

    rows: list[int]
    statistics: np.ndarray
    statistic: Statistic
    n: int
    """Replies, or what the ratio's denominators count (4-grams, words, items)."""


# Metrics whose value for a reply is already in its row, under the metric's name; they are averaged as they are.
RECORDED = ("c_score",)

# Why a metric is not among the measures.
REASONS = {
    **dict.fromkeys(
        ("keyword_score", "copy_rate", "fact_density", "persona_precision", "persona_recall", "persona_f1"),
        "no row has a persona",
    ),
    "contradiction_free_rate": "no row has a persona or an earlier turn of its own",
    "grounded_coverage": "no row has a persona with a content word",
    "persona_composite": "no replies of people in other dialogues were given to compare with",
    "persona_lift": "the rows are of fewer than two characters",
    "c_score": "no `nli_model` was given, or no row has a persona",
    "verbatim_facts": "no address, number or name stands in a persona and in its reference",
    **dict.fromkeys(("bleu", "rouge1", "rouge2", "rougeL", "f1"), "no row has a reference"),
    "length_ratio": "no reference has a word",
    **dict.fromkeys(("follow_up_rate", "uptake"), "no user's turn with a content word comes before a reply"),
    **dict.fromkeys(("mean_idf", *FEATURES), "no reply has a word"),
    **dict.fromkeys(
        ("repetition", "repetition_within", "repetition_across", "repetition_context"), "no reply has 4 tokens"
    ),
}


def _mean(chosen: list[int], values: Sequence[float]) -> Measure:
    return Measure(chosen, with_ones(values), ratio, len(chosen))


def _means(chosen: list[int], values: Mapping[str, Sequence[float]]) -> dict[str, Measure]:
    return {name: _mean(chosen, numbers) for name, numbers in values.items()}


def _ratios(chosen: list[int], pairs: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Measure]:
    arrays = {name: np.array(found, dtype=np.float64).reshape(-1, 2) for name, found in pairs.items()}
    return {name: Measure(chosen, array, ratio, int(array[:, 1].sum())) for name, array in arrays.items()}


def measures(
    rows: Sequence[Row], seed: int = 0, human: Mapping[str, float | None] | None = None
) -> dict[str, Measure]:
    """The sufficient statistics of every metric that adds up over replies; one that no row can have is left out.

    Distinct-n and EAD do not add up and are not among them.

    Args:
        rows: as for `score_rows`.
        seed: of the other persona that `persona_lift` compares with.
        human: people's `grounded_coverage`, `copy_rate` and `fact_density`, which `persona_composite` needs.
    """
    personal = _persona_measures(rows, seed)
    found = {
        **_consistency_measures(rows, personal, human or {}),
        **personal,
        **_reference_measures(rows),
        **_dialogue_measures(rows),
        **_form_measures(rows),
    }
    return {name: measure for name, measure in found.items() if measure.n}


def _persona_measures(rows: Sequence[Row], seed: int) -> dict[str, Measure]:
    chosen = [i for i, row in enumerate(rows) if row["persona"]]
    pairs = [(rows[i]["persona"], rows[i]["response"]) for i in chosen]
    overlaps = [persona_overlap(*pair) for pair in pairs]
    others = _other_personas([rows[i] for i in chosen], seed)
    lifts = [persona_lift(mine, other, reply) for (mine, reply), other in zip(pairs, others, strict=False)]
    judged = {name: [i for i in chosen if rows[i].get(name) is not None] for name in RECORDED}
    referred = [i for i in chosen if rows[i]["reference"] is not None]
    kept = [verbatim_kept(rows[i]["persona"], rows[i]["reference"], rows[i]["response"]) for i in referred]
    return {
        **_means(
            chosen,
            {
                "keyword_score": [keyword_score(*pair) for pair in pairs],
                "copy_rate": [float(is_copy(*pair)) for pair in pairs],
                "fact_density": [fact_density(*pair) for pair in pairs],
                "persona_precision": [overlap.precision for overlap in overlaps],
                "persona_recall": [overlap.recall for overlap in overlaps],
                "persona_f1": [overlap.f1 for overlap in overlaps],
            },
        ),
        **(_means(chosen, {"persona_lift": lifts}) if others else {}),
        **{name: _mean(at, [rows[i][name] for i in at]) for name, at in judged.items()},
        **_ratios(referred, {"verbatim_facts": kept}),
    }


def _other_personas(rows: Sequence[Row], seed: int) -> list[list[str]]:
    """For each row the persona of another character, drawn by the seed and the row alone; empty for one character."""
    of = characters(rows)
    first: dict[int, tuple[str, ...]] = {}
    for number, row in zip(of, rows, strict=True):
        first[number] = min(first.get(number, tuple(row["persona"])), tuple(row["persona"]))
    if len(first) < 2:
        return []
    ordered = sorted(first, key=lambda number: first[number])  # the same whatever the order of the rows
    place = {number: index for index, number in enumerate(ordered)}
    drawn = []
    for number, row in zip(of, rows, strict=True):
        key = f"{seed}/{row['dialogue_id']}/{len(row['history'])}"
        index = random.Random(key).randrange(len(ordered) - 1)
        drawn.append(list(first[ordered[index + (index >= place[number])]]))
    return drawn


# -- consistency -------------------------------------------------------------------------------------------------------


def _consistency_measures(
    rows: Sequence[Row], personal: Mapping[str, Measure], human: Mapping[str, float | None]
) -> dict[str, Measure]:
    """Freedom of contradiction by reply; coverage and composite by dialogue, whose first row stands for all of it."""
    own = [_own_turns(row) for row in rows]
    bound = [i for i, row in enumerate(rows) if row["persona"] or own[i]]
    against = {i: float(_is_contradicted(rows[i], own[i])) for i in bound}
    found = _means(bound, {"contradiction_free_rate": [1 - against[i] for i in bound]})

    copied, density = (
        dict(zip(personal[name].rows, personal[name].statistics[:, 0], strict=True))
        for name in ("copy_rate", "fact_density")
    )
    first, sums = [], []
    for replies in passes(rows, [i for i in copied if any(map(content_stems, rows[i]["persona"]))]):
        persona = rows[replies[0]]["persona"]
        covered: set[int] = set()
        for i in replies:
            if not copied[i] and not against[i]:
                covered |= expressed(persona, rows[i]["response"], _users_turns(rows[i]))
        totals = [[against[i], copied[i], density[i], 1.0] for i in replies]
        first.append(replies[0])
        sums.append([len(covered), sum(map(bool, map(content_stems, persona))), *np.sum(totals, axis=0)])
    table = np.array(sums, dtype=np.float64).reshape(-1, 6)
    found |= {"grounded_coverage": Measure(first, table[:, :2], ratio, int(table[:, 1].sum()))}
    coverage, copy_rate, facts = (human.get(name) for name in ("grounded_coverage", "copy_rate", "fact_density"))
    if coverage and copy_rate is not None and facts:
        statistic = _composite(coverage, copy_rate, facts)
        found |= {"persona_composite": Measure(first, table, statistic, int(table[:, 5].sum()))}
    return found


def passes(rows: Sequence[Row], chosen: Sequence[int]) -> list[list[int]]:
    """The chosen rows by dialogue and persona, in the order of the dialogue.

    The second reply to one prompt, another decoding, belongs to a second pass through its dialogue.
    """
    seen: Counter[Hashable] = Counter()
    found: dict[Hashable, list[int]] = {}
    for i in chosen:
        dialogue = (rows[i]["dialogue_id"], tuple(rows[i]["persona"]))
        prompt = (dialogue, tuple(turn["content"] for turn in rows[i]["history"]))
        found.setdefault((dialogue, seen[prompt]), []).append(i)
        seen[prompt] += 1
    return [sorted(replies, key=lambda i: len(rows[i]["history"])) for replies in found.values()]


def _own_turns(row: Row) -> list[str]:
    return [turn["content"] for turn in row["history"] if turn["role"] == "assistant"]


def _users_turns(row: Row) -> list[str]:
    return [turn["content"] for turn in row["history"] if turn["role"] == "user"]


def _is_contradicted(row: Row, own: Sequence[str]) -> bool:
    """Whether the reply contradicts a sentence of the persona, or of an earlier own turn."""
    told = [*row["persona"], *(sentence for turn in own for sentence in statements(turn))]
    return contradicts(told, row["response"]).score >= THRESHOLD


def _composite(coverage: float, copy_rate: float, facts: float) -> Statistic:
    """The number of the six totals of a dialogue, given what people have."""

    def statistic(totals: np.ndarray) -> np.ndarray:
        covered, persona, contradicted, copied, density, replies = np.moveaxis(totals, -1, 0)
        reached = np.minimum(1.0, covered / persona / coverage)
        excess = np.maximum(0.0, copied / replies - copy_rate)
        # No facts at all are not too many: coverage is 0 then.
        packed = np.minimum(1.0, facts * replies / np.maximum(density, facts * replies * 1e-9))
        return reached * (1 - contradicted / replies) * (1 - excess) * packed

    return statistic


def _reference_measures(rows: Sequence[Row]) -> dict[str, Measure]:
    chosen = [i for i, row in enumerate(rows) if row["reference"] is not None]
    if not chosen:
        return {}
    pairs = [(rows[i]["response"], rows[i]["reference"]) for i in chosen]
    rouges = [rouge(*pair) for pair in pairs]
    lengths = [(length_words(reply), length_words(reference)) for reply, reference in pairs]
    statistics = np.stack([bleu_statistics(*pair) for pair in pairs])
    return {
        "bleu": Measure(chosen, statistics, bleu_from_statistics, len(chosen)),
        **_means(chosen, {name: [scores[name] for scores in rouges] for name in ("rouge1", "rouge2", "rougeL")}),
        **_means(chosen, {"f1": [f1(*pair) for pair in pairs]}),
        **_ratios(chosen, {"length_ratio": lengths}),
    }


def _dialogue_measures(rows: Sequence[Row]) -> dict[str, Measure]:
    everyone = list(range(len(rows)))
    replies = [row["response"] for row in rows]
    own = list(map(_own_turns, rows))
    context = [[*row["persona"], *(turn["content"] for turn in row["history"])] for row in rows]
    asked = {i: row["history"][-1]["content"] for i, row in enumerate(rows) if _user_is_last(row)}
    taken = {i: share for i, turn in asked.items() if (share := uptake(replies[i], turn)) is not None}
    told = [turn["content"] for row in rows for turn in row["history"]]
    frequencies = inverse_document_frequencies(told + [row["reference"] for row in rows if row["reference"]])
    return {
        **_ratios(
            everyone,
            {
                "repetition": list(map(repetition, replies, own)),
                "repetition_within": list(map(repetition, replies)),
                "repetition_across": list(map(taken_from, replies, own)),
                "repetition_context": list(map(taken_from, replies, context)),
                "mean_idf": [information(reply, frequencies) for reply in replies],
            },
        ),
        **_means(
            list(taken),
            {
                "follow_up_rate": [float(is_follow_up(replies[i], asked[i])) for i in taken],
                "uptake": list(taken.values()),
            },
        ),
    }


def _user_is_last(row: Row) -> bool:
    return bool(row["history"]) and row["history"][-1]["role"] == "user"


def _form_measures(rows: Sequence[Row]) -> dict[str, Measure]:
    everyone = list(range(len(rows)))
    replies = [row["response"] for row in rows]
    styles = list(map(style_counts, replies))
    return {
        **_means(
            everyone,
            {
                "question_rate": [float(has_question(reply)) for reply in replies],
                "engagement_score": list(map(engagement_score, replies)),
                "length_words": [float(length_words(reply)) for reply in replies],
            },
        ),
        **_ratios(everyone, {name: [counts[name] for counts in styles] for name in FEATURES}),
    }


def measure_intervals(
    found: Mapping[str, Measure], clusters: Sequence[Hashable], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """The 95 % interval of each measure. Measures of the same rows share their resamples: drawing is the costly part.

    Shares have bounds that hold for few clusters and at their ends too. Of another number that no resample changes, such
    as the F1 of empty replies, the bounds are NaN: zero width would claim certainty.

    Args:
        clusters: one for each of the rows that the measures were taken of.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, measure in found.items():
        groups.setdefault(tuple(measure.rows), []).append(name)
    intervals: dict[str, Interval] = {}
    for chosen, names in groups.items():
        owners = [clusters[i] for i in chosen]
        shares = {
            name: Share(found[name].statistics, METRICS[name].low, METRICS[name].high)
            for name in names
            if METRICS[name].is_share
        }
        others = {name: (found[name].statistics, found[name].statistic) for name in names if name not in shares}
        if shares:
            intervals |= bounded_together(shares, owners, num_resamples, seed)
        if others:
            for name, interval in bootstrap_together(others, owners, num_resamples, seed).items():
                certain = math.isclose(interval.low, interval.high, rel_tol=1e-9)
                intervals[name] = interval._replace(low=math.nan, high=math.nan) if certain else interval
    return {name: intervals[name] for name in found}
