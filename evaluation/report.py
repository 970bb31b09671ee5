"""The benchmark report: run folders in; `report.md`, one self-contained `index.html` and PNG plots out.

A run folder holds stage folders (`sft/metadata.json`, `sft/metrics.jsonl`, …) and `evaluate/<system>/results.json` with
`replies.jsonl` beside it. What is missing is listed in the report by its path; nothing at all to report is an error.
Nothing is measured here: every number is copied from those files, so the same folders give the same bytes.
"""

import html
import io
import json
import logging
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation import METRICS

logger = logging.getLogger(__name__)

HEADLINE = "persona_consistency"
CLAIM = 0.85  # ">= 85 %" is said only where the lower bound of the 95 % interval reaches it
TRAINED = ("base", "sft", "dpo", "ppo")
FLOORS = ("wrong_persona", "silence")
ANCHORS = ("oracle", *FLOORS)  # fixed repliers, shown after everything trained
STAGES = ("prepare", "base", "sft", "reward", "dpo", "ppo", "evaluate")
KINDS = {"direct": "Direct question", "false_suggestion": "False suggestion", "true_suggestion": "True suggestion"}
SPLITS = {"seen": "Seen wording", "held_out_wording": "Held-out wording", "held_out_slot": "Held-out slot"}
ROLES = {
    "base": "before persona training",
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimisation",
    "ppo": "reinforcement learning",
    "reference": "human or rule-written replies",
    "oracle": "ceiling: right by construction",
    "wrong_persona": "floor: reads another persona",
    "silence": "floor: says nothing",
}
# A persona score is easily bought with replies that nobody wants: these must stay near the yardstick system.
# (metric, name, how it is compared, lowest, highest); shares are differences, quantities are ratios.
GUARDS = (
    ("length_words", "length ratio", "ratio", 0.5, 2.0),
    ("distinct_2", "distinct-2 ratio", "ratio", 0.8, math.inf),
    ("repetition", "repetition change", "difference", -math.inf, 0.03),
    ("question_rate", "question rate change", "difference", -0.2, 0.2),
)
DIALOGUES, FAILURES, DIALOGUE_SEED = 12, 4, 0

# The SVG is drawn in marker colours that become CSS variables, so that one drawing follows the reader's theme.
LIGHT = {
    "ink": "#1c1e21", "muted": "#646b73", "grid": "#dcdfe3", "sft": "#955600", "dpo": "#1d5cb8", "ppo": "#006e59",
    "other1": "#84389f", "other2": "#ad2e47",
}  # fmt: skip
MARKERS = {name: f"#0101{i + 1:02x}" for i, name in enumerate(LIGHT)}


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
    label: str  # "ppo", or "run / ppo" where several runs are compared
    name: str
    run: str
    metrics: dict[str, Score]
    breakdown: list[tuple[dict[str, Any], Score]]
    record: dict[str, Any]
    replies: list[dict[str, Any]]


@dataclass
class Stage:
    label: str
    name: str
    metadata: dict[str, Any]
    log: list[dict[str, Any]]


class Cell(NamedTuple):
    text: str
    note: str = ""
    mark: str = ""  # "good" | "bad" | "": colour only repeats what the text says


class Table(NamedTuple):
    columns: list[str]
    rows: list[list[Cell]]


class Chart(NamedTuple):
    name: str
    caption: str
    svg: Markup
    png: bytes


class Section(NamedTuple):
    title: str
    notes: list[str]
    charts: list[Chart]
    tables: list[Table]


def write_report(runs: list[Path], output: Path) -> Path:
    """Write `report.md`, `index.html` and the PNG plots of one or more run folders into `output`.

    Returns the path of `index.html`. Raises `FileNotFoundError` for a run folder that is not there or when no folder
    holds a result, a record or a log, and `ValueError` for a consistency that is not a share between 0 and 1.
    """
    systems, stages, missing = _load([Path(run) for run in runs])
    lead = _lead(systems)
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
        "headline": _headline(systems),
        "strips": [_strip(system, systems) for system in systems],
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
        _write(output / f"{chart.name}.png", chart.png)
    _write(output / "report.md", _markdown(page).encode())
    _write(output / "index.html", environment.get_template("report.html.jinja").render(page).encode())
    logger.info("report of %d systems and %d stages written to %s", len(systems), len(stages), output)
    return output / "index.html"


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the page from a web server
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------------------- reading


def _load(runs: list[Path]) -> tuple[list[System], list[Stage], list[str]]:
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
        for name in _ordered(STAGES[:-1], (path.parent.name for path in records), STAGES[-1:]):
            metadata = _read_json(run, f"{name}/metadata.json", prefix, missing)
            trains = name not in ("prepare", "evaluate")
            log = _read_lines(run, f"{name}/metrics.jsonl", prefix, missing) if trains else []
            if metadata or log:
                stages.append(Stage(prefix + name, name, metadata, log))
            if metadata.get("status") == "running":
                missing.append(f"{prefix}{name} did not finish: {name}/metadata.json has status `running`")
        folders = (path.name for path in run.glob("evaluate/*") if path.is_dir())
        for name in _ordered(TRAINED, folders, ANCHORS):
            results = _read_json(run, f"evaluate/{name}/results.json", prefix, missing)
            if results:
                systems.append(_system(run, title, name, results, prefix, missing))
    if not systems and not stages:
        raise FileNotFoundError(
            f"nothing to report in {', '.join(map(str, runs))}: no <stage>/metadata.json, <stage>/metrics.jsonl or "
            "evaluate/<system>/results.json; run `python -m evaluation run --config recipes/<name>/evaluate.yaml` first"
        )
    return systems, stages, missing


def _ordered(first: Iterable[str], found: Iterable[str], last: Iterable[str]) -> list[str]:
    return [*first, *sorted(set(found) - {*first, *last}), *last]


def _system(run: Path, title: str, name: str, results: dict[str, Any], prefix: str, missing: list[str]) -> System:
    folder = f"evaluate/{name}"
    scores = {metric: _score(row) for metric, row in results.get("metrics", {}).items()}
    missing += [
        f"{prefix}no finite value of {metric} in {folder}/results.json" for metric, s in scores.items() if s is None
    ]
    if HEADLINE not in scores:
        missing.append(f"{prefix}no {HEADLINE} in {folder}/results.json")
    metrics = {metric: score for metric, score in scores.items() if score}
    breakdown = [(row, score) for row in results.get("breakdown", []) if (score := _score(row))]
    shares = [metrics[key] for key in (HEADLINE, f"{HEADLINE}_sampled") if key in metrics]
    for score in (*shares, *(score for _, score in breakdown)):
        if not 0 <= score.value <= 1:
            raise ValueError(
                f"`{HEADLINE}` must be a share between 0 and 1, got {score.value} in {run / folder}/results.json; "
                "write the share, not the percentage"
            )
    replies = _read_lines(run, f"{folder}/replies.jsonl", prefix, missing)
    return System(prefix + name, name, title, metrics, breakdown, results.get("run", {}), replies)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _score(row: dict[str, Any]) -> Score | None:
    value = _number(row.get("value"))
    if value is None:
        return None
    low, high = _number(row.get("ci_low")), _number(row.get("ci_high"))
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


# ------------------------------------------------------------------------------------------------------------- words


def _percent(score: Score) -> str:
    return f"{100 * score.value:.1f} %"


def _percent_interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return "no interval"
    return f"{_rounded(100 * score.low, 1, math.floor)} to {_rounded(100 * score.high, 1, math.ceil)}"


def _rounded(value: float, digits: int, direction: Callable[[float], int]) -> str:
    """Bounds are rounded outwards, so that one just below 85 % is never printed as 85.0."""
    # round() first: 1000 * .29 is 290.00000000000006, which ceil() alone would print as 29.1.
    return f"{direction(round(value * 10**digits, 6)) / 10**digits:.{digits}f}"


def _plain(value: float, direction: Callable[[float], int] = round) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    return _rounded(value, 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3, direction)


def _plain_interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return "no interval"
    return f"{_plain(score.low, math.floor)} to {_plain(score.high, math.ceil)}"


def _span(numbers: Iterable[int | None]) -> str:
    known = sorted({number for number in numbers if number is not None})
    return "–" if not known else f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _share_cell(score: Score | None, with_n: bool = False) -> Cell:
    if score is None:
        return Cell("–")
    n = f", n {score.n:,}" if with_n and score.n is not None else ""
    return Cell(_percent(score), _percent_interval(score) + n)


# ---------------------------------------------------------------------------------------------------------- headline


def _claimed(score: Score | None) -> bool:
    return score is not None and score.low is not None and score.low >= CLAIM


def _of_run(system: System, systems: list[System], names: Iterable[str]) -> System | None:
    """The first of `names` that was evaluated in the same run as `system`."""
    return next((other for name in names for other in systems if (other.run, other.name) == (system.run, name)), None)


def _guards(system: System, systems: list[System]) -> list[tuple[str, float | None, bool | None]]:
    """(guard, measured, passed) against the reference replies or else SFT; None where a number is absent."""
    yardstick = _of_run(system, systems, ("reference", "sft"))
    if system.name in ANCHORS or yardstick is system:
        return []
    checks: list[tuple[str, float | None, bool | None]] = []
    for metric, label, how, low, high in GUARDS:
        own = system.metrics.get(metric)
        other = yardstick.metrics.get(metric) if yardstick else None
        if own is None or other is None or (how == "ratio" and other.value == 0):
            checks.append((label, None, None))
        else:
            measured = own.value / other.value if how == "ratio" else own.value - other.value
            checks.append((label, measured, low <= measured <= high))
    return checks


def _guard_cell(system: System, systems: list[System]) -> Cell:
    checks = _guards(system, systems)
    if not checks:
        return Cell("anchor" if system.name in ANCHORS else "yardstick")
    failed = [label for label, _, passed in checks if passed is False]
    unknown = [label for label, _, passed in checks if passed is None]
    if failed:
        return Cell("NOT COMPARABLE", "guard: " + ", ".join(failed), "bad")
    if unknown:
        return Cell("not checked", ", ".join(unknown))
    return Cell("all pass", "", "good")


def _claim_cell(system: System) -> Cell:
    score = system.metrics.get(HEADLINE)
    if system.name in ANCHORS or score is None:
        return Cell("–")
    if _claimed(score):
        return Cell("≥ 85 %", "lower bound reaches 85", "good")
    return Cell("not shown", "no interval" if score.low is None else "lower bound below 85")


def _headline(systems: list[System]) -> Table:
    columns = ["System", "Greedy", "95 % interval", "Sampled", "≥ 85 %", "Guards"]
    rows = []
    for system in systems:
        score = system.metrics.get(HEADLINE)
        rows.append(
            [
                Cell(system.label, ROLES.get(system.name, "")),
                Cell(_percent(score) if score else "–"),
                Cell(_percent_interval(score), f"n {_span([score.n])}") if score else Cell("–"),
                _share_cell(system.metrics.get(f"{HEADLINE}_sampled"), with_n=True),
                _claim_cell(system),
                _guard_cell(system, systems),
            ]
        )
    return Table(columns, rows)


def _strip(system: System, systems: list[System]) -> dict[str, Any]:
    """Where the row's mark, interval, floor and ceiling lie on a scale of 0 to 100."""
    score, floor = system.metrics.get(HEADLINE), _of_run(system, systems, FLOORS)
    ceiling = _of_run(system, systems, ("oracle",))
    lines = [other.metrics[HEADLINE].value for other in (floor, ceiling) if other and HEADLINE in other.metrics]
    return {
        "value": 100 * score.value if score else None,
        "low": 100 * score.low if score and score.low is not None else None,
        "high": 100 * score.high if score and score.high is not None else None,
        "lines": [100 * line for line in lines],
        "hue": _hue(system, systems),
    }


def _lead(systems: list[System]) -> dict[str, Any] | None:
    """The trained system with the highest greedy consistency, those that pass every guard first."""
    measured = [s for s in systems if HEADLINE in s.metrics and s.name not in (*ANCHORS, "base", "reference")]
    if not measured:
        return None
    best = max(
        measured,
        key=lambda s: (all(passed for _, _, passed in _guards(s, systems)), s.metrics[HEADLINE].value),
    )
    score, guard = best.metrics[HEADLINE], _guard_cell(best, systems)
    beside = []
    for name in ("wrong_persona", "silence", "base", "sft", "oracle"):
        other = _of_run(best, systems, (name,))
        if other and other is not best and HEADLINE in other.metrics:
            role = ROLES[name].split(":")[0] if name in ANCHORS else ""
            beside.append((f"{role} {name}".strip(), _percent(other.metrics[HEADLINE])))
    verdict = (
        "The lower bound reaches 85 %: this system keeps ≥ 85 % of persona facts."
        if _claimed(score)
        else "The lower bound does not reach 85 %, so “≥ 85 %” is not claimed."
    )
    if guard.mark == "bad":
        verdict += f" {guard.text} ({guard.note})."
    elif guard.text == "not checked":
        verdict += f" Guards not checked: {guard.note}."
    if len(measured) > 1:
        verdict += (
            f" Picked as the highest of {len(measured)} trained systems after all were measured"
            " (those that pass every guard go first)."
        )
    return {
        "label": best.label,
        "value": _percent(score),
        "interval": _percent_interval(score),
        "n": _span([score.n]),
        "verdict": verdict,
        "beside": beside,
    }


# ------------------------------------------------------------------------------------------------------------ charts


def _hue(system: System, systems: list[System]) -> str:
    if system.name in LIGHT:
        return system.name
    if system.name in (*ANCHORS, "base"):
        return "muted"
    others = sorted({s.name for s in systems} - set(TRAINED) - set(ANCHORS))
    return f"other{others.index(system.name) % 2 + 1}"


def _chart(name: str, caption: str, draw: Callable[[Axes, dict[str, str]], None], height: float) -> Chart:
    """Draw twice: for the page as SVG in CSS variables, and as PNG on white for `report.md`."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9, "axes.titlesize": 9,
        "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        drawn = {}
        for kind, palette in (("svg", MARKERS), ("png", LIGHT)):
            figure = Figure(figsize=(4.4, height), layout="constrained")
            axes = figure.subplots()
            axes.tick_params(colors=palette["muted"], labelcolor=palette["ink"], width=0.6, length=3)
            for spine in axes.spines.values():
                spine.set_color(palette["muted"])
            axes.set_axisbelow(True)
            draw(axes, palette)
            buffer = io.BytesIO()
            if kind == "svg":
                figure.patch.set_visible(False)
                axes.patch.set_visible(False)
                figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            else:
                figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
            drawn[kind] = buffer.getvalue()
    return Chart(name, caption, _inline(drawn["svg"].decode(), name, caption), drawn["png"])


def _inline(svg: str, name: str, caption: str) -> Markup:
    """A matplotlib SVG as a page element: themed by CSS variables, its ids its own, and no address in it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # a `*` rule that would reach the whole page
    for key, marker in MARKERS.items():
        svg = re.sub(rf"(fill|stroke): {marker}\b", rf"\1: var(--{key})", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    if view is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    head = f'<svg class="chart" {view[0]} role="img" aria-label="{html.escape(caption)}">'
    return Markup(head + svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href"))


def _bars(name: str, caption: str, scored: list[tuple[System, Score]], systems: list[System]) -> Chart:
    def draw(axes: Axes, palette: dict[str, str]) -> None:
        axes.axvline(100 * CLAIM, color=palette["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
        for place, (system, score) in enumerate(scored):
            hue = palette[_hue(system, systems)]
            axes.barh(place, 100 * score.value, height=0.5, color=hue, alpha=0.35)
            axes.plot([100 * score.value] * 2, [place - 0.25, place + 0.25], color=hue, linewidth=2)
            if score.low is not None and score.high is not None:
                axes.plot([100 * score.low, 100 * score.high], [place, place], color=palette["ink"], linewidth=1.4)
        axes.set_yticks(range(len(scored)), [system.label for system, _ in scored])
        axes.invert_yaxis()
        axes.set_xlim(0, 100.5)
        axes.set_xticks([0, 25, 50, 85, 100])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return _chart(name, caption, draw, 0.55 + 0.24 * len(scored))


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Label heights at least `gap` apart, in the order of `wanted` and as near to it as one pass up and down gets."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = list(wanted)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    overshoot = max(0.0, placed[order[-1]] - 100) if order else 0.0
    if overshoot:
        placed[order[-1]] -= overshoot
        for after, before in pairwise(order[::-1]):
            placed[before] = min(placed[before], placed[after] - gap)
    return placed


def _curve(name: str, caption: str, lines: dict[str, list[tuple[float, float]]]) -> Chart:
    """Lines over steps; the second, where there is one, is the held-out line in full ink."""

    def draw(axes: Axes, palette: dict[str, str]) -> None:
        for label, points in lines.items():
            held_out = label == "held-out"
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=palette["ppo" if held_out else "muted"],
                linewidth=1.8 if held_out else 1.0,
                marker="o" if held_out or len(points) == 1 else None,
                markersize=3,
                label=label,
            )
        axes.grid(axis="y", color=palette["grid"], linewidth=0.6)
        axes.set_xlabel("step", color=palette["muted"])
        axes.margins(x=0.02)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=palette["ink"], loc="upper right", ncols=2)

    return _chart(name, caption, draw, 2.3)


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
            heads.append(f"{title} (n {_span(score.n for score in scores if score)})")
            parts.append([_share_cell(score) for score in scores])
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
            charts.append(_bars(name, f"{title}: right in %, greedy, 95 % interval; dashed: 85 %", scored, systems))
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

    def draw(axes: Axes, palette: dict[str, str]) -> None:
        width = max(turns[-1] - turns[0], 1)
        ends = _spread([100 * points[-1][1].value for _, points in series], gap=7.5)
        for place, ((system, points), end) in enumerate(zip(series, ends)):
            hue = palette[_hue(system, systems)]
            style = (0, (2, 2)) if system.name in (*ANCHORS, "base") else "solid"
            dodge = 0.012 * width * (place - len(series) / 2)  # intervals of equal systems would hide each other
            axes.plot(
                [turn + dodge for turn, _ in points],
                [100 * score.value for _, score in points],
                color=hue, linewidth=1.5, linestyle=style, marker="o", markersize=3.5,
            )  # fmt: skip
            for turn, score in points:
                if score.low is not None and score.high is not None:
                    axes.plot([turn + dodge] * 2, [100 * score.low, 100 * score.high], color=hue, linewidth=1)
            axes.annotate(
                system.label, (points[-1][0] + dodge, 100 * points[-1][1].value), (turns[-1] + 0.12 * width, end),
                color=hue, va="center", arrowprops={"arrowstyle": "-", "color": palette["grid"], "linewidth": 0.6},
            )  # fmt: skip
        axes.set_ylim(-2, 102)
        axes.set_yticks([0, 25, 50, 85, 100])
        axes.grid(axis="y", color=palette["grid"], linewidth=0.6)
        axes.set_xticks(turns)
        axes.set_xlim(turns[0] - 0.08 * width, turns[-1] + 0.12 * width)
        axes.set_xlabel("exchanges before the question", color=palette["muted"])

    charts = []
    if series:
        charts.append(_chart("consistency_by_turn", "Kept facts in % by turn, greedy, 95 % intervals", draw, 3.0))
    note = "Kept facts when the probes are asked at once, and again after a conversation about other things."
    return Section("Consistency by turn", [note], charts, tables)


def _splits(systems: list[System]) -> Section:
    note = "Kept facts by what training had shown: this wording, this slot in another wording, or not even the slot."
    return Section(
        "Consistency by split", [note], [], _parts(systems, {SPLITS[key]: {"split": key} for key in SPLITS})
    )


def _all_metrics(systems: list[System]) -> Section:
    rows = []
    for metric in _ordered(METRICS, (metric for system in systems for metric in system.metrics), ()):
        scores = [system.metrics.get(metric) for system in systems]
        measured = [score for score in scores if score]
        if measured:
            arrow = {True: "↑", False: "↓", None: "↔"}[measured[0].higher_is_better]
            unit = Cell(measured[0].unit, f"n {_span(score.n for score in measured)}")
            protocol = METRICS[metric].protocol if metric in METRICS else "–"
            cells = [Cell(_plain(s.value), _plain_interval(s)) if s else Cell("–") for s in scores]
            rows.append([Cell(f"{arrow} {metric}"), unit, *cells, Cell(protocol)])
    note = (
        "↑ higher is better, ↓ lower is better, ↔ descriptive: neither end is good. Small print: 95 % interval. n counts "
        "what was resampled or scored and is a range where systems differ."
    )
    columns = ["Metric", "Unit", *(system.label for system in systems), "Comparable only at the same"]
    return Section("All metrics", [note], [], [Table(columns, rows)] if rows else [])


def _guard_section(systems: list[System]) -> Section:
    rows = []
    for system in systems:
        checks = _guards(system, systems)
        if checks:
            cells = []
            for label, measured, passed in checks:
                if measured is None:
                    cells.append(Cell("not measured"))
                else:
                    text = f"{measured:.2f}" if label.endswith("ratio") else f"{measured:+.3f}"
                    cells.append(Cell(text, "pass" if passed else "fail", "good" if passed else "bad"))
            yardstick = _of_run(system, systems, ("reference", "sft"))
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
    pairs = ((_number(row.get("step")), _number(row.get(key))) for row in log)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _curves(stages: list[Stage]) -> Section:
    charts, notes = [], ["As logged, unsmoothed. A line that is absent was not logged."]
    for place, stage in enumerate(stages):
        wanted = [("loss", "Loss", {"train": "loss", "held-out": "eval_loss"})]
        if stage.name == "ppo":
            wanted.append(("reward", "Reward with KL penalty", {"train": "objective/rlhf_reward"}))
            wanted.append(("kl", "KL to the reference", {"train": "objective/kl"}))
        for suffix, title, keys in wanted:
            lines = {label: points for label, key in keys.items() if (points := _points(stage.log, key))}
            if lines:
                charts.append(_curve(f"curve_{place}_{stage.name}_{suffix}", f"{stage.label}: {title}", lines))
            elif stage.log:
                notes.append(f"{stage.label}: no {keys['train']} in {stage.name}/metrics.jsonl.")
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
        wall, total = _number(record.get("wall_seconds")), _number(cost.get("total"))
        seconds.append(wall)
        dollars.append(total)
        rows.append(
            [
                Cell(stage.label, record.get("status") or ""),
                Cell(_duration(wall)),
                value(_number(cost.get("gpu_hours")), ".3f"),
                value(_number(cost.get("rate_per_gpu_hour")), ".2f"),
                value(total, ".4f"),
                value(_number(record.get("tokens")), ",.0f"),
                value(_number(record.get("peak_memory_gb")), ".2f"),
            ]
        )
    if len(rows) > 1:
        unknown = sum(wall is None for wall in seconds) + sum(total is None for total in dollars)
        note = f"{unknown} values not recorded" if unknown else ""
        rows.append(
            [
                Cell("sum", note),
                Cell(_duration(sum(wall or 0 for wall in seconds))),
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
    measured = {metric for system in systems for metric in system.metrics}
    absent = [metric for metric in METRICS if metric not in measured]
    if systems and absent:
        kept.append(f"Not measured for any system: {', '.join(absent)}.")
    return kept


# --------------------------------------------------------------------------------------------------------- dialogues


def _dialogues(systems: list[System], focus: str | None) -> dict[str, Any]:
    """A dozen probes that every system answered, drawn by `DIALOGUE_SEED`: up to `FAILURES` among the wrong answers of
    the lead system, so that a good system's failures are seen too, and the rest among all."""
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for system in systems:
        own = {
            row["probe_id"]: row
            for row in system.replies
            if "probe_id" in row and row.get("decoding", "greedy") == "greedy" and row.get("correct") is not None
        }
        if own:
            answers[system.label] = own
    if not answers:
        return {"focus": focus, "seed": DIALOGUE_SEED, "drawn": [], "failed": [], "pool": 0}
    pool = sorted(set.intersection(*(set(own) for own in answers.values())))
    generator = random.Random(DIALOGUE_SEED)
    shuffled = generator.sample(pool, len(pool))
    wrong = [probe for probe in shuffled if focus in answers and not answers[focus][probe]["correct"]]
    failed = wrong[:FAILURES]
    drawn = [probe for probe in shuffled if probe not in failed][: DIALOGUES - len(failed)]

    def show(probe: str) -> dict[str, Any]:
        row = next(iter(answers.values()))[probe]
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
            "expected": expected,
            "replies": [
                (label, own[probe].get("response", ""), bool(own[probe]["correct"])) for label, own in answers.items()
            ],
        }

    return {
        "focus": focus,
        "seed": DIALOGUE_SEED,
        "drawn": [show(probe) for probe in drawn],
        "failed": [show(probe) for probe in failed],
        "pool": len(pool),
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
        lines += ["No trained system has a persona consistency.", ""]
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
            lines += [f"> user: **{_md(probe['question'])}** (expected: {_md(probe['expected'])})", ""]
            cells = [
                [Cell(label), Cell(reply or "(empty)"), Cell("right" if ok else "wrong")]
                for label, reply, ok in probe["replies"]
            ]
            lines += _md_table(Table(["System", "Reply", "Scored"], cells))
    lines += ["## What was not tested", "", *(f"- {_md(item)}" for item in page["untested"]), ""]
    return "\n".join(lines)
