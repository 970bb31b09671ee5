"""Metrics of recorded replies, which need neither a model nor probes."""

import argparse
import hashlib
import json
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import METRICS
from evaluation.diversity import distinct_interval, repetition
from evaluation.engagement import has_question, length_words
from evaluation.intervals import NUM_RESAMPLES, Interval, bootstrap_statistic, cluster_bootstrap, rate_interval
from evaluation.overlap import ROUGE_SIGNATURE, bleu, bleu_from_statistics, bleu_statistics, f1, normalize, rouge
from evaluation.persona import fact_density, is_copy, keyword_score
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
    """What `results.json` says of a metric of METRICS; a bound that is NaN (of one cluster) is null, as JSON lacks NaN."""
    value, low, high = interval
    return {
        "value": value,
        "ci_low": None if math.isnan(low) else low,
        "ci_high": None if math.isnan(high) else high,
        "n": n,
        "unit": METRICS[name].unit,
        "higher_is_better": METRICS[name].higher_is_better,
    }


def score_rows(
    rows: Sequence[Mapping[str, Any]],
    seed: int = 0,
    distinct_tokens: int = DISTINCT_TOKENS,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
    """All metrics of recorded replies that need neither a model nor probes.

    Intervals are 95 %, over what [`independent`] finds to be independent (`run["clusters"]` says what). An empty reply is a reply: no overlap, no words. Metrics that no row can have are named with the reason in
    `run["not_scored"]`.

    Args:
        rows: with `persona`, `history`, `response`, `reference` (text or None) and `dialogue_id`.
        seed: of the resamples and of the shuffle for distinct-n.
        distinct_tokens: tokens for distinct-n; all that there are where the replies have fewer, see
            `run["distinct_tokens"]`.

    Returns:
        `{"metrics": {name: {"value", "ci_low", "ci_high", "n", "unit", "higher_is_better"}}, "run": {…}}`. `n` counts
        replies; for distinct-n tokens and for repetition 4-grams.
    """
    if not rows:
        raise ValueError("`rows` is empty: nothing to score.")
    unit, clusters = independent(rows)
    replies = [row["response"] for row in rows]
    metrics: dict[str, Row] = {}
    not_scored: dict[str, str] = {}

    def add(name: str, interval: Interval, n: int) -> None:
        metrics[name] = metric_row(name, interval, n)

    def add_means(values: Mapping[str, list[float]], chosen: list[int]) -> None:
        owners = [clusters[i] for i in chosen]
        for name, numbers in values.items():
            if METRICS[name].unit == "share of replies":
                add(name, rate_interval(numbers, owners, num_resamples, seed), len(numbers))
            else:
                add(name, cluster_bootstrap(numbers, np.ones(len(numbers)), owners, num_resamples, seed), len(numbers))

    with_persona = [i for i, row in enumerate(rows) if row["persona"]]
    if with_persona:
        pairs = [(rows[i]["persona"], replies[i]) for i in with_persona]
        values = {
            "keyword_score": [keyword_score(*pair) for pair in pairs],
            "copy_rate": [float(is_copy(*pair)) for pair in pairs],
            "fact_density": [fact_density(*pair) for pair in pairs],
        }
        add_means(values, with_persona)
    else:
        not_scored |= dict.fromkeys(("keyword_score", "copy_rate", "fact_density"), "no row has a persona")

    signatures = {}
    with_reference = [i for i, row in enumerate(rows) if row["reference"] is not None]
    if with_reference:
        guesses, golds = [replies[i] for i in with_reference], [rows[i]["reference"] for i in with_reference]
        statistics = np.stack([bleu_statistics(*pair) for pair in zip(guesses, golds, strict=True)])
        owners = [clusters[i] for i in with_reference]
        interval = bootstrap_statistic(statistics, owners, bleu_from_statistics, num_resamples, seed)
        value, signatures["bleu"] = bleu(guesses, golds)
        signatures["rouge"] = ROUGE_SIGNATURE
        add("bleu", interval._replace(value=value), len(guesses))
        rouges = [rouge(*pair) for pair in zip(guesses, golds, strict=True)]
        overlaps = {name: [scores[name] for scores in rouges] for name in ("rouge1", "rouge2", "rougeL")}
        overlaps["f1"] = [f1(*pair) for pair in zip(guesses, golds, strict=True)]
        add_means(overlaps, with_reference)
    else:
        not_scored |= dict.fromkeys(("bleu", "rouge1", "rouge2", "rougeL", "f1"), "no row has a reference")

    lengths = [len(normalize(reply)) for reply in replies]
    used = min(distinct_tokens, sum(lengths))
    if used < distinct_tokens:
        logger.warning(
            "distinct-n over %d tokens, all there are (asked: %d): compare it at this size only", used, distinct_tokens
        )
    for n in (1, 2):
        if max(lengths) < n:
            not_scored[f"distinct_{n}"] = f"no reply has {n} tokens"
        else:
            add(f"distinct_{n}", distinct_interval(replies, clusters, n, used, seed), used)

    everyone = list(range(len(rows)))
    descriptive = {
        "question_rate": [float(has_question(reply)) for reply in replies],
        "length_words": [float(length_words(reply)) for reply in replies],
    }
    add_means(descriptive, everyone)
    own_turns = [[turn["content"] for turn in row["history"] if turn["role"] == "assistant"] for row in rows]
    repeated, fourgrams = zip(*(repetition(*pair) for pair in zip(replies, own_turns, strict=True)), strict=True)
    if sum(fourgrams):
        add("repetition", cluster_bootstrap(repeated, fourgrams, clusters, num_resamples, seed), sum(fourgrams))
    else:
        not_scored["repetition"] = "no reply has 4 tokens"

    run = {
        "seed": seed,
        "rows": len(rows),
        "rows_without_persona": len(rows) - len(with_persona),
        "rows_without_reference": len(rows) - len(with_reference),
        "empty_responses": sum(not reply.strip() for reply in replies),
        "clusters": {"unit": unit, "n": len(set(clusters))},
        "num_resamples": num_resamples,
        "distinct_tokens": used,
        "signatures": signatures,
        "not_scored": not_scored,
    }
    return {"metrics": {name: metrics[name] for name in METRICS if name in metrics}, "run": run}


def score(arguments: argparse.Namespace) -> None:
    """Score a file of replies into a file of results; bad rows go to `rejected.jsonl` beside it."""
    source: Path = arguments.responses
    rows, rejected = read_rows(source)
    results = score_rows(rows, arguments.seed, arguments.distinct_tokens)
    results["run"] |= {
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
        print(f"{name:15} {arrow} {row['value']:8.4g}  {bounds:20}  n={row['n']:<7} {row['unit']}")
    for name, reason in results["run"]["not_scored"].items():
        print(f"{name:15}   not scored: {reason}")
