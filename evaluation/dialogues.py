"""The report's dialogues: the same prompts answered by each system, and what each reply says of the persona's facts.

A mark is a rule's reading, made when the report is written; it is not part of a score. In a reply to a probe the values
of the data's slots are looked for by the probes' own rule. In free dialogue a fact counts as supported where half of its
content words are in the reply; contradictions are those of `evaluation.contradiction`, and nothing is called invented.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from evaluation.contradiction import THRESHOLD, contradicts
from evaluation.persona import expressed
from evaluation.probes import mentions, why
from evaluation.results import System

KINDS = {"direct": "Direct question", "false_suggestion": "False suggestion", "true_suggestion": "True suggestion"}
KINDS_APART = {"absent": "Absent fact", "forget": "“Forget your persona”"}
SPLITS = {"seen": "Seen wording", "held_out_wording": "Held-out wording", "held_out_slot": "Held-out slot"}
NUM_DIALOGUES, NUM_FAILURES, SEED = 12, 4, 0

Row = Mapping[str, Any]
Vocabulary = dict[str, tuple[set[str], bool]]


class Mark(NamedTuple):
    """What a reply says of a fact: `kind` is "supported", "contradicted" or "invented"."""

    kind: str
    text: str


class Reply(NamedTuple):
    """One system's answer in a dialogue."""

    label: str
    text: str
    right: bool | None
    reason: str
    """Why it is wrong, by the probes' rule; or that the recorded verdict is of another version of the rule."""
    marks: list[Mark]


def vocabulary(rows: Iterable[Row]) -> Vocabulary:
    """By slot, the values that the probes know of it, and whether they exclude each other."""
    found: Vocabulary = {}
    for row in rows:
        if "slot_values" in row:
            values, _ = found.setdefault(row["slot"], (set(), row.get("exclusive", True)))
            values.update(row["slot_values"])
    return found


def probe_marks(row: Row, reply: str, known: Vocabulary) -> list[Mark]:
    """What a reply to a probe says of the persona's slots."""
    told, marks = dict(row["persona_values"]), []
    slots_of: dict[str, list[str]] = {}
    for slot, (values, _) in known.items():
        for value in values:
            slots_of.setdefault(value, []).append(slot)
    spoken = mentions(reply, [*told.values(), *slots_of], row["persona"])
    for slot, value in told.items():
        mention = spoken.pop(value, None)
        if mention and (mention.negated or mention.wrong_number):
            marks.append(
                Mark("contradicted", f"{slot}: {'denies' if mention.negated else 'another number of'} {value}")
            )
        elif mention and mention.asserted:
            marks.append(Mark("supported", f"{slot}: {value}"))
    reason = why(row, reply)
    if row["kind"] == "true_suggestion" and not reason and not marks:
        marks.append(Mark("supported", f"{row['slot']}: {row['value']}, by its yes"))
    if row["kind"] == "true_suggestion" and "rejects the right suggestion" in reason:
        marks.append(Mark("contradicted", f"{row['slot']}: rejects {row['value']}"))
    if row["kind"] == "false_suggestion" and "agrees with the suggestion" in reason:
        marks.append(Mark("contradicted", f"{row['slot']}: agrees to {row['foil']}, not {row['value']}"))
    for value in sorted(value for value, mention in spoken.items() if mention.asserted):
        # "london" may be a home or a trip: the asked slot decides, or else no fact of another slot is contradicted.
        slots = [row["slot"]] if row["slot"] in slots_of[value] else sorted(slots_of[value])
        fact = told.get(slots[0]) if len(slots) == 1 and known[slots[0]][1] else None
        if fact is None:
            marks.append(Mark("invented", f"{' or '.join(slots)}: {value}"))
        elif not any(mark.kind == "contradicted" and value in mark.text for mark in marks):
            marks.append(Mark("contradicted", f"{slots[0]}: {value}, not {fact}"))
    return marks


def sentence_marks(persona: Sequence[str], reply: str) -> list[Mark]:
    """What a reply in free dialogue says of the persona's sentences."""
    said, marks = expressed(persona, reply), []
    for place, fact in enumerate(persona):
        verdict = contradicts([fact], reply)
        if verdict.score >= THRESHOLD:
            marks.append(Mark("contradicted", f"{fact} ({verdict.reason})"))
        elif place in said:
            marks.append(Mark("supported", fact))
    return marks


def choose_dialogues(systems: list[System], focus: str | None) -> dict[str, Any]:
    """A dozen probes that every system answered, drawn by `SEED`: up to `NUM_FAILURES` among the wrong answers of the
    lead system, so that a good system's failures are seen too, and the rest among all. Where nothing was probed, a dozen
    held-out dialogues."""
    answers: dict[str, dict[str, Row]] = {}
    for key in (_probe_key, _dialogue_key):
        for system in systems:
            own: dict[str, Row] = {name: row for row in system.replies if (name := key(row)) is not None}
            if own:
                answers[system.label] = own
        if answers:
            break
    pool = sorted(set.intersection(*map(set, answers.values()))) if answers else []
    shuffled = random.Random(SEED).sample(pool, len(pool))
    wrong = [name for name in shuffled if focus in answers and answers[focus][name].get("correct") is False]
    failed = wrong[:NUM_FAILURES]
    drawn = [name for name in shuffled if name not in failed][: NUM_DIALOGUES - len(failed)]
    first = next(iter(answers.values()), {})
    known = vocabulary(first.values())

    def show(name: str) -> dict[str, Any]:
        replies = [_reply(label, own[name], known) for label, own in answers.items()]
        return {**(_probe(first[name]) if "probe_id" in first[name] else _dialogue(first[name])), "replies": replies}

    return {
        "focus": focus,
        "seed": SEED,
        "drawn": [show(name) for name in drawn],
        "failed": [show(name) for name in failed],
        "pool": len(pool),
        "note": _note(first.values()),
    }


def _note(rows: Iterable[Row]) -> str:
    probed = any("persona_values" in row for row in rows)
    how = "Marks: ✓ supported (says a fact of the persona), ✗ contradicted (denies one, or says another value)"
    if probed:
        return f"{how}, + invented (a value of a slot that the persona does not have). Read by the probes' rule."
    return f"{how}. Read by rules on words; what is invented was not looked for in free dialogue."


def _reply(label: str, row: Row, known: Vocabulary) -> Reply:
    text, right = row.get("response", ""), row.get("correct")
    if "persona_values" in row:
        reason = why(row, text)  # of this version, which the recorded verdict may be older than
        if right is False and not reason:
            reason = "recorded as wrong; the rules of this version find nothing wrong"
        elif right and reason:
            reason = f"recorded as right; by the rules of this version: {reason}"
        return Reply(label, text, right, reason, probe_marks(row, text, known))
    return Reply(label, text, right, "", sentence_marks(row.get("persona", []), text))


def _probe_key(row: Row) -> str | None:
    scored = row.get("correct") is not None and row.get("decoding", "greedy") == "greedy"
    return row["probe_id"] if scored and "probe_id" in row else None


def _dialogue_key(row: Row) -> str | None:
    """Of a reply in a held-out dialogue; both of its speakers may have one, each with a persona."""
    if "probe_id" in row or "dialogue_id" not in row or not row.get("history"):
        return None
    return json.dumps([row["dialogue_id"], row.get("persona", [])])


def _probe(row: Row) -> dict[str, Any]:
    expected = {
        "false_suggestion": f"not {row.get('foil')}, but {row.get('value')}",
        "true_suggestion": f"yes, {row.get('value')}",
        "absent": "nothing that contradicts the persona",
    }.get(row.get("kind", ""), str(row.get("value")))
    exchanges = row.get("turn", 0)
    after = f"after {exchanges} exchanges" if exchanges else "asked at once"
    split = str(SPLITS.get(row.get("split", ""), row.get("split", ""))).lower()
    kind = row.get("kind", "")
    return {
        "heading": ", ".join(filter(None, [(KINDS | KINDS_APART).get(kind, kind), after, split])),
        "persona": row.get("persona", []),
        "history": row.get("history", []),
        "question": row.get("question", ""),
        "expected": f"expected: {expected}",
    }


def _dialogue(row: Row) -> dict[str, Any]:
    *earlier, last = row["history"]
    reference = row.get("reference")
    return {
        "heading": f"Held-out dialogue, after {len(row['history'])} messages",
        "persona": row.get("persona", []),
        "history": earlier,
        "question": last.get("content", ""),
        "expected": "no reference" if reference is None else f"reference: {reference}",
    }
