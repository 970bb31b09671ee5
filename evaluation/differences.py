"""Two runs compared in the report: paired differences of systems of the same name, or else of the two that lead.

A run compared with itself has the systems that were trained after SFT compared with SFT.

The one module of the report that computes: tests by `evaluation.compare`, over the replies of both runs.
"""

import math
from pathlib import Path
from typing import Any

from evaluation import METRICS
from evaluation.compare import compare, system_items
from evaluation.headline import Cell, Table, find_lead, percent_interval, plain
from evaluation.intervals import NUM_TRIALS, holm
from evaluation.results import ANCHORS, HEADLINE, Score, System
from evaluation.sections import Section

# Chosen before looking: what has a better end. A descriptive number differs for good reasons or bad ones.
FAMILY = tuple(name for name, metric in METRICS.items() if metric.higher_is_better is not None)
ALPHA = 0.05


def difference_section(run: Path, other: Path, systems: list[System], others: list[System]) -> Section:
    """Table by pair: differences `run` less `other` with interval, p-value adjusted over all rows, and effect."""
    name, other_name = run.resolve().name, other.resolve().name
    alone = run.resolve() == other.resolve()
    if name == other_name and not alone:
        name, other_name = str(run), str(other)
    compared: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    notes = [
        f"Differences are {'trained systems less SFT' if alone else f'{name} less {other_name}'}, on the same prompts."
    ]
    for mine, theirs in _pairs(systems, [s for s in others if s.name == "sft"] if alone else others, alone, notes):
        try:
            compared[mine, theirs] = compare(
                system_items(run / "evaluate" / mine), system_items(other / "evaluate" / theirs), FAMILY
            )
        except (ValueError, FileNotFoundError) as error:  # other prompts, or no replies: said, and the others compared
            notes.append(f"{mine} and {theirs} were not compared: {error}")
    flat = {(pair, metric): row["p_value"] for pair, rows in compared.items() for metric, row in rows.items()}
    adjusted = holm(flat)
    if flat:
        notes.append(
            f"Of {len(flat)} differences (metrics that have a better end; descriptive ones are not tested), p by "
            f"{NUM_TRIALS:,} swaps of whole personas, adjusted by Holm over all of them. Intervals are not adjusted: each is "
            "of 95 % by itself. They cover the choice of personas, not another training seed."
        )
    tables: list[Table] = []
    for (mine, theirs), rows in compared.items():
        title = f"{name} / {mine} less {other_name} / {theirs}"
        if alone:
            title = f"{mine} less {theirs}"
        elif mine == theirs:
            title = f"{mine}: {name} less {other_name}"
        notes += _headline_words(title, rows, adjusted.get(((mine, theirs), HEADLINE), 1.0))
        table = [_row(metric, row, adjusted[(mine, theirs), metric]) for metric, row in rows.items()]
        sides = [mine, theirs] if alone else [name, other_name]
        heads = ["Metric", "Difference", "In words", "p (Holm)", "Effect", *sides]
        tables.append(Table(heads, table, title, folded=bool(tables)))
    return Section("Trained systems against SFT" if alone else f"{name} against {other_name}", notes, [], tables)


def _pairs(systems: list[System], others: list[System], alone: bool, notes: list[str]) -> list[tuple[str, str]]:
    """Systems of the same name; where there are none, the two that lead. In one run all that is trained, with SFT."""
    names = {system.name for system in others}
    if alone:
        trained = [s.name for s in systems if s.name not in (*ANCHORS, "base", "reference", "sft")]
        if not names or not trained:
            notes.append("Nothing was compared: the run needs `sft` and a system trained after it.")
        return [(name, "sft") for name in trained if names]
    same = [(s.name, s.name) for s in systems if s.name in names and s.name not in ANCHORS]
    leads = find_lead(systems), find_lead(others)
    if same:
        first = leads[0]["system"].name if leads[0] else ""
        return sorted(same, key=lambda pair: pair[0] != first)  # the headline's system first
    if leads[0] and leads[1]:
        notes.append("No system has the same name in both runs: the two with the highest consistency are compared.")
        return [(leads[0]["system"].name, leads[1]["system"].name)]
    notes.append("No system has the same name in both runs, and not both have one that leads: nothing was compared.")
    return []


def _words(row: dict[str, Any], p: float) -> Cell:
    low, high, up = row["ci_low"], row["ci_high"], row["higher_is_better"]
    if low is None or high is None:
        return Cell("no interval", "one cluster")
    if low == high == 0:
        return Cell("no difference", "every item has the same value")
    if low <= 0 <= high:
        return Cell("no difference shown", "the interval contains 0")
    better = (row["difference"] > 0) == up
    text = "better" if better else "worse"
    if p >= ALPHA:
        return Cell("not shown", f"{text} by its own interval, but not after Holm's adjustment")
    return Cell(text, "the interval leaves out 0", "good" if better else "bad")


def _row(metric: str, row: dict[str, Any], p: float) -> list[Cell]:
    arrow = "↑" if row["higher_is_better"] else "↓"
    bounds = "no interval"
    if row["ci_low"] is not None and row["ci_high"] is not None:
        bounds = f"{plain(row['ci_low'], math.floor)} to {plain(row['ci_high'], math.ceil)}"
    least = 1 / (NUM_TRIALS + 1)  # what the test can reach, before Holm
    effect = Cell("–") if row["effect"] is None else Cell(f"{row['effect']:+.2f}", row["effect_name"])
    return [
        Cell(f"{arrow}\u00a0{metric}", f"n {row['n']:,}, {row['n_clusters']:,} clusters"),
        Cell(f"{'+' if row['difference'] > 0 else ''}{plain(row['difference'])}", bounds),
        _words(row, p),
        Cell(f"{p:.4f}" if p > least else f"≤ {least:.4f}"),
        effect,
        Cell(plain(row["a"])),
        Cell(plain(row["b"])),
    ]


def _headline_words(title: str, rows: dict[str, dict[str, Any]], p: float) -> list[str]:
    """The headline's difference in a sentence, where it was measured."""
    row = rows.get(HEADLINE)
    if not row or row["ci_low"] is None or row["ci_high"] is None:
        return []
    interval = percent_interval(Score(row["difference"], row["ci_low"], row["ci_high"], row["n"], row["unit"], True))
    shown = f"the interval leaves out 0, and after Holm's adjustment p is {p:.4f}"
    if row["ci_low"] <= 0 <= row["ci_high"]:
        shown = "the interval contains 0, so no difference is shown"
    elif p >= ALPHA:
        shown = f"the interval leaves out 0, but after Holm's adjustment p is {p:.2f}: no difference is shown"
    return [f"{title}: persona consistency {100 * row['difference']:+.1f} points (95 % interval {interval}); {shown}."]
