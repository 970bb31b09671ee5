"""The split into training and held-out rows: no character and no dialogue on both sides."""

import random
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rlhf.data.sources import DataError

RowT = TypeVar("RowT", bound=Mapping[str, Any])


def persona_key(facts: Iterable[str]) -> frozenset[str]:
    """A persona as a set of facts, blind to order, case, spacing and punctuation."""
    return frozenset(re.sub(r"\W+", " ", fact).strip().casefold() for fact in facts)


def characters(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """A number for the character of each row: personas that share more than half of their facts are one character.

    Half of the smaller persona's facts; a chain of such personas is one character too. Equal sets would not do: the
    540 different personas of Synthetic-Persona-Chat's validation file are 100 people, each described by four or five
    facts out of about five.
    """
    keys = [persona_key(row["persona"]) for row in rows]
    character: dict[frozenset[str], int] = {}
    with_fact: dict[str, list[frozenset[str]]] = defaultdict(list)
    for key in dict.fromkeys(keys):
        for fact in key:
            with_fact[fact].append(key)
    for number, first in enumerate(dict.fromkeys(keys)):
        queue = [first]
        while queue:
            key = queue.pop()
            if key not in character:
                character[key] = number
                common = Counter(other for fact in key for other in with_fact[fact])
                queue.extend(other for other, shared in common.items() if 2 * shared > min(len(key), len(other)))
    return [character[key] for key in keys]


def split(rows: Sequence[RowT], heldout: float, seed: int) -> tuple[list[RowT], list[RowT], list[RowT]]:
    """Training rows, held-out rows, and the rows that belong to neither side.

    Characters and dialogues make a graph. Characters are held out one after another along it, from a random start, so
    that a part of the data that hangs together stays together where it can. In Synthetic-Persona-Chat everything hangs
    together; there a dialogue between the two sides keeps its held-out row, and its other row, whose user turns would
    be held-out replies, is left out. Where all rows are of one character, whole dialogues are held out.

    Args:
        rows: With `persona` (list of facts) and `dialogue_id`.
        heldout: The share of the rows to hold out if below 1, else their number; characters stay whole, so it can
            become a few more.
        seed: Of the order of the characters.

    Raises:
        DataError: if a side would be empty.
    """
    target = heldout if heldout >= 1 else heldout * len(rows)
    if not 0 < target < len(rows):
        raise DataError(f"`heldout` must leave rows on both sides of {len(rows)} rows, got {heldout}")
    indices: dict[int, list[int]] = defaultdict(list)
    met: dict[str, list[int]] = defaultdict(list)
    of = characters(rows)
    if len(set(of)) == 1:
        dialogues: dict[str, int] = {}
        of = [dialogues.setdefault(row["dialogue_id"], len(dialogues)) for row in rows]
    for index, (character, row) in enumerate(zip(of, rows, strict=True)):
        indices[character].append(index)
        met[row["dialogue_id"]].append(character)
    order = list(indices)
    random.Random(f"split/{seed}").shuffle(order)

    chosen: set[int] = set()
    seen: set[int] = set()
    for first in order:
        queue = deque([first])
        while queue and len(chosen) < target:
            character = queue.popleft()
            if character not in seen:
                seen.add(character)
                chosen.update(indices[character])
                queue.extend(other for index in indices[character] for other in met[rows[index]["dialogue_id"]])
    heldout_dialogues = {rows[index]["dialogue_id"] for index in chosen}
    train: list[RowT] = []
    held: list[RowT] = []
    neither: list[RowT] = []
    for index, row in enumerate(rows):
        side = held if index in chosen else neither if row["dialogue_id"] in heldout_dialogues else train
        side.append(row)
    if not train:
        raise DataError(
            f"`heldout` {heldout} of {len(rows)} rows leaves no training rows: they are of {len(order)} characters, "
            "and none may stand on both sides. Add dialogues of other characters, or hold out fewer."
        )
    return train, held, neither
