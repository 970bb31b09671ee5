"""What a run folder holds, read for the report: records and logs of its stages, results and replies of its systems.

A run folder holds stage folders (`sft/metadata.json`, `sft/metrics.jsonl`, …) and `evaluate/<system>/results.json` with
`replies.jsonl` beside it. Runs break off and files get lost: what is not there or cannot be read is named, and the rest
is used.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.bots import DEGENERATE
from rlhf.config import STAGES

HEADLINE = "persona_consistency"
TRAINED = ("base", "sft", "dpo", "ppo")
FLOORS = ("wrong_persona", "silence")
# Bots that win some metric without being consistent (a ladder of them is a system each of a run, where it has them).
ATTACKS = tuple(name for name in DEGENERATE if name not in FLOORS)
ANCHORS = ("oracle", *FLOORS, *ATTACKS)  # fixed repliers, shown after everything trained
APART = "probes_apart"  # the breakdown's name of probes that do not count for the headline


class Score(NamedTuple):
    """A value with its 95 % interval; `low` and `high` are None where none was recorded."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    unit: str
    higher_is_better: bool | None


@dataclass
class System:
    """Something that replied: what was measured on it, and its replies."""

    label: str  # "ppo", or "run / ppo" where several runs are compared
    name: str
    run: str
    metrics: dict[str, Score]
    breakdown: list[tuple[dict[str, Any], Score]]
    record: dict[str, Any]
    replies: list[dict[str, Any]]


@dataclass
class Stage:
    """A step of training: its record, and its log, one dict an event."""

    label: str
    name: str
    metadata: dict[str, Any]
    log: list[dict[str, Any]]


def load_runs(runs: list[Path]) -> tuple[list[System], list[Stage], list[str]]:
    """The systems and stages of these runs, in the report's order, and a line for everything that is missing.

    Raises:
        FileNotFoundError: for a run folder that is not there, or when no folder holds a result, a record or a log.
        ValueError: for a consistency that is not a share between 0 and 1.
    """
    absent = [str(run) for run in runs if not run.is_dir()]
    if absent or not runs:
        raise FileNotFoundError(f"`runs` must name existing run folders, got {', '.join(absent) or 'none'}")
    names = [run.resolve().name for run in runs]
    titles = names if len(set(names)) == len(names) else [str(run) for run in runs]
    systems: list[System] = []
    stages: list[Stage] = []
    missing: list[str] = []
    for run, title in zip(runs, titles, strict=True):
        prefix = f"{title} / " if len(runs) > 1 else ""
        records = (*run.glob("*/metadata.json"), *run.glob("*/metrics.jsonl"))
        folders = (path.parent.name for path in records if path.parent.suffix != ".previous")  # what was made anew
        for name in ordered(STAGES[:-1], folders, STAGES[-1:]):
            if name in ("base", "pairs") and not (run / name).is_dir():
                continue  # a recipe on somebody's pretrained model, or on the pairs of `prepare`, has no such stage
            metadata = _read_json(run, f"{name}/metadata.json", prefix, missing)
            trains = name not in ("prepare", "pairs", "evaluate") and "shipped" not in metadata
            log = _read_lines(run, f"{name}/metrics.jsonl", prefix, missing) if trains else []
            if metadata or log:
                stages.append(Stage(prefix + name, name, metadata, log))
            if metadata.get("status", "done") != "done":
                error = f", {metadata['error']}" if "error" in metadata else ""
                missing.append(f"{prefix}{name} did not finish: status `{metadata['status']}`{error}")
        found = {path.name for path in run.glob("evaluate/*") if path.is_dir()}
        anchors = [name for name in ANCHORS if name in found or name not in ATTACKS]  # attacks are no recipe's duty
        for name in ordered(TRAINED, found, anchors):
            results = _read_json(run, f"evaluate/{name}/results.json", prefix, missing)
            if results:
                systems.append(_system(run, title, name, results, prefix, missing))
    if not systems and not stages:
        raise FileNotFoundError(
            f"nothing to report in {', '.join(map(str, runs))}: no <stage>/metadata.json, <stage>/metrics.jsonl or "
            "evaluate/<system>/results.json; run `python -m evaluation run --config recipes/<name>/evaluate.yaml` first"
        )
    return systems, stages, missing


def ordered(first: Iterable[str], found: Iterable[str], last: Iterable[str]) -> list[str]:
    """`first`, then by name whatever else was found, then `last`."""
    return [*first, *sorted(set(found) - {*first, *last}), *last]


def _system(run: Path, title: str, name: str, results: dict[str, Any], prefix: str, missing: list[str]) -> System:
    folder = f"evaluate/{name}"
    scores = {metric: _score(row) for metric, row in results.get("metrics", {}).items()}
    missing += [
        f"{prefix}no finite value of {metric} in {folder}/results.json" for metric, s in scores.items() if s is None
    ]
    if HEADLINE not in scores and HEADLINE not in results.get("run", {}).get("not_scored", {}):
        missing.append(f"{prefix}no {HEADLINE} in {folder}/results.json")
    metrics = {metric: score for metric, score in scores.items() if score}
    breakdown = [
        (row, score)
        for row in results.get("breakdown", [])
        if row["metric"] in (HEADLINE, APART) and (score := _score(row))
    ]
    shares = [metrics[key] for key in (HEADLINE, f"{HEADLINE}_sampled") if key in metrics]
    for score in (*shares, *(score for _, score in breakdown)):
        if not 0 <= score.value <= 1:
            raise ValueError(
                f"`{HEADLINE}` must be a share between 0 and 1, got {score.value} in {run / folder}/results.json; "
                "write the share, not the percentage"
            )
    replies = _read_lines(run, f"{folder}/replies.jsonl", prefix, missing)
    return System(prefix + name, name, title, metrics, breakdown, results.get("run", {}), replies)


def finite(value: Any) -> float | None:
    """The number, or None for what is none, NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _score(row: dict[str, Any]) -> Score | None:
    value = finite(row.get("value"))
    if value is None:
        return None
    low, high = finite(row.get("ci_low")), finite(row.get("ci_high"))
    return Score(value, low, high, row.get("n"), row.get("unit") or "–", row.get("higher_is_better"))


def _text(run: Path, name: str, prefix: str, missing: list[str]) -> str:
    try:
        return (run / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        missing.append(f"{prefix}no {name}")
    except UnicodeDecodeError as error:
        missing.append(f"{prefix}{name} is not UTF-8: {error}")
    return ""


def _read_json(run: Path, name: str, prefix: str, missing: list[str]) -> dict[str, Any]:
    text = _text(run, name, prefix, missing)
    try:
        content = json.loads(text or "{}")
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        missing.append(f"{prefix}{name} is no JSON object: {str(content)[:80]}")
        return {}
    return content


def _read_lines(run: Path, name: str, prefix: str, missing: list[str]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; lines that are no object (a run killed while writing) are counted in `missing`."""
    rows, bad = [], []
    lines = _text(run, name, prefix, missing).split("\n")  # not splitlines(): a reply may hold U+2028
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            bad.append(number)
    if bad:
        total = len(rows) + len(bad)
        missing.append(f"{prefix}{name}: {len(bad)} of {total} lines are no JSON object (first: line {bad[0]})")
    return rows
