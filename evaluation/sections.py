"""The report's sections: what each one says, in notes, charts and tables, of systems and stages."""

import json
import math
from typing import Any, NamedTuple

from evaluation import METRICS
from evaluation.baselines import load_baselines
from evaluation.charts import Chart, Lines, bars, curve, stacked, turn_lines
from evaluation.dialogues import KINDS, KINDS_APART, SPLITS
from evaluation.drift import MIN_KEPT, half_life_words, measure_drift
from evaluation.engagement import length_words
from evaluation.guards import GUARDS
from evaluation.headline import (
    Cell,
    Table,
    broken_rungs,
    duration,
    guards,
    ladder_table,
    percent,
    percent_interval,
    plain,
    plain_interval,
    share_cell,
    span,
    without_attacks,
    yardstick_words,
)
from evaluation.human_band import in_words
from evaluation.persona import fact_density, is_copy
from evaluation.results import ANCHORS, APART, HEADLINE, Score, Stage, System, finite, ordered

# Rows of "All metrics", for reading; a metric that is in no group comes last.
GROUPS = {
    "Persona": (
        HEADLINE, f"{HEADLINE}_sampled", "forced_choice", "probe_agreement", "persona_composite", "contradiction_free_rate",
        "grounded_coverage", "kl_reference", "c_score", "verbatim_facts", "persona_lift", "fact_density",
        "persona_precision", "persona_recall", "persona_f1", "copy_rate",
        "keyword_score",
    ),
    "Likelihood and ranking": ("perplexity_token", "perplexity_word", "bits_per_byte", "hits_at_1"),
    "Overlap with the reference": ("f1", "bleu", "rouge1", "rouge2", "rougeL"),
    "Diversity and repetition": (
        "distinct_1", "distinct_2", "ead", "repetition", "repetition_within", "repetition_across", "repetition_context",
    ),
    "Engagement, length and style": (
        "question_rate", "follow_up_rate", "uptake", "mean_idf", "engagement_score", "length_words", "length_ratio",
        "sentence_words", "punctuation_rate", "capital_rate",
    ),
}  # fmt: skip


class Section(NamedTuple):
    """A part of the report below the headline; left out where it says nothing."""

    title: str
    notes: list[str]
    charts: list[Chart]
    tables: list[Table]


def make_sections(systems: list[System], stages: list[Stage]) -> list[Section]:
    """All sections that have something to say, in the report's order."""
    shown = without_attacks(systems)
    sections = (
        _probe_replies(shown), _ladder(systems), _kinds(shown), _turns(shown), _splits(shown), _all_metrics(shown), _guard_section(shown),
        _reward(systems, stages), _curves(stages), _costs(stages), _baselines(systems), _provenance(systems, stages),
    )  # fmt: skip
    return [section for section in sections if section.charts or section.tables or section.notes]


def _probe_replies(systems: list[System]) -> Section:
    """What the replies look like that the headline is made of: the guards see replies in dialogues alone."""
    rows = []
    for system in systems:
        asked = [
            row
            for row in system.replies
            if row.get("correct") is not None and row.get("decoding") == "greedy" and row.get("persona")
        ]
        if not asked:
            continue
        pairs = [(row["persona"], row["response"]) for row in asked]
        shares = (
            sum(is_copy(*pair) for pair in pairs) / len(pairs),
            sum(fact_density(*pair) for pair in pairs) / len(pairs),
            len({reply for _, reply in pairs}) / len(pairs),
        )
        words = sum(length_words(reply) for _, reply in pairs) / len(pairs)
        copied, facts, different = (Cell(f"{100 * share:.1f} %") for share in shares)
        rows.append([Cell(system.label, f"n {len(pairs):,}"), copied, facts, Cell(plain(words)), different])
    heads = ["System", "Copied", "Facts touched a reply", "Words a reply", "Different replies"]
    note = (
        "The headline is made of greedy replies to probes, and the guards look at replies in dialogues. Read these beside "
        "the oracle's, which answers with a sentence of the persona, and SFT's: no limit is set, as a short true answer is "
        "often such a sentence."
    )
    return _told("The replies to the probes", [note], [], [Table(heads, rows)] if rows else [])


def _ladder(systems: list[System]) -> Section:
    table = ladder_table(systems)
    anchors = {system.name for system in systems if system.name in ANCHORS}
    if not table.rows or not anchors:
        return Section("The ladder", [], [], [])
    notes = broken_rungs(systems) or ["Every limit holds."]
    notes.append(
        "Repliers by rule beside the models. The oracle must keep 95 % of the facts at least, a bot that reads another "
        "persona less than half, and every trick that wins a keyword score less than 35 %: then the probes cannot be won "
        "by a trick of this kind."
    )
    absent = [name for name in ANCHORS if name not in anchors]
    if absent:
        notes.append(f"Not on this ladder: {', '.join(absent)}.")
    return Section("The ladder", notes, [], [table])


def part_score(system: System, kind: str = "all", turn: int | str = "all", split: str = "all") -> Score | None:
    wanted = {"decoding": "greedy", "kind": kind, "turn": turn, "split": split}
    return next((score for row, score in system.breakdown if wanted.items() <= row.items()), None)


def _parts(systems: list[System], columns: dict[str, dict[str, Any]]) -> list[Table]:
    """One table, systems down and parts across, n in the column's head; none where no part was measured."""
    heads, parts = ["System"], []
    for title, which in columns.items():
        scores = [part_score(system, **which) for system in systems]
        if any(scores):
            heads.append(f"{title} (n {span(score.n for score in scores if score)})")
            parts.append([share_cell(score) for score in scores])
    rows = [[Cell(system.label), *cells] for system, cells in zip(systems, zip(*parts, strict=True), strict=False)]
    return [Table(heads, rows)] if rows else []


def _kinds(systems: list[System]) -> Section:
    columns: dict[str, dict[str, Any]] = {"Fact kept (all three right)": {}}
    columns |= {title: {"kind": kind} for kind, title in (KINDS | KINDS_APART).items()}
    charts = []
    for title, which in columns.items():
        scored = [(system, score) for system in systems if (score := part_score(system, **which))]
        if scored:
            name = "_".join(["consistency", *which.values()])
            charts.append(bars(name, f"{title}: right in %, greedy, 95 % interval; dashed: 85 %", scored, systems))
    note = (
        "A fact is kept only if the direct question is answered with its value, the false suggestion is rejected and "
        "corrected, and the true suggestion is confirmed. Greedy decoding; n counts facts, each once a turn and split."
    )
    notes = [note]
    if any(row["metric"] == APART for system in systems for row, _ in system.breakdown):
        notes.append("Absent facts and “forget your persona” are apart from the headline.")
    beside = _beside_probes(systems)
    if beside:
        notes.append(
            "One verdict: share of pairs of probes about a fact, at one turn, that are both right or both wrong, and what "
            "independent verdicts of the same rates would have; far above that a fact is kept or lost as a whole. "
            "Forced choice: the fact is likelier as the answer to its question than somebody else's; chance is 50 %, and a "
            "model that copies from its prompt passes."
        )
    return _told("Consistency by kind of probe", notes, charts, [*_parts(systems, columns), *beside])


def _beside_probes(systems: list[System]) -> list[Table]:
    """What is measured on the facts that were probed, and does not count for the headline; a table or none."""
    rows = []
    for system in systems:
        agreement, choice = system.metrics.get("probe_agreement"), system.metrics.get("forced_choice")
        if agreement or choice:
            chance = finite(system.record.get("probe_agreement_by_chance"))
            rows.append(
                [
                    Cell(system.label),
                    share_cell(agreement, with_n=True),
                    Cell("–" if chance is None or not agreement else f"{100 * chance:.1f} %"),
                    share_cell(choice, with_n=True),
                ]
            )
    heads = ["System", "One verdict", "… if independent", "Forced choice"]
    return [Table(heads, rows, "Beside the probes: agreement and likelihood")] if rows else []


def _turns(systems: list[System]) -> Section:
    turns = sorted({row["turn"] for s in systems for row, _ in s.breakdown if isinstance(row.get("turn"), int)})
    series = []
    for system in systems:
        points = [(turn, score) for turn in turns if (score := part_score(system, turn=turn))]
        if points:
            series.append((system, points))

    charts = []
    if series:
        charts.append(
            turn_lines("consistency_by_turn", "Kept facts in % by turn, greedy, 95 % intervals", series, systems)
        )
    notes = ["Kept facts when the probes are asked at once, and again after a conversation about other things."]
    tables = _parts(systems, {f"After {turn} exchanges": {"turn": turn} for turn in turns})
    if tables and len(turns) > 1:
        tables = [_with_drift(tables[0], systems)]
        notes.append(
            "Half-life: least-squares fit of an exponential to the facts asked at every turn; intervals resample personas "
            f"with all their turns. It is told where {MIN_KEPT} facts are kept at the first turn and the interval of the "
            "rate leaves out 0; otherwise no drop was seen, which does not say that there is none."
        )
    return _told("Consistency by turn and drift", notes, charts, tables)


def _with_drift(table: Table, systems: list[System]) -> Table:
    rows = []
    for row, system in zip(table.rows, systems, strict=True):
        drift = measure_drift(system.replies)
        if drift is None:
            rows.append([*row, Cell("–"), Cell("not measured", "no fact asked at every turn in replies.jsonl")])
            continue
        value, low, high = drift.change
        change = Score(
            value, None if math.isnan(low) else low, None if math.isnan(high) else high, None, "share", True
        )
        note = f"{percent_interval(change)}, n {drift.num_facts:,}"
        rows.append([*row, Cell(f"{100 * value:+.1f}", note), Cell(*half_life_words(drift))])
    return Table([*table.columns, "Change, points", "Half-life"], rows)


def _splits(systems: list[System]) -> Section:
    note = "Kept facts by what training had shown: this wording, this slot in another wording, or not even the slot."
    return _told("Consistency by split", [note], [], _parts(systems, {SPLITS[key]: {"split": key} for key in SPLITS}))


def _all_metrics(systems: list[System]) -> Section:
    names = ordered(METRICS, (metric for system in systems for metric in system.metrics), ())
    grouped = {title: [name for name in group if name in names] for title, group in GROUPS.items()}
    grouped["Others"] = [name for name in names if not any(name in group for group in GROUPS.values())]
    columns = ["Metric", *(system.label for system in systems)]
    tables: list[Table] = []
    for title, group in grouped.items():
        rows = [row for metric in group if (row := _metric_row(metric, systems))]
        if rows:
            tables.append(Table(columns, rows, f"{title} ({len(rows)})", folded=bool(tables)))
    if tables:
        tables.append(_definitions([name for group in grouped.values() for name in group]))
    note = (
        "↑ higher is better, ↓ lower is better, ↔ descriptive: neither end is good. Small print: 95 % interval. n counts "
        "what was resampled or scored and is a range where systems differ."
    )
    return _told("All metrics", [note], [], tables)


def _metric_row(metric: str, systems: list[System]) -> list[Cell] | None:
    scores = [system.metrics.get(metric) for system in systems]
    measured = [score for score in scores if score]
    if not measured:
        return None
    arrow = {True: "↑", False: "↓", None: "↔"}[measured[0].higher_is_better]
    unit = f"{measured[0].unit}, n {span(score.n for score in measured)}"
    cells = [Cell(plain(s.value), plain_interval(s)) if s else Cell("–") for s in scores]
    return [Cell(f"{arrow}\u00a0{metric}", unit), *cells]


def _definitions(names: list[str]) -> Table:
    rows = []
    for name in names:
        if name in METRICS:
            metric = METRICS[name]
            bounds = f"{metric.low:g} to {'∞' if metric.high == math.inf else format(metric.high, '.3g')}"
            rows.append(
                [Cell(name), Cell(metric.unit, bounds), Cell(metric.level), Cell(metric.protocol), Cell(metric.source)]
            )
    heads = ["Metric", "Unit and range", "A number of", "Comparable only at the same", "Definition"]
    return Table(heads, rows, "What each number is, and what it may be compared with", folded=True)


def _guard_section(systems: list[System]) -> Section:
    rows = []
    for system in systems:
        checks = guards(system, systems)
        if checks:
            cells = []
            found = {label: (measured, passed) for label, measured, passed in checks}
            for _, label, *_ in GUARDS:
                measured, passed = found.get(label, (None, None))
                if measured is None:
                    cells.append(Cell("not measured" if label in found else "–"))
                else:
                    text = f"{measured:.2f}" if label.endswith("ratio") else f"{measured:+.3f}"
                    cells.append(Cell(text, "pass" if passed else "fail", "good" if passed else "bad"))
            rows.append([Cell(system.label, yardstick_words(system, systems)), *cells])
    heads = []
    for _, label, how, low, high in GUARDS:
        form = ".2g" if how == "ratio" else "+.2g"
        bounds = f"≤ {high:{form}}" if low == -math.inf else f"≥ {low:{form}}" if high == math.inf else ""
        heads.append(f"{label} ({bounds or f'{low:{form}} to {high:{form}}'})")
    note = (
        "A persona score can be bought with replies that nobody wants. Copying, facts a reply, length, EAD, repetition and "
        "question rate and uptake of the user's words must stay near people's in other dialogues (generated data have generated "
        "replies in that role), EAD near SFT's where that is lower, down to 0.75 of people's; and all near SFT's where no people were measured. Otherwise the headline is marked "
        "NOT COMPARABLE."
    )
    bands = dict.fromkeys(in_words(s.record["human_band"]) for s in systems if "human_band" in s.record)
    return _told("Guards", [note, *bands], [], [Table(["System", *heads], rows)] if rows else [])


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
            }
        for number, (title, keys) in enumerate(wanted.items()):
            lines = {label: points for label, key in keys.items() if (points := _points(stage.log, key))}
            if lines:
                charts.append(curve(f"curve_{place}_{stage.name}_{number}", f"{stage.label}: {title}", lines))
            elif stage.log:
                notes.append(f"{stage.label}: no {' or '.join(keys.values())} in {stage.name}/metrics.jsonl.")
    return _told("Training curves", notes, charts, [])


# What over-optimisation shows in: the reward rises with the KL while probes, which it never saw, fall.
REWARD_PANELS = {
    "Reward of the reward model": {"train": "objective/scores", "held-out": "eval_objective/scores"},
    "KL to the reference, nats a reply": {"train": "objective/kl", "held-out": "eval_objective/kl"},
}


def _reward(systems: list[System], stages: list[Stage]) -> Section:
    """Reward, KL and probes over the steps of each PPO run; what was not measured is named."""
    charts, notes = [], []
    for place, stage in enumerate(stages):
        if stage.name != "ppo":
            continue
        panels: dict[str, Lines] = {}
        for title, keys in REWARD_PANELS.items():
            lines = {label: points for label, key in keys.items() if (points := _points(stage.log, key))}
            if lines:
                panels[title] = lines
            else:
                notes.append(f"Not measured: {title.lower()} (no {' or '.join(keys.values())} in ppo/metrics.jsonl).")
        logged = sorted({key for row in stage.log for key in row if "probe" in key and _points(stage.log, key)})
        measured = _probed(stage, systems)
        if logged:
            panels["Held-out probes, share right"] = {key: _points(stage.log, key) for key in logged}
        else:
            notes.append(
                f"{stage.label}: no probes were asked during training, so the points in between are not known."
            )
        if measured:
            panels["Persona facts kept, %, before and after"] = {}
            notes += _reward_words(stage, panels, measured)
        elif not logged:
            notes.append(f"{stage.label}: no probes at all, so reward against probes is not shown.")
        if panels and (measured or logged):
            caption = f"{stage.label}: reward, KL and held-out probes"
            charts.append(stacked(f"reward_{place}_ppo", caption, panels, measured, 0.6 + 1.35 * len(panels)))
        elif panels:
            charts += [
                curve(f"reward_{place}_ppo_{number}", f"{stage.label}: {title}", lines)
                for number, (title, lines) in enumerate(panels.items())
            ]
    return Section("Reward against probes", notes, charts, [])


def _probed(stage: Stage, systems: list[System]) -> list[tuple[float, Score]]:
    """Persona consistency before the first and after the last step: of SFT, which PPO starts from, and of PPO."""
    run = stage.label.removesuffix(stage.name).removesuffix(" / ")
    scores = {s.name: s.metrics[HEADLINE] for s in systems if HEADLINE in s.metrics and run in ("", s.run)}
    steps = [step for step in (finite(row.get("step")) for row in stage.log) if step is not None]
    if not steps or not {"sft", "ppo"} <= scores.keys():
        return []
    return [(0.0, scores["sft"]), (max(steps), scores["ppo"])]


def _reward_words(stage: Stage, panels: dict[str, Lines], measured: list[tuple[float, Score]]) -> list[str]:
    """Reward and probes from first to last, and whether they part."""
    lines = panels.get("Reward of the reward model", {})
    points = lines.get("held-out") or lines.get("train") or []
    before, after = measured[0][1], measured[-1][1]
    text = f"{stage.label}: facts kept {percent(before)} before (SFT) and {percent(after)} after"
    if len(points) < 2:
        return [text + "."]
    text += f", reward {plain(points[0][1])} at step {points[0][0]:,.0f} and {plain(points[-1][1])} at the last."
    fell = before.low is not None and after.high is not None and after.high < before.low
    if fell and points[-1][1] > points[0][1]:
        text += " OVER-OPTIMISED: the reward rose while the probes fell."
    return [text]


def _costs(stages: list[Stage]) -> Section:
    """What each stage took, with totals; of what some stages did not record the total is that of the others, and says so."""
    heads = ["Stage", "Wall time", "GPU hours", "$ per GPU hour", "Cost, $", "Tokens", "Peak memory, GB", "Kept, MB", "Storage, $ a month"]  # fmt: skip
    forms = ("", ".3f", ".2f", ".4f", ",.0f", ".2f", ",.1f", ".5f")
    taken: list[list[float | None]] = []
    rows = []
    for stage in stages:
        record = stage.metadata
        if not record:
            continue
        cost = record.get("cost") or {}
        kept, generated = finite(record.get("kept_bytes")), finite(record.get("tokens_generated"))
        found = [
            record.get("wall_seconds"), cost.get("gpu_hours"), cost.get("rate_per_gpu_hour"), cost.get("total"),
            record.get("tokens"), record.get("peak_memory_gb"), None if kept is None else kept / 1e6,
            cost.get("storage_per_month"),
        ]  # fmt: skip
        values = [finite(value) for value in found]
        taken.append(values)
        pieces = len(record.get("pieces") or [None])
        notes = ["", "", "", "", "", record.get("peak_memory_of") or "", "", ""]
        notes[0] = f"{pieces} pieces" if pieces > 1 else ""
        notes[4] = f"and {generated:,.0f} generated" if generated is not None else ""
        cells = [
            Cell(_amount(place, value, forms), note)
            for place, (value, note) in enumerate(zip(values, notes, strict=True))
        ]
        rows.append([Cell(stage.label, record.get("status") or ""), *cells])
    if len(rows) > 1:
        columns = [[value for value in column if value is not None] for column in zip(*taken, strict=True)]
        totals = [max(column, default=None) if place == 5 else sum(column) for place, column in enumerate(columns)]
        cells = [Cell("" if place == 2 else _amount(place, total, forms)) for place, total in enumerate(totals)]
        unknown = sum(values[place] is None for values in taken for place in (0, 3))
        rows.append([Cell("sum", f"{unknown} values not recorded" if unknown else "memory: the highest"), *cells])
    note = (
        "As recorded by each stage on its own machine, over all pieces of a stage that was interrupted; the cost is GPU hours "
        "times the rate, storage the bytes of its folder times the price, nothing is projected."
    )
    return _told("Time and cost", [note], [], [Table(heads, rows)] if rows else [])


def _amount(place: int, value: float | None, forms: tuple[str, ...]) -> str:
    if place == 0:
        return duration(value)
    return "–" if value is None else format(value, forms[place])


def _baselines(systems: list[System]) -> Section:
    """Published numbers, a table a protocol, in the order of their file: nothing is ranked across tables."""
    if not systems:
        return Section("Published baselines", [], [], [])
    tables = []
    found = load_baselines()
    for protocol in dict.fromkeys(baseline.protocol for baseline in found):
        group = [baseline for baseline in found if baseline.protocol == protocol]
        metrics = list(dict.fromkeys(baseline.metric for baseline in group))
        units = {baseline.metric: baseline.unit for baseline in group}
        values = {(baseline.system, baseline.metric): baseline.value for baseline in group}
        rows = []
        for name, source, verified in dict.fromkeys((b.system, b.source, b.verified) for b in group):
            cells = [Cell(f"{values[name, metric]:g}" if (name, metric) in values else "–") for metric in metrics]
            rows.append([Cell(name), *cells, Cell("yes" if verified else "no", source)])
        heads = [f"{metric} ({units[metric]})" for metric in metrics]
        title = f"{group[0].data}: {group[0].note} ({len(rows)} systems)"
        tables.append(Table(["Published system", *heads, "Read in the primary source"], rows, title, True))
    note = (
        "As printed by their sources. Each table is a protocol of its own: other data, tokenisation or metric definitions, so "
        "no number here is ranked against another table or against this report, and none has a p-value."
    )
    return Section("Published baselines", [note], [], tables)


def _provenance(systems: list[System], stages: list[Stage]) -> Section:
    recorded: dict[str, dict[str, list[str]]] = {}

    def note(source: str, key: str, value: Any) -> None:
        if isinstance(value, dict) and key in ("versions", "hardware"):
            for name, part in sorted(value.items()):
                note(source, f"{key}: {name}", part)
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
            recorded.setdefault(key, {}).setdefault(text, []).append(source)

    for key in ("git_commit", "seed", "data_hash", "decoding", "config", "adapter", "date", "hardware", "versions"):
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
    table = Table(
        ["Field", "Value", "Recorded by"], rows, f"What made these numbers ({len(rows)} fields)", folded=True
    )
    return _told("Provenance", notes, [], [table] if rows else [])


def _told(title: str, notes: list[str], charts: list[Chart], tables: list[Table]) -> Section:
    """A section whose notes explain charts or tables, and are nothing without."""
    return Section(title, notes if charts or tables else [], charts, tables)
