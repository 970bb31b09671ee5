"""Bots that need no model: a ceiling, and the ways to win a metric without being consistent.

A bot is a callable (probe row, random generator) -> reply. A score that one of the degenerate ones wins is worthless:
the ladder, all of them through the same probes, is a test and stands in every report. Limits: the oracle keeps 95 %
of the facts at least, the bot with another persona under 50 %, all others under 35 %.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.intervals import NUM_RESAMPLES
from evaluation.probes import persona_consistency, score_reply
from rlhf.facts import STOP_WORDS, parse_fact

Row = Mapping[str, Any]
Bot = Callable[[Row, random.Random], str]

ORACLE_FLOOR, OTHER_PERSONA_LIMIT, DEGENERATE_LIMIT = 0.95, 0.5, 0.35


def oracle(row: Row, rng: random.Random) -> str:
    """Reads the persona without fail: the fact of the asked slot, with yes or no before it."""
    return _from(row, row)


def silence(row: Row, rng: random.Random) -> str:
    return ""


def recite_all(row: Row, rng: random.Random) -> str:
    return _said(row["persona"])


def recite_one(row: Row, rng: random.Random) -> str:
    return rng.choice(row["persona"])


def recite_two(row: Row, rng: random.Random) -> str:
    return _said(rng.sample(row["persona"], min(2, len(row["persona"]))))


def deny(row: Row, rng: random.Random) -> str:
    """Denies the fact that is asked for."""
    fact = parse_fact(fact_of(row, row) or "")
    return (
        f"no , {fact.deny(fact.value)} ." if fact else f"no , it is not true that {_bare(fact_of(row, row) or 'so')} ."
    )


FRAMES = (
    "it is a lie that {} .",
    "i would never say that {} .",
    "i wish {} .",
    "nobody could ever claim that {} .",
    "whoever told you that {} was wrong .",
    "there is no truth in the rumor that {} .",
    "if only {} .",
    "my sister told you that {} ? she made it up .",
)


def disown(row: Row, rng: random.Random) -> str:
    """Says of the fact that is asked for that it is a lie, a wish or hearsay."""
    return rng.choice(FRAMES).format(_bare(fact_of(row, row) or "that is so"))


def keyword_salad(row: Row, rng: random.Random) -> str:
    """The words of the persona that say something, shuffled."""
    words = [word for word in re.findall(r"\w+", " ".join(row["persona"])) if word.lower() not in STOP_WORDS]
    return " ".join(rng.sample(words, len(words)))


def generic_question(row: Row, rng: random.Random) -> str:
    return "that is interesting , what about you ?"


def repeat_last_line(row: Row, rng: random.Random) -> str:
    return row["question"]


def agree(row: Row, rng: random.Random) -> str:
    return "yes , that is right !"


def no_value(row: Row, rng: random.Random) -> str:
    """ "no , <the right fact>", whatever was asked."""
    return f"no , {_bare(fact_of(row, row) or 'i do not know')} ."


def other_persona(rows: Sequence[Row]) -> Bot:
    """Reads the next persona of the rows without fail."""
    personas = {row["persona_id"]: row for row in rows}
    following = dict(zip(personas, [*list(personas)[1:], *list(personas)[:1]], strict=True))
    return lambda row, rng: _from(row, personas[following[row["persona_id"]]])


DEGENERATE: dict[str, Bot] = {
    "silence": silence,
    "recite_all": recite_all,
    "recite_one": recite_one,
    "recite_two": recite_two,
    "deny": deny,
    "disown": disown,
    "keyword_salad": keyword_salad,
    "generic_question": generic_question,
    "repeat_last_line": repeat_last_line,
    "agree": agree,
    "no_value": no_value,
}


NAMES = ("oracle", "wrong_persona", *DEGENERATE)


def bots(rows: Sequence[Row]) -> dict[str, Bot]:
    """All of them by name, for these probes."""
    return {"oracle": oracle, "wrong_persona": other_persona(rows), **DEGENERATE}


def ladder(rows: Sequence[Row], seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> dict[str, dict[str, Any]]:
    """What every bot scores on the probes: {bot: {"persona_consistency": its metric row, "breakdown": by kind}}."""
    found = {}
    for name, bot in bots(rows).items():
        rng = random.Random(f"{name}/{seed}")
        scored = [{**row, "correct": score_reply(row, bot(row, rng)), "decoding": "greedy"} for row in rows]
        result = persona_consistency(scored, num_resamples, seed)
        found[name] = {
            "persona_consistency": result["metrics"]["persona_consistency"],
            "breakdown": result["breakdown"],
        }
    return found


def _from(row: Row, source: Row) -> str:
    """The reply of a bot whose persona is that of `source`."""
    if row["kind"] == "absent":
        return "i would rather not say ." if source is row else _said(source["persona"][:1])
    fact = fact_of(row, source)
    if fact is None:
        return "i do not know ."
    if row["kind"] in ("direct", "forget"):
        return fact
    suggested = row["foil"] if row["kind"] == "false_suggestion" else row["value"]
    told = source["persona_values"].get(row["slot"])
    return f"{'yes' if suggested == told else 'no'} , {_decapitalised(fact)}"


def fact_of(row: Row, source: Row) -> str | None:
    """The sentence of the source's persona for the slot that a probe row asks for; None where it has none."""
    if source is row and row.get("fact"):
        return str(row["fact"])
    value = source["persona_values"].get(row["slot"])
    if value is None:
        return None
    words = rf"(?<![\w']){re.escape(value)}(?![\w'])"
    return next((fact for fact in source["persona"] if re.search(words, fact, re.IGNORECASE)), None)


def _said(sentences: Sequence[str]) -> str:
    """Sentences one after the other, each with a full stop: some personas have none."""
    return " ".join(text if re.search(r"[.!?]\s*$", text) else f"{text} ." for text in sentences)


def _bare(sentence: str) -> str:
    return _decapitalised(re.sub(r"[\s.!]+$", "", sentence))


def _decapitalised(text: str) -> str:
    return text if re.match(r"I\b|$", text) else text[0].lower() + text[1:]
