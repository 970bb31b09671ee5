"""Pairs of similar texts among many, in nearly linear time: MinHash proposes pairs, the sequence ratio decides.

The ratio of two texts is 2 M / T, with T the number of characters of both and M the length of their longest common
subsequence (rapidfuzz calls this normalised Indel similarity). `difflib.SequenceMatcher.ratio` has the same formula, but
its M is the length of the blocks that it finds greedily, the longest first. These blocks are a common subsequence too,
so what difflib calls similar is always similar here. Of the 411 pairs above 0.85 among 10,000 different (user turn,
reply) texts of Synthetic-Persona-Chat and ConvAI2 difflib finds 398, for 17 it depends on the order of the two texts,
and with its default `autojunk` it ignores frequent characters, that is all letters, of a text of 200 characters or more.

Proposed are pairs that share a bucket of some band of their MinHash signatures over character trigrams (Broder 1997;
Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) and whose sketches agree. Every proposal is verified,
so no pair is reported that is not similar; a few are missed. Among 32,000 texts of the two data sets, which were edited
at random places down to a ratio of 0.86 to 0.88, all 270 with replaced characters and all 143 with replaced words were
found, 0.99 of 297 with deleted and 0.95 of 282 with inserted characters. datasketch, the usual library, holds a Python
set for each text and band: for 400,000 texts and 256 bands that does not fit into 2 GB. Here a band is an array, sorted
and forgotten.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Indel

Integers = NDArray[np.int64]
Minima = NDArray[np.uint16]

# A text that was edited at random places until the ratio is 0.86 agrees in about 0.44 of the minima where characters were
# replaced, in 0.33 where they were deleted, in 0.3 where they were inserted. At 0.3 a band of three minima holds a pair
# with probability 0.3^3 = 0.027, and one of 256 bands with 1 - (1 - 0.027)^256 = 0.999.
_BANDS = 256
# A larger bucket is divided by a fourth minimum; if that is not enough, only neighbours in length are compared. This
# keeps the work nearly linear where thousands of texts begin with the same question. More bands with smaller buckets
# find more for the same time than fewer with larger ones.
_BUCKET = 8
# Most pairs that share a bucket do so by chance, the more texts the more. They are told by further minima, one byte of
# each: of 64 (which fill a line of the cache) at least 7 have to agree, then of 192 at least 34. Pairs that agree in 0.3
# of all minima have 19 +- 4 and 58 +- 6, those that agree in 0.1 have 6 +- 2 and 19 +- 4.
_SKETCHES = (64, 192)
_AGREEMENT = (7, 34)
_AT_ONCE = 32  # minima worked out at a time
_TRIGRAMS = 16_000  # looked up at a time: with 32 ranks of 2 bytes each 1 MB, which a core's cache holds
_PAIRS = 500_000  # verified at a time: about 100 MB


def similar_pairs(texts: Sequence[str], threshold: float, boundary: int | None = None) -> list[tuple[int, int, float]]:
    """The pairs of different texts whose ratio is above the threshold.

    Args:
        texts: Each once.
        threshold: 0 to 1. Recall was measured for 0.85; below that it falls.
        boundary: Only pairs of a text before this index and one from it on; None takes all pairs.

    Returns:
        (i, j, ratio) with i < j, sorted.

    Raises:
        ValueError: if `threshold` is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` must be above 0 and below 1, got {threshold}. The usual value is 0.85.")
    ratio_of: dict[int, float] = {}
    for codes in _candidates(texts, threshold, boundary):
        first, second = np.divmod(codes, len(texts))
        ratios = process.cpdist(
            [texts[i] for i in first.tolist()],
            [texts[j] for j in second.tolist()],
            scorer=Indel.normalized_similarity,
            score_cutoff=threshold,
            dtype=np.float64,  # 32 bits would round 0.85 up
        )
        similar = ratios > threshold
        ratio_of.update(zip(codes[similar].tolist(), ratios[similar].tolist(), strict=True))
    return [(*divmod(code, len(texts)), ratio) for code, ratio in sorted(ratio_of.items())]


def _candidates(texts: Sequence[str], threshold: float, boundary: int | None) -> Iterator[Integers]:
    """Pairs that may be similar, as i * len(texts) + j with i < j; each once in a batch, but perhaps in several."""
    if len(texts) < 2:
        return
    order = np.argsort([len(text) for text in texts], kind="stable")
    lengths = np.array([len(texts[i]) for i in order])
    least_lengths = lengths * (threshold / (2 - threshold))
    signatures = _signatures([texts[i] for i in order])
    sketches = [
        np.concatenate([next(signatures).astype(np.uint8) for _ in range(0, columns, _AT_ONCE)], axis=1)
        for columns in _SKETCHES
    ]
    waiting: list[Integers] = []
    for minima in signatures:
        for at in range(0, _AT_ONCE, 4):
            for left, right in _bucket_pairs(minima[:, at : at + 4]):
                # No common subsequence is longer than the shorter text, so 2 left > threshold * (left + right).
                possible = lengths.take(left) > least_lengths.take(right)
                if boundary is not None:
                    possible &= (order[left] < boundary) != (order[right] < boundary)
                left, right = left[possible], right[possible]
                for sketch, least in zip(sketches, _AGREEMENT, strict=True):
                    alike = _agreement(sketch.take(left, axis=0), sketch.take(right, axis=0)) >= least
                    left, right = left[alike], right[alike]
                one, other = order[left], order[right]
                waiting.append(np.minimum(one, other) * len(texts) + np.maximum(one, other))
                if sum(map(len, waiting)) > _PAIRS:
                    yield _different(waiting)
                    waiting = []
    if waiting:
        yield _different(waiting)


def _different(parts: list[Integers]) -> Integers:
    """The different values, sorted. Several times faster than numpy's `unique`, which hashes since numpy 2.3."""
    values = np.sort(np.concatenate(parts))
    return values[np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]]


def _agreement(sketches: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """For each row in how many of its columns, of which there are less than 256, they agree."""
    equal = (sketches == others).view(np.uint64)  # eight columns a number, a byte each
    # The product with this constant has the sum of the eight bytes in its highest byte.
    return (equal @ np.full(equal.shape[1], 0x0101010101010101, np.uint64)) >> np.uint64(56)


def _bucket_pairs(minima: Minima) -> Iterator[tuple[Integers, Integers]]:
    """Pairs of rows in one bucket, (n, 4) minima for texts sorted by length; of each pair the shorter text first."""
    keys = minima.astype(np.uint64) @ (np.uint64(1) << np.array([48, 32, 16, 0], dtype=np.uint64))
    order = np.argsort(keys, kind="stable")  # stable: by length within a bucket
    four = keys[order]
    three = four >> np.uint64(16)
    begins = three[1:] != three[:-1]
    bucket = np.concatenate([[0], np.cumsum(begins)])
    large = np.bincount(bucket)[bucket[1:]] > _BUCKET
    bucket = np.concatenate([[0], np.cumsum(begins | (large & (four[1:] != four[:-1])))])
    left = np.arange(len(bucket))
    for gap in range(1, _BUCKET + 1):
        left = left[left + gap < len(bucket)]
        left = left[bucket[left] == bucket[left + gap]]
        if not len(left):
            return
        one, other = order[left], order[left + gap]
        yield np.minimum(one, other), np.maximum(one, other)


def _signatures(texts: Sequence[str]) -> Iterator[Minima]:
    """MinHash values of texts sorted by length, (texts, 32) at a time: first the sketches', then four for each band.

    The minima are weighted: the least of exponential times with rates w is that of trigram g with probability
    w_g / sum w. What stands in every other text ("you") says little and is rarely chosen. Without the upper limit the
    rare trigrams of a misspelling would be chosen first, and near-duplicates lost.
    """
    number = np.zeros(1 << 16)
    matrices: list[NDArray[np.uint16]] = []
    for begin, end in _groups([len(text) for text in texts]):
        grams, inside = _trigrams(texts[begin:end])
        number += np.bincount(grams[inside], minlength=1 << 16)
        matrices.append(grams)
    occurs = number > 0  # times are needed for these alone
    compact = (np.cumsum(occurs) - 1).astype(np.uint16)
    matrices = [compact[grams] for grams in matrices]
    weights = np.clip(-np.log(number[occurs] / len(texts)), 0.3, 3.5)
    rng = np.random.default_rng(0)
    for _ in range(0, sum(_SKETCHES) + 4 * _BANDS, _AT_ONCE):
        times = rng.exponential(size=(len(weights), _AT_ONCE)) / weights[:, None]
        ranks = times.astype(np.float16).view(np.uint16)  # positive floats are in the order of their bits
        yield np.concatenate([ranks.take(matrix, axis=0).min(axis=0) for matrix in matrices])


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of runs of texts, by rising length, that make about 16,000 trigrams when padded to the last one's."""
    begin = 0
    for end, length in enumerate(lengths):
        if begin < end and (end + 1 - begin) * (length + 2) > _TRIGRAMS:
            yield begin, end
            begin = end
    yield begin, len(lengths)


def _trigrams(texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Hashes of the trigrams, a column a text, and which of them are the text's own.

    Two blanks on either side of a text (the character 0) give a text of one character three trigrams, and an edit at an
    end of a short text no more weight than one in the middle. Columns are filled up with the text's first trigram, which
    changes no minimum.
    """
    lengths = np.array([len(text) for text in texts])
    width = lengths.max() + 4
    padded = "".join(("\0\0" + text).ljust(width, "\0") for text in texts)
    codes = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    letters = codes.astype(np.uint64).reshape(len(texts), width).T
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)  # odd, arbitrary
    mixed = letters[:-2] * factors[0] + letters[1:-1] * factors[1] + letters[2:] * factors[2]
    hashed = (((mixed ^ (mixed >> np.uint64(29))) * factors[0]) >> np.uint64(48)).astype(np.uint16)
    inside = np.arange(width - 2)[:, None] < lengths + 2
    return np.where(inside, hashed, hashed[0]), inside
