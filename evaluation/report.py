"""The benchmark report: run folders in; `report.md`, one self-contained `index.html` and PNG plots out.

Every score is copied from the files that `evaluation.results` reads. What the report adds is read off the replies with a
fixed seed (drift, marks in dialogues, differences of two runs), so the same folders give the same bytes.
"""

import logging
import re
from pathlib import Path
from typing import Any

import jinja2

from evaluation.certificate import make_certificate, untested
from evaluation.dialogues import Reply, choose_dialogues
from evaluation.headline import (
    Cell,
    Table,
    broken_rungs,
    find_lead,
    headline_table,
    strip,
    without_attacks,
    without_headline,
)
from evaluation.results import load_runs
from evaluation.sections import make_sections
from rlhf.files import write_bytes

logger = logging.getLogger(__name__)

SYMBOLS = {"supported": "✓", "contradicted": "✗", "invented": "+"}


def write_report(runs: list[Path], output: Path, compare: Path | None = None) -> Path:
    """Write `report.md`, `index.html` and the PNG plots of one or more run folders into `output`.

    Args:
        compare: another run, whose systems are compared with those of the same name of the only one in `runs`.

    Returns the path of `index.html`. Raises `FileNotFoundError` for a run folder that is not there or when no folder
    holds a result, a record or a log, and `ValueError` for a consistency that is not a share between 0 and 1, or for
    `compare` beside several runs.
    """
    systems, stages, missing = load_runs([Path(run) for run in runs])
    lead = find_lead(systems)
    sections = make_sections(systems, stages)
    if compare is not None:
        if len(runs) != 1:
            raise ValueError(f"`compare` needs one run to compare {compare} with, got {len(runs)}")
        # not at the top: it brings torch, seconds of imports that a plain report does without
        from evaluation.differences import difference_section

        others = load_runs([Path(compare)])[0]
        sections.insert(0, difference_section(Path(runs[0]), Path(compare), systems, others))
    shown = without_attacks(systems)
    page = {
        "title": "Benchmark report: " + ", ".join(dict.fromkeys(Path(run).resolve().name for run in runs)),
        "alarms": broken_rungs(systems),
        "lead": lead,
        "without_headline": without_headline(systems),
        "headline": headline_table(systems),
        "strips": [strip(system, systems) for system in shown],
        "certificate": make_certificate(lead, systems, stages),
        "sections": sections,
        "dialogues": choose_dialogues(shown, lead["label"] if lead else None),
        "missing": missing,
        "untested": untested(systems, stages, compare is not None),
        "symbols": SYMBOLS,
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
    # "replace": a reply may hold half a surrogate pair
    write_bytes(output / "report.md", _markdown(page).encode(errors="replace"))
    rendered = environment.get_template("report.html.jinja").render(page)
    write_bytes(output / "index.html", rendered.encode(errors="replace"))
    logger.info("report of %d systems and %d stages written to %s", len(systems), len(stages), output)
    return output / "index.html"


# ---------------------------------------------------------------------------------------------------------- markdown


def _md(text: Any) -> str:
    """Text that Markdown shows as it is: no markup, no table break, one line."""
    escaped = re.sub(r"([\\|`*\[\]])", r"\\\1", str(text)).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(escaped.split())


def _md_table(table: Table) -> list[str]:
    lines = [f"### {_md(table.title)}", ""] if table.title else []
    lines += ["| " + " | ".join(map(_md, table.columns)) + " |", "|" + " --- |" * len(table.columns)]
    for row in table.rows:
        cells = [_md(cell.text) + (f" ({_md(cell.note)})" if cell.note else "") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _markdown(page: dict[str, Any]) -> str:
    lines = [f"# {_md(page['title'])}", ""]
    lines += [f"**{_md(alarm)}**\n" for alarm in page["alarms"]]
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
    if page["certificate"].rows:
        lines += ["## Certificate", "", *_md_table(page["certificate"])]
    lines += ["## What was not tested", "", *(f"- {_md(item)}" for item in page["untested"]), ""]
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
            lines += [f"## Dialogues: {_md(title)} (seed {dialogues['seed']})", "", _md(dialogues["note"]), ""]
        for probe in group:
            lines += [f"**{_md(probe['heading'])}.** Persona: {_md(' / '.join(probe['persona']))}", ""]
            for message in probe["history"]:
                lines += [f"> {_md(message['role'])}: {_md(message['content'])}  "]
            lines += [f"> user: **{_md(probe['question'])}** ({_md(probe['expected'])})", ""]
            cells = [
                [Cell(reply.label), Cell(reply.text or "(empty)"), Cell(*_verdict(reply)), Cell(_marks(reply))]
                for reply in probe["replies"]
            ]
            lines += _md_table(Table(["System", "Reply", "Scored", "Facts"], cells))
    return "\n".join(lines)


def _verdict(reply: Reply) -> tuple[str, str]:
    return "–" if reply.right is None else "right" if reply.right else "wrong", reply.reason


def _marks(reply: Reply) -> str:
    return "; ".join(f"{SYMBOLS[mark.kind]} {mark.kind} {mark.text}" for mark in reply.marks) or "–"
