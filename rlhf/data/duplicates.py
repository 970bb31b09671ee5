"""Near-duplicate replies, within the data and across the split.

What is compared are units, (last user turn, reply); two are near-duplicates if their texts have a sequence ratio above
0.85 (`rlhf/data/similar.py`).
"""

from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import Indel

from rlhf.data.similar import similar_pairs

Row = dict[str, Any]
Unit = tuple[str, str]

THRESHOLD = 0.85
REPLY_REASON = "near-duplicate"
DIALOGUE_REASON = "every reply is a near-duplicate"


def near_duplicates(
    units: Sequence[Unit], threshold: float = THRESHOLD, by_reply_too: bool = False
) -> list[tuple[int, int, float]]:
    """The units to drop: from the first on, each that is similar to one that was kept.

    A unit that is similar only to dropped units is kept, so there are no chains: what is dropped has a kept unit of which
    it is a near-duplicate.

    Args:
        units: (last user turn, reply).
        threshold: Ratio, 0 to 1, above which two units are near-duplicates. Recall was measured for 0.85; below that it
            falls.
        by_reply_too: Whether the replies alone must be above the threshold as well.

    Returns:
        (index of the kept unit, index of the dropped unit, their ratio), by the dropped index. Of several kept units that
        are similar, the first; where the same text was kept, that one.

    Raises:
        ValueError: if `threshold` is not between 0 and 1.
    """
    different, numbers, firsts = _distinct(units)
    kept_for: dict[int, tuple[int, float]] = {}
    for first, second, ratio in sorted(_similar(different, threshold), key=lambda pair: (pair[1], pair[0])):
        if first in kept_for or second in kept_for:
            continue
        if not by_reply_too or Indel.normalized_similarity(different[first][1], different[second][1]) > threshold:
            kept_for[second] = (first, ratio)
    dropped = []
    for index, number in enumerate(numbers):
        keeper, ratio = kept_for.get(number, (number, 1.0))
        if firsts[keeper] != index:
            dropped.append((firsts[keeper], index, ratio))
    return dropped


def leaks(
    train_units: Sequence[Unit], heldout_units: Sequence[Unit], threshold: float = THRESHOLD
) -> list[tuple[int, int, float]]:
    """The held-out units that have a near-duplicate in training.

    Returns:
        (index in training, index in held-out, ratio), by the held-out index; the first training unit with the same text,
        else the first that is similar.

    Raises:
        ValueError: if `threshold` is not between 0 and 1.
    """
    different, numbers, firsts = _distinct([*train_units, *heldout_units])
    boundary = sum(first < len(train_units) for first in firsts)
    leaked: dict[int, tuple[int, float]] = {}
    for first, second, ratio in _similar(different, threshold, boundary):
        leaked.setdefault(second, (first, ratio))  # the pairs are sorted
    found = []
    for index, number in enumerate(numbers[len(train_units) :]):
        if number < boundary:
            found.append((firsts[number], index, 1.0))
        elif number in leaked:
            first, ratio = leaked[number]
            found.append((firsts[first], index, ratio))
    return found


def units(row: Row) -> list[tuple[int, Unit]]:
    """(index of the message, unit) of each reply of a dialogue row that follows a user's turn and is trained."""
    messages = row["messages"]
    return [
        (at, (messages[at - 1]["content"], message["content"]))
        for at, message in enumerate(messages)
        if at and message["role"] == "assistant" and message.get("train", True)
    ]


def placed_units(rows: Sequence[Row]) -> list[tuple[int, int, Unit]]:
    """(index of the row, of the message, unit) of every unit."""
    return [(number, at, unit) for number, row in enumerate(rows) for at, unit in units(row)]


def drop_duplicates(rows: Sequence[Row], threshold: float = THRESHOLD) -> tuple[list[Row], list[Row]]:
    """Dialogue rows whose near-duplicate replies are context only ("train": False), and what was rejected.

    Here the replies alone have to be similar too: what a persona is about is that the same question has another answer
    ("I'm a farmer.", "I'm a student."). Of the 25,374 units of Synthetic-Persona-Chat's validation file 4,085 are
    near-duplicates, and 3,463 with similar replies.

    A reply is not cut out of its conversation. A dialogue of which every trained reply is a near-duplicate is dropped.
    `rows` are not changed; a row without duplicates is returned as it is.

    Returns:
        The rows that are left, and an entry for each reply or dialogue that is not trained: {"reason", "dropped" ("reply"
        or "dialogue"), "text", "dialogue_id", "duplicate_of"}, with "file" and "line" where the row has them.
        "duplicate_of" lists for each reply {"message" (its index), "dialogue_id" and "reply" (dialogue and message index
        of the kept one), "ratio"}.

    Raises:
        ValueError: if `threshold` is not between 0 and 1.
    """
    places = placed_units(rows)
    duplicates: dict[int, list[Row]] = {}
    for kept, dropped, ratio in near_duplicates([unit for *_, unit in places], threshold, by_reply_too=True):
        number, at, _ = places[dropped]
        kept_number, kept_at, _ = places[kept]
        duplicates.setdefault(number, []).append(
            {
                "message": at,
                "dialogue_id": rows[kept_number]["dialogue_id"],
                "reply": kept_at,
                "ratio": round(ratio, 4),
            }
        )
    left: list[Row] = []
    rejected: list[Row] = []
    for number, row in enumerate(rows):
        found = duplicates.get(number, [])
        if found and len(found) == len(units(row)):
            text = "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])
            rejected.append(_entry(row, DIALOGUE_REASON, "dialogue", text, found))
            continue
        for duplicate in found:
            text = row["messages"][duplicate["message"]]["content"]
            rejected.append(_entry(row, REPLY_REASON, "reply", text, [duplicate]))
        left.append(untrained(row, {duplicate["message"] for duplicate in found}) if found else row)
    return left, rejected


def untrained(row: Row, indices: set[int]) -> Row:
    """The row with these messages marked `train: False`."""
    messages = [
        {**message, "train": False} if at in indices else message for at, message in enumerate(row["messages"])
    ]
    return {**row, "messages": messages}


def _entry(row: Row, reason: str, dropped: str, text: str, duplicate_of: list[Row]) -> Row:
    place: Row = {key: row[key] for key in ("file", "line") if key in row}
    return {
        **place,
        "reason": reason,
        "dropped": dropped,
        "text": text,
        "dialogue_id": row["dialogue_id"],
        "duplicate_of": duplicate_of,
    }


def _distinct(units: Sequence[Unit]) -> tuple[list[Unit], list[int], list[int]]:
    """The different units, for each unit the number of the same one among these, and each one's first index."""
    number_of: dict[Unit, int] = {}
    firsts: list[int] = []
    for index, unit in enumerate(units):
        if number_of.setdefault(unit, len(firsts)) == len(firsts):
            firsts.append(index)
    return list(number_of), [number_of[unit] for unit in units], firsts


def _similar(units: Sequence[Unit], threshold: float, boundary: int | None = None) -> list[tuple[int, int, float]]:
    return similar_pairs([f"{user}\n{reply}" for user, reply in units], threshold, boundary)
