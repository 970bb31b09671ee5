"""Preference pairs and prompts from real dialogues."""

import random
from collections.abc import Sequence
from typing import Any

from rlhf.data.split import characters

Row = dict[str, Any]

CANDIDATES = 64  # replies looked at for each pair: enough for a length match, and linear in the number of pairs
MAX_LENGTH_GAP = 0.3  # of the chosen reply's number of words


def other_persona_pairs(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` pairs: the true reply is chosen, one of another character from another dialogue is rejected.

    The rejected reply is the one nearest in length (words) among a random sample, so that length does not tell which
    one is better. A turn with no other reply within 30 % of its length gives no pair.
    """
    rng = random.Random(f"preferences/{seed}")
    turns = _reply_turns(rows)
    rng.shuffle(turns)
    character = characters(rows)
    pairs: list[Row] = []
    for index, turn in turns:
        if len(pairs) == count:
            break
        row, chosen = rows[index], rows[index]["messages"][turn]["content"]
        words = len(chosen.split())
        candidates = [
            rows[other]["messages"][at]["content"]
            for other, at in rng.sample(turns, min(CANDIDATES, len(turns)))
            if character[other] != character[index] and rows[other]["dialogue_id"] != row["dialogue_id"]
        ]
        candidates = [text for text in candidates if text.strip().casefold() != chosen.strip().casefold()]
        rejected = min(candidates, key=lambda text: abs(len(text.split()) - words), default=None)
        if rejected is None or abs(len(rejected.split()) - words) > MAX_LENGTH_GAP * words:
            continue
        pairs.append(
            {
                **_prompt(row, turn),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "kind": "other_persona",
            }
        )
    return pairs


def prompts(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` dialogues, each cut off before a random reply, which is its `reference`."""
    turns = _reply_turns(rows)
    random.Random(f"prompts/{seed}").shuffle(turns)
    return [
        {**_prompt(rows[index], turn), "reference": rows[index]["messages"][turn]["content"]}
        for index, turn in turns[:count]
    ]


def _reply_turns(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(row, message) of every reply that follows a user's turn."""
    return [
        (index, turn)
        for index, row in enumerate(rows)
        for turn, message in enumerate(row["messages"])
        if turn and message["role"] == "assistant"
    ]


def _prompt(row: Row, turn: int) -> Row:
    return {"persona": row["persona"], "prompt": row["messages"][:turn], "dialogue_id": row["dialogue_id"]}
