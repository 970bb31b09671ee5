"""Metrics of recorded replies, which need neither a model nor probes."""

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evaluation import METRICS
from evaluation.diversity import EAD_VOCABULARY, distinct_interval, ead_interval
from evaluation.guards import check, verdict
from evaluation.human_band import People, human_band, human_replies, human_values, in_words, without_composite
from evaluation.intervals import NUM_RESAMPLES
from evaluation.measures import REASONS, independent, measure_intervals, measures, metric_row
from evaluation.overlap import ROUGE_SIGNATURE, bleu_signature, normalize
from evaluation.persona import unreadable
from rlhf.files import git_commit, versions, write_json, write_jsonl
from rlhf.persona import parse_prompt

logger = logging.getLogger(__name__)

MAX_REJECTED_SHARE = 0.05
DISTINCT_TOKENS = 10_000

# Metrics by the tokeniser of `evaluation.persona`, by what they read: without a word of it they would be 0 or 1.
_OF_PERSONAS = {"copy_rate", "fact_density", "persona_precision", "persona_recall", "persona_f1", "persona_lift",
                "keyword_score", "contradiction_free_rate", "grounded_coverage", "persona_composite"}  # fmt: skip
_OF_REFERENCES = {"rouge1", "rouge2", "rougeL"}
WORD_METRICS = {
    "personas": _OF_PERSONAS,
    "responses": _OF_PERSONAS | _OF_REFERENCES | {"uptake", "follow_up_rate"},
    "references": _OF_REFERENCES,
}

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

    A row with `messages` is a whole dialogue, as `rlhf run` prepares them: each reply of its assistant is a row.

    Raises:
        ValueError: listing every bad row with file and line, when they are more than 5 % or no row is left.
    """
    rows, rejected = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            dialogue = isinstance(row, dict) and "messages" in row
            rows += list(map(parse_row, human_replies(row) if dialogue else [row]))
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


def read_people(path: Path) -> People:
    """The replies of a file as those of people; bad rows as in [`read_rows`]."""
    return People(read_rows(path)[0], path.name, _hash(path))


# -- scores ------------------------------------------------------------------------------------------------------------


def score_rows(
    rows: Sequence[Mapping[str, Any]],
    seed: int = 0,
    distinct_tokens: int = DISTINCT_TOKENS,
    num_resamples: int = NUM_RESAMPLES,
    people: People | None = None,
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
        people: `run["human_band"]` says what they do in other dialogues than `rows` (`evaluation.human_band`), and
            `persona_composite` is measured against it.

    Returns:
        `{"metrics": {name: {"value", "ci_low", "ci_high", "n", "unit", "higher_is_better"}}, "run": {…}}`. `n` counts
        replies; for distinct-n and EAD tokens, for other ratios what the denominators count.
    """
    if not rows:
        raise ValueError("`rows` is empty: nothing to score.")
    unit, clusters = independent(rows)
    band = human_band(people, rows, seed) if people else None
    found = measures(rows, seed, human_values(band) if band else None)
    intervals = measure_intervals(found, clusters, num_resamples, seed)
    metrics = {name: metric_row(name, interval, found[name].n) for name, interval in intervals.items()}
    not_scored = {name: reason for name, reason in REASONS.items() if name not in found}
    if band and "persona_composite" in not_scored:
        not_scored["persona_composite"] = without_composite(band, "grounded_coverage" in found)

    replies = [row["response"] for row in rows]
    lengths = [len(normalize(reply)) for reply in replies]
    total = sum(lengths)
    used = min(distinct_tokens, total)
    if used < distinct_tokens:
        logger.warning(
            "distinct-n over %d tokens, all there are (asked: %d): compare it at this size only", used, distinct_tokens
        )
    unread = {
        "personas": sum(unreadable(" ".join(row["persona"])) for row in rows),
        "responses": sum(map(unreadable, replies)),
        "references": sum(unreadable(row["reference"] or "") for row in rows),
    }
    if any(unread.values()):
        logger.warning("letters that the tokeniser cannot read (a to z, 0 to 9 alone): rows by field %s", unread)
    for field, names in WORD_METRICS.items():
        if unread[field] == len(rows):
            for name in names & metrics.keys():
                del metrics[name]
                not_scored[name] = f"no row has {field} in letters that the tokeniser can read (a to z, 0 to 9)"
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
        "rows_not_readable": unread,
        "empty_responses": sum(not reply.strip() for reply in replies),
        "clusters": {"unit": unit, "n": len(set(clusters))},
        "num_resamples": num_resamples,
        "distinct_tokens": used,
        "ead_vocabulary": EAD_VOCABULARY,
        "signatures": {"bleu": bleu_signature(), "rouge": ROUGE_SIGNATURE} if "bleu" in found else {},
        "not_scored": not_scored,
        **({"human_band": band} if band else {}),
    }
    return {"metrics": {name: metrics[name] for name in METRICS if name in metrics}, "run": run}


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
    people = read_people(arguments.human) if arguments.human else None
    results = score_rows(rows, arguments.seed, arguments.distinct_tokens, people=people)
    results["run"] |= {
        "config": {
            "seed": arguments.seed,
            "distinct_tokens": arguments.distinct_tokens,
            "nli_model": arguments.nli_model,
            "human": arguments.human.name if arguments.human else None,
        },
        "nli_model": nli_model,
        "responses": source.name,
        "data_hash": _hash(source),
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
        print(f"{name:23} {arrow} {row['value']:8.4g}  {bounds:20}  n={row['n']:<7} {row['unit']}")
    for name, reason in results["run"]["not_scored"].items():
        print(f"{name:23}   not scored: {reason}")
    band = results["run"].get("human_band")
    if band:
        checks = check({name: row["value"] for name, row in results["metrics"].items()}, band["yardstick"])
        print(": ".join(filter(None, verdict(checks))))
        print(in_words(band))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
