"""Metrics of recorded replies, which need neither a model nor probes."""

import argparse
import hashlib
import json
import logging
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation import METRICS
from evaluation.diversity import EAD_VOCABULARY, distinct_interval, ead_interval, repetition, taken_from
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
    Statistic,
    bootstrap_together,
    ratio,
    wilson_at_the_edge,
    with_ones,
)
from evaluation.overlap import (
    ROUGE_SIGNATURE,
    bleu_from_statistics,
    bleu_signature,
    bleu_statistics,
    f1,
    normalize,
    rouge,
)
from evaluation.persona import (
    fact_density,
    is_copy,
    keyword_score,
    persona_lift,
    persona_overlap,
    verbatim_kept,
)
from evaluation.style import FEATURES, style_counts
from rlhf.data.split import characters
from rlhf.files import git_commit, versions, write_json, write_jsonl
from rlhf.persona import parse_prompt

logger = logging.getLogger(__name__)

MAX_REJECTED_SHARE = 0.05
DISTINCT_TOKENS = 10_000

Row = dict[str, Any]


def parse_row(row: Any) -> Row:
    """Check one row of a file of replies and return its five fields; other fields stay as they are.

    A row may carry `prompt`, the text `[PERSONA] … [DIALOGUE] … [RESPONSE]`, in place of `persona` and `history`.

    Raises:
        ValueError: naming every field that is missing or malformed.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, got {type(row).__name__}")  # noqa: TRY004 - a bad row is one error
    row = dict(row)
    if "persona" not in row and isinstance(row.get("prompt"), str):
        persona, row["history"] = parse_prompt(row["prompt"])
        row["persona"] = list(persona.facts)
    row.setdefault("reference", None)
    problems = []
    persona = row.get("persona")
    if not isinstance(persona, list) or not all(isinstance(fact, str) and fact.strip() for fact in persona):
        problems.append(f"`persona` must be a list of sentences, got {_shown(row, 'persona')}")
    if not isinstance(row.get("history"), list) or not all(map(_is_message, row["history"])):
        problems.append(
            '`history` must be a list of {"role": "user"|"assistant", "content": text}, '
            f"got {_shown(row, 'history')}"
        )
    if not isinstance(row.get("response"), str):
        problems.append(f'`response` must be text ("" for an empty reply), got {_shown(row, "response")}')
    if not isinstance(row["reference"], str | None):
        problems.append(f"`reference` must be text or null, got {_shown(row, 'reference')}")
    if not isinstance(row.get("dialogue_id"), str) or not row["dialogue_id"]:
        problems.append(f"`dialogue_id` must be text that is not empty, got {_shown(row, 'dialogue_id')}")
    if problems:
        raise ValueError("; ".join(problems))
    return row


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
    )


def _shown(row: Mapping[str, Any], field: str) -> str:
    return repr(row[field])[:80] if field in row else "nothing"


def read_rows(path: Path) -> tuple[list[Row], list[Row]]:
    """Read a JSON-lines file of replies: the rows, and the rejected ones as {"file", "line", "reason", "text"}.

    Raises:
        ValueError: listing every bad row with file and line, when they are more than 5 % or no row is left.
    """
    rows, rejected = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_row(json.loads(line.decode("utf-8"))))
        except ValueError as error:  # JSON, UTF-8 and field errors are all ValueErrors
            text = line.decode("utf-8", errors="replace")
            rejected.append({"file": str(path), "line": number, "reason": str(error), "text": text})
    report = "\n".join(f"{bad['file']}:{bad['line']}: {bad['reason']}" for bad in rejected)
    total = len(rows) + len(rejected)
    if not rows or len(rejected) > MAX_REJECTED_SHARE * total:
        raise ValueError(
            f"{path}: {len(rejected)} of {total} rows are bad; at most {MAX_REJECTED_SHARE:.0%} may be, and one row "
            f"must be good. Mend them:\n{report or 'the file has no rows'}"
        )
    if rejected:
        logger.warning("%d of %d rows are bad and are not scored:\n%s", len(rejected), total, report)
    return rows, rejected


def independent(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[Hashable]]:
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


def metric_row(name: str, interval: Interval, n: int) -> Row:
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


# -- sufficient statistics, reply by reply -----------------------------------------------------------------------------


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


def measures(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Measure]:
    """The sufficient statistics of every metric that adds up over replies; one that no row can have is left out.

    Distinct-n and EAD do not add up and are not among them.

    Args:
        rows: as for `score_rows`.
        seed: of the other persona that `persona_lift` compares with.
    """
    found = {
        **_persona_measures(rows, seed),
        **_reference_measures(rows),
        **_dialogue_measures(rows),
        **_form_measures(rows),
    }
    return {name: measure for name, measure in found.items() if measure.n}


def _persona_measures(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Measure]:
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


def _other_personas(rows: Sequence[Mapping[str, Any]], seed: int) -> list[list[str]]:
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


def _reference_measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
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


def _dialogue_measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
    everyone = list(range(len(rows)))
    replies = [row["response"] for row in rows]
    own = [[turn["content"] for turn in row["history"] if turn["role"] == "assistant"] for row in rows]
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


def _user_is_last(row: Mapping[str, Any]) -> bool:
    return bool(row["history"]) and row["history"][-1]["role"] == "user"


def _form_measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
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


# -- scores ------------------------------------------------------------------------------------------------------------


def score_rows(
    rows: Sequence[Mapping[str, Any]],
    seed: int = 0,
    distinct_tokens: int = DISTINCT_TOKENS,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
    """All metrics of recorded replies that need neither a model nor probes.

    Intervals are 95 %, over what [`independent`] finds to be independent (`run["clusters"]` says what). An empty reply
    is a reply: no overlap, no words. Metrics that no row can have are named with the reason in `run["not_scored"]`.

    Args:
        rows: with `persona`, `history`, `response`, `reference` (text or None) and `dialogue_id`; and with `c_score`
            where a model judged the reply (`evaluation.nli`).
        seed: of the resamples, of the shuffle for distinct-n, and of the other persona of `persona_lift`.
        distinct_tokens: tokens for distinct-n; all that there are where the replies have fewer, see
            `run["distinct_tokens"]`.

    Returns:
        `{"metrics": {name: {"value", "ci_low", "ci_high", "n", "unit", "higher_is_better"}}, "run": {…}}`. `n` counts
        replies; for distinct-n and EAD tokens, for other ratios what the denominators count.
    """
    if not rows:
        raise ValueError("`rows` is empty: nothing to score.")
    unit, clusters = independent(rows)
    found = measures(rows, seed)
    intervals = measure_intervals(found, clusters, num_resamples, seed)
    metrics = {name: metric_row(name, interval, found[name].n) for name, interval in intervals.items()}
    not_scored = {name: reason for name, reason in REASONS.items() if name not in found}

    replies = [row["response"] for row in rows]
    lengths = [len(normalize(reply)) for reply in replies]
    total = sum(lengths)
    used = min(distinct_tokens, total)
    if used < distinct_tokens:
        logger.warning(
            "distinct-n over %d tokens, all there are (asked: %d): compare it at this size only", used, distinct_tokens
        )
    for n in (1, 2):
        if max(lengths) < n:
            not_scored[f"distinct_{n}"] = f"no reply has {n} tokens"
        else:
            interval = distinct_interval(replies, clusters, n, used, seed)
            metrics[f"distinct_{n}"] = metric_row(f"distinct_{n}", interval, used)
    try:
        metrics["ead"] = metric_row("ead", ead_interval(replies, clusters), total)
    except ValueError as error:  # no word at all, or more than the vocabulary holds
        not_scored["ead"] = str(error)

    run = {
        "seed": seed,
        "rows": len(rows),
        "rows_without_persona": sum(not row["persona"] for row in rows),
        "rows_without_reference": sum(row["reference"] is None for row in rows),
        "empty_responses": sum(not reply.strip() for reply in replies),
        "clusters": {"unit": unit, "n": len(set(clusters))},
        "num_resamples": num_resamples,
        "distinct_tokens": used,
        "ead_vocabulary": EAD_VOCABULARY,
        "signatures": {"bleu": bleu_signature(), "rouge": ROUGE_SIGNATURE} if "bleu" in found else {},
        "not_scored": not_scored,
    }
    return {"metrics": {name: metrics[name] for name in METRICS if name in metrics}, "run": run}


def measure_intervals(
    found: Mapping[str, Measure], clusters: Sequence[Hashable], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """The 95 % interval of each measure. Measures of the same rows share their resamples: drawing is the costly part.

    Args:
        clusters: one for each of the rows that the measures were taken of.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, measure in found.items():
        groups.setdefault(tuple(measure.rows), []).append(name)
    intervals = {}
    for chosen, names in groups.items():
        owners = [clusters[i] for i in chosen]
        together = {name: (found[name].statistics, found[name].statistic) for name in names}
        for name, interval in bootstrap_together(together, owners, num_resamples, seed).items():
            rate = METRICS[name].is_rate
            intervals[name] = wilson_at_the_edge(interval, len(set(owners))) if rate else interval
    return intervals


def score(arguments: argparse.Namespace) -> None:
    """Score a file of replies into a file of results; bad rows go to `rejected.jsonl` beside it."""
    source: Path = arguments.responses
    rows, rejected = read_rows(source)
    nli_model = None
    if arguments.nli_model:
        from evaluation.nli import c_scores, load_nli  # not at the top: it takes seconds of imports

        nli = load_nli(arguments.nli_model)
        nli_model = nli.name
        rows = [row | {"c_score": value} for row, value in zip(rows, c_scores(nli, rows), strict=True)]
    results = score_rows(rows, arguments.seed, arguments.distinct_tokens)
    results["run"] |= {
        "config": {
            "seed": arguments.seed,
            "distinct_tokens": arguments.distinct_tokens,
            "nli_model": arguments.nli_model,
        },
        "nli_model": nli_model,
        "responses": source.name,
        "data_hash": hashlib.sha256(source.read_bytes()).hexdigest(),
        "rejected": len(rejected),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": versions(),
    }
    rejects = arguments.output.with_name("rejected.jsonl")
    if rejected or rejects.exists():  # an older list would belie this run
        write_jsonl(rejects, rejected)
    write_json(arguments.output, results)
    for name, row in results["metrics"].items():
        arrow = {True: "↑", False: "↓", None: " "}[row["higher_is_better"]]
        bounds = "no interval" if row["ci_low"] is None else f"[{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
        print(f"{name:20} {arrow} {row['value']:8.4g}  {bounds:20}  n={row['n']:<7} {row['unit']}")
    for name, reason in results["run"]["not_scored"].items():
        print(f"{name:20}   not scored: {reason}")
