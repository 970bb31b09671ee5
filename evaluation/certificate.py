"""The certificate: what was tested of the lead system, what may be claimed, and what was not tested; at one glance."""

from typing import Any

from evaluation import METRICS
from evaluation.dialogues import KINDS, KINDS_APART, SPLITS
from evaluation.headline import Cell, Table, broken_rungs, guards, percent, percent_interval
from evaluation.results import ATTACKS, HEADLINE, Score, Stage, System
from evaluation.sections import part_score


def make_certificate(lead: dict[str, Any] | None, systems: list[System], stages: list[Stage]) -> Table:
    """Field and value; no rows where no trained system has a consistency."""
    if not lead:
        return Table(["Field", "Value"], [])
    system: System = lead["system"]
    own_run = [other for other in systems if other.run == system.run]
    claim = f"{lead['label']} keeps ≥ 85 % of persona facts" if lead["claimed"] else "“≥ 85 %” is not claimed"
    if lead["why_not"]:
        claim += f": {lead['why_not']}"
    turns = sorted({row["turn"] for row, _ in system.breakdown if isinstance(row["turn"], int)})
    parts = {
        "each turn": {f"after {turn} exchanges": part_score(system, turn=turn) for turn in turns},
        "each kind": {title.lower(): part_score(system, kind=kind) for kind, title in (KINDS | KINDS_APART).items()},
        "each wording": {title.lower(): part_score(system, split=split) for split, title in SPLITS.items()},
    }
    rows = [
        [
            Cell("Claim"),
            Cell(claim, f"{lead['value']}, interval {lead['interval']}", "good" if lead["claimed"] else ""),
        ],
        [Cell("Tested"), Cell(_tested(system, lead))],
        [Cell("95 % lower bounds"), Cell(_bounds({"all": system.metrics[HEADLINE]}))],
        *([Cell(f"… at {name}"), Cell(_bounds(found))] for name, found in parts.items() if any(found.values())),
        *([Cell("Beside the probes"), Cell(text)] for text in [_beside(system)] if text),
        [Cell("Guards"), _guards(system, systems)],
        [Cell("Ladder"), _ladder(own_run)],
        [Cell("Made"), Cell(_made(system, stages))],
        [Cell("Training seeds"), Cell(_seeds(stages) or "not recorded")],
    ]
    return Table(["Field", "Value"], rows)


def _tested(system: System, lead: dict[str, Any]) -> str:
    clusters = system.record.get("probe_clusters") or {}
    whom = f" of {clusters['n']:,} held-out {clusters['unit']}s" if clusters.get("unit") == "persona" else ""
    facts = system.record.get("probed_facts")
    cases = f"{lead['n']} cases" if facts is None else f"{facts:,} facts{whom} in {lead['n']} cases"
    text = f"{cases} (a fact at a turn, in seen or held-out wording), three questions each, greedy decoding"
    if clusters.get("unit") == "fact":
        text += "; one persona, so wordings and facts are held out, not personas"
    coverage = system.record.get("probe_coverage") or {}
    if coverage.get("facts"):
        text += f"; {coverage.get('scorable', '?')} of {coverage['facts']} facts of the personas could be probed"
    return text


def _bounds(scores: dict[str, Score | None]) -> str:
    def told(score: Score) -> str:
        bound = "no interval" if score.low is None else percent_interval(score).split(" to ")[0]
        return f"{bound} (of {percent(score)}{'' if score.n is None else f', n {score.n:,}'})"

    return "; ".join(f"{name} {told(score)}" for name, score in scores.items() if score)


def _beside(system: System) -> str:
    agreement, choice = system.metrics.get("probe_agreement"), system.metrics.get("forced_choice")
    chance = system.record.get("probe_agreement_by_chance")
    parts = []
    if agreement:
        independent = f" (independent ones: {100 * chance:.1f} %)" if isinstance(chance, float) else ""
        parts.append(f"{percent(agreement)} of the pairs of probes about a fact have one verdict{independent}")
    if choice:
        parts.append(f"forced choice {percent(choice)}, interval {percent_interval(choice)}, chance 50 %")
    return "; ".join(parts)


def _guards(system: System, systems: list[System]) -> Cell:
    checks = guards(system, systems)
    failed = [label for label, _, passed in checks if passed is False]
    if failed:
        return Cell("NOT COMPARABLE", "broken: " + ", ".join(failed), "bad")
    words = {True: "pass", None: "not measured"}
    return Cell(
        "; ".join(f"{label} {words[passed]}" for label, _, passed in checks if passed is not False) or "yardstick"
    )


def _ladder(systems: list[System]) -> Cell:
    broken = broken_rungs(systems)
    if broken:
        return Cell("BROKEN", " ".join(broken), "bad")
    attacks = [system for system in systems if system.name in ATTACKS and HEADLINE in system.metrics]
    if not attacks:
        return Cell("no attack was tried", "floor and ceiling alone")
    best = max(attacks, key=lambda system: system.metrics[HEADLINE].value)
    return Cell("holds", f"best of {len(attacks)} attacks: {best.label} {percent(best.metrics[HEADLINE])}", "good")


def _made(system: System, stages: list[Stage]) -> str:
    record = system.record
    fields = {
        "date": record.get("date"),
        "commit": record.get("git_commit"),
        "data": record.get("data_hash"),
        "adapter": record.get("adapter_hash"),
        "evaluation seed": record.get("seed"),
    }
    return (
        "; ".join(f"{name} {_short(value)}" for name, value in fields.items() if value is not None) or "not recorded"
    )


def _short(value: Any) -> str:
    """A hash by its first twelve digits; the whole one stands under Provenance."""
    text = str(value)
    return f"{text[:12]}{text[40:] or '…'}" if len(text) >= 40 else text


def _seeds(stages: list[Stage]) -> str:
    found = {
        s.label: s.metadata["seed"] for s in stages if "seed" in s.metadata and s.name not in ("prepare", "evaluate")
    }
    by_seed: dict[Any, list[str]] = {}
    for label, seed in found.items():
        by_seed.setdefault(seed, []).append(label)
    return "; ".join(f"{seed} ({', '.join(labels)})" for seed, labels in by_seed.items())


def untested(systems: list[System], stages: list[Stage], compared: bool) -> list[str]:
    """What a reader could think was shown and was not, as far as the records tell."""
    kept = [
        "No person rated a reply. Rules on words decide right and wrong; an answer in unforeseen words counts as wrong.",
        "Probes ask for single facts of a persona. Safety, other languages and conversations with people were not measured.",
        "No published number is ranked beside these: data, tokenisation and metric definitions differ.",
    ]
    if not compared:
        kept.insert(
            1,
            "No pair of systems was tested against each other: overlapping intervals show neither a difference nor its absence.",
        )
    seeds: dict[str, set[str]] = {}
    for stage in stages:
        if "seed" in stage.metadata and stage.name not in ("prepare", "evaluate"):
            seeds.setdefault(stage.name, set()).add(str(stage.metadata["seed"]))
    single = [name for name, found in seeds.items() if len(found) == 1]
    if single or not seeds:
        which = f"One training seed for {', '.join(single)}" if single else "No training seed is recorded"
        kept.insert(0, f"{which}: the intervals cover the choice of personas and probes, not a second training run.")
    parts = [row for system in systems for row, _ in system.breakdown]
    for key, names in (("split", SPLITS), ("kind", KINDS | KINDS_APART)):
        absent = [title.lower() for name, title in names.items() if not any(row.get(key) == name for row in parts)]
        if absent:
            kept.append(f"No probes by {key}: {', '.join(absent)}.")
    turns = [row["turn"] for row in parts if isinstance(row.get("turn"), int)]
    kept.append(f"Nothing was asked after more than {max(turns)} exchanges." if turns else "No multi-turn probes.")
    untried = [name for name in ATTACKS if name not in {system.name for system in systems}]
    if systems and len(untried) == len(ATTACKS):
        kept.append("No attack was tried on the probes: the ladder has floor and ceiling alone.")
    elif systems and untried:
        kept.append(f"Attacks that were not tried on the probes: {', '.join(untried)}.")
    if not any(stage.metadata.get("hardware", {}).get("gpus") for stage in stages):
        kept.append("No stage records a GPU: time, memory and half precision on one are not shown.")
    measured = {metric for system in systems for metric in system.metrics}
    absent = [metric for metric in METRICS if metric not in measured]
    if systems and absent:
        kept.append(f"Not measured for any system: {', '.join(absent)}.")
    return kept
