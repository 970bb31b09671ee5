"""Near-duplicates: two units, each (last user turn, reply), whose texts have a sequence ratio above 0.85.

The ratio of two texts is 2 M / T, with T the number of characters of both. Here M is the length of their longest common
subsequence (rapidfuzz calls this normalised Indel similarity). `difflib.SequenceMatcher.ratio` has the same formula, but
its M is the length of the blocks that it finds greedily, the longest first. These blocks are a common subsequence too,
so what difflib calls similar is always similar here. On 10,000 units of Synthetic-Persona-Chat and ConvAI2 difflib finds
808 of the 842 pairs that are found here, its value depends on the order of the two texts, and with its default
`autojunk` it ignores frequent characters, that is all letters, of a text of 200 characters or more.

Candidates come from MinHash signatures over character trigrams, in bands (Broder 1997; Leskovec, Rajaraman, Ullman, Mining
of Massive Datasets, chapter 3). Each candidate is verified, so every pair that is reported is a pair. The tables of
datasketch hold a Python set for each text and band, which for 400,000 units and 200 bands does not fit into 2 GB: a band
is an array here, sorted and forgotten.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Indel

Row = dict[str, Any]
Unit = tuple[str, str]
Integers = NDArray[np.int64]

THRESHOLD = 0.85
REPLY_REASON = "near-duplicate"
DIALOGUE_REASON = "every reply is a near-duplicate"
EXEMPT_SOURCE = "world"  # a generated world repeats itself by design

# A text changed in scattered places down to a ratio of 0.86 shares about 0.3 to 0.5 of its trigrams. At 0.3 a band of
# three minima holds it with probability 0.027, 200 bands with 0.996.
_BANDS = 200
_MINIMA = 3
# A larger bucket is divided by a fourth minimum; if that is not enough, only neighbours in length are compared. This keeps
# the work linear where thousands of texts begin with the same question.
_BUCKET = 16
_BATCH = 2_000_000  # candidates verified at a time: about 100 MB
_CHUNK = 20_000  # texts whose trigrams are hashed at a time


def near_duplicates(units: Sequence[Unit], threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """The units to drop: from the first on, each that is similar to one that was kept.

    A unit that is similar only to dropped units is kept, so there are no chains: what is dropped has a kept unit of which
    it is a near-duplicate.

    Args:
        units: (last user turn, reply).
        threshold: Ratio, 0 to 1, above which two units are near-duplicates. Recall was measured for 0.85; below that it
            falls.

    Returns:
        (index of the kept unit, index of the dropped unit, their ratio), by the dropped index. Of several kept units that
        are similar, the first; where the same text was kept, that one.

    Raises:
        ValueError: if `threshold` is not between 0 and 1.
    """
    texts, numbers, firsts = _distinct(units)
    earlier: dict[int, list[tuple[int, float]]] = {}
    for first, second, ratio in _similar(texts, threshold):
        earlier.setdefault(second, []).append((first, ratio))
    kept_for: dict[int, tuple[int, float]] = {}
    for number in sorted(earlier):
        kept = [pair for pair in earlier[number] if pair[0] not in kept_for]
        if kept:
            kept_for[number] = min(kept)
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
    texts, numbers, firsts = _distinct([*train_units, *heldout_units])
    boundary = sum(first < len(train_units) for first in firsts)
    leaked: dict[int, tuple[int, float]] = {}
    for first, second, ratio in _similar(texts, threshold, boundary):
        leaked[second] = min(leaked.get(second, (first, ratio)), (first, ratio))
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
    """(index of the row, of the message, unit) of every unit that is looked at: none of a generated world's."""
    return [
        (number, at, unit)
        for number, row in enumerate(rows)
        if row["source"] != EXEMPT_SOURCE
        for at, unit in units(row)
    ]


def drop_duplicates(rows: Sequence[Row], threshold: float = THRESHOLD) -> tuple[list[Row], list[Row]]:
    """Dialogue rows whose near-duplicate replies are context only ("train": False), and what was rejected.

    Here the reply alone has to be similar too: of 4,085 near-duplicate units of Synthetic-Persona-Chat's validation file
    1,035 are the same long question with another answer ("I'm a farmer.", "I'm a student.").

    A reply is not cut out of its conversation. A dialogue of which every trained reply is a near-duplicate is dropped.
    Rows of the source "world" are exempt. `rows` are not changed; a row without duplicates is returned as it is.

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
    for kept, dropped, ratio in near_duplicates([unit for _, _, unit in places], threshold):
        number, at, unit = places[dropped]
        kept_number, kept_at, kept_unit = places[kept]
        if Indel.normalized_similarity(unit[1], kept_unit[1]) <= threshold:
            continue  # the same question, and another answer: what a persona is about
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


def _distinct(units: Sequence[Unit]) -> tuple[list[str], list[int], list[int]]:
    """The different texts of the units, the number of each unit's text, and each text's first unit."""
    number_of: dict[str, int] = {}
    firsts: list[int] = []
    numbers: list[int] = []
    for index, (user, reply) in enumerate(units):
        number = number_of.setdefault(f"{user}\n{reply}", len(firsts))
        if number == len(firsts):
            firsts.append(index)
        numbers.append(number)
    return list(number_of), numbers, firsts


def _similar(texts: list[str], threshold: float, boundary: int | None = None) -> Iterator[tuple[int, int, float]]:
    """(i, j, ratio) with i < j, each pair once; with a boundary only pairs that have it between them."""
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` must be above 0 and below 1, got {threshold}. The usual value is {THRESHOLD}.")
    count = len(texts)
    codes: list[Integers] = []
    ratios: list[NDArray[np.float64]] = []
    for code in _candidates(texts, threshold):
        first, second = np.divmod(code, count)
        if boundary is not None:
            across = (first < boundary) & (second >= boundary)
            code, first, second = code[across], first[across], second[across]
        ratio = process.cpdist(
            [texts[i] for i in first.tolist()],
            [texts[j] for j in second.tolist()],
            scorer=Indel.normalized_similarity,
            score_cutoff=threshold,
            dtype=np.float64,  # 32 bits would round 0.85 up
        )
        codes.append(code[ratio > threshold])
        ratios.append(ratio[ratio > threshold])
    if codes:
        code, at = np.unique(np.concatenate(codes), return_index=True)
        ratio = np.concatenate(ratios)[at]
        first, second = np.divmod(code, count)
        yield from zip(first.tolist(), second.tolist(), ratio.tolist(), strict=True)


def _candidates(texts: list[str], threshold: float) -> Iterator[Integers]:
    """Pairs that share a bucket of some band, as i * len(texts) + j with i < j; a pair at most once in each batch."""
    if len(texts) < 2:
        return
    lengths = np.array([len(text) for text in texts])
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    waiting: list[Integers] = []
    size = 0
    for keys in _bands([texts[i] for i in order.tolist()]):
        for left, right in _bucket_pairs(keys):  # right is the longer one
            # No common subsequence is longer than the shorter text.
            possible = 2 * lengths[left] > threshold * (lengths[left] + lengths[right])
            one, other = order[left[possible]], order[right[possible]]
            waiting.append(np.minimum(one, other) * len(texts) + np.maximum(one, other))
            size += len(one)
            if size > _BATCH:
                yield _unique(waiting)
                waiting, size = [], 0
    if waiting:
        yield _unique(waiting)


def _unique(parts: list[Integers]) -> Integers:
    """The different values, sorted. Several times faster than numpy's `unique`, which hashes since numpy 2.3."""
    values = np.sort(np.concatenate(parts))
    return values[np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]]


def _bucket_pairs(keys: NDArray[np.uint64]) -> Iterator[tuple[Integers, Integers]]:
    """Pairs of indices (i < j) in one bucket, for texts sorted by length and their keys of one band."""
    order = np.argsort(keys, kind="stable")  # stable: by length within a bucket
    keys = keys[order]
    shifted = keys >> np.uint64(16)  # without the fourth minimum
    begins = shifted[1:] != shifted[:-1]
    bucket = np.concatenate([[0], np.cumsum(begins)])
    large = np.bincount(bucket)[bucket[1:]] > _BUCKET
    bucket = np.concatenate([[0], np.cumsum(begins | (large & (keys[1:] != keys[:-1])))])
    left = np.arange(len(keys))
    for gap in range(1, _BUCKET + 1):
        left = left[left + gap < len(keys)]
        left = left[bucket[left] == bucket[left + gap]]
        if not len(left):
            return
        one, other = order[left], order[left + gap]
        yield np.minimum(one, other), np.maximum(one, other)


def _bands(texts: list[str]) -> Iterator[NDArray[np.uint64]]:
    """For each band a key a text: its three minima and the fourth, 16 bits each, the fourth lowest."""
    grams, starts = _trigrams(texts)
    number = np.bincount(grams, minlength=1 << 16)
    share = number[number > 0] / len(texts)
    grams = (np.cumsum(number > 0) - 1).astype(np.uint16)[grams]  # only the trigrams that occur need a rank
    # Weighted MinHash: the least of exponential times with rate w is gram g with probability w_g / sum w. What stands in
    # every other text ("you") says little and is rarely chosen. Without the upper limit the rare trigrams of a
    # misspelling would be chosen first, and near-duplicates lost.
    weights = np.clip(-np.log(share), 0.3, 3.5)
    rng = np.random.default_rng(0)
    for _ in range(_BANDS):
        keys = np.zeros(len(texts), dtype=np.uint64)
        for _ in range(_MINIMA + 1):
            ranks = np.empty(len(weights), dtype=np.uint16)
            ranks[np.argsort(rng.exponential(size=len(weights)) / weights)] = np.arange(len(weights))
            keys = (keys << np.uint64(16)) | np.minimum.reduceat(ranks[grams], starts).astype(np.uint64)
        yield keys


def _trigrams(texts: list[str]) -> tuple[NDArray[np.uint16], Integers]:
    """Hashes of the trigrams of all texts, one after another, and where each text begins.

    Two blanks on either side of a text (the character 0) give a text of one character three trigrams, and an edit at an
    end of a short text no more weight than one in the middle.
    """
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)  # odd, arbitrary
    parts = []
    for begin in range(0, len(texts), _CHUNK):
        padded = ["\0\0" + text + "\0\0" for text in texts[begin : begin + _CHUNK]]
        letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        letters = letters.astype(np.uint64)
        hashed = sum((letters[k : len(letters) - 2 + k] * factors[k] for k in range(3)), np.uint64(0))
        hashed = ((hashed ^ (hashed >> np.uint64(29))) * factors[0]) >> np.uint64(48)
        ends = np.cumsum([len(text) for text in padded])[:-1]
        parts.append(np.delete(hashed, np.concatenate([ends - 2, ends - 1])).astype(np.uint16))
    counts = np.array([len(text) + 2 for text in texts])
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(counts)[:-1]])
