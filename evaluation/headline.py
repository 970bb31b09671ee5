"""The report's first screen: persona consistency beside its floor and ceiling, what may be claimed, and the guards."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from evaluation.bots import DEGENERATE_LIMIT, ORACLE_FLOOR, OTHER_PERSONA_LIMIT
from evaluation.charts import CLAIM, hue_of
from evaluation.guards import WITHOUT_PEOPLE, Check, check, verdict
from evaluation.results import ANCHORS, ATTACKS, FLOORS, HEADLINE, Score, System

EAD_FLOOR = 0.75  # of people's: with the guard's ratio of .8, nobody passes below .6 of them

ROLES = {
    "base": "before persona training",
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimisation",
    "ppo": "reinforcement learning",
    "reference": "human or rule-written replies",
    "oracle": "ceiling: right by construction",
    "wrong_persona": "floor: reads another persona",
    "silence": "floor: says nothing",
    "recite_all": "attack: recites the persona",
    "recite_one": "attack: recites one fact",
    "recite_two": "attack: recites two facts",
    "deny": "attack: denies what is asked",
    "disown": "attack: calls it a lie, a wish or hearsay",
    "keyword_salad": "attack: the persona's words, shuffled",
    "generic_question": "attack: asks back",
    "repeat_last_line": "attack: repeats the question",
    "agree": "attack: yes to everything",
    "no_value": "attack: “no, <the fact>” to everything",
}

# Personas (or facts, of one persona) that a claim needs. Of 22 whose facts are all kept the lower bound is 84.6 %.
MIN_CLUSTERS = 30


class Cell(NamedTuple):
    """A table's cell; `note` is small print below the text."""

    text: str
    note: str = ""
    mark: str = ""  # "good" | "bad" | "": colour only repeats what the text says


class Table(NamedTuple):
    """As both `report.md` and the page show it."""

    columns: list[str]
    rows: list[list[Cell]]
    title: str = ""
    folded: bool = False  # behind its title on the page, until it is clicked


def percent(score: Score) -> str:
    return f"{100 * score.value:.1f} %"


def percent_interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return "no interval"
    return f"{_rounded(100 * score.low, 1, math.floor)} to {_rounded(100 * score.high, 1, math.ceil)}"


def _rounded(value: float, digits: int, direction: Callable[[float], int]) -> str:
    """Bounds are rounded outwards, so that one just below 85 % is never printed as 85.0."""
    # round() first: 1000 * .29 is 290.00000000000006, which ceil() alone would print as 29.1.
    return f"{direction(round(value * 10**digits, 6)) / 10**digits:.{digits}f}"


def plain(value: float, direction: Callable[[float], int] = round) -> str:
    """About three significant digits."""
    size = abs(value)
    if size == 0:
        return "0"
    return _rounded(value, 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3, direction)


def plain_interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return "no interval"
    return f"{plain(score.low, math.floor)} to {plain(score.high, math.ceil)}"


def span(numbers: Iterable[int | None]) -> str:
    """ "800", or "400 to 800" where they differ."""
    known = sorted({number for number in numbers if number is not None})
    return "–" if not known else f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def share_cell(score: Score | None, with_n: bool = False) -> Cell:
    if score is None:
        return Cell("–")
    n = f", n {score.n:,}" if with_n and score.n is not None else ""
    return Cell(percent(score), percent_interval(score) + n)


def _too_few(system: System) -> str:
    """Why so few were probed that nothing can be claimed of others like them; empty where there are enough."""
    clusters = system.record.get("probe_clusters") or {}
    if "n" not in clusters:
        return "number of personas not recorded"
    if clusters["n"] >= MIN_CLUSTERS:
        return ""
    unit = "facts of the one persona" if clusters["unit"] == "fact" else "personas"
    return f"too few {unit} to claim: {clusters['n']}, and {MIN_CLUSTERS} are needed"


def of_run(system: System, systems: list[System], names: Iterable[str]) -> System | None:
    """The first of `names` that was evaluated in the same run as `system`."""
    return next((other for name in names for other in systems if (other.run, other.name) == (system.run, name)), None)


def guards(system: System, systems: list[System]) -> list[Check]:
    """The guards against people where the results have their band, or else against the reference system or SFT."""
    band = system.record.get("human_band")
    other = of_run(system, systems, ("reference", "sft"))
    if system.name in ANCHORS or (not band and other is system):
        return []
    known = other.metrics if other else {}
    yardstick = {name: known[name].value if name in known else None for name in WITHOUT_PEOPLE}
    if band:
        yardstick = dict(band["yardstick"])
        sft = of_run(system, systems, ("sft",))
        if sft and "ead" in sft.metrics and yardstick["ead"] is not None:
            # Greedy decoding says fewer different words than people whatever was trained; what was lost since counts.
            # An SFT that has collapsed is no yardstick, neither for others nor for itself.
            kept = max(sft.metrics["ead"].value, EAD_FLOOR * yardstick["ead"])
            yardstick["ead"] = min(yardstick["ead"], kept)
    return check({name: score.value for name, score in system.metrics.items()}, yardstick)


def yardstick_words(system: System, systems: list[System]) -> str:
    """What the guards of a system are measured against."""
    band, other = system.record.get("human_band"), of_run(system, systems, ("reference", "sft"))
    if band:
        return f"against people, {band['source']}"
    return f"against {other.label}" if other else "no yardstick"


def _guard_cell(system: System, systems: list[System]) -> Cell:
    checks = guards(system, systems)
    if not checks:
        return Cell("anchor" if system.name in ANCHORS else "yardstick")
    text, labels = verdict(checks)
    if text == "NOT COMPARABLE":
        return Cell(text, f"guard: {labels}", "bad")
    return Cell(text, labels, "good" if text == "all pass" else "")


def _limit(system: System) -> tuple[str, bool] | None:
    """The limit of a replier by rule, and whether it holds; None for what has no limit."""
    score = system.metrics.get(HEADLINE)
    if system.name not in ANCHORS or score is None:
        return None
    if system.name == "oracle":
        return f"at least {100 * ORACLE_FLOOR:.0f} %", score.value >= ORACLE_FLOOR
    below = OTHER_PERSONA_LIMIT if system.name == "wrong_persona" else DEGENERATE_LIMIT
    return f"below {100 * below:.0f} %", score.value < below


def broken_rungs(systems: list[System]) -> list[str]:
    """A sentence for each replier by rule that is beyond its limit: the probes of its run cannot be trusted."""
    return [
        f"LADDER BROKEN: {system.label} keeps {percent(system.metrics[HEADLINE])} of the facts, and its limit is "
        f"{limit[0]}. The probes of this run can be gamed: no persona consistency in it counts."
        for system in systems
        if (limit := _limit(system)) and not limit[1]
    ]


def ladder_table(systems: list[System]) -> Table:
    """Everything that was probed, from the highest consistency to the lowest, with the limits of repliers by rule.

    The keyword score stands beside it: it is what a parrot wins.
    """
    rows = []
    measured = [system for system in systems if HEADLINE in system.metrics]
    for system in sorted(measured, key=lambda system: -system.metrics[HEADLINE].value):
        score, limit, keywords = system.metrics[HEADLINE], _limit(system), system.metrics.get("keyword_score")
        verdict = Cell("–")
        if limit:
            note = f"limit: {limit[0]}"
            verdict = Cell("holds", note, "good") if limit[1] else Cell("BROKEN", note, "bad")
        rows.append(
            [
                Cell(system.label, ROLES.get(system.name, "")),
                share_cell(score),
                verdict,
                Cell(plain(keywords.value), plain_interval(keywords)) if keywords else Cell("–"),
            ]
        )
    return Table(["System", "Facts kept", "Limit", "Keyword score, for contrast"], rows)


def _claim_cell(system: System, systems: list[System]) -> Cell:
    score = system.metrics.get(HEADLINE)
    if system.name in ANCHORS or score is None:
        return Cell("–")
    if broken_rungs([other for other in systems if other.run == system.run]):
        return Cell("not shown", "ladder broken", "bad")
    reason = "no interval" if score.low is None else "lower bound below 85" if score.low < CLAIM else ""
    # Of too few no bound is high enough, so that their number is what to mend.
    reason = _too_few(system) or reason
    return Cell("not shown", reason) if reason else Cell("≥ 85 %", "lower bound reaches 85", "good")


def without_attacks(systems: list[System]) -> list[System]:
    """What the sections other than the ladder show: of the repliers by rule only floors and ceiling."""
    return [system for system in systems if system.name not in ATTACKS]


def headline_table(systems: list[System]) -> Table:
    """Persona consistency of models, floor and ceiling, with what may be claimed and whether the guards hold."""
    columns = ["System", "Greedy", "95 % interval", "Sampled", "≥ 85 %", "Guards"]
    rows: list[list[Cell]] = []
    if not any(HEADLINE in system.metrics for system in systems):
        return Table(columns, rows)
    for system in without_attacks(systems):
        score = system.metrics.get(HEADLINE)
        rows.append(
            [
                Cell(system.label, ROLES.get(system.name, "")),
                Cell(percent(score) if score else "–"),
                Cell(percent_interval(score), f"n {span([score.n])}") if score else Cell("–"),
                share_cell(system.metrics.get(f"{HEADLINE}_sampled"), with_n=True),
                _claim_cell(system, systems),
                _guard_cell(system, systems),
            ]
        )
    return Table(columns, rows)


def strip(system: System, systems: list[System]) -> dict[str, Any]:
    """Where the row's mark, interval, floor and ceiling lie on a scale of 0 to 100."""
    score, floor = system.metrics.get(HEADLINE), of_run(system, systems, FLOORS)
    ceiling = of_run(system, systems, ("oracle",))
    lines = [other.metrics[HEADLINE].value for other in (floor, ceiling) if other and HEADLINE in other.metrics]
    return {
        "value": 100 * score.value if score else None,
        "low": 100 * score.low if score and score.low is not None else None,
        "high": 100 * score.high if score and score.high is not None else None,
        "lines": [100 * line for line in lines],
        "hue": hue_of(system, systems),
    }


def without_headline(systems: list[System]) -> str:
    """What to say first where no trained system has a consistency: why, and the held-out perplexity."""
    reasons = {s.record.get("not_scored", {}).get(HEADLINE) for s in systems} - {None}
    text = "No trained system has a persona consistency" + (f": {', '.join(sorted(reasons))}." if reasons else ".")
    scored = [(s.label, s.metrics["perplexity_token"]) for s in systems if "perplexity_token" in s.metrics]
    if scored:
        values = ", ".join(f"{label} {plain(score.value)} ({plain_interval(score)})" for label, score in scored)
        text += f" Perplexity a token on held-out replies, with 95 % intervals: {values}."
    return text


def find_lead(systems: list[System]) -> dict[str, Any] | None:
    """The trained system with the highest greedy consistency, those that fail a guard last."""
    measured = [s for s in systems if HEADLINE in s.metrics and s.name not in (*ANCHORS, "base", "reference")]
    if not measured:
        return None
    best = max(
        measured,
        key=lambda s: (all(passed is not False for _, _, passed in guards(s, systems)), s.metrics[HEADLINE].value),
    )
    score, guard = best.metrics[HEADLINE], _guard_cell(best, systems)
    beside = []
    for name in ("wrong_persona", "silence", "base", "sft", "oracle"):
        other = of_run(best, systems, (name,))
        if other and other is not best and HEADLINE in other.metrics:
            role = ROLES[name].split(":")[0] if name in ANCHORS else ""
            beside.append((f"{role} {name}".strip(), percent(other.metrics[HEADLINE])))
    claim = _claim_cell(best, systems)
    few = _too_few(best)
    verdict = f"{few[:1].upper()}{few[1:]}." if few else "The lower bound does not reach 85 %, so"
    verdict += " “≥ 85 %” is not claimed."
    if claim.mark == "good":
        verdict = "The lower bound reaches 85 %: this system keeps ≥ 85 % of persona facts."
    elif claim.mark == "bad":
        verdict = "The ladder is broken, so “≥ 85 %” is not claimed."
    if guard.mark == "bad":
        verdict += f" {guard.text} ({guard.note})."
    elif guard.text == "not checked":
        verdict += f" Guards not checked: {guard.note}."
    if len(measured) > 1:
        verdict += (
            f" Picked as the highest of {len(measured)} trained systems after all were measured"
            " (those that fail a guard go last)."
        )
    return {
        "system": best,
        "claimed": claim.mark == "good",
        "why_not": few,
        "label": best.label,
        "value": percent(score),
        "interval": percent_interval(score),
        "n": span([score.n]),
        "verdict": verdict,
        "beside": beside,
    }
