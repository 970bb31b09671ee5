"""The benchmark report: run folders in; `report.md`, one self-contained `index.html` and PNG plots out.

Nothing is measured here: every number is copied from the files that `evaluation.results` reads, so the same folders
give the same bytes.
"""

import json
import logging
import math
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from evaluation import METRICS
from evaluation.charts import Chart, bars, curve, turn_lines
from evaluation.headline import (
    GUARDS,
    Cell,
    Table,
    duration,
    find_lead,
    guards,
    headline_table,
    of_run,
    plain,
    plain_interval,
    share_cell,
    span,
    strip,
    without_headline,
)
from evaluation.results import Score, Stage, System, finite, load_runs, ordered
from rlhf.files import write_bytes

logger = logging.getLogger(__name__)

KINDS = {"direct": "Direct question", "false_suggestion": "False suggestion", "true_suggestion": "True suggestion"}
SPLITS = {"seen": "Seen wording", "held_out_wording": "Held-out wording", "held_out_slot": "Held-out slot"}
DIALOGUES, FAILURES, DIALOGUE_SEED = 12, 4, 0


class Section(NamedTuple):
    """A part of the report below the headline; left out where it has neither charts nor tables."""

    title: str
    notes: list[str]
    charts: list[Chart]
    tables: list[Table]


def write_report(runs: list[Path], output: Path) -> Path:
    """Write `report.md`, `index.html` and the PNG plots of one or more run folders into `output`.

    Returns the path of `index.html`. Raises `FileNotFoundError` for a run folder that is not there or when no folder
    holds a result, a record or a log, and `ValueError` for a consistency that is not a share between 0 and 1.
    """
    systems, stages, missing = load_runs([Path(run) for run in runs])
    lead = find_lead(systems)
    chosen = _dialogues(systems, lead["label"] if lead else None)
    sections = [
        section
        for section in (
            _kinds(systems), _turns(systems), _splits(systems), _all_metrics(systems), _guard_section(systems),
            _curves(stages), _costs(stages), _provenance(systems, stages),
        )
        if section.charts or section.tables
    ]  # fmt: skip
    page = {
        "title": "Benchmark report: " + ", ".join(dict.fromkeys(Path(run).resolve().name for run in runs)),
        "lead": lead,
        "without_headline": without_headline(systems),
        "headline": headline_table(systems),
        "strips": [strip(system, systems) for system in systems],
        "sections": sections,
        "dialogues": chosen,
        "missing": missing,
        "untested": _untested(systems, stages),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # replies are the text of a model: never markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for chart in (chart for section in sections for chart in section.charts):
        write_bytes(output / f"{chart.name}.png", chart.png)
    write_bytes(
        output / "report.md", _markdown(page).encode(errors="replace")
    )  # a reply may hold half a surrogate pair
    rendered = environment.get_template("report.html.jinja").render(page)
    write_bytes(output / "index.html", rendered.encode(errors="replace"))
    logger.info("report of %d systems and %d stages written to %s", len(systems), len(stages), output)
    return output / "index.html"


# ---------------------------------------------------------------------------------------------------------- sections


def _part(system: System, kind: str = "all", turn: int | str = "all", split: str = "all") -> Score | None:
    wanted = {"decoding": "greedy", "kind": kind, "turn": turn, "split": split}
    return next((score for row, score in system.breakdown if wanted.items() <= row.items()), None)


def _parts(systems: list[System], columns: dict[str, dict[str, Any]]) -> list[Table]:
    """One table, systems down and parts across, n in the column's head; none where no part was measured."""
    heads, parts = ["System"], []
    for title, which in columns.items():
        scores = [_part(system, **which) for system in systems]
        if any(scores):
            heads.append(f"{title} (n {span(score.n for score in scores if score)})")
            parts.append([share_cell(score) for score in scores])
    rows = [[Cell(system.label), *cells] for system, cells in zip(systems, zip(*parts, strict=True), strict=False)]
    return [Table(heads, rows)] if rows else []


def _kinds(systems: list[System]) -> Section:
    columns: dict[str, dict[str, Any]] = {"Fact kept (all three right)": {}}
    columns |= {title: {"kind": kind} for kind, title in KINDS.items()}
    charts = []
    for title, which in columns.items():
        scored = [(system, score) for system in systems if (score := _part(system, **which))]
        if scored:
            name = "_".join(["consistency", *which.values()])
            charts.append(bars(name, f"{title}: right in %, greedy, 95 % interval; dashed: 85 %", scored, systems))
    note = (
        "A fact is kept only if the direct question is answered with its value, the false suggestion is rejected and "
        "corrected, and the true suggestion is confirmed. Greedy decoding; n counts facts, each once a turn and split."
    )
    return Section("Consistency by kind of probe", [note], charts, _parts(systems, columns))


def _turns(systems: list[System]) -> Section:
    turns = sorted({row["turn"] for s in systems for row, _ in s.breakdown if isinstance(row.get("turn"), int)})
    tables = _parts(systems, {f"After {turn} exchanges": {"turn": turn} for turn in turns})
    series = []
    for system in systems:
        points = [(turn, score) for turn in turns if (score := _part(system, turn=turn))]
        if points:
            series.append((system, points))

    charts = []
    if series:
        charts.append(
            turn_lines("consistency_by_turn", "Kept facts in % by turn, greedy, 95 % intervals", series, systems)
        )
    note = "Kept facts when the probes are asked at once, and again after a conversation about other things."
    return Section("Consistency by turn", [note], charts, tables)


def _splits(systems: list[System]) -> Section:
    note = "Kept facts by what training had shown: this wording, this slot in another wording, or not even the slot."
    return Section(
        "Consistency by split", [note], [], _parts(systems, {SPLITS[key]: {"split": key} for key in SPLITS})
    )


def _all_metrics(systems: list[System]) -> Section:
    rows = []
    for metric in ordered(METRICS, (metric for system in systems for metric in system.metrics), ()):
        scores = [system.metrics.get(metric) for system in systems]
        measured = [score for score in scores if score]
        if measured:
            arrow = {True: "↑", False: "↓", None: "↔"}[measured[0].higher_is_better]
            unit = Cell(measured[0].unit, f"n {span(score.n for score in measured)}")
            protocol = METRICS[metric].protocol if metric in METRICS else "–"
            cells = [Cell(plain(s.value), plain_interval(s)) if s else Cell("–") for s in scores]
            rows.append([Cell(f"{arrow}\u00a0{metric}"), unit, *cells, Cell(protocol)])
    note = (
        "↑ higher is better, ↓ lower is better, ↔ descriptive: neither end is good. Small print: 95 % interval. n counts "
        "what was resampled or scored and is a range where systems differ."
    )
    columns = ["Metric", "Unit", *(system.label for system in systems), "Comparable only at the same"]
    return Section("All metrics", [note], [], [Table(columns, rows)] if rows else [])


def _guard_section(systems: list[System]) -> Section:
    rows = []
    for system in systems:
        checks = guards(system, systems)
        if checks:
            cells = []
            for label, measured, passed in checks:
                if measured is None:
                    cells.append(Cell("not measured"))
                else:
                    text = f"{measured:.2f}" if label.endswith("ratio") else f"{measured:+.3f}"
                    cells.append(Cell(text, "pass" if passed else "fail", "good" if passed else "bad"))
            yardstick = of_run(system, systems, ("reference", "sft"))
            rows.append([Cell(system.label, f"against {yardstick.label}" if yardstick else "no yardstick"), *cells])
    heads = []
    for _, label, how, low, high in GUARDS:
        form = ".2g" if how == "ratio" else "+.2g"
        bounds = f"≤ {high:{form}}" if low == -math.inf else f"≥ {low:{form}}" if high == math.inf else ""
        heads.append(f"{label} ({bounds or f'{low:{form}} to {high:{form}}'})")
    note = (
        "A persona score can be bought with replies that nobody wants. Length, distinct-2, repetition and question rate "
        "must stay near the reference replies, or near SFT where none were evaluated; otherwise the headline is marked "
        "NOT COMPARABLE."
    )
    return Section("Guards", [note], [], [Table(["System", *heads], rows)] if rows else [])


def _points(log: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = ((finite(row.get("step")), finite(row.get(key))) for row in log)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _curves(stages: list[Stage]) -> Section:
    charts, notes = [], ["As logged, unsmoothed. A line that is absent was not logged."]
    for place, stage in enumerate(stages):
        wanted = {"Loss": {"train": "loss", "held-out": "eval_loss"}}
        if stage.name == "ppo":  # its two losses are different quantities and share no axis
            wanted = {
                "PPO loss": {"train": "loss"},
                "Loss on reference replies": {"held-out": "eval_loss"},
                "Reward with KL penalty": {"train": "objective/rlhf_reward", "held-out": "eval_objective/rlhf_reward"},
                "KL to the reference, nats a reply": {"train": "objective/kl", "held-out": "eval_objective/kl"},
            }
        for number, (title, keys) in enumerate(wanted.items()):
            lines = {label: points for label, key in keys.items() if (points := _points(stage.log, key))}
            if lines:
                charts.append(curve(f"curve_{place}_{stage.name}_{number}", f"{stage.label}: {title}", lines))
            elif stage.log:
                notes.append(f"{stage.label}: no {' or '.join(keys.values())} in {stage.name}/metrics.jsonl.")
    return Section("Training curves", notes, charts, [])


def _costs(stages: list[Stage]) -> Section:
    def value(number: float | None, form: str) -> Cell:
        return Cell("–" if number is None else format(number, form))

    rows, seconds, dollars = [], [], []
    for stage in stages:
        record = stage.metadata
        if not record:
            continue
        cost = record.get("cost") or {}
        wall, total = finite(record.get("wall_seconds")), finite(cost.get("total"))
        seconds.append(wall)
        dollars.append(total)
        rows.append(
            [
                Cell(stage.label, record.get("status") or ""),
                Cell(duration(wall)),
                value(finite(cost.get("gpu_hours")), ".3f"),
                value(finite(cost.get("rate_per_gpu_hour")), ".2f"),
                value(total, ".4f"),
                value(finite(record.get("tokens")), ",.0f"),
                value(finite(record.get("peak_memory_gb")), ".2f"),
            ]
        )
    if len(rows) > 1:
        unknown = sum(wall is None for wall in seconds) + sum(total is None for total in dollars)
        note = f"{unknown} values not recorded" if unknown else ""
        rows.append(
            [
                Cell("sum", note),
                Cell(duration(sum(wall or 0 for wall in seconds))),
                Cell(""), Cell(""),
                Cell(f"{sum(total or 0 for total in dollars):.4f}"),
                Cell(""), Cell(""),
            ]
        )  # fmt: skip
    columns = ["Stage", "Wall time", "GPU hours", "$ per GPU hour", "Cost, $", "Tokens", "Peak memory, GB"]
    note = "As recorded by each stage on its own machine; the cost is GPU hours times the rate, nothing is projected."
    return Section("Time and cost", [note], [], [Table(columns, rows)] if rows else [])


def _provenance(systems: list[System], stages: list[Stage]) -> Section:
    recorded: dict[str, dict[str, list[str]]] = {}

    def note(source: str, key: str, value: Any) -> None:
        if isinstance(value, dict) and key in ("versions", "hardware"):
            for name, part in sorted(value.items()):
                note(source, f"{key}: {name}", part)
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
            recorded.setdefault(key, {}).setdefault(text, []).append(source)

    for key in ("git_commit", "seed", "data_hash", "decoding", "adapter", "date", "hardware", "versions"):
        for system in systems:
            note(f"evaluate/{system.label}", key, system.record.get(key))
        for stage in stages:
            note(stage.label, key, stage.metadata.get("finished" if key == "date" else key))
    rows = []
    for key, values in recorded.items():
        everyone = sum(map(len, values.values()))
        for value, sources in values.items():
            by = f"all {everyone} records" if len(values) == 1 and everyone > 1 else ", ".join(sources)
            differs = len(values) > 1 and (key == "git_commit" or key.startswith("versions"))
            rows.append([Cell(key, "differs" if differs else "", "bad" if differs else ""), Cell(value), Cell(by)])
    notes = ["What each record says of itself. Rows marked “differs” were not made by one state of the code."]
    return Section("Provenance", notes, [], [Table(["Field", "Value", "Recorded by"], rows)] if rows else [])


def _untested(systems: list[System], stages: list[Stage]) -> list[str]:
    """What a reader could think was shown and was not, as far as the records tell."""
    kept = [
        "No person rated a reply. Rules on words decide right and wrong; an answer in unforeseen words counts as wrong.",
        "No pair of systems was tested against each other: overlapping intervals show neither a difference nor its absence.",
        "Probes ask for single facts of a persona. Style, safety, other languages and open conversation were not measured.",
        "No published number is ranked beside these: data, tokenisation and metric definitions differ.",
    ]
    seeds: dict[str, set[str]] = {}
    for stage in stages:
        if "seed" in stage.metadata and stage.name not in ("prepare", "evaluate"):
            seeds.setdefault(stage.name, set()).add(str(stage.metadata["seed"]))
    single = [name for name, found in seeds.items() if len(found) == 1]
    if single or not seeds:
        which = f"One training seed for {', '.join(single)}" if single else "No training seed is recorded"
        kept.insert(0, f"{which}: the intervals cover the choice of personas and probes, not a second training run.")
    parts = [row for system in systems for row, _ in system.breakdown]
    for key, names in (("split", SPLITS), ("kind", KINDS)):
        absent = [title.lower() for name, title in names.items() if not any(row.get(key) == name for row in parts)]
        if absent:
            kept.append(f"No probes by {key}: {', '.join(absent)}.")
    turns = [row["turn"] for row in parts if isinstance(row.get("turn"), int)]
    kept.append(f"Nothing was asked after more than {max(turns)} exchanges." if turns else "No multi-turn probes.")
    if not any(stage.metadata.get("hardware", {}).get("gpus") for stage in stages):
        kept.append("No stage records a GPU: time, memory and half precision on one are not shown.")
    measured = {metric for system in systems for metric in system.metrics}
    absent = [metric for metric in METRICS if metric not in measured]
    if systems and absent:
        kept.append(f"Not measured for any system: {', '.join(absent)}.")
    return kept


# --------------------------------------------------------------------------------------------------------- dialogues


def _dialogues(systems: list[System], focus: str | None) -> dict[str, Any]:
    """A dozen probes that every system answered, drawn by `DIALOGUE_SEED`: up to `FAILURES` among the wrong answers of
    the lead system, so that a good system's failures are seen too, and the rest among all. Where nothing was probed,
    a dozen held-out dialogues."""
    for key in (_probe_key, _dialogue_key):
        answers: dict[str, dict[str, dict[str, Any]]] = {}
        for system in systems:
            own = {name: row for row in system.replies if (name := key(row)) is not None}
            if own:
                answers[system.label] = own
        if answers:
            break
    pool = sorted(set.intersection(*map(set, answers.values()))) if answers else []
    generator = random.Random(DIALOGUE_SEED)
    shuffled = generator.sample(pool, len(pool))
    wrong = [name for name in shuffled if focus in answers and answers[focus][name].get("correct") is False]
    failed = wrong[:FAILURES]
    drawn = [name for name in shuffled if name not in failed][: DIALOGUES - len(failed)]

    def show(name: str) -> dict[str, Any]:
        row = next(iter(answers.values()))[name]
        replies = [(label, own[name].get("response", ""), own[name].get("correct")) for label, own in answers.items()]
        return {**(_probe(row) if "probe_id" in row else _dialogue(row)), "replies": replies}

    return {
        "focus": focus,
        "seed": DIALOGUE_SEED,
        "drawn": [show(name) for name in drawn],
        "failed": [show(name) for name in failed],
        "pool": len(pool),
    }


def _probe_key(row: dict[str, Any]) -> str | None:
    scored = row.get("correct") is not None and row.get("decoding", "greedy") == "greedy"
    return row["probe_id"] if scored and "probe_id" in row else None


def _dialogue_key(row: dict[str, Any]) -> str | None:
    """Of a reply in a held-out dialogue; both of its speakers may have one, each with a persona."""
    if "probe_id" in row or "dialogue_id" not in row or not row.get("history"):
        return None
    return json.dumps([row["dialogue_id"], row.get("persona", [])])


def _probe(row: dict[str, Any]) -> dict[str, Any]:
    expected = {
        "false_suggestion": f"not {row.get('foil')}, but {row.get('value')}",
        "true_suggestion": f"yes, {row.get('value')}",
    }.get(row.get("kind", ""), str(row.get("value")))
    exchanges = row.get("turn", 0)
    after = f"after {exchanges} exchanges" if exchanges else "asked at once"
    split = SPLITS.get(row.get("split", ""), row.get("split", "")).lower()
    return {
        "heading": ", ".join(filter(None, [KINDS.get(row.get("kind", ""), row.get("kind", "")), after, split])),
        "persona": row.get("persona", []),
        "history": row.get("history", []),
        "question": row.get("question", ""),
        "expected": f"expected: {expected}",
    }


def _dialogue(row: dict[str, Any]) -> dict[str, Any]:
    *earlier, last = row["history"]
    reference = row.get("reference")
    return {
        "heading": f"Held-out dialogue, after {len(row['history'])} messages",
        "persona": row.get("persona", []),
        "history": earlier,
        "question": last.get("content", ""),
        "expected": "no reference" if reference is None else f"reference: {reference}",
    }


# ---------------------------------------------------------------------------------------------------------- markdown


def _md(text: Any) -> str:
    """Text that Markdown shows as it is: no markup, no table break, one line."""
    escaped = re.sub(r"([\\|`*\[\]])", r"\\\1", str(text)).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(escaped.split())


def _md_table(table: Table) -> list[str]:
    lines = ["| " + " | ".join(map(_md, table.columns)) + " |", "|" + " --- |" * len(table.columns)]
    for row in table.rows:
        cells = [_md(cell.text) + (f" ({_md(cell.note)})" if cell.note else "") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _markdown(page: dict[str, Any]) -> str:
    lines = [f"# {_md(page['title'])}", ""]
    lead = page["lead"]
    if lead:
        beside = ", ".join(f"{name} {value}" for name, value in lead["beside"])
        lines += [
            f"**{_md(lead['label'])} keeps {lead['value']} of persona facts** (95 % interval {lead['interval']}, "
        ]
        lines[-1] += f"n = {lead['n']}, greedy), against {_md(beside) or 'no other system'}. {_md(lead['verdict'])}\n"
    else:
        lines += [_md(page["without_headline"]), ""]
    if page["headline"].rows:
        lines += ["## Persona consistency", "", *_md_table(page["headline"])]
    if page["missing"]:
        lines += ["## Missing or unreadable", "", *(f"- {_md(item)}" for item in page["missing"]), ""]
    for section in page["sections"]:
        lines += [f"## {_md(section.title)}", "", *(_md(note) + "\n" for note in section.notes)]
        lines += [f"![{_md(chart.caption)}]({chart.name}.png)\n" for chart in section.charts]
        for table in section.tables:
            lines += _md_table(table)
    dialogues = page["dialogues"]
    for title, group in (
        ("drawn at random", dialogues["drawn"]),
        (f"failures of {dialogues['focus']}", dialogues["failed"]),
    ):
        if group:
            lines += [f"## Dialogues: {_md(title)} (seed {dialogues['seed']})", ""]
        for probe in group:
            lines += [f"**{_md(probe['heading'])}.** Persona: {_md(' / '.join(probe['persona']))}", ""]
            for message in probe["history"]:
                lines += [f"> {_md(message['role'])}: {_md(message['content'])}  "]
            lines += [f"> user: **{_md(probe['question'])}** ({_md(probe['expected'])})", ""]
            cells = [
                [Cell(label), Cell(reply or "(empty)"), Cell({True: "right", False: "wrong"}.get(ok, "–"))]
                for label, reply, ok in probe["replies"]
            ]
            lines += _md_table(Table(["System", "Reply", "Scored"], cells))
    lines += ["## What was not tested", "", *(f"- {_md(item)}" for item in page["untested"]), ""]
    return "\n".join(lines)
