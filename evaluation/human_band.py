"""The human band: what people do in dialogues other than those scored, at as many places and in as many words.

A persona score counts only beside it: people copy their persona in 1 of 100 replies and express about half of it in a
dialogue. The band is measured on `dialogues_train.jsonl` of the data, or on a file of the user's. Generated data have
generated replies in the role of people: `references_train.jsonl`, the persona world's training dialogues without their
flaws.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.diversity import ead
from evaluation.intervals import NUM_RESAMPLES, cluster_sums
from evaluation.measures import Measure, independent, measure_intervals, measures, metric_row, passes
from evaluation.overlap import normalize

Row = Mapping[str, Any]

MAX_DIALOGUES = 1000  # drawn by the seed; the intervals of the band are narrow then
EAD_DRAWS = 20
EAD_WORDS_SHARE = 0.9  # EAD falls a little with the number of words
PEOPLE = (
    "contradiction_free_rate", "grounded_coverage", "copy_rate", "fact_density", "repetition", "repetition_across",
    "question_rate", "length_words", "uptake",
)  # fmt: skip
MAX_REPLIES_RATIO = 1.5  # of replies a dialogue, beyond which coverage does not compare


class People(NamedTuple):
    """Replies of people, as rows for `score_rows`, and the file that they are from."""

    rows: Sequence[Row]
    source: str
    hash: str


def human_replies(dialogue: Row) -> list[dict[str, Any]]:
    """The assistant's replies of a dialogue, each as a row with persona and history; what is not trained on is left out.

    Raises:
        ValueError: when `messages` are malformed; the other fields are for `score.parse_row` to check.
    """
    messages = dialogue["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(f'`messages` must be a list of {{"role", "content"}}, got {str(messages)[:80]!r}')
    turns = [message for message in messages if message["role"] != "system"]
    return [
        {
            "persona": dialogue.get("persona"),
            "history": turns[:place],
            "response": turn.get("content"),
            "reference": None,
            "dialogue_id": dialogue.get("dialogue_id"),
        }
        for place, turn in enumerate(turns)
        if turn["role"] == "assistant" and turn.get("train", True)
    ]


def prepared_people(folder: Path) -> Path:
    """The file of a prepare folder in which people, or what plays them, reply in dialogues that are not held out."""
    clean = folder / "references_train.jsonl"
    return clean if clean.is_file() else folder / "dialogues_train.jsonl"


def human_band(people: People, rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """What people do, measured as for `rows`: of each dialogue the last replies, as many as a scored one has at most.

    Args:
        people: dialogues of theirs that are among `rows` are left out.
        rows: what is scored.
        seed: of the dialogues that are drawn, of the resamples, and of the draws for `ead`.

    Returns:
        `{"source", "hash", "replies", "dialogues", "dialogues_also_scored", "replies_per_dialogue", "metrics": {name: as in results.json},
        "yardstick": {name: value or None}}`. `yardstick` is what `guards.check` takes.

    Raises:
        ValueError: when no dialogue is left.
    """
    scored, dialogues = (passes(side, range(len(side))) for side in (rows, people.rows))
    known = {place for row in rows for place in _places(row, row["reference"])}
    others = [d for d in dialogues if not any(known & _places(people.rows[i], people.rows[i]["response"]) for i in d)]
    if not others:
        raise ValueError(
            f"{people.source}: none of its {len(dialogues)} dialogues is another than those scored: the band must be measured "
            "on others, such as the training split."
        )
    drawn = random.Random(seed).sample(others, MAX_DIALOGUES) if len(others) > MAX_DIALOGUES else others
    most = max(map(len, scored))
    chosen = [people.rows[i] for dialogue in drawn for i in dialogue[-most:]]
    found = measures(chosen, seed)
    found = {name: found[name] for name in PEOPLE if name in found}
    human, own = len(chosen) / len(drawn), len(rows) / len(scored)
    if max(human / own, own / human) > MAX_REPLIES_RATIO:
        found.pop("grounded_coverage", None)  # more replies cover more
    intervals = measure_intervals(found, independent(chosen)[1], seed=seed)
    values = {name: interval.value for name, interval in intervals.items()}
    varying = {
        "copy_rate": _copy_limit(found.get("copy_rate"), chosen, len(scored), seed),
        "ead": _ead(chosen, rows, seed),
    }
    return {
        "source": people.source,
        "hash": people.hash,
        "replies": len(chosen),
        "dialogues": len(drawn),
        "dialogues_also_scored": len(dialogues) - len(others),
        "replies_per_dialogue": {"people": round(human, 2), "scored": round(own, 2)},
        "metrics": {name: metric_row(name, interval, found[name].n) for name, interval in intervals.items()},
        "yardstick": dict.fromkeys(PEOPLE) | values | varying,
    }


def _places(row: Row, reply: str | None) -> set[Any]:
    """What tells a place in a dialogue from others: persona, history and the person's reply; the first exchange alone,
    of one persona, may be the same in many dialogues."""
    place = (tuple(row["persona"]), tuple(turn["content"] for turn in row["history"]))
    return {(*place, reply), *([place] if len(row["history"]) > 1 else [])}


def _copy_limit(copies: Measure | None, people: Sequence[Row], dialogues: int, seed: int) -> float | None:
    """95th percentile of the copy rate in samples of so many dialogues of people."""
    if copies is None:
        return None
    sums = cluster_sums(copies.statistics, [people[i]["dialogue_id"] for i in copies.rows])
    draws = np.random.default_rng(seed).multinomial(dialogues, np.full(len(sums), 1 / len(sums)), NUM_RESAMPLES)
    totals = draws @ sums
    return float(np.percentile(totals[:, 0] / totals[:, 1], 95))


def _ead(people: Sequence[Row], rows: Sequence[Row], seed: int) -> float | None:
    """Mean EAD of samples of people's words, as many as the rows have; None where people have far fewer."""
    words = sum(len(normalize(row["response"])) for row in rows)
    spoken = [normalize(row["response"]) for row in people]
    if not words or sum(map(len, spoken)) < EAD_WORDS_SHARE * words:
        return None
    rng, values = random.Random(seed), []
    for _ in range(EAD_DRAWS):
        sample = [word for reply in rng.sample(spoken, len(spoken)) for word in reply][:words]
        values.append(ead(len(set(sample)), len(sample)))
    return sum(values) / len(values)


def human_values(band: Mapping[str, Any]) -> dict[str, float | None]:
    """People's values by metric, as `measures` takes them."""
    return {name: row["value"] for name, row in band["metrics"].items()}


def without_composite(band: Mapping[str, Any], covered: bool) -> str:
    """Why there is no `persona_composite` though there is a band."""
    values, replies = human_values(band), band["replies_per_dialogue"]
    if not covered:
        return "no row has a persona with a content word"
    if "copy_rate" in values and "grounded_coverage" not in values:
        return f"people have {replies['people']} replies a dialogue, and {replies['scored']} are scored"
    return "the replies of people express no persona"


def in_words(band: Mapping[str, Any]) -> str:
    """The band in a sentence, for the report and the command line."""
    shown = ", ".join(f"{name} {row['value']:.3g}" for name, row in band["metrics"].items())
    return f"People, {band['replies']:,} replies in {band['dialogues']:,} dialogues of {band['source']}: {shown}."
